"""Plot the losses of runs against steps, training compute and wall time.

    python scripts/plot_metrics.py results/EXP --out loss.png
    python scripts/plot_metrics.py results/A/000-EqM-S-4-f4-rope results/B --out compare.png

A run folder holds one phase, or those of its --frames-schedule. A run that started from a checkpoint of another given
run continues its curve: steps are global, and FLOPs and seconds are added to those of the run before at that step.
"""

import itertools
import json
import math
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "EqM"))
from runtime.cli import COUNT, ArgumentParser, UserError, check_writable, fail, one_line_errors, say
from runtime.metrics import read_metrics
from scoring.plots import COLORS, MARKERS, plt, save_figure

METRICS = "metrics.jsonl"
X_AXES = {  # key in metrics.jsonl -> name of the axis, its units in units of the logged value
    "step": ("step", {"": 1}),
    "flops": ("training compute", {"EFLOP": 1e18, "PFLOP": 1e15, "TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6}),
    "seconds": ("wall time", {"days": 86400, "h": 3600, "min": 60, "s": 1}),
}
CUMULATIVE = "flops", "seconds"  # counted from the start of a run
CURVES = [{"color": color, "linestyle": dashes} for dashes in ("-", "--", ":") for color in COLORS]
COUNTS = [{"marker": marker, "fillstyle": "none", "markersize": 7, "linewidth": 0.7} for marker in MARKERS]
LOG_RATIO = 3  # highest loss / lowest above which the axis is logarithmic
plt.rcParams["text.parse_math"] = False  # names of folders may hold a $


def parse_args():
    parser = ArgumentParser(description="Plot the losses of runs against steps, training compute and wall time.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder of train.py, or a folder of run folders")
    parser.add_argument("--out", required=True, metavar="FILE.png", help="the figure")
    share = "plot losses divided by that of a zero prediction, which compare across data sets and frame counts"
    parser.add_argument("--relative", action="store_true", help=share)
    mean = "smooth the training loss over N logged lines; 1 = off; default: a twentieth of the longest curve"
    parser.add_argument("--smooth", type=COUNT, help=mean)
    return parser.parse_args()


# ----------------------------------------------------------------------------------------------------------------------
# Runs, and which one continues which


@dataclass
class Curve:
    label: str
    phases: list  # (frames, rows), each with its rows up to where the next one started; FLOPs and seconds add up

    @property
    def rows(self):
        return [row for _, rows in self.phases for row in rows]


def load_runs(places):
    """{folder: its rows of metrics.jsonl, at least one} of the run folders in these places. Raises UserError."""
    runs = {}
    for place in map(Path, places):
        files = [place / METRICS] if (place / METRICS).exists() else sorted(place.glob(f"*/{METRICS}"))
        found = {}
        for file in files:
            rows, torn = read_metrics(file)
            found |= {file.parent.resolve(): rows} if rows else {}
            if torn:
                say(f"{file}: {torn} torn {'line' if torn == 1 else 'lines'} skipped")
        if not found:
            what = f"{METRICS} has no step yet" if files else f"no {METRICS}, nor a folder with one"
            raise UserError(f"RUN {place}: {what}; name a run folder of train.py that has logged a step")
        runs |= found
    return runs


def make_curves(runs):
    """A curve for each run that no other continues, with all its predecessors."""
    starts = {folder: find_start(folder, runs) for folder in runs}
    continued = {start[1] for start in starts.values() if start}
    return [make_curve(folder, runs, starts) for folder in runs if folder not in continued]


def find_start(folder, runs):
    """(step of the checkpoint that a run started from, folder of its run); None if that is not among `runs`.

    A resumed run only knows that it started from itself: it continues the run beside it that ended last before it.
    """
    first, config = runs[folder][0]["step"], json.loads((folder / "config.json").read_text())
    if not config["training"]["ckpt"]:
        return None  # from scratch
    ckpt = Path(config["training"]["ckpt"])
    run = ckpt.parts[-4:-2]  # of EXP/RUN/checkpoints/FILE; folders above EXP may have moved
    if folder.parts[-len(run) :] == run:
        beside = [(rows[-1]["step"], other) for other, rows in runs.items() if other.parent == folder.parent]
        return max((start for start in beside if start[0] < first), default=None)
    step = int(ckpt.stem) if ckpt.stem.isdecimal() else first - 1  # the name best.pt holds no step
    found = [other for other, rows in runs.items() if other.parts[-len(run) :] == run and rows[0]["step"] <= step]
    if run and found:
        return step, min(found, key=lambda other: other.parent != folder.parent)  # its own experiment first
    say(f"{folder.name}: its start {ckpt} is not of these runs; FLOPs and seconds count from there")
    return None


def make_curve(folder, runs, starts):
    """The Curve of a run and all its predecessors."""
    chain = [(math.inf, folder)]  # runs, each with the last step of it that the curve has
    while start := starts[chain[0][1]]:
        chain.insert(0, start)
    phases, before = [], {}
    for last, part in chain:
        rows = [row for row in runs[part] if row["step"] <= last]
        rows = [row | {name: row[name] + before.get(name, 0) for name in CUMULATIVE if name in row} for row in rows]
        before = {name: rows[-1].get(name, 0) for name in CUMULATIVE}
        for num_frames, group in itertools.groupby(rows, key=lambda row: row.get("num_frames")):
            phases.append((f"f{num_frames}" if num_frames else part.name, list(group)))
    return Curve(f"{folder.parent.name}/{folder.name}", phases)


# ----------------------------------------------------------------------------------------------------------------------
# The figure


def plot_curves(curves, relative=False, window=None):
    """The figure: rows for training and validation losses, a column for each of X_AXES that all curves have."""
    rows, longest = [row for curve in curves for row in curve.rows], max(len(curve.rows) for curve in curves)
    names, window, ending = {*itertools.chain(*rows)}, window or max(1, longest // 20), "_rel" if relative else ""
    found = (re.fullmatch(rf"val_loss{ending}_f(\d+)", name) for name in names)
    counts = dict(zip(sorted(int(match[1]) for match in found if match), itertools.cycle(COUNTS)))
    axes = [axis for axis in X_AXES if all(axis in row for row in rows)]
    titles = ["training", "validation"] if f"val_loss{ending}" in names else ["training"]
    size = 1 + 5.5 * len(axes), 3 + 3.5 * len(titles)
    figure, grid = plt.subplots(len(titles), len(axes), figsize=size, sharex="col", sharey="row", squeeze=False)
    for panels, axis in zip(grid.T, axes, strict=True):
        plot_column(panels, axis, curves, ending, window, counts)
    for panel, title in zip(grid[:, 0], titles, strict=True):
        scale_losses(panel)
        panel.set_ylabel(f"{title} loss" + (" / loss of zero" if relative else ""))
    if counts:
        handles = [plt.Line2D([], [], color="black", label=f"{count} frames", **counts[count]) for count in counts]
        grid[1, 0].legend(handles=handles, title="thick: as in training", fontsize=11, title_fontsize=11)
    lines = [style | {"label": curve.label} for curve, style in zip(curves, itertools.cycle(CURVES))]
    if window > 1:
        lines.append({"color": "none", "label": f"training: thin as logged, thick the mean of {window} lines"})
    handles = [plt.Line2D([], [], linewidth=2, **line) for line in lines]
    figure.legend(handles=handles, loc="outside lower center", frameon=False)
    return figure


def plot_column(panels, axis, curves, ending, window, counts):
    """Training and, in a second panel, validation losses against one of X_AXES."""
    (name, units), longest = X_AXES[axis], max(curve.rows[-1][axis] for curve in curves)
    unit, size = next((pair for pair in units.items() if longest >= 2 * pair[1]), [*units.items()][-1])
    for curve, style in zip(curves, itertools.cycle(CURVES)):
        line = partial(points, curve, axis, size)
        if window > 1:
            panels[0].plot(*line(f"train_loss{ending}"), **style, linewidth=0.8, alpha=0.6)
        panels[0].plot(*line(f"train_loss{ending}", window), **style, linewidth=2)
        for panel in panels[1:]:
            panel.plot(*line(f"val_loss{ending}"), **style, linewidth=2, marker=".", markersize=8)
            for count, marker in counts.items():
                panel.plot(*line(f"val_loss{ending}_f{count}"), color=style["color"], **marker)
    mark_phases(panels, curves, axis, size)
    panels[-1].set_xlabel(f"{name} ({unit})" if unit else name)
    panels[-1].xaxis.set(major_locator=MaxNLocator(5), major_formatter=FuncFormatter(lambda x, _: f"{x:,.10g}"))


def points(curve, axis, size, name, window=1):
    """x and y (n,) of the rows with a value `name`, NaN where it was not finite; y: means within the phase."""
    parts = []
    for _, rows in curve.phases:
        pairs = [(row[axis] / size, row[name]) for row in rows if name in row]
        x, y = np.array(pairs, float).reshape(-1, 2).T
        parts.append((x, smooth(y, window) if window > 1 else y))
    return np.hstack(parts)


def smooth(y, window):
    """Mean over the `window` values around each value of y (n,), fewer at both ends; NaN does not count."""
    first = np.arange(len(y)) - window // 2
    first, last = first.clip(0), (first + window).clip(max=len(y))
    sums, counts = (np.cumsum([0, *part]) for part in (np.nan_to_num(y), np.isfinite(y)))
    with np.errstate(invalid="ignore"):  # a window with nothing but NaN
        return (sums[last] - sums[first]) / (counts[last] - counts[first])


def mark_phases(panels, curves, axis, size):
    """Gray bands and names for the phases of the first curve, dotted lines at the phase borders of the others."""
    ends = [[rows[-1][axis] / size for _, rows in curve.phases] for curve in curves]
    borders, place = [curves[0].rows[0][axis] / size, *ends[0]], panels[0].get_xaxis_transform()
    for i, (frames, _) in enumerate(curves[0].phases if len(ends[0]) > 1 else []):
        for panel in panels:
            panel.axvspan(*borders[i : i + 2], color="black", alpha=0.02 + 0.07 * (i % 2), linewidth=0)
        middle = sum(borders[i : i + 2]) / 2
        panels[0].text(middle, 1.01, frames, ha="center", va="bottom", fontsize=12, transform=place)
    for own, style in zip(ends, itertools.cycle(CURVES)):
        for end, panel in itertools.product([end for end in own[:-1] if end not in borders], panels):
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
    try:
        if not args.out.lower().endswith(".png") or Path(args.out).is_dir():
            raise UserError(f"--out {args.out}: not the name of a PNG file; expected one such as loss.png")
        check_writable("--out", Path(args.out).parent)
        curves, loss = make_curves(load_runs(args.runs)), "train_loss_rel" if args.relative else "train_loss"
        for curve in curves:
            if not any(loss in row for row in curve.rows):
                raise UserError(f"RUN {curve.label}: {METRICS} has no {loss}; name a run folder of train.py")
            for axis in X_AXES:
                if not all(axis in row for row in curve.rows):
                    say(f"no {axis} logged, so no curves against {X_AXES[axis][0]}: {curve.label}")
    except UserError as error:
        fail(error)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    save_figure(plot_curves(curves, args.relative, args.smooth), args.out)
    say(f"{args.out}: {len(curves)} {'curve' if len(curves) == 1 else 'curves'}")


if __name__ == "__main__":
    main()
