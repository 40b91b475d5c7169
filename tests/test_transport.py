"""The objective against closed forms and naive sums."""

import math

import pytest
import torch

import transport


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_the_decay_is_four_up_to_four_fifths_then_falls_linearly_to_zero():
    gamma = torch.tensor([0.0, 0.4, 0.8, 0.9, 0.95, 1.0])
    torch.testing.assert_close(transport.decay(gamma), torch.tensor([4.0, 4.0, 4.0, 2.0, 1.0, 0.0]))
    assert transport.decay(torch.tensor(1.0)) == 0


@pytest.mark.parametrize("shape", [(4,), (4, 2, 3, 5, 5)])
def test_the_path_leads_from_noise_to_data_where_the_field_vanishes_and_each_sample_has_its_own_gamma(shape):
    x, noise, gamma = normal(*shape), normal(*shape, seed=1), torch.tensor([0.0, 0.5, 0.9, 1.0])
    path, target = transport.interpolate(x, noise, gamma), transport.target(x, noise, gamma)
    for i, (weight, decay) in enumerate([(0.0, 4.0), (0.5, 4.0), (0.9, 2.0), (1.0, 0.0)]):
        torch.testing.assert_close(path[i], weight * x[i] + (1 - weight) * noise[i])
        torch.testing.assert_close(target[i], decay * (x[i] - noise[i]))
    assert torch.equal(path[0], noise[0]) and torch.equal(path[3], x[3])
    assert not target[3].any()


def test_the_mean_square_of_the_decay_is_its_integral():
    gamma = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000  # midpoint rule
    integral = transport.decay(gamma).square().mean().item()
    assert integral == pytest.approx(13.867, abs=5e-4)
    assert pytest.approx(integral, rel=1e-8) == transport.MEAN_SQUARED_DECAY


@pytest.mark.parametrize("mean_square", [0.0, 4.0])
def test_a_network_that_predicts_zero_has_the_expected_loss(mean_square):
    x = normal(20_000, 1, 1, 4, 4) * mean_square**0.5
    noise, gamma = normal(20_000, 1, 1, 4, 4, seed=1), torch.rand(20_000, generator=torch.Generator().manual_seed(2))
    losses = transport.loss(torch.zeros_like(x), x, noise, gamma)
    assert losses.shape == (20_000,)
    assert losses.mean().item() == pytest.approx(transport.zero_loss(mean_square), rel=0.02)  # 4 standard errors


def test_the_loss_of_the_true_target_is_zero_and_of_an_offset_its_square():
    x, noise, gamma = normal(4, 2, 3, 4, 4), normal(4, 2, 3, 4, 4, seed=1), torch.tensor([0.0, 0.5, 0.9, 1.0])
    truth = transport.target(x, noise, gamma)
    assert torch.equal(transport.loss(truth, x, noise, gamma), torch.zeros(4))
    offsets = torch.tensor([0.0, 1.0, 2.0, 3.0])
    losses = transport.loss(truth + offsets.reshape(4, 1, 1, 1, 1), x, noise, gamma)
    torch.testing.assert_close(losses, offsets.square(), atol=1e-5, rtol=1e-5)


def test_the_loss_of_a_network_in_bfloat16_is_float32():
    losses = transport.loss(normal(3, 4).bfloat16(), normal(3, 4), normal(3, 4, seed=1), torch.rand(3))
    assert losses.dtype == torch.float32


def test_a_gamma_per_frame_is_that_of_the_frame_and_equal_ones_are_one_per_clip_bit_for_bit():
    x, noise, f = normal(4, 2, 3, 5, 5), normal(4, 2, 3, 5, 5, seed=1), normal(4, 2, 3, 5, 5, seed=2)
    gamma, same = torch.tensor([0.0, 0.5, 0.9, 1.0]), torch.tensor([0.0, 0.5, 0.9, 1.0])[:, None].expand(4, 3)
    for function in (transport.interpolate, transport.target):
        assert torch.equal(function(x, noise, gamma), function(x, noise, same))
    assert torch.equal(transport.loss(f, x, noise, gamma), transport.loss(f, x, noise, same))

    own = torch.rand(4, 3, generator=torch.Generator().manual_seed(3))
    for function in (transport.interpolate, transport.target):
        frames = [function(x[:, :, t], noise[:, :, t], own[:, t]) for t in range(3)]
        assert torch.equal(function(x, noise, own), torch.stack(frames, dim=2))


def test_a_clean_frame_is_the_data_and_its_target_is_zero():
    x, noise, gamma = normal(2, 2, 3, 4, 4), normal(2, 2, 3, 4, 4, seed=1), torch.tensor([[1.0, 0.3, 1.0]] * 2)
    assert torch.equal(transport.interpolate(x, noise, gamma)[:, :, ::2], x[:, :, ::2])
    target = transport.target(x, noise, gamma)
    assert not target[:, :, ::2].any() and target[:, :, 1].all()


@pytest.mark.parametrize("shift", [0.25, 1.0, 3.0])
def test_a_shift_keeps_both_ends_and_the_order_and_gives_the_density_of_its_closed_form(shift):
    u = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    gamma = transport.shift_gamma(u, shift)
    assert (gamma[0], gamma[-1]) == (0, 1)
    assert (gamma.diff() > 0).all()
    # du/dgamma of u = S gamma / (1 + (S - 1) gamma)
    middle = (gamma[1:] + gamma[:-1]) / 2
    density = shift / (1 + (shift - 1) * middle).square()
    torch.testing.assert_close(u.diff() / gamma.diff(), density, atol=0, rtol=1e-5)
    torch.testing.assert_close(transport.shift_gamma(gamma, 1 / shift), u)  # its inverse


def test_a_shift_above_one_moves_towards_the_noise():
    assert transport.shift_gamma(torch.tensor(0.5), 3.0) == 0.25  # 0.5 / (0.5 + 1.5)


def naive_dispersion(z):
    """The definition, as a sum over pairs."""
    pairs = [(-((a - b) ** 2).sum() / a.numel()).exp() for a in z for b in z]
    return 0.5 * torch.stack(pairs).mean().log()


@pytest.mark.parametrize("shape", [(2, 3), (5, 4, 6)])
def test_the_dispersive_loss_and_its_gradient_are_those_of_the_sum_over_all_pairs(shape):
    z = normal(*shape, dtype=torch.float64).requires_grad_()
    (expected,) = torch.autograd.grad(naive_dispersion(z), z)
    loss = transport.dispersive_loss(z)
    assert loss.item() == pytest.approx(naive_dispersion(z).item(), rel=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], expected, rtol=1e-4, atol=1e-7)


def test_the_dispersive_loss_is_zero_for_equal_features_and_falls_to_its_minimum_as_they_disperse():
    equal = torch.ones(8, 5, requires_grad=True)
    loss = transport.dispersive_loss(equal)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.equal(equal.grad, torch.zeros(8, 5))  # not NaN
    z = normal(8, 5)
    losses = [transport.dispersive_loss(scale * z).item() for scale in (0.1, 1, 10, 1000)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(-0.5 * math.log(8), rel=1e-5)  # only i = j is left
    assert transport.dispersive_loss(z[:1]).item() == 0
