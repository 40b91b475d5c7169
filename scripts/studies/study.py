"""Compare positions and frame curricula at equal compute, with several seeds, on known motion.

    python scripts/studies/study.py --list          how many runs are done
    python scripts/studies/study.py --minutes 150   run or continue; start no run that ends later
    python scripts/studies/study.py --only A        one question, or arms by name
    python scripts/studies/study.py --report        only write the tables

A: which positions are best: fixed, rotary, rotary with a table of height and width ("table"), or
these with --rope-speed ("moving")?
B: which curriculum of 4, 8, then 16 frames?

An arm is a training recipe. A run is an arm with a seed. All runs have the same counted FLOPs.
study.csv in results/studies/positions has the rows of an earlier version, which answered more
questions. The script adds others to study.json, and writes A and B of study.md from both. What
follows on the page stays as it is.
"""

import csv
import itertools
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import lab
import shapes
from lab import Column, by_seed, table
from runtime.cli import fail, one_line_errors
from scoring.stats import mean_and_error
from shapes import INTERVALS, MOVING, PATH_LENGTH, ROTARY, TABLE

VERSION = 2  # of the arms
LENGTHS = (16, 24, 32)  # frames of samples
START = "16 moving intervals"
BEST = "4-8-16 moving"


@dataclass(frozen=True)
class Arm(shapes.Arm):
    """An arm of some questions."""

    questions: str = "B"
    seeds: int = 3
    lengths: tuple = LENGTHS  # frames of samples


sixteen = partial(Arm, phases=((16, 1.0),), questions="A", seeds=5, lengths=(16,))
ARMS = {
    "16 fixed": sixteen(""),
    "16 rotary": sixteen(ROTARY),
    "16 table": sixteen(TABLE),
    "16 moving": sixteen(MOVING),
    START: sixteen(MOVING + INTERVALS, questions="B", seeds=3),
    "4-8-16": Arm(ROTARY + INTERVALS),
    "4-8-16 table": Arm(TABLE + INTERVALS),
    "4-8-16 mix": Arm(ROTARY + INTERVALS, mix=0.2),
    "4-8-16 table mix": Arm(TABLE + INTERVALS, mix=0.2),
    BEST: Arm(),
}
CURRICULA = ("4-8-16", "4-8-16 mix", "4-8-16 table", "4-8-16 table mix", BEST)
QUESTIONS = {
    "A": (
        "Which positions? 16 frames from the start, equal steps",
        ("16 fixed", "16 rotary", "16 table", "16 moving"),
    ),
    "B": ("Which positions for 4, 8, then 16 frames, with and without --mix?", CURRICULA),
}
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
LOSS = Column("Loss", "val_loss", 1)
VALIDATION = Column("validation loss", "val_loss", factor=1, digits=3)
DIRECTION = Column("Direction accuracy (0 to 1)", "direction_accuracy", 1)
PERCENT = Column("direction accuracy (%)", "direction_accuracy", digits=0)
SPEED = Column("speed / true", "speed_ratio", factor=1, digits=2)
SEAM = Column("seam score (1 = no seam)", "seam_score", factor=1, digits=2)
CSV = {  # value: column
    "val_loss": "loss_16",
    "direction_accuracy": "direction",
    "speed_ratio": "speed",
    "seam_score": "seam",
}

# Rows ---------------------------------------------------------------------------------------------


def frames_task(frames):
    return f"{frames} frames"


def study_run(args, name, seed):
    """The Run of an arm with a seed."""
    arm = ARMS[name]
    size = shapes.size_of(args)
    tasks = {
        frames_task(frames): shapes.make_task(
            PATH_LENGTH,
            count=size.fewer,
            frames=frames,
            more="--time-scale 0.04",
            metrics=("motion", "consistency"),
        )
        for frames in arm.lengths
    }
    run = shapes.shapes_run(
        args,
        table="study",
        about={"arm": name, "seed": seed, "share": 1.0},
        tasks=tasks,
        arm=arm,
        more={"compiled": int(args.compile)},
    )
    run.read = read_study
    return run


def read_study(path):
    """The rows of study.json, after the lines of study.csv, an earlier version: some of a run's
    training, and one of each length of its samples.
    """
    rows = []
    path_of_lines = path.with_suffix(".csv")
    lines = []
    if path_of_lines.exists():
        with open(path_of_lines, newline="") as file:
            lines = list(csv.DictReader(file))
    if lines and "loss_16" not in lines[0]:
        fail(f"{path_of_lines}: has other columns; expected those of version {VERSION}")
    for line in lines:
        task = frames_task(line["frames"]) if line["kind"] == "sample" else ""
        values = {name: float(line[column]) for name, column in CSV.items() if line[column]}
        numbers = {name: float(line[name]) for name in ("seed", "share", "seconds")}
        rows.append(line | numbers | {"values": {task: values}})
    return rows + [row for row in lab.read_rows(path) if "values" in row]


def values_of(rows, name, column, frames):
    """{seed: value of a Column} of an arm: of its samples, or the loss of its training."""
    task = "" if column.value == "val_loss" else frames_task(frames)
    return by_seed(rows, {"arm": name, "share": 1}, column.of(task))


# Tables -------------------------------------------------------------------------------------------


def differences(rows, pairs):
    """Lines about loss and direction accuracy of pairs of arms."""
    compared = []
    for pair, column in itertools.product(pairs, (LOSS, DIRECTION)):
        values = {name: values_of(rows, name, column, 16) for name in pair}
        compared.append((values, pair, column.title, 3))
    return [*lab.compare(compared), ""]


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
    """Lines of markdown: a row for each case (arm, its second cell, frames of the samples)."""
    cells = []
    for name, second, frames in cases:
        row = [name, second]
        for column in columns:
            values = values_of(rows, name, column, frames)
            row.append(spread_cell(values, column.digits))
        cells.append(row)
    return table(["arm", title, *(column.title for column in columns)], cells)


def markdown(out, rows):
    """The lines of study.md in the folder `out`, from all rows."""
    script = "python scripts/studies/study.py"
    size = shapes.FULL
    config = shapes.config_of(size)
    _, flops = shapes.plan(config, ((16, 1.0),), mix=0, steps=size.steps)
    spent = {}  # the last seconds of training, and those of samples
    for row in rows:
        spent[row["arm"], row["seed"], row["share"], *row["values"]] = row.get("seconds", 0)
    hours = sum(spent.values()) / 3600
    codes = sorted({row["code"][:10] for row in rows})
    machines = sorted({row["machine"] for row in rows})
    compiled = " with --compile" if all(row["compiled"] for row in rows) else ""
    text = f"""\
# Which positions are best, and does a frame curriculum pay?

`{script} --report` wrote this page from `study.csv` ({len(rows)} rows, version {VERSION}, size \
full). `{script}` measured the rows: {hours:.1f} hours of training{compiled} and sampling, on \
{", ".join(machines)}; code {", ".join(codes)}. [study-first-edition.md](study-first-edition.md) \
answers other questions with earlier code.

An *arm* is a training recipe.

- **Data and model**: Moving Shapes, 16 x 16 px, 1.4 s. Depth {size.depth}, width {size.width}, \
4 heads, spatial patch 2, temporal patch 4, bf16.
- **Compute**: every step has {shapes.TOKENS} tokens. 100% compute is {flops / 1e12:.3g} TFLOP: \
{size.steps} steps of 8 clips of 16 frames. The learning rate decays to zero at the end of each run.
- **Flags of all arms**: `{shapes.BASE}`.
- **Positions**: *fixed* is the default. *rotary* adds `--use-rope --rope-theta 100`. *table* also \
adds `--position-table space`. *moving* also adds `--rope-speed 0.5`, about the speed of all \
shapes (0.51 patches per temporal patch). *4-8-16* without one of these words is rotary.
- **Frames**: *16* trains on 16 frames from the start. *4-8-16* gives a third of the compute to \
each of 4, 8 and 16 frames, and draws the frame interval from 1 to 2. With *mix*, a fifth of the \
later steps train on earlier frames. *16 moving intervals* also draws the interval, so it differs \
from *4-8-16 moving* only in its number of frames.
- **Speeds**: *speed N* is *table* with `--rope-speed N`. *speed 0* has the spatial frequencies of \
the other speeds. *speed 0.5* is *moving* again, by later code. Shapes move half as fast with \
*slow* and twice as fast with *fast*.
- **Validation loss**: arms with frame intervals of 1 to 2 validate on such clips. Compare their \
losses with each other, not with those in A.
- **Samples**: {size.fewer} clips per run and length, 0.04 s per frame, `ngd`, {shapes.USUAL} \
evaluations, guidance {shapes.GUIDANCE:g}, averaged weights of the last step.
- **Direction accuracy**: the share of samples with the motion of their class, measured by a \
tracker. Chance is 25%; real clips reach at least 100%.
- **Cells**: mean ± standard error over seeds, with each seed in brackets. A dash means that \
nothing was run, or that no direction was correct, so there is no speed. Differences are paired by \
seed, with Student's 95% interval and p value. A difference is significant if its p value, \
adjusted by Holm's method for the comparisons that are listed above the same table, is at most 0.05.
"""
    lines = text.split("\n")
    for letter, (question, names) in QUESTIONS.items():
        lines += [f"## {letter}. {question}", "", f"`{script} --only {letter}`", ""]
        lines += differences(rows, PAIRS[letter])
        cases = [(name, "100", 16) for name in names]
        lines += spread_table(rows, "compute (%)", (VALIDATION, PERCENT, SPEED), cases)
    cases = [(name, str(frames), frames) for name in CURRICULA for frames in LENGTHS]
    lines += spread_table(rows, "frames", (PERCENT, SPEED, SEAM), cases)
    page = Path(out, "study.md")
    known = page.read_text() if page.exists() else ""
    _, mark, finished = known.partition("![")  # its figures and more, of earlier versions
    return [*lines, f"{mark}{finished}"]


# The command --------------------------------------------------------------------------------------


def parse_args():
    parser = lab.study_parser(__doc__, "positions", seeds=[*range(5)])
    parser.add_argument(
        "--only",
        nargs="+",
        choices=(*QUESTIONS, *ARMS),
        metavar="WHAT",
        help="questions (A, B) or names of arms; default: all",
    )
    return parser.parse_args()


def runs_of(args):
    """All chosen runs, those with extra seeds last."""
    chosen = set(args.only or QUESTIONS)
    return [
        study_run(args, name, seed)
        for seed, (name, arm) in itertools.product(args.seeds, ARMS.items())
        if seed < arm.seeds and {name, *arm.questions} & chosen
    ]


@one_line_errors()
def main():
    args = parse_args()
    lab.run_study(args, runs_of(args), partial(markdown, args.out))


if __name__ == "__main__":
    main()
