"""Compare positions and frame curricula at equal compute, with several seeds, on known motion.

    python scripts/studies/study.py --list          how many runs are done
    python scripts/studies/study.py --minutes 150   run or continue; start no run that ends later
    python scripts/studies/study.py --only A B      some questions (A to D), or arms by name
    python scripts/studies/study.py --report        only write the table and its figures

A: which positions are best: fixed, rotary, rotary with a table of height and width ("table"), or
these with --rope-speed ("moving")?
B: which curriculum of 4, 8, then 16 frames?
C: how much compute until the motion is correct?
D: which --rope-speed, for which motion?

An arm is a training recipe. A run is an arm with a seed and a share of the compute. All runs with
the same share have the same counted FLOPs. The learning rate decays to zero at the end of each run,
so 60% of the compute is a separate run. study.csv in results/studies/positions has the rows of an
earlier version. The script adds others to study.json, and writes study.md from both.
"""

import csv
import itertools
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

import lab
import shapes
from lab import Column, Difference, by_seed, difference, difference_lines, table
from runtime.cli import fail, one_line_errors
from scoring.plots import COLORS, MARKERS, plt, save_figure
from scoring.stats import half95, mean_and_error
from shapes import INTERVALS, MOVING, PACES, PATH_LENGTH, ROTARY, SPEEDS, TABLE

VERSION = 2  # of the arms
LENGTHS = (16, 24, 32)  # frames of samples
SHARE_SEEDS = 3
START = "16 moving intervals"
BEST = "4-8-16 moving"
SHARES = {  # of the compute, in addition to all of it; each is a separate run
    "16 table": (1.6,),  # does not learn the motion at 1.0
    START: (0.4, 0.6),
    BEST: (0.4, 0.6),
}


@dataclass(frozen=True)
class Arm(shapes.Arm):
    """An arm of some questions."""

    questions: str = ""
    seeds: int = 3  # with full compute
    lengths: tuple = (16,)  # frames of samples at full compute


sixteen = partial(Arm, phases=((16, 1.0),), questions="A", seeds=5)
of_speed = partial(sixteen, questions="D")
curriculum = partial(Arm, questions="B", lengths=LENGTHS)
ARMS = {
    "16 fixed": sixteen(""),
    "16 rotary": sixteen(ROTARY),
    "16 table": sixteen(TABLE, questions="AC"),
    "16 moving": sixteen(MOVING),
    START: sixteen(MOVING + INTERVALS, questions="BC", seeds=3),
    "4-8-16": curriculum(ROTARY + INTERVALS),
    "4-8-16 table": curriculum(TABLE + INTERVALS),
    "4-8-16 mix": curriculum(ROTARY + INTERVALS, mix=0.2),
    "4-8-16 table mix": curriculum(TABLE + INTERVALS, mix=0.2),
    BEST: curriculum(questions="BC"),
}
for name, flags in SPEEDS.items():
    ARMS[f"16 {name}"] = of_speed(flags, lengths=LENGTHS)
for pace in ("slow", "fast"):
    ARMS[f"16 fixed {pace}"] = of_speed("", pace=pace)
    ARMS[f"16 table {pace}"] = of_speed(TABLE, pace=pace, seeds=2)  # does not win
    ARMS[f"16 moving {pace}"] = of_speed(MOVING, pace=pace)
    ARMS[f"16 speed 1 {pace}"] = of_speed(SPEEDS["speed 1"], pace=pace)

POSITIONS = ("16 fixed", "16 rotary", "16 table", "16 moving")
CURRICULA = ("4-8-16", "4-8-16 mix", "4-8-16 table", "4-8-16 table mix", BEST)
PAIRS = {
    "A": (
        ("16 table", "16 fixed"),
        ("16 moving", "16 fixed"),
        ("16 rotary", "16 fixed"),
        ("16 table", "16 rotary"),
        ("16 moving", "16 table"),
    ),
    "B": (
        ("4-8-16 table", "4-8-16"),
        ("4-8-16 table mix", "4-8-16 mix"),
        ("4-8-16 mix", "4-8-16"),
        ("4-8-16 table mix", "4-8-16 table"),
        (BEST, "4-8-16 table"),
        (BEST, START),
    ),
}
LOSS = Column("Loss", "val_loss", 1, 3)
DIRECTION = Column("Direction accuracy (0 to 1)", "direction_accuracy", 1)
PERCENT = Column("direction accuracy (%)", "direction_accuracy", digits=0)
SPEED = Column("speed / true", "speed_ratio", 1, 2)
SEAM = Column("seam score (1 = no seam)", "seam_score", 1, 2)
GOAL = 0.9  # direction accuracy at which motion counts as learned
CSV_VALUES = {"direction": "direction_accuracy", "speed": "speed_ratio", "seam": "seam_score"}

# Rows ---------------------------------------------------------------------------------------------


def frames_task(frames):
    return f"{frames} frames"


def about_run(name, seed, share):
    return {"arm": name, "seed": seed, "share": share}


def study_run(args, name, seed, share):
    """The Run of an arm with a seed and a share of the compute."""
    arm = ARMS[name]
    tasks = {}
    for frames in arm.lengths if share == 1 else (16,):
        tasks[frames_task(frames)] = shapes.make_task(
            PATH_LENGTH,
            shapes.size_of(args).fewer,
            frames=frames,
            more="--time-scale 0.04",
            metrics=("motion", "consistency"),
        )
    run = shapes.shapes_run(
        args,
        table="study",
        about=about_run(name, seed, share),
        tasks=tasks,
        arm=arm,
        share=share,
        more={"compiled": int(args.compile)},
    )
    run.read = read_study
    return run


def read_study(path):
    """The rows of study.json, after those of study.csv, an earlier version."""
    rows = [row for row in lab.read_rows(path) if "values" in row]
    path = path.with_suffix(".csv")
    if not path.exists():
        return rows
    with open(path, newline="") as file:
        lines = list(csv.DictReader(file))
    if not lines or "loss_16" not in lines[0]:
        fail(f"{path}: has other columns; expected those of version {VERSION}")
    return rows_of_lines(lines) + rows


def rows_of_lines(lines):
    """A row for each run in lines of the csv: some of its training, and one of each sample."""
    rows = {}
    for line in lines:
        key = (line["arm"], int(line["seed"]), float(line["share"]))
        row = rows.setdefault(key, about_run(*key) | {"values": {}, "lines": 0, "sampled": 0.0})
        row["lines"] += 1
        row |= {"code": line["code"], "machine": line["machine"], "compiled": int(line["compiled"])}
        if line["kind"] == "train":
            row["values"][""] = {LOSS.value: float(line["loss_16"])}
            row["trained"] = float(line["seconds"])  # so far
            continue
        row["sampled"] += float(line["seconds"])
        values = {}
        for name, value in CSV_VALUES.items():
            if line[name]:
                values[value] = float(line[name])
        row["values"][frames_task(line["frames"])] = values
    for row in rows.values():
        row["seconds"] = row.pop("trained") + row.pop("sampled")
    return [*rows.values()]


def values_of(rows, name, column, frames=16, share=1.0):
    """{seed: value of a Column} of an arm: of its samples, or the loss of its training."""
    task = "" if column.value == LOSS.value else frames_task(frames)
    return by_seed(rows, {"arm": name, "share": share}, column.of(task))


# Tables and figures -------------------------------------------------------------------------------


def differences(rows, pairs):
    """Lines about loss and direction accuracy of pairs of arms."""
    compared = []
    for pair, column in itertools.product(pairs, (LOSS, DIRECTION)):
        values = {name: values_of(rows, name, column) for name in pair}
        compared.append(difference(values, pair, column.title))
    return [*difference_lines(compared), ""]


def spread_cell(values, digits):
    """Mean and standard error over seeds, and the value of each seed; "-" without values."""
    numbers = values.values()
    each = ", ".join(f"{number:.{digits}f}" for number in numbers)
    mean, error = mean_and_error([number for number in numbers if number < math.inf])
    if mean is None:
        return f"({each})" if numbers else "-"
    spread = "" if error is None else f" ± {error:.{digits}f}"
    return f"{mean:.{digits}f}{spread} ({each})"


def spread_table(rows, title, columns, cases):
    """Lines of markdown: a row for each case {(arm, cell): arguments of `values_of`}."""
    cells = []
    for (name, cell), about in cases.items():
        row = [name, cell]
        for column in columns:
            row.append(spread_cell(values_of(rows, name, column, **about), column.digits))
        cells.append(row)
    return table(["arm", title, *(column.title for column in columns)], cells)


def share_table(rows, cases):
    """Loss, direction accuracy and speed at 16 frames of each (arm, share of the compute)."""
    by_case = {(name, f"{100 * share:.0f}"): {"share": share} for name, share in cases}
    loss = replace(LOSS, title="validation loss")
    return spread_table(rows, "compute (%)", (loss, PERCENT, SPEED), by_case)


def full_table(rows, names):
    return share_table(rows, [(name, 1.0) for name in names])


def length_table(rows, names):
    """Direction accuracy, speed and seams of each arm at 16, 24, 32 frames."""
    by_case = {}
    for name, frames in itertools.product(names, LENGTHS):
        by_case[name, str(frames)] = {"frames": frames}
    return spread_table(rows, "frames", (PERCENT, SPEED, SEAM), by_case)


def draw(out, letter, message, xlabel, series, mark):
    """Save a figure of direction accuracy, and return its lines of markdown.

    series: {arm: {x: {seed: accuracy}}}: the mean as a line, seeds as dots. mark(axes) adds to it.
    """
    figure, axes = plt.subplots(figsize=(9.5, 6.5))
    for (name, by_x), color, marker in zip(series.items(), COLORS, MARKERS, strict=False):
        by_x = {x: [100 * value for value in values.values()] for x, values in by_x.items()}
        means = {x: np.mean(values) for x, values in by_x.items() if values}
        style = {"color": color, "marker": marker, "markersize": 9, "linewidth": 2}
        axes.plot(means.keys(), means.values(), label=name, **style)
        for x in means:
            axes.scatter([x] * len(by_x[x]), by_x[x], color=color, alpha=0.45, s=30)
    mark(axes)
    axes.set(xlabel=xlabel, ylabel="direction accuracy (%)", ylim=(0, 103))
    axes.set_title(message, loc="left")
    axes.legend()
    path = Path(out, f"study-{letter}.png")
    save_figure(figure, path)
    return [f"![{' '.join(message.split())}]({path.name})", ""]


# The questions. Each function returns lines of markdown; its docstring is the heading. ------------


def answer_a(out, rows):
    """Which positions? 16 frames from the start, equal steps"""
    return differences(rows, PAIRS["A"]) + full_table(rows, POSITIONS)


def answer_b(out, rows):
    """Which positions for 4, 8, then 16 frames, with and without --mix?"""
    lines = differences(rows, PAIRS["B"]) + full_table(rows, CURRICULA)
    lines += length_table(rows, CURRICULA)
    series = {}
    for name in CURRICULA:
        series[name] = {x: values_of(rows, name, DIRECTION, frames=x) for x in LENGTHS}
    longer = {name: mean_of(by_length[24]) for name, by_length in series.items() if by_length[24]}
    if BEST not in longer:
        return lines
    message = "24 frames, longer than in training: "
    message += f"{longer.pop(BEST):.0%} direction accuracy\n({BEST})"
    if longer:
        message += f", {min(longer.values()):.0%} to {max(longer.values()):.0%} for the others"

    def mark(axes):
        axes.axvspan(16.5, 33, color="gray", alpha=0.1, label="longer than in training")
        axes.set(xticks=LENGTHS, xlim=(15, 33))

    return lines + draw(out, "B", message, "sampled frames", series, mark)


def mean_of(values):
    return np.mean(list(values.values()))


def compute_to(goal, shares, values):
    """The share of the compute at which values first reach the goal, interpolated.

    NaN if the first or none does.
    """
    for (before, low), (after, high) in itertools.pairwise(zip(shares, values, strict=True)):
        if high >= goal > values[0]:
            return before + (after - before) * (goal - low) / (high - low)
    return math.nan


def share_text(share):
    return "an unmeasured share" if math.isnan(share) else f"{share:.0%}"


def curve(rows, name):
    """{share of the compute: {seed: direction accuracy}}, for seeds with all shares."""
    by_share = {}
    for share in sorted((1.0, *SHARES[name])):
        by_share[share] = values_of(rows, name, DIRECTION, share=share)
    seeds = set.intersection(*map(set, by_share.values()))
    return {
        share: {seed: values[seed] for seed in sorted(seeds)} for share, values in by_share.items()
    }


def ratio(what, ratios):
    """A Difference with the geometric mean of two arms' ratios, one per seed.

    Without significance for one seed.
    """
    logs = [math.log(value) for value in ratios]
    mean, error = mean_and_error(logs)
    each = "; ".join(f"{value:.2f}" for value in ratios)
    text = f"- {what}: the geometric mean is {math.exp(mean):.2f} (each seed: {each}"
    if error is None:
        return Difference(f"{text}).")
    half = half95(logs)
    low = math.exp(mean - half)
    high = math.exp(mean + half)
    return Difference(f"{text}; 95% {low:.2f} to {high:.2f}", mean, lab.student_p(logs))


def answer_c(out, rows):
    """How much compute until the motion is correct?"""
    names = ("16 table", START, BEST)
    series = {}
    reached = {}  # {arm: {"mean" or seed: result of compute_to}}
    lines = []
    for name in names:
        by_share = curve(rows, name)
        series[name] = {100 * share: values for share, values in by_share.items()}
        seeds = [*by_share[1.0]]
        if not seeds:
            lines.append(f"- {name}: not run yet.")
            continue
        points = {"mean": [mean_of(values) for values in by_share.values()]}
        points |= {seed: [values[seed] for values in by_share.values()] for seed in seeds}
        reached[name] = {key: compute_to(GOAL, by_share, of) for key, of in points.items()}
        mean, *each = map(share_text, reached[name].values())
        lines.append(
            f"- {name}: the mean over seeds reaches {GOAL:.0%} direction accuracy at {mean} of "
            f"the compute (each seed: {'; '.join(each)})."
        )
    compared = []
    for base in (START, "16 table"):
        computes = reached.get(BEST, {})
        others = reached.get(base, {})
        ratios = [computes[seed] / others[seed] for seed in computes if seed in others]
        ratios = [ratio for ratio in ratios[1:] if math.isfinite(ratio)]  # the first is the mean's
        if ratios:
            compared.append(ratio(f"Ratio of these computes, {BEST} / {base}", ratios))
    early = f"{BEST} at 60%"
    full = f"{START} at 100%"
    losses = {early: values_of(rows, BEST, LOSS, share=0.6), full: values_of(rows, START, LOSS)}
    compared.append(difference(losses, (early, full), LOSS.title))
    lines += [*difference_lines(compared), ""]
    cases = [(name, share) for name in names for share in sorted((1.0, *SHARES[name]))]
    lines += share_table(rows, cases)
    if len(reached) < len(names):
        return lines
    table, start, best = (share_text(reached[name]["mean"]) for name in names)
    message = (
        f"{GOAL:.0%} direction accuracy at {best} of the compute ({BEST}),\n"
        f"at {start} ({START}), at {table} (16 table)"
    )
    xlabel = f"compute of a complete run (% of {shapes.FULL.steps:,} steps of 16 frames)"
    style = {"color": "gray", "linestyle": "--", "label": f"{GOAL:.0%}"}
    goal = partial(plt.Axes.axhline, y=100 * GOAL, **style)
    return lines + draw(out, "C", message, xlabel, series, goal)


def answer_d(out, rows):
    """Which --rope-speed, for which motion? 16 frames from the start, equal steps"""
    lines = []
    for pace in PACES:
        names = [name for name, arm in ARMS.items() if (arm.questions, arm.pace) == ("D", pace)]
        if not pace:
            names = ["16 fixed", "16 table", "16 moving", *names]
        fixed, table, moving, *rest = names
        pairs = [(name, fixed) for name in (table, moving, *rest)]
        pairs += [(name, moving) for name in rest]
        # each comparison counts in one table only
        pairs = [pair for pair in pairs if pair not in PAIRS["A"]]
        lines += differences(rows, pairs) + full_table(rows, names)
        if not pace:
            lines += length_table(rows, rest)
    return lines


ANSWERS = {"A": answer_a, "B": answer_b, "C": answer_c, "D": answer_d}


def markdown(out, rows):
    """The lines of study.md from all rows. Saves its figures in the folder `out`."""
    script = "python scripts/studies/study.py"
    size = shapes.FULL
    config = shapes.config_of(size)
    _, flops = shapes.plan(config, ((16, 1.0),), mix=0, steps=size.steps)
    spent = sum(row.get("seconds", 0) for row in rows) / 3600
    count = sum(row.get("lines", 1) for row in rows)
    codes = sorted({row["code"][:10] for row in rows})
    machines = sorted({row["machine"] for row in rows})
    compiled = " with --compile" if all(row["compiled"] for row in rows) else ""
    lines = lab.heading(
        "Which positions are best, and does a frame curriculum pay?",
        f"`{script} --report` wrote this page from `study.csv` ({count} rows, version "
        f"{VERSION}, size full). `{script}` measured the rows: {spent:.1f} hours of "
        f"training{compiled} and sampling, on {', '.join(machines)}; code {', '.join(codes)}. "
        "[study-first-edition.md](study-first-edition.md) answers other questions with earlier "
        "code.",
    )
    lines += [
        "An *arm* is a training recipe.",
        "",
        "- **Data and model**: Moving Shapes, 16 x 16 px, 1.4 s. Depth "
        f"{size.depth}, width {size.width}, 4 heads, spatial patch 2, temporal patch "
        "4, bf16.",
        f"- **Compute**: every step has {shapes.TOKENS} tokens. 100% compute is "
        f"{flops / 1e12:.3g} TFLOP: {size.steps} steps of 8 clips of 16 frames. The learning rate "
        "decays to zero at the end of each run.",
        f"- **Flags of all arms**: `{shapes.BASE}`.",
        "- **Positions**: *fixed* is the default. *rotary* adds `--use-rope --rope-theta 100`. "
        "*table* also adds `--position-table space`. *moving* also adds `--rope-speed 0.5`, about "
        "the speed of all shapes (0.51 patches per temporal patch). *4-8-16* without one of these "
        "words is rotary.",
        "- **Frames**: *16* trains on 16 frames from the start. *4-8-16* gives a third of the "
        "compute to each of 4, 8 and 16 frames, and draws the frame interval from 1 to 2. With "
        "*mix*, a fifth of the later steps train on earlier frames. *16 moving intervals* also "
        "draws the interval, so it differs from *4-8-16 moving* only in its number of frames.",
        "- **Speeds**: *speed N* is *table* with `--rope-speed N`. *speed 0* has the spatial "
        "frequencies of the other speeds. *speed 0.5* is *moving* again, by later code. Shapes "
        "move half as fast with *slow* and twice as fast with *fast*.",
        "- **Validation loss**: arms with frame intervals of 1 to 2 validate on such clips. "
        "Compare their losses with each other, not with those in A.",
        f"- **Samples**: {size.fewer} clips per run and length, 0.04 s per frame, `ngd`, "
        f"{shapes.USUAL} evaluations, guidance {shapes.GUIDANCE:g}, averaged weights of the last "
        "step.",
        "- **Direction accuracy**: the share of samples with the motion of their class, measured "
        "by a tracker. Chance is 25%; real clips reach at least 100%.",
        "- **Cells**: mean ± standard error over seeds, with each seed in brackets. A dash means "
        "that nothing was run, or that no direction was correct, so there is no speed. "
        "Differences are paired by seed, with Student's 95% interval and p value. A difference is "
        "significant if its p value, adjusted by Holm's method for the comparisons that are "
        "listed above the same table, is at most 0.05.",
        "",
    ]
    for letter, answer in ANSWERS.items():
        lines += [f"## {letter}. {answer.__doc__}", "", f"`{script} --only {letter}`", ""]
        lines += answer(out, rows)
    return lines


# The command --------------------------------------------------------------------------------------


def parse_args():
    parser = lab.study_parser(__doc__, "positions", seeds=[*range(5)])
    parser.add_argument(
        "--only",
        nargs="+",
        choices=(*ANSWERS, *ARMS),
        metavar="WHAT",
        help="questions (A to D) or names of arms; default: all",
    )
    return parser.parse_args()


def runs_of(args):
    """All chosen runs. Expensive ones with little information come last: extra seeds, long runs."""
    chosen = set(args.only or ANSWERS)
    keys = []
    for (name, arm), seed in itertools.product(ARMS.items(), args.seeds):
        if {name, *arm.questions} & chosen:
            shares = SHARES.get(name, ()) if seed < SHARE_SEEDS else ()
            keys += [(name, seed, share) for share in (1.0, *shares)]
    keys = [key for key in keys if key[1] < ARMS[key[0]].seeds]
    keys.sort(key=lambda key: (key[2] > 1, key[1] >= SHARE_SEEDS, key[2] != 1, key[1]))
    return [study_run(args, *key) for key in keys]


@one_line_errors()
def main():
    args = parse_args()
    lab.run_study(args, runs_of(args), partial(markdown, args.out))


if __name__ == "__main__":
    main()
