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

When all runs are sampled, the script scores them and writes results/positions_NAME.md and .json,
and a picture of their first samples, results/figures/positions-NAME.png. Runs whose scores are in
the json are not run again. Models, samples and scores are in results/positions (see lab.py).
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
    VALIDATIONS,
    config_of,
    phase_flags,
    plan_phases,
    sampling_flags,
)
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
PREDICTION = ("prediction",)
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
    columns: dict  # {title: (task, name of the value, factor, digits)}
    made: tuple = ()  # flags of make_moving_shapes.py, if it makes the videos


DATA_SETS = {
    "sprites": DataSet(
        "Sprites",
        model_config("EqM-S/4", **SIZE, in_channels=8, temporal_patch_size=1, num_classes=9),
        f"{RECIPE} --model EqM-S/4 --temporal-patch-size 1 --no-flip --forcing 0.7 --lr-decay 0.8 "
        "--ema-decay 0.998 "
        "--cfg-scale 1",
        2750,
        ((4, 0.14), (8, 0.86)),
        0.1,
        {
            "samples": ("--num-frames 8 --num-samples 576", ("census", "classifier")),
            "predictions": (
                "--num-frames 8 --num-samples 432 --given-frames 0",
                ("census", *PREDICTION),
            ),
        },
        {"census": "", "classifier": "--classifier-test val", "prediction": ""},
        ("valid samples (%)", "one frame given: PSNR (dB)", "one frame given: the true clip (%)"),
        {
            LOSS: ("", "val_loss", 1, 3),
            "valid samples (%)": ("samples", "valid", 100, 1),
            "one frame given: PSNR (dB)": ("predictions", "psnr", 1, 2),
            "one frame given: the true clip (%)": ("predictions", "true_clip", 100, 1),
            "samples of the requested class (%)": ("samples", "asked_class", 100, 1),
        },
    ),
    "people": DataSet(
        "Real people",
        model_config("EqM-S/2", **SIZE, in_channels=4, temporal_patch_size=4, num_classes=4),
        f"{RECIPE} --model EqM-S/2 --temporal-patch-size 4 --forcing 0.75 --lr-decay 0.4 "
        "--ema-decay 0.995 "
        "--frame-interval 2 --cfg-scale 1.5",
        2750,
        ((4, 0.3), (8, 0.3), (16, 0.4)),
        0.1,
        {
            "samples": ("--num-frames 16 --num-samples 96", ("classifier", "nearest")),
            "predictions": (
                "--num-frames 16 --given-frames 0-7 --num-samples 256 --samples-per-clip 4",
                PREDICTION,
            ),
            END: ("--num-frames 64 --num-samples 48 --window 16", ("classifier",)),
        },
        {"classifier": "--classifier-steps 250", "nearest": "", "prediction": ""},
        ("8 of 16 frames given: PSNR (dB)",),
        {
            LOSS: ("", "val_loss", 1, 3),
            "8 of 16 frames given: PSNR (dB)": ("predictions", "psnr", 1, 2),
            "samples of the requested class (%)": ("samples", "asked_class", 100, 1),
            "8 of 16 frames given: PSNR of moving pixels (dB)": (
                "predictions",
                "psnr_moving",
                1,
                2,
            ),
            f"{END}: the requested class (%)": (END, "asked_class", 100, 1),
            "nearest training clip, RMSE: samples / held-out": ("samples", "rmse_ratio", 1, 2),
        },
    ),
    "bouncing": DataSet(
        "Bouncing shapes",
        config_of(FULL),
        f"{' '.join(map(str, BASE))} --precision {lab.PRECISION} --forcing 0.75{INTERVALS}",
        int(1.6 * FULL.steps),
        ((8, 1 / 3), (16, 2 / 3)),
        0,
        {
            LONG: (
                (
                    "--num-frames 256 --window 16 --overlap 8 --num-samples 96 "
                    f"{' '.join(map(str, sampling_flags(FULL)))}"
                ),
                ("motion", "consistency"),
            )
        },
        dict.fromkeys(("motion", "consistency"), "--split all --num-real 96"),
        ("one object to the end (%)",),
        {
            LOSS: ("", "val_loss", 1, 3),
            "one object to the end (%)": (LONG, "one_object", 100, 0),
            "turns at the borders only (%)": (LONG, "turns_right", 100, 0),
            "5% quantile of window speed / true": (LONG, "speed_low", 1, 2),
            "median": (LONG, "speed_median", 1, 2),
            "95% quantile": (LONG, "speed_high", 1, 2),
            "seam score of windows": (LONG, "window_seam_score", 1, 2),
        },
        ("--bounce", "--seconds", 16),
    ),
}


class PositionsRun(lab.JsonRun):
    """A model with these positions and this seed.

    It is done when it is sampled, or when the json has its scores.
    """

    def __init__(self, args, positions, seed):
        own = DATA_SETS[args.data_set]
        root = Path(args.out, "positions")
        config = replace(own.config, **TINY if args.miniature else {})
        shares, mix = (
            (((own.phases[-1][0], 1.0),), 0) if positions == "fixed" else (own.phases, own.mix)
        )
        phases, self.flops = plan_phases(config, shares, mix, 4 if args.miniature else own.steps)
        flags = [
            *own.flags.split(),
            *POSITIONS[positions].split(),
            *phase_flags(phases, mix),
            "--val-clips",
            64,
        ]
        for name in TINY:
            flags += [f"--{name.replace('_', '-')}", getattr(config, name)]
        videos = Path(args.data_path or root / "bouncing-shapes")
        data = (
            lab.data_sets(videos, *((2, 2) if args.miniature else (60, 12)), *own.made)
            if own.made
            else {}
        )
        scored = [videos, *data][-1]
        given = ["--given", scored, "--given-split", "val", "--no-keep-background"]
        common = ["--precision", lab.PRECISION, "--batch-size", 16, "--seed", seed]
        common += TINY_SAMPLES.split() * args.miniature
        scoring = own.metrics | ({"classifier": "--classifier-steps 1"} if args.miniature else {})
        super().__init__(
            root / f"{args.data_set}-{positions.replace(' ', '-')}-seed{seed}",
            data,
            training=[
                "--video",
                *flags,
                "--data-path",
                args.latents or videos,
                "--global-seed",
                seed,
                "--val-every",
                max(1, phases[-1][1] // VALIDATIONS),
                *["--compile"] * args.compile,
            ],
            last_step=phases[-1][1],
            tasks={
                name: ([*words.split(), *given * ("given" in words), *common], metrics)
                for name, (words, metrics) in own.tasks.items()
            },
            metrics={
                metric: ["--data-path", scored, *words.split()] for metric, words in scoring.items()
            },
            out=Path(args.out, f"positions_{args.data_set}.json"),
            about={"positions": positions, "seed": seed},
        )

    @property
    def is_done(self):
        return self.has_row or all(self.path(task).exists() for task in self.tasks)

    def score(self):
        """Does nothing: see `score_all`."""

    def row(self):
        return super().row() | {"flops": self.flops}


def score_all(runs):
    """Score the samples of all runs in one call, since it takes ten minutes to prepare a census.

    Add their rows.
    """
    # another process may score at the same time
    with lab.file_lock(runs[0].folder.parent / "lock"):
        left = [run for run in runs if not run.has_row]
        for run in left:
            if END in run.tasks:
                keep_end(run.path(END).parent, 16)
        lab.score(left)
        if left:
            lab.add_rows(left[0].out, [run.row() for run in left])


def keep_end(folder, num_frames):
    """Remove all but the last frames of the clips in a sample folder."""
    about, clips, labels = read_samples("", folder)
    np.savez(folder / "end.npz", clips[:, -num_frames:], labels=labels)
    os.replace(folder / "end.npz", folder / "samples.npz")
    about["source"] |= {"num_frames": num_frames, "window": num_frames, "overlap": 0}
    (folder / "samples.json").write_text(json.dumps(about))


def markdown(name, rows):
    """The lines of positions_NAME.md: scores, and differences from fixed and from rotary ones."""
    # found: {positions: {title: {seed: value}}}
    own = DATA_SETS[name]
    found = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        for title, (task, value, factor, _) in own.columns.items():
            values = found.setdefault(row["positions"], {}).setdefault(title, {})
            if (number := row["values"][task].get(value)) is not None:
                values[row["seed"]] = factor * number
    about = (
        f"`scripts/studies/positions.py {name}` wrote this table. Cells hold the mean over seeds, "
        "and the range."
    )
    listed = {
        positions: {title: [*values.values()] for title, values in found[positions].items()}
        for positions in POSITIONS
        if positions in found
    }
    lines = [f"# Positions: {own.title}", "", about, ""]
    lines += lab.seed_table(listed, {title: column[1:] for title, column in own.columns.items()})
    differences = []
    for base, title, positions in itertools.product(("fixed", "rotary"), own.compared, listed):
        if base in found and positions not in ("fixed", base):
            pair = found[positions][title], found[base][title]
            differences.append(
                lab.difference(positions, base, title, *pair, own.columns[title][3] + 1)
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
    rows = [read_samples("", file.parent)[1][number] for file in files for number in SHOWN]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_sheet(path, np.stack(rows), [run.about["positions"] for run in first for _ in SHOWN])


def parse_args():
    parser = lab.study_parser(__doc__, seeds=[0, 1, 2])
    add = parser.add_argument
    add("data_set", choices=DATA_SETS, help="what to train on")
    add(
        "--data-path",
        metavar="DIR",
        help="the videos; default: bouncing shapes, which the script makes",
    )
    add("--latents", metavar="DIR", help="their latent cache; default: train on pixels")
    add(
        "--positions",
        nargs="+",
        choices=POSITIONS,
        default=[*POSITIONS],
        metavar="NAME",
        help="see arms.py",
    )
    return parser.parse_args()


@one_line_errors()
def main():
    args = parse_args()
    if not (args.data_path or DATA_SETS[args.data_set].made):
        fail(f"--data-path: expected the videos of {args.data_set}")
    runs = [
        PositionsRun(args, positions, seed) for seed in args.seeds for positions in args.positions
    ]
    lab.run_all(runs)
    score_all(runs)
    write_picture(Path(args.out, f"figures/positions-{args.data_set}.png"), runs)
    lab.write_results(
        args.out, f"positions_{args.data_set}", markdown(args.data_set, lab.read_rows(runs[0].out))
    )


if __name__ == "__main__":
    main()
