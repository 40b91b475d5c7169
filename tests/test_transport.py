import pytest
import torch

import transport


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_decay_is_four_up_to_four_fifths_then_falls_linearly_to_zero():
    gamma = torch.tensor([0.0, 0.4, 0.8, 0.9, 0.95, 1.0])
    torch.testing.assert_close(transport.decay(gamma), torch.tensor([4.0, 4.0, 4.0, 2.0, 1.0, 0.0]))
    assert transport.decay(torch.tensor(1.0)) == 0


def test_the_path_leads_from_noise_to_data():
    x, noise = normal(3, 4, 2, 5, 5), normal(3, 4, 2, 5, 5, seed=1)
    assert torch.equal(transport.interpolate(x, noise, torch.zeros(3)), noise)
    assert torch.equal(transport.interpolate(x, noise, torch.ones(3)), x)
    torch.testing.assert_close(transport.interpolate(x, noise, torch.full((3,), 0.5)), (x + noise) / 2)


@pytest.mark.parametrize("shape", [(3,), (3, 7), (3, 4, 5, 5), (3, 4, 2, 5, 5)])
def test_each_sample_has_its_own_gamma(shape):
    x, noise, gamma = normal(*shape), normal(*shape, seed=1), torch.tensor([0.0, 0.5, 0.9])
    for i, (weight, decay) in enumerate([(0.0, 4.0), (0.5, 4.0), (0.9, 2.0)]):
        path, target = transport.interpolate(x, noise, gamma)[i], transport.target(x, noise, gamma)[i]
        torch.testing.assert_close(path, weight * x[i] + (1 - weight) * noise[i])
        torch.testing.assert_close(target, decay * (x[i] - noise[i]))


def test_the_target_is_the_velocity_of_the_path_times_the_decay():
    x, noise, gamma = normal(2, 6).double(), normal(2, 6, seed=1).double(), torch.tensor([0.3, 0.9]).double()
    ahead, behind = (transport.interpolate(x, noise, gamma + step) for step in (0.01, -0.01))
    velocity = (ahead - behind) / 0.02  # exact: the path is straight
    torch.testing.assert_close(transport.target(x, noise, gamma), velocity * transport.decay(gamma)[:, None])


def test_the_field_vanishes_at_the_data():
    assert torch.equal(transport.target(normal(2, 6), normal(2, 6, seed=1), torch.ones(2)), torch.zeros(2, 6))


def test_the_mean_square_of_the_decay_is_its_integral():
    gamma = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000  # midpoint rule
    integral = transport.decay(gamma).square().mean().item()
    assert integral == pytest.approx(13.867, abs=5e-4)
    assert pytest.approx(integral, rel=1e-8) == transport.MEAN_SQUARED_DECAY


@pytest.mark.parametrize("mean_square", [0.0, 0.3, 1.0, 4.0])
def test_a_network_that_says_zero_has_the_loss_that_is_expected_of_it(mean_square):
    x = normal(20_000, 1, 1, 4, 4) * mean_square**0.5
    noise, gamma = normal(20_000, 1, 1, 4, 4, seed=1), torch.rand(20_000, generator=torch.Generator().manual_seed(2))
    losses = transport.loss(torch.zeros_like, x, noise, gamma)
    assert losses.shape == (20_000,)
    assert losses.mean().item() == pytest.approx(transport.zero_loss(mean_square), rel=0.02)  # 4 standard errors


def test_the_loss_of_the_true_target_is_zero_and_of_an_offset_its_square():
    x, noise, gamma = normal(4, 2, 3, 4, 4), normal(4, 2, 3, 4, 4, seed=1), torch.tensor([0.0, 0.5, 0.9, 1.0])
    truth = transport.target(x, noise, gamma)
    assert torch.equal(transport.loss(lambda z: truth, x, noise, gamma), torch.zeros(4))
    offsets = torch.tensor([0.0, 1.0, 2.0, 3.0])
    losses = transport.loss(lambda z: truth + offsets.reshape(4, 1, 1, 1, 1), x, noise, gamma)
    torch.testing.assert_close(losses, offsets.square(), atol=1e-5, rtol=1e-5)


def test_the_network_sees_the_point_on_the_path_and_nothing_else():
    x, noise, gamma = normal(3, 4), normal(3, 4, seed=1), torch.tensor([0.1, 0.5, 0.9])
    seen = []
    transport.loss(lambda *args: seen.append(args) or torch.zeros(3, 4), x, noise, gamma)
    assert len(seen) == 1
    assert len(seen[0]) == 1
    assert torch.equal(seen[0][0], transport.interpolate(x, noise, gamma))


def test_the_loss_of_a_network_in_bfloat16_is_float32():
    losses = transport.loss(lambda z: z.bfloat16(), normal(3, 4), normal(3, 4, seed=1), torch.rand(3))
    assert losses.dtype == torch.float32


def test_a_shift_of_one_changes_nothing():
    u = torch.linspace(0, 1, 101)
    torch.testing.assert_close(transport.shift_gamma(u, 1.0), u, atol=1e-7, rtol=0)


@pytest.mark.parametrize("shift", [0.25, 1.5, 3.0, 10.0])
def test_a_shift_keeps_both_ends_and_the_order(shift):
    gamma = transport.shift_gamma(torch.linspace(0, 1, 1001, dtype=torch.float64), shift)
    assert gamma[0] == 0
    assert gamma[-1] == 1
    assert (gamma.diff() > 0).all()


def test_a_shift_above_one_moves_towards_the_noise_and_its_inverse_back():
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    gamma = transport.shift_gamma(u, 3.0)
    assert (gamma < u).all()
    assert transport.shift_gamma(torch.tensor(0.5), 3.0) == 0.25  # 0.5 / (0.5 + 1.5)
    torch.testing.assert_close(transport.shift_gamma(gamma, 1 / 3), u)


def test_shifted_gamma_has_the_density_of_its_closed_form():
    shift = 3.0
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    gamma = transport.shift_gamma(u, shift)
    # du/dgamma of u = S gamma / (1 + (S - 1) gamma)
    middle = (gamma[1:] + gamma[:-1]) / 2
    density = shift / (1 + (shift - 1) * middle).square()
    torch.testing.assert_close(u.diff() / gamma.diff(), density, atol=0, rtol=1e-5)
