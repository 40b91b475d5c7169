"""Measure how well --forcing teaches a model to complete clips of Moving Shapes, and what it costs.

    python scripts/studies/given_frames.py --shares 0 0.75 --seeds 0 1 2
    python scripts/studies/given_frames.py --shares 0.75 --objectives eqm flow

A model takes about 10 minutes of one core.

The models follow the recommended curriculum of study.py, each with another share of forced clips.
The test set has 288 videos, made with another seed. evaluate.py scores completed clips with
--metric prediction, and clips without given frames with --metric motion. The script writes
given_frames.md and .json in results/studies/objectives, with several objectives
given_frames_objectives.md and .json. Models, samples and scores are in its folder runs (see
lab.py).
"""

import itertools

import lab
from lab import Column
from objectives import ARMS
from runtime.cli import SHARE, one_line_errors
from shapes import FULL, data_of, make_task, shapes_run, size_of

GIVEN = {  # task: flags of sample_gd.py
    "8 of 16 given": "--given-frames 0-7",
    "8 of 16 given, no label": "--given-frames 0-7 --classes none",
    "4 + 4 of 16 given": "--given-frames 0-3,12-15",
    "4 + 4 of 16 given, no label": "--given-frames 0-3,12-15 --classes none",
    "4 of 16 given": "--given-frames 0-3",
    "1 of 16 given": "--given-frames 0",
}
UNALIGNED = "1 of 16 given"  # ends within a temporal patch: not for flow
COLUMNS = (
    Column("direction accuracy (%)", "direction_accuracy"),
    Column("PSNR gain (dB)", "psnr_gain", 1),
    Column("color and shape kept (%)", "appearance_kept"),
    Column("speed / true", "speed_ratio", factor=1, digits=2),
)


def given_tasks(args, way, objective):
    """{name: (flags of sample_gd.py, metrics)}: a clip per test video."""
    _, test = data_of(args)
    clips = size_of(args).clips
    tasks = {}
    for name, flags in GIVEN.items():
        if name != UNALIGNED or objective != "flow":
            flags += f" --given {test} --given-split all --no-keep-background"
            tasks[name] = make_task(way, clips, more=flags, metrics=("prediction",))
    tasks["nothing given, 16 frames"] = make_task(way, clips)
    tasks["nothing given, 24 frames at once"] = make_task(way, clips, frames=24, more="--window 24")
    return tasks


def make_run(args, share, seed, objective="eqm", table="given_frames"):
    """The lab.Run of the model with this objective, share of forced clips and seed."""
    arm = ARMS[objective]
    model = f"{share:g}"
    if objective != "eqm":
        model += f" --objective {objective}"
    return shapes_run(
        args,
        table=table,
        about={"model": model, "seed": seed},
        tasks=given_tasks(args, arm.way, objective),
        flags=f"--forcing {share} --objective {objective} --gamma-shift {arm.shift}",
    )


def markdown(rows):
    seeds = dict.fromkeys(row["seed"] for row in rows)
    lines = lab.heading(
        "Given frames",
        "`scripts/studies/given_frames.py` wrote these tables. It trains the study's 4-8-16 recipe "
        "with a share of forced clips (`--forcing`) and completes "
        f"{FULL.clips} test videos, with {len(seeds)} seeds each. PSNR gain is relative to "
        "repeating the last given frame. Cells hold the mean over seeds (lowest to highest).",
    )
    direction, gain, *_ = COLUMNS
    models = dict.fromkeys(row["model"] for row in rows)
    digits = {column.title: column.digits for column in COLUMNS}
    for model in models:
        of_model, *_ = lab.rows_with({"model": model}, rows)
        tasks = lab.tasks_of([of_model])
        values = {}
        for column in COLUMNS:
            values[column.title] = {task: values_of(rows, task, column)[model] for task in tasks}
        lines += [f"## --forcing {model}", "", *lab.seed_table(tasks, digits, values)]
    differences = []
    cases = itertools.product(lab.tasks_of(rows), models, (direction, gain))
    for task, model, column in cases:
        base, _, objective = model.partition(" ")
        if not objective:
            # the cost of forcing for clips without given frames
            if column == gain or not task.startswith("nothing") or model == "0":
                continue
            base = "0"
        values = values_of(rows, task, column)
        both = {f"--forcing {model}": values[model], base: values.get(base, {})}
        if values[model] and (base in models or objective):  # clips without given frames: no PSNR
            differences.append((both, (*both,), f"{task}, {column.title}", 1))
    return lines + lab.compare(differences)


def values_of(rows, task, column):
    """{model: {seed: number}} of a task."""
    abouts = {row["model"]: {"model": row["model"]} for row in rows}
    return lab.by_arm(rows, abouts, column.of(task))


def parse_args():
    parser = lab.study_parser(__doc__, "objectives", seeds=[0, 1, 2])
    parser.add_argument(
        "--shares",
        type=SHARE,
        nargs="+",
        default=[0.0, 0.75],
        help="values of --forcing, a model each",
    )
    parser.add_argument(
        "--objectives",
        choices=ARMS,
        nargs="+",
        default=["eqm"],
        help="what the models are trained to predict, a model each",
    )
    return parser.parse_args()


@one_line_errors()
def main():
    args = parse_args()
    table = "given_frames" if args.objectives == ["eqm"] else "given_frames_objectives"
    runs = []
    for seed, share, objective in itertools.product(args.seeds, args.shares, args.objectives):
        runs.append(
            make_run(
                args,
                share,
                seed=seed,
                objective=objective,
                table=table,
            )
        )
    lab.run_study(args, runs, markdown)


if __name__ == "__main__":
    main()
