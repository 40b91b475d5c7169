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

The script writes inflation_PART.md and .json in results/studies/speed. Runs whose scores are in the
json are not run again. Models and samples are in its folder inflation (see lab.py). A full run of
clips takes about 35 minutes if two run at once on 2 cores.
"""

import itertools
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import lab
from arms import (
    BASE,
    FULL,
    ROTARY,
    TOKENS,
    config_of,
    phase_flags,
    plan_phases,
    validation_flags,
)
from checkpoint import from_elsewhere, load, save
from inflate import inflate
from models import EqMConfig
from positions import DATA_SETS, TINY, ScoredTogether, common_sampling, score_all, size_flags
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
SHARES = {  # of the compute
    "scratch": (0.4, 0.6, 1.0),
    "images": (0.2, 0.4, 0.6, 0.8),
}
TASK = "--num-frames 8 --num-samples 576", ("census",)
SCORE = "valid"  # of the samples
LOSS = "val_loss"
PAY_COLUMNS = {
    "validation loss": lab.Column(LOSS, 1, 3),
    "valid samples (%)": lab.Column("valid", 100, 1),
}


@dataclass(frozen=True)
class Frames:
    """A data set for image models and the clips of part kernels."""

    config: EqMConfig
    flags: str  # of train.py
    num_frames: int  # of a clip
    steps: int  # of an image model
    patches: tuple[int, ...]  # frames of a temporal patch; the width must hold its values


DATA = {
    "shapes": Frames(
        config=replace(config_of(FULL), temporal_patch_size=1, num_frames=1),
        flags=f"{BASE} --precision {lab.PRECISION}",
        num_frames=16,
        steps=1000,
        patches=(2, 4),
    ),
    "sprites": Frames(
        config=SPRITES.config,
        flags=SPRITES.flags,
        num_frames=8,
        steps=600,  # a fifth of the compute of HOURS=0.5
        patches=(2,),
    ),
}


def common(args, name, seed):
    """(config, data of a lab.Run, flags of train.py) that all runs of a data set share."""
    frames = DATA[name]
    config = replace(frames.config, **TINY if args.miniature else {})
    data = {}
    videos = args.latents
    if name == "shapes":
        folder = Path(args.out, "inflation", "moving-shapes")
        data = lab.data_sets(folder, 2 if args.miniature else 60, 2)
        videos, _ = data
    flags = (
        f"--video {frames.flags} --forcing 0 --global-seed {seed} --val-clips 256 "
        f"{size_flags(config)}"
    ).split()
    flags += ["--data-path", videos]
    if args.compile:
        flags.append("--compile")
    return config, data, flags


def image_run(args, name, seed):
    """The lab.Run of a model of single frames, and its FLOPs."""
    config, data, flags = common(args, name, seed)
    phases, flops = plan_phases(
        config,
        shares=((1, 1.0),),
        mix=0,
        steps=2 if args.miniature else DATA[name].steps,
    )
    _, last_step, _ = phases[-1]
    flags += ["--temporal-patch-size", 1, *phase_flags(phases, 0).split()]
    folder = Path(args.out, "inflation", f"{name}-image-seed{seed}")
    return lab.Run(folder, data, training=flags, last_step=last_step), flops


class StartedRun(lab.JsonRun):
    """A run of a video model that may start from the image model of another run."""

    image = None  # that run

    def train(self):
        if self.image and self.checkpoint() is None:
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

    def __init__(self, args, about):
        name, seed, patch, _, steps = about.values()
        config, data, flags = common(args, name, seed)
        frames = DATA[name].num_frames
        config = replace(config, temporal_patch_size=patch, num_frames=frames)
        batch = TOKENS // math.prod(config.grid(frames))
        phase = f"--num-frames {frames} --max-steps {steps} --global-batch-size {batch}"
        flags += f"--use-rope --temporal-patch-size {patch} {phase}".split()
        if steps == 1:
            flags += ["--lr", 1e-12, "--muon-lr", 1e-12]
        folder = "-".join(map(str, about.values()))
        for character in "/ ":
            folder = folder.replace(character, "-")
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
        weights, config = inflate(
            state["ema"],
            config,
            num_frames=pt,
            temporal_patch_size=pt,
            rope_theta=THETA,
            time_scale=seconds,
        )
        spread = SPREADS[self.about["spread"]](pt)
        weights[KERNEL] *= pt * spread[:, None, None]
        training = state["config"] | {"model": asdict(config)}
        start = from_elsewhere(
            training,
            model=weights,
            ema=weights,
            step=0,
        )
        path = self.folder / "start.pt"
        save(path, start)
        return ["--ckpt", path]


def kernels_markdown(rows):
    lines = lab.heading(
        "Kernels of an inflated patch embedding",
        "`scripts/studies/inflation.py kernels` wrote these tables: validation losses of clips "
        "whose frames have independent noise. Cells hold the mean over seeds, and the range. "
        "`val_loss_rel` is relative to predicting zero, `val_loss_gamma_0.2` covers gamma from 0.2 "
        "to 0.4. `--inflate` spreads by the mean.",
    )
    cases = sorted({(row["data"], row["patch"], row["steps"]) for row in rows})
    for name, patch, steps in cases:
        about = {"data": name, "patch": patch, "steps": steps}
        group = lab.rows_with(about, rows)
        columns = {loss: lab.Column(loss, 1, 3) for loss in group[0] if is_loss(loss)}
        values = {}  # {loss: {spread: {seed: value}}}
        for loss, column in columns.items():
            values[loss] = {}
            for spread in SPREADS:
                values[loss][spread] = lab.by_seed(group, {"spread": spread}, column)
        when = "at the start" if steps == 1 else f"after {steps} steps"
        lines += [f"## {name}, temporal patch {patch}, {when}", ""]
        spreads = [spread for spread in SPREADS if values[LOSS][spread]]
        lines += lab.seed_table(spreads, columns, values)
        first, *others = SPREADS
        differences = [lab.difference(values[LOSS], (spread, first), LOSS) for spread in others]
        lines += [*lab.difference_lines(differences), ""]
    return lines


def is_loss(name):
    """Whether a value of a row is a column: the loss, or its part in a fifth of the gammas."""
    return name in (LOSS, "val_loss_rel") or name.startswith("val_loss_gamma")


# Does it pay? -------------------------------------------------------------------------------------


class PayRun(ScoredTogether, StartedRun):
    """Clips of Sprites from scratch or from an image model ("images"), at this share of compute."""

    def __init__(self, args, arm, share, seed):
        config, data, flags = common(args, "sprites", seed)
        steps = 4 if args.miniature else SPRITES.steps
        phases, self.flops = plan_phases(
            config,
            shares=SPRITES.phases,
            mix=SPRITES.mix,
            steps=max(4, share * steps),
        )
        _, last_step, _ = phases[-1]
        recipe = f"{ROTARY} {phase_flags(phases, SPRITES.mix)} --forcing 0.7"
        flags += f"{recipe} {validation_flags(phases)}".split()
        if arm == "scratch":
            flags += ["--position-table", "space"]
        words, metrics = TASK
        super().__init__(
            Path(args.out, "inflation", f"pay-{arm}-{share}-seed{seed}"),
            data,
            training=flags,
            last_step=last_step,
            tasks={"samples": (f"{words} {common_sampling(args, seed)}".split(), metrics)},
            metrics=dict.fromkeys(metrics, ["--data-path", args.data_path]),
            out=Path(args.out, "inflation_pay.json"),
            about={"arm": arm, "share": share, "seed": seed},
        )
        image, self.image_flops = image_run(args, "sprites", seed)
        self.image = image if arm == "images" else None

    def start_flags(self, ckpt):
        return ["--inflate", ckpt]

    def row(self):
        row = super().row()
        row["valid"] = row["values"]["samples"][SCORE]
        row["image_flops"] = self.image_flops
        return row


def pay_markdown(rows):
    lines = lab.heading(
        "Does a start from images pay?",
        "`scripts/studies/inflation.py pay` wrote this table. Compute is relative to the longest "
        "run from scratch. Cells hold the mean over seeds, and the range. The image model has "
        "learned frames of the same videos, which is the best case, and the temporal patch is one "
        "frame. Only the runs from scratch have rotary positions in height and width, too.",
    )
    rows = sorted(rows, key=lambda row: (row["arm"] != "scratch", row["share"], row["seed"]))
    cells = []
    for arm, share in dict.fromkeys((row["arm"], row["share"]) for row in rows):
        group = lab.rows_with({"arm": arm, "share": share}, rows)
        counted = share
        if arm == "images":
            counted *= 1 + group[0]["image_flops"] / group[0]["flops"]
        row = [arm, f"{100 * share:.0f}", f"{100 * counted:.0f}"]
        for column in PAY_COLUMNS.values():
            row.append(lab.mean_cell(lab.by_seed(group, {}, column), column.digits))
        cells.append(row)
    titles = ["start", "compute (%)", "with the image model (%)", *PAY_COLUMNS]
    lines += lab.table(titles, cells)
    for goal in lab.rows_with({"arm": "scratch", "share": 1.0}, rows):
        seed = goal["seed"]
        images = lab.rows_with({"arm": "images", "seed": seed}, rows)
        if images:
            valid = {row["share"]: row["valid"] for row in images}
            needs = compute_needed(goal["valid"], valid, goal["image_flops"] / goal["flops"])
            percent = f"{100 * goal['valid']:.1f}%"
            lines.append(f"- Seed {seed}: compute to {percent} valid samples: {needs}.")
    return lines


def compute_needed(goal, valid, images):
    """In words: the share of the compute to the goal, if the image model is free or counted.

    valid: {share of the compute: share of valid samples}; images: the image model's own share.
    """
    shares = list(valid)
    if valid[shares[0]] >= goal:
        return f"at most {shares[0]:.2f} free, {shares[0] + images:.2f} counted"
    free = compute_to(goal, shares, list(valid.values()))
    if math.isnan(free):
        return f"more than {shares[-1]:.2f}"
    return f"{free:.2f} free, {free + images:.2f} counted"


# The command --------------------------------------------------------------------------------------


def parse_args():
    parser = lab.study_parser(__doc__, "speed", seeds=[0, 1])
    add = parser.add_argument
    add("part", choices=["kernels", "pay"], help="what to measure")
    add("--data-path", metavar="DIR", help="the videos of Sprites; default: Moving Shapes only")
    add("--latents", metavar="DIR", help="their latent cache")
    return parser.parse_args()


@one_line_errors()
def main():
    args = parse_args()
    has_sprites = bool(args.data_path and args.latents)
    if not has_sprites and (args.part == "pay" or args.data_path or args.latents):
        fail(
            "--data-path, --latents: expected the videos and the latent cache of Sprites; see "
            "scripts/sprites.sh"
        )
    if args.part == "kernels":
        write = kernels_markdown
        runs = kernel_runs(args, DATA if has_sprites else ["shapes"])
        lab.run_all(runs)
    else:
        write = pay_markdown
        runs = []
        for seed, (arm, shares) in itertools.product(args.seeds, SHARES.items()):
            for share in shares:
                run = PayRun(
                    args,
                    arm=arm,
                    share=share,
                    seed=seed,
                )
                runs.append(run)
        lab.run_all(runs)
        score_all(runs)
    out = runs[0].out
    lab.write_results(args.out, out.stem, write(lab.read_rows(out)))


def kernel_runs(args, names):
    runs = []
    later = 2 if args.miniature else LATER
    for steps, seed, name in itertools.product((1, later), args.seeds, names):
        for spread, patch in itertools.product(SPREADS, DATA[name].patches):
            about = {
                "data": name,
                "seed": seed,
                "patch": patch,
                "spread": spread,
                "steps": steps,
            }
            runs.append(KernelRun(args, about))
    return runs


if __name__ == "__main__":
    main()
