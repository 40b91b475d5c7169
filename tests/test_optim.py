"""Optimizers, learning rates, gradients that are not finite, EMA."""

from types import SimpleNamespace

import pytest
import torch

from models import EqM, model_config
from optim import (
    Muon,
    check_gradient,
    ema_decay,
    lr_multiplier,
    make_optimizers,
    orthogonalize,
    set_learning_rates,
    share_out,
    update_ema,
)
from process import run_ranks
from training import differences

SMALL = {"input_size": 16, "in_channels": 3, "hidden_size": 192, "depth": 1, "num_heads": 3, "num_classes": 2}


def test_the_learning_rate_warms_up_stays_and_decays_to_zero():
    args = SimpleNamespace(warmup_steps=10, lr_decay=0.4)
    factors = [lr_multiplier(args, step, last_step=100) for step in range(1, 101)]
    assert factors[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert factors[10:61] == pytest.approx([1] * 51)
    assert factors[60:] == pytest.approx([(100 - step + 1) / 40 for step in range(61, 101)])


def test_each_optimizer_has_its_own_learning_rate():
    weights = [torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(2)]
    optimizers = [torch.optim.AdamW(weights[:1]), torch.optim.Muon(weights[1:])]
    set_learning_rates(optimizers, SimpleNamespace(lr=1e-3, muon_lr=2e-2), 0.5)
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == pytest.approx([5e-4, 1e-2])


def test_muon_gets_the_matrices_of_the_blocks_and_adamw_all_the_rest():
    model = EqM(model_config("EqM-Ti/4", **SMALL))
    args = SimpleNamespace(optimizer="muon", lr=1.0, muon_lr=1.0, weight_decay=0.0)
    adamw, muon = make_optimizers(model, args)
    names = {id(weight): name for name, weight in model.named_parameters()}
    by_muon = {names[id(weight)] for weight in muon.param_groups[0]["params"]}
    by_adamw = {names[id(weight)] for weight in adamw.param_groups[0]["params"]}
    assert by_muon == {f"blocks.0.{part}.weight" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert by_muon.isdisjoint(by_adamw)
    assert by_muon | by_adamw == set(names.values())


@pytest.mark.parametrize("shape", [(3, 32, 96), (2, 96, 32), (1, 1, 5)])
def test_orthogonalize_keeps_the_singular_vectors_and_brings_the_singular_values_close_to_1(shape):
    torch.manual_seed(0)
    matrices = 3 * torch.randn(shape)
    results = orthogonalize(matrices)
    assert (results.shape, results.dtype) == (shape, torch.bfloat16)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    inner = u.mT @ results.float() @ v.mT
    values = inner.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.5 and values.max() < 1.3
    assert (inner - values.diag_embed()).norm() < 0.1 * values.norm()


def test_orthogonalize_does_not_depend_on_what_else_is_in_the_batch():
    torch.manual_seed(0)
    for shape in ((16, 48), (48, 16), (16, 16)):
        matrices = torch.randn(5, *shape)
        alone = [orthogonalize(matrices[[index]])[0] for index in range(5)]
        assert torch.equal(orthogonalize(matrices), torch.stack(alone))


def test_muon_agrees_with_that_of_torch_up_to_the_rounding_of_its_bfloat16():
    torch.manual_seed(0)
    shapes = [(96, 32), (32, 32), (128, 32), (32, 128)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    optimizers = Muon(ours, 0.02, 0.1), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1)
    for _ in range(4):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() < 0.02 * (other - 1).norm()
    momenta = [optimizer.state_dict()["state"] for optimizer in optimizers]  # so their checkpoints are the same
    assert differences(*momenta) == []


SHARED_MUON = """
import os, torch
from optim import Muon
from runtime import distributed
distributed.start()
torch.manual_seed(0)
weights = [torch.nn.Parameter(torch.randn(shape)) for shape in [(96, 32), (32, 32), (128, 32), (32, 128), (32, 32)]]
muon = Muon(weights, 0.02, 0.1)
for _ in range(3):
    for weight in weights:
        weight.grad = torch.randn(weight.shape)
    muon.step()
torch.save([weights, muon.state_dict()["state"], muon.batches], os.environ["OUT"])
distributed.stop()
"""


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_muon_gives_every_rank_the_weights_that_one_rank_alone_would_have(ranks, tmp_path):
    found = run_ranks(SHARED_MUON, ranks, tmp_path)
    (alone, momenta, _), *_ = run_ranks(SHARED_MUON, 1, tmp_path)
    for weights, same_momenta, batches in found:
        assert {owner for owner, _ in batches} == set(range(ranks))  # all have something to do
        assert differences(momenta, same_momenta) == []
        for weight, expected in zip(weights, alone, strict=True):
            assert (weight - expected).abs().max() <= 1e-6


def test_the_matrices_are_shared_out_so_that_no_rank_does_much_more_than_another():
    shapes = [(3456, 1152), (1152, 1152), (4608, 1152), (1152, 4608)] * 28  # of EqM-XL
    for ranks in (1, 2, 3, 4, 7, 8):
        work, shared = [0] * ranks, []
        for owner, indices in share_out(shapes, ranks):
            for rows, columns in (sorted(shapes[index]) for index in indices):
                work[owner] += rows**2 * (2 * columns + rows)
            shared += indices
        assert sorted(shared) == list(range(len(shapes)))
        assert max(work) < 1.06 * sum(work) / ranks


@pytest.mark.parametrize(
    ("grad_norm", "loss", "fp16", "skip", "tolerated"),
    [
        (1.0, 2.0, False, False, 0),
        (torch.nan, torch.nan, False, True, 1),
        (torch.inf, 2.0, True, True, 1),  # an overflow, as usual in fp16
        (torch.nan, torch.nan, True, True, 0),  # fp16 does not explain a loss that is not finite
    ],
)
def test_a_step_is_skipped_for_its_gradient_and_fp16_explains_only_overflows(grad_norm, loss, fp16, skip, tolerated):
    scaler = SimpleNamespace(is_enabled=lambda: fp16)
    found = check_gradient(torch.tensor(grad_norm), [torch.tensor(loss)], scaler)
    assert (bool(found[0]), found[1].item()) == (skip, tolerated)


def test_the_ema_follows_the_weights_by_its_decay():
    model, ema = (torch.nn.Linear(2, 2) for _ in range(2))
    before = ema.weight.clone()
    update_ema(ema, model, 0.9)
    assert torch.allclose(ema.weight, 0.9 * before + 0.1 * model.weight)


def test_the_ema_soon_forgets_the_weights_that_it_began_with():
    args = SimpleNamespace(ema_decay=0.9999)
    assert [ema_decay(args, steps) for steps in (1, 90, 10**6)] == pytest.approx([2 / 11, 0.91, 0.9999])
