"""Consistency over a clip: statistics of its frames by position in the clip, generated against real.

They need no labels, so they fit any data. Two faults show when a model samples more frames than it was trained on:
drift (frames become brighter, blurrier, ...) and seams (at the borders of temporal patches, or of the windows of a long
clip, frames change more than elsewhere).

seam score   change from frame to frame at the borders over the change elsewhere, divided by the same ratio in real
             clips; 1 = no seam
drift        rise of a statistic from the first frame to the last (least-squares line), minus the rise in real clips,
             in units of its standard deviation among real frames; 0 = no drift
"""

import torch

from generation import window_starts
from runtime import distributed
from runtime.cli import say
from runtime.distributed import rank
from runtime.rng import generator

STATISTICS = (  # of a frame
    "mean red", "mean green", "mean blue", "contrast red", "contrast green", "contrast blue", "sharpness",
)  # fmt: skip
RESAMPLES = 1000  # of the bootstrap, for its quantiles; each takes a millisecond


def score_consistency(generated, real, temporal_patch_size, plot_path, window=None, overlap=0):
    """Score two streams of clips (see sources.py), at least two clips each, and plot them to plot_path.

    window and overlap are those of the generated clips in frames; None: they were sampled in one.
    Returns (values, result), plain dicts for JSON, on rank 0 and (None, None) elsewhere.
    """
    generated, real = measure_stream(generated), measure_stream(real)
    if rank() != 0:
        return None, None
    result = summarize(generated, real, temporal_patch_size, window, overlap)
    from scoring import plots  # matplotlib takes a while to load

    plots.plot_consistency(plot_path, result["by_position"], temporal_patch_size)
    for line in [*result_lines(result), f"  by position in the clip: {plot_path}"]:
        say(line)
    names = "seam_score", "window_seam_score", "change_ratio", "largest_drift"
    return {name: result[name] for name in names if name in result}, result


def measure_stream(stream):
    """[statistics (N, T, 7), change (N, T - 1)] of the clips of all ranks, in the order of their indices."""
    rows = []
    for indices, clips, _, _ in stream:
        rows += [(index, *measure(clip.cpu())) for index, clip in zip(indices, clips, strict=True)]
    return [torch.stack(column) for column in distributed.gather_in_order(rows)]


def measure(clip):
    """(statistics (T, 7), change (T - 1,)), float64 in grey levels, of a clip uint8 (T, H, W, 3).

    Statistics of a frame, in the order of STATISTICS: mean and standard deviation of each channel, and the root mean
    square of the differences between neighboring pixels. Change is the root mean square of the differences between a
    frame and the next.
    """
    frames = clip.permute(0, 3, 1, 2).double()  # (T, C, H, W)
    mean, contrast = frames.mean(dim=(2, 3)), frames.std(dim=(2, 3), correction=0)
    sharpness = sum(frames.diff(dim=dim).square().mean(dim=(1, 2, 3)) / 2 for dim in (2, 3)).sqrt()
    change = frames.diff(dim=0).square().mean(dim=(1, 2, 3)).sqrt()
    return torch.cat([mean, contrast, sharpness[:, None]], dim=1), change


def borders(num_frames, temporal_patch_size, window=None, overlap=0):
    """The first frames of temporal patches and those of windows, two lists; without the first frame of the clip."""
    window = window or num_frames
    starts = window_starts(num_frames, window, overlap)
    new = [start + overlap for start in starts[1:]]  # of a window, frames that the one before does not have
    patches = []
    for start, first, end in zip(starts, [0, *new], [*new, num_frames], strict=True):
        patches += [frame for frame in range(start, start + window, temporal_patch_size) if first <= frame < end]
    return patches[1:], new


def seam_changes(change, borders):
    """Mean of change (N, T - 1) of each clip at the borders, numbers of frames, and elsewhere, (N, 2).

    None if clips have no border, or nothing else.
    """
    at_border = torch.isin(torch.arange(change.shape[1]) + 1, torch.tensor(borders, dtype=torch.int64))  # (T - 1,)
    if not at_border.any() or at_border.all():
        return None
    return torch.stack([change[:, at_border].mean(dim=1), change[:, ~at_border].mean(dim=1)], dim=1)


def seam_ratio(changes):
    """Mean change at the borders over mean change elsewhere, of (N, 2); clips count in proportion to their motion."""
    at_border, elsewhere = changes.mean(dim=-2).unbind(dim=-1)
    return at_border / elsewhere


def seam_score(generated, real, borders, seed=0):
    """(score, [low, high] of its 95% interval) of changes (N, T - 1) and (M, T - 1) at borders, numbers of frames.

    Both are None if there is no border or nothing moves. The interval is from RESAMPLES bootstrap resamples of the
    clips.
    """
    both = [seam_changes(change, borders) for change in (generated, real)]
    if both[0] is None or any((changes.mean(dim=0) == 0).any() for changes in both):
        return None, None
    score = seam_ratio(both[0]) / seam_ratio(both[1])
    ratios = []
    for name, changes in zip(("generated", "real"), both, strict=True):
        random, N = generator(seed, "bootstrap", name), len(changes)
        resamples = [torch.randint(N, (N,), generator=random) for _ in range(RESAMPLES)]
        ratios.append(torch.stack([seam_ratio(changes[indices]) for indices in resamples]))
    scores = ratios[0] / ratios[1]
    scores = scores[scores.isfinite()]  # in a resample of few clips, nothing may move
    return score.item(), scores.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def rises(statistics):
    """Rise of each statistic (N, T, 7) from the first frame to the last, by a least-squares line: (N, 7)."""
    T = statistics.shape[1]
    time = torch.arange(T, dtype=torch.float64) - (T - 1) / 2
    return torch.einsum("t,nts->ns", time, statistics) / time.square().sum() * (T - 1)


def drifts(generated, real):
    """{name: {"drift", "interval95"}} of statistics (N, T, 7) and (M, T, 7); None where all real frames are alike."""
    found = {}
    units = real.flatten(0, 1).std(dim=0)
    rise = [rises(statistics) for statistics in (generated, real)]
    drift = (rise[0].mean(dim=0) - rise[1].mean(dim=0)) / units
    error = sum(part.var(dim=0) / len(part) for part in rise).sqrt() / units
    columns = units.tolist(), drift.tolist(), (1.96 * error).tolist()
    for name, unit, value, half in zip(STATISTICS, *columns, strict=True):
        known = unit > 0
        found[name] = {
            "drift": value if known else None,
            "interval95": [value - half, value + half] if known else None,
        }
    return found


def profile(values):
    """Mean over the clips of values (N, T), N >= 2, and its 95% interval, by position: lists of T numbers."""
    mean, half = values.mean(dim=0), 1.96 * values.std(dim=0) / len(values) ** 0.5
    return {"mean": mean.tolist(), "low": (mean - half).tolist(), "high": (mean + half).tolist()}


def by_window(generated, real, starts):
    """{statistic: its mean in each window over that of real clips there} of statistics (N, T, 7) and (M, T, 7)."""
    ends = [*starts[1:], generated.shape[1]]
    parts = [[clips[:, a:b].mean(dim=(0, 1)) for a, b in zip(starts, ends, strict=True)] for clips in (generated, real)]
    ratios = torch.stack(parts[0]) / torch.stack(parts[1])  # (windows, 7)
    return {name: ratios[:, number].nan_to_num(0, 0, 0).tolist() for number, name in enumerate(STATISTICS)}


def summarize(generated, real, temporal_patch_size, window=None, overlap=0):
    """All results, a plain dict for JSON; generated and real are (statistics, change) of at least two clips each."""
    patches, windows = borders(generated[0].shape[1], temporal_patch_size, window, overlap)
    score, interval = seam_score(generated[1], real[1], patches)
    drift = drifts(generated[0], real[0])
    known = {name: entry["drift"] for name, entry in drift.items() if entry["drift"] is not None}
    worst = max(known, key=lambda name: abs(known[name]), default=None)
    positions = {
        kind: {"change": profile(change)} | {name: profile(statistics[..., i]) for i, name in enumerate(STATISTICS)}
        for kind, (statistics, change) in (("generated", generated), ("real", real))
    }
    mean_change = [change.mean().item() for _, change in (generated, real)]
    of_windows = {}
    if windows:
        names = "window_seam_score", "window_seam_score_interval95"
        of_windows = dict(zip(names, seam_score(generated[1], real[1], windows), strict=True))
        of_windows |= {"windows": [0, *windows], "by_window": by_window(generated[0], real[0], [0, *windows])}
    return of_windows | {
        "temporal_patch_size": temporal_patch_size,
        "seam_score": score,
        "seam_score_interval95": interval,
        "change_ratio": mean_change[0] / mean_change[1] if mean_change[1] else None,
        "largest_drift": known.get(worst),
        "largest_drift_of": worst,
        "drift": drift,
        "by_position": positions,
    }


def result_lines(result):
    """The main results of `summarize`, to print."""

    def cell(value, interval):
        return "-" if value is None else f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"

    lines = [f"{'seam score (1 = none)':<24} {cell(result['seam_score'], result['seam_score_interval95'])}"]
    if "windows" in result:
        interval = result["window_seam_score_interval95"]
        lines.append(f"{'seam score of windows':<24} {cell(result['window_seam_score'], interval)}")
        ratios = result["by_window"]["sharpness"]
        lines.append(f"{'sharpness / real':<24} {ratios[0]:.3f} in the first window, {ratios[-1]:.3f} in the last")
    lines += [f"{'drift of ' + name:<24} {cell(*entry.values())}" for name, entry in result["drift"].items()]
    if result["change_ratio"] is not None:
        lines.append(f"{'change / real change':<24} {result['change_ratio']:.3f}")
    return ["  " + line for line in lines]
