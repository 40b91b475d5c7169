"""--shard: what is spread over the ranks computes, saves and resumes as what is not."""

from pathlib import Path

import pytest
import torch

import checkpoint
from process import run_ranks
from sharded_ranks import KINDS, PUBLISHED
from test_published import published_state, write_file
from training import differences

RANKS = 3  # which divide few of the sizes, and whose sums depend on their order
ROUNDING = {"accumulation": 1e-5, "muon": 1e-2, "energy": 1e-5}  # Muon computes in bf16


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank has found, see sharded_ranks.py."""
    code = f"sys.path.append({str(Path(__file__).parent)!r}); import sharded_ranks; sharded_ranks.main()"
    folder = tmp_path_factory.mktemp("sharded")
    write_file(folder / "published.pt", published_state(), "whole")
    return run_ranks(code, RANKS, folder)


def distance(one, other):
    """The norm of the difference of two sets of weights."""
    return sum((one[name].double() - other[name]).square().sum() for name in one).sqrt()


@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_model_and_its_ema_begin_with_the_weights_of_a_usual_one(kind, found):
    (model, _), sharded = found[0][kind]["start"]
    assert [differences(model, weights) for weights in sharded] == [[], []]


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_training_is_that_of_ddp_up_to_rounding(kind, found):
    (start, _), _ = found[0][kind]["start"]
    usual, sharded = found[0][kind]["end"]
    rounding = ROUNDING[kind]
    for one, other in zip(usual, sharded, strict=True):  # weights, then EMA
        assert distance(one, other) < rounding * distance(one, start)
    norm, sharded_norm = found[0][kind]["norms"]
    assert sharded_norm == pytest.approx(norm, rel=rounding)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_holds_its_share_of_weights_gradients_optimizer_and_ema(kind, found):
    for rank in found:
        held, weights, block = rank[kind]["bytes"]
        assert held < 1.05 * 5 * weights / RANKS + block  # weights, gradients, two states of AdamW, EMA


def test_a_checkpoint_is_that_of_ddp_and_survives_loading_and_sharding(found):
    first, second, usual = found[0]["saved"]
    assert differences(first, second) == []
    assert places(first) == places(usual)
    weights, ema = found[0]["muon"]["end"][1]
    assert differences([first["model"], first["ema"]], [weights, ema]) == []


def places(value):
    """The shape of a state: the same keys, and of tensors shape and type."""
    if isinstance(value, dict):
        return {name: places(part) for name, part in value.items()}
    if isinstance(value, list):
        return [places(part) for part in value]
    return (value.shape, value.dtype) if torch.is_tensor(value) else value


def test_a_published_model_starts_a_sharded_run(found, tmp_path):
    state = checkpoint.load(write_file(tmp_path / "published.pt", published_state(), "whole"), **PUBLISHED)
    assert differences(found[0]["published"], [state["model"], state["ema"]]) == []


def test_a_machine_without_the_memory_for_the_whole_checkpoint_is_one_line_on_all_ranks(found):
    (message,) = {rank["refusal"] for rank in found}
    assert message.startswith("--shard: a checkpoint takes 0.0") and "1e-06 GB free" in message


def test_fp16_skips_a_step_on_all_ranks_if_the_gradient_of_one_overflows(found):
    assert {rank["overflow"] for rank in found} == {(512.0, False)}
