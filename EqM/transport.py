"""The Equilibrium Matching objective (arXiv 2510.02300, section 3).

Between noise eps and data x lies x_gamma = gamma x + (1 - gamma) eps. A network without gamma as an input learns the
field f(x_gamma) = (x - eps) c(gamma). It points from noise to data and vanishes at the data, so data are its equilibria
and sampling is gradient descent along it. x, noise and f are clips (B, C, T, H, W); gamma is (B,), one level per clip,
or (B, T), one per frame.

With --forcing the level varies within some training clips, so that the same network learns to complete a clip from any
given frames: they are clean (gamma = 1), the others are not. This follows Diffusion Forcing (arXiv
2407.01392), without the level as an input: an EqM network sees from the frames themselves how noisy they are.
"""

import math

import torch

from runtime.rng import generator, uniform

DECAY_START = 0.8  # a: c is constant up to here, then falls linearly to zero at gamma = 1
FIELD_SCALE = 4.0  # lambda
OWN_LEVELS = 0.5  # share of the forced clips whose temporal patches have a level each; the others have clean frames
MEAN_SQUARED_DECAY = FIELD_SCALE**2 * (DECAY_START + (1 - DECAY_START) / 3)  # E[c^2], gamma uniform: 13.867


def decay(gamma):
    """The truncated decay c(gamma) = lambda min(1, (1 - gamma) / (1 - a)), in the shape of gamma."""
    return FIELD_SCALE * ((1 - gamma) / (1 - DECAY_START)).clamp(max=1)


def interpolate(x, noise, gamma):
    """x_gamma, from noise at gamma = 0 to data at gamma = 1."""
    gamma = _broadcast(gamma)
    return gamma * x + (1 - gamma) * noise


def target(x, noise, gamma):
    """The regression target at x_gamma: (x - noise) c(gamma)."""
    return (x - noise) * decay(_broadcast(gamma))


def velocity(f, gamma):
    """dx/dgamma along the path of `interpolate`, from the field at noise level gamma, a float: f / c(gamma)."""
    return f / decay(gamma).item()


def losses(network, x, noise, gamma, y, time_scale, first=0, return_features=False):
    """Compare a network with the target at x_gamma.

    Returns the squared error of each clip, averaged over its frames from `first` on, (B,) float32; the mean square of
    the target over all frames, for first = 0 the loss of a network that predicts zero; and the features (B, N, D), or
    None.
    """
    output = network(interpolate(x, noise, gamma), y, time_scale, return_features=return_features)
    f, features = output if return_features else (output, None)
    goal = target(x, noise, gamma)
    errors = (f.float() - goal).square()[:, :, first:].flatten(1).mean(dim=1)
    return errors, goal.square().mean(), features


def zero_loss(mean_square):
    """The expected loss of a network that predicts zero, for uniform gamma: E[c^2] (1 + E[x^2])."""
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


def _broadcast(gamma):
    """gamma (B,) or (B, T) in a shape that broadcasts over clips: (B, 1, 1 or T, 1, 1)."""
    return gamma.reshape(len(gamma), 1, -1, 1, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Noise levels of training clips


def shift_gamma(u, shift):
    """Gamma from uniform u, for shift > 1 closer to the noise: u / (u + shift (1 - u)); shift = 1 keeps it uniform.

    The timestep shift of Stable Diffusion 3 (arXiv 2403.03206, section 5.3.2): the more values a sample has, the more
    noise it takes to hide its layout.
    """
    return u / (u + shift * (1 - u))


def draw_gammas(seed, stream, indices, num_frames, patch, shift=1.0, share=0.0):
    """The gammas of the samples `indices` of a stream, float32 on the CPU: (B,), or (B, T) if a `share` is forced.

    patch is the number of frames of a temporal patch, shift that of `shift_gamma`. The draws of a sample depend on
    (seed, stream, index) alone; clips that are not forced have the gamma that they have without forcing. A clip of one
    temporal patch is never forced: its frames share all tokens, so given ones would show most of the others.
    """
    gamma = shift_gamma(uniform(seed, "gamma", stream, indices), shift)  # (B,)
    if share == 0 or num_frames <= patch:
        return gamma
    rows = []
    for level, index in zip(gamma.tolist(), indices, strict=True):
        chance, kind, *draws = torch.rand(4 + num_frames, generator=generator(seed, "forcing", stream, index)).tolist()
        if chance >= share:
            rows.append([level] * num_frames)
        elif kind < OWN_LEVELS:
            rows.append([shift_gamma(draws[frame // patch], shift) for frame in range(num_frames)])
        else:
            clean = clean_frames(*draws[:3], num_frames)
            rows.append([1.0 if frame in clean else level for frame in range(num_frames)])
    return torch.tensor(rows)


def clean_frames(u_kind, u_first, u_last, num_frames):
    """The set of frames that are given, from three uniform draws in [0, 1); never all, never none.

    A half of the draws gives the first frames (few more often than many, as a picture is one), a quarter the first and
    the last, an eighth the last, an eighth a single one. A border may be at any frame, also inside a temporal patch.
    """
    if u_kind < 1 / 2:
        return set(range(1 + int(u_first**2 * (num_frames - 1))))
    if u_kind < 3 / 4 and num_frames > 2:
        before = 1 + int(u_first * (num_frames - 2))
        after = 1 + int(u_last * (num_frames - 1 - before))
        return {*range(before), *range(num_frames - after, num_frames)}
    if u_kind < 7 / 8:
        return set(range(1 + int(u_last * (num_frames - 1)), num_frames))
    return {int(u_first * num_frames)}


def condition_dropout(gamma, usual):
    """The probability (B,) of dropping the condition of clips with these gammas, (B,) or (B, T).

    max(`usual`, sqrt(c / T)) for a clip with c of T frames clean: the more frames are clean, the more they show of
    what the condition says. One frame of 16 does not show where the clip goes, so three of four such clips keep theirs.
    """
    if gamma.dim() == 1:
        return torch.full_like(gamma, usual)
    return (gamma == 1).float().mean(dim=1).sqrt().clamp(min=usual)


def half_given(gamma, num_frames):
    """gamma (B,) as (B, T) with the first half of the frames clean."""
    is_first = torch.arange(num_frames, device=gamma.device) < num_frames // 2
    return torch.where(is_first, 1.0, gamma[:, None])
