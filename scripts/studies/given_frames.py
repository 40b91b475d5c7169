"""How well does --forcing teach a model to complete clips, and what does it cost? Moving Shapes, several seeds.

    python scripts/studies/given_frames.py --shares 0 0.75 --seeds 0 1 2     about 10 minutes of a core for each model

Trains the curriculum that the study recommends with a share of forced clips, and scores it on a test set of its own,
288 videos of another seed: completions of its clips by evaluate.py --metric prediction, and clips of which nothing is
given by --metric motion. Tables: results/given_frames.md and .json; models, samples and scores: results/given-frames
(see lab.py).
"""

from pathlib import Path

import numpy as np

import lab
from arms import RECOMMENDED, sampling_flags, size_of, training
from runtime.cli import SHARE, one_line_errors

TASKS = {  # name in the table: (flags of sample_gd.py, metric)
    "8 of 16 given": ("--num-frames 16 --given-frames 0-7", "prediction"),
    "8 of 16 given, no label": ("--num-frames 16 --given-frames 0-7 --classes none", "prediction"),
    "4 + 4 of 16 given": ("--num-frames 16 --given-frames 0-3,12-15", "prediction"),
    "4 + 4 of 16 given, no label": ("--num-frames 16 --given-frames 0-3,12-15 --classes none", "prediction"),
    "1 of 16 given": ("--num-frames 16 --given-frames 0", "prediction"),
    "nothing given, 16 frames": ("--num-frames 16", "motion"),
    "nothing given, 24 frames at once": ("--num-frames 24 --window 24", "motion"),
}
COLUMNS = {  # title: value of a manifest, factor, digits
    "direction right (%)": ("direction_accuracy", 100, 1),
    "PSNR above repeating (dB)": ("psnr_gain", 1, 1),
    "color and shape kept (%)": ("appearance_kept", 100, 1),
    "speed / true": ("speed_ratio", 1, 2),
}


def make_run(args, share, seed):
    """The Run of a model."""
    root, clips, size = Path(args.out, "given-frames"), num_clips(args), size_of(args)
    data = lab.data_sets(root / "moving-shapes", size.videos, max(2, clips // 12), "--seconds", 1.4)
    videos, test = data
    flags = ["--num-samples", clips, "--seed", seed, *sampling_flags(size)]
    given = {"prediction": ["--given", test, "--given-split", "all", "--no-keep-background"], "motion": []}
    return lab.Run(
        root / f"forcing{share:g}-seed{seed}",
        data,
        **training(args, RECOMMENDED, seed, 1.0, "--forcing", share, "--data-path", videos),
        tasks={task: ([*words.split(), *flags, *given[metric]], [metric]) for task, (words, metric) in TASKS.items()},
        metrics={
            "prediction": ["--data-path", test],
            "motion": ["--data-path", test, "--split", "all", "--num-real", clips],
        },
    )


def num_clips(args):
    return 4 if args.miniature else 288  # of the test set, one of each video


def markdown(content):
    tasks, seeds = content["tasks"], len(content["seeds"])
    lines = ["# Given frames", "", "Made by `scripts/studies/given_frames.py`: the study's 4-8-16 recipe with shares "
             f"of forced\nclips (`--forcing`), {content['videos']} test videos, {seeds} seeds each. Mean over the "
             "seeds (lowest to highest).", ""]  # fmt: skip
    for share in dict.fromkeys(share for found in tasks.values() for share in found):
        rows = {task: found[share] for task, found in tasks.items()}
        lines += [f"## --forcing {share}", "", *lab.seed_table(rows, COLUMNS)]
    # What forcing costs where nothing is given: the difference of each share to 0, seed by seed
    title = "direction right (%)"
    gaps = {
        f"- {task}, --forcing {share} minus 0": np.subtract(found[share][title], found["0"][title])
        for task, found in tasks.items() if task.startswith("nothing") and "0" in found
        for share in found if share != "0"
    }  # fmt: skip
    lines += ["95% intervals by Student's t over the seeds:", ""] if gaps else []
    for what, own in gaps.items():
        mean, half = np.mean(own), lab.half_width(own)
        spread = "" if half is None else f" ({mean - half:+.1f} to {mean + half:+.1f})"
        lines.append(f"{what}: {mean:+.1f} points{spread}")
    return lines


def parse_args():
    parser, values = lab.study_parser(__doc__, seeds=[0, 1, 2]), "values of --forcing"
    parser.add_argument("--shares", type=SHARE, nargs="+", default=[0.0, 0.75], help=values)
    return parser.parse_args()


@one_line_errors()
def main():
    args = parse_args()
    runs = {f"{share:g}": [make_run(args, share, seed) for seed in args.seeds] for share in args.shares}
    lab.run_all([run for group in zip(*runs.values(), strict=True) for run in group])
    tasks = {task: {share: lab.collect(group, task, COLUMNS) for share, group in runs.items()} for task in TASKS}
    content = {"videos": num_clips(args), "seeds": args.seeds, "tasks": tasks}
    lab.write_results(args.out, "given_frames", markdown(content), content)


if __name__ == "__main__":
    main()
