"""Compare positions on data that they were not tuned for: the Sprites benchmark and real people.

    python scripts/studies/positions.py sprites --data-path datasets/sprites --latents results/sprites/latents
    python scripts/studies/positions.py people --data-path datasets/weizmann --latents results/weizmann/latents

sprites.sh and weizmann.sh make the data and the latents, which all models of a data set share. The models have the size
and the recipe of these scripts, a quarter of the compute, and differ in their positions (see arms.py). With fixed
positions, they train on the final number of frames only, at equal compute. A run takes about 45 minutes of one core.

The script writes results/positions_NAME.md and .json. The json holds the scores of all finished runs, which are not run
again. Models, samples and scores are in results/positions (see lab.py).
"""

import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import lab
from arms import POSITIONS, VALIDATIONS, phase_flags, plan_phases
from benchmark import machine
from models import model_config
from runtime.cli import one_line_errors
from scoring.manifest import code_commit
from video.samples import read_samples

STEPS = 2750  # of the last number of frames; they have the compute of a run
SIZE = {"depth": 6, "hidden_size": 256, "num_heads": 4}
RECIPE = (  # flags of train.py; the checkpoint keeps the sampler
    "--optimizer muon --lr 2e-3 --warmup-steps 50 --gamma-shift 2 --num-workers 0 --precision bf16 --val-clips 64 "
    "--sampler ngd --num-sampling-steps 24 --stepsize 0.0217"
)
TINY = "--num-samples 4 --samples-per-clip 1 --num-sampling-steps 3"  # with --miniature
END = "last 16 of 64 frames"  # a task: 64 frames in windows, which are longer than real clips, cut to their end
LOSS, PREDICTION = "validation loss", ("prediction",)


@dataclass(frozen=True)
class DataSet:
    """What the runs on a data set share."""

    title: str
    model: str
    latents: dict  # settings of EqMConfig
    flags: str  # of train.py
    phases: tuple  # (num_frames, share of the compute)
    mix: float
    tasks: dict  # {name: (flags of sample_gd.py, metrics)}
    metrics: dict  # {metric: flags of evaluate.py}
    primary: tuple  # titles of the primary endpoints
    columns: dict  # {title: (task, name of the value, factor, digits)}


DATA_SETS = {
    "sprites": DataSet(
        "Sprites", "EqM-S/4", {"input_size": 16, "in_channels": 8, "temporal_patch_size": 1, "num_classes": 9},
        "--no-flip --forcing 0.7 --lr-decay 0.8 --ema-decay 0.998 --cfg-scale 1", ((4, 0.14), (8, 0.86)), 0.1,
        {
            "samples": ("--num-frames 8 --num-samples 576", ("census", "classifier")),
            "predictions": ("--num-frames 8 --num-samples 432 --given-frames 0", ("census", *PREDICTION)),
        },
        {"census": [], "classifier": ["--classifier-test", "val"], "prediction": []},
        ("valid samples (%)", "one frame given: PSNR (dB)"),
        {
            LOSS: ("", "val_loss", 1, 3),
            "valid samples (%)": ("samples", "valid", 100, 1),
            "one frame given: PSNR (dB)": ("predictions", "psnr", 1, 2),
            "one frame given: the true clip (%)": ("predictions", "true_clip", 100, 1),
            "samples of the requested class (%)": ("samples", "asked_class", 100, 1),
        },
    ),
    "people": DataSet(
        "Real people", "EqM-S/2", {"input_size": 16, "in_channels": 4, "temporal_patch_size": 4, "num_classes": 4},
        "--forcing 0.75 --lr-decay 0.4 --ema-decay 0.995 --frame-interval 2 --cfg-scale 1.5",
        ((4, 0.3), (8, 0.3), (16, 0.4)), 0.1,
        {
            "samples": ("--num-frames 16 --num-samples 96", ("classifier", "nearest")),
            "predictions": ("--num-frames 16 --given-frames 0-7 --num-samples 512 --samples-per-clip 8", PREDICTION),
            END: ("--num-frames 64 --num-samples 96 --window 16", ("classifier",)),
        },
        {"classifier": ["--classifier-steps", 250], "nearest": [], "prediction": []},
        ("8 of 16 frames given: PSNR (dB)",),
        {
            LOSS: ("", "val_loss", 1, 3),
            "8 of 16 frames given: PSNR (dB)": ("predictions", "psnr", 1, 2),
            "samples of the requested class (%)": ("samples", "asked_class", 100, 1),
            "8 of 16 frames given: PSNR of moving pixels (dB)": ("predictions", "psnr_moving", 1, 2),
            f"{END}: the requested class (%)": (END, "asked_class", 100, 1),
            "nearest training clip, RMSE: samples / held-out": ("samples", "rmse_ratio", 1, 2),
        },
    ),
}  # fmt: skip


class PositionsRun(lab.Run):
    """A model with these positions and this seed. It is done when the json has its scores."""

    def __init__(self, args, positions, seed):
        own, self.out = DATA_SETS[args.data_set], Path(args.out, f"positions_{args.data_set}.json")
        self.about = {"positions": positions, "seed": seed}
        size = {"depth": 1, "hidden_size": 96, "num_heads": 4} if args.miniature else SIZE
        config = model_config(own.model, **size, **own.latents)
        shares, mix = (((own.phases[-1][0], 1.0),), 0) if positions == "fixed" else (own.phases, own.mix)
        phases, self.flops = plan_phases(config, shares, mix, 4 if args.miniature else STEPS)
        flags = [*own.flags.split(), *RECIPE.split(), *POSITIONS[positions].split(), *phase_flags(phases, mix)]
        for name, value in size.items():
            flags += [f"--{name.replace('_', '-')}", value]
        given = ["--given", args.data_path, "--given-split", "val", "--no-keep-background"]
        common = ["--precision", "bf16", "--batch-size", 16, "--seed", seed, *TINY.split() * args.miniature]
        scoring = own.metrics | ({"classifier": ["--classifier-steps", 1]} if args.miniature else {})
        every = max(1, phases[-1][1] // VALIDATIONS)
        super().__init__(
            Path(args.out, "positions", f"{args.data_set}-{positions.replace(' ', '-')}-seed{seed}"),
            training=["--video", "--model", own.model, "--temporal-patch-size", config.temporal_patch_size, *flags,
                      "--data-path", args.latents, "--global-seed", seed, "--val-every", every],
            last_step=phases[-1][1],
            tasks={
                name: ([*words.split(), *given * ("given" in words), *common], metrics)
                for name, (words, metrics) in own.tasks.items()
            },
            metrics={metric: ["--data-path", args.data_path, *words] for metric, words in scoring.items()},
        )  # fmt: skip

    @property
    def is_done(self):
        return any(self.about.items() <= row.items() for row in read_rows(self.out))

    def sample(self, ckpt):
        super().sample(ckpt)
        if END in self.tasks:
            keep_end(self.path(END).parent, 16)

    def run(self):
        super().run()
        row = self.about | {"code": code_commit() or "", "machine": machine(), "flops": self.flops}
        last = self.validations()[-1]
        row["values"] = {"": {"val_loss": last["val_loss"]}} | {task: self.values(task) for task in self.tasks}
        with lab.file_lock(self.folder.parent / "lock"):
            lab.write_file(self.out, json.dumps([*read_rows(self.out), row], indent=1).encode() + b"\n")


def keep_end(folder, num_frames):
    """Remove all but the last frames of the clips in a sample folder."""
    about, clips, labels = read_samples("", folder)
    np.savez(folder / "end.npz", clips[:, -num_frames:], labels=labels)
    os.replace(folder / "end.npz", folder / "samples.npz")
    about["source"] |= {"num_frames": num_frames, "window": num_frames, "overlap": 0}
    (folder / "samples.json").write_text(json.dumps(about))


def read_rows(path):
    """The finished runs of a json."""
    return json.loads(path.read_text()) if path.exists() else []


def markdown(name, rows):
    """The lines of positions_NAME.md: scores of all positions, and differences from fixed and from rotary positions."""
    own, found = DATA_SETS[name], {}  # found: {positions: {title: {seed: value}}}
    for row in sorted(rows, key=lambda row: row["seed"]):
        for title, (task, value, factor, _) in own.columns.items():
            values = found.setdefault(row["positions"], {}).setdefault(title, {})
            values[row["seed"]] = factor * row["values"][task][value]
    about = f"`scripts/studies/positions.py {name}` wrote this table. Cells hold the mean over seeds, and the range."
    listed = {
        positions: {title: [*values.values()] for title, values in found[positions].items()}
        for positions in POSITIONS if positions in found
    }  # fmt: skip
    lines = [f"# Positions: {own.title}", "", about, ""]
    lines += lab.seed_table(listed, {title: column[1:] for title, column in own.columns.items()})
    for base, title, positions in itertools.product(("fixed", "rotary"), own.primary, listed):
        if base in found and positions not in ("fixed", base):
            pair = found[positions][title], found[base][title]
            lines.append(lab.difference(positions, base, title, *pair, own.columns[title][3] + 1))
    return lines


def parse_args():
    parser = lab.study_parser(__doc__, seeds=[0, 1, 2])
    add = parser.add_argument
    add("data_set", choices=DATA_SETS, help="what to train on")
    add("--data-path", required=True, metavar="DIR", help="the videos")
    add("--latents", required=True, metavar="DIR", help="their latent cache")
    add("--positions", nargs="+", choices=POSITIONS, default=[*POSITIONS], metavar="NAME", help="see arms.py")
    return parser.parse_args()


@one_line_errors()
def main():
    args = parse_args()
    runs = [PositionsRun(args, positions, seed) for seed in args.seeds for positions in args.positions]
    lab.run_all(runs)
    lab.write_results(args.out, f"positions_{args.data_set}", markdown(args.data_set, read_rows(runs[0].out)))


if __name__ == "__main__":
    main()
