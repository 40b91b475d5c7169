"""Compare positions on data they were not tuned for: Sprites and bouncing shapes.

    python scripts/studies/positions.py sprites --data-path datasets/sprites \
        --latents results/sprites/latents
    python scripts/studies/positions.py bouncing

sprites.sh makes the data and the latents of Sprites, which all models share. They have the size and
the recipe of this script, and a quarter of the compute. The models of bouncing shapes follow the
recommended recipe of study.py, but train on 8 and 16 frames, with 1.6 times the compute, three of
four clips forced. All models of a data set differ only in their positions (see shapes.py). With
fixed positions, they train on the final number of frames only, at equal compute. A run takes 10
(bouncing) to 35 minutes of one core. An earlier version compared real people, too (people.md).

When all runs are sampled, the script scores them and writes NAME.md and .json in
results/studies/positions. Models, samples and scores are in its folder runs (see lab.py).
"""

import itertools
import re
import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import lab
from lab import Column
from models import EqMConfig, model_config
from runtime.cli import fail, one_line_errors
from shapes import (
    BASE,
    FULL,
    GUIDANCE,
    INTERVALS,
    PATH_LENGTH,
    POSITIONS,
    USUAL,
    config_of,
    phase_flags,
    plan,
    sampling,
)

SIZE = {"depth": 6, "hidden_size": 256, "num_heads": 4, "input_size": 16}  # of the recipes
TINY_MODEL = "--depth 1 --hidden-size 96"  # with --miniature, as the next line
TINY_SAMPLES = "--num-samples 4 --samples-per-clip 1 --num-sampling-steps 3"
LONG = "256 frames"
LOSS = Column("validation loss", "val_loss", factor=1, digits=3)


def recipe(name):
    """The flags of a recipe of scripts/recipes, without its positions, as text."""
    text = (lab.ROOT / f"scripts/recipes/{name}.txt").read_text()
    words = " ".join(shlex.split(text, comments=True))
    return re.sub(r"--use-rope|--(position-table|rope-\w+) \S+", "", words)


@dataclass(frozen=True)
class DataSet:
    """What the runs on a data set share."""

    name: str  # of the json file, and of the folder in runs/
    title: str
    config: EqMConfig
    flags: str  # of train.py
    phases: tuple  # (num_frames, share of the compute)
    tasks: dict  # {name: (flags of sample_gd.py, metrics)}
    metrics: dict  # {metric: flags of evaluate.py}
    columns: tuple
    compared: tuple  # numbers of the columns whose differences are listed
    steps: int = 2750  # of the last number of frames; they have the compute of a run
    mix: float = 0.1
    made: tuple = ()  # flags of make_moving_shapes.py, if it makes the videos


DATA_SETS = {
    "sprites": DataSet(
        name="sprites",
        title="Sprites",
        config=model_config("EqM-S/4", **SIZE, in_channels=8, temporal_patch_size=1, num_classes=9),
        flags=f"{recipe('sprites')} --cfg-scale 1",
        phases=((4, 0.14), (8, 0.86)),
        tasks={
            "samples": ("--num-frames 8 --num-samples 576", ("census", "classifier")),
            "predictions": (
                "--num-frames 8 --num-samples 432 --given-frames 0",
                ("census", "prediction"),
            ),
        },
        metrics={"census": "", "classifier": "--classifier-test val", "prediction": ""},
        columns=(
            LOSS,
            Column("valid samples (%)", "valid", task="samples"),
            Column("one frame given: PSNR (dB)", "psnr", factor=1, digits=2, task="predictions"),
            Column("one frame given: the true clip (%)", "true_clip", task="predictions"),
            Column("samples of the requested class (%)", "asked_class", task="samples"),
        ),
        compared=(1, 2, 3),
    ),
    "bouncing": DataSet(
        name="bouncing",
        title="Bouncing shapes",
        config=config_of(FULL),
        flags=f"{BASE} --precision {lab.PRECISION} --depth 4 --hidden-size 128 --num-heads 4 "
        f"--forcing 0.75{INTERVALS} --val-clips 64",
        phases=((8, 1 / 3), (16, 2 / 3)),
        tasks={
            LONG: (
                "--num-frames 256 --window 16 --overlap 8 --num-samples 96 --cfg-scale "
                f"{GUIDANCE} {sampling(PATH_LENGTH, USUAL)}",
                ("motion", "consistency"),
            )
        },
        metrics=dict.fromkeys(("motion", "consistency"), "--split all --num-real 96"),
        columns=(
            LOSS,
            Column("one object to the end (%)", "one_object", digits=0, task=LONG),
            Column("turns at the borders only (%)", "turns_right", digits=0, task=LONG),
            Column(
                "5% quantile of window speed / true", "speed_low", factor=1, digits=2, task=LONG
            ),
            Column("median", "speed_median", factor=1, digits=2, task=LONG),
            Column("95% quantile", "speed_high", factor=1, digits=2, task=LONG),
            Column("seam score of windows", "window_seam_score", factor=1, digits=2, task=LONG),
        ),
        compared=(1,),
        steps=int(1.6 * FULL.steps),
        mix=0,
        made=("--bounce", "--seconds", 16),
    ),
}


def make_run(args, data_set, about, flags, has_phases=True):
    """The lab.Run of a model of a DataSet, with more flags of train.py.

    has_phases: if not, it trains on the last number of frames only, at equal compute.
    """
    videos = Path(args.data_path or Path(args.out, "runs/bouncing-shapes"))
    data = {}
    scored = videos
    if data_set.made:
        count, test_count = (2, 2) if args.miniature else (60, 12)
        data = lab.data_sets(
            videos,
            count,
            test_count=test_count,
            flags=data_set.made,
        )
        _, scored = data
    shares = data_set.phases
    mix = data_set.mix
    if not has_phases:
        shares = ((shares[-1][0], 1.0),)
        mix = 0
    steps = data_set.steps
    sampled = f"--precision {lab.PRECISION} --batch-size 16 --seed {about['seed']}"
    if args.miniature:
        steps = 4
        flags += f" {TINY_MODEL}"
        sampled += f" {TINY_SAMPLES}"
    phases, flops = plan(
        data_set.config,
        shares,
        mix=mix,
        steps=steps,
    )
    _, last_step, _ = phases[-1]
    training = (
        f"--video {data_set.flags} --precision {lab.PRECISION} {flags} {phase_flags(phases, mix)} "
        f"--global-seed {about['seed']}"
    ).split()
    training += ["--data-path", args.latents or videos] + ["--compile"] * args.compile
    given = f" --given {scored} --given-split val --no-keep-background"
    tasks = {}
    for task, (words, metrics) in data_set.tasks.items():
        words += given if "--given-frames" in words else ""
        tasks[task] = (f"{words} {sampled}".split(), metrics)
    metrics = {
        metric: ["--data-path", scored, *words.split()]
        for metric, words in data_set.metrics.items()
    }
    if args.miniature and "classifier" in metrics:
        metrics["classifier"] += ["--classifier-steps", 1]
    return lab.Run(
        out=Path(args.out, f"{data_set.name}.json"),
        about=about,
        data=data,
        training=training,
        last_step=last_step,
        tasks=tasks,
        metrics=metrics,
        more={"flops": flops},
        place=f"runs/{data_set.name}",
        is_scored_last=True,  # it takes ten minutes to prepare a census
    )


def markdown(name, rows):
    """The lines of NAME.md: scores, and differences from fixed and from rotary ones."""
    data_set = DATA_SETS[name]
    abouts = {positions: {"positions": positions} for positions in POSITIONS}
    lines = lab.heading(
        f"Positions: {data_set.title}",
        f"`scripts/studies/positions.py {name}` wrote this table. Cells hold the mean over seeds, "
        "and the range.",
    )
    lines += lab.arm_table(rows, abouts, data_set.columns)
    differences = []
    for base, number, positions in itertools.product(
        ("fixed", "rotary"), data_set.compared, POSITIONS
    ):
        column = data_set.columns[number]
        values = lab.by_arm(rows, abouts, column)
        if values.get(base) and values[positions] and positions not in ("fixed", base):
            differences.append((values, (positions, base), column.title, column.digits + 1))
    return lines + lab.compare(differences)


def parse_args():
    parser = lab.study_parser(__doc__, "positions", seeds=[0, 1, 2])
    parser.add_argument("data_set", choices=DATA_SETS, help="what to train on")
    add_data_flags(parser, "the videos; default: bouncing shapes, which the script makes")
    return parser.parse_args()


def add_data_flags(parser, about, is_required=False):
    """Add --data-path and --latents. about: the help of --data-path."""
    add = parser.add_argument
    add("--data-path", required=is_required, metavar="DIR", help=about)
    add("--latents", metavar="DIR", help="their latent cache; default: train on pixels")


@one_line_errors()
def main():
    args = parse_args()
    data_set = DATA_SETS[args.data_set]
    if not (args.data_path or data_set.made):
        fail(f"--data-path: expected the videos of {args.data_set}")
    runs = []
    for seed, (positions, flags) in itertools.product(args.seeds, POSITIONS.items()):
        about = {"positions": positions, "seed": seed}
        runs.append(
            make_run(
                args,
                data_set,
                about,
                flags=flags,
                has_phases=positions != "fixed",
            )
        )
    lab.run_study(args, runs, partial(markdown, args.data_set))


if __name__ == "__main__":
    main()
