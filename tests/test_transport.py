"""The objective compared with closed forms and naive sums, and the noise levels of training
clips.
"""

import functools
import itertools
from collections import Counter

import pytest
import torch

import transport
from runtime.rng import uniform
from transport import (
    OBJECTIVES,
    clean_frames,
    condition_dropout,
    draw_gammas,
    first_given,
    shift_gamma,
)

EQM = OBJECTIVES["eqm"]

GAMMA = torch.tensor([0.0, 0.5, 0.9, 1.0])
DECAY = [4.0, 4.0, 2.0, 0.0]  # c(GAMMA)
MANY = range(2000)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def losses_of(f, x, noise, gamma, first=0):
    """(loss (B,), mean square of the target) of a network that returns f and checks its inputs."""

    def network(x_gamma, *others, return_features):
        assert torch.equal(x_gamma, transport.interpolate(x, noise, gamma)) and others == (
            "y",
            "time_scale",
        )
        return (f, "features") if return_features else f

    loss, square, nothing = EQM.losses(network, x, noise, gamma, "y", "time_scale", first)
    *same, features = EQM.losses(
        network, x, noise, gamma, "y", "time_scale", first, return_features=True
    )
    assert (
        torch.equal(same[0], loss)
        and same[1] == square
        and (nothing, features) == (None, "features")
    )
    return loss, square


def test_the_decay_is_4_up_to_gamma_0_8_then_falls_to_0():
    torch.testing.assert_close(
        transport.decay(torch.tensor([0.4, 0.8, 0.95])), torch.tensor([4.0, 4.0, 1.0])
    )
    torch.testing.assert_close(transport.decay(GAMMA), torch.tensor(DECAY))
    gamma = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000  # midpoint rule
    integral = transport.decay(gamma).square().mean().item()
    assert integral == pytest.approx(13.867, abs=5e-4)
    assert pytest.approx(integral, rel=1e-8) == transport.MEAN_SQUARED_DECAY


def test_gamma_per_frame_is_the_noise_level_of_that_frame():
    x, noise, f = (normal(4, 2, 3, 5, 5, seed=seed) for seed in range(3))
    own = torch.rand(4, 3, generator=torch.Generator().manual_seed(3))
    same = GAMMA[:, None].expand(4, 3)
    own[0, 1] = 1  # a clean frame is the data, and its target is zero
    for function in (transport.interpolate, EQM.target):
        frames = [function(x[:, :, [t]], noise[:, :, [t]], own[:, t]) for t in range(3)]
        assert torch.equal(function(x, noise, own), torch.cat(frames, dim=2))
        assert torch.equal(function(x, noise, GAMMA), function(x, noise, same))
    assert torch.equal(losses_of(f, x, noise, GAMMA)[0], losses_of(f, x, noise, same)[0])
    assert torch.equal(transport.interpolate(x, noise, own)[0, :, 1], x[0, :, 1])
    assert not EQM.target(x, noise, own)[0, :, 1].any()


def test_a_network_that_predicts_zero_has_the_expected_loss():
    x = 2 * normal(20_000, 1, 1, 4, 4)
    noise = normal(20_000, 1, 1, 4, 4, seed=1)
    losses, square = losses_of(torch.zeros_like(x), x, noise, torch.linspace(0, 1, 20_000))
    assert losses.mean().item() == pytest.approx(EQM.zero_loss(4.0), rel=0.02)  # 4 standard errors
    assert square.item() == pytest.approx(
        losses.mean().item(), rel=1e-5
    )  # the mean square of the same targets


def test_the_loss_is_the_mean_squared_error_per_clip_in_float32():
    x = normal(4, 2, 3, 4, 4)
    noise = normal(4, 2, 3, 4, 4, seed=1)
    offsets = torch.tensor([0.0, 1.0, 2.0, 3.0])
    truth = EQM.target(x, noise, GAMMA)
    assert torch.equal(losses_of(truth, x, noise, GAMMA)[0], torch.zeros(4))
    losses, _ = losses_of(truth + offsets.reshape(4, 1, 1, 1, 1), x, noise, GAMMA)
    torch.testing.assert_close(losses, offsets.square(), atol=1e-5, rtol=1e-5)
    assert losses_of(truth.bfloat16(), x, noise, GAMMA)[0].dtype == torch.float32
    truth[:, :, :2] = torch.nan  # frames before `first` do not count
    assert torch.equal(losses_of(truth, x, noise, GAMMA, first=2)[0], torch.zeros(4))


@pytest.mark.parametrize("shape", [(2, 3), (5, 4, 6)])
def test_dispersive_loss_and_gradient_equal_a_naive_sum_over_pairs(shape):
    z = normal(*shape, dtype=torch.float64).requires_grad_()
    pairs = [(-((a - b) ** 2).sum() / a.numel()).exp() for a in z for b in z]
    naive = 0.5 * torch.stack(pairs).mean().log()
    loss = transport.dispersive_loss(z)
    assert loss.item() == pytest.approx(naive.item(), rel=1e-5)
    expected, found = (torch.autograd.grad(value, z)[0] for value in (naive, loss))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_the_dispersive_loss_is_exact_for_equal_features_single_samples_and_large_values():
    equal = torch.ones(8, 5, requires_grad=True)
    z = normal(8, 5)
    loss = transport.dispersive_loss(equal)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6) and torch.equal(
        equal.grad, torch.zeros(8, 5)
    )  # not NaN
    assert transport.dispersive_loss(z[:1]).item() == 0
    assert transport.dispersive_loss(z + 1e4).item() == pytest.approx(
        transport.dispersive_loss(z).item(), rel=1e-3
    )


@functools.cache
def draw(share, num_frames=16, indices=MANY, seed=0):
    return draw_gammas(seed, 0, list(indices), num_frames, 4, 3.0, share)


@pytest.mark.parametrize("shift", [0.25, 1.0, 3.0])
def test_shifted_gamma_keeps_its_ends_and_has_the_closed_form_density(shift):
    u = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    gamma = shift_gamma(u, shift)
    assert (gamma[0], gamma[-1]) == (0, 1)
    middle = (gamma[1:] + gamma[:-1]) / 2
    density = (
        shift / (1 + (shift - 1) * middle).square()
    )  # du/dgamma of u = S gamma / (1 + (S - 1) gamma)
    torch.testing.assert_close(u.diff() / gamma.diff(), density, atol=0, rtol=1e-5)
    torch.testing.assert_close(shift_gamma(gamma, 1 / shift), u)  # its inverse
    assert (
        shift_gamma(torch.tensor(0.5), 3.0) == 0.25
    )  # 0.5 / (0.5 + 1.5): a shift above 1 moves to the noise


def test_half_of_the_forced_clips_have_given_frames_and_one_gamma():
    plain = draw(0.0)
    levels = draw(1.0)
    assert torch.equal(plain, shift_gamma(uniform(0, "gamma", 0, list(MANY)), 3.0))
    is_common = (draw(0.75) == plain[:, None]).all(dim=1)
    assert is_common.float().mean().item() == pytest.approx(0.25, abs=0.04)  # 4 standard errors
    is_given = levels == 1
    some = is_given.any(dim=1)
    assert some.float().mean().item() == pytest.approx(0.5, abs=0.045)
    assert torch.equal(
        levels[some][~is_given[some]], plain[some].repeat_interleave((~is_given[some]).sum(dim=1))
    )
    assert not (levels == plain[:, None]).all(dim=1).any()
    assert torch.equal(draw(1.0, 4), plain) and torch.equal(
        draw(1.0, 1), plain
    )  # one temporal patch is not forced


@pytest.mark.parametrize("num_frames", [5, 10, 16])
def test_the_other_half_has_one_level_per_temporal_patch(num_frames):
    levels = draw(1.0, num_frames)
    own = levels[~(levels == 1).any(dim=1)]
    parts = own.split(4, dim=1)
    assert all((part == part[:, :1]).all() for part in parts)
    first = parts[0][:, 0]
    last = parts[-1][:, 0]
    u = shift_gamma(torch.cat([first, last]), 1 / 3)  # the inverse of the shift: uniform
    assert u.mean().item() == pytest.approx(0.5, abs=0.04) and u.var().item() == pytest.approx(
        1 / 12, abs=0.009
    )
    assert abs(torch.corrcoef(torch.stack([first, last]))[0, 1].item()) < 0.13


def test_some_clips_are_clean_except_for_a_rectangle_of_their_gamma():
    levels = draw_gammas(0, 0, list(MANY), 8, 4, 3.0, 0.5, 1, 0.25, 6)
    forced = draw(0.5, 8)
    plain = draw(0.0, 8)
    is_other = (levels == forced[:, :, None, None]).flatten(1).all(dim=1)
    assert is_other.float().mean().item() == pytest.approx(0.75, abs=0.04)  # 4 standard errors
    noisy = levels[~is_other] < 1
    sides = Counter()
    rows = noisy[:, 0].any(dim=2)  # (B, 6)
    columns = noisy[:, 0].any(dim=1)  # (B, 6)
    assert torch.equal(noisy, (rows[:, :, None] & columns[:, None])[:, None].expand_as(noisy))
    for mask in [*rows, *columns]:
        first, *_, last = mask.nonzero().flatten().tolist()
        assert mask.sum() == last - first + 1
        sides[last - first + 1, first] += 1
    assert sides.keys() == {(side, first) for side in range(2, 6) for first in range(7 - side)}
    expected = plain[~is_other][:, None, None, None].expand_as(noisy)
    assert torch.equal(levels[~is_other][noisy], expected[noisy])
    assert torch.equal(
        draw_gammas(0, 0, list(MANY), 4, 4, 3.0, 0.5, 1, 0.25, 6), draw(0.0, 4)
    )  # one temporal patch


@pytest.mark.parametrize("num_frames", [2, 3, 4, 16])
def test_given_frames_may_end_anywhere_but_are_never_all_or_none(num_frames):
    draws = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0)).tolist()
    masks = Counter(tuple(sorted(clean_frames(*row, num_frames))) for row in draws)
    ends = itertools.product((0.0, 0.6, 0.8, 0.9), *[(0.0, 1 - 2**-24)] * 2)
    every = set(range(num_frames))
    first = {tuple(range(k)) for k in range(1, num_frames)}
    for mask in [*masks, *(clean_frames(*row, num_frames) for row in ends)]:
        assert set(mask) <= every and 0 < len(mask) < num_frames
    assert masks.keys() >= first | {tuple(range(k, num_frames)) for k in range(1, num_frames)}
    assert masks.keys() >= {(frame,) for frame in every}
    if num_frames > 2:
        last = num_frames - 1
        assert masks.keys() >= {
            (0, last),
            (0, *range(2, num_frames)),
            (*range(num_frames - 2), last),
        }
    lengths = torch.tensor([len(mask) for mask in masks.elements() if mask in first])
    assert len(lengths) / 4000 > 0.45
    if num_frames == 16:  # few given frames are likelier than many
        assert ((lengths <= 4).sum() / (lengths <= 15).sum()).item() == pytest.approx(
            (4 / 15) ** 0.5, abs=0.06
        )


def test_condition_dropout_grows_with_the_number_of_clean_frames():
    levels = torch.full((4, 16), 0.3)
    for row, count in enumerate((0, 1, 4, 15)):
        levels[row, :count] = 1
    assert condition_dropout(levels, 0.1).tolist() == pytest.approx(
        [0.1, 0.25, 0.5, (15 / 16) ** 0.5]
    )
    assert condition_dropout(levels, 0.3).tolist() == pytest.approx(
        [0.3, 0.3, 0.5, (15 / 16) ** 0.5]
    )
    areas = torch.where(torch.arange(16) < 4, 1.0, 0.3).expand(2, 3, 16, 16)
    assert condition_dropout(areas, 0.1).tolist() == pytest.approx([0.5, 0.5])
    assert condition_dropout(levels[:, -1], 0.1).tolist() == pytest.approx([0.1] * 4)
    assert first_given(torch.tensor([0.25, 0.5]), 3, 1).tolist() == [[1, 0.25, 0.25], [1, 0.5, 0.5]]
    for num_frames, expected in ((4, 0.10), (8, 0.30), (16, 0.29)):
        assert condition_dropout(draw(0.75, num_frames), 0.1).mean().item() == pytest.approx(
            expected, abs=0.025
        )


def test_noise_levels_depend_only_on_seed_and_sample_index():
    assert torch.equal(
        torch.cat([draw(0.5, indices=range(n, n + 1)) for n in range(20)]), draw(0.5)[:20]
    )
    assert not torch.equal(draw(0.5, indices=range(20), seed=1), draw(0.5)[:20])
