"""Ranks: which of them does what, and what they exchange."""

import torch

from process import run_ranks
from runtime.rng import generator

ON_EACH_RANK = """
import os, sys, torch
from runtime.distributed import *
from runtime.rng import generator
from runtime.signals import StopSignal
from vae import load_vae
start()
mine, first = own_indices(3), own_indices(1)
found = {
    "broadcast": broadcast(["from", rank()]),
    "gather": gather(rank() * 10),
    "average": average(torch.tensor([1.0, 3.0]) * (1 + rank())),
    "collect": collect(mine, torch.tensor(mine) * 10),
    "collect from one": collect(first, torch.ones(1, 2) if first else torch.empty(0)),
    "drawn": torch.rand(4, generator=generator(0, "noise", 3)),
}
signal, found["saves"] = StopSignal(), []
for saving in ([], [1], [0, 1]):
    signal.vote(save=rank() in saving)
    found["saves"].append(signal.resolve())
found["saves"].append(signal.resolve())
stop()
load_vae("none")
found["imported"] = sorted({"diffusers", "huggingface_hub"} & set(sys.modules))
torch.save(found, os.environ["OUT"])
"""


def test_ranks_exchange_values_vote_on_saves_and_draw_the_same_numbers(tmp_path):
    on_all = {
        "broadcast": ["from", 0], "gather": [0, 10], "average": [1.5, 4.5], "saves": [False, True, True, False],
        "drawn": torch.rand(4, generator=generator(0, "noise", 3)).tolist(), "imported": [],
    }  # fmt: skip
    on_first = {"collect": [0, 10, 20], "collect from one": [[1.0, 1.0]]}
    expected = [on_all | on_first, on_all | dict.fromkeys(on_first)]
    found = run_ranks(ON_EACH_RANK, 2, tmp_path)
    assert [{k: v.tolist() if torch.is_tensor(v) else v for k, v in rank.items()} for rank in found] == expected
