"""Samplers: gradient descent on the field (arXiv 2510.02300, section 3.3), or a flow's ODE.

They take the network as a callable, so tests can use fields with known solutions.
"""

import torch

from transport import shift_gamma

DESCENTS = ("gd", "ngd")
SOLVERS = ("euler", "heun")


def sample(
    field,
    x,
    method="gd",
    num_steps=250,
    step_size=0.0017,
    momentum=0.3,
    stop_below=None,
    start_gamma=0.0,
    observe=lambda x, keep: None,
    given=None,
    mask=None,
    objective=None,
    shift=1.0,
):
    """Follow a field from x (B, ...).

    Returns the final x and the evaluations of the field per sample, (B,) int64.

    Args:
        field: field(x, keep) returns the field of the samples that still run, (b, ...); keep (b,)
            int64 holds their indices in the batch. If the objective is told gamma, field(x, keep,
            gamma); gamma broadcasts over x.
        method: "gd" or "ngd" (see `descend`) use step_size, momentum ("ngd" only) and stop_below;
            "euler" or "heun" (see `integrate`) need objective, the
            transport.Objective of the field, and use start_gamma and shift.
        num_steps: number of points including the start, so one more than steps.
        observe: observe(x, keep) is called with the running samples at each point, from the first
            to the last.
        given, mask: where mask (bool, broadcasts over x; B samples) is true, x keeps the values of
            `given` (B, ...), bit for bit, and gamma is 1. The field moves only the unmasked part.
    """
    moving = torch.ones(len(x), device=x.device)  # the unmasked share of each sample
    if mask is not None:
        x = torch.where(mask, given, x)
        full_field = field
        moving = 1 - mask.flatten(1).float().mean(dim=1)

        def field(x, keep, *gamma):
            levels = [level.masked_fill(mask[keep], 1) for level in gamma]
            return full_field(x, keep, *levels).masked_fill(mask[keep], 0)

    if method in SOLVERS:
        return integrate(
            field,
            x,
            objective,
            method=method,
            num_steps=num_steps,
            start_gamma=start_gamma,
            observe=observe,
            shift=shift,
        )
    return descend(
        field,
        x,
        num_steps=num_steps,
        step_size=step_size,
        momentum=momentum if method == "ngd" else 0,
        stop_below=stop_below,
        observe=observe,
        moving=moving,
    )


def descend(field, x, num_steps, step_size, momentum, stop_below, observe, moving):
    """Descend by x <- x + eta f(x + eta mu m), where m is the previous f: Nesterov's method, plain
    if momentum mu = 0.

    With stop_below, a sample stops before its next step once the root mean square of its f is below
    stop_below. The mean is over the unmasked part, a share `moving` (B,) of the sample. A sample
    that is masked completely rests from the start. Returns as `sample` does.
    """
    x = x.clone()
    last_f = torch.zeros_like(x)
    keep = torch.arange(len(x), device=x.device)
    evaluations = torch.zeros_like(keep)
    if stop_below is not None:
        keep = keep[moving > 0]
    observe(x[keep], keep)
    for _ in range(num_steps - 1):
        f = field(x[keep] + step_size * momentum * last_f[keep], keep)
        evaluations[keep] += 1
        if stop_below is not None:
            mean_square = f.square().flatten(1).mean(dim=1) / moving[keep]
            runs = ~(mean_square.sqrt() < stop_below)  # NaN is not an equilibrium
            keep = keep[runs]
            f = f[runs]
            if len(keep) == 0:
                break
        x[keep] += step_size * f
        last_f[keep] = f
        observe(x[keep], keep)
    return x, evaluations


def integrate(field, x, objective, method, num_steps, start_gamma, observe, shift):
    """Solve dx/dgamma = f(x) / c(gamma) from start_gamma to 1, by Euler's or Heun's method.

    The steps are equal in u, where gamma = `shift_gamma` of u, as in training. This
    assumes that x at time gamma is as noisy as x_gamma in training. Nothing enforces that if the
    network does not see gamma: gradient descent removes an error in x like noise; here the error
    leads to a wrong c. At gamma = 1 the velocity is 0 / 0 with a decay, so the last step of Heun's
    method is an Euler step. Returns as `sample` does.
    """
    start = start_gamma * shift / (1 + start_gamma * (shift - 1))  # u of start_gamma
    gammas = torch.linspace(start, 1, num_steps, dtype=torch.float64)
    if shift != 1:
        gammas = shift_gamma(gammas, shift)
    keep = torch.arange(len(x), device=x.device)
    evaluations = torch.zeros_like(keep)

    def velocity(x, gamma):
        evaluations.add_(1)
        told = []
        if objective.is_told:
            told = [gamma.to(x).expand(len(x), *[1] * (x.dim() - 1))]
        return objective.velocity(field(x, keep, *told), gamma)

    observe(x, keep)
    for gamma, next_gamma in zip(gammas[:-1], gammas[1:], strict=True):
        step = (next_gamma - gamma).item()
        v = velocity(x, gamma)
        if method == "heun" and next_gamma < 1:
            v = (v + velocity(x + step * v, next_gamma)) / 2
        x = x + step * v
        observe(x, keep)
    return x, evaluations


def guided(function, condition, time_scale, guidance, weak=None):
    """Return a field with classifier-free guidance, f_null + guidance (f_condition - f_null).

    All channels are guided. function(x, y, time_scale) is a network, (B, C, T, H, W), or an energy,
    (B,), whose result is the guided energy. condition: a models.Condition of B samples; time_scale:
    (B,) seconds per frame. Both terms are evaluated in one batch; guidance 1 evaluates only
    f_condition. The result is float32. The gamma of the field, if any, is passed on.

    weak: a function that makes the same errors as `function`, but larger ones. Its f_condition
    replaces f_null, so guidance reduces these errors (autoguidance, arXiv 2406.02507).
    """
    null = condition.null()

    def field(x, keep, gamma=None):
        y = condition.y[keep]
        scale = time_scale[keep]
        told = {} if gamma is None else {"gamma": gamma.reshape(len(x), -1)}  # (b, 1) or (b, T)
        if guidance == 1:
            return function(x, y, scale, **told).float()
        if weak:
            f_weak = weak(x, y, scale, **told).float()
            f = function(x, y, scale, **told).float()
            return f_weak + guidance * (f - f_weak)
        both = torch.cat([null.y[keep], y])
        told = {name: value.repeat(2, 1) for name, value in told.items()}
        f_both = function(x.repeat(2, 1, 1, 1, 1), both, scale.repeat(2), **told).float()
        f_null, f_condition = f_both.chunk(2)
        return f_null + guidance * (f_condition - f_null)

    return field
