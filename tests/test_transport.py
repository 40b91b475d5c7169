"""The objective compared with closed forms and naive sums, and the noise levels of training
clips.
"""

import functools
import itertools
from collections import Counter

import pytest
import torch
from torch.testing import assert_close

import transport
from runtime.rng import uniform
from transport import (
    OBJECTIVES,
    clean_frames,
    condition_dropout,
    draw_gammas,
    gammas_of,
    shift_gamma,
)

EQM = OBJECTIVES["eqm"]
GAMMA = torch.tensor([0.0, 0.5, 0.9, 1.0])
DECAY = [4.0, 4.0, 2.0, 0.0]  # c(GAMMA)
MANY = range(2000)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_the_decay_is_4_up_to_gamma_0_8_then_falls_to_0():
    assert_close(transport.decay(torch.tensor([0.4, 0.8, 0.95])), torch.tensor([4.0, 4.0, 1.0]))
    assert_close(transport.decay(GAMMA), torch.tensor(DECAY))
    gamma = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000  # midpoint rule
    integral = transport.decay(gamma).square().mean().item()
    assert integral == pytest.approx(13.867, abs=5e-4)
    assert pytest.approx(integral, rel=1e-8) == transport.MEAN_SQUARED_DECAY


def test_gamma_per_frame_is_the_noise_level_of_that_frame():
    x, noise = (normal(4, 2, 3, 5, 5, seed=seed) for seed in range(2))
    levels = torch.rand(4, 3)
    levels[0, 1] = 1
    same = GAMMA[:, None].expand(4, 3)
    for function in (transport.interpolate, EQM.target):
        frames = [function(x[:, :, [t]], noise[:, :, [t]], levels[:, t]) for t in range(3)]
        assert torch.equal(function(x, noise, levels), torch.cat(frames, dim=2))
        assert torch.equal(function(x, noise, GAMMA), function(x, noise, same))
    # A clean frame is the data, and its target is zero
    assert torch.equal(transport.interpolate(x, noise, levels)[0, :, 1], x[0, :, 1])
    assert not EQM.target(x, noise, levels)[0, :, 1].any()


@pytest.mark.parametrize("shape", [(2, 3), (5, 4, 6)])
def test_dispersive_loss_and_gradient_equal_a_naive_sum_over_pairs(shape):
    z = normal(*shape, dtype=torch.float64).requires_grad_()
    pairs = [(-((a - b) ** 2).sum() / a.numel()).exp() for a in z for b in z]
    naive = 0.5 * torch.stack(pairs).mean().log()
    loss = transport.dispersive_loss(z)
    assert loss.item() == pytest.approx(naive.item(), rel=1e-5)
    (expected,) = torch.autograd.grad(naive, z)
    (gradient,) = torch.autograd.grad(loss, z)
    assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


def test_the_dispersive_loss_is_exact_for_equal_features_single_samples_and_large_values():
    equal = torch.ones(8, 5, requires_grad=True)
    loss = transport.dispersive_loss(equal)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.equal(equal.grad, torch.zeros(8, 5))  # not NaN
    z = normal(8, 5)
    assert transport.dispersive_loss(z[:1]) == 0
    assert_close(
        transport.dispersive_loss(z + 1e4), transport.dispersive_loss(z), rtol=1e-3, atol=0
    )


# Noise levels of training clips -------------------------------------------------------------------


@functools.cache
def draw(share, num_frames=16, indices=MANY, seed=0, **regions):
    return draw_gammas(
        seed,
        stream=0,
        indices=list(indices),
        num_frames=num_frames,
        patch=4,
        shift=3.0,
        share=share,
        **regions,
    )


def fraction(mask):
    return mask.float().mean().item()


@pytest.mark.parametrize("shift", [0.25, 1.0, 3.0])
def test_shifted_gamma_keeps_its_ends_and_has_the_closed_form_density(shift):
    u = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    gamma = shift_gamma(u, shift)
    assert gamma[0] == 0
    assert gamma[-1] == 1
    middle = (gamma[1:] + gamma[:-1]) / 2
    # du/dgamma of u = S gamma / (1 + (S - 1) gamma)
    density = shift / (1 + (shift - 1) * middle).square()
    assert_close(u.diff() / gamma.diff(), density, atol=0, rtol=1e-5)


def test_logit_normal_gammas_are_the_sigmoid_of_a_standard_normal():
    u = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    gamma = gammas_of(u, shift=1.0, draw="logit-normal")
    assert gamma[0] == 0
    assert gamma[-1] == 1
    inner = gamma[1:-1]
    below = torch.special.ndtr((inner / (1 - inner)).log())  # the share of draws below
    assert_close(below, u[1:-1])
    assert_close(gammas_of(u, shift=3.0, draw="logit-normal"), shift_gamma(gamma, 3.0))


def test_half_of_the_forced_clips_have_given_frames_and_one_gamma():
    plain = draw(0.0)
    levels = draw(1.0)
    assert torch.equal(plain, shift_gamma(uniform(0, "gamma", 0, list(MANY)), 3.0))
    is_plain = (draw(0.75) == plain[:, None]).all(dim=1)
    assert fraction(is_plain) == pytest.approx(0.25, abs=0.04)  # 4 standard errors
    is_given = levels == 1
    has_given = is_given.any(dim=1)
    assert fraction(has_given) == pytest.approx(0.5, abs=0.045)
    expected = torch.where(is_given, 1, plain[:, None])
    assert torch.equal(levels[has_given], expected[has_given])
    assert not (levels == plain[:, None]).all(dim=1).any()
    for num_frames in (1, 4):  # one temporal patch is not forced
        assert torch.equal(draw(1.0, num_frames), plain)


@pytest.mark.parametrize("num_frames", [5, 10, 16])
def test_the_other_half_has_one_level_per_temporal_patch(num_frames):
    levels = draw(1.0, num_frames)
    levels = levels[~(levels == 1).any(dim=1)]
    patches = levels.split(4, dim=1)
    for patch in patches:
        assert (patch == patch[:, :1]).all()
    ends = torch.stack([patches[0][:, 0], patches[-1][:, 0]])
    u = shift_gamma(ends, 1 / 3)  # the inverse of the shift: uniform
    assert u.mean().item() == pytest.approx(0.5, abs=0.04)
    assert u.var().item() == pytest.approx(1 / 12, abs=0.009)
    assert abs(torch.corrcoef(ends)[0, 1]) < 0.13


def test_some_clips_are_clean_except_for_a_rectangle_of_their_gamma():
    regions = {"region_share": 0.25, "size": 6}
    levels = draw(0.5, 8, **regions)
    forced = draw(0.5, 8)[:, :, None, None]
    has_region = (levels != forced).flatten(1).any(dim=1)
    assert fraction(has_region) == pytest.approx(0.25, abs=0.04)  # 4 standard errors
    noisy = levels[has_region] < 1
    rows = noisy[:, 0].any(dim=2)  # (B, 6)
    columns = noisy[:, 0].any(dim=1)  # (B, 6)
    rectangles = rows[:, None, :, None] & columns[:, None, None, :]
    assert torch.equal(noisy, rectangles.expand_as(noisy))
    sides = set()
    for mask in [*rows, *columns]:
        first, *_, last = mask.nonzero().flatten().tolist()
        assert mask.sum() == last - first + 1
        sides.add((last - first + 1, first))
    assert sides == {(side, first) for side in range(2, 6) for first in range(7 - side)}
    gamma = draw(0.0, 8)[has_region][:, None, None, None]
    assert torch.equal(levels[has_region], torch.where(noisy, gamma, 1))
    assert torch.equal(draw(0.5, 4, **regions), draw(0.0, 4))  # one temporal patch


@pytest.mark.parametrize("num_frames", [2, 3, 4, 16])
def test_given_frames_may_end_anywhere_but_are_never_all_or_none(num_frames):
    frames = range(num_frames)
    draws = torch.rand(4000, 3).tolist()
    extremes = (0.0, 1 - 2**-24)
    draws += itertools.product((0.0, 0.6, 0.8, 0.9), extremes, extremes)
    masks = Counter(tuple(sorted(clean_frames(*draw, num_frames))) for draw in draws)
    for mask in masks:
        assert set() < set(mask) < set(frames)
    first = {tuple(frames[:count]) for count in frames[1:]}
    last = {tuple(frames[start:]) for start in frames[1:]}
    assert masks.keys() >= first | last | {(frame,) for frame in frames}
    if num_frames > 2:
        first_and_last = {(0, frames[-1]), (0, *frames[2:]), (*frames[:-2], frames[-1])}
        assert masks.keys() >= first_and_last
    lengths = Counter({len(mask): masks[mask] for mask in first})
    assert lengths.total() > 0.45 * 4000
    if num_frames == 16:  # few given frames are likelier than many
        few = sum(lengths[count] for count in range(1, 5))
        assert few / lengths.total() == pytest.approx((4 / 15) ** 0.5, abs=0.06)


def test_condition_dropout_grows_with_the_number_of_clean_frames():
    levels = torch.full((4, 16), 0.3)
    for row, count in enumerate((0, 1, 4, 15)):
        levels[row, :count] = 1
    most = (15 / 16) ** 0.5
    assert_close(condition_dropout(levels, 0.1), torch.tensor([0.1, 0.25, 0.5, most]))
    assert_close(condition_dropout(levels, 0.3), torch.tensor([0.3, 0.3, 0.5, most]))
    areas = torch.where(torch.arange(16) < 4, 1.0, 0.3).expand(2, 3, 16, 16)
    assert_close(condition_dropout(areas, 0.1), torch.tensor([0.5, 0.5]))
    assert_close(condition_dropout(GAMMA[:3], 0.1), torch.full((3,), 0.1))


def test_noise_levels_depend_only_on_seed_and_sample_index():
    levels = draw(0.5)[:20]
    alone = [draw(0.5, indices=range(index, index + 1)) for index in range(20)]
    assert torch.equal(torch.cat(alone), levels)
    assert not torch.equal(draw(0.5, indices=range(20), seed=1), levels)


@pytest.mark.parametrize("name", ["eqm", "told-w"])
def test_an_own_context_is_what_the_network_makes_of_noisy_frames(name):
    objective = OBJECTIVES[name]
    clean = torch.randn(64, 3, 4, 5, 5)
    u = uniform(7, "own context level", 0, range(64))
    gamma = transport.OWN_LEAST + (transport.OWN_MOST - transport.OWN_LEAST) * u
    broadcast = gamma.view(-1, 1, 1, 1, 1)
    calls = []

    def network(x_gamma, y, time_scale, clean, **told):
        """It knows the noise, and believes that all values of the clip are larger by 1."""
        assert told.keys() == ({"gamma"} if objective.is_told else set())
        assert not torch.is_grad_enabled()
        calls.append(told)
        noise = (x_gamma - broadcast * clean) / (1 - broadcast)
        return objective.target(clean + 1, noise, gamma)

    def made(share):
        return transport.own_context(
            network,
            clean,
            share=share,
            objective=objective,
            seed=7,
            stream=0,
            indices=range(64),
            y=None,
            time_scale=None,
        )

    assert made(0.0) is clean
    assert not calls
    expected = clean + 1 - broadcast
    assert_close(made(1.0), expected, atol=1e-4, rtol=0)
    half = made(0.5)
    is_own = (half != clean).flatten(1).any(dim=1)
    assert 16 < is_own.sum() < 48
    assert_close(half[is_own], expected[is_own], atol=1e-4, rtol=0)
