"""The objectives: closed forms on Gaussian data, levels per temporal patch, and runs
of the scripts.
"""

from dataclasses import replace
from shlex import split

import pytest
import torch
from torch.testing import assert_close

import transport
from models import Condition, EqM
from samplers import guided, sample
from test_models import TINY, clip, labels, tiny
from test_transport import normal
from tiny_data import random_checkpoint
from training import Training, run_here, sample_here
from transport import OBJECTIVES

EQM = OBJECTIVES["eqm"]
FLOW = OBJECTIVES["flow"]


def optimal_velocity(z, gamma, mean, variance):
    """E[x - eps | x_gamma = z] for data N(mean, diag(variance)): x_gamma has variance v = gamma^2 S
    + (1 - gamma)^2.
    """
    v = gamma**2 * variance + (1 - gamma) ** 2
    return mean + (gamma * variance - (1 - gamma)) / v * (z - gamma * mean)


@pytest.mark.parametrize("method, error", [("euler", 0.03), ("heun", 1e-3)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("start_gamma", [0.0, 0.5])
@pytest.mark.parametrize("objective", [FLOW, OBJECTIVES["told-c"]], ids=["flow", "told-c"])
def test_solvers_move_noise_along_the_exact_path_of_gaussian_data(
    method, error, shift, start_gamma, objective
):
    # The solution is affine: x(gamma) = gamma mean + sqrt(gamma^2 S + (1 - gamma)^2) eps, which at
    # 1 is data.
    mean = normal(6, dtype=torch.float64)
    std = torch.linspace(0.3, 2, 6, dtype=torch.float64)
    noise = normal(5, 6, seed=1, dtype=torch.float64)
    told = []

    def field(z, keep, gamma):
        told.append(gamma.unique().item())
        return optimal_velocity(z, gamma, mean, std**2) * objective.factor(gamma)

    scale = ((start_gamma * std) ** 2 + (1 - start_gamma) ** 2).sqrt()
    start = start_gamma * mean + scale * noise
    settings = {"start_gamma": start_gamma, "shift": shift, "objective": objective}
    x, _ = sample(field, start, method, 161, **settings)
    assert_close(x, mean + std * noise, atol=error, rtol=0)
    u = torch.tensor(told, dtype=torch.float64).unique()
    u = transport.shift_gamma(u, 1 / shift)
    assert_close(u.diff(), (u[1] - u[0]).expand(159))  # equal steps in u, never at gamma = 1
    assert told[0] == pytest.approx(start_gamma) and max(told) < 1


def test_given_values_have_gamma_1_and_the_others_that_of_the_solver():
    mask = torch.arange(6).reshape(1, 1, 6, 1, 1) < torch.tensor([0, 2, 4]).reshape(3, 1, 1, 1, 1)
    told = []
    field = lambda x, keep, gamma: told.append(gamma) or torch.zeros_like(x)  # noqa: E731
    x = normal(3, 2, 6, 4, 4)
    sample(field, x, "euler", 5, objective=FLOW, given=torch.zeros_like(x), mask=mask)
    for gamma, expected in zip(told, (0, 0.25, 0.5, 0.75), strict=True):
        assert torch.equal(gamma, mask.float().clamp(min=expected))


EVERY_OBJECTIVE = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
X = normal(4, 2, 3, 4, 4)
NOISE = normal(4, 2, 3, 4, 4, seed=1)
OTHERS = normal(4, 2, 3, 4, 4, seed=2)


def losses_of(objective, f, gamma, x=X, noise=NOISE):
    """(loss (B,), mean square of the target) of a network that returns f."""
    errors, square, _ = objective.losses(lambda *_, **__: f, x, noise, gamma, None, None)
    return errors, square


def test_the_objectives_are_a_table_of_target_weight_and_what_is_told():
    def names_with(field):
        return [name for name, objective in OBJECTIVES.items() if getattr(objective, field)]

    assert {*names_with("is_told")} == {"flow", "told-w", "told-c", "told-4"}
    assert {*names_with("has_decay")} == {"eqm", "told-c"}
    assert {*names_with("is_weighted")} == {"told-w", "blind-w"}
    assert names_with("has_equilibria") == ["eqm"]


@EVERY_OBJECTIVE
def test_targets_and_losses_of_each_objective(objective):
    gamma = torch.tensor([0.0, 0.5, 0.9, 0.99])
    ones = torch.ones(4)
    factor = transport.decay(gamma) if objective.has_decay else objective.scale * ones
    weight = transport.decay(gamma).square() / 13.8667 if objective.is_weighted else ones
    truth = (X - NOISE) * factor.reshape(4, 1, 1, 1, 1)
    offsets = torch.arange(1.0, 5.0)  # of the clips
    told = {"gamma": gamma} if objective.is_told else {}

    def network(x_gamma, *others, return_features, **levels):
        assert torch.equal(x_gamma, transport.interpolate(X, NOISE, gamma))
        assert (others, return_features, levels) == (("y", "time_scale"), True, told)
        return truth + offsets.reshape(4, 1, 1, 1, 1), "features"

    errors, square, features = objective.losses(
        network, X, NOISE, gamma, "y", "time_scale", return_features=True
    )
    assert features == "features"
    assert_close(errors, weight * offsets.square(), rtol=1e-4, atol=0)
    expected = (truth.square() * weight.reshape(4, 1, 1, 1, 1)).mean()
    assert_close(square, expected, rtol=1e-4, atol=0)
    assert objective.velocity(truth[1], gamma[1]).equal(X[1] - NOISE[1])


@EVERY_OBJECTIVE
def test_clean_frames_count_only_where_the_target_is_known(objective):
    levels = torch.tensor([[1.0, 0.3, 0.3]]).expand(4, 3)  # of frames
    target = objective.target(X, NOISE, levels)
    wrong = target.clone()
    wrong[:, :, 0] += 9.0  # an error where nothing is to be denoised
    errors, square = losses_of(objective, wrong, levels)
    # eqm and told-c know that the target is 0 there; others do not count the frame, or weigh it 0
    assert_close(errors, torch.full((4,), 27.0 if objective.has_decay else 0.0))
    expected = target[:, :, 1:].square().mean() * 2 / 3  # of 3 frames
    if objective.has_decay:
        expected = target.square().mean()
    if objective.is_weighted:
        expected = expected * 16 / 13.8667
    assert_close(square, expected, rtol=1e-4, atol=0)


@EVERY_OBJECTIVE
def test_errors_of_the_target_near_noise_tell_those_of_the_data(objective):
    gamma = torch.tensor([0.0, 0.05, 0.5, 0.8])
    wrong = objective.target(X, NOISE, gamma) + OTHERS
    errors, _ = losses_of(objective, wrong, gamma)
    expected = []
    for other, level in zip(OTHERS, gamma, strict=True):  # the target leads to the data
        expected.append(((1 - level) * objective.velocity(other, level)).square().mean())
    assert_close(objective.data_errors(errors, gamma), torch.stack(expected))


@EVERY_OBJECTIVE
def test_predicting_zero_has_the_expected_loss(objective):
    x = 2 * normal(20_000, 1, 1, 4, 4)
    noise = normal(20_000, 1, 1, 4, 4, seed=1)
    gamma = torch.linspace(0, 1, 20_000)
    errors, square = losses_of(objective, torch.zeros_like(x), gamma, x, noise)
    assert errors.mean().item() == pytest.approx(objective.zero_loss(4.0), rel=0.02)
    assert square.item() == pytest.approx(errors.mean().item(), rel=1e-5)


def trained(data, steps=300):
    """A small network trained on image batches data(step) (B, 1, 1, 8, 8) without classes."""
    torch.manual_seed(0)
    shape = {
        "input_size": 8,
        "in_channels": 1,
        "temporal_patch_size": 1,
        "num_frames": 1,
        "use_rope": False,
    }
    model = EqM(replace(TINY, **shape, hidden_size=64, patch_size=4))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.02, steps)
    for step in range(steps):
        x = data(step)
        noise = normal(*x.shape, seed=2 * step + 1)
        gamma = torch.rand(len(x))
        y = torch.full((len(x),), 5)
        errors, *_ = EQM.losses(model, x, noise, gamma, y, None)
        errors.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
    return model.eval()


def test_a_small_network_and_each_descent_reach_mean_and_covariance_of_gaussian_data():
    # 64 pixels: a different mean in each, a common offset of variance 0.05, and a variance of 0.2
    # of its own
    mean = torch.linspace(-1, 1, 64)

    def data(step, count=128):
        common = normal(count, 1, seed=1000 + step)
        own = normal(count, 64, seed=5000 + step)
        return (mean + 0.05**0.5 * common + 0.2**0.5 * own).reshape(count, 1, 1, 8, 8)

    model = trained(data)
    count = 2048
    expected = 0.05 + 0.2 * torch.eye(64)
    field = guided(
        model, Condition.of(torch.full((count,), -1), model.config), torch.full((count,), 0.04), 1.0
    )
    path = {"num_steps": 16, "step_size": 0.028}  # as long as the published path
    for method in ("gd", "ngd"):
        with torch.no_grad():
            x, _ = sample(field, normal(count, 1, 1, 8, 8, seed=9), method, **path)
        x = x.flatten(1)
        # The descent does not stop exactly at the data: see test_samplers.py. It guesses gamma from
        # 64 values only.
        assert (x.mean(dim=0) - mean).abs().mean() < 0.12, method
        assert (torch.cov(x.T) - expected).norm() < 0.4 * expected.norm(), method


# Levels per temporal patch ------------------------------------------------------------------------


@torch.no_grad()
def test_a_level_per_temporal_patch_acts_on_the_tokens_of_that_patch():
    model = tiny(objective="flow")
    x = clip(7, batch=2)
    levels = torch.tensor([[0.2, 0.9], [0.5, 0.0]])
    per_frame = levels.repeat_interleave(4, dim=1)[:, :7]  # the second patch is padded
    one = model(x, labels(2), gamma=levels[:, 0])
    assert_close(model(x, labels(2), gamma=levels[:, :1].expand(2, 7)), one, atol=5e-5, rtol=1e-5)
    assert not torch.allclose(model(x, labels(2), gamma=per_frame), one, atol=1e-2)
    for block in model.blocks:  # without attention, tokens see only their own level
        block.attn.proj.weight.zero_()
    f = model(x, labels(2), gamma=per_frame)
    for part, level in ((slice(4), 0), (slice(4, 7), 1)):
        same = model(x, labels(2), gamma=levels[:, level])[:, :, part]
        assert_close(f[:, :, part], same, atol=5e-5, rtol=1e-5)


def test_only_flow_models_take_gamma():
    for objective, told in (("eqm", {"gamma": torch.zeros(1)}), ("flow", {})):
        with pytest.raises(AssertionError, match="is told gamma, or it is not"):
            tiny(objective=objective)(clip(8), labels(), **told)


def test_forced_clips_of_flow_have_borders_at_patches_only():
    draw = [transport.draw_gammas(0, 0, range(500), 10, 4, 3.0, 1.0, frames) for frames in (1, 4)]
    is_given = draw[1] == 1
    for part in draw[1].split(4, dim=1):
        assert (part == part[:, :1]).all()
    some = is_given.any(dim=1)
    assert 0.4 < some.float().mean() < 0.6 and not is_given.all(dim=1).any()
    assert len(is_given[some].unique(dim=0)) == 6  # every choice of one or two of three patches
    assert torch.equal(
        draw[0][~some], draw[1][~some]
    )  # levels per patch are those of the other objectives


# The scripts --------------------------------------------------------------------------------------


def test_a_run_trains_resumes_and_samples_with_forcing(shapes, tmp_path):
    flags = split("--forcing 0.75 --temporal-patch-size 2 --gamma-shift 2")
    whole = Training(shapes, tmp_path / "whole", 6, flags=flags)
    parts = replace(whole, results=tmp_path / "parts")
    objective = ["--objective", "flow"]
    run_here(whole, *objective)
    run_here(parts, *objective, stop_after=3)
    run_here(parts, "--resume")  # the checkpoint has the objective
    assert whole.rows() == parts.rows()
    assert "val_loss_given" in whole.rows()[-1] and 0.7 < whole.rows()[-1]["val_loss_rel"] < 0.9
    best = whole.folder / "checkpoints" / "best.pt"
    flags = ["--num-frames", 8]  # in windows of 4
    one, about = sample_here(best, tmp_path / "one", *flags, "--sampler", "heun")
    assert about["source"]["objective"] == "flow" and about["source"]["gamma_shift"] == 2
    flags += ["--given", tmp_path / "one", "--given-frames", "0-3"]
    again, _ = sample_here(best, tmp_path / "two", *flags)
    assert (again[:, :4] == one[:, :4]).all()


@pytest.mark.parametrize("use_rope", [True, False])
def test_a_flow_model_samples_clips_whose_last_patch_is_partial_at_once(use_rope, tmp_path):
    settings = {"num_frames": 10, "use_rope": use_rope, "objective": "flow"}
    path = random_checkpoint(
        tmp_path / "flow.pt", training={"num_frames": 10, "video": True}, **settings
    )
    clips, about = sample_here(path, tmp_path / "samples")
    assert clips.shape[1] == about["source"]["window"] == 10
    sample_here(path, tmp_path / "given", "--given", tmp_path / "samples", "--given-frames", "8-9")
