"""Measure how well --forcing teaches a model to complete clips of Moving Shapes, and what it costs.

    python scripts/studies/given_frames.py --shares 0 0.75 --seeds 0 1 2
    python scripts/studies/given_frames.py --shares 0.75 --objectives eqm flow

A model takes about 10 minutes of one core.

The models follow the recommended curriculum of study.py, each with another share of forced clips.
The test set has 288 videos, made with another seed. evaluate.py scores completed clips with
--metric prediction, and clips without given frames with --metric motion. The script writes
given_frames.md and .json in results/studies/objectives, with several objectives
given_frames_objectives.md and .json. Models, samples and scores are in its folder given-frames (see
lab.py).
"""

import itertools
from pathlib import Path

import lab
from arms import GUIDANCE, RECOMMENDED, size_of, training
from objectives import ARMS, USUAL, sampling
from runtime.cli import SHARE, one_line_errors

TASKS = {  # row of the table: (flags of sample_gd.py, metric)
    "8 of 16 given": ("--num-frames 16 --given-frames 0-7", "prediction"),
    "8 of 16 given, no label": ("--num-frames 16 --given-frames 0-7 --classes none", "prediction"),
    "4 + 4 of 16 given": ("--num-frames 16 --given-frames 0-3,12-15", "prediction"),
    "4 + 4 of 16 given, no label": (
        "--num-frames 16 --given-frames 0-3,12-15 --classes none",
        "prediction",
    ),
    "4 of 16 given": ("--num-frames 16 --given-frames 0-3", "prediction"),
    "1 of 16 given": ("--num-frames 16 --given-frames 0", "prediction"),
    "nothing given, 16 frames": ("--num-frames 16", "motion"),
    "nothing given, 24 frames at once": ("--num-frames 24 --window 24", "motion"),
}
UNALIGNED = "1 of 16 given"  # ends within a temporal patch: not for flow
COLUMNS = {
    "direction accuracy (%)": lab.Column("direction_accuracy", 100, 1),
    "PSNR gain (dB)": lab.Column("psnr_gain", 1, 1),
    "color and shape kept (%)": lab.Column("appearance_kept", 100, 1),
    "speed / true": lab.Column("speed_ratio", 1, 2),
}


def make_run(args, share, seed, objective="eqm"):
    """The lab.Run of the model with this objective, share of forced clips and seed."""
    root = Path(args.out, "given-frames")
    clips = num_clips(args)
    size = size_of(args)
    arm = ARMS[objective]
    data = lab.data_sets(root / "moving-shapes", size.videos, max(2, clips // 12))
    videos, test = data
    flags = (
        f"--num-samples {clips} --seed {seed} --cfg-scale {GUIDANCE} --precision {lab.PRECISION} "
        f"{sampling(arm.way, USUAL)}"
    )
    given = {
        "prediction": ["--given", test, "--given-split", "all", "--no-keep-background"],
        "motion": [],
    }
    tasks = {}
    for task, (words, metric) in TASKS.items():
        tasks[task] = ([*f"{words} {flags}".split(), *given[metric]], [metric])
    if objective == "flow":
        tasks.pop(UNALIGNED, None)
    recipe = f"--forcing {share} {arm.flags} --gamma-shift {arm.shift}"
    return lab.Run(
        root / f"forcing{share:g}-{objective}-{arm.shift:g}-{arm.way}-seed{seed}",
        data,
        **training(args, RECOMMENDED, seed=seed, flags=[*recipe.split(), "--data-path", videos]),
        tasks=tasks,
        metrics={
            "prediction": ["--data-path", test],
            "motion": ["--data-path", test, "--split", "all", "--num-real", clips],
        },
    )


def num_clips(args):
    return 4 if args.miniature else 288  # one clip per test video


def markdown(content):
    seeds = len(content["seeds"])
    lines = lab.heading(
        "Given frames",
        "`scripts/studies/given_frames.py` wrote these tables. It trains the study's 4-8-16 recipe "
        "with a share of forced clips (`--forcing`) and completes "
        f"{content['videos']} test videos, with {seeds} seeds each. PSNR gain is relative to "
        "repeating the last given frame. Cells hold the mean over seeds (lowest to highest).",
    )
    tasks = content["tasks"]
    for model in dict.fromkeys(itertools.chain.from_iterable(tasks.values())):
        names = [task for task, models in tasks.items() if model in models]
        values = {}
        for title in COLUMNS:
            values[title] = {task: seed_values(tasks[task], model, title) for task in names}
        lines += [f"## --forcing {model}", "", *lab.seed_table(names, COLUMNS, values)]
    direction, gain, *_ = COLUMNS
    differences = []
    for task, models in tasks.items():
        for model in models:
            base, _, objective = model.partition(" ")
            titles = [direction]
            if objective:
                titles.append(gain)
            elif task.startswith("nothing") and model != "0" and "0" in models:
                base = "0"  # the cost of forcing for clips without given frames
            else:
                continue
            for title in titles:
                first = f"--forcing {model}"
                values = {first: seed_values(models, model, title)}
                values[base] = seed_values(models, base, title)
                if values[first]:  # clips without given frames have no PSNR
                    differences.append(
                        lab.difference(values, (first, base), what=f"{task}, {title}", digits=1)
                    )
    return lines + lab.difference_lines(differences)


def seed_values(models, model, title):
    """{seed: value} of a model's column, by the order of the seeds."""
    return dict(enumerate(models.get(model, {}).get(title, ())))


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
    runs = {}  # {model: its runs}
    for share, objective in itertools.product(args.shares, args.objectives):
        model = f"{share:g}"
        if objective != "eqm":
            model += f" --objective {objective}"
        runs[model] = []
        for seed in args.seeds:
            run = make_run(
                args,
                share=share,
                seed=seed,
                objective=objective,
            )
            runs[model].append(run)
    by_seed = zip(*runs.values(), strict=True)
    lab.run_all(list(itertools.chain.from_iterable(by_seed)))
    tasks = {}
    for task in TASKS:
        tasks[task] = {}
        for model, group in runs.items():
            if task in group[0].tasks:
                tasks[task][model] = lab.collect(group, task, COLUMNS)
    content = {"videos": num_clips(args), "seeds": args.seeds, "tasks": tasks}
    name = "given_frames" if args.objectives == ["eqm"] else "given_frames_objectives"
    lab.write_results(args.out, name, markdown(content), content)


if __name__ == "__main__":
    main()
