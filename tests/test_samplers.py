"""Samplers on fields with known solutions, guidance, and batches of samples."""

import pytest
import torch
from tqdm import tqdm

import generation
import samplers
import transport
from generation import generate
from samplers import guided, sample

both_descents = pytest.mark.parametrize("method", ["gd", "ngd"])


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def optimal_field(mean, std, num_gammas=300):
    """The optimal field without gamma as an input, for data N(mean, std^2 I): f(z) = E[(x - eps) c(gamma) | z]. mean is
    (D,), or (B, D) for a sample each.

    Given gamma, x_gamma ~ N(gamma mean, v I) with v = gamma^2 std^2 + (1 - gamma)^2, and the mean of x - eps is
    mean + slope (z - gamma mean). The integral over p(gamma | z) is a sum of the midpoint rule.
    """
    gamma = (torch.arange(num_gammas, dtype=torch.float64) + 0.5) / num_gammas
    v = (gamma * std) ** 2 + (1 - gamma) ** 2
    slope = (gamma * std**2 - (1 - gamma)) / v

    def field(z, keep):
        square, product = mean.square().sum(-1, keepdim=True), (z * mean).sum(1)[:, None]
        distance = z.square().sum(1)[:, None] - 2 * gamma * product + gamma**2 * square
        log_likelihood = -distance / (2 * v) - z.shape[1] / 2 * v.log()
        weights = log_likelihood.softmax(dim=1) * transport.decay(gamma)  # (B, num_gammas)
        return (weights * (1 - slope * gamma)).sum(1)[:, None] * mean + (weights * slope).sum(1)[:, None] * z

    return field


def monte_carlo_field(z, mean, std, num_draws=40_000):
    """The same for one z (D,) by Monte Carlo over gamma, weighted with the density of z."""
    gamma = torch.rand(num_draws, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    path = torch.distributions.Normal(gamma * mean, ((gamma * std) ** 2 + (1 - gamma) ** 2).sqrt())
    weights = path.log_prob(z).sum(dim=1).softmax(dim=0)[:, None]
    x = mean + gamma * std**2 / path.variance * (z - gamma * mean)  # E[x | z, gamma]
    noise = (1 - gamma) / path.variance * (z - gamma * mean)
    return (weights * (x - noise) * transport.decay(gamma)).sum(dim=0)


def test_the_optimal_field_of_these_tests_is_the_conditional_mean():
    mean, z = normal(5, dtype=torch.float64), normal(3, 5, seed=1, dtype=torch.float64)
    expected = torch.stack([monte_carlo_field(row, mean, 0.5) for row in z])
    torch.testing.assert_close(optimal_field(mean, 0.5)(z, None), expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(("method", "std"), [("gd", 0.5), ("ngd", 1.0)])
def test_the_published_settings_reach_the_mean_and_the_variance_of_gaussian_data(method, std):
    # The mean is not zero, as otherwise gamma and 1 - gamma would look the same for data with variance 1. The data are
    # not quite an equilibrium: gamma is at most 1, so near the data its posterior mean is below 1 and f is not zero,
    # and 1,000 steps end 5 to 14% beyond the mean. Hence the published number of steps and these tolerances.
    mean, start = normal(1024, dtype=torch.float64), normal(64, 1024, seed=1, dtype=torch.float64)
    field = optimal_field(mean, std)
    x, _ = sample(field, start, method, num_steps=250, step_size=0.0017, momentum=0.3)

    along = (x.mean(dim=0) @ mean / mean.square().sum()).item()
    standard_error = std / 64**0.5
    assert along == pytest.approx(1, abs=0.03)
    assert (x.mean(dim=0) - mean).square().mean().sqrt() < 1.2 * standard_error
    assert x.var(dim=0).mean().item() == pytest.approx(std**2, rel=0.03)
    assert field(x, None).square().mean() < 0.02 * field(start, None).square().mean()


@pytest.mark.parametrize(("method", "momentum"), [("gd", 0.7), ("ngd", 0.0), ("ngd", 0.3), ("ngd", 0.9)])
def test_descent_on_a_quadratic_energy_contracts_at_its_rate(method, momentum):
    # Per direction of curvature a, error e and last field m follow a linear recurrence:
    # m' = -a (e + eta mu m), e' = e + eta m'.
    eta, curvature, goal = 0.02, torch.tensor([1.0, 5.0, 30.0]).double(), normal(3).double()
    start = normal(4, 3, seed=1).double()
    field = lambda x, keep: curvature * (goal - x)  # noqa: E731
    x, _ = sample(field, start, method, 101, step_size=eta, momentum=momentum)
    mu = momentum if method == "ngd" else 0  # plain descent ignores it
    for i, a in enumerate(curvature.tolist()):
        step = torch.tensor([[1 - eta * a, -(eta**2) * a * mu], [-a, -eta * a * mu]], dtype=torch.float64)
        expected = torch.linalg.matrix_power(step, 100)[0, 0] * (start - goal)[:, i]
        torch.testing.assert_close(x[:, i] - goal[i], expected, atol=1e-14, rtol=1e-6)


@both_descents
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_n_points_take_n_minus_1_evaluations_which_move_a_copy_of_the_start(method, num_steps):
    seen, start = [], normal(3, 4)
    before = start.clone()
    field = lambda x, keep: seen.append(keep.tolist()) or torch.full_like(x, 2.0)  # noqa: E731
    x, evaluations = sample(field, start, method, num_steps, step_size=0.1)
    assert evaluations.tolist() == [num_steps - 1] * 3
    assert seen == [[0, 1, 2]] * (num_steps - 1)
    torch.testing.assert_close(x, before + (num_steps - 1) * 0.1 * 2.0)
    assert torch.equal(start, before)


def test_samples_that_have_stopped_are_not_evaluated_any_more():
    # f = -x halves x in each step: from x = 2^n the root mean square is below 1 after n + 1 steps.
    start, seen = torch.tensor([8.0, 1.0, 0.5, 4.0])[:, None].expand(4, 6), []

    def field(x, keep):
        assert len(x) == len(keep)
        seen.append(keep.tolist())
        return -x

    x, evaluations = sample(field, start, "gd", num_steps=100, step_size=0.5, stop_below=1.0)
    assert seen == [[0, 1, 2, 3], [0, 1, 3], [0, 3], [0, 3], [0]]
    assert evaluations.tolist() == [5, 2, 1, 4]  # including the one that finds f below the threshold
    assert torch.equal(x, torch.full((4, 6), 0.5))  # without a further step


@both_descents
def test_the_result_of_a_sample_does_not_depend_on_its_neighbours(method):
    start, rates = normal(6, 5, seed=3), torch.tensor([0.1, 1.0, 2.0, 3.0, 0.5, 5.0])[:, None]

    def run(chosen):
        def field(x, keep):
            return -rates[chosen][keep] * torch.sin(x)

        return sample(field, start[chosen], method, 40, 0.1, 0.5, stop_below=0.3)

    x, evaluations = run(torch.arange(6))
    for i in range(6):
        alone, spent = run(torch.tensor([i]))
        assert torch.equal(alone[0], x[i])
        assert spent[0] == evaluations[i]
    assert len(set(evaluations.tolist())) > 2  # they did stop at different times


@both_descents
def test_a_sample_that_diverges_does_not_count_as_stopped_and_ends_after_num_steps(method):
    def field(x, keep):
        return torch.where(keep[:, None] == 0, torch.inf * x - torch.inf * x, -x)

    _, evaluations = sample(field, normal(2, 3), method, 50, 0.5, stop_below=0.01)
    assert evaluations[0] == 49
    assert evaluations[1] < 20


def test_a_threshold_of_zero_never_stops():
    _, spent = sample(lambda x, keep: -x, torch.zeros(3, 4), "gd", 10, 0.1, stop_below=0.0)
    assert spent.tolist() == [9, 9, 9]


def test_an_unknown_method_is_refused():
    with pytest.raises(AssertionError, match="newton"):
        sample(lambda x, keep: x, torch.zeros(1, 2), "newton", num_steps=2)


NULL = 10
LABELS, TIME_SCALE = torch.tensor([3, 7, 1]), torch.tensor([0.04, 0.08, 0.1])


class Recorder:
    """A network whose output depends on its input, label and time scale, and that records its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, y, time_scale):
        self.calls.append((x, y, time_scale))
        slope, offset = (v.reshape(-1, 1, 1, 1, 1) for v in (1 + y, 100 * time_scale))
        return slope * x + offset


@pytest.mark.parametrize("guidance", [0.0, 1.0, 4.0])
def test_guidance_is_on_all_channels_and_evaluates_one_batch(guidance):
    network, x = Recorder(), normal(3, 4, 2, 3, 3)
    field = guided(network, LABELS, TIME_SCALE, guidance, NULL)
    f = field(x, torch.arange(3))
    ((inputs, y, time_scale),) = network.calls
    copies = 1 if guidance == 1 else 2  # of the class only, or also without a class
    assert torch.equal(inputs, torch.cat([x] * copies))
    assert torch.equal(time_scale, torch.cat([TIME_SCALE] * copies))
    assert sorted(y.tolist()) == sorted([NULL] * 3 * (copies - 1) + LABELS.tolist())
    f_null, f_class = network(x, torch.full((3,), NULL), TIME_SCALE), network(x, LABELS, TIME_SCALE)
    torch.testing.assert_close(f, f_null + guidance * (f_class - f_null))
    keep = torch.tensor([2, 0])  # samples that are kept keep their label and time scale
    torch.testing.assert_close(field(x[keep], keep), f[keep])


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_guided_field_is_float32(guidance):
    field = guided(lambda x, y, t: x.bfloat16(), LABELS, TIME_SCALE, guidance, NULL)
    assert field(normal(3, 4, 1, 2, 2), torch.arange(3)).dtype == torch.float32


# Batches ------------------------------------------------------------------------------------------------------------


def wavy(x, y, time_scale):
    """A network without sums, so that results do not depend on the batch bit by bit."""
    return torch.sin((1 + y).reshape(-1, 1, 1, 1, 1) * x) * time_scale.reshape(-1, 1, 1, 1, 1)


def run_generate(network=wavy, count=5, **settings):
    settings = {"method": "ngd", "num_steps": 6, "step_size": 0.5, "momentum": 0.3, "guidance": 4.0} | settings
    labels, time_scale = torch.arange(count), torch.linspace(0.04, 0.2, count)
    return generate(network, normal(count, 2, 3, 4, 4), labels, time_scale, NULL, show=False, **settings)


@pytest.mark.parametrize("stop_below", [None, 0.3])
def test_samples_do_not_depend_on_the_batch_size(stop_below):
    expected, spent, _ = run_generate(batch_size=5, stop_below=stop_below)
    assert expected.shape == (5, 2, 3, 4, 4)
    for batch_size in (1, 2, 100):
        samples, evaluations, _ = run_generate(batch_size=batch_size, stop_below=stop_below)
        assert torch.equal(samples, expected)
        assert torch.equal(evaluations, spent)


def test_samples_are_in_the_order_of_their_noise():
    samples, _, _ = run_generate(batch_size=2, step_size=1e-6)
    torch.testing.assert_close(samples, normal(5, 2, 3, 4, 4), atol=1e-4, rtol=0)


@pytest.mark.parametrize("stop_below", [None, 1e6])
def test_one_progress_bar_counts_the_points_of_all_batches_also_if_they_stop_early(stop_below, monkeypatch):
    bars = []

    def bar(**settings):
        bars.append(tqdm(**settings | {"disable": False}))
        return bars[-1]

    monkeypatch.setattr(generation, "Bar", bar)
    run_generate(batch_size=2, stop_below=stop_below)
    assert [(bar.total, bar.n) for bar in bars] == [(18, 18)]  # 3 batches x 6 points


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_is_that_of_the_network_and_samples_stay_float32_and_build_no_graph(precision, dtype):
    weight, seen = torch.eye(4, requires_grad=True), []

    def network(x, y, time_scale):
        f = x @ weight
        seen.append((x.dtype, f.dtype))
        return f

    samples, _, _ = run_generate(network, precision=precision)
    assert set(seen) == {(torch.float32, dtype)}
    assert samples.dtype == torch.float32
    assert not samples.requires_grad


# The ODE in gamma ---------------------------------------------------------------------------------------------------


def straight_field(noise, data):
    """The field of a single data point and a known noise: the position of x on the line between them gives gamma."""
    path = data - noise

    def field(x, keep):
        gamma = ((x - noise) * path).sum(dim=1) / path.square().sum(dim=1)
        return transport.decay(gamma)[:, None] * path

    return field


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("num_steps", [2, 3, 10])
@pytest.mark.parametrize("start_gamma", [0.0, 0.9])
def test_the_ode_leads_straight_to_the_data_if_its_assumption_holds(method, num_steps, start_gamma):
    noise, data = normal(3, 5, dtype=torch.float64), normal(3, 5, seed=1, dtype=torch.float64)
    start = transport.interpolate(data, noise, torch.full((3,), start_gamma, dtype=torch.float64))
    x, _ = sample(straight_field(noise, data), start, method, num_steps, start_gamma=start_gamma)
    torch.testing.assert_close(x, data)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_the_error_of_a_solver_falls_by_its_order(method, order, monkeypatch):
    monkeypatch.setattr(samplers, "decay", torch.ones_like)  # dx/dgamma = -x, with a known solution
    start, errors = normal(2, 3, dtype=torch.float64), []
    for num_steps in (41, 81):
        x, _ = sample(lambda x, keep: -x, start, method, num_steps)
        errors.append((x - start * torch.tensor(-1.0, dtype=torch.float64).exp()).norm())
    assert torch.log2(errors[0] / errors[1]).item() == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize(("method", "spent"), [("euler", 6), ("heun", 11)])
def test_a_solver_takes_equal_steps_and_never_evaluates_at_gamma_1(method, spent, monkeypatch):
    gammas = []
    monkeypatch.setattr(samplers, "decay", lambda gamma: gammas.append(gamma.item()) or transport.decay(gamma))
    x, evaluations = sample(lambda x, keep: torch.ones_like(x), normal(2, 3), method, num_steps=7, start_gamma=0.4)
    assert evaluations.tolist() == [spent] * 2
    assert len(gammas) == spent
    assert sorted(set(gammas)) == pytest.approx([0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    assert x.isfinite().all()


# Given parts --------------------------------------------------------------------------------------------------------

GIVEN = torch.arange(8) < 3  # of 8 values of a sample
every_method = pytest.mark.parametrize("method", ["gd", "ngd", "euler", "heun"])


def test_given_values_lead_the_rest_to_its_conditional_mean_and_variance():
    # (a, b) is Gaussian, b given a has the mean R a and the variance std^2. A network that was trained with a clean a
    # has for b the optimal field of that distribution; what it says of a must not matter.
    std, rotation = 0.5, torch.linalg.qr(normal(512, 512, dtype=torch.float64))[0]
    a, noise = normal(64, 512, dtype=torch.float64) + 1, normal(64, 512, seed=1, dtype=torch.float64)

    def field(z, keep):
        a, b = z.chunk(2, dim=1)
        return torch.cat([7 * torch.ones_like(a), optimal_field(a @ rotation, std)(b, keep)], dim=1)

    mask = torch.arange(1024)[None] < 512
    x, _ = sample(field, torch.cat([noise, noise], dim=1), given=torch.cat([a, a], dim=1), mask=mask)
    found, b = x.chunk(2, dim=1)
    mean = a @ rotation
    assert torch.equal(found, a)
    assert ((b * mean).sum() / mean.square().sum()).item() == pytest.approx(1, abs=0.03)
    assert (b - mean).var().item() == pytest.approx(std**2, rel=0.05)


@every_method
def test_given_values_stay_bit_for_bit_and_the_field_sees_them_at_every_point(method):
    start, given, seen = normal(3, 8), normal(3, 8, seed=1), []

    def field(x, keep):
        seen.append(x)
        return (normal(8) - x) * torch.where(GIVEN, torch.nan, 1.0)  # what it says of them does not matter

    x, _ = sample(field, start, method, 6, 0.1, observe=lambda x, keep: seen.append(x), given=given, mask=GIVEN[None])
    for point in (x, *seen):
        assert torch.equal(point[:, GIVEN], given[:, GIVEN])
    assert (x[:, ~GIVEN] != start[:, ~GIVEN]).all()


@every_method
def test_a_mask_of_nothing_changes_nothing(method):
    start, field = normal(3, 8), lambda x, keep: normal(8) - x
    plain, _ = sample(field, start, method, 6, 0.1)
    nothing = torch.zeros(1, 8, dtype=torch.bool)
    masked, _ = sample(field, start, method, 6, 0.1, given=normal(3, 8, seed=1), mask=nothing)
    assert torch.equal(plain, masked)


def test_a_sample_stops_by_the_field_of_what_can_move_and_masks_differ_between_samples():
    # f = -x of the rest, which halves in each step; its root mean square is that of 5, 8 and 2 values.
    start, mask = torch.full((3, 8), 8.0), torch.stack([GIVEN, torch.zeros(8, dtype=torch.bool), torch.arange(8) < 6])
    x, evaluations = sample(
        lambda x, keep: -x, start, "gd", 100, 0.5, stop_below=1.0, given=torch.full((3, 8), 9.0), mask=mask
    )
    assert evaluations.tolist() == [5, 5, 5]
    assert torch.equal(x, torch.where(mask, 9.0, 0.5))


# Observers and energies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gd", "ngd", "euler", "heun"])
def test_an_observer_sees_every_point_from_the_first_to_the_last(method):
    seen, start = [], normal(3, 4)
    x, _ = sample(lambda x, keep: -x, start, method, 5, 0.1, observe=lambda x, keep: seen.append((x.clone(), keep)))
    assert len(seen) == 5
    assert torch.equal(seen[0][0], start)
    assert torch.equal(seen[-1][0], x)
    assert all(keep.tolist() == [0, 1, 2] for _, keep in seen)


def quadratic(x, y, time_scale):
    """An energy whose field is -(1 + y) x."""
    return (1 + y) * x.square().flatten(1).sum(dim=1) / 2


def quadratic_field(x, y, time_scale):
    return -(1 + y).reshape(-1, 1, 1, 1, 1) * x


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_energies_are_those_of_the_points(guidance):
    step = 0.01
    _, evaluations, energies = run_generate(
        quadratic_field, energy=quadratic, num_steps=9, step_size=step, guidance=guidance, method="gd", batch_size=2
    )
    rate = (1 + NULL) + guidance * (torch.arange(5) - NULL)  # of the guided field, per label
    start = normal(5, 2, 3, 4, 4).square().flatten(1).sum(dim=1)
    expected = (rate / 2 * start)[:, None] * (1 - step * rate)[:, None] ** (2 * torch.arange(9))
    torch.testing.assert_close(energies, expected, rtol=1e-4, atol=1e-4)
    assert evaluations.tolist() == [8] * 5


def test_the_energies_of_a_sample_end_where_it_stops():
    settings = {"num_steps": 60, "step_size": 0.1, "guidance": 1.0, "method": "gd", "stop_below": 0.05, "batch_size": 2}
    samples, evaluations, energies = run_generate(quadratic_field, energy=quadratic, **settings)
    assert len(set(evaluations.tolist())) == 5  # they stop at different times
    known = ~energies.isnan()
    assert known.sum(dim=1).tolist() == evaluations.tolist()  # a point per evaluation; the last one made no step
    last = energies[torch.arange(5), evaluations - 1]
    torch.testing.assert_close(last, quadratic(samples, torch.arange(5), None))
    assert (energies.diff(dim=1)[known[:, 1:]] < 0).all()


@pytest.mark.parametrize("stop_below", [None, 0.05])
def test_computing_energies_does_not_change_the_samples(stop_below):
    settings = {"num_steps": 20, "step_size": 0.1, "guidance": 1.0, "stop_below": stop_below}
    plain, _, nothing = run_generate(quadratic_field, **settings)
    watched, _, _ = run_generate(quadratic_field, energy=quadratic, **settings)
    assert torch.equal(plain, watched)
    assert nothing is None
