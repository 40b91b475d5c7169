"""Optimizers, learning rates, gradients that are not finite, and the EMA."""

import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import optim
from models import EqM, model_config
from optim import Muon
from process import run_ranks
from runtime import distributed
from training import differences

SMALL = {
    "input_size": 16,
    "in_channels": 3,
    "hidden_size": 192,
    "depth": 1,
    "num_heads": 3,
    "num_classes": 2,
}


def test_the_learning_rates_warm_up_stay_constant_and_decay_to_zero():
    args = SimpleNamespace(lr=1e-3, muon_lr=2e-2, warmup_steps=10, lr_decay=0.4)
    optimizers = [SimpleNamespace(param_groups=[{}]) for _ in range(2)]
    factors = []
    for step in range(1, 101):
        optim.set_learning_rates(optimizers, args, step, last_step=100)
        rates = optim.learning_rates(optimizers)
        factors.append(rates["lr"] / 1e-3)
        assert rates["muon_lr"] == pytest.approx(20 * rates["lr"])
    assert factors[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert factors[10:61] == pytest.approx([1] * 51)
    assert factors[60:] == pytest.approx([(100 - step + 1) / 40 for step in range(61, 101)])


def test_muon_gets_the_block_matrices_and_adamw_all_other_weights():
    model = EqM(model_config("EqM-Ti/4", **SMALL))
    args = SimpleNamespace(optimizer="muon", lr=1e-3, muon_lr=2e-2, weight_decay=0.3)
    optimizers = optim.make_optimizers(model, args)
    (adamw,), (muon,) = [optimizer.param_groups for optimizer in optimizers]
    names = {id(weight): name for name, weight in model.named_parameters()}
    assert [names[id(weight)] for weight in muon["params"]] == [
        "blocks.0.attn.qkv.weight",
        "blocks.0.attn.proj.weight",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc2.weight",
    ]
    both = adamw["params"] + muon["params"]
    assert sorted(map(id, both)) == sorted(names)
    assert adamw["lr"] == 1e-3
    assert muon["lr"] == 2e-2
    assert adamw["weight_decay"] == muon["weight_decay"] == 0.3
    args.optimizer = "adamw"
    (alone,) = optim.make_optimizers(model, args)
    assert len(alone.param_groups[0]["params"]) == len(names)


# the last one: a convolution
SHAPES = [(96, 32), (32, 32), (128, 32), (32, 128), (32, 32), (16, 8, 3, 3)]


def make_ones(shapes):
    return [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]


def steps_of(*optimizers):
    """Make four steps of optimizers with the same random gradients."""
    torch.manual_seed(0)
    columns = [optimizer.param_groups[0]["params"] for optimizer in optimizers]
    for _ in range(4):
        for weights in zip(*columns, strict=True):
            gradient = torch.randn(weights[0].shape)
            for weight in weights:
                weight.grad = gradient.clone().view_as(weight)
        for optimizer in optimizers:
            optimizer.step()


def test_muon_agrees_with_torch_muon_up_to_bfloat16_rounding_and_takes_convolutions_too():
    weights = make_ones(SHAPES[:-1])
    torch_weights = make_ones(SHAPES[:-1])
    muon = Muon(weights, 0.02, 0.1)
    torch_muon = torch.optim.Muon(torch_weights, lr=0.02, weight_decay=0.1)
    steps_of(muon, torch_muon)
    for weight, expected in zip(weights, torch_weights, strict=True):
        assert (weight - expected).norm() < 0.02 * (expected - 1).norm()
    # checkpoints are interchangeable
    assert differences(muon.state_dict()["state"], torch_muon.state_dict()["state"]) == []
    # A convolution is a matrix with a row per output
    kernels, matrix = make_ones([(16, 8, 3, 3), (16, 72)])
    steps_of(Muon([kernels], 0.02, 0.1), Muon([matrix], 0.02, 0.1))
    assert torch.equal(kernels.flatten(1), matrix)
    assert not torch.equal(matrix, torch.ones(16, 72))


def test_on_a_cpu_without_fast_bfloat16_muon_computes_in_float32_and_returns_nearly_the_same(
    monkeypatch,
):
    matrices = torch.randn(2, 24, 40)
    directions = {}
    for is_fast in (False, True):
        monkeypatch.setattr(distributed, "has_fast_bf16", lambda _, is_fast=is_fast: is_fast)
        directions[is_fast] = optim.orthogonalize(matrices)
    assert directions[False].dtype == directions[True].dtype == torch.bfloat16
    gap = (directions[False].float() - directions[True].float()).norm()
    assert 0 < gap < 0.03 * directions[True].float().norm()


def train_by_muon():
    """The weights, momenta and matrices of a rank after some steps."""
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    weights = make_ones(SHAPES)
    muon = Muon(weights, 0.02, 0.1)
    steps_of(muon)
    return [weights, muon.state_dict()["state"], muon.batches]


def test_muon_gives_all_ranks_the_weights_of_a_single_rank():
    alone, expected_momenta, _ = train_by_muon()
    results, _ = run_ranks(train_by_muon, 4)
    for weights, momenta, batches in results:
        assert {owner for owner, _ in batches} == set(range(4))  # no rank is idle
        assert differences(momenta, expected_momenta) == []
        for weight, expected in zip(weights, alone, strict=True):
            assert (weight - expected).abs().max() <= 1e-6


def test_ranks_share_the_work_of_orthogonalizing_evenly():
    shapes = [(3456, 1152), (1152, 1152), (4608, 1152), (1152, 4608)] * 28  # of EqM-XL
    for ranks in (1, 2, 3, 4, 7, 8):
        work = [0] * ranks
        shared = []
        for owner, indices in optim.assign(shapes, ranks):
            for rows, columns in (sorted(shapes[index]) for index in indices):
                work[owner] += rows**2 * (2 * columns + rows)
            shared += indices
        assert sorted(shared) == list(range(len(shapes)))
        assert max(work) < 1.06 * sum(work) / ranks


@pytest.mark.parametrize(
    "grad_norm, loss, skip, tolerated",
    [
        (1.0, 2.0, False, 0),
        (torch.inf, 2.0, True, 1),  # an overflow, as usual in fp16
        (torch.nan, torch.nan, True, 0),  # fp16 does not explain a loss that is not finite
    ],
)
def test_fp16_excuses_only_overflows(grad_norm, loss, skip, tolerated):
    found = optim.check_fp16(torch.tensor(grad_norm), [torch.tensor(loss)])
    assert bool(found[0]) == skip
    assert found[1].item() == tolerated


def test_the_ema_soon_forgets_its_start():  # its formula: test_export.py
    args = SimpleNamespace(ema_decay=0.9999)
    decays = [optim.ema_decay(args, steps) for steps in (1, 90, 10**6)]
    assert decays == pytest.approx([2 / 11, 0.91, 0.9999])
