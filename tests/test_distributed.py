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
    assert distributed.gather_on_first("x") == ["x"]
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


def test_in_blocks_the_ranks_take_whole_batches_in_turn(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    parts = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(distributed.own_indices(9, block=2))
    assert parts == [[0, 1, 6, 7], [2, 3, 8], [4, 5]]


AGREEMENT = """
from runtime.distributed import *
from runtime.signals import StopSignal
start(STEP_TIME)
signal = StopSignal()
answers = []
for saving in ([], [1], [0, 1]):
    signal.ask(save=rank() in saving)
    answers.append(signal.settle())
print([*answers, signal.settle()])
stop()
"""


def test_all_ranks_save_at_the_step_at_which_one_of_them_wants_to():
    for process in two_ranks(AGREEMENT):
        out, err = process.communicate()
        assert out == "[False, True, True, False]\n", err


TWO_RANKS = """
import sys, torch
from runtime.distributed import *
from runtime.rng import generator
from vae import load_vae
start()
mine = own_indices(3)
print([
    broadcast(["from", rank()]),
    gather(rank() * 10),
    gather_on_first(rank() * 10),
    average(torch.tensor([1.0, 3.0]) * (1 + rank())).tolist(),
    None if (all := collect(mine, torch.tensor(mine) * 10)) is None else all.tolist(),
    None if (first := collect(own_indices(1), torch.ones(1, 2) if rank() == 0 else torch.empty(0))) is None
    else first.tolist(),
])
stop()
print(torch.rand(4, generator=generator(0, "noise", 3)).tolist())
load_vae("none")
print({"diffusers", "huggingface_hub"} & set(sys.modules))
"""


def two_ranks(code):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}
    return [
        python(code, RANK=str(rank), LOCAL_RANK=str(rank), PYTHONHASHSEED=str(rank + 1), **place) for rank in (0, 1)
    ]


def test_two_ranks_exchange_what_they_hold_draw_the_same_as_this_process_and_need_no_diffusers_for_pixels():
    shared = "[['from', 0], [0, 10], "
    drawn = torch.rand(4, generator=generator(0, "noise", 3)).tolist()
    on_first, on_second = "[0, 10], [1.5, 4.5], [0, 10, 20], [[1.0, 1.0]]]", "None, [1.5, 4.5], None, None]"
    for process, collected in zip(two_ranks(TWO_RANKS), (on_first, on_second), strict=True):
        out, err = process.communicate()
        assert out.splitlines() == [shared + collected, str(drawn), "set()"], err
        assert process.returncode == 0
