"""What the metrics share: rows of all ranks, 95% intervals, the bootstrap, PSNR, tables to print.

The function score_... of a metric returns (values, result, lines) on rank 0: {name: number or None}, more for JSON, and
text to print. On the other ranks they may be None.

Clips of one video look alike, so intervals over them are too narrow. `by_video` makes intervals over videos.
"""

import itertools
import math

import numpy as np
import torch

from runtime import distributed
from runtime.rng import generator

Z95 = 1.96  # 95% of a normal distribution are within so many standard deviations of its mean
RESAMPLES = 1000  # of the bootstrap


def gather(stream, measure):
    """The columns of measure(clip uint8 (T, H, W, 3), class name, time scale, index) of all clips, and their videos.

    Each rank measures the clips of its stream (see sources.py). All ranks get all rows, in the order of the clips.
    """
    return distributed.gather_in_order([(index, *measure(*clip, index), video) for index, *clip, video in stream])


def by_video(values, videos):
    """The units of an interval: means of values (N, ...) over the clips of each video, float64 (n, ...).

    videos: the video of each clip. If each clip has its own video, or all share one, the units are the values.
    """
    values, indices = torch.as_tensor(values).double(), {}
    for index, video in enumerate(videos):
        indices.setdefault(video, []).append(index)
    if len(indices) in (0, 1, len(values)):
        return values
    return torch.stack([values[own].nanmean(dim=0) for own in indices.values()])


def interval_units(**videos):
    """({kind of clips: what their intervals are over}, the same as a line); videos: those of each kind, as above."""
    units = {}
    for kind, own in videos.items():
        clips, count = f"{len(own)} clips", len(set(own))
        units[kind] = clips if count == len(own) else f"{count} videos" if count > 1 else f"{clips} of one video"
    return units, f"  95% intervals over {', '.join(f'{text} ({kind})' for kind, text in units.items())}"


def wilson(hits, count):
    """The 95% interval [low, high] of a share hits / count (Wilson, 1927), valid near 0 and 1 and for few clips."""
    middle = (hits + Z95**2 / 2) / (count + Z95**2)
    half = Z95 / (count + Z95**2) * math.sqrt(hits * (count - hits) / count + Z95**2 / 4)
    return [max(0.0, middle - half), min(1.0, middle + half)]  # rounding may exceed 0 or 1


def share(hits, videos=()):
    """(the share of `hits` (N,) that are true, its 95% interval)."""
    units = by_video(hits, videos)
    return sum(hits) / len(hits), wilson(units.sum().item(), len(units))


def shares(hits, videos=()):
    """{name: share, name_interval95: its interval} of {name: bool (N,)}; None if N is 0."""
    result = {}
    for name, own in hits.items():
        result[name], result[f"{name}_interval95"] = share(own, videos) if len(own) else (None, None)
    return result


def mean_and_error(values):
    """The mean of values (None without any) and its standard error (None for fewer than two)."""
    mean = float(np.mean(values)) if len(values) else None
    return mean, float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def bootstrap(values, videos, *key):
    """The means of RESAMPLES resamples of the units of values (N, ...): (RESAMPLES, ...). The key seeds them."""
    values = by_video(values, videos)
    draws = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator(0, "bootstrap", *key))
    return values[draws].mean(dim=1)


def interval95(values):
    """[low, high] around 95% of the finite values (N,). A ratio of resamples of few clips may be infinite."""
    values = values[values.isfinite()]
    return values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()


def mean_interval(values, videos=()):
    """The 95% interval [low, high] of the mean of values (N,), without NaNs; None for fewer than two values."""
    kept = ~np.isnan(values)
    units = by_video(np.asarray(values)[kept], itertools.compress(videos, kept))
    return interval95(bootstrap(units, (), "prediction")) if len(units) > 1 else None


def psnr(found, real, most=60.0):
    """PSNR in dB of uint8 arrays of one shape: NaN if they are empty, `most` if they are equal (rounding gives 59)."""
    if not real.size:
        return np.nan
    error = np.mean(np.square(real.astype(float) - found))
    return min(10 * np.log10(255**2 / error), most) if error else most


def cell(result, name, digits=3, interval=None):
    """A value of a result as text, with its 95% interval; "-" if it is None. interval: the interval's name."""
    if result.get(name) is None:
        return "-"
    ends = result.get(interval or f"{name}_interval95")
    return f"{result[name]:.{digits}f}" + (f" ({ends[0]:.{digits}f} to {ends[1]:.{digits}f})" if ends else "")


def table(rows):
    """Rows of cells as lines of text: the first column is aligned left, the others right."""
    widths = [max(map(len, column)) for column in itertools.zip_longest(*rows, fillvalue="")]
    return [" ".join([f"  {row[0]:<{widths[0]}}", *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def report(result, titles):
    """({name: value}, lines with intervals) of the values of a result that `titles` {name: title} names."""
    values = {name: result[name] for name in titles if name in result}
    return values, table([(titles[name], cell(result, name)) for name in values])
