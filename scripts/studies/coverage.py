"""Simulate how often the 95% intervals of evaluate.py contain the true value.

    python scripts/studies/coverage.py                    about two minutes of one core

There are few units (videos, or groups of videos) with several clips each. Half of the variance is
between units, half between the clips of a unit. The intervals are those of EqM/scoring/stats.py;
those of earlier versions are beside them. The script writes coverage.md and .json in
results/studies/statistics.
"""

import itertools
import operator

import lab

# isort: split
import numpy as np

from runtime.cli import COUNT, one_line_errors
from scoring import stats

UNITS = 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 30
MANY_UNITS = 10, 12, 16, 20, 30  # where clustered shares and ratios have an interval
CLIPS = 4  # of each unit, in other class folders
SHARES = 0.5, 0.9, 0.97
GENERATED = 96  # independent clips, above the real ones of a ratio
DRAWS = {  # (random generator, shape) -> values with mean 0 and variance 1
    "normal": lambda random, shape: random.normal(size=shape),
    "skewed": lambda random, shape: random.exponential(size=shape) - 1,
}
SEED = 0


def videos_of(count):
    """The videos of CLIPS clips of each of `count` units."""
    pairs = itertools.product(range(CLIPS), range(count))
    return [f"Class{clip}/person{unit}.mkv" for clip, unit in pairs]


def draw_clustered(draw, random, shape):
    """Values (clips, repeats) with mean 0 and variance 1, half of it between units.

    draw: one of DRAWS; shape: (units, repeats).
    """
    units = draw(random, shape)
    clips = draw(random, (CLIPS, *shape))
    values = units + clips
    values = values / 2**0.5
    return values.reshape(-1, shape[1])


def bootstrap_before(units, random):
    """The interval of earlier versions: quantiles of means of resamples of units (n, repeats)."""
    count = len(units)
    # How often each of 1,000 resamples has each unit
    times = random.multinomial(count, [1 / count] * count, size=1000)
    means = times @ units / count
    return np.quantile(means, [0.025, 0.975], axis=0)


def normal_before(units):
    """The interval of earlier versions by frame: 1.96 standard errors, which divide by n."""
    middle = units.mean(axis=0)
    standard_error = units.std(axis=0) / len(units) ** 0.5
    half = 1.96 * standard_error
    return middle - half, middle + half


def holds(interval, true):
    """The share of intervals, (lows, highs), that contain the true value."""
    low, high = interval
    is_inside = (low <= true) & (true <= high)
    return float(is_inside.mean())


def cover_means(repeats):
    """A row for each kind of values and number of units: coverage of the mean's intervals."""
    rows = []
    for kind, count in itertools.product(DRAWS, UNITS):
        random = np.random.default_rng([SEED, count])
        values = draw_clustered(DRAWS[kind], random, (count, repeats))
        units = stats.by_unit(values, videos_of(count)).numpy()
        half = stats.half95(units)
        middle = units.mean(axis=0)
        rows.append(
            {
                "values": kind,
                "units": count,
                "t": holds((middle - half, middle + half), 0),
                "bootstrap": holds(bootstrap_before(units, random), 0),
                "normal": holds(normal_before(units), 0),
            }
        )
    return rows


def cover_shares(repeats):
    """A row for each share and number of units: coverage over units, and over clips."""
    rows = []
    for true, count in itertools.product(SHARES, MANY_UNITS):
        random = np.random.default_rng([SEED, count])
        # half of the variance is between units
        chances = random.beta(true, 1 - true, (repeats, count))
        draws = random.random((repeats, CLIPS, count))
        hits = draws < chances[:, None]
        hits = hits.reshape(repeats, CLIPS * count)
        rows.append(
            {
                "share": true,
                "units": count,
                "over_units": holds_share(hits, true, videos_of(count)),
                "over_clips": holds_share(hits, true),
            }
        )
    return rows


def holds_share(hits, true, videos=()):
    """The share of Wilson's intervals of hits (repeats, N) that hold the true share."""
    intervals = [stats.share(row, videos)[1] for row in hits]
    return holds(np.transpose(intervals), true)


def cover_independent_shares(repeats):
    """A row for each share and number of independent clips: coverage of Wilson's interval."""
    rows = []
    for true, count in itertools.product(SHARES, (3, 5, *MANY_UNITS)):
        random = np.random.default_rng([SEED, count])
        hits = random.random((repeats, count)) < true
        rows.append({"share": true, "clips": count, "wilson": holds_share(hits, true)})
    return rows


def cover_ratios(repeats):
    """A row for each number of units of the real clips: coverage of a ratio of means (1)."""
    rows = []
    for count in MANY_UNITS:
        random = np.random.default_rng([SEED, count])
        noise = draw_clustered(DRAWS["normal"], random, (count, repeats))
        real = 1 + noise / 4
        noise = random.normal(size=(GENERATED, repeats))
        generated = 1 + noise / 4
        videos = range(GENERATED), videos_of(count)
        intervals = []
        for values in zip(generated.T, real.T, strict=True):
            interval = stats.ratio_interval(operator.truediv, values, videos, "coverage")
            intervals.append(interval)
        rows.append({"units": count, "bootstrap": holds(np.transpose(intervals), 1)})
    return rows


def percent_table(titles, rows, count, *shares):
    """Lines of markdown: the value `count` of each row, then its shares in percent."""
    cells = []
    for row in rows:
        percents = [f"{100 * row[name]:.1f}" for name in shares]
        cells.append([str(row[count]), *percents])
    return lab.table(titles, cells)


def markdown(content):
    """The lines of coverage.md."""
    few = f"{content['repeats']:,} data sets each"
    missing = f"For fewer than {stats.FEWEST} units, no interval is printed."
    text = f"""\
# Coverage of the 95% intervals

`scripts/studies/coverage.py` wrote these tables. A cell is the share (%) of simulated data
sets whose 95% interval holds the true value, so about 95 is right. Each unit (a video, or
videos of one person) has {CLIPS} clips. Half of the variance is between units.

## Means

{content["repeats_of_means"]:,} data sets each. *Bootstrap* and *1.96* are the intervals of
earlier versions: quantiles of a bootstrap of the units, and 1.96 standard errors that divide
by n. Skewed values are exponential.
"""
    lines = text.split("\n")
    for kind in DRAWS:
        titles = [f"units, {kind} values", "Student's t", "bootstrap", "1.96"]
        rows = lab.rows_with({"values": kind}, content["means"])
        lines += percent_table(titles, rows, "units", "t", "bootstrap", "normal")

    lines += ["## Shares of clips that share units", ""]
    lines += [f"{few}. *Over clips*: as if the clips were independent. {missing}", ""]
    titles = ["units", "true share (%)", "Wilson over units", "Wilson over clips"]
    rows = content["shares"]
    lines += percent_table(titles, rows, "units", "share", "over_units", "over_clips")

    lines += ["## Shares of independent clips", "", f"{few}.", ""]
    titles = ["clips", "true share (%)", "Wilson"]
    rows = content["independent_shares"]
    lines += percent_table(titles, rows, "clips", "share", "wilson")

    lines += ["## Ratios of two means", ""]
    lines += [f"{few}, with {GENERATED} independent generated clips. {missing}", ""]
    titles = ["units of the real clips", "bootstrap"]
    return lines + percent_table(titles, content["ratios"], "units", "bootstrap")


def parse_args():
    parser = lab.out_parser(__doc__, "statistics", "the tables")
    parser.add_argument(
        "--repeats",
        type=COUNT,
        default=20_000,
        help="simulated data sets of a mean; a tenth of them for shares and ratios; default: 20000",
    )
    return parser.parse_args()


@one_line_errors()
def main():
    args = parse_args()
    few = max(1, args.repeats // 10)
    content = {
        "repeats_of_means": args.repeats,
        "repeats": few,
        "means": cover_means(args.repeats),
        "shares": cover_shares(few),
        "independent_shares": cover_independent_shares(few),
        "ratios": cover_ratios(few),
    }
    content = {"made": lab.made()} | content
    lab.write_results(args.out, "coverage", markdown(content), content)


if __name__ == "__main__":
    main()
