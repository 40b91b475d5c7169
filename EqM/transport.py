"""The Equilibrium Matching objective (arXiv 2510.02300, section 3).

Between noise eps and data x lies x_gamma = gamma x + (1 - gamma) eps. A network without gamma as an input learns the
field f(x_gamma) = (x - eps) c(gamma). It points from noise to data and vanishes at the data, so data are its equilibria
and sampling is gradient descent along it. gamma is (B,), one level per sample of x and noise (B, ...), or (B, T), one
per frame of clips (B, C, T, H, W).
"""

import math

import torch

DECAY_START = 0.8  # a: c is constant up to here, then falls linearly to zero at gamma = 1
FIELD_SCALE = 4.0  # lambda
MEAN_SQUARED_DECAY = FIELD_SCALE**2 * (DECAY_START + (1 - DECAY_START) / 3)  # E[c^2], gamma uniform: 13.867


def decay(gamma):
    """The truncated decay c(gamma) = lambda min(1, (1 - gamma) / (1 - a)), in the shape of gamma."""
    return FIELD_SCALE * ((1 - gamma) / (1 - DECAY_START)).clamp(max=1)


def interpolate(x, noise, gamma):
    """x_gamma, from noise at gamma = 0 to data at gamma = 1."""
    gamma = _broadcast(gamma, x)
    return gamma * x + (1 - gamma) * noise


def target(x, noise, gamma):
    """The regression target at x_gamma: (x - noise) c(gamma)."""
    return (x - noise) * decay(_broadcast(gamma, x))


def shift_gamma(u, shift):
    """Gamma from uniform u, for shift > 1 closer to the noise: u / (u + shift (1 - u)); shift = 1 keeps it uniform.

    The timestep shift of Stable Diffusion 3 (arXiv 2403.03206, section 5.3.2): the more values a sample has, the more
    noise it takes to hide its layout.
    """
    return u / (u + shift * (1 - u))


def loss(f, x, noise, gamma):
    """Mean squared error of a network's output f at x_gamma, for each sample: (B,) float32."""
    return squared_error(f, x, noise, gamma).flatten(1).mean(dim=1)


def squared_error(f, x, noise, gamma):
    """The squared error of each value of a network's output f at x_gamma, (B, ...) float32."""
    return (f.float() - target(x, noise, gamma)).square()


def zero_loss(mean_square):
    """The expected loss of a network that predicts zero, for uniform gamma: E[c^2] (1 + E[x^2]).

    For validation, whose gammas are uniform; a training step knows the mean square of its own targets.
    """
    return MEAN_SQUARED_DECAY * (1 + mean_square)


def dispersive_loss(features):
    """0.5 log mean exp(-||z_i - z_j||^2 / dim) over all pairs of a batch, i = j included: a float32 scalar.

    features: (B, ...) activations, flattened to dim values each. The loss is 0 if all samples are equal and falls to
    -0.5 log B as they disperse ("Diffuse and Disperse", arXiv 2506.09027, with the l2 distance).
    """
    z = features.float().flatten(1)
    B, dim = z.shape
    z = z - z.mean(dim=0).detach()  # same distances, but no cancellation of large squares
    squares = z.square().sum(dim=1)
    distances = (squares[:, None] + squares - 2 * z @ z.T).clamp(min=0) / dim  # (B, B)
    distances = distances.masked_fill(torch.eye(B, dtype=torch.bool, device=z.device), 0)
    return 0.5 * (distances.neg().flatten().logsumexp(dim=0) - 2 * math.log(B))


def _broadcast(gamma, x):
    """gamma in a shape that broadcasts over x: (B, 1, ...), of (B, T) gammas (B, 1, T, 1, 1)."""
    if gamma.dim() == 2:
        return gamma[:, None, :, None, None]
    return gamma.reshape(-1, *[1] * (x.dim() - 1))
