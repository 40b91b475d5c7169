"""The arms of study.py: their table, their commands of train.py, and the rows of study.csv."""

import csv
import hashlib
import io
import json
import math
from dataclasses import dataclass

from models import model_config
from runtime.atomic import atomic_write
from runtime.cli import UserError

VERSION = 1  # of the meaning of the arms and of the columns of the csv; rows of other versions are refused
QUESTIONS = "ABCDE"  # those that need runs
TOKENS = 2048  # per training step, for all arms
TUNE_SEED, TUNE_SHARE = 100, 0.3  # seed and share of the compute of the runs that tune the learning rate


# ----------------------------------------------------------------------------------------------------------------------
# The table of arms


@dataclass(frozen=True)
class Arm:
    name: str
    questions: str
    flags: str = ""  # of train.py, in addition to those of all arms; "--fixed" = no rotary positions
    phases: tuple = ((16, 1.0),)  # (num_frames, share of the compute) of each phase
    mix: float = 0.0  # --mix of train.py
    patch: int = 4  # temporal_patch_size
    seeds: int = 3  # number of seeds; 0: only reported, as train.py has lost the flag
    shares: tuple = (1.0,)  # shares of the full compute; each is a run
    rate: str = ""  # the arm whose tuned learning rate is used; "" = its own
    frames: tuple = ()  # num_frames of samples beside that of the last phase, for full compute only
    scaled: tuple = ()  # num_frames of samples with --rope-scale linear as well, for seed 0 only
    time_scales: tuple = (None,)  # of samples, seconds per frame; the first one for all `frames`; None = as trained
    validations: int = 12  # number in the run of seed 0 with full compute; other runs have 12

    @property
    def last_frames(self):
        return self.phases[-1][0]

    @property
    def tuned_as(self):
        return self.rate or self.name


EVEN = ((4, 1 / 3), (8, 1 / 3), (16, 1 / 3))
SKIP = ((8, 1 / 2), (16, 1 / 2))
LENGTHS = (4, 7, 8, 12, 16, 24, 32)  # num_frames of samples
BOTH = (0.6, 1.0)

ARMS = [  # blocks, in the order in which they run; within a block seed by seed
    [
        Arm("fixed-16", "A", "--fixed"),
        Arm("16", "ABCE", shares=BOTH, frames=LENGTHS, scaled=(24, 32)),
        Arm("4-8-16 even", "BC", phases=EVEN, shares=BOTH, frames=LENGTHS, validations=200),
        Arm("4-8-16 short", "B", phases=((4, 0.05), (8, 0.2), (16, 0.75))),
        Arm("4-8-16 long", "B", phases=((4, 0.43), (8, 0.43), (16, 0.14)), shares=BOTH),
        Arm("8-16", "B", phases=SKIP),
    ],
    [
        Arm("4", "CE", phases=((4, 1.0),), rate="16", seeds=2, frames=LENGTHS, scaled=(8, 16)),
        Arm("8", "C", phases=((8, 1.0),), rate="16", seeds=2, frames=LENGTHS, scaled=(16, 32)),
        Arm("4-8-16 rewarmup", "B", "--rewarmup 20", phases=EVEN, rate="4-8-16 even", seeds=0, validations=200),
        Arm("4-8-16 mix", "B", phases=EVEN, mix=0.2, rate="4-8-16 even", seeds=2, shares=BOTH, validations=200),
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
    """The sizes of models, runs and samples. The full compute is that of `steps` steps of the arm "16"."""

    name: str
    steps: int
    depth: int
    width: int
    heads: int
    videos: int  # per class
    clips: int  # number of samples for a row of the csv
    val_clips: int
    points: int  # --num-sampling-steps
    factors: tuple  # of the learning rates, to be tuned; a single one = no tuning
    lengths: tuple  # those of LENGTHS that are sampled
    most_seeds: int


FULL = Size("full", 2000, 4, 128, 4, 60, 96, 64, 16, (0.5, 1.0, 2.0), LENGTHS, 3)
MINIATURE = Size("miniature", 6, 1, 48, 2, 2, 12, 4, 3, (1.0,), (4, 7, 24), 1)
PATH_LENGTH, GUIDANCE = 0.498, 1.5  # of sampling; path length = evaluations x step size
LR, MUON_LR = 2e-3, 0.01  # to be multiplied by the factor


@dataclass(frozen=True)
class Job:
    """One run and its samples; factor is None as long as the tuning runs are not done."""

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
    def is_tuning(self):
        return self.seed == TUNE_SEED

    @property
    def validations(self):
        """The number of validations in the run."""
        return 3 if self.is_tuning else self.arm.validations if (self.seed, self.share) == (0, 1) else 12

    def cells(self, size):
        """The settings of its samples, a row of the csv each: (num_frames, seconds per frame, --rope-scale)."""
        if self.is_tuning:
            return []
        arm, lengths = self.arm, {self.arm.last_frames}
        if self.share == 1:
            lengths |= set(arm.frames) & set(size.lengths)
        cells = [(arm.last_frames, scale, "none") for scale in arm.time_scales]
        cells += [(frames, arm.time_scales[0], "none") for frames in sorted(lengths - {arm.last_frames})]
        if self.share == 1 and self.seed == 0:
            scaled = sorted(set(arm.scaled) & set(size.lengths))
            cells += [(frames, None, "linear") for frames in scaled]
        return cells


# ----------------------------------------------------------------------------------------------------------------------
# From an arm to a command


def config_of(arm, size):
    """The EqMConfig of an arm, for counting FLOPs; flags that do not change them are left out."""
    settings = {"depth": size.depth, "hidden_size": size.width, "num_heads": size.heads, "input_size": 16}
    settings |= {"in_channels": 3, "temporal_patch_size": arm.patch, "num_classes": 12, "num_frames": arm.last_frames}
    return model_config("EqM-Ti/2", use_rope="--fixed" not in arm.flags, **settings)


def phases_of(arm, share, size):
    """[(num_frames, last step, clips per step)] of a run, and its FLOPs; those of --mix are their expectation."""
    config, base = config_of(arm, size), config_of(BY_NAME["16"], size)
    compute = share * size.steps * TOKENS // math.prod(base.grid(16)) * base.training_flops(16)
    phases, last_step, flops, earlier = [], 0, 0, []
    for num_frames, part in arm.phases:
        batch_size = TOKENS // math.prod(config.grid(num_frames))
        own = batch_size * config.training_flops(num_frames)
        per_step = own
        if earlier and arm.mix:
            others = [batch_size * config.training_flops(other) for other in earlier]
            per_step = (1 - arm.mix) * own + arm.mix * sum(others) / len(others)
        steps = max(1, round(part * compute / per_step))
        last_step, flops, earlier = last_step + steps, flops + steps * per_step, [*earlier, num_frames]
        phases.append((num_frames, last_step, batch_size))
    return phases, flops


BASE = [
    "--model", "EqM-Ti/2", "--image-size", 16, "--vae", "none", "--no-flip", "--num-workers", 0, "--precision", "bf16",
    "--optimizer", "muon", "--warmup-steps", 20, "--lr-decay", 0.4, "--ema-decay", 0.99, "--gamma-shift", 3,
]  # fmt: skip


def recipe_flags(job, size):
    """The flags of train.py that determine a run, without the paths."""
    arm, (phases, _) = job.arm, phases_of(job.arm, job.share, size)
    flags = ["--video", *BASE, "--depth", size.depth, "--hidden-size", size.width, "--num-heads", size.heads]
    flags += ["--temporal-patch-size", arm.patch, "--global-seed", job.seed]
    flags += ["--lr", f"{LR * job.factor:g}", "--muon-lr", f"{MUON_LR * job.factor:g}"]
    if len(phases) == 1:
        num_frames, last_step, batch_size = phases[0]
        flags += ["--num-frames", num_frames, "--max-steps", last_step, "--global-batch-size", batch_size]
    else:
        flags += ["--frames-schedule", ",".join(f"{a}:{b}:{c}" for a, b, c in phases), "--mix", arm.mix]
    if arm.flags != "--fixed":
        flags += ["--use-rope", "--rope-theta", 100, *arm.flags.split()]  # of a repeated flag the last value counts
    period = max(1, phases[-1][1] // job.validations)
    flags += ["--val-frames", *val_frames(arm), "--val-clips", size.val_clips, "--val-every", period]
    return [str(flag) for flag in flags]


def val_frames(arm):
    """The numbers of frames at which an arm validates, always including 16."""
    return sorted({16, *(frames for frames, _ in arm.phases)})


def run_flops(job, size):
    """FLOPs of a run with its validations, each with the EMA and with the raw weights."""
    validation = sum(config_of(job.arm, size).flops(frames) for frames in val_frames(job.arm)) * 2 * size.val_clips
    return phases_of(job.arm, job.share, size)[1] + job.validations * validation


def sampling_flops(arm, num_frames, size):
    """FLOPs of sampling the clips of a row, with guidance."""
    return float(size.clips * (size.points - 1) * 2 * config_of(arm, size).flops(num_frames))


def fingerprint(job, size):
    """A hash of all that determines the rows of a job."""
    about = [recipe_flags(job, size), size.videos, size.clips, size.points, PATH_LENGTH, GUIDANCE]
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
            raise UserError(f"{path}: the columns are not those of version {VERSION} of the study: move it away")
        return [{name: parse_cell(name, text) for name, text in line.items()} for line in lines]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{path}: is not a csv of the study ({error}): move it away") from error


def parse_cell(name, text):
    if name in TEXTS:
        return text
    return None if text == "" else int(text) if name in WHOLE else float(text)


def write_rows(path, rows):
    """Write a csv atomically."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def check_rows(path, rows, size):
    """Raise UserError for rows of another version, arm or recipe than this code has."""
    for row in rows:
        found = f"{path}: a row of arm {row['arm']!r}"
        if row["version"] != VERSION:
            raise UserError(f"{found} is of version {row['version']} of the study, this is {VERSION}: move it away")
        if row["arm"] not in BY_NAME:
            raise UserError(f"{found}, which is not in arms.py: move the csv away, or remove those rows")
        if row["recipe"] != fingerprint(job_of(row), size):
            raise UserError(f"{found} is of another recipe (flags, sizes): move the csv away, or remove those rows")


def job_of(row):
    return Job(BY_NAME[row["arm"]], row["seed"], row["factor"], row["share"])


def job_key(row):
    return row["arm"], row["seed"], row["factor"], row["share"]


def row_key(row):
    return *job_key(row), row["kind"], row["step"], row["frames"], row["time_scale"], row["rope_scale"]


def last_rows(rows):
    """The row of the last step of each run and all rows of samples; their seconds add up to the time spent."""
    last = {}
    for row in rows:
        if row["kind"] == "train" and row["seconds"] is not None:
            key = job_key(row)
            last[key] = max(row, last.get(key, row), key=lambda train_row: train_row["step"])
    return [*last.values(), *(row for row in rows if row["kind"] == "sample")]
