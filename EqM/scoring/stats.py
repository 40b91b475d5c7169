"""What the metrics share: rows of all ranks, 95% intervals over units, PSNR, tables to print.

The function score_... of a metric returns (values, result, lines) on rank 0: {name: number or
None}, more for JSON, and text to print. On the other ranks, it may return None.

Clips of one video look alike, and so do videos of one person. So intervals are over independent
units (`unit_of`):
- means: Student's t; none for one unit
- shares: Wilson's; none if several clips share a unit and there are fewer than FEWEST units
- ratios of means: a bootstrap of the units; none for fewer than FEWEST units
results/studies/statistics/coverage.md shows how often these intervals hold the true value.
"""

import itertools
import math
import re
from collections import Counter
from pathlib import PurePosixPath

import numpy as np
import torch
from scipy.special import stdtrit

from runtime import distributed
from runtime.rng import generator

Z95 = 1.96  # 95% of a normal distribution are within so many standard deviations of its mean
RESAMPLES = 1000  # of the bootstrap
FEWEST = 10  # units: ratios, and shares of clips that share units, need as many for an interval
COPY = re.compile(r"-copy\d+$")  # at the end of a copy's name, from datasets/augment.py
SAMPLE = re.compile(r"\bsamples\.npz, sample \d+$")
UCF_NAME = re.compile(r"(v_\w+_g\d+)_c\d+")
DRAWN_NAME = re.compile(  # of Moving Shapes
    r"v_(Circle|Square|Triangle)(Left|Right|Up|Down|Horizontal|Vertical)_g\d+_c\d+"
)


def gather(stream, measure):
    """The columns of measure(clip uint8 (T, H, W, 3), class name, time scale, index) of all clips,
    and their videos.

    Each rank measures the clips of its stream (see sources.py). All ranks get all rows, in the
    order of the clips.
    """
    rows = [
        (index, *measure(clip, name, time_scale, index), video)
        for index, clip, name, time_scale, video in stream
    ]
    return distributed.gather_in_order(rows)


def unit_of(video):
    """The independent unit that a video belongs to. Clips of one unit may look alike.

    video: a path, perhaps with ", clip 5" after it. Or the number of a sample that continues no
    video: it is its own unit.
    - Videos with the same file name in several class folders are one unit, because they may show
      the same person or character. If they don't, intervals are wider than necessary.
    - Videos of one group of UCF-101, v_Class_gNN_cNN, are one unit: they show the same scene.
    - So are a video and its copies by datasets/augment.py.
    - Samples of a samples.npz are independent.
    - Moving Shapes has names like those of UCF-101, but its videos are drawn independently.
    """
    if not isinstance(video, str) or SAMPLE.search(video):
        return video
    name = COPY.sub("", PurePosixPath(video).stem)
    group = UCF_NAME.fullmatch(name)
    if group is None or DRAWN_NAME.fullmatch(name):
        return name
    return group[1]


def by_unit(values, videos=()):
    """The means of values (N, ...) over the clips of each unit, float64 (n, ...), without NaNs.

    videos: the video of each clip; none: each clip is a unit. Units count equally, however many
    clips they have.
    """
    values = torch.as_tensor(values).double()
    indices = {}
    for index, video in enumerate(videos):
        indices.setdefault(unit_of(video), []).append(index)
    if len(indices) in (0, len(values)):
        return values
    return torch.stack([values[of_unit].nanmean(dim=0) for of_unit in indices.values()])


def interval_units(lacking="shares", **videos):
    """({kind of clips: the units of their intervals, and what has none}, the same as a line).

    videos: those of the clips of each kind. lacking: what has no interval over fewer than FEWEST
    units: "shares" or "ratios", or "" if there are only means. Shares lack it only if several clips
    share a unit.
    """
    units = {}
    texts = []
    for kind, of_clips in videos.items():
        over, missing = count_units(of_clips, lacking)
        units[kind] = over + missing
        texts.append(f"{over} ({kind}{missing})")
    return units, f"  95% intervals over {', '.join(texts)}"


def count_units(videos, lacking):
    """(the number of units of clips, which intervals are missing and why), in words."""
    count = len(set(map(unit_of, videos)))
    is_clustered = count < len(videos)
    noun = "clips"
    if is_clustered:
        paths = [PurePosixPath(str(video)) for video in videos]
        names = {(path.parent, path.name.partition(", clip ")[0]) for path in paths}
        noun = "videos" if count == len(names) else "groups of videos"
    over = f"{count} {noun}"
    if count == 1 and is_clustered:
        return f"{len(videos)} clips", f"; no interval: fewer than 2 {noun}"
    if lacking and count < FEWEST and (is_clustered or lacking == "ratios"):
        return over, f"; no interval of {lacking}: fewer than {FEWEST} {noun}"
    if count == 1:
        return over, "; no interval of means: fewer than 2 clips"
    return over, ""


def wilson(hits, count):
    """The 95% interval [low, high] of a share hits / count (Wilson, 1927), valid near 0 and 1 and
    for few clips.
    """
    middle = (hits + Z95**2 / 2) / (count + Z95**2)
    half = Z95 / (count + Z95**2) * math.sqrt(hits * (count - hits) / count + Z95**2 / 4)
    low = max(0.0, middle - half)  # rounding may exceed 0 or 1
    high = min(1.0, middle + half)
    return [low, high]


def share(hits, videos=()):
    """(the share of `hits` (N,) that are true, its 95% interval or None); hits may be shares, too.

    Both are None if N is 0. The interval is around this share, for as many hits as there are units.
    Shares of units vary less than single hits with the same mean, so it is cautious.
    """
    if not len(hits):
        return None, None
    mean = float(sum(hits) / len(hits))
    units = by_unit(hits, videos)
    is_clustered = len(units) < len(hits)
    interval = None
    if not is_clustered or len(units) >= FEWEST:
        interval = wilson(mean * len(units), len(units))
    return mean, interval


def shares(hits, videos=()):
    """{name: share, name_interval95: its interval} of {name: bool (N,)}; None if N is 0."""
    result = {}
    for name, of_clips in hits.items():
        result[name], result[f"{name}_interval95"] = share(of_clips, videos)
    return result


def mean_and_error(values):
    """The mean of values (None without any) and its standard error (None for fewer than two)."""
    mean = float(np.mean(values)) if len(values) else None
    if len(values) < 2:
        return mean, None
    return mean, float(np.std(values, ddof=1) / math.sqrt(len(values)))


def half95(units):
    """Half the width of Student's 95% interval of the mean of units (n, ...), without NaNs.

    NaN for fewer than two units.
    """
    finite = np.ma.masked_invalid(np.asarray(units))
    count = finite.count(axis=0)
    error = finite.std(axis=0, ddof=1) / np.sqrt(count)
    return stdtrit(count - 1, 0.975) * np.ma.filled(error, np.nan)


def mean_interval(values, videos=()):
    """Student's 95% interval [low, high] of the mean of values (N,), without NaNs.

    None for fewer than two units.
    """
    units = by_unit(values, videos)
    half = float(half95(units))
    if np.isnan(half):
        return None
    middle = float(np.nanmean(values))  # over the clips, as what is printed beside it
    return [middle - half, middle + half]


def ratio_interval(ratio, values, videos, *key):
    """The 95% interval of ratio(means of generated clips, means of real clips), by a bootstrap.

    values: of generated clips (N, ...) and of real clips (M, ...); videos: those of both. The key
    seeds the bootstrap, which draws units with all their clips. None for fewer than FEWEST units.
    """
    means = []
    for of_kind, of_videos, kind in zip(values, videos, ("generated", "real"), strict=True):
        units = by_unit(of_kind, of_videos)
        if len(units) < FEWEST:
            return None
        counts = Counter(map(unit_of, of_videos)) or dict.fromkeys(range(len(units)), 1)
        sizes = torch.tensor([*counts.values()], dtype=torch.float64)
        sizes = sizes.reshape(-1, *[1] * (units.dim() - 1))
        sums = bootstrap(units * sizes, *key, kind)
        means.append(sums / bootstrap(sizes, *key, kind))
    return interval95(ratio(*means))


def bootstrap(units, *key):
    """The means of RESAMPLES resamples of units (n, ...): (RESAMPLES, ...). The key seeds them."""
    random = generator(0, "bootstrap", *key)
    draws = torch.randint(len(units), (RESAMPLES, len(units)), generator=random)
    return units[draws].mean(dim=1)


def interval95(values):
    """[low, high] around 95% of the finite values (N,).

    A ratio of resamples of few clips may be infinite.
    """
    values = values[values.isfinite()]
    ends = torch.tensor([0.025, 0.975], dtype=values.dtype)
    return values.quantile(ends).tolist()


def psnr(frames, real, most=60.0):
    """PSNR in dB of uint8 arrays of one shape: NaN if they are empty, `most` if they are equal
    (rounding gives 59).
    """
    if not real.size:
        return np.nan
    error = np.mean(np.square(real.astype(float) - frames))
    if not error:
        return most
    return min(10 * np.log10(255**2 / error), most)


def cell(result, name, digits=3, interval=None):
    """A value of a result as text, with its 95% interval; "-" if it is None.

    interval: the interval's name.
    """
    if result.get(name) is None:
        return "-"
    text = f"{result[name]:.{digits}f}"
    ends = result.get(interval or f"{name}_interval95")
    if ends:
        text += f" ({ends[0]:.{digits}f} to {ends[1]:.{digits}f})"
    return text


def table(rows):
    """Rows of cells as lines of text: the first column is aligned left, the others right."""
    columns = itertools.zip_longest(*rows, fillvalue="")
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for first, *others in rows:
        cells = map(str.rjust, others, widths[1:])
        lines.append(" ".join([f"  {first:<{widths[0]}}", *cells]))
    return lines


def report(result, titles):
    """({name: value}, lines with intervals) of a result, for names in `titles` {name: title}."""
    values = {name: result[name] for name in titles if name in result}
    rows = [(titles[name], cell(result, name)) for name in values]
    return values, table(rows)
