import pytest
import torch

import generation
import samplers
import transport
from generation import generate
from samplers import guided, sample

METHODS = ["gd", "ngd"]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def optimal_field(mean, std, num_gammas=300):
    """The optimal field without gamma as an input, for data N(mean, std^2 I): f(z) = E[(x - eps) c(gamma) | z].

    Given gamma, x_gamma ~ N(gamma mean, v I) with v = gamma^2 std^2 + (1 - gamma)^2, and the mean of x - eps is
    mean + slope (z - gamma mean). The integral over p(gamma | z) is a sum of the midpoint rule.
    """
    gamma = (torch.arange(num_gammas, dtype=torch.float64) + 0.5) / num_gammas
    v = (gamma * std) ** 2 + (1 - gamma) ** 2
    slope = (gamma * std**2 - (1 - gamma)) / v

    def field(z, keep):
        distance = z.square().sum(1)[:, None] - 2 * gamma * (z @ mean)[:, None] + gamma**2 * mean.square().sum()
        log_likelihood = -distance / (2 * v) - len(mean) / 2 * v.log()
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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("std", [0.5, 1.0])
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


def test_gradient_descent_on_a_quadratic_energy_contracts_at_its_rate():
    curvature, goal, start = torch.tensor([1.0, 5.0, 30.0]).double(), normal(3).double(), normal(4, 3, seed=1).double()
    x, _ = sample(lambda x, keep: curvature * (goal - x), start, "gd", num_steps=21, step_size=0.05)
    torch.testing.assert_close(x - goal, (start - goal) * (1 - 0.05 * curvature) ** 20)  # 30: -0.5 per step


@pytest.mark.parametrize("momentum", [0.3, 0.9])
def test_nesterov_descent_on_a_quadratic_energy_contracts_at_its_rate(momentum):
    # Per direction of curvature a, error e and last field m follow a linear recurrence:
    # m' = -a (e + eta mu m), e' = e + eta m'.
    eta, curvature, start = 0.02, torch.tensor([1.0, 5.0, 30.0]).double(), normal(4, 3, seed=1).double()
    x, _ = sample(lambda x, keep: -curvature * x, start, "ngd", 101, step_size=eta, momentum=momentum)
    for i, a in enumerate(curvature.tolist()):
        step = torch.tensor([[1 - eta * a, -(eta**2) * a * momentum], [-a, -eta * a * momentum]], dtype=torch.float64)
        expected = torch.linalg.matrix_power(step, 100)[0, 0] * start[:, i]
        torch.testing.assert_close(x[:, i], expected, atol=1e-15, rtol=1e-6)
        rate = torch.linalg.eigvals(step).abs().max()
        assert (x[:, i].abs() <= 2 * rate**100 * start[:, i].abs()).all()


def test_without_momentum_both_methods_are_the_same():
    field, start = (lambda x, keep: torch.cos(3 * x)), normal(4, 5)
    gd, _ = sample(field, start, "gd", num_steps=20, step_size=0.1, momentum=0.7)  # gd ignores it
    ngd, _ = sample(field, start, "ngd", num_steps=20, step_size=0.1, momentum=0.0)
    with_momentum, _ = sample(field, start, "ngd", num_steps=20, step_size=0.1, momentum=0.7)
    assert torch.equal(gd, ngd)
    assert not torch.allclose(gd, with_momentum)


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_field_moves_by_its_size_per_evaluation(method):
    x, _ = sample(lambda x, keep: torch.full_like(x, 2.0), torch.zeros(3, 4), method, num_steps=11, step_size=0.1)
    torch.testing.assert_close(x, torch.full((3, 4), 2.0))  # 10 evaluations x 0.1 x 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_n_points_take_n_minus_1_evaluations(method, num_steps):
    seen = []
    start = normal(3, 4)
    x, evaluations = sample(lambda x, keep: seen.append(keep) or torch.ones_like(x), start, method, num_steps, 0.1)
    assert evaluations.tolist() == [num_steps - 1] * 3
    assert [keep.tolist() for keep in seen] == [[0, 1, 2]] * (num_steps - 1)
    assert torch.equal(x, start) == (num_steps == 1)


@pytest.mark.parametrize("method", METHODS)
def test_the_start_is_not_changed(method):
    start = normal(3, 4)
    before = start.clone()
    sample(lambda x, keep: torch.ones_like(x), start, method, num_steps=3, step_size=0.1)
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


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_ends_after_num_steps_if_not_all_samples_have_stopped(method):
    x, evaluations = sample(lambda x, keep: -x, torch.tensor([[0.1], [1e6]]), method, 5, 0.1, stop_below=1.0)
    assert evaluations.tolist() == [1, 4]
    assert x[0] == 0.1
    assert x[1] < 1e6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop_below", [None, 0.3])
def test_the_result_of_a_sample_does_not_depend_on_its_neighbours(method, stop_below):
    start, rates = normal(6, 5, seed=3), torch.tensor([0.1, 1.0, 2.0, 3.0, 0.5, 5.0])[:, None]

    def run(chosen):
        def field(x, keep):
            return -rates[chosen][keep] * torch.sin(x)

        return sample(field, start[chosen], method, 40, 0.1, 0.5, stop_below)

    x, evaluations = run(torch.arange(6))
    for i in range(6):
        alone, spent = run(torch.tensor([i]))
        assert torch.equal(alone[0], x[i])
        assert spent[0] == evaluations[i]
    if stop_below is not None:
        assert len(set(evaluations.tolist())) > 2  # they did stop at different times


@pytest.mark.parametrize("method", METHODS)
def test_a_threshold_of_zero_never_stops(method):
    start = normal(3, 4)
    field = lambda x, keep: -x  # noqa: E731
    with_threshold, spent = sample(field, start, method, 10, 0.1, stop_below=0.0)
    assert torch.equal(with_threshold, sample(field, start, method, 10, 0.1)[0])
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


def test_guidance_is_on_all_channels_and_evaluates_one_batch():
    network, x = Recorder(), normal(3, 4, 2, 3, 3)
    keep = torch.arange(3)
    f = guided(network, LABELS, TIME_SCALE, 4.0, NULL)(x, keep)
    assert len(network.calls) == 1
    both, y, time_scale = network.calls[0]
    assert torch.equal(both, torch.cat([x, x]))
    assert sorted(y.tolist()) == sorted([NULL] * 3 + LABELS.tolist())
    assert torch.equal(time_scale, torch.cat([TIME_SCALE, TIME_SCALE]))
    f_null, f_class = network(x, torch.full((3,), NULL), TIME_SCALE), network(x, LABELS, TIME_SCALE)
    torch.testing.assert_close(f, f_null + 4 * (f_class - f_null))
    assert (f != f_class).all()  # every channel is guided


def test_guidance_of_one_evaluates_the_field_of_the_class_only():
    network, x = Recorder(), normal(3, 4, 2, 3, 3)
    f = guided(network, LABELS, TIME_SCALE, 1.0, NULL)(x, torch.arange(3))
    assert [y.tolist() for _, y, _ in network.calls] == [LABELS.tolist()]
    assert torch.equal(f, Recorder()(x, LABELS, TIME_SCALE))


def test_guidance_of_zero_is_the_field_without_a_class():
    x = normal(3, 4, 2, 3, 3)
    f = guided(Recorder(), LABELS, TIME_SCALE, 0.0, NULL)(x, torch.arange(3))
    torch.testing.assert_close(f, Recorder()(x, torch.full((3,), NULL), TIME_SCALE))


@pytest.mark.parametrize("guidance", [0.0, 1.0, 4.0])
def test_samples_that_are_kept_keep_their_label_and_time_scale(guidance):
    x, keep = normal(3, 4, 2, 3, 3), torch.tensor([2, 0])
    field = guided(Recorder(), LABELS, TIME_SCALE, guidance, NULL)
    torch.testing.assert_close(field(x[keep], keep), field(x, torch.arange(3))[keep])


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_guided_field_is_float32(guidance):
    field = guided(lambda x, y, t: x.bfloat16(), LABELS, TIME_SCALE, guidance, NULL)
    assert field(normal(3, 4, 1, 2, 2), torch.arange(3)).dtype == torch.float32


class Bar:
    """In place of tqdm: records its progress."""

    made = []

    def __init__(self, total, **settings):
        self.total, self.done = total, 0
        Bar.made.append(self)

    @property
    def n(self):
        return self.done

    def update(self, n=1):
        self.done += n

    def set_postfix_str(self, text, refresh):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def wavy(x, y, time_scale):
    """A network without sums, so that results do not depend on the batch bit by bit."""
    return torch.sin((1 + y).reshape(-1, 1, 1, 1, 1) * x) * time_scale.reshape(-1, 1, 1, 1, 1)


def run_generate(network=wavy, count=5, **settings):
    settings = {"method": "ngd", "num_steps": 6, "step_size": 0.5, "momentum": 0.3, "guidance": 4.0} | settings
    labels, time_scale = torch.arange(count), torch.linspace(0.04, 0.2, count)
    return generate(network, normal(count, 2, 3, 4, 4), labels, time_scale, NULL, show=False, **settings)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
@pytest.mark.parametrize("stop_below", [None, 0.3])
def test_samples_do_not_depend_on_the_batch_size(batch_size, stop_below):
    samples, evaluations, _ = run_generate(batch_size=batch_size, stop_below=stop_below)
    expected, spent, _ = run_generate(batch_size=5, stop_below=stop_below)
    assert samples.shape == (5, 2, 3, 4, 4)
    assert torch.equal(samples, expected)
    assert torch.equal(evaluations, spent)


def test_samples_are_in_the_order_of_their_noise():
    samples, _, _ = run_generate(batch_size=2, step_size=1e-6)
    torch.testing.assert_close(samples, normal(5, 2, 3, 4, 4), atol=1e-4, rtol=0)


def test_no_noise_gives_no_samples():
    samples, evaluations, _ = run_generate(count=0)
    assert samples.shape == (0, 2, 3, 4, 4)
    assert evaluations.shape == (0,)
    assert evaluations.dtype == torch.int64


def test_one_progress_bar_counts_the_points_of_all_batches(monkeypatch):
    monkeypatch.setattr(generation, "tqdm", Bar)
    Bar.made.clear()
    run_generate(batch_size=2)
    assert [(bar.total, bar.done) for bar in Bar.made] == [(18, 18)]  # 3 batches x 6 points


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_is_that_of_the_network_and_samples_stay_float32(precision, dtype):
    weight, seen = torch.eye(4), []

    def network(x, y, time_scale):
        f = x @ weight
        seen.append((x.dtype, f.dtype))
        return f

    samples, _, _ = run_generate(network, precision=precision)
    assert set(seen) == {(torch.float32, dtype)}
    assert samples.dtype == torch.float32


def test_sampling_builds_no_graph():
    weight = torch.ones(1, requires_grad=True)
    samples, _, _ = run_generate(lambda x, y, time_scale: weight * x)
    assert not samples.requires_grad


def test_a_sample_that_diverges_does_not_count_as_stopped():
    def field(x, keep):
        return torch.where(keep[:, None] == 0, torch.inf * x - torch.inf * x, -x)

    _, evaluations = sample(field, normal(2, 3), "gd", 50, 0.5, stop_below=0.01)
    assert evaluations[0] == 49
    assert evaluations[1] < 20


# The ODE in gamma ---------------------------------------------------------------------------------------------------


def straight_field(noise, data):
    """The field of a single data point and a known noise: the position of x on the line between them gives gamma."""
    path = data - noise

    def field(x, keep):
        gamma = ((x - noise) * path).sum(dim=1) / path.square().sum(dim=1)
        return transport.decay(gamma)[:, None] * path

    return field


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("num_steps", [2, 3, 10, 101])
@pytest.mark.parametrize("start_gamma", [0.0, 0.3, 0.9])
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
    assert run_generate(quadratic_field, energy=quadratic, count=0, **settings)[2].shape == (0, 20)
