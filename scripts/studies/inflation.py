"""Start video models from image models of their frames: which kernel is best, and does it pay?

    python scripts/studies/inflation.py kernels --data-path datasets/sprites \
        --latents results/sprites/latents
    python scripts/studies/inflation.py pay --data-path datasets/sprites \
        --latents results/sprites/latents

sprites.sh makes the videos and the latents; Moving Shapes are made here. An image model learns
single frames. It has a position table, as published image models do.

kernels: validation losses of clips whose frames have independent noise, for three ways to spread
the kernel of the patch embedding over a temporal patch. "mean" and "one frame" are exact for equal
frames. The mean of noisy frames has less noise, so the network takes the clip for a cleaner one.
"1/sqrt(pt)" keeps the noise level. The script measures the start, and the model after some steps.

pay: Sprites with the recipe of sprites.sh and HOURS=0.5, from scratch or from an image model. Each
share of the compute is a run of its own. The script reports the share at which the start makes as
many valid samples as the longest run from scratch, without and with the cost of the image model.

The script writes results/inflation_PART.md and .json. Runs whose scores are in the json are not run
again. Models and samples are in results/inflation (see lab.py). A full run of clips takes about 35
minutes if two run at once on 2 cores.
"""

import itertools
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import lab
from arms import BASE, FULL, ROTARY, TOKENS, VALIDATIONS, config_of, phase_flags, plan_phases
from checkpoint import from_elsewhere, load, save
from inflate import inflate
from models import EqMConfig
from positions import DATA_SETS, TINY, TINY_SAMPLES, PositionsRun, score_all
from report import compute_to
from runtime.cli import fail, one_line_errors

SPREADS = {  # share of the kernel for each of pt frames
    "mean": lambda pt: torch.full((pt,), 1 / pt),
    "one frame": lambda pt: (torch.arange(pt) == pt // 2).float(),
    "1/sqrt(pt)": lambda pt: torch.full((pt,), pt**-0.5),
}
LATER = 300  # steps after which kernels are compared again
THETA = float(ROTARY.split()[-1])  # of time, as in the other studies
KERNEL = "x_embedder.proj.weight"  # (D, C, pt, p, p), equal for all frames after `inflate`
SPRITES = DATA_SETS["sprites"]
SHARES = {"scratch": (0.4, 0.6, 1.0), "images": (0.2, 0.4, 0.6, 0.8)}  # of the compute
TASK = "--num-frames 8 --num-samples 576", ("census",)
VALID, LOSS = "valid", "val_loss"  # the values in the tables


@dataclass(frozen=True)
class Frames:
    """A data set for image models and the clips of part kernels."""

    config: EqMConfig
    flags: str  # of train.py
    num_frames: int  # of a clip
    steps: int  # of an image model
    patches: tuple[int, ...]  # frames of a temporal patch; the width must hold its values


IMAGES = replace(config_of(FULL), temporal_patch_size=1, num_frames=1)
DATA = {
    "shapes": Frames(
        IMAGES, " ".join(map(str, [*BASE, "--precision", lab.PRECISION])), 16, 1000, (2, 4)
    ),
    # a fifth of the compute of HOURS=0.5
    "sprites": Frames(SPRITES.config, SPRITES.flags, 8, 600, (2,)),
}


def common(args, name, seed):
    """(config, data of a lab.Run, flags of train.py) that all runs of a data set share."""
    own = DATA[name]
    root = Path(args.out, "inflation")
    config = replace(own.config, **TINY if args.miniature else {})
    counts = (2, 2) if args.miniature else (60, 2)
    data = (
        lab.data_sets(root / "moving-shapes", *counts, "--seconds", 1.4) if name == "shapes" else {}
    )
    flags = [
        "--video",
        *own.flags.split(),
        "--forcing",
        0,
        "--global-seed",
        seed,
        "--val-clips",
        256,
    ]
    for field in TINY:
        flags += [f"--{field.replace('_', '-')}", getattr(config, field)]
    flags += ["--data-path", *([*data][:1] or [args.latents])]
    return config, data, [*flags, *["--compile"] * args.compile]


def image_run(args, name, seed):
    """The lab.Run of a model of single frames, and its FLOPs."""
    config, data, flags = common(args, name, seed)
    phases, flops = plan_phases(config, ((1, 1.0),), 0, 2 if args.miniature else DATA[name].steps)
    flags += ["--temporal-patch-size", 1, *phase_flags(phases, 0)]
    folder = Path(args.out, "inflation", f"{name}-image-seed{seed}")
    return lab.Run(folder, data, training=flags, last_step=phases[-1][1]), flops


class StartedRun(lab.JsonRun):
    """A run of a video model that may start from the image model of another run."""

    image = None  # that run

    def train(self):
        if self.image and self.checkpoint() is None:
            self.image.folder.mkdir(parents=True, exist_ok=True)
            with lab.file_lock(self.image.folder / "lock"):  # another process may train it
                ckpt = self.image.train()
            self.training = [*self.training, *self.start_flags(ckpt)]
        return super().train()

    def row(self):
        last = self.validations()[-1]
        losses = {name: value for name, value in last.items() if name.startswith(LOSS)}
        return super().row() | losses


# Which kernel? ------------------------------------------------------------------------------------


class KernelRun(StartedRun):
    """A video model whose start has this spread, after so many steps.

    1 step has a learning rate of almost zero.
    """

    def __init__(self, args, name, seed, patch, spread, steps):
        about = {"data": name, "seed": seed, "patch": patch, "spread": spread, "steps": steps}
        config, data, flags = common(args, name, seed)
        frames = DATA[name].num_frames
        batch = TOKENS // math.prod(
            replace(config, temporal_patch_size=patch, num_frames=frames).grid(frames)
        )
        flags += ["--use-rope", "--temporal-patch-size", patch, "--num-frames", frames]
        flags += ["--max-steps", steps, "--global-batch-size", batch]
        flags += ["--lr", 1e-12, "--muon-lr", 1e-12] if steps == 1 else []
        folder = "-".join(map(str, about.values())).replace("/", "-").replace(" ", "-")
        super().__init__(
            Path(args.out, "inflation", folder),
            data,
            training=flags,
            last_step=steps,
            out=Path(args.out, "inflation_kernels.json"),
            about=about,
        )
        self.image, _ = image_run(args, name, seed)

    def start_flags(self, ckpt):
        """Write the start as a checkpoint, because train.py has no flag for the spread."""
        state = load(ckpt, ["ema"])
        pt = self.about["patch"]
        config = EqMConfig(**state["config"]["model"])
        seconds = state["config"]["data"]["time_scale"]
        weights, config = inflate(state["ema"], config, pt, pt, THETA, seconds)
        weights[KERNEL] *= pt * SPREADS[self.about["spread"]](pt)[:, None, None]
        path = self.folder / "start.pt"
        save(path, from_elsewhere(state["config"] | {"model": asdict(config)}, weights, weights, 0))
        return ["--ckpt", path]


def kernels_markdown(rows):
    about = (
        "`scripts/studies/inflation.py kernels` wrote these tables: validation losses of clips "
        "whose frames "
    )
    about += (
        "have independent noise. Cells hold the mean over seeds, and the range. `val_loss_rel` is "
        "relative to "
    )
    about += (
        "predicting zero, `val_loss_gamma_0.2` covers gamma from 0.2 to 0.4. `--inflate` spreads "
        "by the mean."
    )
    lines = ["# Kernels of an inflated patch embedding", "", about, ""]
    groups = itertools.groupby(sorted(rows, key=group_of), key=group_of)
    for (name, patch, steps), group in groups:
        found = {}  # {spread: {column: {seed: loss}}}
        for row in group:
            for column in (column for column in row if is_loss(column)):
                found.setdefault(row["spread"], {}).setdefault(column, {})[row["seed"]] = row[
                    column
                ]
        columns = {column: (column, 1, 3) for column in next(iter(found.values()))}
        when = "at the start" if steps == 1 else f"after {steps} steps"
        table = {
            spread: {column: [*values.values()] for column, values in found[spread].items()}
            for spread in SPREADS
            if spread in found
        }
        lines += [f"## {name}, temporal patch {patch}, {when}", "", *lab.seed_table(table, columns)]
        differences = []
        for spread in [*SPREADS][1:]:
            pair = (found.get(one, {}).get(LOSS, {}) for one in (spread, "mean"))
            differences.append(lab.difference(spread, "mean", LOSS, *pair))
        lines += [*lab.difference_lines(differences), ""]
    return lines


def group_of(row):
    return row["data"], row["patch"], row["steps"]


def is_loss(name):
    """Whether a value of a row is a column: the loss, or its part in a fifth of the gammas."""
    return name in (LOSS, f"{LOSS}_rel") or name.startswith(f"{LOSS}_gamma")


# Does it pay? -------------------------------------------------------------------------------------


class PayRun(StartedRun):
    """Clips of Sprites from scratch or from an image model ("images"), at this share of compute."""

    # score_all scores all samples at once
    is_done = PositionsRun.is_done
    score = PositionsRun.score

    def __init__(self, args, arm, share, seed):
        config, data, flags = common(args, "sprites", seed)
        steps = max(4, share * (4 if args.miniature else SPRITES.steps))
        phases, self.flops = plan_phases(config, SPRITES.phases, SPRITES.mix, steps)
        flags += [*ROTARY.split(), *phase_flags(phases, SPRITES.mix), "--forcing", 0.7]
        flags += ["--val-every", max(1, phases[-1][1] // VALIDATIONS)]
        flags += ["--position-table", "space"] if arm == "scratch" else []
        words, metrics = TASK
        sampling = ["--precision", lab.PRECISION, "--batch-size", 16, "--seed", seed]
        sampling += TINY_SAMPLES.split() * args.miniature
        super().__init__(
            Path(args.out, "inflation", f"pay-{arm}-{share}-seed{seed}"),
            data,
            training=flags,
            last_step=phases[-1][1],
            tasks={"samples": ([*words.split(), *sampling], metrics)},
            metrics=dict.fromkeys(metrics, ["--data-path", args.data_path]),
            out=Path(args.out, "inflation_pay.json"),
            about={"arm": arm, "share": share, "seed": seed},
        )
        image, self.image_flops = image_run(args, "sprites", seed)
        self.image = image if arm == "images" else None

    def start_flags(self, ckpt):
        return ["--inflate", ckpt]

    def row(self):
        own = super().row()
        return own | {
            VALID: own["values"]["samples"][VALID],
            "flops": self.flops,
            "image_flops": self.image_flops,
        }


def pay_markdown(rows):
    about = (
        "`scripts/studies/inflation.py pay` wrote this table. Compute is relative to the longest "
        "run from scratch. "
    )
    about += (
        "Cells hold the mean over seeds, and the range. The image model has learned frames of the "
        "same videos, "
    )
    about += (
        "which is the best case, and the temporal patch is one frame. Only the runs from scratch "
        "have rotary "
    )
    about += "positions in height and width, too."
    # {(arm, share): {seed: row}}
    lines, values = (["# Does a start from images pay?", "", about, ""], {})
    for row in sorted(rows, key=lambda row: (row["arm"] != "scratch", row["share"], row["seed"])):
        values.setdefault((row["arm"], row["share"]), {})[row["seed"]] = row
    cells = []
    for (arm, share), found in values.items():
        loss, valid = (
            [factor * row[name] for row in found.values()]
            for name, factor in ((LOSS, 1), (VALID, 100))
        )
        row = next(iter(found.values()))
        counted = share * (1 + (arm == "images") * row["image_flops"] / row["flops"])
        compute = [f"{100 * part:.0f}" for part in (share, counted)]
        cells.append([arm, *compute, lab.mean_cell(loss, 3), lab.mean_cell(valid, 1)])
    compute = ["compute (%)", "with the image model (%)"]
    lines += lab.table(["start", *compute, "validation loss", "valid samples (%)"], cells)
    for seed, goal in values.get(("scratch", 1.0), {}).items():
        shares = [share for share in SHARES["images"] if seed in values.get(("images", share), {})]
        if shares:
            valid = [values["images", share][seed][VALID] for share in shares]
            needs = compute_needed(goal[VALID], shares, valid, goal["image_flops"] / goal["flops"])
            lines.append(
                f"- Seed {seed}: compute to {100 * goal[VALID]:.1f}% valid samples: {needs}."
            )
    return lines


def compute_needed(goal, shares, valid, images):
    """In words: the share of the compute to the goal, if the image model (its own share: images) is
    free or counted.
    """
    if valid[0] >= goal:
        return f"at most {shares[0]:.2f} free, {shares[0] + images:.2f} counted"
    free = compute_to(goal, shares, valid)
    return (
        f"more than {shares[-1]:.2f}"
        if math.isnan(free)
        else f"{free:.2f} free, {free + images:.2f} counted"
    )


# The command --------------------------------------------------------------------------------------


def parse_args():
    parser = lab.study_parser(__doc__, seeds=[0, 1])
    add = parser.add_argument
    add("part", choices=["kernels", "pay"], help="what to measure")
    add("--data-path", metavar="DIR", help="the videos of Sprites; default: Moving Shapes only")
    add("--latents", metavar="DIR", help="their latent cache")
    return parser.parse_args()


@one_line_errors()
def main():
    args = parse_args()
    if not (args.data_path and args.latents) and (
        args.part == "pay" or args.data_path or args.latents
    ):
        fail(
            "--data-path, --latents: expected the videos and the latent cache of Sprites; see "
            "scripts/sprites.sh"
        )
    if args.part == "kernels":
        names = DATA if args.latents else ["shapes"]
        later = 2 if args.miniature else LATER
        cases = itertools.product((1, later), args.seeds, names, SPREADS)
        runs = [
            KernelRun(args, name, seed, patch, spread, steps)
            for steps, seed, name, spread in cases
            for patch in DATA[name].patches
        ]
        lab.run_all(runs)
    else:
        cases = [(arm, share) for arm, shares in SHARES.items() for share in shares]
        runs = [PayRun(args, arm, share, seed) for seed in args.seeds for arm, share in cases]
        lab.run_all(runs)
        score_all(runs)
    write = kernels_markdown if args.part == "kernels" else pay_markdown
    lab.write_results(args.out, f"inflation_{args.part}", write(lab.read_rows(runs[0].out)))


if __name__ == "__main__":
    main()
