"""Consistency over a clip: statistics of its frames by position, generated against real.

They need no labels, so they fit any data. Two faults appear when a model samples more frames than
it was trained on:
- seam score: change between frames at the borders of temporal patches (or of the windows of a long
  clip) over the change elsewhere, divided by the same ratio in real clips; 1 = no seam.
- drift: rise of a statistic from the first frame to the last (least-squares line), minus the rise
  in real clips, in standard deviations among real frames; 0 = no drift.
"""

import math

import numpy as np
import torch

from generation import window_starts
from scoring.stats import (
    by_unit,
    cell,
    gather,
    half95,
    interval_units,
    ratio_interval,
    report,
    table,
)

STATISTICS = [
    f"{what} {color}" for what in ("mean", "contrast") for color in ("red", "green", "blue")
] + ["sharpness"]
TITLES = {  # of the values
    "seam_score": "seam score (1 = none)",
    "window_seam_score": "seam score of windows",
    "change_ratio": "change / real change",
    "largest_drift": "largest drift",
}


def score_consistency(generated, real, source):
    """Score two streams of at least two clips each.

    source: how samples were made, from samples.json.
    """
    both = [
        gather(stream, lambda clip, *_: measure(torch.from_numpy(clip)))
        for stream in (generated, real)
    ]
    both = [
        (torch.stack(statistics), torch.stack(change), videos)
        for statistics, change, videos in both
    ]
    windows = source.get("window"), source.get("overlap") or 0
    result = summarize(*both, source["temporal_patch_size"], *windows)
    videos = {"generated": both[0][2], "real": both[1][2]}
    result["interval_units"], units = interval_units("ratios", **videos)
    values, lines = report(result, TITLES)
    drift = [
        (f"drift of {name}", cell(own, "drift", interval="interval95"))
        for name, own in result["drift"].items()
    ]
    return values, result, [*lines, *table(drift), units]


def measure(clip):
    """(STATISTICS (T, 7), change (T - 1,)), float64 in gray levels, of a clip uint8 (T, H, W, 3).

    Contrast: standard deviation of a channel. Sharpness and change: RMS difference of neighbor
    pixels and of frames.
    """
    frames = clip.permute(0, 3, 1, 2).double()  # (T, C, H, W)
    mean = frames.mean(dim=(2, 3))
    contrast = frames.std(dim=(2, 3), correction=0)
    sharpness = sum(frames.diff(dim=dim).square().mean(dim=(1, 2, 3)) / 2 for dim in (2, 3)).sqrt()
    change = frames.diff(dim=0).square().mean(dim=(1, 2, 3)).sqrt()
    return torch.cat([mean, contrast, sharpness[:, None]], dim=1), change


def borders(num_frames, temporal_patch_size, window=None, overlap=0):
    """Two lists of frames but the first: where temporal patches begin, and where windows begin."""
    window = window or num_frames
    starts = window_starts(num_frames, window, overlap)
    # the first frame that the window before does not have
    new = [start + overlap for start in starts[1:]]
    patches = []
    for start, first, end in zip(starts, [0, *new], [*new, num_frames], strict=True):
        patches += [
            frame
            for frame in range(start, start + window, temporal_patch_size)
            if first <= frame < end
        ]
    return patches[1:], new


def seam_score(generated, real, borders, videos=((), ())):
    """(score, its 95% interval [low, high]) of changes (N, T - 1) and (M, T - 1) at borders,
    numbers of frames.

    Both are None without borders, without frames between, or if nothing moves. videos: those of the
    clips, two lists.
    """
    # (T - 1,)
    at_border = torch.isin(
        torch.arange(generated.shape[1]) + 1, torch.tensor(borders, dtype=torch.int64)
    )
    # mean change of each clip at the borders and elsewhere: clips count by how much they move
    both = [
        torch.stack([part[:, at_border].mean(1), part[:, ~at_border].mean(1)], 1)
        for part in (generated, real)
    ]

    def score(generated, real):  # (..., 2) each
        return (generated[..., 0] / generated[..., 1]) / (real[..., 0] / real[..., 1])

    value = score(*(changes.mean(dim=0) for changes in both))
    if not value.isfinite():
        return None, None
    return value.item(), ratio_interval(score, both, videos)


def rises(statistics):
    """Rise of each statistic (N, T, 7) over the clip, on a least-squares line: (N, 7)."""
    T = statistics.shape[1]
    time = torch.arange(T, dtype=torch.float64) - (T - 1) / 2
    return torch.einsum("t,nts->ns", time, statistics) / time.square().sum() * (T - 1)


def drifts(generated, real, videos=((), ())):
    """{name: {"drift", "interval95"}} of statistics (N, T, 7) and (M, T, 7).

    Both are None where all real frames are equal. One unit has no interval.
    """
    deviations = real.flatten(0, 1).std(dim=0).tolist()
    rise, real_rise = (rises(statistics) for statistics in (generated, real))
    half = half95(by_unit(rise, videos[0]))
    real_half = half95(by_unit(real_rise, videos[1]))
    half = np.hypot(half, real_half)  # of a difference of independent means: Zou and Donner, 2008
    difference = (rise.mean(dim=0) - real_rise.mean(dim=0)).tolist()
    found = {name: {"drift": None, "interval95": None} for name in STATISTICS}
    rows = zip(STATISTICS, deviations, difference, half.tolist(), strict=True)
    for name, deviation, middle, width in rows:
        if deviation:
            found[name]["drift"] = middle / deviation
        if deviation and not math.isnan(width):
            ends = middle - width, middle + width
            found[name]["interval95"] = [end / deviation for end in ends]
    return found


def summarize(generated, real, temporal_patch_size, window=None, overlap=0):
    """All results, a plain dict for JSON.

    Both are (statistics, change, videos) of at least two clips. window, overlap: in frames; None:
    all frames were sampled at once.
    """
    statistics, changes, videos = zip(generated, real, strict=True)
    patches, windows = borders(statistics[0].shape[1], temporal_patch_size, window, overlap)
    result = {"temporal_patch_size": temporal_patch_size, "drift": drifts(*statistics, videos)}
    for name, frames in {
        "seam_score": patches,
        **({"window_seam_score": windows} if windows else {}),
    }.items():
        result[name], result[f"{name}_interval95"] = seam_score(*changes, frames, videos)
    known = {
        name: own["drift"] for name, own in result["drift"].items() if own["drift"] is not None
    }
    worst = max(known, key=lambda name: abs(known[name]), default=None)
    motion = [change.mean().item() for change in changes]
    result |= {"change_ratio": motion[0] / motion[1] if motion[1] else None}
    return result | {"largest_drift": known.get(worst), "largest_drift_of": worst}
