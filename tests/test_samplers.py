"""Samplers on fields with known solutions, guidance, and conditions."""

import pytest
import torch
from torch.testing import assert_close

import transport
from models import Condition, model_config
from samplers import guided, sample
from test_transport import normal

EQM = transport.OBJECTIVES["eqm"]
every_method = pytest.mark.parametrize("method", ["gd", "ngd", "euler", "heun"])
ONE_LEVEL = torch.ones(1, 1)
GIVEN = torch.arange(8) < 3  # of 8 values of a sample
TIME_SCALE = torch.tensor([0.04, 0.08, 0.1])
CONFIG = model_config("EqM-Ti/2", input_size=4, in_channels=2, num_classes=10)
CONDITION = Condition.of(torch.tensor([3, -1, 7]), CONFIG)  # negative: no class


def optimal_field(mean, std, num_gammas=300):
    """The optimal field without gamma as an input, for data N(mean, std^2 I): f(z) = E[(x - eps)
    c(gamma) | z].

    Given gamma, x_gamma ~ N(gamma mean, v I) with v = gamma^2 std^2 + (1 - gamma)^2, and the mean
    of x - eps is mean + slope (z - gamma mean). The integral over p(gamma | z) is a sum of the
    midpoint rule."""
    gamma = (torch.arange(num_gammas, dtype=torch.float64) + 0.5) / num_gammas
    v = (gamma * std) ** 2 + (1 - gamma) ** 2
    slope = (gamma * std**2 - (1 - gamma)) / v

    def field(z, keep):
        distance = z.square().sum(dim=1, keepdim=True)
        distance = distance - 2 * gamma * (z @ mean)[:, None] + gamma**2 * mean.square().sum()
        log_density = -distance / (2 * v) - z.shape[1] / 2 * v.log()
        weights = log_density.softmax(dim=1) * transport.decay(gamma)
        of_mean = (weights * (1 - slope * gamma)).sum(dim=1)
        of_z = (weights * slope).sum(dim=1)
        return of_mean[:, None] * mean + of_z[:, None] * z

    return field


def halve(x, keep):
    """The field -x, which halves x in a step of size 0.5."""
    return -x


@pytest.mark.parametrize("method, std", [("gd", 0.5), ("ngd", 1.0)])
def test_published_settings_sample_the_mean_and_variance_of_gaussian_data(method, std):
    # The mean is not zero, as otherwise gamma and 1 - gamma would look the same for data with
    # variance 1. The data are not quite an equilibrium: gamma is at most 1, so near the data its
    # posterior mean is below 1 and f is not zero, and 1,000 steps end 5 to 14% beyond the mean.
    # Hence the published number of steps and these tolerances.
    mean = normal(1024, dtype=torch.float64)
    start = normal(64, 1024, seed=1, dtype=torch.float64)
    field = optimal_field(mean, std)
    x, _ = sample(field, start, method)
    share = x.mean(dim=0) @ mean / mean.square().sum()
    assert share.item() == pytest.approx(1, abs=0.03)
    error = (x.mean(dim=0) - mean).square().mean().sqrt()
    assert error < 1.2 * std / 64**0.5  # standard errors
    assert x.var(dim=0).mean().item() == pytest.approx(std**2, rel=0.03)
    assert field(x, None).square().mean() < 0.02 * field(start, None).square().mean()


@every_method
@pytest.mark.parametrize("num_steps", [2, 7])
def test_the_observer_sees_every_point_and_the_start_is_not_changed(method, num_steps):
    evaluated = []
    observed = []

    def field(x, keep):
        evaluated.append(keep.tolist())
        return torch.full_like(x, 2.0)

    def observe(x, keep):
        observed.append(x.clone())
        assert keep.tolist() == [0, 1, 2]

    start = normal(3, 4)
    x, evaluations = sample(
        field,
        start,
        method,
        num_steps=num_steps,
        step_size=0.1,
        objective=EQM,
        observe=observe,
    )
    count = 2 * num_steps - 3 if method == "heun" else num_steps - 1
    assert evaluations.tolist() == [count] * 3
    assert evaluated == [[0, 1, 2]] * count
    assert torch.equal(start, normal(3, 4))
    assert len(observed) == num_steps
    assert torch.equal(observed[0], start)
    assert torch.equal(observed[-1], x)
    if method in ("gd", "ngd"):
        assert_close(x, start + count * 0.1 * 2.0)


def test_stopped_samples_are_not_evaluated_again():
    # From x = 2^n the root mean square is below 1 after n + 1 steps
    start = torch.tensor([8.0, 1.0, 0.5, 4.0])[:, None].expand(4, 6)
    evaluated = []

    def field(x, keep):
        evaluated.append(keep.tolist())
        return halve(x, keep)

    x, evaluations = sample(field, start, num_steps=100, step_size=0.5, stop_below=1.0)
    assert evaluated == [[0, 1, 2, 3], [0, 1, 3], [0, 3], [0, 3], [0]]
    # Including the one that finds f below the threshold
    assert evaluations.tolist() == [5, 2, 1, 4]
    assert torch.equal(x, torch.full((4, 6), 0.5))  # without a further step


@pytest.mark.parametrize("method", ["gd", "ngd"])
def test_a_diverging_sample_does_not_stop_early(method):
    def field(x, keep):
        return torch.where(keep[:, None] == 0, torch.nan, -x)

    _, (diverging, other) = sample(
        field,
        normal(2, 3),
        method,
        num_steps=50,
        step_size=0.5,
        stop_below=0.01,
    )
    assert diverging == 49
    assert other < 20
    _, evaluations = sample(halve, torch.zeros(3, 4), method, num_steps=10, stop_below=0.0)
    assert evaluations.tolist() == [9, 9, 9]  # 0 never stops


@every_method
def test_masked_values_stay_and_the_others_move_as_if_alone(method):
    start = normal(3, 8)
    given = normal(3, 8, seed=1)
    goal = normal(8)
    points = []

    def field(x, keep):
        points.append(x)
        # The field of masked values must not matter
        return torch.where(GIVEN, torch.nan, goal - x)

    def observe(x, keep):
        points.append(x)

    settings = {"num_steps": 6, "step_size": 0.1, "objective": EQM}
    x, _ = sample(
        field,
        start,
        method,
        observe=observe,
        given=given,
        mask=GIVEN.expand(3, 8),
        **settings,
    )
    for point in (x, *points):
        assert torch.equal(point[:, GIVEN], given[:, GIVEN])  # bit for bit

    def unmasked_field(x, keep):
        return goal[~GIVEN] - x

    alone, _ = sample(unmasked_field, start[:, ~GIVEN], method, **settings)
    assert torch.equal(x[:, ~GIVEN], alone)


def test_a_sample_stops_by_the_field_of_its_unmasked_part():
    # The root mean square is that of 5, 8, 2 and 0 values, which halve in each step
    start = torch.full((4, 8), 8.0)
    mask = torch.arange(8) < torch.tensor([3, 0, 6, 8])[:, None]
    given = torch.full((4, 8), 9.0)
    x, evaluations = sample(
        halve,
        start,
        num_steps=100,
        step_size=0.5,
        stop_below=1.0,
        given=given,
        mask=mask,
    )
    assert evaluations.tolist() == [5, 5, 5, 0]
    assert torch.equal(x, torch.where(mask, 9.0, 0.5))


def network(x, slope, offset, gamma=ONE_LEVEL):
    slope, offset = (value.reshape(-1, 1, 1, 1, 1) for value in (slope, offset))
    return ((1 + slope) * x + 100 * offset * gamma[:, None, :, None, None]).double()


def weaker(x, slope, offset):
    return network(x, slope, offset).square()


every_guidance = pytest.mark.parametrize("guidance", [0.0, 1.0, 4.0])


@every_guidance
def test_guidance_acts_on_all_channels_and_levels_of_one_float32_batch(guidance):
    batches = []

    def spy(*inputs, gamma):
        batches.append((*inputs, gamma))
        return network(*inputs, gamma)

    x = normal(3, 4, 2, 3, 3)
    levels = torch.rand(3, 2)
    gamma = levels.reshape(3, 1, 2, 1, 1)
    field = guided(spy, CONDITION, TIME_SCALE, guidance)
    f = field(x, torch.arange(3), gamma)
    ((inputs, y, time_scale, told),) = batches
    copies = 1 if guidance == 1 else 2  # of the condition only, or also without it
    assert torch.equal(inputs, torch.cat([x] * copies))
    assert torch.equal(time_scale, torch.cat([TIME_SCALE] * copies))
    assert torch.equal(told, torch.cat([levels] * copies))
    assert sorted(y.tolist()) == sorted([10] * 3 * (copies - 1) + CONDITION.y.tolist())
    f_null = network(x, CONDITION.null().y, TIME_SCALE, levels)
    f_condition = network(x, CONDITION.y, TIME_SCALE, levels)
    expected = f_null + guidance * (f_condition - f_null)
    assert_close(f, expected.float())  # also the dtype
    keep = torch.tensor([2, 0])  # samples that are kept keep their condition and time scale
    assert_close(field(x[keep], keep, gamma[keep]), f[keep])


@every_guidance
def test_a_weaker_network_guides_away_from_its_errors(guidance):
    x = normal(3, 4, 2, 3, 3)
    field = guided(network, CONDITION, TIME_SCALE, guidance, weaker)
    f = network(x, CONDITION.y, TIME_SCALE)
    f_weak = weaker(x, CONDITION.y, TIME_SCALE)
    expected = f if guidance == 1 else f_weak + guidance * (f - f_weak)
    assert_close(field(x, torch.arange(3)), expected.float())
