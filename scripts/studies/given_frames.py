"""Measure how well --forcing teaches a model to complete clips, and what it costs. Moving Shapes, several seeds.

    python scripts/studies/given_frames.py --shares 0 0.75 --seeds 0 1 2     about 10 minutes of one core per model
    python scripts/studies/given_frames.py --shares 0.75 --objective flow    writes given_frames_flow.md and .json

The models follow the recommended curriculum of study.py, each with another share of forced clips. The test set has 288
videos, made with another seed. evaluate.py scores completed clips with --metric prediction, and clips without given
frames with --metric motion. The script writes results/given_frames.md and .json. Models, samples and scores are in
results/given-frames (see lab.py).
"""

from pathlib import Path

import lab
from arms import GUIDANCE, RECOMMENDED, sampling_flags, size_of, training
from objectives import SETTINGS, USUAL, sampling
from runtime.cli import SHARE, one_line_errors

TASKS = {  # row of the table: (flags of sample_gd.py, metric)
    "8 of 16 given": ("--num-frames 16 --given-frames 0-7", "prediction"),
    "8 of 16 given, no label": ("--num-frames 16 --given-frames 0-7 --classes none", "prediction"),
    "4 + 4 of 16 given": ("--num-frames 16 --given-frames 0-3,12-15", "prediction"),
    "4 + 4 of 16 given, no label": ("--num-frames 16 --given-frames 0-3,12-15 --classes none", "prediction"),
    "1 of 16 given": ("--num-frames 16 --given-frames 0", "prediction"),
    "nothing given, 16 frames": ("--num-frames 16", "motion"),
    "nothing given, 24 frames at once": ("--num-frames 24 --window 24", "motion"),
}
UNALIGNED = "1 of 16 given"  # ends within a temporal patch: not for flow
COLUMNS = {  # title: (value of a manifest, factor, digits)
    "direction accuracy (%)": ("direction_accuracy", 100, 1),
    "PSNR gain (dB)": ("psnr_gain", 1, 1),
    "color and shape kept (%)": ("appearance_kept", 100, 1),
    "speed / true": ("speed_ratio", 1, 2),
}


def make_run(args, share, seed, objective="eqm"):
    """The lab.Run of the model with this objective, share of forced clips and seed."""
    root, clips, size = Path(args.out, "given-frames"), num_clips(args), size_of(args)
    data = lab.data_sets(root / "moving-shapes", size.videos, max(2, clips // 12), "--seconds", 1.4)
    videos, test = data
    way = ["--cfg-scale", GUIDANCE, "--precision", "bf16", *sampling(SETTINGS[objective].way, USUAL)]
    own = sampling_flags(size) if objective == "eqm" else way
    flags = ["--num-samples", clips, "--seed", seed, *own]
    given = {"prediction": ["--given", test, "--given-split", "all", "--no-keep-background"], "motion": []}
    return lab.Run(
        root / f"forcing{share:g}-seed{seed}{'' if objective == 'eqm' else f'-{objective}'}",
        data,
        **training(args, RECOMMENDED, seed, 1.0, "--forcing", share, "--data-path", videos, "--objective", objective),
        tasks={
            task: ([*words.split(), *flags, *given[metric]], [metric])
            for task, (words, metric) in tasks_of(objective).items()
        },
        metrics={
            "prediction": ["--data-path", test],
            "motion": ["--data-path", test, "--split", "all", "--num-real", clips],
        },
    )


def tasks_of(objective):
    return {task: own for task, own in TASKS.items() if objective != "flow" or task != UNALIGNED}


def num_clips(args):
    return 4 if args.miniature else 288  # one clip per test video


def markdown(content):
    tasks, seeds = content["tasks"], len(content["seeds"])
    lines = [
        "# Given frames", "",
        "`scripts/studies/given_frames.py` wrote these tables. It trains the study's 4-8-16 recipe with a share of "
        f"forced clips (`--forcing`) and completes {content['videos']} test videos, with {seeds} seeds each. PSNR "
        "gain is relative to repeating the last given frame. Cells hold the mean over seeds (lowest to highest).", "",
    ]  # fmt: skip
    for share in dict.fromkeys(share for found in tasks.values() for share in found):
        rows = {task: found[share] for task, found in tasks.items()}
        lines += [f"## --forcing {share}", "", *lab.seed_table(rows, COLUMNS)]
    title = "direction accuracy (%)"
    for task, found in tasks.items():  # the cost of forcing for clips without given frames
        if task.startswith("nothing") and "0" in found:
            values = {share: dict(enumerate(own[title])) for share, own in found.items()}
            base = values.pop("0")
            for share, own in values.items():
                lines.append(lab.difference(f"--forcing {share}", "0", f"{task}, {title}", own, base, digits=1))
    return lines


def parse_args():
    parser, values = lab.study_parser(__doc__, seeds=[0, 1, 2]), "values of --forcing, a model each"
    parser.add_argument("--shares", type=SHARE, nargs="+", default=[0.0, 0.75], help=values)
    parser.add_argument("--objective", choices=SETTINGS, default="eqm", help="what the models are trained to predict")
    return parser.parse_args()


@one_line_errors()
def main():
    args = parse_args()
    runs = {f"{share:g}": [make_run(args, share, seed, args.objective) for seed in args.seeds] for share in args.shares}
    lab.run_all([run for group in zip(*runs.values(), strict=True) for run in group])
    tasks = tasks_of(args.objective)
    tasks = {task: {share: lab.collect(group, task, COLUMNS) for share, group in runs.items()} for task in tasks}
    content = {"videos": num_clips(args), "seeds": args.seeds, "tasks": tasks}
    name = "given_frames" if args.objective == "eqm" else f"given_frames_{args.objective}"
    lab.write_results(args.out, name, markdown(content), content)


if __name__ == "__main__":
    main()
