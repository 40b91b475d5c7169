"""The Equilibrium Matching objective (arXiv 2510.02300, section 3).

Data x and noise eps are joined by x_gamma = gamma x + (1 - gamma) eps. A network that is not told
gamma learns the gradient field f(x_gamma) = (x - eps) c(gamma). It points from noise to data and
vanishes at the data, so data are its equilibria and sampling is gradient descent on it.
All functions broadcast gamma (B,) over x and noise (B, ...).
"""

import math

import torch

DECAY_START = 0.8  # a: the field's size is constant up to here, then falls linearly to zero
FIELD_SCALE = 4.0  # lambda
MEAN_SQUARED_DECAY = FIELD_SCALE**2 * (DECAY_START + (1 - DECAY_START) / 3)  # E[c^2], gamma uniform: 13.867


def decay(gamma):
    """c(gamma) = lambda min(1, (1 - gamma) / (1 - a)): the truncated decay, same shape as gamma."""
    return FIELD_SCALE * ((1 - gamma) / (1 - DECAY_START)).clamp(max=1)


def interpolate(x, noise, gamma):
    """x_gamma, from noise at gamma = 0 to data at gamma = 1."""
    gamma = _broadcast(gamma, x)
    return gamma * x + (1 - gamma) * noise


def target(x, noise, gamma):
    """What the network should say at x_gamma: (x - noise) c(gamma)."""
    return (x - noise) * decay(_broadcast(gamma, x))


def shift_gamma(u, shift):
    """Move uniform u towards the noise: u / (u + shift (1 - u)); shift = 1 leaves it uniform.

    The time-step shift of large-image models (Stable Diffusion 3, arXiv 2403.03206, section 5.3.2):
    the more values a sample has, the more noise is needed before its layout is open again.
    """
    return u / (u + shift * (1 - u))


def loss(f, x, noise, gamma):
    """Mean squared error of each sample, (B,) float32, of what a network says at x_gamma: f."""
    return (f.float() - target(x, noise, gamma)).square().flatten(1).mean(dim=1)


def zero_loss(mean_square):
    """The expected loss of a network that says zero, for uniform gamma: E[c^2] (1 + E[x^2]).

    As a yardstick it is right for validation; training losses under another gamma-shift compare with each other only.
    """
    return MEAN_SQUARED_DECAY * (1 + mean_square)


def dispersive_loss(features):
    """0.5 log mean exp(-||z_i - z_j||^2 / dim) over all pairs of a batch, i = j included: a float32 scalar.

    features (B, ...) are activations, flattened to dim values each. It is 0 where all samples look alike and falls as
    they spread, to -0.5 log B ("Diffuse and Disperse", arXiv 2506.09027, with the l2 distance).
    """
    z = features.float().flatten(1)
    B, dim = z.shape
    z = z - z.mean(dim=0).detach()  # distances stay, but no digits are lost in the difference of large squares
    squares = z.square().sum(dim=1)
    distances = (squares[:, None] + squares - 2 * z @ z.T).clamp(min=0) / dim  # (B, B)
    distances = distances.masked_fill(torch.eye(B, dtype=torch.bool, device=z.device), 0)
    return 0.5 * (distances.neg().flatten().logsumexp(dim=0) - 2 * math.log(B))


def _broadcast(gamma, x):
    return gamma.reshape(-1, *[1] * (x.dim() - 1))
