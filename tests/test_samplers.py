"""Samplers on fields with known solutions, guidance, and conditions."""

from types import SimpleNamespace

import pytest
import torch

import transport
from models import Condition
from samplers import guided, sample
from test_transport import normal

EQM = transport.OBJECTIVES["eqm"]
every_method = pytest.mark.parametrize("method", ["gd", "ngd", "euler", "heun"])
GIVEN = torch.arange(8) < 3  # of 8 values of a sample
TIME_SCALE = torch.tensor([0.04, 0.08, 0.1])
CONDITION = Condition.of(torch.tensor([3, -1, 7]), SimpleNamespace(num_classes=10))


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
        distance = (
            z.square().sum(1)[:, None]
            - 2 * gamma * (z @ mean)[:, None]
            + gamma**2 * mean.square().sum()
        )
        weights = (-distance / (2 * v) - z.shape[1] / 2 * v.log()).softmax(dim=1) * transport.decay(
            gamma
        )
        return (weights * (1 - slope * gamma)).sum(1)[:, None] * mean + (weights * slope).sum(1)[
            :, None
        ] * z

    return field


@pytest.mark.parametrize(("method", "std"), [("gd", 0.5), ("ngd", 1.0)])
def test_published_settings_sample_the_mean_and_variance_of_gaussian_data(method, std):
    # The mean is not zero, as otherwise gamma and 1 - gamma would look the same for data with
    # variance 1. The data are not quite an equilibrium: gamma is at most 1, so near the data its
    # posterior mean is below 1 and f is not zero, and 1,000 steps end 5 to 14% beyond the mean.
    # Hence the published number of steps and these tolerances.
    mean = normal(1024, dtype=torch.float64)
    start = normal(64, 1024, seed=1, dtype=torch.float64)
    field = optimal_field(mean, std)
    x, _ = sample(field, start, method, num_steps=250, step_size=0.0017, momentum=0.3)
    assert (x.mean(dim=0) @ mean / mean.square().sum()).item() == pytest.approx(1, abs=0.03)
    assert (x.mean(dim=0) - mean).square().mean().sqrt() < 1.2 * std / 64**0.5  # standard errors
    assert x.var(dim=0).mean().item() == pytest.approx(std**2, rel=0.03)
    assert field(x, None).square().mean() < 0.02 * field(start, None).square().mean()


@every_method
@pytest.mark.parametrize("num_steps", [2, 7])
def test_the_observer_sees_every_point_and_the_start_is_not_changed(method, num_steps):
    seen = []
    observed = []
    start = normal(3, 4)
    before = start.clone()
    field = lambda x, keep: seen.append(keep.tolist()) or torch.full_like(x, 2.0)  # noqa: E731
    observe = lambda x, keep: observed.append((x.clone(), keep.tolist()))  # noqa: E731
    x, evaluations = sample(field, start, method, num_steps, 0.1, objective=EQM, observe=observe)
    count = 2 * num_steps - 3 if method == "heun" else num_steps - 1
    assert evaluations.tolist() == [count] * 3 and seen == [[0, 1, 2]] * count
    assert torch.equal(start, before) and x.isfinite().all()
    assert len(observed) == num_steps and all(keep == [0, 1, 2] for _, keep in observed)
    assert torch.equal(observed[0][0], start) and torch.equal(observed[-1][0], x)
    if method in ("gd", "ngd"):
        torch.testing.assert_close(x, before + count * 0.1 * 2.0)


def test_stopped_samples_are_not_evaluated_again():
    # f = -x halves x in each step: from x = 2^n the root mean square is below 1 after n + 1 steps.
    start = torch.tensor([8.0, 1.0, 0.5, 4.0])[:, None].expand(4, 6)
    seen = []
    x, evaluations = sample(
        lambda x, keep: seen.append(keep.tolist()) or -x, start, "gd", 100, 0.5, stop_below=1.0
    )
    assert seen == [[0, 1, 2, 3], [0, 1, 3], [0, 3], [0, 3], [0]]
    assert evaluations.tolist() == [
        5,
        2,
        1,
        4,
    ]  # including the one that finds f below the threshold
    assert torch.equal(x, torch.full((4, 6), 0.5))  # without a further step


@pytest.mark.parametrize("method", ["gd", "ngd"])
def test_a_diverging_sample_does_not_stop_early(method):
    field = lambda x, keep: torch.where(keep[:, None] == 0, torch.nan, -x)  # noqa: E731
    _, evaluations = sample(field, normal(2, 3), method, 50, 0.5, stop_below=0.01)
    assert evaluations[0] == 49 and evaluations[1] < 20
    _, evaluations = sample(
        lambda x, keep: -x, torch.zeros(3, 4), method, 10, 0.1, stop_below=0.0
    )  # 0 never stops
    assert evaluations.tolist() == [9, 9, 9]


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("num_steps", [2, 3, 10])
@pytest.mark.parametrize("start_gamma", [0.0, 0.9])
def test_solvers_follow_a_straight_path_exactly_to_the_data(method, num_steps, start_gamma):
    noise = normal(3, 5, dtype=torch.float64)
    data = normal(3, 5, seed=1, dtype=torch.float64)
    path = data - noise
    start = noise + start_gamma * path

    # of one data point and a known noise: the position of x on the line between them gives gamma
    def field(x, keep):
        gamma = ((x - noise) * path).sum(dim=1) / path.square().sum(dim=1)
        return transport.decay(gamma)[:, None] * path

    x, _ = sample(field, start, method, num_steps, start_gamma=start_gamma, objective=EQM)
    torch.testing.assert_close(x, data)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_the_error_of_a_solver_falls_with_its_order(method, order):
    gammas = []

    class Unscaled(transport.Objective):  # dx/dgamma = f
        def velocity(self, f, gamma):
            gammas.append(gamma.item())
            return f

    objective = Unscaled("unscaled", "", has_decay=True, is_told=False)
    start = normal(2, 3, dtype=torch.float64)
    errors = []
    for num_steps in (41, 81):
        x, _ = sample(lambda x, keep: -x, start, method, num_steps, objective=objective)
        errors.append((x - start * torch.tensor(-1.0, dtype=torch.float64).exp()).norm())
    assert torch.log2(errors[0] / errors[1]).item() == pytest.approx(order, abs=0.1)
    gammas.clear()
    sample(lambda x, keep: x, start, method, num_steps=7, start_gamma=0.4, objective=objective)
    assert sorted(set(gammas)) == pytest.approx(
        [0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    )  # equal steps, never at gamma 1


@every_method
def test_masked_values_stay_and_the_others_move_as_if_alone(method):
    start = normal(3, 8)
    given = normal(3, 8, seed=1)
    seen = []

    def field(x, keep):
        seen.append(x)
        return (normal(8) - x) * torch.where(
            GIVEN, torch.nan, 1.0
        )  # the field of masked values must not matter

    masked = {"given": given, "mask": GIVEN.expand(3, 8), "objective": EQM}
    x, _ = sample(field, start, method, 6, 0.1, observe=lambda x, keep: seen.append(x), **masked)
    assert all(torch.equal(point[:, GIVEN], given[:, GIVEN]) for point in (x, *seen))  # bit for bit
    alone, _ = sample(
        lambda x, keep: normal(8)[~GIVEN] - x, start[:, ~GIVEN], method, 6, 0.1, objective=EQM
    )
    assert torch.equal(x[:, ~GIVEN], alone)


def test_a_sample_stops_by_the_field_of_its_unmasked_part():
    # f = -x of the unmasked part, which halves in each step; its root mean square is that of 5, 8
    # and 2 values.
    start = torch.full((3, 8), 8.0)
    mask = torch.stack([GIVEN, torch.zeros(8, dtype=torch.bool), torch.arange(8) < 6])
    masked = {"given": torch.full((3, 8), 9.0), "mask": mask}
    x, evaluations = sample(lambda x, keep: -x, start, "gd", 100, 0.5, stop_below=1.0, **masked)
    assert evaluations.tolist() == [5, 5, 5]
    assert torch.equal(x, torch.where(mask, 9.0, 0.5))


def test_a_condition_can_be_removed_from_some_samples():
    mask = torch.tensor([True, False, False])
    found = CONDITION.to("cpu").null(mask).y
    assert torch.equal(found, torch.where(mask, 10, CONDITION.y)) and found.dtype == torch.int64
    assert CONDITION.null().y.tolist() == [10, 10, 10] and CONDITION.y.tolist() == [
        3,
        10,
        7,
    ]  # negative: no class
    assert CONDITION.null().is_null() and not CONDITION.is_null()


@pytest.mark.parametrize("guidance", [0.0, 1.0, 4.0])
def test_guidance_acts_on_all_channels_of_one_float32_batch_or_of_a_weaker_network(guidance):
    calls = []
    x = normal(3, 4, 2, 3, 3)

    def network(*inputs):
        calls.append(inputs)
        x, slope, offset = inputs[0], *(v.reshape(-1, 1, 1, 1, 1) for v in inputs[1:])
        return ((1 + slope) * x + 100 * offset).double()

    field = guided(network, CONDITION, TIME_SCALE, guidance)
    f = field(x, torch.arange(3))
    ((inputs, y, time_scale),) = calls
    copies = 1 if guidance == 1 else 2  # of the condition only, or also without it
    assert torch.equal(inputs, torch.cat([x] * copies)) and torch.equal(
        time_scale, torch.cat([TIME_SCALE] * copies)
    )
    assert sorted(y.tolist()) == sorted([10] * 3 * (copies - 1) + CONDITION.y.tolist())
    f_null, f_condition = (network(x, y, TIME_SCALE) for y in (torch.full((3,), 10), CONDITION.y))
    torch.testing.assert_close(
        f, (f_null + guidance * (f_condition - f_null)).float()
    )  # also the dtype
    weak = guided(
        network, CONDITION, TIME_SCALE, guidance, lambda *inputs: network(*inputs).square()
    )
    expected = (
        f_condition if guidance == 1 else f_condition**2 + guidance * (f_condition - f_condition**2)
    )
    torch.testing.assert_close(weak(x, torch.arange(3)), expected.float())
    keep = torch.tensor([2, 0])  # samples that are kept keep their condition and time scale
    torch.testing.assert_close(field(x[keep], keep), f[keep])
