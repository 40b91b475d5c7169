"""Compare positions on data they were not tuned for: Sprites, real people and bouncing shapes.

    python scripts/studies/positions.py sprites --data-path datasets/sprites \
        --latents results/sprites/latents
    python scripts/studies/positions.py people --data-path datasets/weizmann \
        --latents results/weizmann/latents
    python scripts/studies/positions.py bouncing

sprites.sh and weizmann.sh make the data and the latents, which all models of a data set share. The
models of Sprites and people have the size and the recipe of these scripts, and a quarter of the
compute. Those of bouncing shapes follow the recommended recipe of study.py, but train on 8 and 16
frames, with 1.6 times the compute, three of four clips forced. All models of a data set differ only
in their positions (see arms.py). With fixed positions, they train on the final number of frames
only, at equal compute. A run takes 10 (bouncing) to 35 minutes of one core.

When all runs are sampled, the script scores them and writes NAME.md and .json in
results/studies/positions, and a picture of their first samples, NAME.png. Runs whose scores are in
the json are not run again. Models, samples and scores are in its folder positions (see lab.py).
"""

import itertools
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import lab
from arms import (
    BASE,
    FULL,
    INTERVALS,
    POSITIONS,
    config_of,
    phase_flags,
    plan_phases,
    sampling_flags,
    validation_flags,
)
from lab import Column
from models import EqMConfig, model_config
from runtime.cli import fail, one_line_errors
from video.samples import read_samples
from video.writers import write_sheet

SIZE = {"depth": 6, "hidden_size": 256, "num_heads": 4, "input_size": 16}
RECIPE = (  # flags of train.py; the checkpoint keeps the sampler
    "--optimizer muon --lr 2e-3 --warmup-steps 50 --gamma-shift 2 --num-workers 0 --sampler ngd "
    f"--num-sampling-steps 24 --stepsize 0.0217 --precision {lab.PRECISION}"
)
TINY = {"depth": 1, "hidden_size": 96, "num_heads": 4}  # with --miniature, as the next line
TINY_SAMPLES = "--num-samples 4 --samples-per-clip 1 --num-sampling-steps 3"
# tasks. END: made in windows, longer than real clips, cut to its end
LONG, END = "256 frames", "last 16 of 64 frames"
LOSS = "validation loss"
SHOWN = 0, 3  # numbers of the samples in the picture


@dataclass(frozen=True)
class DataSet:
    """What the runs on a data set share."""

    title: str
    config: EqMConfig
    flags: str  # of train.py
    steps: int  # of the last number of frames; they have the compute of a run
    phases: tuple  # (num_frames, share of the compute)
    mix: float
    tasks: dict  # {name: (flags of sample_gd.py, metrics)}
    metrics: dict  # {metric: flags of evaluate.py}
    compared: tuple  # titles of the columns whose differences are listed
    columns: dict  # {title: Column}
    made: tuple = ()  # flags of make_moving_shapes.py, if it makes the videos


DATA_SETS = {
    "sprites": DataSet(
        title="Sprites",
        config=model_config("EqM-S/4", **SIZE, in_channels=8, temporal_patch_size=1, num_classes=9),
        flags=f"{RECIPE} --model EqM-S/4 --temporal-patch-size 1 --no-flip --forcing 0.7 "
        "--lr-decay 0.8 --ema-decay 0.998 --cfg-scale 1",
        steps=2750,
        phases=((4, 0.14), (8, 0.86)),
        mix=0.1,
        tasks={
            "samples": ("--num-frames 8 --num-samples 576", ("census", "classifier")),
            "predictions": (
                "--num-frames 8 --num-samples 432 --given-frames 0",
                ("census", "prediction"),
            ),
        },
        metrics={"census": "", "classifier": "--classifier-test val", "prediction": ""},
        compared=(
            "valid samples (%)",
            "one frame given: PSNR (dB)",
            "one frame given: the true clip (%)",
        ),
        columns={
            LOSS: Column("val_loss", 1, 3, task=""),
            "valid samples (%)": Column("valid", 100, 1, task="samples"),
            "one frame given: PSNR (dB)": Column("psnr", 1, 2, task="predictions"),
            "one frame given: the true clip (%)": Column("true_clip", 100, 1, task="predictions"),
            "samples of the requested class (%)": Column("asked_class", 100, 1, task="samples"),
        },
    ),
    "people": DataSet(
        title="Real people",
        config=model_config("EqM-S/2", **SIZE, in_channels=4, temporal_patch_size=4, num_classes=4),
        flags=f"{RECIPE} --model EqM-S/2 --temporal-patch-size 4 --forcing 0.75 --lr-decay 0.4 "
        "--ema-decay 0.995 --frame-interval 2 --cfg-scale 1.5",
        steps=2750,
        phases=((4, 0.3), (8, 0.3), (16, 0.4)),
        mix=0.1,
        tasks={
            "samples": ("--num-frames 16 --num-samples 96", ("classifier", "nearest")),
            "predictions": (
                "--num-frames 16 --given-frames 0-7 --num-samples 256 --samples-per-clip 4",
                ("prediction",),
            ),
            END: ("--num-frames 64 --num-samples 48 --window 16", ("classifier",)),
        },
        metrics={"classifier": "--classifier-steps 250", "nearest": "", "prediction": ""},
        compared=("8 of 16 frames given: PSNR (dB)",),
        columns={
            LOSS: Column("val_loss", 1, 3, task=""),
            "8 of 16 frames given: PSNR (dB)": Column("psnr", 1, 2, task="predictions"),
            "samples of the requested class (%)": Column("asked_class", 100, 1, task="samples"),
            "8 of 16 frames given: PSNR of moving pixels (dB)": Column(
                "psnr_moving", 1, 2, task="predictions"
            ),
            f"{END}: the requested class (%)": Column("asked_class", 100, 1, task=END),
            "nearest training clip, RMSE: samples / held-out": Column(
                "rmse_ratio", 1, 2, task="samples"
            ),
        },
    ),
    "bouncing": DataSet(
        title="Bouncing shapes",
        config=config_of(FULL),
        flags=f"{BASE} --precision {lab.PRECISION} --forcing 0.75{INTERVALS}",
        steps=int(1.6 * FULL.steps),
        phases=((8, 1 / 3), (16, 2 / 3)),
        mix=0,
        tasks={
            LONG: (
                f"--num-frames 256 --window 16 --overlap 8 --num-samples 96 {sampling_flags(FULL)}",
                ("motion", "consistency"),
            )
        },
        metrics=dict.fromkeys(("motion", "consistency"), "--split all --num-real 96"),
        compared=("one object to the end (%)",),
        columns={
            LOSS: Column("val_loss", 1, 3, task=""),
            "one object to the end (%)": Column("one_object", 100, 0, task=LONG),
            "turns at the borders only (%)": Column("turns_right", 100, 0, task=LONG),
            "5% quantile of window speed / true": Column("speed_low", 1, 2, task=LONG),
            "median": Column("speed_median", 1, 2, task=LONG),
            "95% quantile": Column("speed_high", 1, 2, task=LONG),
            "seam score of windows": Column("window_seam_score", 1, 2, task=LONG),
        },
        made=("--bounce", "--seconds", 16),
    ),
}


def size_flags(config):
    """The flags of train.py for the depth and width of a model, as text."""
    return (
        f"--depth {config.depth} --hidden-size {config.hidden_size} --num-heads {config.num_heads}"
    )


def common_sampling(args, seed):
    """The flags of sample_gd.py that all tasks share, as text."""
    flags = f"--precision {lab.PRECISION} --batch-size 16 --seed {seed}"
    return f"{flags} {TINY_SAMPLES}" if args.miniature else flags


class ScoredTogether(lab.JsonRun):
    """A run that is done when it is sampled, or when the json has its scores: see `score_all`.

    flops: those of the training.
    """

    @property
    def is_done(self):
        return self.has_row or all(self.path(task).exists() for task in self.tasks)

    def score(self):
        """Does nothing."""

    def row(self):
        return super().row() | {"flops": self.flops}


class PositionsRun(ScoredTogether):
    """A model with these positions and this seed."""

    def __init__(self, args, positions, seed):
        data_set = DATA_SETS[args.data_set]
        root = Path(args.out, "positions")
        videos = Path(args.data_path or root / "bouncing-shapes")
        data = {}
        scored = videos
        if data_set.made:
            count, test_count = (2, 2) if args.miniature else (60, 12)
            data = lab.data_sets(
                videos,
                count=count,
                test_count=test_count,
                flags=data_set.made,
            )
            _, scored = data
        config = replace(data_set.config, **TINY if args.miniature else {})
        shares = data_set.phases
        mix = data_set.mix
        if positions == "fixed":
            num_frames, _ = shares[-1]
            shares = ((num_frames, 1.0),)
            mix = 0
        phases, self.flops = plan_phases(
            config,
            shares=shares,
            mix=mix,
            steps=4 if args.miniature else data_set.steps,
        )
        _, last_step, _ = phases[-1]
        flags = (
            f"--video {data_set.flags} {POSITIONS[positions]} {phase_flags(phases, mix)} "
            f"--val-clips 64 {size_flags(config)} --global-seed {seed} {validation_flags(phases)}"
        ).split()
        flags += ["--data-path", args.latents or videos]
        if args.compile:
            flags.append("--compile")
        given = ["--given", scored, "--given-split", "val", "--no-keep-background"]
        tasks = {}
        for task, (words, metrics) in data_set.tasks.items():
            sampling = words.split()
            if "--given-frames" in sampling:
                sampling += given
            tasks[task] = ([*sampling, *common_sampling(args, seed).split()], metrics)
        metrics = dict(data_set.metrics)
        if args.miniature:
            metrics["classifier"] = "--classifier-steps 1"
        super().__init__(
            root / f"{args.data_set}-{positions.replace(' ', '-')}-seed{seed}",
            data,
            training=flags,
            last_step=last_step,
            tasks=tasks,
            metrics={
                metric: ["--data-path", scored, *words.split()] for metric, words in metrics.items()
            },
            out=Path(args.out, f"{args.data_set}.json"),
            about={"positions": positions, "seed": seed},
        )


def score_all(runs):
    """Score the samples of all runs in one call, since it takes ten minutes to prepare a census.

    Add their rows.
    """
    # another process may score at the same time
    with lab.file_lock(runs[0].folder.parent / "lock"):
        runs = [run for run in runs if not run.has_row]
        if not runs:
            return
        for run in runs:
            if END in run.tasks:
                keep_end(run.path(END).parent, 16)
        lab.score(runs)
        lab.add_rows(runs[0].out, [run.row() for run in runs])


def keep_end(folder, num_frames):
    """Remove all but the last frames of the clips in a sample folder."""
    about, clips, labels = read_samples("", folder)
    np.savez(folder / "end.npz", clips[:, -num_frames:], labels=labels)
    os.replace(folder / "end.npz", folder / "samples.npz")
    about["source"] |= {"num_frames": num_frames, "window": num_frames, "overlap": 0}
    (folder / "samples.json").write_text(json.dumps(about))


def markdown(name, rows):
    """The lines of positions_NAME.md: scores, and differences from fixed and from rotary ones."""
    data_set = DATA_SETS[name]
    values = {}  # {title: {positions: {seed: value}}}
    for title, column in data_set.columns.items():
        values[title] = {}
        for positions in POSITIONS:
            values[title][positions] = lab.by_seed(rows, {"positions": positions}, column)
    names = [positions for positions, losses in values[LOSS].items() if losses]
    lines = lab.heading(
        f"Positions: {data_set.title}",
        f"`scripts/studies/positions.py {name}` wrote this table. Cells hold the mean over seeds, "
        "and the range.",
    )
    lines += lab.seed_table(names, data_set.columns, values)
    differences = []
    for base, title, positions in itertools.product(("fixed", "rotary"), data_set.compared, names):
        if base in names and positions not in ("fixed", base):
            digits = data_set.columns[title].digits + 1
            differences.append(
                lab.difference(values[title], (positions, base), what=title, digits=digits)
            )
    return lines + lab.difference_lines(differences)


def write_picture(path, runs):
    """A sheet of samples of the first seed, if those of all positions are here: other machines may
    have made them.
    """
    first = [run for run in runs if run.about["seed"] == runs[0].about["seed"]]
    files = [run.path(next(iter(run.tasks))) for run in first]
    if not all(file.exists() for file in files):
        return
    clips = []
    titles = []
    for run, file in zip(first, files, strict=True):
        _, samples, _ = read_samples("", file.parent)
        clips += [samples[number] for number in SHOWN]
        titles += [run.about["positions"]] * len(SHOWN)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_sheet(path, np.stack(clips), titles)


def parse_args():
    parser = lab.study_parser(__doc__, "positions", seeds=[0, 1, 2])
    add = parser.add_argument
    add("data_set", choices=DATA_SETS, help="what to train on")
    add(
        "--data-path",
        metavar="DIR",
        help="the videos; default: bouncing shapes, which the script makes",
    )
    add("--latents", metavar="DIR", help="their latent cache; default: train on pixels")
    return parser.parse_args()


@one_line_errors()
def main():
    args = parse_args()
    if not (args.data_path or DATA_SETS[args.data_set].made):
        fail(f"--data-path: expected the videos of {args.data_set}")
    runs = [PositionsRun(args, positions, seed) for seed in args.seeds for positions in POSITIONS]
    lab.run_all(runs)
    score_all(runs)
    write_picture(Path(args.out, f"{args.data_set}.png"), runs)
    out = runs[0].out
    lab.write_results(args.out, out.stem, markdown(args.data_set, lab.read_rows(out)))


if __name__ == "__main__":
    main()
