"""--shard: what is spread over the ranks computes, saves and resumes as what is not."""

import os
from functools import partial

import pytest
import torch
import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.tensor
from torch.utils._pytree import tree_map

import sharded_ranks
from process import run_ranks
from runtime import memory
from sharded_ranks import GATHERED, KINDS
from training import differences

# torch imports its modules _dynamo, fsdp and tensor late; the ranks, forks, have them from here

RANKS = 3  # which divide few of the sizes, and whose sums depend on their order
ROUNDING = {"accumulation": 1e-5, "muon": 1e-2, "energy": 1e-5}  # Muon computes in bf16


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank has found, see sharded_ranks.py."""
    folder = tmp_path_factory.mktemp("sharded")
    found, _ = run_ranks(partial(sharded_ranks.main, folder), RANKS)
    return found


def distance(one, other):
    """The norm of the difference of two sets of weights."""
    return sum((one[name].double() - other[name]).square().sum() for name in one).sqrt()


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_training_is_ddp_up_to_rounding_in_a_share_of_the_memory(kind, found):
    (start, _), sharded_start = found[0][kind]["start"]
    assert [differences(start, weights) for weights in sharded_start] == [[], []]
    for one, other in zip(*found[0][kind]["end"], strict=True):  # weights, then EMA
        assert distance(one, other) < ROUNDING[kind] * distance(one, start)
    norm, sharded_norm = found[0][kind]["norms"]
    assert sharded_norm == pytest.approx(norm, rel=ROUNDING[kind])
    for rank in found:
        held, weights, block = rank[kind]["bytes"]
        # weights, gradients, two states of AdamW, EMA
        assert held < 1.05 * 5 * weights / RANKS + block


@pytest.mark.parametrize("precision", GATHERED)
def test_rounding_before_weights_are_gathered_saves_a_third_of_the_bytes_and_changes_no_bit(
    precision, found
):
    for rank in found:
        (usual_sent, usual_kept, usual), (sent, kept, weights) = rank[precision]
        assert sent <= 0.67 * usual_sent
        assert differences(usual, weights) == []
        # without checkpointing; rounded copies of both blocks take as much as one block
        if precision == "bf16":
            assert usual_kept - kept > 0.9 * rank["muon"]["bytes"][2]


def test_a_sharded_checkpoint_has_the_form_of_ddp_and_loads_again(found):
    first, second, usual = found[0]["saved"]
    assert differences(first, second) == []
    forms = [
        tree_map(lambda x: (x.shape, x.dtype) if torch.is_tensor(x) else x, state)
        for state in (first, usual)
    ]
    assert forms[0] == forms[1]
    weights, ema = found[0]["muon"]["end"][1]
    assert differences([first["model"], first["ema"]], [weights, ema]) == []


def test_too_little_memory_for_a_checkpoint_is_one_line_on_all_ranks(found):
    (message,) = {rank["refusal"] for rank in found}
    assert message.startswith("--shard: a checkpoint takes 0.0")
    assert "1e-06 GB free" in message


def test_free_memory_is_limited_by_the_machine_and_by_its_container(tmp_path, monkeypatch):
    of_machine = memory.free_bytes()
    assert 2**20 < of_machine < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    (tmp_path / "memory.stat").write_text("anon 9\ninactive_file 250000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    (tmp_path / "memory.max").write_text("5000000\n")
    assert memory.free_bytes() == 4_250_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes() > 4_250_000


def test_fp16_skips_a_step_on_all_ranks_if_the_gradient_of_one_overflows(found):
    assert [rank["overflow"] for rank in found] == [(512.0, [])] * RANKS
