"""The noise levels of training clips: with --forcing each frame of some clips has its own.

So the same network learns to complete a clip from any frames that are given: they are clean (gamma = 1), the others are
not. After Diffusion Forcing (arXiv 2407.01392), without its level as an input: an EqM network sees from the frames
themselves how noisy they are.
"""

import torch

from runtime.rng import generator, uniform
from transport import shift_gamma

OWN_LEVELS = 0.5  # share of the forced clips whose temporal patches have a level each; the others have clean frames


def draw_gammas(seed, stream, indices, num_frames, patch, shift=1.0, share=0.0):
    """The gammas of the samples `indices` of a stream, float32 on the CPU: (B,), with a `share` to force (B, T).

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
    the last, an eighth the last, an eighth a single one. Borders may lie at any frame, also inside a temporal patch.
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


def label_dropout(gamma, usual):
    """The probability (B,) that a clip with these gammas, (B,) or (B, T), has no label; `usual` is that of others.

    With c of T frames clean it is sqrt(c / T): the more of them there are, the more they show of what a label says. One
    frame of 16 does not show where the clip goes on to, and leaves three of four clips their label.
    """
    if gamma.dim() == 1:
        return torch.full_like(gamma, usual)
    return (gamma == 1).float().mean(dim=1).sqrt().clamp(min=usual)


def half_given(gamma, num_frames):
    """gamma (B,) as (B, T) with the first half of the frames clean."""
    levels = gamma[:, None].repeat(1, num_frames)
    levels[:, : num_frames // 2] = 1
    return levels
