"""Compare eqm, flow and blind at equal compute on Moving Shapes: is EqM better than flow matching?

    python scripts/studies/objectives.py --tune   seed 10: training shifts, with paths or solvers of
                                                  each objective
    python scripts/studies/objectives.py          10 seeds of eqm and flow, 3 of blind, with the
                                                  settings below
    python scripts/studies/objectives.py --few    other descents of eqm with few evaluations, with
                                                  the same models

All models follow the recommended curriculum of study.py; a run takes about 5 minutes of one core.
The primary endpoint is the share of 16-frame clips whose direction and shape are both right after
15 evaluations with guidance, the scale of which an earlier study chose for eqm. The script writes
objectives.md and .json in results/studies/objectives, with --tune or --few tuning or few. Models,
samples and scores are in its folder objectives (see lab.py).
"""

import itertools
import json
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path

import lab
from arms import GUIDANCE, PATH_LENGTH, RECOMMENDED, size_of, training
from runtime.cli import fail, one_line_errors


@dataclass(frozen=True)
class Arm:
    """An objective, and how its models train and sample. --tune has chosen `shift` and `way`."""

    flags: str  # of train.py
    seeds: int
    shift: float  # --gamma-shift of training; solvers sample on its grid
    way: float | str  # path length of the descent, or solver
    tuned_ways: tuple

    @property
    def descends(self):
        return not isinstance(self.way, str)


ARMS = {
    "eqm": Arm(
        flags="--objective eqm",
        seeds=10,
        shift=1,
        way=PATH_LENGTH,
        tuned_ways=(PATH_LENGTH, 0.6),
    ),
    "flow": Arm(
        flags="--objective flow",
        seeds=10,
        shift=1,
        way="heun",
        tuned_ways=("euler", "heun"),
    ),
    "blind": Arm(
        flags="--objective blind",
        seeds=3,
        shift=1,
        way="heun",
        tuned_ways=("euler", "heun"),
    ),
}
TUNING_SEED = 10
TUNED_SHIFTS = 0.5, 1, 3
SCALES = (1, GUIDANCE, 2, 3)  # of guidance: does the usual one favor an objective?
COUNTS = (2, 4, 8, 15, 30)  # evaluations
USUAL = 15
COUNTS_SEEDS = 6  # with other numbers of evaluations
LIMITS = (0.5, 1, 2)  # --stop-below of descents
STOPS = (10, 12, 20, 30)  # evaluations of descents with steps of the usual size
TRIED_SEEDS = 3  # with LIMITS and STOPS, and with all IDEAS
SHORT = PATH_LENGTH / 2  # while c(gamma) is 4, a path of 0.25 leads from noise to data
IDEAS = {  # of sampling eqm with few evaluations: (path length or solver, more flags)
    "no momentum": (PATH_LENGTH, "--mu 0"),
    "half the path length": (SHORT, ""),
    "half the path length, no momentum": (SHORT, "--mu 0"),
    "Euler steps": ("euler", ""),
}
BEST = "Euler steps"
COMPARED = (2, 4, 8, 30)  # evaluations with the best idea
TRIED_COUNTS = (2, 4)  # evaluations with all ideas
MAIN = f"16 frames, {USUAL} evaluations"
BOTH = "both right (%)"
BOTH_RIGHT = lab.Column("both_accuracy", 100, 1)
COLUMNS = {  # of MAIN
    BOTH: BOTH_RIGHT,
    "directions right (%)": lab.Column("direction_accuracy", 100, 1),
    "shapes right (%)": lab.Column("shape_accuracy", 100, 1),
    "RMSE to the nearest training clip / of held-out clips": lab.Column("rmse_ratio", 1, 2),
}
EVALUATIONS = lab.Column("evaluations", 1, 1)
PRIMARY = ("eqm", "flow")  # this pair is compared in all tasks
COMPARISONS = {  # of MAIN, fixed in advance
    PRIMARY: tuple(COLUMNS),
    ("eqm", "blind"): (BOTH,),
}


def solver_and_points(way, evaluations):
    """(solver, --num-sampling-steps) for so many evaluations of a solver.

    Heun's method takes an odd number, so Euler's does for others.
    """
    if way == "heun" and evaluations % 2:
        return "heun", (evaluations + 3) // 2
    return "euler", evaluations + 1


def sampling(way, evaluations):
    """Flags of sample_gd.py, as text, for so many evaluations.

    way: a solver, or the path length of a descent.
    """
    if isinstance(way, str):
        solver, points = solver_and_points(way, evaluations)
        return f"--sampler {solver} --num-sampling-steps {points}"
    step_size = way / evaluations
    return f"--sampler ngd --num-sampling-steps {evaluations + 1} --stepsize {step_size:.4g}"


def make_task(
    way, evaluations, count, more="", num_frames=16, guidance=GUIDANCE, metrics=("motion",)
):
    """(flags of sample_gd.py, metrics) of `count` clips. more: flags that override others."""
    clips = f"--num-frames {num_frames} --num-samples {count} --cfg-scale {guidance}"
    return f"{clips} {sampling(way, evaluations)} {more}".split(), metrics


def make_tasks(arm, seed, clips, fewer):
    """{name: (flags of sample_gd.py, metrics)} of a run.

    fewer: number of clips of the secondary tasks.
    """
    usual = partial(make_task, arm.way, USUAL)
    tasks = {MAIN: usual(clips, metrics=("motion", "nearest"))}
    for frames in (24, 32):
        tasks[f"{frames} frames"] = usual(fewer, num_frames=frames)
    for count in COUNTS if seed < COUNTS_SEEDS else ():
        if count != USUAL:
            tasks[f"{count} evaluations"] = make_task(arm.way, count, fewer)
        tasks[f"{count} evaluations, no guidance"] = make_task(
            arm.way,
            evaluations=count,
            count=fewer,
            guidance=1,
        )
    if arm.descends and seed < TRIED_SEEDS:
        for limit in LIMITS:
            flags = f"--num-sampling-steps {2 * USUAL + 1} --stop-below {limit}"
            tasks[f"until the field is below {limit:g}"] = usual(fewer, flags)
        for count in STOPS:
            flags = f"--num-sampling-steps {count + 1}"
            tasks[f"{count} steps of the usual size"] = usual(fewer, flags)
    return tasks


def data_sets(args):
    """The `data` of a lab.Run: training videos and test videos."""
    folder = Path(args.out, "objectives", "moving-shapes")
    return lab.data_sets(folder, size_of(args).videos, 2 if args.miniature else 24)


class ShapesRun(lab.JsonRun):
    """A model of Moving Shapes that follows the recommended curriculum, in the folder `study`.

    about: what tells its row from others; flags: of train.py, as text.
    """

    def __init__(self, args, study, about, flags, tasks, table):
        size = size_of(args)
        seed = about["seed"]
        if args.miniature:
            about = about | {"size": size.name}
        data = data_sets(args)
        videos, test = data
        common = f"--seed {seed} --precision {lab.PRECISION} --batch-size 32".split()
        count = ["--num-real", size.clips]
        super().__init__(
            Path(args.out, study, "-".join(map(str, about.values()))),
            data,
            **training(
                args,
                arm=RECOMMENDED,
                seed=seed,
                flags=[*flags.split(), "--data-path", videos],
            ),
            tasks={task: (words + common, metrics) for task, (words, metrics) in tasks.items()},
            metrics={
                "motion": ["--data-path", test, "--split", "all", *count],
                "nearest": ["--data-path", videos, *count],
            },
            out=Path(args.out, f"{table}.json"),
            about=about,
        )


class ObjectiveRun(ShapesRun):
    """A model of an arm with a seed. name: the arm's name in ARMS."""

    def __init__(self, args, name, arm, seed, tasks, table="objectives"):
        super().__init__(
            args,
            study="objectives",
            about={
                "objective": name,
                "shift": arm.shift,
                "way": arm.way,
                "seed": seed,
            },
            flags=f"{arm.flags} --gamma-shift {arm.shift}",
            tasks=tasks,
            table=table,
        )

    def values(self, task):
        evaluations = json.loads(self.path(task).read_text())["mean_evaluations"]
        return super().values(task) | {"evaluations": evaluations}


def main_run(args, name, seed):
    """The run of an arm of the main study."""
    arm = ARMS[name]
    clips, fewer = num_clips(args)
    return ObjectiveRun(
        args,
        name=name,
        arm=arm,
        seed=seed,
        tasks=make_tasks(arm, seed, clips=clips, fewer=fewer),
    )


def tuning_run(args, name, shift):
    """The run that measures all ways to sample an arm with this training shift."""
    arm = ARMS[name]
    count, _ = num_clips(args)
    tasks = {str(way): make_task(way, USUAL, count) for way in arm.tuned_ways}
    for scale in SCALES if shift == arm.shift else ():
        if scale != GUIDANCE:
            tasks[guidance_task(arm, scale)] = make_task(
                arm.way,
                evaluations=USUAL,
                count=count,
                guidance=scale,
            )
    return ObjectiveRun(
        args,
        name=name,
        arm=replace(arm, shift=shift, way="all"),
        seed=TUNING_SEED,
        tasks=tasks,
        table="tuning",
    )


def guidance_task(arm, scale):
    """The name of the task of tuning with the usual way to sample, and this guidance."""
    return str(arm.way) if scale == GUIDANCE else f"guidance {scale}"


def few_run(args, seed):
    """The run that samples the eqm model of a seed by the IDEAS."""
    _, clips = num_clips(args)
    tasks = {}
    for name, (count, guidance) in few_cases().items():
        is_tried = seed < TRIED_SEEDS and count in TRIED_COUNTS
        for idea, (way, flags) in IDEAS.items():
            if is_tried or idea == BEST:
                tasks[f"{name}, {idea}"] = make_task(
                    way,
                    evaluations=count,
                    count=clips,
                    more=flags,
                    guidance=guidance,
                )
    return ObjectiveRun(
        args,
        name="eqm",
        arm=ARMS["eqm"],
        seed=seed,
        tasks=tasks,
        table="few",
    )


def few_cases():
    """{name of a task of the main study: (evaluations, guidance)}"""
    cases = {}
    for count in COMPARED:
        cases[f"{count} evaluations"] = (count, GUIDANCE)
        cases[f"{count} evaluations, no guidance"] = (count, 1)
    return cases


def num_clips(args):
    """Clips of the primary endpoint, and of the other tasks."""
    return (4, 4) if args.miniature else (288, 96)


def collect(rows, task, column):
    """{name of an arm: {seed: value}} of a task, for models with the settings of today."""
    values = {}
    for name, arm in ARMS.items():
        about = {
            "objective": name,
            "shift": arm.shift,
            "way": arm.way,
        }
        numbers = lab.by_seed(rows, about, replace(column, task=task))
        if numbers:
            values[name] = numbers
    return values


def tuning_markdown(rows):
    lines = lab.heading(
        "Tuning of the objectives",
        f"`scripts/studies/objectives.py --tune` wrote these tables: seed {TUNING_SEED}, {USUAL} "
        f"evaluations, guidance {GUIDANCE}. Cells: directions and shapes both right (%).",
    )
    guided = []
    for name, arm in ARMS.items():
        cells = []
        for row in sorted(lab.rows_with({"objective": name}, rows), key=itemgetter("shift")):
            both = partial(both_right, row["values"])
            right = [both(str(way)) for way in arm.tuned_ways]
            cells.append([f"{row['shift']:g}", *right])
            if row["shift"] == arm.shift:
                scaled = [both(guidance_task(arm, scale)) for scale in SCALES]
                guided.append([name, *scaled])
        titles = ["training shift"]
        for way in arm.tuned_ways:
            titles.append(way if isinstance(way, str) else f"path length {way:g}")
        lines += [f"## {name}", "", *lab.table(titles, cells)]
    guidance = lab.table(["", *map(str, SCALES)], guided)
    return [*lines, "## Guidance, after the choice", "", *guidance]


def both_right(values, task):
    return f"{BOTH_RIGHT.number(values[task]):.1f}"


def few_markdown(main_rows, rows):
    """Markdown of IDEAS, between eqm and flow of the main study."""
    first, second = PRIMARY
    values = {}  # {task: {row of the table: {seed: value}}}
    for task in few_cases():
        main = collect(main_rows, task, BOTH_RIGHT)
        values[task] = {"usual descent": main.get(first), "flow, Euler steps": main.get(second, {})}
        for idea in IDEAS:
            values[task][idea] = collect(rows, f"{task}, {idea}", BOTH_RIGHT).get(first)
    differences = []
    for idea, task in itertools.product(IDEAS, values):
        tried = values[task][idea]
        if tried:
            both = {first: tried, second: values[task]["flow, Euler steps"]}
            differences.append(lab.difference(both, PRIMARY, what=f"{task}, {idea}", digits=2))
    lines = lab.heading(
        "Few evaluations",
        "`scripts/studies/objectives.py --few` wrote this table: eqm with few evaluations, the "
        f"models of [objectives.md](objectives.md). Cells: {BOTH}, the mean over seeds, and the "
        "range.",
    )
    names = ["usual descent", *IDEAS, "flow, Euler steps"]
    lines += lab.seed_table(names, dict.fromkeys(values, BOTH_RIGHT), values)
    return lines + lab.difference_lines(differences)


def markdown(rows):
    lines = lab.heading(
        "Objectives",
        "`scripts/studies/objectives.py` wrote these tables. Cells hold the mean over seeds "
        "(blind has fewer), and the range. flow and blind take Heun steps for an odd number of "
        "evaluations, Euler steps for an even one.",
    )
    values = {title: collect(rows, MAIN, column) for title, column in COLUMNS.items()}
    differences = []
    for pair, titles in COMPARISONS.items():
        for title in titles:
            differences.append(
                lab.difference(values[title], pair, what=title, digits=COLUMNS[title].digits + 1)
            )
    lines += [f"## {MAIN}", "", *lab.seed_table(values[BOTH], COLUMNS, values)]
    lines += [*lab.difference_lines(differences), "", f"## Other samples: {BOTH}", ""]
    cells = []
    differences = []
    for task in dict.fromkeys(itertools.chain.from_iterable(row["values"] for row in rows)):
        if task in ("", MAIN):
            continue
        both = collect(rows, task, BOTH_RIGHT)
        spent = collect(rows, task, EVALUATIONS)
        counts = dict.fromkeys(lab.mean_cell(seeds, 1) for seeds in spent.values())
        right = [lab.mean_cell(both.get(name), 1) for name in ARMS]
        cells.append([task, *right, "; ".join(counts)])
        if both.keys() >= set(PRIMARY):
            differences.append(lab.difference(both, PRIMARY, what=task, digits=2))
    lines += lab.table(["", *ARMS, "evaluations"], cells)
    return lines + lab.difference_lines(differences)


def parse_args():
    most = max(arm.seeds for arm in ARMS.values())
    parser = lab.study_parser(__doc__, "objectives", seeds=[*range(most)])
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument(
        "--tune",
        action="store_true",
        help=f"compare settings of each objective on seed {TUNING_SEED}",
    )
    kinds.add_argument(
        "--few", action="store_true", help="compare descents of eqm with few evaluations"
    )
    return parser.parse_args()


@one_line_errors()
def main():
    args = parse_args()
    most = COUNTS_SEEDS if args.few else max(arm.seeds for arm in ARMS.values())
    seeds = [seed for seed in args.seeds if seed < most]
    if not (seeds or args.tune):
        fail(f"--seeds {args.seeds[0]}: expected some below {most}")
    if args.tune:
        runs = [
            tuning_run(args, name, shift) for shift, name in itertools.product(TUNED_SHIFTS, ARMS)
        ]
    elif args.few:
        runs = [few_run(args, seed) for seed in seeds]
    else:
        runs = []
        for seed in seeds:
            names = [name for name, arm in ARMS.items() if seed < arm.seeds]
            runs += [main_run(args, name, seed) for name in names]
    lab.run_all(runs)
    out = runs[0].out
    rows = lab.read_rows(out)
    if args.tune:
        lines = tuning_markdown(rows)
    elif args.few:
        lines = few_markdown(lab.read_rows(Path(args.out, "objectives.json")), rows)
    else:
        lines = markdown(rows)
    lab.write_results(args.out, out.stem, lines)


if __name__ == "__main__":
    main()
