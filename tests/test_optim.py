"""Optimizers, learning rates, gradients that are not finite, EMA."""

from types import SimpleNamespace

import pytest
import torch

from models import EqM, model_config
from optim import check_gradient, ema_decay, lr_multiplier, make_optimizers, set_learning_rates, update_ema

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


def test_the_ema_of_a_model_from_scratch_forgets_its_first_weights_quickly():
    args = SimpleNamespace(ema_decay=0.9999)
    assert [ema_decay(args, step, pretrained=False) for step in (1, 90, 10**6)] == pytest.approx([2 / 11, 0.91, 0.9999])
    assert ema_decay(args, 1, pretrained=True) == 0.9999
