"""Measure how well --forcing teaches a model to complete clips of Moving Shapes, and what it costs.

    python scripts/studies/given_frames.py --shares 0 0.75 --seeds 0 1 2
    python scripts/studies/given_frames.py --shares 0.75 --objectives eqm flow

A model takes about 10 minutes of one core.

The models follow the recommended curriculum of study.py, each with another share of forced clips.
The test set has 288 videos, made with another seed. evaluate.py scores completed clips with
--metric prediction, and clips without given frames with --metric motion. The script writes
results/given_frames.md and .json, with several objectives results/given_frames_objectives.md and
.json. Models, samples and scores are in results/given-frames (see lab.py).
"""

from pathlib import Path

import lab
from arms import GUIDANCE, RECOMMENDED, size_of, training
from objectives import SETTINGS, USUAL, sampling
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
COLUMNS = {  # title: (value of a manifest, factor, digits)
    "direction accuracy (%)": ("direction_accuracy", 100, 1),
    "PSNR gain (dB)": ("psnr_gain", 1, 1),
    "color and shape kept (%)": ("appearance_kept", 100, 1),
    "speed / true": ("speed_ratio", 1, 2),
}


def make_run(args, share, seed, objective="eqm"):
    """The lab.Run of the model with this objective, share of forced clips and seed."""
    root = Path(args.out, "given-frames")
    clips = num_clips(args)
    size = size_of(args)
    setting = SETTINGS[objective]
    data = lab.data_sets(root / "moving-shapes", size.videos, max(2, clips // 12), "--seconds", 1.4)
    videos, test = data
    flags = [
        "--num-samples",
        clips,
        "--seed",
        seed,
        "--cfg-scale",
        GUIDANCE,
        "--precision",
        lab.PRECISION,
    ]
    flags += sampling(setting.way, USUAL)
    own = [
        "--forcing",
        share,
        "--objective",
        objective,
        "--gamma-shift",
        setting.shift,
        "--data-path",
        videos,
    ]
    given = {
        "prediction": ["--given", test, "--given-split", "all", "--no-keep-background"],
        "motion": [],
    }
    return lab.Run(
        root / f"forcing{share:g}-{objective}-{setting.shift:g}-{setting.way}-seed{seed}",
        data,
        **training(args, RECOMMENDED, seed, 1.0, *own),
        tasks={
            task: ([*words.split(), *flags, *given[metric]], [metric])
            for task, (words, metric) in TASKS.items()
            if objective != "flow" or task != UNALIGNED
        },
        metrics={
            "prediction": ["--data-path", test],
            "motion": ["--data-path", test, "--split", "all", "--num-real", clips],
        },
    )


def num_clips(args):
    return 4 if args.miniature else 288  # one clip per test video


def markdown(content):
    tasks = content["tasks"]
    seeds = len(content["seeds"])
    lines = [
        "# Given frames",
        "",
        "`scripts/studies/given_frames.py` wrote these tables. It trains the study's 4-8-16 "
        "recipe with a share of "
        f"forced clips (`--forcing`) and completes {content['videos']} test videos, with {seeds} "
        "seeds each. PSNR "
        "gain is relative to repeating the last given frame. Cells hold the mean over seeds "
        "(lowest to highest).",
        "",
    ]
    for share in dict.fromkeys(share for found in tasks.values() for share in found):
        rows = {task: found[share] for task, found in tasks.items() if share in found}
        lines += [f"## --forcing {share}", "", *lab.seed_table(rows, COLUMNS)]
    differences = []
    for task, found in tasks.items():
        pairs = [(share, share.partition(" ")[0]) for share in found if " " in share]  # objectives
        if task.startswith("nothing"):  # the cost of forcing for clips without given frames
            pairs += [
                (share, "0")
                for share in found
                if "0" in found and " " not in share and share != "0"
            ]
        for share, base in pairs:
            for title in [*COLUMNS][: 2 if " " in share else 1]:
                values, others = (dict(enumerate(found[key][title])) for key in (share, base))
                if values:  # clips without given frames have no PSNR
                    name = f"--forcing {share}"
                    what = f"{task}, {title}"
                    differences.append(lab.difference(name, base, what, values, others, digits=1))
    return lines + lab.difference_lines(differences)


def parse_args():
    parser = lab.study_parser(__doc__, seeds=[0, 1, 2])
    parser.add_argument(
        "--shares",
        type=SHARE,
        nargs="+",
        default=[0.0, 0.75],
        help="values of --forcing, a model each",
    )
    parser.add_argument(
        "--objectives",
        choices=SETTINGS,
        nargs="+",
        default=["eqm"],
        help="what the models are trained to predict, a model each",
    )
    return parser.parse_args()


@one_line_errors()
def main():
    args = parse_args()
    runs = {
        f"{share:g}" + ("" if objective == "eqm" else f" --objective {objective}"): [
            make_run(args, share, seed, objective) for seed in args.seeds
        ]
        for share in args.shares
        for objective in args.objectives
    }
    lab.run_all([run for group in zip(*runs.values(), strict=True) for run in group])
    tasks = {
        task: {
            name: lab.collect(group, task, COLUMNS)
            for name, group in runs.items()
            if task in group[0].tasks
        }
        for task in TASKS
    }
    content = {"videos": num_clips(args), "seeds": args.seeds, "tasks": tasks}
    name = "given_frames" if args.objectives == ["eqm"] else "given_frames_objectives"
    lab.write_results(args.out, name, markdown(content), content)


if __name__ == "__main__":
    main()
