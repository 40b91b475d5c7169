"""Plot the losses of runs against steps, training compute and wall time.

    python scripts/plot_metrics.py results/EXP --out loss.png
    python scripts/plot_metrics.py results/A/000-EqM-S-4-f4-rope results/B --out compare.png

A run folder is one phase, or those of its --frames-schedule. Where it started from a checkpoint of another run that
is given, it goes on with that one's curve: steps are global anyway, and its FLOPs and seconds are added to those which
that checkpoint had taken.
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
X_AXES = {  # what metrics.jsonl calls it -> name, units with their size in what is logged
    "step": ("step", {"": 1}),
    "flops": ("training compute", {"EFLOP": 1e18, "PFLOP": 1e15, "TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6}),
    "seconds": ("wall time", {"days": 86400, "h": 3600, "min": 60, "s": 1}),
}
COLORS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9"  # Okabe and Ito: for colour-blind eyes, too
STYLES = "-", "--", ":"  # once the colours are used up
MARKERS = "o", "s", "^", "D", "v", "P", "X"  # of frame counts
AMOUNTS = "flops", "seconds"  # that rise over a run
SMOOTH_SHARE = 20  # a mean is over this part of the lines of the longest curve
LOG_RATIO = 3  # highest loss / lowest, from which on the axis is logarithmic


def parse_args():
    parser = ArgumentParser(description="Plot the losses of runs against steps, training compute and wall time.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder of train.py, or a folder of such")
    parser.add_argument("--out", required=True, metavar="FILE.png", help="the picture")
    share = "losses as a share of a zero predictor's, which compares over data sets and frames; off = as they are"
    parser.add_argument("--relative", action="store_true", help=share)
    mean = "logged lines per mean of the training loss; 1 = off, none = a twentieth of the longest curve's"
    parser.add_argument("--smooth", type=COUNT, metavar="N", help=mean)
    return parser.parse_args()


# ----------------------------------------------------------------------------------------------------------------------
# Runs, and which goes on from which


@dataclass
class Run:
    folder: Path
    rows: list  # of metrics.jsonl, at least one

    @property
    def first_step(self):  # that was logged
        return self.rows[0]["step"]

    @property
    def last_step(self):
        return self.rows[-1]["step"]

    @property
    def frames(self):
        """f16, from the name of the folder; all of the name where it does not say."""
        found = re.search(r"-(f\d+(?:-\d+)*)(-rope)?$", self.folder.name)
        return found[1] if found else self.folder.name


@dataclass
class Curve:
    label: str
    phases: list  # (frames, rows), each with its rows up to where the next one took over


def load_runs(places):
    """The runs in the folders that the command line names, each once, with their rows; raises UserError."""
    runs = {}
    for place in map(Path, places):
        if not place.is_dir():
            raise UserError(f"RUN {place}: {'not a folder' if place.exists() else 'no such folder'}")
        folders = [place] if (place / METRICS).exists() else sorted(path.parent for path in place.glob(f"*/{METRICS}"))
        found = [Run(folder.resolve(), read_rows(folder)) for folder in folders]
        if not folders:
            raise UserError(f"RUN {place}: no {METRICS}, nor folders with one; name a run folder of train.py")
        if not any(run.rows for run in found):
            raise UserError(f"RUN {place}: its {METRICS} has no line of a step yet; wait for one (--log-every)")
        runs |= {run.folder: run for run in found if run.rows}
    return list(runs.values())


def read_rows(folder):
    """The rows of a run's metrics.jsonl; raises UserError if it can't be read."""
    path = folder / METRICS
    try:
        rows, torn = read_metrics(path)
    except OSError as error:
        raise UserError(f"RUN {folder}: its {METRICS} can't be read ({error.strerror})") from error
    if torn:
        say(f"{path}: {torn} torn {'line' if torn == 1 else 'lines'} left out")
    return rows


def read_start(run):
    """The checkpoint that a run says it started from, None if from scratch; one of its own if it does not say."""
    try:
        ckpt = json.loads((run.folder / "config.json").read_text())["training"]["ckpt"]
    except (OSError, ValueError, LookupError, TypeError):
        ckpt = run.folder / "checkpoints" / "latest.pt"
    return None if ckpt is None else Path(ckpt)


def is_of(ckpt, run):
    """Whether EXP/RUN/checkpoints/FILE names a checkpoint of this run; folders above EXP may have been moved."""
    names = ckpt.parts[-4:-2]
    return ckpt.parent.name == "checkpoints" and run.folder.parts[-len(names) :] == names


def predecessor(run, runs):
    """(run that this one started from, step at which it took over); None if that is not among `runs`.

    A resumed run only says that it started from itself: it follows the run of its folder that ended last before it.
    """
    ckpt = read_start(run)
    earlier = [other for other in runs if other.first_step < run.first_step]
    if ckpt is None:
        return None
    if is_of(ckpt, run):
        ended = [other for other in earlier if other.last_step < run.first_step]
        ended = [other for other in ended if other.folder.parent == run.folder.parent]
        last = max(ended, key=lambda other: (other.last_step, other.folder), default=None)
        return (last, last.last_step) if last else None
    step = int(ckpt.stem) if ckpt.stem.isdecimal() else run.first_step - 1  # best.pt does not say
    found = [other for other in earlier if is_of(ckpt, other) and other.first_step <= step]
    if not found:
        say(f"{run.folder.name}: its start {ckpt} is not of these runs; its FLOPs and seconds count from there")
        return None
    return min(found, key=lambda other: other.folder.parent != run.folder.parent), step  # its own experiment first


def make_curves(runs):
    """A curve for each run that no other goes on from, with all that led to it."""
    starts = {run.folder: predecessor(run, runs) for run in runs}
    passed = {start[0].folder for start in starts.values() if start}
    return [make_curve(run, starts) for run in runs if run.folder not in passed]


def split_phases(run, rows):
    """The phases (frames, rows) of a run: several if it had a schedule, each with its own seconds and FLOPs."""
    phases, before = [], {}
    for num_frames, group in itertools.groupby(rows, key=lambda row: row.get("num_frames")):
        own = [row | {name: row[name] - before.get(name, 0) for name in AMOUNTS if name in row} for row in group]
        phases.append((f"f{num_frames}" if num_frames else run.frames, own))
        before = {name: before.get(name, 0) + own[-1].get(name, 0) for name in AMOUNTS}
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
# Numbers to draw


def positions(curve, axis):
    """For each phase the x (rows,) of its rows, from the beginning of the curve; None if a row has none."""
    xs, before = [], 0
    for _, rows in curve.phases:
        logged = [row.get(axis) for row in rows]
        if None in logged:
            return None
        xs.append(np.array(logged, float) + before)
        before = 0 if axis == "step" else xs[-1][-1]
    return xs


def points(curve, xs, name):
    """For each phase x and y (n,) of the rows that hold the number `name`; y is NaN where it was not finite."""
    for (_, rows), x in zip(curve.phases, xs, strict=True):
        held = [i for i, row in enumerate(rows) if name in row]
        yield x[held], np.array([rows[i][name] for i in held], float)


def smooth(y, window):
    """Mean over the `window` values around each of y (n,), fewer at both ends; NaN is left out."""
    before, after = window // 2, window - window // 2
    sums, counts = (np.cumsum([0, *part]) for part in (np.nan_to_num(y), np.isfinite(y)))
    first, last = np.arange(len(y)) - before, np.arange(len(y)) + after
    first, last = first.clip(0), last.clip(max=len(y))
    with np.errstate(invalid="ignore"):  # a window of NaN only
        return (sums[last] - sums[first]) / (counts[last] - counts[first])


def frame_counts(curves, prefix):
    """The numbers of frames N that a `prefix`N was logged for, ascending."""
    names = {name for curve in curves for _, rows in curve.phases for row in rows for name in row}
    found = (re.fullmatch(prefix + r"(\d+)", name) for name in names)
    return sorted(int(match[1]) for match in found if match)


def choose_unit(units, xs):
    """(name, size) of the largest unit of which there are at least two."""
    most = max(x[-1][-1] for x in xs if x is not None)
    return next(((name, size) for name, size in units.items() if most >= 2 * size), list(units.items())[-1])


# ----------------------------------------------------------------------------------------------------------------------
# The figure


def draw(curves, relative=False, window=None):
    """The figure: a row for training and one for validation, a column for each of X_AXES that some curve has."""
    window = window or max(1, max(sum(len(rows) for _, rows in curve.phases) for curve in curves) // SMOOTH_SHARE)
    ending = "_rel" if relative else ""
    counts = frame_counts(curves, f"val_loss{ending}_f")
    validated = any(f"val_loss{ending}" in row for curve in curves for _, rows in curve.phases for row in rows)
    xs = {axis: [positions(curve, axis) for curve in curves] for axis in X_AXES}
    used = [axis for axis in X_AXES if any(x is not None for x in xs[axis])]
    with plt.rc_context({"font.size": 14, "axes.grid": True, "grid.alpha": 0.3}):
        figure, grid = plt.subplots(
            1 + validated, len(used), figsize=(1 + 5.5 * len(used), 3 + 3.5 * (1 + validated)),
            sharex="col", sharey="row", squeeze=False, layout="constrained",
        )  # fmt: skip
        for panels, axis in zip(grid.T, used, strict=True):
            draw_column(panels, axis, curves, xs[axis], ending, window, counts)
        for panels, name in zip(grid, ("training", "validation"), strict=False):
            scale_losses(panels[0])
            panels[0].set_ylabel(f"{name} loss" + (" / that of zero" if relative else ""))
        if validated and counts:
            add_frames_legend(grid[1, 0], counts)
        add_legend(figure, curves, window)
    return figure


def draw_column(panels, axis, curves, xs, ending, window, counts):
    """Training and, in a second panel, validation losses against one of X_AXES."""
    name, units = X_AXES[axis]
    unit, size = choose_unit(units, xs)
    shown = [
        (curve, [part / size for part in x], look)
        for curve, x, look in zip(curves, xs, looks(len(curves)), strict=True)
        if x is not None
    ]
    for curve, x, look in shown:
        draw_training(panels[0], list(points(curve, x, f"train_loss{ending}")), look, window)
        if len(panels) > 1:
            draw_validation(panels[1], curve, x, look, f"val_loss{ending}", counts)
    mark_phases(panels, shown)
    panels[-1].set_xlabel(f"{name} ({unit})" if unit else name)
    panels[-1].xaxis.set_major_locator(MaxNLocator(5))
    panels[-1].xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))


def looks(count):
    """How the lines of each curve look."""
    every = [{"color": color, "linestyle": style} for style in STYLES for color in COLORS]
    return [every[number % len(every)] for number in range(count)]


def markers(count):
    """How the lines of each number of frames look."""
    return [
        {"marker": MARKERS[number % len(MARKERS)], "fillstyle": "none", "markersize": 7, "linewidth": 0.7}
        for number in range(count)
    ]


def joined(phases):
    """x and y over all phases, (n,) each."""
    return [np.concatenate(parts) for parts in zip(*phases, strict=True)]


def draw_training(panel, phases, look, window):
    """A thin line as logged and a thick one of means, which do not reach from one phase into another."""
    if window > 1:
        panel.plot(*joined(phases), **look, linewidth=0.8, alpha=0.6)
    panel.plot(*joined((x, smooth(y, window)) for x, y in phases), **look, linewidth=2)


def draw_validation(panel, curve, x, look, name, counts):
    """A thick line for the frames of the phases, a thin one with its own marker for each other number of frames."""
    panel.plot(*joined(points(curve, x, name)), **look, linewidth=2, marker=".", markersize=8)
    for count, marker in zip(counts, markers(len(counts)), strict=True):
        panel.plot(*joined(points(curve, x, f"{name}_f{count}")), color=look["color"], **marker)


def mark_phases(panels, shown):
    """Grey bands and names for the phases of the first curve, dotted lines where those of the others end."""
    (curve, first, _), *others = shown
    borders = [first[0][0], *(x[-1] for x in first)]
    for number, (frames, _) in enumerate(curve.phases if len(first) > 1 else []):
        left, right = borders[number : number + 2]
        for panel in panels:
            panel.axvspan(left, right, color="black", alpha=0.02 + 0.07 * (number % 2), linewidth=0)
        place = {"ha": "center", "va": "bottom", "fontsize": 12, "transform": panels[0].get_xaxis_transform()}
        panels[0].text((left + right) / 2, 1.01, plain(frames), **place)
    for _, xs, look in others:
        for end in [x[-1] for x in xs[:-1] if x[-1] not in borders]:
            for panel in panels:
                panel.axvline(end, color=look["color"], linestyle=":", linewidth=1.5)


def scale_losses(panel):
    """A logarithmic axis where the losses span so much that it shows more."""
    low, high = panel.dataLim.intervaly
    if 0 < low < high / LOG_RATIO:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low > 20 else (1, 1.5, 2, 3, 4, 5, 7)))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        panel.yaxis.set_minor_locator(LogLocator(subs=()))


def add_frames_legend(panel, counts):
    """Which marker of the validation losses is which number of frames."""
    handles = [Line2D([], [], color="black", **marker) for marker in markers(len(counts))]
    names = [f"{count} frames" for count in counts]
    panel.legend(handles, names, title="thick: as trained", fontsize=11, title_fontsize=11)


def add_legend(figure, curves, window):
    """Below the panels: which curve is which, and what thin and thick mean."""
    handles = [Line2D([], [], linewidth=2, **look) for look in looks(len(curves))]
    names = [plain(curve.label) for curve in curves]
    if window > 1:
        handles.append(Line2D([], [], color="none"))
        names.append(f"training: thin as logged, thick the mean of {window} lines")
    figure.legend(handles, names, loc="outside lower center", frameon=False)


def plain(text):
    """Text in which matplotlib finds no mathematics."""
    return text.replace("$", r"\$")


def main():
    args = parse_args()
    try:
        if not args.out.lower().endswith(".png"):
            raise UserError(f"--out {args.out}: wanted a name that ends in .png")
        if Path(args.out).is_dir():
            raise UserError(f"--out {args.out}: a folder, wanted a file")
        check_writable("--out", Path(args.out).parent)
        curves = make_curves(load_runs(args.runs))
        name = "train_loss_rel" if args.relative else "train_loss"
        for curve in curves:
            if not any(name in row for _, rows in curve.phases for row in rows):
                raise UserError(f"RUN {curve.label}: its {METRICS} has no {name}; wanted that of train.py")
    except UserError as error:
        fail(error)
    tell_missing(curves)
    try:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        draw(curves, args.relative, args.smooth).savefig(args.out, dpi=100)
    except OSError as error:  # a disk that is full
        fail(error, status=1)
    say(f"{args.out}: {len(curves)} {'curve' if len(curves) == 1 else 'curves'}")


def tell_missing(curves):
    """A line for each of X_AXES that older runs did not log."""
    for axis, (name, _) in X_AXES.items():
        without = [curve.label for curve in curves if positions(curve, axis) is None]
        if without:
            say(f"no {axis} logged, so no curve against {name}: {', '.join(without)}")


if __name__ == "__main__":
    main()
