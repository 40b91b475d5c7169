"""Is a clip the same from its first frame to its last? Statistics by position in the clip, generated against real.

They need no truth, so they fit any data. Two things go wrong when a model samples more frames than it was trained on,
or errors pile up: the picture drifts (brighter, blurrier, ...), or there is a seam at each border of temporal patches,
where one frame is less like the next than within a patch.

seam score   change from frame to frame at the borders over that within patches, divided by the same ratio of real
             clips; 1 = no seam
drift        how much more a statistic rises over the clip (a straight line through its frames, from the first to the
             last) than in real clips, in units of its standard deviation among real frames; 0 = no drift
"""

import torch

from runtime.rng import generator

NAMES = (
    "mean red", "mean green", "mean blue", "contrast red", "contrast green", "contrast blue", "sharpness",
)  # fmt: skip
RESAMPLES = 1000  # for 95% quantiles; a resample takes a millisecond


def measure(clip):
    """(statistics (T, 7), change (T - 1,)), float64 in grey levels, of a clip uint8 (T, H, W, 3).

    Statistics of a frame, in the order of NAMES: mean and standard deviation of each channel, and the root mean square
    of the differences between neighboring pixels. Change is that of the differences between a frame and the next.
    """
    frames = clip.permute(0, 3, 1, 2).double()  # (T, C, H, W)
    mean, contrast = frames.mean(dim=(2, 3)), frames.std(dim=(2, 3), correction=0)
    sharpness = sum(frames.diff(dim=dim).square().mean(dim=(1, 2, 3)) / 2 for dim in (2, 3)).sqrt()
    change = frames.diff(dim=0).square().mean(dim=(1, 2, 3)).sqrt()
    return torch.cat([mean, contrast, sharpness[:, None]], dim=1), change


def borders(num_changes, patch):
    """Which of the changes lead from one temporal patch into the next, (T - 1,) bool."""
    return (torch.arange(num_changes) + 1) % patch == 0


def seams(change, patch):
    """Mean change of each clip, (N, 2): at the borders and elsewhere; None where a clip has not both."""
    at = borders(change.shape[1], patch)
    if not at.any() or at.all():
        return None
    return torch.stack([change[:, at].mean(dim=1), change[:, ~at].mean(dim=1)], dim=1)


def seam_ratio(parts):
    """Change at the borders over that elsewhere, of (..., N, 2); clips count as much as they move."""
    at, elsewhere = parts.mean(dim=-2).unbind(dim=-1)
    return at / elsewhere


def seam_score(generated, real, patch, seed=0):
    """(score, [low, high] of its 95% interval) of changes (N, T - 1) and (M, T - 1).

    Both None where there is no border or nothing moves. The interval is from RESAMPLES bootstrap draws of the clips.
    """
    parts = [seams(change, patch) for change in (generated, real)]
    if parts[0] is None or any((part.mean(dim=0) == 0).any() for part in parts):
        return None, None
    score = seam_ratio(parts[0]) / seam_ratio(parts[1])
    draws = []
    for name, part in zip(("generated", "real"), parts, strict=True):
        random = generator(seed, "bootstrap", name)
        drawn = [torch.randint(len(part), (len(part),), generator=random) for _ in range(RESAMPLES)]
        draws.append(torch.stack([seam_ratio(part[numbers]) for numbers in drawn]))
    scores = draws[0] / draws[1]
    scores = scores[scores.isfinite()]  # a draw of few clips may hold none that moves
    return score.item(), scores.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def rises(statistics):
    """How much each statistic rises from the first frame to the last, (N, 7), by a least-squares line; (N, T, 7)."""
    T = statistics.shape[1]
    time = torch.arange(T, dtype=torch.float64) - (T - 1) / 2
    return torch.einsum("t,nts->ns", time, statistics) / time.square().sum() * (T - 1)


def drifts(generated, real):
    """{name: {"drift", "interval95"}} of statistics (N, T, 7) and (M, T, 7); None where real frames do not differ."""
    found = {}
    units = real.flatten(0, 1).std(dim=0)
    rise = [rises(statistics) for statistics in (generated, real)]
    drift = (rise[0].mean(dim=0) - rise[1].mean(dim=0)) / units
    error = sum(part.var(dim=0) / len(part) for part in rise).sqrt() / units
    for name, unit, value, half in zip(NAMES, units.tolist(), drift.tolist(), (1.96 * error).tolist(), strict=True):
        known = unit > 0
        found[name] = {
            "drift": value if known else None,
            "interval95": [value - half, value + half] if known else None,
        }
    return found


def profile(values):
    """Mean over the clips by position and its 95% interval, lists (T,) of values (N, T), N >= 2."""
    mean, half = values.mean(dim=0), 1.96 * values.std(dim=0) / len(values) ** 0.5
    return {"mean": mean.tolist(), "low": (mean - half).tolist(), "high": (mean + half).tolist()}


def summarize(generated, real, patch):
    """A plain dict for JSON, of what `measure` found in generated and real clips, at least two each."""
    score, interval = seam_score(generated[1], real[1], patch)
    drift = drifts(generated[0], real[0])
    known = {name: entry["drift"] for name, entry in drift.items() if entry["drift"] is not None}
    worst = max(known, key=lambda name: abs(known[name]), default=None)
    positions = {
        kind: {"change": profile(change)} | {name: profile(statistics[..., i]) for i, name in enumerate(NAMES)}
        for kind, (statistics, change) in (("generated", generated), ("real", real))
    }
    mean_change = [change.mean().item() for _, change in (generated, real)]
    return {
        "temporal_patch_size": patch,
        "seam_score": score,
        "seam_score_interval95": interval,
        "change_ratio": mean_change[0] / mean_change[1] if mean_change[1] else None,
        "largest_drift": known.get(worst),
        "largest_drift_of": worst,
        "drift": drift,
        "by_position": positions,
    }


def report(result):
    """What people read of a summary: lines."""

    def cell(value, interval):
        return "-" if value is None else f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"

    lines = [f"{'seam score (1 = none)':<24} {cell(result['seam_score'], result['seam_score_interval95'])}"]
    lines += [f"{'drift of ' + name:<24} {cell(*entry.values())}" for name, entry in result["drift"].items()]
    if result["change_ratio"] is not None:
        lines.append(f"{'change / real change':<24} {result['change_ratio']:.3f}")
    return ["  " + line for line in lines]
