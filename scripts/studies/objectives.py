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
results/objectives.md and .json, with --tune or --few results/objectives_tuning or objectives_few.
Models, samples and scores are in results/objectives (see lab.py).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import lab
from arms import GUIDANCE, PATH_LENGTH, RECOMMENDED, size_of, training
from runtime.cli import fail, one_line_errors

SEEDS = {"eqm": 10, "flow": 10, "blind": 3}
TUNING_SEED = 10
FEW, TRIED = 6, 3  # seeds with other numbers of evaluations; with all IDEAS and --stop-below
SHIFTS = 0.5, 1, 3  # --gamma-shift of training; solvers sample on its grid
# objective: path lengths or solvers
WAYS = {"eqm": (PATH_LENGTH, 0.6), "flow": ("euler", "heun"), "blind": ("euler", "heun")}
COUNTS = (2, 4, 8, 15, 30)  # evaluations
USUAL = 15
LIMITS = (0.5, 1, 2)  # eqm: --stop-below
STOPS = (10, 12, 20, 30)  # eqm: evaluations with steps of the usual size
SHORT = PATH_LENGTH / 2  # while c(gamma) is 4, a path of 0.25 leads from noise to data
IDEAS = {  # of sampling eqm with few evaluations: (path length or solver, more flags)
    "no momentum": (PATH_LENGTH, ("--mu", 0)),
    "half the path length": (SHORT, ()),
    "half the path length, no momentum": (SHORT, ("--mu", 0)),
    "Euler steps": ("euler", ()),
}
BEST = "Euler steps"
COMPARED = (2, 4, 8, 30)  # evaluations with the best idea
TRIED_COUNTS = (2, 4)  # evaluations with all ideas
SCALES = (1, 2, 3)  # of guidance, in addition to the usual one, to see if it favors one objective
BOTH, NEAREST = "both right (%)", "RMSE to the nearest training clip / of held-out clips"
COLUMNS = {  # of 16 frames: title: (value of a manifest, factor, digits)
    BOTH: ("both_accuracy", 100, 1),
    "directions right (%)": ("direction_accuracy", 100, 1),
    "shapes right (%)": ("shape_accuracy", 100, 1),
    NEAREST: ("rmse_ratio", 1, 2),
}
MAIN = f"16 frames, {USUAL} evaluations"


@dataclass(frozen=True)
class Setting:
    """How an objective trains and samples."""

    shift: float
    way: float | str  # path length of the descent, or solver


# by --tune
SETTINGS = {"eqm": Setting(1, PATH_LENGTH), "flow": Setting(1, "heun"), "blind": Setting(1, "heun")}


def sampling(way, evaluations):
    """Flags of sample_gd.py for so many evaluations.

    Heun's method takes an odd number, so Euler's does for others.
    """
    way = "euler" if way == "heun" and evaluations % 2 == 0 else way
    points = (evaluations + 3) // 2 if way == "heun" else evaluations + 1
    flags = ["--sampler", way if isinstance(way, str) else "ngd", "--num-sampling-steps", points]
    return flags if isinstance(way, str) else [*flags, "--stepsize", f"{way / evaluations:.4g}"]


def make_task(
    way, evaluations, count, *more, num_frames=16, guidance=GUIDANCE, metrics=("motion",)
):
    """(flags of sample_gd.py, metrics) of `count` clips."""
    flags = ["--num-frames", num_frames, "--num-samples", count, "--cfg-scale", guidance]
    return [*flags, *sampling(way, evaluations), *more], metrics


def make_tasks(objective, setting, seed, clips, fewer):
    """{name: (flags of sample_gd.py, metrics)} of a run.

    fewer: number of clips of the secondary tasks.
    """

    def task(evaluations, *more, count=fewer, **options):
        return make_task(setting.way, evaluations, count, *more, **options)

    tasks = {MAIN: task(USUAL, count=clips, metrics=("motion", "nearest"))}
    tasks |= {f"{frames} frames": task(USUAL, num_frames=frames) for frames in (24, 32)}
    for count in COUNTS if seed < FEW else ():
        tasks |= {f"{count} evaluations": task(count)} if count != USUAL else {}
        tasks[f"{count} evaluations, no guidance"] = task(count, guidance=1)
    if objective == "eqm" and seed < TRIED:
        for limit in LIMITS:
            flags = "--num-sampling-steps", 2 * USUAL + 1, "--stop-below", limit
            tasks[f"until the field is below {limit:g}"] = task(USUAL, *flags)
        tasks |= {
            f"{n} steps of the usual size": task(USUAL, "--num-sampling-steps", n + 1)
            for n in STOPS
        }
    return tasks


def data_sets(args):
    """The `data` of a lab.Run: training videos and test videos."""
    folder = Path(args.out, "objectives", "moving-shapes")
    return lab.data_sets(
        folder, size_of(args).videos, 2 if args.miniature else 24, "--seconds", 1.4
    )


class ObjectiveRun(lab.JsonRun):
    """A model of an objective with a Setting and a seed."""

    def __init__(self, args, objective, setting, seed, tasks, table="objectives"):
        size = size_of(args)
        data = data_sets(args)
        videos, test = data
        about = {"objective": objective, "shift": setting.shift, "way": setting.way, "seed": seed}
        about |= {"size": size.name} if args.miniature else {}
        flags = ["--objective", objective, "--gamma-shift", setting.shift, "--data-path", videos]
        common = ["--seed", seed, "--precision", lab.PRECISION, "--batch-size", 32]
        motion = ["--data-path", test, "--split", "all", "--num-real", size.clips]
        super().__init__(
            Path(args.out, "objectives", "-".join(map(str, about.values()))),
            data,
            **training(args, RECOMMENDED, seed, 1.0, *flags),
            tasks={name: ([*words, *common], metrics) for name, (words, metrics) in tasks.items()},
            metrics={
                "motion": motion,
                "nearest": ["--data-path", videos, "--num-real", size.clips],
            },
            out=Path(args.out, f"{table}.json"),
            about=about,
        )

    def values(self, task):
        evaluations = json.loads(self.path(task).read_text())["mean_evaluations"]
        return super().values(task) | {"evaluations": evaluations}


def main_run(args, objective, seed):
    """The run of an objective with its Setting."""
    setting = SETTINGS[objective]
    return ObjectiveRun(
        args, objective, setting, seed, make_tasks(objective, setting, seed, *num_clips(args))
    )


def tuning_run(args, objective, shift):
    """The run that measures all ways to sample an objective with this training shift."""
    setting = SETTINGS[objective]
    count = num_clips(args)[0]
    tasks = {str(way): make_task(way, USUAL, count) for way in WAYS[objective]}
    for scale in SCALES if shift == setting.shift else ():
        tasks[f"guidance {scale}"] = make_task(setting.way, USUAL, count, guidance=scale)
    return ObjectiveRun(
        args, objective, Setting(shift, "all"), TUNING_SEED, tasks, "objectives_tuning"
    )


def few_run(args, seed):
    """The run that samples the eqm model of a seed by the IDEAS."""
    tasks = {
        f"{name}, {idea}": make_task(way, count, num_clips(args)[1], *more, guidance=guidance)
        for name, (count, guidance) in few_cases().items()
        for idea, (way, more) in IDEAS.items()
        if idea == BEST or (seed < TRIED and count in TRIED_COUNTS)
    }
    return ObjectiveRun(args, "eqm", SETTINGS["eqm"], seed, tasks, "objectives_few")


def few_cases():
    """{name of a task of the main study: (evaluations, guidance)}"""
    kinds = ("", GUIDANCE), (", no guidance", 1)
    return {
        f"{count} evaluations{kind}": (count, guidance)
        for count in COMPARED
        for kind, guidance in kinds
    }


def num_clips(args):
    """Clips of the primary endpoint, and of the other tasks."""
    return (4, 4) if args.miniature else (288, 96)


def tuning_markdown(rows):
    about = (
        f"`scripts/studies/objectives.py --tune` wrote these tables: seed {TUNING_SEED}, {USUAL} "
        "evaluations, "
    )
    about += f"guidance {GUIDANCE}. Cells: directions and shapes both right (%)."
    lines = ["# Tuning of the objectives", "", about, ""]
    for objective, ways in WAYS.items():
        own = sorted(
            (row for row in rows if row["objective"] == objective), key=lambda row: row["shift"]
        )
        cells = [
            [
                f"{row['shift']:g}",
                *(f"{100 * row['values'][str(way)]['both_accuracy']:.1f}" for way in ways),
            ]
            for row in own
        ]
        named = [way if isinstance(way, str) else f"path length {way:g}" for way in ways]
        lines += [f"## {objective}", "", *lab.table(["training shift", *named], cells)]
    cells = []
    scales = sorted([GUIDANCE, *SCALES])
    for objective, setting in SETTINGS.items():
        (values,) = (
            row["values"]
            for row in rows
            if (row["objective"], row["shift"]) == (objective, setting.shift)
        )
        tasks = [str(setting.way) if scale == GUIDANCE else f"guidance {scale}" for scale in scales]
        cells.append([objective, *(f"{100 * values[task]['both_accuracy']:.1f}" for task in tasks)])
    return [*lines, "## Guidance, after the choice", "", *lab.table(["", *map(str, scales)], cells)]


def few_markdown(main_rows, rows):
    """Markdown of IDEAS, between eqm and flow of the main study."""
    about = (
        "`scripts/studies/objectives.py --few` wrote this table: eqm with few evaluations, the "
        "models of "
    )
    about += f"[objectives.md](objectives.md). Cells: {BOTH}, the mean over seeds, and the range."

    def found(rows, objective, suffix=""):
        return {
            name: collect(rows, f"{name}{suffix}", "both_accuracy", 100).get(objective, {})
            for name in few_cases()
        }

    flow = found(main_rows, "flow")
    usual = found(main_rows, "eqm")
    # objectives.md compares the usual descent
    ways = {idea: found(rows, "eqm", f", {idea}") for idea in IDEAS}
    cells = [
        [way, *(lab.mean_cell([*values.values()], 1) for values in own.values())]
        for way, own in ({"usual descent": usual} | ways | {"flow, Euler steps": flow}).items()
    ]
    gaps = [
        lab.difference("eqm", "flow", f"{name}, {way}", own[name], flow[name], 2)
        for way, own in ways.items()
        for name in flow
        if own[name]
    ]
    lines = ["# Few evaluations", "", about, "", *lab.table(["", *flow], cells)]
    return lines + lab.difference_lines(gaps)


def collect(rows, task, name, factor=1.0):
    """{objective: {seed: value}} of a task, for models with the SETTINGS of today."""
    found = {objective: {} for objective in SETTINGS}
    for row in sorted(rows, key=lambda row: row["seed"]):
        setting = Setting(row["shift"], row["way"])
        if (
            setting == SETTINGS[row["objective"]]
            and (value := row["values"].get(task, {}).get(name)) is not None
        ):
            found[row["objective"]][row["seed"]] = factor * value
    return {objective: values for objective, values in found.items() if values}


def markdown(rows):
    about = (
        "`scripts/studies/objectives.py` wrote these tables. Cells hold the mean over seeds "
        "(blind has fewer), and "
    )
    about += (
        "the range. flow and blind take Heun steps for an odd number of evaluations, Euler steps "
        "for an even one."
    )
    lines = ["# Objectives", "", about, "", f"## {MAIN}", ""]
    found = {
        title: collect(rows, MAIN, name, factor) for title, (name, factor, _) in COLUMNS.items()
    }
    table = {
        objective: {title: [*own.get(objective, {}).values()] for title, own in found.items()}
        for objective in found[BOTH]
    }
    lines += lab.seed_table(table, COLUMNS)
    gaps = [
        difference(found[title], title, digits + 1) for title, (_, _, digits) in COLUMNS.items()
    ]
    both = found[BOTH]
    gaps.append(lab.difference("eqm", "blind", BOTH, both.get("eqm", {}), both.get("blind", {}), 2))
    lines += lab.difference_lines(gaps)
    tasks = dict.fromkeys(task for row in rows for task in row["values"] if task not in ("", MAIN))
    cells = []
    gaps = []
    for task in tasks:
        both = collect(rows, task, "both_accuracy", 100)
        spent = collect(rows, task, "evaluations")
        counts = "; ".join(
            dict.fromkeys(lab.mean_cell([*own.values()], 1) for own in spent.values())
        )
        cells.append(
            [
                task,
                *(lab.mean_cell([*both.get(objective, {}).values()], 1) for objective in SETTINGS),
                counts,
            ]
        )
        gaps += [difference(both, task, 2)] if {"eqm", "flow"} <= both.keys() else []
    lines += [
        "",
        f"## Other samples: {BOTH}",
        "",
        *lab.table(["", *SETTINGS, "evaluations"], cells),
    ]
    return lines + lab.difference_lines(gaps)


def difference(found, what, digits):
    return lab.difference("eqm", "flow", what, found.get("eqm", {}), found.get("flow", {}), digits)


def parse_args():
    parser = lab.study_parser(__doc__, seeds=[*range(10)])
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
    if args.tune:
        runs = [tuning_run(args, objective, shift) for shift in SHIFTS for objective in SETTINGS]
    elif args.few:
        runs = [few_run(args, seed) for seed in args.seeds if seed < FEW]
    else:
        runs = [
            main_run(args, objective, seed)
            for seed in args.seeds
            for objective in SETTINGS
            if seed < SEEDS[objective]
        ]
    if not runs:
        fail(
            f"--seeds {args.seeds[0]}: expected some below "
            f"{FEW if args.few else max(SEEDS.values())}"
        )
    lab.run_all(runs)
    rows = lab.read_rows(runs[0].out)
    main_rows = lab.read_rows(Path(args.out, "objectives.json"))
    lines = (
        tuning_markdown(rows)
        if args.tune
        else few_markdown(main_rows, rows)
        if args.few
        else markdown(rows)
    )
    lab.write_results(args.out, runs[0].out.stem, lines)


if __name__ == "__main__":
    main()
