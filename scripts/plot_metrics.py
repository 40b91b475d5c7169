"""Plot the losses of runs against steps, training compute and wall time.

    python scripts/plot_metrics.py results/EXP --out loss.png
    python scripts/plot_metrics.py results/A/000-EqM-S-4-f4-rope results/B --out compare.png

A run folder holds one phase, or those of its --frames-schedule. A run that started from a checkpoint of another given
run continues its curve: steps are global, and FLOPs and seconds are added to those of the run before at that step.
"""

import itertools
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "EqM"))
from runtime.cli import COUNT, ArgumentParser, UserError, check_writable, fail, say
from runtime.metrics import read_metrics

matplotlib.use("Agg")  # no window, no display
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator  # noqa: E402

METRICS = "metrics.jsonl"
X_AXES = {  # key in metrics.jsonl -> name of the axis, its units in units of the logged value
    "step": ("step", {"": 1}),
    "flops": ("training compute", {"EFLOP": 1e18, "PFLOP": 1e15, "TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6}),
    "seconds": ("wall time", {"days": 86400, "h": 3600, "min": 60, "s": 1}),
}
COLORS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9"  # Okabe and Ito: colour-blind safe
DASHES = "-", "--", ":"  # the next one once all colours are used
MARKERS = "o", "s", "^", "D", "v", "P", "X"  # of frame counts
CUMULATIVE = "flops", "seconds"  # counted from the start of a run
SMOOTH_DIVISOR = 20  # a mean is over 1 / 20 of the lines of the longest curve
LOG_RATIO = 3  # highest loss / lowest above which the axis is logarithmic


def parse_args():
    parser = ArgumentParser(description="Plot the losses of runs against steps, training compute and wall time.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder of train.py, or a folder of run folders")
    parser.add_argument("--out", required=True, metavar="FILE.png", help="the figure")
    share = "plot losses divided by that of a zero prediction, which compare across data sets and frame counts"
    parser.add_argument("--relative", action="store_true", help=share)
    mean = "smooth the training loss over N logged lines; 1 = off; default: a twentieth of the longest curve"
    parser.add_argument("--smooth", type=COUNT, metavar="N", help=mean)
    return parser.parse_args()


# ----------------------------------------------------------------------------------------------------------------------
# Runs, and which one continues which


@dataclass
class Run:
    folder: Path
    rows: list  # of metrics.jsonl, at least one

    @property
    def first_step(self):  # the first that was logged
        return self.rows[0]["step"]

    @property
    def last_step(self):
        return self.rows[-1]["step"]

    @property
    def frames(self):
        """The frames in the name of the folder, such as f16; the whole name if it has none."""
        found = re.search(r"-(f\d+(?:-\d+)*)(-rope)?$", self.folder.name)
        return found[1] if found else self.folder.name


@dataclass
class Curve:
    label: str
    phases: list  # (frames, rows), each with its rows up to where the next one started


def load_runs(places):
    """The runs in the folders of the command line, each once. Raises UserError."""
    runs = {}
    for place in map(Path, places):
        if not place.is_dir():
            raise UserError(f"RUN {place}: {'not a folder' if place.exists() else 'no such folder'}")
        folders = [place] if (place / METRICS).exists() else sorted(path.parent for path in place.glob(f"*/{METRICS}"))
        found = [Run(folder.resolve(), read_run_metrics(folder)) for folder in folders]
        if not folders:
            raise UserError(f"RUN {place}: no {METRICS}, nor a folder with one; name a run folder of train.py")
        if not any(run.rows for run in found):
            raise UserError(f"RUN {place}: {METRICS} has no line of a step yet; wait until train.py has logged one")
        runs |= {run.folder: run for run in found if run.rows}
    return list(runs.values())


def read_run_metrics(folder):
    """The rows of metrics.jsonl in a run folder. Raises UserError if it can't be read."""
    path = folder / METRICS
    try:
        rows, torn = read_metrics(path)
    except OSError as error:
        raise UserError(f"RUN {folder}: {METRICS} can't be read ({error.strerror}); leave this run out") from error
    if torn:
        say(f"{path}: {torn} torn {'line' if torn == 1 else 'lines'} left out")
    return rows


def read_start(run):
    """The checkpoint in config.json that a run started from, None if from scratch; one of its own if not known."""
    try:
        ckpt = json.loads((run.folder / "config.json").read_text())["training"]["ckpt"]
    except (OSError, ValueError, LookupError, TypeError):
        ckpt = run.folder / "checkpoints" / "latest.pt"
    return None if ckpt is None else Path(ckpt)


def is_checkpoint_of(ckpt, run):
    """Whether EXP/RUN/checkpoints/FILE is a checkpoint of this run; folders above EXP may have moved."""
    names = ckpt.parts[-4:-2]
    return ckpt.parent.name == "checkpoints" and run.folder.parts[-len(names) :] == names


def predecessor(run, runs):
    """(run that this one started from, step of that checkpoint); None if it is not among `runs`.

    A resumed run only knows that it started from itself: it continues the run beside it that ended last before it.
    """
    ckpt = read_start(run)
    earlier = [other for other in runs if other.first_step < run.first_step]
    if ckpt is None:
        return None
    if is_checkpoint_of(ckpt, run):
        ended = [other for other in earlier if other.last_step < run.first_step]
        ended = [other for other in ended if other.folder.parent == run.folder.parent]
        last = max(ended, key=lambda other: (other.last_step, other.folder), default=None)
        return (last, last.last_step) if last else None
    step = int(ckpt.stem) if ckpt.stem.isdecimal() else run.first_step - 1  # the name best.pt holds no step
    found = [other for other in earlier if is_checkpoint_of(ckpt, other) and other.first_step <= step]
    if not found:
        say(f"{run.folder.name}: its start {ckpt} is not of these runs; FLOPs and seconds count from there")
        return None
    return min(found, key=lambda other: other.folder.parent != run.folder.parent), step  # its own experiment first


def make_curves(runs):
    """A curve for each run that no other continues, with all its predecessors."""
    starts = {run.folder: predecessor(run, runs) for run in runs}
    continued = {start[0].folder for start in starts.values() if start}
    return [make_curve(run, starts) for run in runs if run.folder not in continued]


def split_phases(run, rows):
    """The phases (frames, rows) of a run, several if it had a schedule; seconds and FLOPs are those of the phase."""
    phases, before = [], {}
    for num_frames, group in itertools.groupby(rows, key=lambda row: row.get("num_frames")):
        own = [row | {name: row[name] - before.get(name, 0) for name in CUMULATIVE if name in row} for row in group]
        phases.append((f"f{num_frames}" if num_frames else run.frames, own))
        before = {name: before.get(name, 0) + own[-1].get(name, 0) for name in CUMULATIVE}
    return phases


def make_curve(run, starts):
    phases, names, place = split_phases(run, run.rows), [], run.folder
    while starts[run.folder] is not None:
        run, step = starts[run.folder]
        phases = split_phases(run, [row for row in run.rows if row["step"] <= step]) + phases
        names.insert(0, run.frames)
    before = ", ".join(names)
    return Curve(f"{place.parent.name}/{place.name}" + (f" after {before}" if before else ""), phases)


# ----------------------------------------------------------------------------------------------------------------------
# Values to plot


def x_values(curve, axis):
    """For each phase the x (rows,) of its rows, counted from the start of the curve; None if a row has none."""
    xs, before = [], 0
    for _, rows in curve.phases:
        logged = [row.get(axis) for row in rows]
        if None in logged:
            return None
        xs.append(np.array(logged, float) + before)
        before = 0 if axis == "step" else xs[-1][-1]
    return xs


def xy_values(curve, xs, name):
    """For each phase x and y (n,) of the rows with a value `name`; y is NaN where it was not finite."""
    for (_, rows), x in zip(curve.phases, xs, strict=True):
        logged = [i for i, row in enumerate(rows) if name in row]
        yield x[logged], np.array([rows[i][name] for i in logged], float)


def smooth(y, window):
    """Mean over the `window` values around each value of y (n,), fewer at both ends; NaN is left out."""
    before, after = window // 2, window - window // 2
    sums, counts = (np.cumsum([0, *part]) for part in (np.nan_to_num(y), np.isfinite(y)))
    first, last = np.arange(len(y)) - before, np.arange(len(y)) + after
    first, last = first.clip(0), last.clip(max=len(y))
    with np.errstate(invalid="ignore"):  # a window with nothing but NaN
        return (sums[last] - sums[first]) / (counts[last] - counts[first])


def frame_counts(curves, prefix):
    """The frame counts N for which the value `prefix`N was logged, ascending."""
    names = {name for curve in curves for _, rows in curve.phases for row in rows for name in row}
    found = (re.fullmatch(prefix + r"(\d+)", name) for name in names)
    return sorted(int(match[1]) for match in found if match)


def choose_unit(units, xs):
    """(name, size) of the largest unit of which the longest curve has at least two."""
    most = max(x[-1][-1] for x in xs if x is not None)
    return next(((name, size) for name, size in units.items() if most >= 2 * size), list(units.items())[-1])


# ----------------------------------------------------------------------------------------------------------------------
# The figure


def plot_curves(curves, relative=False, window=None):
    """The figure: rows for training and validation losses, a column for each of X_AXES that some curve has."""
    window = window or max(1, max(sum(len(rows) for _, rows in curve.phases) for curve in curves) // SMOOTH_DIVISOR)
    ending = "_rel" if relative else ""
    counts = frame_counts(curves, f"val_loss{ending}_f")
    validated = any(f"val_loss{ending}" in row for curve in curves for _, rows in curve.phases for row in rows)
    xs = {axis: [x_values(curve, axis) for curve in curves] for axis in X_AXES}
    used = [axis for axis in X_AXES if any(x is not None for x in xs[axis])]
    with plt.rc_context({"font.size": 14, "axes.grid": True, "grid.alpha": 0.3}):
        figure, grid = plt.subplots(
            1 + validated, len(used), figsize=(1 + 5.5 * len(used), 3 + 3.5 * (1 + validated)),
            sharex="col", sharey="row", squeeze=False, layout="constrained",
        )  # fmt: skip
        for panels, axis in zip(grid.T, used, strict=True):
            plot_column(panels, axis, curves, xs[axis], ending, window, counts)
        for panels, name in zip(grid, ("training", "validation"), strict=False):
            scale_losses(panels[0])
            panels[0].set_ylabel(f"{name} loss" + (" / loss of zero" if relative else ""))
        if validated and counts:
            add_frames_legend(grid[1, 0], counts)
        add_legend(figure, curves, window)
    return figure


def plot_column(panels, axis, curves, xs, ending, window, counts):
    """Training and, in a second panel, validation losses against one of X_AXES."""
    name, units = X_AXES[axis]
    unit, size = choose_unit(units, xs)
    shown = [
        (curve, [part / size for part in x], style)
        for curve, x, style in zip(curves, xs, line_styles(len(curves)), strict=True)
        if x is not None
    ]
    for curve, x, style in shown:
        plot_training(panels[0], list(xy_values(curve, x, f"train_loss{ending}")), style, window)
        if len(panels) > 1:
            plot_validation(panels[1], curve, x, style, f"val_loss{ending}", counts)
    mark_phases(panels, shown)
    panels[-1].set_xlabel(f"{name} ({unit})" if unit else name)
    panels[-1].xaxis.set_major_locator(MaxNLocator(5))
    panels[-1].xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))


def line_styles(count):
    """The style of the lines of each curve, as keyword arguments of plot()."""
    styles = [{"color": color, "linestyle": dashes} for dashes in DASHES for color in COLORS]
    return [styles[i % len(styles)] for i in range(count)]


def marker_styles(count):
    """The style of the lines of each frame count, as keyword arguments of plot()."""
    return [
        {"marker": MARKERS[i % len(MARKERS)], "fillstyle": "none", "markersize": 7, "linewidth": 0.7}
        for i in range(count)
    ]


def join_phases(phases):
    """x and y over all phases, (n,) each."""
    return [np.concatenate(parts) for parts in zip(*phases, strict=True)]


def plot_training(panel, phases, style, window):
    """A thin line as logged and a thick line of means, which stay within their phase."""
    if window > 1:
        panel.plot(*join_phases(phases), **style, linewidth=0.8, alpha=0.6)
    panel.plot(*join_phases((x, smooth(y, window)) for x, y in phases), **style, linewidth=2)


def plot_validation(panel, curve, x, style, name, counts):
    """A thick line for the phases' own frame counts, a thin line with its own marker for each single frame count."""
    panel.plot(*join_phases(xy_values(curve, x, name)), **style, linewidth=2, marker=".", markersize=8)
    for count, marker in zip(counts, marker_styles(len(counts)), strict=True):
        panel.plot(*join_phases(xy_values(curve, x, f"{name}_f{count}")), color=style["color"], **marker)


def mark_phases(panels, shown):
    """Grey bands and names for the phases of the first curve, dotted lines at the phase borders of the others."""
    (curve, first, _), *others = shown
    borders = [first[0][0], *(x[-1] for x in first)]
    for i, (frames, _) in enumerate(curve.phases if len(first) > 1 else []):
        left, right = borders[i : i + 2]
        for panel in panels:
            panel.axvspan(left, right, color="black", alpha=0.02 + 0.07 * (i % 2), linewidth=0)
        place = {"ha": "center", "va": "bottom", "fontsize": 12, "transform": panels[0].get_xaxis_transform()}
        panels[0].text((left + right) / 2, 1.01, escape_math(frames), **place)
    for _, xs, style in others:
        for end in [x[-1] for x in xs[:-1] if x[-1] not in borders]:
            for panel in panels:
                panel.axvline(end, color=style["color"], linestyle=":", linewidth=1.5)


def scale_losses(panel):
    """Make the axis logarithmic if the losses span more than LOG_RATIO."""
    low, high = panel.dataLim.intervaly
    if 0 < low < high / LOG_RATIO:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low > 20 else (1, 1.5, 2, 3, 4, 5, 7)))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        panel.yaxis.set_minor_locator(LogLocator(subs=()))


def add_frames_legend(panel, counts):
    """The legend of the markers of the validation losses: their frame counts."""
    handles = [Line2D([], [], color="black", **marker) for marker in marker_styles(len(counts))]
    names = [f"{count} frames" for count in counts]
    panel.legend(handles, names, title="thick: as trained", fontsize=11, title_fontsize=11)


def add_legend(figure, curves, window):
    """The legend below the panels: the curves, and the meaning of thin and thick lines."""
    handles = [Line2D([], [], linewidth=2, **style) for style in line_styles(len(curves))]
    names = [escape_math(curve.label) for curve in curves]
    if window > 1:
        handles.append(Line2D([], [], color="none"))
        names.append(f"training: thin as logged, thick the mean of {window} lines")
    figure.legend(handles, names, loc="outside lower center", frameon=False)


def escape_math(text):
    """Text that matplotlib shows as it is, without reading $ as mathematics."""
    return text.replace("$", r"\$")


def main():
    args = parse_args()
    try:
        if not args.out.lower().endswith(".png"):
            raise UserError(f"--out {args.out}: wanted a name that ends in .png")
        if Path(args.out).is_dir():
            raise UserError(f"--out {args.out}: a folder; wanted the name of a PNG file")
        check_writable("--out", Path(args.out).parent)
        curves = make_curves(load_runs(args.runs))
        name = "train_loss_rel" if args.relative else "train_loss"
        for curve in curves:
            if not any(name in row for _, rows in curve.phases for row in rows):
                raise UserError(f"RUN {curve.label}: {METRICS} has no {name}; wanted a run folder of train.py")
    except UserError as error:
        fail(error)
    say_missing(curves)
    try:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        plot_curves(curves, args.relative, args.smooth).savefig(args.out, dpi=100)
    except OSError as error:  # such as a full disk
        fail(error, status=1)
    say(f"{args.out}: {len(curves)} {'curve' if len(curves) == 1 else 'curves'}")


def say_missing(curves):
    """Print a line for each of X_AXES that some run did not log."""
    for axis, (name, _) in X_AXES.items():
        without = [curve.label for curve in curves if x_values(curve, axis) is None]
        if without:
            say(f"no {axis} logged, so no curve against {name}: {', '.join(without)}")


if __name__ == "__main__":
    main()
