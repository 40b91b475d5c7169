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

from plans import window_starts
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
    "mean red",
    "mean green",
    "mean blue",
    "contrast red",
    "contrast green",
    "contrast blue",
    "sharpness",
]
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
    generated = measure_all(generated)
    real = measure_all(real)
    is_causal = source.get("context") is not None  # its window is a temporal patch
    result = summarize(
        generated=generated,
        real=real,
        temporal_patch_size=source["temporal_patch_size"],
        window=None if is_causal else source.get("window"),
        overlap=source.get("overlap") or 0,
    )
    result["interval_units"], line = interval_units(
        "ratios", generated=generated[-1], real=real[-1]
    )
    values, lines = report(result, TITLES)
    rows = [
        (f"drift of {name}", cell(drift, "drift", interval="interval95"))
        for name, drift in result["drift"].items()
    ]
    return values, result, [*lines, *table(rows), line]


def measure_all(stream):
    """(statistics (N, T, 7), change (N, T - 1), videos) of the clips of all ranks' streams."""
    statistics, change, videos = gather(stream, lambda clip, *_: measure(torch.from_numpy(clip)))
    return torch.stack(statistics), torch.stack(change), videos


def measure(clip):
    """(STATISTICS (T, 7), change (T - 1,)), float64 in gray levels, of a clip uint8 (T, H, W, 3).

    Contrast: standard deviation of a channel. Sharpness and change: RMS difference of neighbor
    pixels and of frames.
    """
    frames = clip.permute(0, 3, 1, 2).double()  # (T, C, H, W)
    mean = frames.mean(dim=(2, 3))
    # exact sums: frames with the same pixels in other places have the same contrast
    pixels = clip.flatten(1, 2).long()
    count = pixels.shape[1]
    variance = count * pixels.square().sum(dim=1) - pixels.sum(dim=1).square()
    contrast = variance.double().sqrt() / count
    down = frames.diff(dim=2).square().mean(dim=(1, 2, 3))
    right = frames.diff(dim=3).square().mean(dim=(1, 2, 3))
    sharpness = (down / 2 + right / 2).sqrt()
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
        for frame in range(start, start + window, temporal_patch_size):
            if first <= frame < end:
                patches.append(frame)
    return patches[1:], new


def seam_score(generated, real, borders, videos=((), ())):
    """(score, its 95% interval [low, high]) of changes (N, T - 1) and (M, T - 1) at borders,
    numbers of frames.

    Both are None without borders, without frames between, or if nothing moves. videos: those of the
    clips, two lists.
    """
    frames = torch.arange(generated.shape[1]) + 1
    at_border = torch.isin(frames, torch.tensor(borders, dtype=torch.int64))  # (T - 1,)
    both = []
    for change in (generated, real):
        # the means of each clip: clips count by how much they move
        means = [change[:, at_border].mean(dim=1), change[:, ~at_border].mean(dim=1)]
        both.append(torch.stack(means, dim=1))

    def score(generated, real):  # (..., 2) each
        return (generated[..., 0] / generated[..., 1]) / (real[..., 0] / real[..., 1])

    value = score(both[0].mean(dim=0), both[1].mean(dim=0))
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
    rise = rises(generated)
    real_rise = rises(real)
    half = half95(by_unit(rise, videos[0]))
    real_half = half95(by_unit(real_rise, videos[1]))
    half = np.hypot(half, real_half)  # of a difference of independent means: Zou and Donner, 2008
    difference = (rise.mean(dim=0) - real_rise.mean(dim=0)).tolist()
    drift_of = {}
    rows = zip(STATISTICS, deviations, difference, half.tolist(), strict=True)
    for name, deviation, middle, width in rows:
        drift = None
        interval = None
        if deviation:
            drift = middle / deviation
            if not math.isnan(width):
                interval = [(middle - width) / deviation, (middle + width) / deviation]
        drift_of[name] = {"drift": drift, "interval95": interval}
    return drift_of


def summarize(generated, real, temporal_patch_size, window=None, overlap=0):
    """All results of two sets of at least two clips, from `measure_all`: a plain dict for JSON.

    window, overlap: in frames; None: all frames were sampled at once.
    """
    statistics, change, videos = generated
    real_statistics, real_change, real_videos = real
    both = videos, real_videos
    result = {
        "temporal_patch_size": temporal_patch_size,
        "drift": drifts(statistics, real_statistics, both),
    }
    patches, windows = borders(
        num_frames=statistics.shape[1],
        temporal_patch_size=temporal_patch_size,
        window=window,
        overlap=overlap,
    )
    seams = {"seam_score": patches}
    if windows:
        seams["window_seam_score"] = windows
    for name, frames in seams.items():
        result[name], result[f"{name}_interval95"] = seam_score(
            generated=change,
            real=real_change,
            borders=frames,
            videos=both,
        )
    motion = change.mean().item()
    real_motion = real_change.mean().item()
    known = {}
    for name, entry in result["drift"].items():
        if entry["drift"] is not None:
            known[name] = entry["drift"]
    worst = max(known, key=lambda name: abs(known[name]), default=None)
    return result | {
        "change_ratio": motion / real_motion if real_motion else None,
        "largest_drift": known.get(worst),
        "largest_drift_of": worst,
    }
