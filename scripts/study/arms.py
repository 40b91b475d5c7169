"""The arms of study.py: what each trains, from an arm to a command of train.py, and the rows of its csv."""

import csv
import hashlib
import io
import json
import math
from dataclasses import dataclass

from models import model_config
from rope import ROPE_SCALES
from runtime.atomic import atomic_write
from runtime.cli import UserError

VERSION = 1  # of what the arms and the columns of the csv mean; rows of another one are refused
QUESTIONS = "ABCDE"  # that take runs
TOKENS = 2048  # per step, whatever the arm
TUNE_SEED, TUNE_SHARE = 100, 0.3


# ----------------------------------------------------------------------------------------------------------------------
# The table of arms


@dataclass(frozen=True)
class Arm:
    name: str
    questions: str
    flags: str = ""  # beside those that all have
    phases: tuple = ((16, 1.0),)  # (frames, share of the compute)
    mix: float = 0.0  # share of the later phases' steps with the frames of an earlier one
    patch: int = 4  # temporal
    seeds: int = 3
    shares: tuple = (1.0,)  # of the full compute, a run each
    rate: str = ""  # the arm whose tuned learning rate it takes; "" = its own
    frames: tuple = ()  # sampled beside those trained last, full compute only
    scaled: tuple = ()  # frames that are sampled with every --rope-scale as well, seed 0
    time_scales: tuple = (None,)  # sampled, seconds per frame, the first one for all `frames`; None = as trained
    looks: int = 12  # validations along the run of seed 0 and all the compute; along others 12

    @property
    def last_frames(self):
        return self.phases[-1][0]

    @property
    def tuned_as(self):
        return self.rate or self.name


EVEN = ((4, 1 / 3), (8, 1 / 3), (16, 1 / 3))
SKIP = ((8, 1 / 2), (16, 1 / 2))
LENGTHS = (4, 7, 8, 12, 16, 24, 32)
BOTH = (0.6, 1.0)

ARMS = [  # in the order in which they run, seed by seed within a block
    [
        Arm("fixed-16", "A", "--fixed"),
        Arm("16", "ABCE", shares=BOTH, frames=LENGTHS, scaled=(24, 32)),
        Arm("4-8-16 even", "BC", phases=EVEN, shares=BOTH, frames=LENGTHS, looks=200),
        Arm("4-8-16 short", "B", phases=((4, 0.05), (8, 0.2), (16, 0.75))),
        Arm("4-8-16 long", "B", phases=((4, 0.43), (8, 0.43), (16, 0.14)), shares=BOTH),
        Arm("8-16", "B", phases=SKIP),
    ],
    [
        Arm("4", "CE", phases=((4, 1.0),), rate="16", seeds=2, frames=LENGTHS, scaled=(8, 16)),
        Arm("8", "C", phases=((8, 1.0),), rate="16", seeds=2, frames=LENGTHS, scaled=(16, 32)),
        Arm("4-8-16 rewarmup", "B", "--rewarmup 20", phases=EVEN, rate="4-8-16 even", seeds=2, looks=200),
        Arm("4-8-16 mix", "B", phases=EVEN, mix=0.2, rate="4-8-16 even", seeds=2, shares=BOTH, looks=200),
        Arm(
            "intervals 1-3", "CD", "--frame-interval 1 3", ((8, 1.0),), rate="16", seeds=2, frames=(16, 24),
            time_scales=(0.04, 0.06, 0.08, 0.12),
        ),
        Arm(
            "4-8-16 intervals", "BC", "--frame-interval 1 2", EVEN, rate="4-8-16 even", seeds=2, frames=LENGTHS,
            time_scales=(0.04,),
        ),
    ],
    [
        Arm("patch 2: 16", "BE", patch=2, seeds=1),
        Arm("patch 2: 4-8-16", "B", phases=EVEN, patch=2, rate="patch 2: 16", seeds=1),
        Arm("patch 2: 8-16", "B", phases=SKIP, patch=2, rate="patch 2: 16", seeds=1),
        Arm("patch 1: 16", "BE", patch=1, seeds=1),
        Arm("patch 1: 4-8-16", "B", phases=EVEN, patch=1, rate="patch 1: 16", seeds=1),
        Arm("patch 1: 8-16", "B", phases=SKIP, patch=1, rate="patch 1: 16", seeds=1),
    ],
    [
        Arm("theta 1000", "E", "--rope-theta 1000", rate="16", seeds=1),
        Arm("theta 10000", "E", "--rope-theta 10000", rate="16", seeds=1),
        Arm("split 16,8,8", "E", "--rope-split 16,8,8", rate="16", seeds=1),
        Arm("split 4,14,14", "E", "--rope-split 4,14,14", rate="16", seeds=1),
        Arm("QK norm", "E", "--qk-norm", rate="16", seeds=1),
        Arm("AdamW", "E", "--optimizer adamw", seeds=1),
        *(
            Arm(f"{frames} frames, gamma shift {shift}", "E", f"--gamma-shift {shift}", ((frames, 1.0),),
                rate="16", seeds=1)
            for frames in (16, 4) for shift in (1, 2, 5)
        ),
    ],
]  # fmt: skip
BY_NAME = {arm.name: arm for block in ARMS for arm in block}


@dataclass(frozen=True)
class Size:
    """How large everything is. A unit of compute is that of `steps` steps of the arm "16"."""

    name: str
    steps: int
    depth: int
    width: int
    heads: int
    videos: int  # per class
    clips: int  # sampled for a row
    val_clips: int
    points: int  # of a descent, each 0.5 / (points - 1) long
    factors: tuple  # of the learning rates; one = no tuning
    lengths: tuple  # of LENGTHS
    most_seeds: int


FULL = Size("full", 2000, 4, 128, 4, 60, 96, 64, 16, (0.5, 1.0, 2.0), LENGTHS, 3)
MINIATURE = Size("miniature", 6, 1, 48, 2, 2, 12, 4, 3, (1.0,), (4, 7, 24), 1)
WAY, GUIDANCE = 0.498, 1.5  # of the descent: steps x their size
LR, MUON_LR = 2e-3, 0.01  # times the factor


@dataclass(frozen=True)
class Job:
    """One run and what is sampled from it; factor is None as long as the tuning runs are not done."""

    arm: Arm
    seed: int
    factor: float | None
    share: float

    @property
    def name(self):
        words = f"{self.arm.name}-seed{self.seed}-rate{self.factor:g}-compute{self.share:g}"
        return words.replace(": ", "-").replace(" ", "-")

    @property
    def key(self):
        return self.arm.name, self.seed, self.factor, self.share

    @property
    def tunes(self):
        return self.seed == TUNE_SEED

    @property
    def looks(self):
        """Validations along the run."""
        return 3 if self.tunes else self.arm.looks if (self.seed, self.share) == (0, 1) else 12

    def cells(self, size):
        """What is sampled: (frames, seconds per frame, --rope-scale)."""
        if self.tunes:
            return []
        arm, lengths = self.arm, {self.arm.last_frames}
        if self.share == 1:
            lengths |= set(arm.frames) & set(size.lengths)
        cells = [(arm.last_frames, scale, "none") for scale in arm.time_scales]
        cells += [(frames, arm.time_scales[0], "none") for frames in sorted(lengths - {arm.last_frames})]
        if self.share == 1 and self.seed == 0:
            scaled = sorted(set(arm.scaled) & set(size.lengths))
            cells += [(frames, None, method) for frames in scaled for method in ROPE_SCALES[1:]]
        return cells


# ----------------------------------------------------------------------------------------------------------------------
# From an arm to a command


def config_of(arm, size):
    """The EqMConfig of an arm, for counting FLOPs: of what the flags change, only the patch and the positions count."""
    settings = {"depth": size.depth, "hidden_size": size.width, "num_heads": size.heads, "input_size": 16}
    settings |= {"in_channels": 3, "temporal_patch_size": arm.patch, "num_classes": 12, "num_frames": arm.last_frames}
    return model_config("EqM-Ti/2", use_rope="--fixed" not in arm.flags, **settings)


def phases_of(arm, share, size):
    """[(frames, last step, clips per step)] of a run, and the FLOPs that they take, mixing at its mean."""
    config, full = config_of(arm, size), config_of(BY_NAME["16"], size)
    compute = share * size.steps * TOKENS // math.prod(full.grid(16)) * full.training_flops(16)
    phases, step, spent, earlier = [], 0, 0, []
    for frames, part in arm.phases:
        batch = TOKENS // math.prod(config.grid(frames))
        own = batch * config.training_flops(frames)
        per_step = own
        if earlier and arm.mix:
            others = [batch * config.training_flops(other) for other in earlier]
            per_step = (1 - arm.mix) * own + arm.mix * sum(others) / len(others)
        steps = max(1, round(part * compute / per_step))
        step, spent, earlier = step + steps, spent + steps * per_step, [*earlier, frames]
        phases.append((frames, step, batch))
    return phases, spent


BASE = [
    "--model", "EqM-Ti/2", "--image-size", 16, "--vae", "none", "--no-flip", "--num-workers", 0, "--precision", "bf16",
    "--optimizer", "muon", "--warmup-steps", 20, "--lr-decay", 0.4, "--ema-decay", 0.99, "--gamma-shift", 3,
]  # fmt: skip


def recipe_flags(job, size):
    """The flags of train.py that decide a run; where its files lie is not among them."""
    arm, (phases, _) = job.arm, phases_of(job.arm, job.share, size)
    flags = ["--video", *BASE, "--depth", size.depth, "--hidden-size", size.width, "--num-heads", size.heads]
    flags += ["--temporal-patch-size", arm.patch, "--global-seed", job.seed]
    flags += ["--lr", f"{LR * job.factor:g}", "--muon-lr", f"{MUON_LR * job.factor:g}"]
    if len(phases) == 1:
        frames, last_step, batch = phases[0]
        flags += ["--num-frames", frames, "--max-steps", last_step, "--global-batch-size", batch]
    else:
        flags += ["--frames-schedule", ",".join(f"{a}:{b}:{c}" for a, b, c in phases), "--mix", arm.mix]
    if arm.flags != "--fixed":
        flags += ["--use-rope", "--rope-theta", 100, *arm.flags.split()]  # the last one counts
    period = max(1, phases[-1][1] // job.looks)
    flags += ["--val-frames", *val_frames(arm), "--val-clips", size.val_clips, "--val-every", period]
    return [str(flag) for flag in flags]


def val_frames(arm):
    """The lengths at which an arm validates, 16 among them."""
    return sorted({16, *(frames for frames, _ in arm.phases)})


def training_work(job, size):
    """FLOPs of a run with its validations, of which those of the average and of the raw weights are one each."""
    look = sum(config_of(job.arm, size).flops(frames) for frames in val_frames(job.arm)) * 2 * size.val_clips
    return phases_of(job.arm, job.share, size)[1] + job.looks * look


def sampling_flops(arm, frames, size):
    """Of the guided descents of a row's clips."""
    return float(size.clips * (size.points - 1) * 2 * config_of(arm, size).flops(frames))


def fingerprint(job, size):
    """Of all that decides a row of the csv."""
    about = [recipe_flags(job, size), size.videos, size.clips, size.points, WAY, GUIDANCE]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]


# ----------------------------------------------------------------------------------------------------------------------
# The csv

SCORES = "direction", "shape", "speed", "area"
COLUMNS = [
    "version", "recipe", "arm", "seed", "factor", "share", "kind", "step", "frames", "time_scale", "rope_scale",
    "loss", "loss_rel", "loss_raw", "loss_4", "loss_8", "loss_16", "train_loss", "clips", "right",
    *(name + end for name in SCORES for end in ("", "_low", "_high")), "true_speed", "real_direction",
    "seam", "seam_low", "seam_high", "change", "drift", "flops", "seconds", "val_seconds", "code", "machine",
]  # fmt: skip
TEXTS = {"recipe", "arm", "kind", "rope_scale", "code", "machine"}
WHOLE = {"version", "seed", "step", "frames", "clips", "right"}


def read_rows(path):
    """The rows of a csv, numbers as numbers, an empty cell as None. Raises UserError."""
    try:
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            lines = list(reader)
        if reader.fieldnames != COLUMNS:
            raise UserError(f"{path}: its columns are not those of version {VERSION} of the study: move it away")
        return [{name: parse(name, text) for name, text in line.items()} for line in lines]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{path}: is no csv of the study ({error}): move it away") from error


def parse(name, text):
    if name in TEXTS:
        return text
    return None if text == "" else int(text) if name in WHOLE else float(text)


def write_rows(path, rows):
    """All or nothing."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def check_rows(path, rows, size):
    """Raise UserError for rows that this code would not have written."""
    for row in rows:
        place = f"{path}: a row of arm {row['arm']!r}"
        if row["version"] != VERSION:
            raise UserError(f"{place} is of version {row['version']} of the study, this is {VERSION}: move it away")
        if row["arm"] not in BY_NAME:
            raise UserError(f"{place}, which this code does not have: move the csv away, or remove those rows")
        if row["recipe"] != fingerprint(job_of(row), size):
            raise UserError(f"{place} is of another recipe (flags, sizes): move the csv away, or remove those rows")


def job_of(row):
    return Job(BY_NAME[row["arm"]], row["seed"], row["factor"], row["share"])


def job_key(row):
    return row["arm"], row["seed"], row["factor"], row["share"]


def row_key(row):
    return *job_key(row), row["kind"], row["step"], row["frames"], row["time_scale"], row["rope_scale"]


def last_rows(rows):
    """Of each run the row of its last step, and all rows of samples: their seconds add up to all that were spent."""
    last = {}
    for row in rows:
        if row["kind"] == "train" and row["seconds"] is not None:
            key = job_key(row)
            last[key] = max(row, last.get(key, row), key=lambda one: one["step"])
    return [*last.values(), *(row for row in rows if row["kind"] == "sample")]
