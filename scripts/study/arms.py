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

VERSION = 2  # of the meaning of the arms and of the columns of the csv; rows of other versions are refused
QUESTIONS = "ABC"
TOKENS = 2048  # per training step, for all arms
SECONDS_PER_FRAME = 0.04  # of the videos, and of all samples


# ----------------------------------------------------------------------------------------------------------------------
# The table of arms


@dataclass(frozen=True)
class Arm:
    name: str
    questions: str
    flags: str = ""  # of train.py, in addition to those of all arms
    phases: tuple = ((16, 1.0),)  # (num_frames, share of the compute) of each phase
    mix: float = 0.0  # --mix of train.py
    seeds: int = 3  # number of seeds with full compute
    shares: tuple = ()  # other shares of the compute; each is a run of its own, for SHARE_SEEDS seeds
    lengths: tuple = (16,)  # num_frames of samples of runs with full compute; others have 16


ROTARY_FLAGS = "--use-rope --rope-theta 100"
TABLE_FLAGS = ROTARY_FLAGS + " --position-table space"
MOVING_FLAGS = TABLE_FLAGS + " --rope-speed 0.5"
INTERVAL_FLAGS = " --frame-interval 1 2"
EVEN = ((4, 1 / 3), (8, 1 / 3), (16, 1 / 3))
LENGTHS = (16, 24, 32)
SHARES = (0.4, 0.6)  # the arm that has not learned motion at 100% has 160% instead
SHARE_SEEDS = 3

ARMS = [
    Arm("16 fixed", "A", seeds=5),
    Arm("16 rotary", "A", ROTARY_FLAGS, seeds=5),
    Arm("16 table", "AC", TABLE_FLAGS, seeds=5, shares=(1.6,)),
    Arm("16 moving", "A", MOVING_FLAGS, seeds=5),
    Arm("16 moving intervals", "BC", MOVING_FLAGS + INTERVAL_FLAGS, shares=SHARES),
    Arm("4-8-16", "B", ROTARY_FLAGS + INTERVAL_FLAGS, EVEN, lengths=LENGTHS),
    Arm("4-8-16 table", "B", TABLE_FLAGS + INTERVAL_FLAGS, EVEN, lengths=LENGTHS),
    Arm("4-8-16 mix", "B", ROTARY_FLAGS + INTERVAL_FLAGS, EVEN, mix=0.2, lengths=LENGTHS),
    Arm("4-8-16 table mix", "B", TABLE_FLAGS + INTERVAL_FLAGS, EVEN, mix=0.2, lengths=LENGTHS),
    Arm("4-8-16 moving", "BC", MOVING_FLAGS + INTERVAL_FLAGS, EVEN, lengths=LENGTHS, shares=SHARES),
]
BY_NAME = {arm.name: arm for arm in ARMS}


@dataclass(frozen=True)
class Size:
    """The sizes of models, runs and samples. The full compute is that of `steps` steps of 16 frames."""

    name: str
    steps: int
    depth: int
    width: int
    heads: int
    videos: int  # per class
    clips: int  # number of samples for a row of the csv
    val_clips: int
    points: int  # --num-sampling-steps
    most_seeds: int


FULL = Size("full", 2000, 4, 128, 4, 60, 96, 64, 16, 5)
MINIATURE = Size("miniature", 6, 1, 48, 2, 2, 12, 4, 3, 1)
PATH_LENGTH, GUIDANCE = 0.498, 1.5  # of sampling; path length = evaluations x step size
VALIDATIONS = 8  # of a run, beside those at the ends of its phases


@dataclass(frozen=True)
class Job:
    """One run and its samples."""

    arm: Arm
    seed: int
    share: float

    @property
    def name(self):
        return f"{self.arm.name}-seed{self.seed}-compute{self.share:g}".replace(" ", "-")

    @property
    def key(self):
        return self.arm.name, self.seed, self.share

    @property
    def lengths(self):
        """The num_frames of its samples, a row of the csv each."""
        return self.arm.lengths if self.share == 1 else (16,)


def all_jobs(names, size):
    """The jobs of the named arms, in the order in which they run."""
    jobs = []
    for arm in (BY_NAME[name] for name in names):
        jobs += [Job(arm, seed, 1.0) for seed in range(min(arm.seeds, size.most_seeds))]
        jobs += [Job(arm, seed, share) for share in arm.shares for seed in range(min(SHARE_SEEDS, size.most_seeds))]

    def order(job):  # what costs most and says least comes last: long runs, and before them more seeds
        return job.share > 1, job.seed >= SHARE_SEEDS, job.share != 1, job.seed

    return sorted(jobs, key=order)


# ----------------------------------------------------------------------------------------------------------------------
# From an arm to a command


def config_of(size):
    """An EqMConfig for counting FLOPs, which do not depend on the positions."""
    settings = {"depth": size.depth, "hidden_size": size.width, "num_heads": size.heads, "input_size": 16}
    return model_config(
        "EqM-Ti/2", use_rope=True, in_channels=3, temporal_patch_size=4, num_classes=12, num_frames=16, **settings
    )


def phases_of(arm, share, size):
    """[(num_frames, last step, clips per step)] of a run, and its FLOPs; those of --mix are their expectation."""
    config = config_of(size)
    compute = share * size.steps * TOKENS // math.prod(config.grid(16)) * config.training_flops(16)
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
    "--model", "EqM-Ti/2", "--image-size", 16, "--temporal-patch-size", 4, "--vae", "none", "--no-flip",
    "--num-workers", 0, "--precision", "bf16", "--optimizer", "muon", "--lr", 2e-3, "--muon-lr", 0.01,
    "--weight-decay", 0.1, "--warmup-steps", 20, "--lr-decay", 0.4, "--ema-decay", 0.99, "--gamma-shift", 3,
]  # fmt: skip


def recipe_flags(job, size):
    """The flags of train.py that determine a run, without the paths."""
    arm, (phases, _) = job.arm, phases_of(job.arm, job.share, size)
    flags = ["--video", *BASE, "--depth", size.depth, "--hidden-size", size.width, "--num-heads", size.heads]
    flags += ["--global-seed", job.seed]
    if len(phases) == 1:
        num_frames, last_step, batch_size = phases[0]
        flags += ["--num-frames", num_frames, "--max-steps", last_step, "--global-batch-size", batch_size]
    else:
        flags += ["--frames-schedule", ",".join(f"{a}:{b}:{c}" for a, b, c in phases), "--mix", arm.mix]
    flags += arm.flags.split()
    period = max(1, phases[-1][1] // VALIDATIONS)
    flags += ["--val-frames", 16, "--val-clips", size.val_clips, "--val-every", period]
    return [str(flag) for flag in flags]


def sampling_flags(size):
    """How the study samples: flags of sample_gd.py and evaluate.py."""
    flags = ["--sampler", "ngd", "--num-sampling-steps", size.points, "--cfg-scale", GUIDANCE]
    return [*flags, "--stepsize", f"{PATH_LENGTH / (size.points - 1):.4g}", "--precision", "bf16"]


def run_flops(job, size):
    """About the FLOPs of a run with its validations, each with the EMA and with the raw weights."""
    validation = config_of(size).flops(16) * 2 * size.val_clips
    return phases_of(job.arm, job.share, size)[1] + VALIDATIONS * validation


def sampling_flops(num_frames, size):
    """FLOPs of sampling the clips of a row, with guidance."""
    return float(size.clips * (size.points - 1) * 2 * config_of(size).flops(num_frames))


def fingerprint(job, size):
    """A hash of all that determines the rows of a job."""
    about = [recipe_flags(job, size), size.videos, size.clips, size.points, PATH_LENGTH, GUIDANCE]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]


# ----------------------------------------------------------------------------------------------------------------------
# The csv

SCORES = {  # column: its name in the summary of scoring/motion.py
    "direction": "direction_accuracy", "shape": "shape_accuracy", "speed": "speed_ratio", "area": "area_ratio",
}  # fmt: skip
COLUMNS = [
    "version", "recipe", "arm", "seed", "share", "kind", "step", "frames", "loss", "loss_rel", "loss_16", "train_loss",
    "clips", "right", *SCORES, "real_direction", "seam", "drift", "flops", "seconds", "compiled", "code", "machine",
]  # fmt: skip
TEXTS = {"recipe", "arm", "kind", "code", "machine"}
WHOLE = {"version", "seed", "step", "frames", "clips", "right", "compiled"}


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
    return Job(BY_NAME[row["arm"]], row["seed"], row["share"])


def job_key(row):
    return row["arm"], row["seed"], row["share"]


def row_key(row):
    return *job_key(row), row["kind"], row["step"], row["frames"]


def last_rows(rows):
    """The row of the last step of each run and all rows of samples; their seconds add up to the time spent."""
    last = {}
    for row in rows:
        if row["kind"] == "train" and row["seconds"] is not None:
            key = job_key(row)
            last[key] = max(row, last.get(key, row), key=lambda train_row: train_row["step"])
    return [*last.values(), *(row for row in rows if row["kind"] == "sample")]
