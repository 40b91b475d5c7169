"""Sampling is gradient descent on the learned field (arXiv 2510.02300, section 3.3).

Everything here takes the network as a callable, so it is tested on fields whose answer is known.
"""

import torch

from transport import decay

DESCENTS = ("gd", "ngd")
SOLVERS = ("euler", "heun")


def sample(
    field, x, method="gd", num_steps=250, step_size=0.0017, momentum=0.3, stop_below=None,
    start_gamma=0.0, observe=None,
):  # fmt: skip
    """Follow a field from x (B, ...); returns the end points and the evaluations spent on each.

    field(x, keep) is the field of the samples that are still running; keep (b,) int64 are their
    indices in the batch. num_steps counts the points. method: "gd" or "ngd" (see `descend`),
    "euler" or "heun" (`integrate`), of which only the first two use step_size, momentum and
    stop_below, and only the last two start_gamma. observe(x, keep), if given, is called at each
    point that the running samples have reached, the first and the last included.

    Returns x (B, ...) and evaluations (B,) int64.
    """
    observe = observe or (lambda x, keep: None)
    if method in SOLVERS:
        assert stop_below is None, f"{method} has a fixed number of steps"
        return integrate(field, x, method, num_steps, start_gamma, observe)
    assert method in DESCENTS, method
    return descend(field, x, num_steps, step_size, momentum if method == "ngd" else 0.0, stop_below, observe)


def descend(field, x, num_steps, step_size, momentum, stop_below, observe):
    """Gradient descent, x <- x + eta f(x + eta mu m), where m is the last f: Nesterov's; plain without momentum mu.

    With stop_below, a sample whose f has a root mean square below it stays where it is and leaves the batch.
    """
    x, last_f = x.clone(), torch.zeros_like(x)
    keep = torch.arange(len(x), device=x.device)
    evaluations = torch.zeros_like(keep)
    observe(x, keep)
    for _ in range(num_steps - 1):
        f = field(x[keep] + step_size * momentum * last_f[keep], keep)
        evaluations[keep] += 1
        if stop_below is not None:
            moving = ~(f.square().flatten(1).mean(dim=1).sqrt() < stop_below)  # NaN is no equilibrium
            keep, f = keep[moving], f[moving]
            if len(keep) == 0:
                break
        x[keep] += step_size * f
        last_f[keep] = f
        observe(x[keep], keep)
    return x, evaluations


def integrate(field, x, method, num_steps, start_gamma, observe):
    """Solve dx/dgamma = f(x) / c(gamma) from start_gamma to 1 in equal steps, by Euler's or Heun's method.

    It assumes that x at time gamma is as noisy as training's x_gamma was. Nothing keeps it so: the
    network is not told gamma, and an error in x is not seen as noise that is left, as in descent, but
    divided by the wrong c. At gamma = 1 the velocity is 0 / 0, so Heun's last step is one of Euler.
    """
    gammas = torch.linspace(start_gamma, 1, num_steps, dtype=torch.float64)
    keep = torch.arange(len(x), device=x.device)
    evaluations = torch.zeros_like(keep)

    def velocity(x, gamma):
        evaluations.add_(1)
        return field(x, keep) / decay(gamma).item()

    observe(x, keep)
    for gamma, following in zip(gammas[:-1], gammas[1:], strict=True):
        step = (following - gamma).item()
        v = velocity(x, gamma)
        if method == "heun" and following < 1:
            v = (v + velocity(x + step * v, following)) / 2
        x = x + step * v
        observe(x, keep)
    return x, evaluations


def guided(function, labels, time_scale, guidance, null_label):
    """A field with classifier-free guidance, f_null + s (f_class - f_null), on all channels.

    function(x, y, time_scale) is a network, (B, C, T, H, W), or an energy, (B,): the gradient of the guided
    energy is the guided field. labels (B,) int64, time_scale (B,) seconds per frame. Both halves are
    evaluated as one batch; guidance 1 needs, and evaluates, the class half only.
    """

    def field(x, keep):
        y, scale = labels[keep], time_scale[keep]
        if guidance == 1:
            return function(x, y, scale).float()
        null = torch.full_like(y, null_label)
        f_null, f_class = function(x.repeat(2, 1, 1, 1, 1), torch.cat([null, y]), scale.repeat(2)).float().chunk(2)
        return f_null + guidance * (f_class - f_null)

    return field
