"""Compare objectives at equal compute on Moving Shapes: is EqM better than flow matching, and why?

    python scripts/studies/objectives.py          10 seeds of eqm, flow and told-w, 3 of
                                                  blind, blind-w and told-c
    python scripts/studies/objectives.py --few    other descents of eqm with few evaluations, with
                                                  the same models

All models follow the recommended curriculum of study.py; a run takes about 5 minutes of one core.
The primary endpoint is the share of 16-frame clips whose direction and shape are both right after
15 evaluations with guidance, the scale of which an earlier study chose for eqm. Another seed chose
the training shift, the path and the solver (tuning.md). The arms of the control are told-w and
blind-w, which are flow and blind with EqM's weight of the loss, and told-c, which is eqm told
gamma. They have the settings of flow, and are only measured with 15 evaluations and guidance. The
script writes objectives.md, .json and .png in results/studies/objectives, with --few few.md and
.json. Models, samples and scores are in its folder runs (see lab.py).
"""

import itertools
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import lab
from lab import Column
from runtime.cli import one_line_errors
from shapes import (
    BOTH_RIGHT,
    GUIDANCE,
    PATH_LENGTH,
    USUAL,
    draw_lengths,
    make_task,
    shapes_run,
    size_of,
)


@dataclass(frozen=True)
class Arm:
    """An objective, and how its models train and sample."""

    way: float | str  # path length of the descent, or solver
    seeds: int = 10
    shift: float = 1  # --gamma-shift of training; solvers sample on its grid
    counts_seeds: int = 6  # with other numbers of evaluations, and without guidance


ARMS = {
    "eqm": Arm(PATH_LENGTH),
    "flow": Arm("heun"),
    "told-w": Arm("heun", counts_seeds=0),
    "blind": Arm("heun", seeds=3),
    "blind-w": Arm("heun", seeds=3, counts_seeds=0),
    "told-c": Arm("heun", seeds=3, counts_seeds=0),
}
COUNTS = (2, 4, 8, 15, 30)  # evaluations
LIMITS = (0.5, 1, 2)  # --stop-below of descents
STOPS = (10, 12, 20, 30)  # evaluations of descents with steps of the usual size
TRIED_SEEDS = 3  # with LIMITS and STOPS, and with all IDEAS
SHORT = PATH_LENGTH / 2  # while c(gamma) is 4, a path of 0.25 leads from noise to data
BEST = "Euler steps"
IDEAS = {  # of sampling eqm with few evaluations: (path length or solver, more flags)
    "no momentum": (PATH_LENGTH, "--mu 0"),
    "half the path length": (SHORT, ""),
    "half the path length, no momentum": (SHORT, "--mu 0"),
    BEST: ("euler", ""),
}
COMPARED = (2, 4, 8, 30)  # evaluations with the best idea
TRIED_COUNTS = (2, 4)  # evaluations with all ideas
CASES = {}  # {a task of the main study: (evaluations, guidance)}
for count in COMPARED:
    CASES[f"{count} evaluations"] = (count, GUIDANCE)
    CASES[f"{count} evaluations, no guidance"] = (count, 1)
MAIN = f"16 frames, {USUAL} evaluations"
COLUMNS = (  # of MAIN
    BOTH_RIGHT,
    Column("directions right (%)", "direction_accuracy"),
    Column("shapes right (%)", "shape_accuracy"),
    Column(
        "RMSE to the nearest training clip / of held-out clips", "rmse_ratio", factor=1, digits=2
    ),
)
PRIMARY = ("eqm", "flow")  # this pair is compared in all tasks
# these, where measured; added when the others had been compared
CONTROL = (
    ("eqm", "told-w"),
    ("told-w", "flow"),
    ("eqm", "blind-w"),
    ("blind-w", "blind"),
    ("eqm", "told-c"),
)
COMPARISONS = (  # of MAIN; but for CONTROL, fixed in advance
    *itertools.product([PRIMARY], COLUMNS),
    *itertools.product(CONTROL, [BOTH_RIGHT]),
    (("eqm", "blind"), BOTH_RIGHT),
)


ABOUTS = {}
for name, arm in ARMS.items():
    ABOUTS[name] = {"objective": name, "shift": arm.shift, "way": arm.way}


def make_run(args, name, seed, tasks, table="objectives"):
    """The run of an arm with a seed."""
    flags = f"--objective {name} --gamma-shift {ARMS[name].shift}"
    return shapes_run(
        args,
        table,
        about=ABOUTS[name] | {"seed": seed},
        tasks=tasks,
        flags=flags,
    )


def main_run(args, name, seed):
    """The run of an arm of the main study."""
    way = ARMS[name].way
    size = size_of(args)
    usual = partial(make_task, way, size.fewer)
    tasks = {MAIN: make_task(way, size.clips, metrics=("motion", "nearest"))}
    for frames in (24, 32):
        tasks[f"{frames} frames"] = usual(frames=frames)
    for count in COUNTS if seed < ARMS[name].counts_seeds else ():
        if count != USUAL:
            tasks[f"{count} evaluations"] = usual(count)
        tasks[f"{count} evaluations, no guidance"] = usual(count, guidance=1)
    if name == "eqm" and seed < TRIED_SEEDS:
        for limit in LIMITS:
            flags = f"--num-sampling-steps {2 * USUAL + 1} --stop-below {limit}"
            tasks[f"until the field is below {limit:g}"] = usual(more=flags)
        for count in STOPS:
            flags = f"--num-sampling-steps {count + 1}"
            tasks[f"{count} steps of the usual size"] = usual(more=flags)
    return make_run(
        args,
        name,
        seed=seed,
        tasks=tasks,
    )


def few_run(args, seed):
    """The run that samples the eqm model of a seed by the IDEAS."""
    tasks = {}
    for (name, (count, scale)), idea in itertools.product(CASES.items(), IDEAS):
        is_tried = seed < TRIED_SEEDS and count in TRIED_COUNTS
        if is_tried or idea == BEST:
            way, flags = IDEAS[idea]
            clips = size_of(args).fewer
            tasks[f"{name}, {idea}"] = make_task(
                way,
                clips,
                evaluations=count,
                guidance=scale,
                more=flags,
            )
    return make_run(
        args,
        "eqm",
        seed=seed,
        tasks=tasks,
        table="few",
    )


def few_markdown(main_rows, rows):
    """Markdown of IDEAS, between eqm and flow of the main study."""
    first, second = PRIMARY
    values = {}  # {task: {row of the table: {seed: value}}}
    differences = []
    for task in CASES:
        main = lab.by_arm(main_rows, ABOUTS, BOTH_RIGHT.of(task))
        values[task] = {"usual descent": main[first]}
        for idea in IDEAS:
            column = BOTH_RIGHT.of(f"{task}, {idea}")
            values[task][idea] = lab.by_seed(rows, ABOUTS[first], column)
        values[task]["flow, Euler steps"] = main[second]
    for idea, task in itertools.product(IDEAS, CASES):
        both = {first: values[task][idea], second: values[task]["flow, Euler steps"]}
        if both[first]:
            differences.append((both, PRIMARY, f"{task}, {idea}", 2))
    lines = lab.heading(
        "Few evaluations",
        "`scripts/studies/objectives.py --few` wrote this table: eqm with few evaluations, the "
        f"models of [objectives.md](objectives.md). Cells: {BOTH_RIGHT.title}, the mean over "
        "seeds, and the range.",
    )
    names = ["usual descent", *IDEAS, "flow, Euler steps"]
    lines += lab.seed_table(names, dict.fromkeys(values, 1), values)
    return lines + lab.compare(differences)


def markdown(rows):
    lines = lab.heading(
        "Objectives",
        "`scripts/studies/objectives.py` wrote these tables. Cells hold the mean over seeds "
        "(blind, blind-w and told-c have fewer), and the range. All but eqm take Heun steps for "
        "an odd number of evaluations, Euler steps for an even one.",
    )
    columns = [column.of(MAIN) for column in COLUMNS]
    lines += [f"## {MAIN}", "", *lab.arm_table(rows, ABOUTS, columns)]
    differences = []
    for pair, column in COMPARISONS:
        values = lab.by_arm(rows, ABOUTS, column.of(MAIN))
        differences.append((values, pair, column.title, column.digits + 1))
    lines += [*lab.compare(differences), "", f"## Other samples: {BOTH_RIGHT.title}", ""]
    cells = []
    differences = []
    for task in lab.tasks_of(rows):
        if task == MAIN:
            continue
        both = lab.by_arm(rows, ABOUTS, BOTH_RIGHT.of(task))
        spent = lab.by_arm(rows, ABOUTS, Column("", "evaluations", factor=1, task=task))
        counts = dict.fromkeys(lab.mean_cell(seeds, 1) for seeds in spent.values() if seeds)
        right = [lab.mean_cell(both[name], 1) for name in ARMS]
        cells.append([task, *right, "; ".join(counts)])
        for pair in (PRIMARY, *CONTROL):
            if all(both[name] for name in pair):
                differences.append((both, pair, task, 2))
    lines += lab.table(["", *ARMS, "evaluations"], cells)
    return lines + lab.compare(differences)


def parse_args():
    parser = lab.study_parser(__doc__, "objectives", seeds=[*range(10)])
    parser.add_argument(
        "--few", action="store_true", help="compare descents of eqm with few evaluations"
    )
    return parser.parse_args()


@one_line_errors()
def main():
    args = parse_args()
    write = markdown
    if args.few:
        runs = [few_run(args, seed) for seed in args.seeds if seed < ARMS["eqm"].counts_seeds]
        write = partial(few_markdown, lab.read_rows(Path(args.out, "objectives.json")))
    else:
        cases = itertools.product(args.seeds, ARMS)
        runs = [main_run(args, name, seed) for seed, name in cases if seed < ARMS[name].seeds]
    lab.run_study(args, runs, write)
    if not args.few and not args.list:
        tasks = {16: MAIN, 24: "24 frames", 32: "32 frames"}
        draw_lengths(Path(args.out, "objectives.png"), runs[0].rows(), ABOUTS, tasks)


if __name__ == "__main__":
    main()
