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
import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

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
from runtime.untrusted import read_json
from scoring.plots import COLORS, plt, save_figure
from video.drawing import drawable

METRICS = "metrics.jsonl"
COMPUTE = {"EFLOP": 1e18, "PFLOP": 1e15, "TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6}
TIME = {"days": 86400, "h": 3600, "min": 60, "s": 1}
X_AXES = {  # key in metrics.jsonl -> name of the axis, its units in units of the logged value
    "step": ("step", {"": 1}),
    "flops": ("training compute", COMPUTE),
    "seconds": ("wall time", TIME),
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


def load_runs(folders):
    """{run folder: its rows of metrics.jsonl, at least one} of all runs in these folders.

    Skips runs of train_vae.py in a folder of runs. Raises UserError.
    """
    runs = {}
    for folder in map(Path, folders):
        files = sorted(folder.glob(f"*/{METRICS}"))
        if (folder / METRICS).exists():
            files = [folder / METRICS]
        logged = {}
        for file in files:
            rows, torn = read_metrics(file)
            if rows and file.parent != folder and "ckpt" not in flags_of(file.parent):
                say(f"{file.parent}: a run of train_vae.py is skipped; name its folder to plot it")
            elif rows:
                logged[file.parent.resolve()] = rows
            if torn:
                say(f"{file}: {plural(torn, 'torn line')} skipped")
        if not logged:
            what = f"{METRICS} has no step yet" if files else f"no {METRICS}, nor a folder with one"
            raise UserError(
                f"RUN {folder}: {what}; name a run folder of train.py that has logged a step"
            )
        runs |= logged
    return runs


def flags_of(folder):
    """{flag: value} of a run, from its config.json. Raises UserError."""
    try:
        return dict(read_json(folder / "config.json")["training"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"RUN {folder}: its config.json is not that of a run ({error!r}); restore it, or name "
            "other runs"
        ) from error


def make_curves(runs):
    """A curve for each run that no other run continues."""
    starts = {folder: find_start(folder, runs) for folder in runs}
    continued = {start[1] for start in starts.values() if start}
    return [make_curve(folder, runs, starts) for folder in runs if folder not in continued]


def find_start(folder, runs):
    """(step of the checkpoint that a run started from, folder of that run).

    None if the folder is not in `runs`.
    """
    ckpt = flags_of(folder).get("ckpt")
    if not ckpt:
        return None  # from scratch
    ckpt = Path(ckpt)
    run = ckpt.parts[-4:-2]  # EXP/RUN of EXP/RUN/checkpoints/FILE; folders above EXP may have moved
    step = start_step(folder, ckpt, runs[folder])
    candidates = [
        other
        for other, rows in runs.items()
        if other.parts[-len(run) :] == run and rows[0]["step"] <= step
    ]
    if not candidates:
        say(
            f"{folder.name}: its start {ckpt} is not one of these runs; FLOPs and seconds count "
            "from there"
        )
        return None
    # its own experiment first
    return step, min(candidates, key=lambda other: other.parent != folder.parent)


def start_step(folder, ckpt, rows):
    """The step of the checkpoint that a run started from."""
    if ckpt.stem.isdecimal():
        return int(ckpt.stem)
    # best.pt and latest.pt have no step in their names, but the log begins with it
    log = folder / "log.txt"
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    began = re.search(r"steps (\d+) to \d+$", text, re.MULTILINE)
    return int(began[1]) if began else rows[0]["step"] - 1


def make_curve(folder, runs, starts):
    """The Curve of a run and all its predecessors."""
    chain = [(math.inf, folder)]  # (last step on the curve, run)
    start = starts[folder]
    while start:
        chain.insert(0, start)
        start = starts[start[1]]
    phases = []
    before = dict.fromkeys(CUMULATIVE, 0)
    for last, run in chain:
        rows = [dict(row) for row in runs[run] if row["step"] <= last]
        for name in CUMULATIVE:
            for row in rows:
                if name in row:
                    row[name] += before[name]
            before[name] = rows[-1].get(name, 0)
        for num_frames, group in itertools.groupby(rows, key=lambda row: row.get("num_frames")):
            name = f"f{num_frames}" if num_frames else run.name
            phases.append((name, list(group)))
    return Curve(f"{folder.parent.name}/{folder.name}", phases)


# The figure ---------------------------------------------------------------------------------------


def plot_curves(curves, relative=False):
    """The figure: rows for training and validation losses, columns for X_AXES of all curves."""
    rows = [row for curve in curves for row in curve.rows]
    longest = max(len(curve.rows) for curve in curves)
    window = max(1, longest // 20)  # lines that a thick curve averages
    losses = {"training": "train_loss_rel" if relative else "train_loss"}
    validation = validation_loss(rows, relative)
    if any(validation in row for row in rows):
        losses["validation"] = validation
    logged = set(rows[0]).intersection(*rows)  # by each run at each step
    axes = [axis for axis in X_AXES if axis in logged]
    figure, grid = plt.subplots(
        nrows=len(losses),
        ncols=len(axes),
        figsize=(1 + 5.5 * len(axes), 3 + 3.5 * len(losses)),
        sharex="col",
        sharey="row",
        squeeze=False,
    )
    for column, axis in enumerate(axes):
        plot_column(
            panels=grid[:, column],
            axis=axis,
            curves=curves,
            losses=list(losses.values()),
            window=window,
        )
    for panel, title in zip(grid[:, 0], losses, strict=True):
        scale_losses(panel)
        unit = " / loss of zero" if losses[title].endswith("_rel") else ""
        panel.set_ylabel(f"{title} loss{unit}")
    handles = []
    for number, (curve, style) in enumerate(zip(curves, itertools.cycle(CURVES))):
        label = drawable(curve.label, f"run {number}")
        handles.append(plt.Line2D([], [], linewidth=2, label=label, **style))
    if window > 1:
        note = f"training: thin as logged, thick the mean of {window} lines"
        handles.append(plt.Line2D([], [], color="none", label=note))
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
    name, units = X_AXES[axis]
    longest = max(curve.rows[-1][axis] for curve in curves)
    large = [unit for unit in units if longest >= 2 * units[unit]]
    unit = large[0] if large else min(units, key=units.get)
    size = units[unit]
    training, *others = panels
    for curve, style in zip(curves, itertools.cycle(CURVES)):
        thick = style | {"linewidth": 2}
        line = partial(points, curve, axis, size)
        if window > 1:
            training.plot(*line(losses[0]), **style, linewidth=0.8, alpha=0.6)
        training.plot(*line(losses[0], window), **thick)
        for panel in others:
            panel.plot(*line(losses[1]), **thick, marker=".", markersize=8)
    mark_phases(panels=panels, curves=curves, axis=axis, size=size)
    lowest = panels[-1]
    lowest.set_xlabel(f"{name} ({unit})" if unit else name)
    lowest.xaxis.set_major_locator(MaxNLocator(5))
    lowest.xaxis.set_major_formatter("{x:,.10g}")


def points(curve, axis, size, name, window=1):
    """x and y (n,) of the rows that have a `name`.

    y is smoothed within each phase, and NaN where it is not finite.
    """
    parts = []
    for _, rows in curve.phases:
        rows = [row for row in rows if name in row]
        x = [row[axis] / size for row in rows]
        y = np.array([row[name] for row in rows], float)
        if window > 1:
            y = smooth(y, window)
        parts.append((x, y))
    return np.hstack(parts)


def smooth(y, window):
    """Mean over `window` values around each value of y (n,), fewer at both ends, of finite ones."""
    first = np.arange(len(y)) - window // 2
    last = (first + window).clip(max=len(y))
    first = first.clip(0)
    is_finite = np.isfinite(y)
    sums = np.cumsum([0, *np.where(is_finite, y, 0)])
    counts = np.cumsum([0, *is_finite])
    with np.errstate(invalid="ignore"):  # no finite value in a window
        return (sums[last] - sums[first]) / (counts[last] - counts[first])


def mark_phases(panels, curves, axis, size):
    """Gray bands and names for the first curve's phases, dotted lines at borders of the others'."""
    first = curves[0]
    right = first.rows[0][axis] / size
    borders = [right]
    for name, rows in first.phases:
        left = right
        right = rows[-1][axis] / size
        borders.append(right)
        if len(first.phases) == 1:
            continue
        for panel in panels:
            alpha = 0.02 + 0.07 * (len(borders) % 2)
            panel.axvspan(left, right, color="black", alpha=alpha, linewidth=0)
        panels[0].text(
            (left + right) / 2,
            1.01,
            name,
            ha="center",
            va="bottom",
            fontsize=12,
            transform=panels[0].get_xaxis_transform(),
        )
    for curve, style in zip(curves, itertools.cycle(CURVES)):
        for _, rows in curve.phases[:-1]:
            end = rows[-1][axis] / size
            if end in borders:
                continue
            for panel in panels:
                panel.axvline(end, color=style["color"], linestyle=":", linewidth=1.5)


def scale_losses(panel):
    """Make the axis logarithmic if the losses span more than LOG_RATIO."""
    low, high = panel.dataLim.intervaly
    if not 0 < low < high / LOG_RATIO:
        return
    panel.set_yscale("log")
    digits = (1, 1.5, 2, 3, 4, 5, 7)
    if high / low > 20:
        digits = (1, 2, 5)
    panel.yaxis.set_major_locator(LogLocator(subs=digits))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_locator(NullLocator())


@one_line_errors()
def main():
    args = parse_args()
    out = Path(args.out)
    with wrong_input():
        if not args.out.lower().endswith(".png") or out.is_dir():
            raise UserError(
                f"--out {args.out}: not the name of a PNG file; expected one such as loss.png"
            )
        check_writable("--out", out.parent)
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
    out.parent.mkdir(parents=True, exist_ok=True)
    save_figure(plot_curves(curves, args.relative), out)
    say(f"{args.out}: {plural(len(curves), 'curve')}")


if __name__ == "__main__":
    main()
