"""Ranks: which of them does what, and what they exchange."""

import socket

import pytest
import torch

from process import python
from runtime import distributed
from runtime.rng import generator


def test_alone_there_is_one_rank_and_nothing_to_exchange(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (distributed.rank(), distributed.local_rank(), distributed.world_size()) == (0, 0, 1)
    assert distributed.broadcast({"a": 1}) == {"a": 1}
    assert distributed.gather("x") == ["x"]
    assert distributed.own_indices(4) == [0, 1, 2, 3]
    assert distributed.average(torch.tensor(3.0)) == 3
    assert distributed.collect([2, 0, 1], torch.tensor([20, 0, 10])).tolist() == [0, 10, 20]
    distributed.stop()


@pytest.mark.parametrize("count", [0, 1, 3, 8, 9])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_the_indices_of_all_ranks_are_all_indices(count, world_size, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    parts = []
    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(distributed.own_indices(count))
    assert sorted(sum(parts, [])) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


TWO_RANKS = """
import sys, torch
from runtime.distributed import *
from runtime.rng import generator, normal
from vae import load_vae
start()
mine = own_indices(3)
print([
    broadcast(["from", rank()]),
    gather(rank() * 10),
    average(torch.tensor([1.0, 3.0]) * (1 + rank())).tolist(),
    None if (all := collect(mine, torch.tensor(mine) * 10)) is None else all.tolist(),
    None if (first := collect(own_indices(1), normal(0, "noise", 0, own_indices(1), (2,)))) is None else first.shape[0],
])
stop()
print(torch.rand(4, generator=generator(0, "noise", 3)).tolist())
load_vae("none")
print({"diffusers", "huggingface_hub"} & set(sys.modules))
"""


def test_two_ranks_exchange_what_they_hold_draw_the_same_as_this_process_and_need_no_diffusers_for_pixels():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}
    ranks = [
        python(TWO_RANKS, RANK=str(rank), LOCAL_RANK=str(rank), PYTHONHASHSEED=str(rank + 1), **place)
        for rank in (0, 1)
    ]
    shared = "[['from', 0], [0, 10], [1.5, 4.5], "
    drawn = torch.rand(4, generator=generator(0, "noise", 3)).tolist()
    for process, collected in zip(ranks, ("[0, 10, 20], 1]", "None, None]"), strict=True):
        out, err = process.communicate()
        assert out.splitlines() == [shared + collected, str(drawn), "set()"], err
        assert process.returncode == 0
