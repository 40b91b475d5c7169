"""Plot the losses of runs against steps, training compute and wall time.

    python scripts/plot_metrics.py results/EXP --out loss.png
    python scripts/plot_metrics.py results/A/000-EqM-S-4-f4-rope results/B --out compare.png

A run folder holds one phase, or the phases of its --frames-schedule. A run that started from a
checkpoint of another given run continues that run's curve: steps are global, and its FLOPs and
seconds are added. Losses of clips of different lengths can't be compared, so validation then shows
the relative loss: 1 is the loss of a zero prediction.
"""

import engine  # noqa: F401
import itertools
import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from runtime.cli import (
    ArgumentParser,
    UserError,
    check_writable,
    one_line_errors,
    plural,
    say,
    wrong_input,
)
from runtime.metrics import read_metrics
from scoring.plots import COLORS, plt, save_figure
from video.drawing import drawable

METRICS = "metrics.jsonl"
X_AXES = {  # key in metrics.jsonl -> name of the axis, its units in units of the logged value
    "step": ("step", {"": 1}),
    "flops": (
        "training compute",
        {"EFLOP": 1e18, "PFLOP": 1e15, "TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6},
    ),
    "seconds": ("wall time", {"days": 86400, "h": 3600, "min": 60, "s": 1}),
}
CUMULATIVE = "flops", "seconds"  # counted from the start of a run
CURVES = [{"color": color, "linestyle": dashes} for dashes in ("-", "--", ":") for color in COLORS]
LOG_RATIO = 3  # the axis is logarithmic if highest loss / lowest loss exceeds this
plt.rcParams["text.parse_math"] = False  # names of folders may have a $


def parse_args():
    parser = ArgumentParser(
        description="Plot the losses of runs against steps, training compute and wall time."
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a run folder of train.py, or a folder of run folders",
    )
    parser.add_argument("--out", required=True, metavar="FILE.png", help="the figure")
    parser.add_argument(
        "--relative",
        action="store_true",
        help=(
            "plot relative losses, which you can compare across data sets and frame counts: 1 is a "
            "zero prediction's"
        ),
    )
    return parser.parse_args()


# Runs, and which one continues which --------------------------------------------------------------


@dataclass
class Curve:
    label: str
    # (frames, rows up to the start of the next phase); FLOPs and seconds count all phases
    phases: list

    @property
    def rows(self):
        return [row for _, rows in self.phases for row in rows]


def load_runs(places):
    """{run folder: its rows of metrics.jsonl, at least one} of all runs in these places.

    Raises UserError.
    """
    runs = {}
    for place in map(Path, places):
        files = (
            [place / METRICS] if (place / METRICS).exists() else sorted(place.glob(f"*/{METRICS}"))
        )
        found = {}
        for file in files:
            rows, torn = read_metrics(file)
            found |= {file.parent.resolve(): rows} if rows else {}
            if torn:
                say(f"{file}: {plural(torn, 'torn line')} skipped")
        if not found:
            what = f"{METRICS} has no step yet" if files else f"no {METRICS}, nor a folder with one"
            raise UserError(
                f"RUN {place}: {what}; name a run folder of train.py that has logged a step"
            )
        runs |= found
    return runs


def make_curves(runs):
    """A curve for each run that no other run continues."""
    starts = {folder: find_start(folder, runs) for folder in runs}
    continued = {start[1] for start in starts.values() if start}
    return [make_curve(folder, runs, starts) for folder in runs if folder not in continued]


def find_start(folder, runs):
    """(step of the checkpoint that a run started from, folder of that run).

    None if the folder is not in `runs`.
    """
    first = runs[folder][0]["step"]
    config = json.loads((folder / "config.json").read_text())
    if not config["training"]["ckpt"]:
        return None  # from scratch
    ckpt = Path(config["training"]["ckpt"])
    run = ckpt.parts[-4:-2]  # EXP/RUN of EXP/RUN/checkpoints/FILE; folders above EXP may have moved
    step = int(ckpt.stem) if ckpt.stem.isdecimal() else first - 1  # best.pt has no step in its name
    found = [
        other
        for other, rows in runs.items()
        if other.parts[-len(run) :] == run and rows[0]["step"] <= step
    ]
    if run and found:
        # its own experiment first
        return step, min(found, key=lambda other: other.parent != folder.parent)
    say(
        f"{folder.name}: its start {ckpt} is not one of these runs; FLOPs and seconds count from "
        "there"
    )
    return None


def make_curve(folder, runs, starts):
    """The Curve of a run and all its predecessors."""
    chain = [(math.inf, folder)]  # (last step on the curve, run)
    while start := starts[chain[0][1]]:
        chain.insert(0, start)
    phases = []
    before = {}
    for last, part in chain:
        rows = [row for row in runs[part] if row["step"] <= last]
        rows = [
            row | {name: row[name] + before.get(name, 0) for name in CUMULATIVE if name in row}
            for row in rows
        ]
        before = {name: rows[-1].get(name, 0) for name in CUMULATIVE}
        for num_frames, group in itertools.groupby(rows, key=lambda row: row.get("num_frames")):
            phases.append((f"f{num_frames}" if num_frames else part.name, list(group)))
    return Curve(f"{folder.parent.name}/{folder.name}", phases)


# The figure ---------------------------------------------------------------------------------------


def plot_curves(curves, relative=False):
    """The figure: rows for training and validation losses, columns for X_AXES of all curves."""
    rows = [row for curve in curves for row in curve.rows]
    longest = max(len(curve.rows) for curve in curves)
    # window: lines that a thick curve averages
    names = {*itertools.chain(*rows)}
    window = max(1, longest // 20)
    losses = {
        "training": "train_loss" + "_rel" * relative,
        "validation": validation_loss(rows, relative),
    }
    losses = {title: name for title, name in losses.items() if title == "training" or name in names}
    axes = [axis for axis in X_AXES if all(axis in row for row in rows)]
    size = 1 + 5.5 * len(axes), 3 + 3.5 * len(losses)
    figure, grid = plt.subplots(
        len(losses), len(axes), figsize=size, sharex="col", sharey="row", squeeze=False
    )
    for panels, axis in zip(grid.T, axes, strict=True):
        plot_column(panels, axis, curves, [*losses.values()], window)
    for panel, (title, name) in zip(grid[:, 0], losses.items(), strict=True):
        scale_losses(panel)
        panel.set_ylabel(f"{title} loss" + (" / loss of zero" if name.endswith("_rel") else ""))
    labels = [drawable(curve.label, f"run {number}") for number, curve in enumerate(curves)]
    lines = [style | {"label": label} for label, style in zip(labels, itertools.cycle(CURVES))]
    if window > 1:
        lines.append(
            {
                "color": "none",
                "label": f"training: thin as logged, thick the mean of {window} lines",
            }
        )
    handles = [plt.Line2D([], [], linewidth=2, **line) for line in lines]
    figure.legend(handles=handles, loc="outside lower center", frameon=False)
    return figure


def validation_loss(rows, relative):
    """Which validation loss to plot: the relative one if clip lengths differ and it was logged."""
    rows = [row for row in rows if "val_loss" in row]
    lengths = {row.get("num_frames") for row in rows}
    is_logged = all("val_loss_rel" in row for row in rows)
    return "val_loss_rel" if relative or (len(lengths) > 1 and is_logged) else "val_loss"


def plot_column(panels, axis, curves, losses, window):
    """Training and, if there is a second panel, validation losses against one of X_AXES.

    losses: their names.
    """
    (name, units) = X_AXES[axis]
    longest = max(curve.rows[-1][axis] for curve in curves)
    unit, size = next(
        (pair for pair in units.items() if longest >= 2 * pair[1]), [*units.items()][-1]
    )
    for curve, style in zip(curves, itertools.cycle(CURVES)):
        line = partial(points, curve, axis, size)
        if window > 1:
            panels[0].plot(*line(losses[0]), **style, linewidth=0.8, alpha=0.6)
        panels[0].plot(*line(losses[0], window), **style, linewidth=2)
        for panel, loss in zip(panels[1:], losses[1:], strict=True):
            panel.plot(*line(loss), **style, linewidth=2, marker=".", markersize=8)
    mark_phases(panels, curves, axis, size)
    panels[-1].set_xlabel(f"{name} ({unit})" if unit else name)
    panels[-1].xaxis.set(
        major_locator=MaxNLocator(5), major_formatter=FuncFormatter(lambda x, _: f"{x:,.10g}")
    )


def points(curve, axis, size, name, window=1):
    """x and y (n,) of the rows that have a `name`.

    y is smoothed within each phase, and NaN where it is not finite.
    """
    parts = []
    for _, rows in curve.phases:
        pairs = [(row[axis] / size, row[name]) for row in rows if name in row]
        x, y = np.array(pairs, float).reshape(-1, 2).T
        parts.append((x, smooth(y, window) if window > 1 else y))
    return np.hstack(parts)


def smooth(y, window):
    """Mean over `window` values around each value of y (n,), fewer at both ends, without NaNs."""
    first = np.arange(len(y)) - window // 2
    first, last = first.clip(0), (first + window).clip(max=len(y))
    sums, counts = (np.cumsum([0, *part]) for part in (np.nan_to_num(y), np.isfinite(y)))
    with np.errstate(invalid="ignore"):  # a window of NaNs only
        return (sums[last] - sums[first]) / (counts[last] - counts[first])


def mark_phases(panels, curves, axis, size):
    """Gray bands and names for the first curve's phases, dotted lines at borders of the others'."""
    ends = [[rows[-1][axis] / size for _, rows in curve.phases] for curve in curves]
    borders = [curves[0].rows[0][axis] / size, *ends[0]]
    place = panels[0].get_xaxis_transform()
    for i, (frames, _) in enumerate(curves[0].phases if len(ends[0]) > 1 else []):
        for panel in panels:
            panel.axvspan(
                *borders[i : i + 2], color="black", alpha=0.02 + 0.07 * (i % 2), linewidth=0
            )
        middle = sum(borders[i : i + 2]) / 2
        panels[0].text(middle, 1.01, frames, ha="center", va="bottom", fontsize=12, transform=place)
    for own, style in zip(ends, itertools.cycle(CURVES)):
        for end, panel in itertools.product(
            [end for end in own[:-1] if end not in borders], panels
        ):
            panel.axvline(end, color=style["color"], linestyle=":", linewidth=1.5)


def scale_losses(panel):
    """Make the axis logarithmic if the losses span more than LOG_RATIO."""
    low, high = panel.dataLim.intervaly
    if 0 < low < high / LOG_RATIO:
        panel.set_yscale("log")
        ticks = LogLocator(subs=(1, 2, 5) if high / low > 20 else (1, 1.5, 2, 3, 4, 5, 7))
        plain = FuncFormatter(lambda y, _: f"{y:g}")
        panel.yaxis.set(major_locator=ticks, major_formatter=plain, minor_locator=NullLocator())


@one_line_errors()
def main():
    args = parse_args()
    with wrong_input():
        if not args.out.lower().endswith(".png") or Path(args.out).is_dir():
            raise UserError(
                f"--out {args.out}: not the name of a PNG file; expected one such as loss.png"
            )
        check_writable("--out", Path(args.out).parent)
        curves = make_curves(load_runs(args.runs))
        loss = "train_loss_rel" if args.relative else "train_loss"
        for curve in curves:
            if not any(loss in row for row in curve.rows):
                raise UserError(
                    f"RUN {curve.label}: {METRICS} has no {loss}; name a run folder of train.py"
                )
            for axis in X_AXES:
                if not all(axis in row for row in curve.rows):
                    say(f"no {axis} logged, so no curves against {X_AXES[axis][0]}: {curve.label}")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    save_figure(plot_curves(curves, args.relative), args.out)
    say(f"{args.out}: {plural(len(curves), 'curve')}")


if __name__ == "__main__":
    main()
