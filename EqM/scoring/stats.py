"""What the metrics share: rows of all ranks, intervals, the bootstrap over clips, PSNR, tables to print.

The function score_... of a metric returns (values, result, lines) on rank 0: {name: number or None}, all else for JSON,
and text to print. On the other ranks they may be None.
"""

import itertools
import math

import numpy as np
import torch

from runtime import distributed
from runtime.rng import generator

Z95 = 1.96  # standard deviations on each side of the mean that hold 95% of a normal distribution
RESAMPLES = 1000  # of the bootstrap, for its quantiles


def gather(stream, measure):
    """The columns of measure(clip, class name, time scale) for all clips of a stream, a tuple of values for each.

    Clips are arrays uint8 (T, H, W, 3). Each rank measures the clips of its stream (see sources.py); all ranks get all
    rows in the order of the clips.
    """
    rows = []
    for indices, clips, *about in stream:
        rows += [(index, *measure(*clip)) for index, *clip in zip(indices, clips.cpu().numpy(), *about, strict=True)]
    return distributed.gather_in_order(rows)


def wilson(hits, count):
    """The 95% confidence interval [low, high] of a share (Wilson, 1927), valid near 0 and 1 and for few clips too."""
    middle = (hits + Z95**2 / 2) / (count + Z95**2)
    half = Z95 / (count + Z95**2) * math.sqrt(hits * (count - hits) / count + Z95**2 / 4)
    return [max(0.0, middle - half), min(1.0, middle + half)]  # rounding may exceed 0 or 1


def mean_and_error(values):
    """The mean of values (None if there are none) and its standard error (None for fewer than 2)."""
    mean = float(np.mean(values)) if len(values) else None
    return mean, float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def bootstrap(values, *key):
    """The means of RESAMPLES resamples of the clips of values (N, ...), which the key seeds: (RESAMPLES, ...)."""
    values = torch.as_tensor(values)
    draws = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator(0, "bootstrap", *key))
    return values[draws].mean(dim=1)


def interval95(values):
    """[low, high] that hold 95% of those values (N,) that are finite: in a resample of few clips, all may be zero."""
    values = values[values.isfinite()]
    return values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()


def mean_interval(values):
    """[low, high] of the 95% interval of the mean of those values (N,) that are not NaN; None for fewer than two."""
    values = np.asarray(values)
    values = values[~np.isnan(values)]
    return interval95(bootstrap(values, "prediction")) if len(values) > 1 else None


def psnr(found, real, most=60.0):
    """PSNR in dB of arrays uint8 of one shape, NaN of empty ones; `most` for equal ones (rounding alone gives 59)."""
    if not real.size:
        return np.nan
    error = np.mean(np.square(real.astype(float) - found))
    return min(10 * np.log10(255**2 / error), most) if error else most


def cell(result, name, digits=3, interval=None):
    """A value of a result with its 95% interval as text, "-" where there is none. interval: its name."""
    if result.get(name) is None:
        return "-"
    ends = result.get(interval or f"{name}_interval95")
    return f"{result[name]:.{digits}f}" + (f" ({ends[0]:.{digits}f} to {ends[1]:.{digits}f})" if ends else "")


def table(rows):
    """Rows of cells as lines: the first cell to the left, the others in columns to the right."""
    widths = [max(map(len, column)) for column in itertools.zip_longest(*rows, fillvalue="")]
    return [" ".join([f"  {row[0]:<{widths[0]}}", *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def report(result, titles):
    """({name: value} of what a result has of titles {name: title}, the same with intervals as lines)."""
    values = {name: result[name] for name in titles if name in result}
    return values, table([(titles[name], cell(result, name)) for name in values])
