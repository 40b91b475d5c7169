"""The Equilibrium Matching objective (arXiv 2510.02300, section 3).

A sample x_gamma = gamma x + (1 - gamma) eps interpolates between noise eps and data x. A network
that does not see gamma learns the field f(x_gamma) = (x - eps) c(gamma). The field points from
noise to data and vanishes at the data. So data are its equilibria, and sampling is gradient descent
along it. x, noise and f are clips (B, C, T, H, W). gamma is (B,), one level per clip, (B, T), one
per frame, or (B, T, H, W).

With --forcing, some training clips have several levels: given frames are clean (gamma = 1), the
others are not. The network thus learns to complete clips, as in Diffusion Forcing (arXiv
2407.01392). It has no level as an input, because it sees from the frames how noisy they are. With
--forcing-regions, some clips are clean outside of a rectangle.

Five other objectives serve as controls. "flow" is flow matching (arXiv 2210.02747): the target is x
- eps without c, and the network is told gamma. "blind" has the same target, but the network is not
told (arXiv 2502.13129). "told-w" and "blind-w" are these two with EqM's weight: their loss has the
factor c(gamma)^2 / E[c^2]. "told-c" has EqM's target, but is told gamma. "told-4" is flow with a
target as large as EqM's. All but eqm lack equilibria that a descent could find, so a solver must
follow them from gamma = 0 to 1. An objective is an `Objective`; all of them are in `OBJECTIVES`.

| | target x - eps | the same, weighted | target (x - eps) c |
|---|---|---|---|
| told gamma | flow | told-w | told-c |
| not told | blind | blind-w | eqm |
"""

import math
from dataclasses import dataclass

import torch

from runtime.cli import POSITIVE, SHARE, UserError, flag_text
from runtime.rng import generator, noise_of_sample, normal, uniform

DECAY_START = 0.8  # a: the decay c is constant up to here, then falls linearly to zero at gamma = 1
FIELD_SCALE = 4.0  # lambda
DRAWS = ("uniform", "logit-normal")  # of gamma in training
# share of the forced clips with one level per temporal patch; the other clips have given frames
OWN_LEVELS = 0.5
# the gammas of --own-context, so that each frame shows what the network makes of it
OWN_LEAST = 0.3
OWN_MOST = 0.9
# E[c^2], gamma uniform: 13.867
MEAN_SQUARED_DECAY = FIELD_SCALE**2 * (DECAY_START + (1 - DECAY_START) / 3)


def decay(gamma):
    """Return the decay c(gamma) = lambda min(1, (1 - gamma) / (1 - a)), shaped as gamma."""
    return FIELD_SCALE * ((1 - gamma) / (1 - DECAY_START)).clamp(max=1)


def interpolate(x, noise, gamma):
    """Return x_gamma, which is noise at gamma = 0 and data at gamma = 1."""
    gamma = _broadcast(gamma)
    return gamma * x + (1 - gamma) * noise


@dataclass(frozen=True)
class Objective:
    """What a network learns: the target of its field, and whether it is told gamma."""

    name: str  # the value of --objective
    title: str  # with its source, for people
    has_decay: bool = False  # the target has the factor c(gamma), so it vanishes at the data
    is_told: bool = False  # gamma is an input of the network, one level per temporal patch
    is_weighted: bool = False  # the loss has the factor c(gamma)^2 / E[c^2]
    scale: float = 1.0  # of a target without decay

    @property
    def has_equilibria(self):
        """Whether gradient descent on the field ends at data."""
        return self.has_decay and not self.is_told

    def factor(self, gamma):
        """Return the factor of x - noise in the target, shaped as gamma: c(gamma) or `scale`."""
        return decay(gamma) if self.has_decay else torch.full_like(gamma, self.scale)

    def target(self, x, noise, gamma):
        """Return the regression target at x_gamma: x - noise times `factor`."""
        return (x - noise) * self.factor(_broadcast(gamma))

    def weight(self, gamma):
        """Return the weight of the squared errors, shaped as gamma.

        A target without decay is noise that clean frames (gamma = 1) do not show, so it is 0 there.
        """
        if self.is_weighted:
            return decay(gamma).square() / MEAN_SQUARED_DECAY
        return torch.ones_like(gamma) if self.has_decay else (gamma < 1).float()

    def velocity(self, f, gamma):
        """Return dx/dgamma on the path of `interpolate`, f / `factor`. gamma: a single number."""
        return f / self.factor(gamma).item()

    def data_estimate(self, x_gamma, f, gamma):
        """Return x where f at x_gamma points to: x_gamma + (1 - gamma) f / `factor`, if gamma (B,)
        is below 1.
        """
        return x_gamma + f * _broadcast((1 - gamma) / self.factor(gamma))

    def solver_shift(self, gamma_shift):
        """Return the shift of a solver's steps (see `shift_gamma`): that of training, or none if
        there are equilibria.
        """
        return 1.0 if self.has_equilibria else gamma_shift

    def losses(
        self, network, x, noise, gamma, y, time_scale, first=0, return_features=False, clean=None
    ):
        """Compare a network with the target at x_gamma.

        Returns (errors, mean square of the target, features). errors: (B,) float32, the mean
        squared error of each clip over its frames from `first` on. The mean square covers all
        frames, so for first = 0 it is the loss of a network that predicts zero. features: (B, N, D)
        or None. clean: what a causal network sees of earlier frames, like x.
        """
        inputs = {"gamma": gamma} if self.is_told else {}
        if clean is not None:
            inputs["clean"] = clean
        x_gamma = interpolate(x, noise, gamma)
        output = network(x_gamma, y, time_scale, return_features=return_features, **inputs)
        f, features = output if return_features else (output, None)
        target = self.target(x, noise, gamma)
        weight = self.weight(_broadcast(gamma))
        squares = (f.float() - target).square() * weight
        zero_squares = target.square() * weight
        return squares[:, :, first:].flatten(1).mean(dim=1), zero_squares.mean(), features

    def data_errors(self, errors, gamma):
        """Return the mean squared errors (B,) of x, as a network predicts it at x_gamma, from its
        `errors` of the target, if gamma (B,) is at most DECAY_START.
        """
        if self.is_weighted:
            errors = errors * MEAN_SQUARED_DECAY / FIELD_SCALE**2
        return errors * ((1 - gamma) / self.factor(gamma)).square()

    def zero_loss(self, mean_square):
        """Return the expected loss of a zero prediction for uniform gamma: E[c^2] (1 + E[x^2]).

        The weight of the loss has mean 1, so it changes nothing.
        """
        factor = MEAN_SQUARED_DECAY if self.has_decay else self.scale**2
        return factor * (1 + mean_square)


OBJECTIVES = {
    objective.name: objective
    for objective in (
        Objective("eqm", "Equilibrium Matching (arXiv 2510.02300)", has_decay=True),
        Objective("flow", "flow matching", is_told=True),
        Objective("blind", "blind flow matching"),
        Objective("told-w", "flow matching with the weight of EqM", is_told=True, is_weighted=True),
        Objective("told-c", "EqM that is told the noise level", has_decay=True, is_told=True),
        Objective(
            "told-4",
            "flow matching with a target four times as large",
            is_told=True,
            scale=FIELD_SCALE,
        ),
        Objective("blind-w", "blind flow matching with the weight of EqM", is_weighted=True),
    )
}


def dispersive_loss(features):
    """Return 0.5 log mean exp(-||z_i - z_j||^2 / dim) over all pairs of a batch, also i = j.

    The result is a float32 scalar. features: (B, ...) activations, flattened to dim values each.
    The loss is 0 if all samples are equal and falls to -0.5 log B as they disperse (the l2 loss of
    "Diffuse and Disperse", arXiv 2506.09027).
    """
    z = features.float().flatten(1)
    B, dim = z.shape
    z = z - z.mean(dim=0).detach()  # keeps the distances, but avoids differences of large squares
    squares = z.square().sum(dim=1)
    distances = (squares[:, None] + squares - 2 * z @ z.T).clamp(min=0) / dim  # (B, B)
    distances = distances.masked_fill(torch.eye(B, dtype=torch.bool, device=z.device), 0)
    return 0.5 * (distances.neg().flatten().logsumexp(dim=0) - 2 * math.log(B))


def _broadcast(gamma):
    """Reshape gamma (B,), (B, T) or (B, T, H, W) to broadcast over clips.

    The result is (B, 1, 1 or T, 1 or H, 1 or W).
    """
    return gamma.reshape(len(gamma), 1, -1, *(gamma.shape[2:] or (1, 1)))


# Noise of training clips, and its levels ----------------------------------------------------------


def draw_noise(seed, stream, indices, shape, device, pairs):
    """Draw the noise of training clips, (B, *shape): independent of the clip, except where `pairs`
    has the arguments of `noise_of_sample` for a clip that was sampled, not None.

    Independent noise depends only on (seed, stream, index).
    """
    noise = normal(seed, "noise", stream, indices, shape, device)
    for row, pair in zip(noise, pairs, strict=True):
        if pair is not None:
            row.copy_(noise_of_sample(*pair, shape))
    return noise


def shift_gamma(u, shift):
    """Return gamma = u / (u + shift (1 - u)) for uniform u.

    shift = 1 keeps it uniform, shift > 1 favors noise. This is the timestep shift of Stable
    Diffusion 3 (arXiv 2403.03206, section 5.3.2): the more values a sample has, the more noise it
    takes to hide its layout.
    """
    return u / (u + shift * (1 - u))


def gammas_of(u, shift, draw):
    """Return the gammas of uniform draws u: themselves or, for the draw "logit-normal", the sigmoid
    of a standard normal (arXiv 2403.03206, section 3.1), shifted by `shift_gamma`.
    """
    if draw == "logit-normal":
        u = torch.special.ndtri(u).sigmoid()
    return shift_gamma(u, shift)


def draw_gammas(
    seed,
    stream,
    indices,
    num_frames,
    patch,
    shift=1.0,
    share=0.0,
    level_frames=1,
    region_share=0.0,
    size=1,
    draw="uniform",
    causal=False,
    is_sample=None,
    pure_noise=0.0,
):
    """Draw the gammas of training samples, float32 on the CPU: (B,), or (B, T) if a `share` of the
    clips is forced.

    With a `region_share` they are (B, T, size, size): that share of all clips is clean except for a
    rectangle, the same in each frame (see `noisy_region`). For a causal model they are (B, T), with
    a level for each temporal patch.

    The draws of a sample depend only on (seed, stream, index), where stream is the first step of
    the phase. A clip that is not forced keeps its gamma, whatever the share. A clip of one temporal
    patch (`patch` frames) is never forced and has no region: its frames share all tokens, so given
    ones would show most of the others. Given frames come in groups of `level_frames`, 1 or `patch`.
    shift, draw (a name in DRAWS): see `gammas_of`.

    is_sample (B,): which clips are samples of a teacher. These are never forced, and a share
    `pure_noise` of them has gamma 0.
    """
    gamma = gammas_of(uniform(seed, "gamma", stream, indices), shift, draw)  # (B,)
    if is_sample is None:
        is_sample = torch.zeros(len(indices), dtype=torch.bool)
    is_pure = is_sample & (uniform(seed, "pure noise", stream, indices) < pure_noise)
    gamma = gamma.masked_fill(is_pure, 0.0)
    if share == region_share == causal == 0 or num_frames <= patch:
        return gamma
    levels = gamma[:, None].repeat(1, num_frames)
    can_force = (~is_sample).tolist()
    for of_clip, index, forces in zip(levels, indices, can_force, strict=True):
        # more draws than are used: a change would give the clips of each seed other levels
        chance, kind, *draws = torch.rand(
            4 + num_frames, generator=generator(seed, "forcing", stream, index)
        ).tolist()
        is_forced = forces and chance < share
        if causal or (is_forced and kind < OWN_LEVELS):
            of_patch = gammas_of(torch.tensor(draws, dtype=torch.float64), shift, draw)
            of_clip.copy_(of_patch.repeat_interleave(patch)[:num_frames])
        elif is_forced:
            for group in clean_frames(*draws[:3], math.ceil(num_frames / level_frames)):
                of_clip[group * level_frames : (group + 1) * level_frames] = 1.0
    levels[is_pure] = 0.0
    if region_share == 0:
        return levels
    levels = levels[:, :, None, None].repeat(1, 1, size, size)
    for of_clip, level, index, forces in zip(levels, gamma, indices, can_force, strict=True):
        chance, *draws = torch.rand(5, generator=generator(seed, "region", stream, index)).tolist()
        if chance < region_share and forces:
            height, width = noisy_region(*draws, size)
            of_clip[:] = 1.0
            of_clip[:, height, width] = level
    return levels


def noisy_region(u_top, u_left, u_height, u_width, size):
    """Choose a rectangle from four uniform draws in [0, 1): slices of 2 to size - 1 pixels."""
    height, width = (2 + int(u * (size - 2)) for u in (u_height, u_width))
    top = int(u_top * (size - height + 1))
    left = int(u_left * (size - width + 1))
    return slice(top, top + height), slice(left, left + width)


def clean_frames(u_kind, u_first, u_last, num_frames):
    """Choose the given frames of num_frames, or given groups of frames, from three uniform draws in
    [0, 1).

    Returns a set, neither empty nor full. 1/2 of the draws choose the first frames, 1/4 the first
    and the last, 1/8 the last, 1/8 a single frame. Few first frames are likelier than many, since a
    picture is one frame. The frames may split a temporal patch.
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
    """Return the probability (B,) of dropping the condition of clips with gammas (B,), (B, T) or
    (B, T, H, W).

    It is max(`usual`, sqrt(c / T)) for a clip with c of T frames clean, because clean frames tell
    part of the condition. One frame of 16 does not tell how the clip continues, so three of four
    such clips keep their condition. For regions, it is the same with areas.
    """
    if gamma.dim() == 1:
        return torch.full_like(gamma, usual)
    return (gamma == 1).float().flatten(1).mean(dim=1).sqrt().clamp(min=usual)


def noisy_context(x, most, seed, stream, indices):
    """Return clips x (B, C, T, H, W) with some noise, for a causal model to continue:
    (1 - u) x + u eps, where u is uniform up to `most`.

    A model that has seen noise in its context is less sensitive to the errors of its own samples.
    """
    if not most:
        return x
    u = most * uniform(seed, "context level", stream, indices).to(x.device, non_blocking=True)
    noise = normal(seed, "context noise", stream, indices, x.shape[1:], x.device)
    return interpolate(x, noise, 1 - u)


def own_context(network, clean, share, objective, seed, stream, indices, y, time_scale):
    """Replace a share of clips (B, C, T, H, W), which a causal model continues, by what it makes of
    them itself: its estimate of each frame from a noisy one, after the clean frames before.

    So it learns to continue its own errors, as with training on its own roll-outs. The noise is
    low enough for the frames to show the same, so the true next frame remains the right one.
    """
    if not share:
        return clean

    def draw(purpose):
        numbers = uniform(seed, purpose, stream, indices)
        return numbers.to(clean.device, non_blocking=True)

    is_own = draw("own context") < share
    gamma = OWN_LEAST + (OWN_MOST - OWN_LEAST) * draw("own context level")
    noise = normal(seed, "own context noise", stream, indices, clean.shape[1:], clean.device)
    x_gamma = interpolate(clean, noise, gamma)
    told = {"gamma": gamma} if objective.is_told else {}
    with torch.no_grad():
        f = network(x_gamma, y, time_scale, clean=clean, **told)
    estimate = objective.data_estimate(x_gamma, f.float(), gamma)
    return torch.where(_broadcast(is_own), estimate, clean)


# Flags --------------------------------------------------------------------------------------------


def add_flags(parser):
    """Add the flags of the objective and the noise levels to the parser of train.py."""
    add = parser.add_argument_group("objective").add_argument
    add(
        "--objective",
        choices=OBJECTIVES,
        help=(
            "eqm; flow: flow matching, which is told the noise level; blind: the same, not told; "
            "told-w, blind-w: these with the weight of eqm; told-c: eqm, told the noise level; "
            "told-4: flow with a target four times as large; "
            "default: from --ckpt, else eqm"
        ),
    )
    add(
        "--gamma-shift",
        type=POSITIVE,
        default=1.0,
        help="above 1: train closer to the noise; 1: uniform",
    )
    add(
        "--gamma-draw",
        choices=DRAWS,
        default="uniform",
        help="logit-normal: more clips are half noise; then comes --gamma-shift",
    )
    add(
        "--forcing",
        type=SHARE,
        default=0.0,
        help="fraction of clips with mixed noise levels, to continue clips later",
    )
    add(
        "--context-noise",
        type=SHARE,
        default=0.0,
        metavar="S",
        help="--causal: at most this share of noise in the frames that a model continues",
    )
    add(
        "--own-context",
        type=SHARE,
        default=0.0,
        metavar="S",
        help="--causal: the share of clips that continue what the network makes of their frames",
    )
    add(
        "--forcing-regions",
        type=SHARE,
        default=0.0,
        help="fraction of clips that are clean except for a rectangle",
    )
    add(
        "--disp",
        action="store_true",
        help="add the dispersive loss of the last block's activations",
    )


def check_flags(args, clip_lengths):
    """Raise UserError for flags of noise levels that don't fit the clips or the model."""
    for name in ("forcing", "forcing_regions"):
        if getattr(args, name) and args.causal:
            raise UserError(
                f"{flag_text(args, name)}: a causal model always learns to continue clean frames; "
                "remove it, or --causal"
            )
        if getattr(args, name) and {*clip_lengths} == {1}:
            raise UserError(
                f"{flag_text(args, name)}: does not apply to clips of one frame; remove it"
            )
    for name in ("context_noise", "own_context"):
        if getattr(args, name) and not args.causal:
            raise UserError(f"{flag_text(args, name)}: needs --causal; add it")
