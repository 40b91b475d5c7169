"""Sampling: gradient descent along the learned field (arXiv 2510.02300, section 3.3), or an ODE for comparison.

All functions take the network as a callable, so they can be tested on fields with known solutions.
"""

import torch

import transport

DESCENTS = ("gd", "ngd")
SOLVERS = ("euler", "heun")


def sample(
    field, x, method="gd", num_steps=250, step_size=0.0017, momentum=0.3, stop_below=None,
    start_gamma=0.0, observe=lambda x, keep: None, given=None, mask=None,
):  # fmt: skip
    """Follow a field from x (B, ...).

    Args:
        field: field(x, keep) is the field of the samples that are still running, (b, ...); keep (b,) int64 are their
            indices in the batch.
        method: "gd" or "ngd" (see `descend`), which use step_size, momentum ("ngd" only) and stop_below; "euler" or
            "heun" (see `integrate`), which use start_gamma.
        num_steps: the number of points, the start included: one more than steps.
        observe: observe(x, keep) is called at each point of the running samples, first and last included.
        given, mask: where mask (bool, broadcasts over x; B samples) is true, x has the values of `given` (B, ...) from
            start to end, bit for bit: the field moves only the unmasked part.

    Returns:
        the final x (B, ...) and the number of evaluations of the field for each sample, (B,) int64.
    """
    moving = torch.ones(len(x), device=x.device)  # the share of each sample that can move
    if mask is not None:
        x, field = torch.where(mask, given, x), unmasked(field, mask)
        moving = 1 - mask.flatten(1).float().mean(dim=1)
    if method in SOLVERS:
        return integrate(field, x, method, num_steps, start_gamma, observe)
    return descend(field, x, num_steps, step_size, momentum * (method == "ngd"), stop_below, observe, moving)


def unmasked(field, mask):
    """A field that is zero where mask is true, so what is there never moves."""
    return lambda x, keep: field(x, keep).masked_fill(mask[keep], 0)


def descend(field, x, num_steps, step_size, momentum, stop_below, observe, moving):
    """Nesterov's gradient descent, x <- x + eta f(x + eta mu m) with the previous f as m; plain if momentum mu = 0.

    With stop_below, a sample stops before its next step once the root mean square of its f over the unmasked part of x,
    the share `moving` (B,), is below it.
    """
    x, last_f = x.clone(), torch.zeros_like(x)
    keep = torch.arange(len(x), device=x.device)
    evaluations = torch.zeros_like(keep)
    observe(x, keep)
    for _ in range(num_steps - 1):
        f = field(x[keep] + step_size * momentum * last_f[keep], keep)
        evaluations[keep] += 1
        if stop_below is not None:
            mean_square = f.square().flatten(1).mean(dim=1) / moving[keep]
            runs = ~(mean_square.sqrt() < stop_below)  # NaN is not an equilibrium
            keep, f = keep[runs], f[runs]
            if len(keep) == 0:
                break
        x[keep] += step_size * f
        last_f[keep] = f
        observe(x[keep], keep)
    return x, evaluations


def integrate(field, x, method, num_steps, start_gamma, observe):
    """Solve dx/dgamma = f(x) / c(gamma) from start_gamma to 1 in equal steps, by Euler's or Heun's method.

    This assumes that x at time gamma is as noisy as x_gamma in training. Nothing enforces that, as the
    network is not given gamma: gradient descent treats an error in x as noise left to remove, but here f is divided by
    the wrong c. At gamma = 1 the velocity is 0 / 0, so the last step of Heun's method is an Euler step.
    """
    gammas = torch.linspace(start_gamma, 1, num_steps, dtype=torch.float64)
    keep = torch.arange(len(x), device=x.device)
    evaluations = torch.zeros_like(keep)

    def velocity(x, gamma):
        evaluations.add_(1)
        return transport.velocity(field(x, keep), gamma)

    observe(x, keep)
    for gamma, next_gamma in zip(gammas[:-1], gammas[1:], strict=True):
        step = (next_gamma - gamma).item()
        v = velocity(x, gamma)
        if method == "heun" and next_gamma < 1:
            v = (v + velocity(x + step * v, next_gamma)) / 2
        x = x + step * v
        observe(x, keep)
    return x, evaluations


def guided(function, condition, time_scale, guidance):
    """The field with classifier-free guidance, f_null + guidance (f_condition - f_null), on all channels.

    function(x, y, time_scale) is a network, (B, C, T, H, W), or an energy, (B,), which gives the guided energy.
    condition: a models.Condition of B samples; time_scale: (B,) seconds per frame. Both terms are evaluated as one
    batch; guidance 1 evaluates f_condition only. The result is float32.
    """
    null = condition.null()

    def field(x, keep):
        y, scale = condition.y[keep], time_scale[keep]
        if guidance == 1:
            return function(x, y, scale).float()
        both = torch.cat([null.y[keep], y])
        f_null, f_condition = function(x.repeat(2, 1, 1, 1, 1), both, scale.repeat(2)).float().chunk(2)
        return f_null + guidance * (f_condition - f_null)

    return field
