"""Does a frame curriculum with rotary positions pay? Equal compute, several seeds, Moving Shapes with a known truth.

    python scripts/study.py --list                  what is done, what is missing, hours
    python scripts/study.py --minutes 140           go on, start no run that would not fit (all: 8 hours on 2 cores)
    python scripts/study.py --only A B              some questions (A to E), or arms by their names
    python scripts/study.py --report                tables and figures again, from the csv alone

A: rotary or fixed positions. B: 4, 8, then 16 frames, or 16 from the start, at equal compute. C: other numbers of
frames than were trained. D: does the motion follow the time between frames? E: one factor at a time. F: UCF-101, on
paper.

An arm is a recipe; a run is an arm with a seed, a learning rate and a share of the compute. All runs of a share have
the same counted FLOPs, so phases have the steps that follow from EqMConfig.training_flops, and each decays its
learning rate to zero by its own end: a run of 60% is one of its own, not the middle of a longer one. The rate of an arm
is tuned first, on the same three factors and another seed, with runs of 30%. Interrupted anywhere, the same command
goes on: what results/study.csv holds is done; run folders, in results/study, are needed only for an interrupted run.
The command may run several times at once, each with its own runs: two with OMP_NUM_THREADS=1 do on 2 cores 1.6 times
what one with two threads does.
"""

import csv
import fcntl
import hashlib
import io
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

# Threads that wait sleep instead of spinning, here and in what is started from here: beside other work on the machine a
# step of two spinning threads takes many times as long. To be said before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import matplotlib
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "EqM"))
import consistency
import distributed
import evaluate
import manifest
import motion
import sources
from distributed import POSITIVE, ArgumentParser, UserError, check_writable, fail, say
from metrics import read_metrics
from models import model_config
from rope import ROPE_SCALES
from whole_file import whole_file

matplotlib.use("Agg")  # no window, no display
from matplotlib import pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
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
    time_scales: tuple = (None,)  # sampled, seconds per frame; None = as trained
    looks: int = 12  # validations along a run of all the compute

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
        Arm("4-8-16 short", "B", phases=((4, 0.05), (8, 0.2), (16, 0.75)), shares=BOTH),
        Arm("4-8-16 long", "B", phases=((4, 0.43), (8, 0.43), (16, 0.14)), shares=BOTH),  # as UCF-101's in the README
        Arm("8-16", "B", phases=SKIP, shares=BOTH),
    ],
    [
        Arm("4", "CE", phases=((4, 1.0),), frames=LENGTHS, scaled=(8, 16)),
        Arm("8", "CE", phases=((8, 1.0),), frames=LENGTHS, scaled=(16, 32)),
        Arm("4-8-16 rewarmup", "B", "--rewarmup 20", phases=EVEN, rate="4-8-16 even", seeds=2, looks=200),
        Arm("4-8-16 mix", "B", phases=EVEN, mix=0.2, rate="4-8-16 even", seeds=2, looks=200),
        Arm("intervals 1-3", "D", "--frame-interval 1 3", ((8, 1.0),), rate="8", time_scales=(0.04, 0.06, 0.08, 0.12)),
    ],
    [
        Arm("patch 2: 16", "BE", patch=2),
        Arm("patch 2: 4-8-16", "B", phases=EVEN, patch=2),
        Arm("patch 2: 8-16", "B", phases=SKIP, patch=2, rate="patch 2: 4-8-16"),
        Arm("patch 1: 16", "BE", patch=1),
        Arm("patch 1: 4-8-16", "B", phases=EVEN, patch=1),
        Arm("patch 1: 8-16", "B", phases=SKIP, patch=1, rate="patch 1: 4-8-16"),
    ],
    [
        Arm("theta 1000", "E", "--rope-theta 1000", rate="16", seeds=2),
        Arm("theta 10000", "E", "--rope-theta 10000", rate="16", seeds=2),
        Arm("split 16,8,8", "E", "--rope-split 16,8,8", rate="16", seeds=2),
        Arm("split 4,14,14", "E", "--rope-split 4,14,14", rate="16", seeds=2),
        Arm("QK norm", "E", "--qk-norm", rate="16", seeds=2),
        Arm("AdamW", "E", "--optimizer adamw", seeds=2),
        *(
            Arm(f"{frames} frames, gamma shift {shift}", "E", f"--gamma-shift {shift}", ((frames, 1.0),),
                rate=str(frames), seeds=1)
            for frames in (16, 8, 4) for shift in (1, 2, 5)
        ),
    ],
]  # fmt: skip
BY_NAME = {arm.name: arm for block in ARMS for arm in block}
SCHEDULES = "16", "8-16", "4-8-16 short", "4-8-16 even", "4-8-16 long"
BUMPS = "4-8-16 even", "4-8-16 rewarmup", "4-8-16 mix"


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
        return 3 if self.tunes else self.arm.looks if self.share == 1 else 12

    def cells(self, size):
        """What is sampled: (frames, seconds per frame, --rope-scale)."""
        if self.tunes:
            return []
        arm, lengths = self.arm, {self.arm.last_frames}
        if self.share == 1:
            lengths |= set(arm.frames) & set(size.lengths)
        cells = [(frames, scale, "none") for frames in sorted(lengths) for scale in arm.time_scales]
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
    with whole_file(path) as file:
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


# ----------------------------------------------------------------------------------------------------------------------
# What there is and what is missing


class Study:
    """Where everything lies, what is known, and what is to be done."""

    def __init__(self, args):
        self.size = MINIATURE if args.miniature else FULL
        self.out, self.folder, self.csv = Path(args.out), Path(args.out, "study"), Path(args.out, "study.csv")
        self.data = Path(args.data_path or self.folder / "moving-shapes")
        self.names = choose_arms(args.only)
        self.rows = read_rows(self.csv)
        check_rows(self.csv, self.rows, self.size)
        self.check_folder()

    def check_folder(self):
        """Raise UserError if the run folders are of another version."""
        about, mine = self.folder / "study.json", {"version": VERSION, "size": self.size.name}
        try:
            found = json.loads(about.read_text())
        except FileNotFoundError:
            found = mine
        except (OSError, ValueError) as error:
            raise UserError(f"{about}: damaged ({error}): move {self.folder} away") from error
        if found != mine:
            raise UserError(f"{self.folder}: is of {found}, this is {mine}: move it away, or take another --out")

    def place(self, job):
        """The folder of a run; that of another recipe has another name."""
        return self.folder / f"{job.name}-{fingerprint(job, self.size)}"

    def add(self, job, rows):
        """Put rows of a job into the csv, in place of those which it had of the same."""
        common = {"version": VERSION, "recipe": fingerprint(job, self.size), "code": self.code, "machine": self.machine}
        common |= {"arm": job.arm.name, "seed": job.seed, "factor": job.factor, "share": job.share}
        rows = [dict.fromkeys(COLUMNS) | common | row for row in rows]
        taken = {row_key(row) for row in rows}
        with held(self.folder / "lock"):
            self.rows = [row for row in read_rows(self.csv) if row_key(row) not in taken] + rows
            write_rows(self.csv, self.rows)

    @cached_property
    def code(self):
        return manifest.code_commit() or ""

    @cached_property
    def machine(self):
        return machine_name()

    def train_rows(self, job):
        return [row for row in self.rows if job_key(row) == job.key and row["kind"] == "train"]

    def is_trained(self, job):
        """Whether the csv holds the last step of a run, or that it diverged."""
        last_step = phases_of(job.arm, job.share, self.size)[0][-1][1]
        return any(row["step"] == last_step or row["loss"] == math.inf for row in self.train_rows(job))

    def missing_cells(self, job):
        """What is not yet sampled from a run; of one that diverged, nothing is."""
        if any(row["loss"] == math.inf for row in self.train_rows(job)):
            return []
        own = [row for row in self.rows if row["kind"] == "sample" and job_key(row) == job.key]
        found = {(row["frames"], row["time_scale"], row["rope_scale"]) for row in own}
        return [cell for cell in job.cells(self.size) if cell not in found]

    def is_done(self, job):
        return job.factor is not None and self.is_trained(job) and not self.missing_cells(job)

    def factor(self, name):
        """The factor of the learning rates that tuning has found for an arm, None as long as it is not done."""
        if len(self.size.factors) == 1:
            return self.size.factors[0]
        losses = self.tuning(name)
        return min(losses, key=losses.get) if losses.keys() == set(self.size.factors) else None

    def tuning(self, name):
        """{factor: validation loss at the frames trained last} of the tuning runs that are done."""
        found = {}
        for factor in self.size.factors:
            job = Job(BY_NAME[name], TUNE_SEED, factor, TUNE_SHARE)
            if self.is_trained(job):
                found[factor] = self.train_rows(job)[-1]["loss"]
        return found

    def jobs(self):
        """All jobs of the chosen arms, in the order in which they run; those that wait for tuning without a factor."""
        jobs = []
        for block in ARMS:
            arms = [arm for arm in block if arm.name in self.names]
            if len(self.size.factors) > 1:
                tuned = [BY_NAME[name] for name in dict.fromkeys(arm.tuned_as for arm in arms)]
                jobs += [Job(arm, TUNE_SEED, factor, TUNE_SHARE) for arm in tuned for factor in self.size.factors]
            for seed in range(self.size.most_seeds):
                some = [arm for arm in arms if seed < arm.seeds]
                jobs += [Job(arm, seed, self.factor(arm.tuned_as), share) for arm in some for share in arm.shares]
        return list({job.key: job for job in jobs}.values())

    def estimate(self, job):
        """Seconds that what is missing of a job will take, from the rows of this machine, else from a first guess."""
        seconds = 0.0
        if job.factor is None or not self.is_trained(job):
            seconds += START + training_work(job, self.size) * self.training_pace(job.arm.name)
        for frames, _, _ in job.cells(self.size) if job.factor is None else self.missing_cells(job):
            flops = sampling_flops(job.arm, frames, self.size)
            seconds += LOOK * self.size.clips * frames + flops * self.sampling_pace
        return seconds

    def training_pace(self, name):
        """Seconds per FLOP of runs: the median of the arm's on this machine, else of all, else a guess."""
        rows = [row for row in last_rows(self.rows) if row["kind"] == "train" and row["machine"] == self.machine]
        paces = [row["seconds"] / training_work(job_of(row), self.size) for row in rows]
        own = [pace for pace, row in zip(paces, rows, strict=True) if row["arm"] == name]
        return float(np.median(own or paces or [PACE]))

    @property
    def sampling_pace(self):
        rows = [row for row in self.rows if row["kind"] == "sample" and row["machine"] == self.machine]
        return float(np.median([row["seconds"] / row["flops"] for row in rows] or [PACE]))


START, LOOK, PACE = 8.0, 5e-4, 7e-12  # s per run; s per frame that is tracked; s per FLOP on 2 cores (AVX-512, bf16)


@contextmanager
def held(path, wait=True):
    """Hold a lock file against other processes, which end with it if they die. Yields whether it is held."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def choose_arms(words):
    """The names of the arms of some questions or of that name; raises UserError."""
    chosen = set()
    for word in words or QUESTIONS:
        if word in BY_NAME:
            chosen.add(word)
        elif word in tuple(QUESTIONS):
            chosen |= {name for name, arm in BY_NAME.items() if word in arm.questions}
        else:
            known = ", ".join(repr(name) for name in BY_NAME)
            raise UserError(f"--only {word}: wanted questions ({', '.join(QUESTIONS)}) or arms ({known})")
    return chosen


def job_of(row):
    return Job(BY_NAME[row["arm"]], row["seed"], row["factor"], row["share"])


def job_key(row):
    return row["arm"], row["seed"], row["factor"], row["share"]


def row_key(row):
    return *job_key(row), row["kind"], row["step"], row["frames"], row["time_scale"], row["rope_scale"]


def machine_name():
    """What the seconds depend on: the processor or GPU, and the threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []:
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
    return f"{name}, {torch.get_num_threads()} threads"


# ----------------------------------------------------------------------------------------------------------------------
# A run


def make_data(study):
    """Moving Shapes; 1.4 s long, so that the shapes of 32 frames stay in the picture."""
    flags = ["--out", study.data, "--videos-per-class", study.size.videos, "--seconds", 1.4]
    with held(study.folder / "lock"):
        run_script(["datasets/make_moving_shapes.py", *flags])


def run_script(words, log=None):
    """Run a script of the repository to its end, which has to be a good one; it ends with this process.

    Returns what it printed where that goes to a log. Raises UserError.
    """
    command = [sys.executable, *(str(word) for word in (ROOT / words[0], *words[1:]))]
    with open(log or os.devnull, "a+") as file:
        began = file.tell()
        process = subprocess.Popen(command, stdout=file, stderr=file if log else None, preexec_fn=end_with_parent)
        try:
            status = process.wait()
        except KeyboardInterrupt:  # which train.py has seen as well: it saves
            process.wait()
            raise
        file.seek(began)
        printed = file.read() if log else ""
    if status and "is not finite" not in printed:
        where = f"; {log} says why" if log else ""
        raise UserError(f"{words[0]} ended with status {status}{where}")
    return printed


def end_with_parent():
    distributed.die_with_parent(signal.SIGTERM)  # upon which train.py saves


def train(study, job):
    """Train, or go on, up to the end; into the csv go the validations. Returns whether it came to its end."""
    folder = study.place(job)
    folder.mkdir(parents=True, exist_ok=True)
    paths = ["--data-path", study.data, "--results-dir", folder, "--resume"]
    last_step = phases_of(job.arm, job.share, study.size)[0][-1][1]
    quiet = ["--log-every", last_step, "--sample-every", 0, "--ckpt-every", 250, "--keep-last", 1]
    printed = run_script(["EqM/train.py", *recipe_flags(job, study.size), *paths, *quiet], folder / "train.log")
    (run,) = (path.parent for path in folder.glob("*/metrics.jsonl"))
    rows = [train_row(row) for row in validations(run / "metrics.jsonl")]
    if "is not finite" in printed:  # diverged
        rows.append({"kind": "train", "step": rows[-1]["step"] + 1 if rows else 1, "loss": math.inf})
    elif not rows or rows[-1]["step"] < last_step:
        return False
    study.add(job, rows)
    return True


def validations(path):
    """Rows of metrics.jsonl with a validation, val_seconds added up so far."""
    found, spent = [], 0.0
    for row in read_metrics(path)[0] if path.exists() else []:
        if row.get("val_loss") is not None:
            spent += row["val_seconds"]
            found.append(row | {"val_seconds": spent})
    return found


def train_row(row):
    """A row of the csv of one of metrics.jsonl."""
    names = {"loss": "val_loss", "loss_rel": "val_loss_rel", "loss_raw": "val_loss_raw", "frames": "num_frames"}
    names |= {f"loss_{frames}": f"val_loss_f{frames}" for frames in (4, 8, 16)}
    names |= {name: name for name in ("step", "train_loss", "flops", "seconds", "val_seconds")}
    found = {"kind": "train"} | {name: row.get(theirs) for name, theirs in names.items()}
    found[f"loss_{row['num_frames']}"] = row["val_loss"]  # its own frames; apart where it is the only length
    return found


def sampling_flops(arm, frames, size):
    """Of the guided descents of a row's clips."""
    return float(size.clips * (size.points - 1) * 2 * config_of(arm, size).flops(frames))


class Sampler:
    """Samples and scores clips with the code of evaluate.py; remembers what it found in real ones."""

    def __init__(self, study):
        self.study, self.real = study, {}
        self.device = distributed.start()

    def flags(self, job, path, frames, time_scale, rope_scale):
        """Those of evaluate.py, as a namespace."""
        size = self.study.size
        parser = ArgumentParser()
        evaluate.add_sampling_flags(parser)
        words = ["--num-frames", frames, "--num-samples", size.clips, "--seed", job.seed, "--rope-scale", rope_scale]
        words += ["--sampler", "ngd", "--num-sampling-steps", size.points, "--cfg-scale", GUIDANCE]
        words += ["--stepsize", f"{WAY / (size.points - 1):.4g}", "--precision", "bf16"]
        words += ["--time-scale", time_scale] if time_scale else []
        places = {"ckpt": path, "data_path": self.study.data, "batch_size": 16, "num_workers": 0}
        places |= {"num_real": size.clips, "split": "val", "val_fraction": 0.05}
        return Namespace(**vars(parser.parse_args([str(word) for word in words])) | places)

    def row(self, job, path, cell):
        """A row of the csv of a checkpoint, for one of Job.cells."""
        args = self.flags(job, path, *cell)
        began = time.monotonic()
        made = sources.FromCheckpoint(args)
        made.prepare(self.device)
        look, scores, _ = self.look(sources.generated_stream(args, made))
        seconds = time.monotonic() - began
        if cell[:2] not in self.real:
            clips, _, _ = sources.find_real(args, made)
            self.real[cell[:2]] = self.look(sources.real_stream(args, clips, self.device, []))
        real_look, real_scores, _ = self.real[cell[:2]]
        drift = consistency.summarize(look, real_look, made.patch)
        row = {"kind": "sample", "step": made.source.step, "frames": cell[0], "time_scale": cell[1]}
        row |= {"rope_scale": cell[2], "clips": scores["clips"], "right": scores["right"]}
        names = dict(zip(SCORES, ("direction_accuracy", "shape_accuracy", "speed_ratio", "area_ratio"), strict=True))
        for name, theirs in names.items():
            ends = scores[f"{theirs.removesuffix('_accuracy')}_interval95"] or (None, None)
            row |= {name: scores[theirs], f"{name}_low": ends[0], f"{name}_high": ends[1]}
        ends = drift["seam_score_interval95"] or (None, None)
        row |= {"seam": drift["seam_score"], "seam_low": ends[0], "seam_high": ends[1]}
        row |= {"change": drift["change_ratio"], "drift": drift["largest_drift"]}
        row |= {"true_speed": scores["true_speed"], "real_direction": real_scores["direction_accuracy"]}
        return row | {"flops": sampling_flops(job.arm, cell[0], self.study.size), "seconds": seconds}

    def look(self, stream):
        """((statistics, changes) of consistency.py, the summary of motion.py, clips) of a stream of sources.py."""
        tracks, truths, found = [], [], []
        for _, clips, names, scales in stream:
            for clip, name, scale in zip(clips.cpu(), names, scales, strict=True):
                tracks.append(motion.track(clip.numpy()))
                truths.append(motion.truths(self.study.data / "shapes.json", name, clip.shape[1], scale))
                found.append(consistency.measure(clip))
        summary = motion.summarize(tracks, truths) | {"true_speed": float(np.mean([true.speed for true in truths]))}
        return [torch.stack(column) for column in zip(*found, strict=True)], summary, len(tracks)


def do(study, job, sampler):
    """Run what is missing of a job. Returns whether it came to its end."""
    folder = study.place(job)
    (latest,) = list(folder.glob("*/checkpoints/latest.pt")) or [None]
    if not study.is_trained(job) or (study.missing_cells(job) and latest is None):
        if not train(study, job):
            return False
        (latest,) = list(folder.glob("*/checkpoints/latest.pt")) or [None]
    for cell in study.missing_cells(job):
        study.add(job, [sampler.row(job, latest, cell)])
    for path in folder.glob("*/checkpoints/*.pt"):
        if job.tunes or job.seed or path.name != "latest.pt":
            path.unlink()
    return True


def go_on(study, minutes):
    """Job after job until all is done or nothing more fits; what another process has at hand is left to it."""
    make_folders(study)
    sampler, began = None, time.monotonic()
    while missing := [job for job in study.jobs() if not study.is_done(job)]:
        left = math.inf if minutes is None else max(0, 60 * minutes - (time.monotonic() - began))
        with claimed(study, missing) as job:
            needs = study.estimate(job) if job else 0
            if needs >= left:
                what = f"{job.name} takes about {needs / 60:.1f} min" if job else "others are at work"
                say(f"{what}, {left / 60:.1f} are left: run again to go on")
                return
            if job:
                say(f"{len(missing)} runs to do; {job.name}, about {needs / 60:.1f} min")
                if sampler is None:
                    make_data(study)
                    sampler = Sampler(study)
                if not do(study, job, sampler):
                    say(f"stopped in {job.name}: run again to go on")
                    return
        if not job:
            time.sleep(WAIT)
        study.rows = read_rows(study.csv)
    say("all is done")


WAIT = 2.0  # s


@contextmanager
def claimed(study, jobs):
    """Hold the first job that no other process has at hand. Yields it, or None if all are, or wait for their tuning."""
    for job in jobs:
        if job.factor is not None:
            study.place(job).mkdir(parents=True, exist_ok=True)
            with held(study.place(job) / "lock", wait=False) as mine:
                study.rows = read_rows(study.csv)
                if mine and not study.is_done(job):
                    yield job
                    return
    yield None


def make_folders(study):
    study.folder.mkdir(parents=True, exist_ok=True)
    about = study.folder / "study.json"
    with held(study.folder / "lock"), whole_file(about) as file:
        file.write((json.dumps({"version": VERSION, "size": study.size.name}) + "\n").encode())


def tell(study):
    """What is done and what is missing, an arm a line."""
    jobs, hours = study.jobs(), 0.0
    say(f"{'arm':<28} {'questions':<9} {'runs done':>9} {'hours left':>10}")
    for name in dict.fromkeys(job.arm.name for job in jobs):
        own = [job for job in jobs if job.arm.name == name]
        left = [job for job in own if not study.is_done(job)]
        seconds = sum(map(study.estimate, left))
        hours += seconds / 3600
        say(f"{name:<28} {own[0].arm.questions:<9} {len(own) - len(left):>4} / {len(own):<2} {seconds / 3600:>10.2f}")
    say(f"{len(jobs)} runs, {hours:.1f} hours left")


# ----------------------------------------------------------------------------------------------------------------------
# From rows to numbers

T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # 97.5% quantiles of Student's t, by the number of values


def finals(rows, name, share=1.0):
    """{seed: the row of the last step} of an arm's runs, the tuning ones apart."""
    wanted = {"arm": name, "share": share, "kind": "train"}
    own = [row for row in rows if wanted.items() <= row.items() and row["seed"] != TUNE_SEED]
    return {row["seed"]: row for row in sorted(own, key=lambda row: row["step"])}


def samples(rows, name, frames, share=1.0, time_scale=None, rope_scale="none"):
    """{seed: the row of the samples} of an arm's runs."""
    wanted = {"arm": name, "kind": "sample", "frames": frames, "share": share}
    wanted |= {"time_scale": time_scale, "rope_scale": rope_scale}
    return {row["seed"]: row for row in rows if wanted.items() <= row.items()}


def column(by_seed, name):
    """{seed: value} where there is one."""
    return {seed: row[name] for seed, row in sorted(by_seed.items()) if row[name] is not None}


def half_width(values):
    """Of the 95% interval of their mean (Student's t); None below two values."""
    _, error = motion.mean_and_error(values)
    return None if error is None else T95.get(len(values), 2.57) * error


def pooled(by_seed):
    """(share of clips with the right direction over all seeds, its Wilson interval, clips), or None without clips."""
    clips = sum(row["clips"] for row in by_seed.values())
    right = sum(row["right"] for row in by_seed.values())
    return (right / clips, motion.wilson(right, clips), clips) if clips else None


def compare(first, second, what, values, others):
    """A sentence about the paired difference of {seed: value} of two arms."""
    seeds = sorted(values.keys() & others.keys())
    if not seeds:
        return f"{what}, {first} against {second}: not run yet."
    gaps = [values[seed] - others[seed] for seed in seeds]
    mean, half = float(np.mean(gaps)), half_width(gaps)
    if half is None:
        return f"{what}: {first} minus {second} is {mean:+.3f} (one seed, so no interval)."
    verdict = "the interval holds 0: not told apart" if abs(mean) <= half else "higher" if mean > 0 else "lower"
    ends = f"95% {mean - half:+.3f} to {mean + half:+.3f}"
    return f"{what}: {first} minus {second} is {mean:+.3f} ({ends}, {len(seeds)} seeds): {verdict}."


def mean_cell(values, digits=3):
    """Mean and standard error of {seed: value}, and how many."""
    mean, error = motion.mean_and_error(list(values.values()))
    if mean is None:
        return "not run"
    spread = "" if error is None else f" ± {error:.{digits}f}"
    return f"{mean:.{digits}f}{spread} ({len(values)})"


def share_cell(by_seed):
    found = pooled(by_seed)
    if found is None:
        return "not run"
    share, (low, high), clips = found
    return f"{share:.1%} ({100 * low:.1f} - {100 * high:.1f}; {clips} clips)"


def table(titles, rows):
    return [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", *(f"| {' | '.join(row)} |" for row in rows), ""]


def arm_row(rows, name, share, frames):
    """Cells: what a run of an arm has taken, and what came of it at `frames` frames."""
    ends, made = finals(rows, name, share), samples(rows, name, frames, share)
    flops, seconds, looks = (column(ends, key) for key in ("flops", "seconds", "val_seconds"))
    times = {seed: (seconds[seed] - looks[seed]) / 60 for seed in seconds.keys() & looks.keys()}
    spent = f"{np.mean(list(flops.values())) / 1e12:.1f}" if flops else "-"
    cells = [name, f"{share:.0%}", spent, mean_cell(times, 1), mean_cell(column(ends, f"loss_{frames}"))]
    return [*cells, share_cell(made), mean_cell(column(made, "speed"), 2), mean_cell(column(made, "area"), 2)]


ARM_TITLES = ["arm", "compute", "TFLOP", "minutes without validation", "validation loss", "direction right (95%)",
              "speed / true", "area / true"]  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------------
# Figures

COLORS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9"  # Okabe and Ito: for colour-blind eyes, too
MARKERS = "o", "s", "^", "D", "v", "P"
plt.rcParams.update({"font.size": 15, "axes.grid": True, "grid.alpha": 0.3, "lines.linewidth": 2, "savefig.dpi": 80})


def look_of(number):
    return {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 8}


def draw_shares(axes, xs, by_seeds, **look):
    """Direction right in percent over x, with Wilson's interval over all seeds; a dot for each seed. Returns if any."""
    points = [(x, by_seed, pooled(by_seed)) for x, by_seed in zip(xs, by_seeds, strict=True) if by_seed]
    if points:
        shares = np.array([[share, share - low, high - share] for _, _, (share, (low, high), _) in points]).T * 100
        axes.errorbar([x for x, _, _ in points], shares[0], np.clip(shares[1:], 0, None), capsize=4, **look)
        for x, by_seed, _ in points:
            dots = [100 * row["direction"] for row in by_seed.values()]
            axes.scatter([x] * len(dots), dots, color=look["color"], alpha=0.4, s=20)
    return bool(points)


def draw_means(axes, xs, by_seeds, name, **look):
    """Means of a column over x, with the 95% interval of the mean where there are two seeds. Returns if any."""
    points = [(x, list(column(by_seed, name).values())) for x, by_seed in zip(xs, by_seeds, strict=True)]
    points = [(x, values) for x, values in points if values]
    if points:
        means = [np.mean(values) for _, values in points]
        halves = [half_width(values) or 0 for _, values in points]
        axes.errorbar([x for x, _ in points], means, halves, capsize=4, **look)
    return bool(points)


def draw_curve(axes, rows, name, share, number):
    """Validation loss at 16 frames along the runs of an arm, a thin line a seed."""
    for seed in finals(rows, name, share):
        wanted = {"arm": name, "share": share, "seed": seed, "kind": "train"}
        run = sorted((row for row in rows if wanted.items() <= row.items()), key=lambda row: row["step"])
        run = [row for row in run if row["loss_16"] is not None and row["loss_16"] < math.inf]
        places = [row["flops"] / 1e12 for row in run]
        axes.plot(places, [row["loss_16"] for row in run], color=COLORS[number % len(COLORS)], alpha=0.35, linewidth=1)


def save(study, name, figure, drawn):
    """Write a figure in which something is drawn; returns the line that shows it."""
    path = study.out / "figures" / f"study-{name}.png"
    if drawn:
        for axes in figure.axes:
            handles, labels = axes.get_legend_handles_labels()
            if handles:
                axes.legend(handles, labels, fontsize=12)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    else:
        path.unlink(missing_ok=True)
    plt.close(figure)
    return [f"![{name}](figures/{path.name})", ""] if drawn else []


def draw_compute(study, name, panels):
    """A column of panels {title: arm names}: above the loss at 16 frames, below the direction, over the compute."""
    figure, grid = plt.subplots(2, len(panels), figsize=(1 + 6 * len(panels), 9), layout="constrained", squeeze=False)
    drawn = False
    for (title, names), (top, bottom) in zip(panels.items(), grid.T, strict=True):
        for number, arm in enumerate(names):
            shares = [share for share in BOTH if share in BY_NAME[arm].shares]
            ends = [finals(study.rows, arm, share) for share in shares]
            made = [samples(study.rows, arm, 16, share) for share in shares]
            places = [phases_of(BY_NAME[arm], share, study.size)[1] / 1e12 for share in shares]
            drawn |= draw_means(top, places, ends, "loss_16", label=arm, **look_of(number))
            draw_curve(top, study.rows, arm, 1.0, number)
            drawn |= draw_shares(bottom, places, made, label=arm, **look_of(number))
        top.set(title=title, ylabel="validation loss, 16 frames")
        bottom.set(xlabel="training compute, TFLOP", ylabel="direction right, %", ylim=(-3, 103))
        ends = [loss for arm in names for loss in losses(study, arm).values()]
        if ends:
            top.set_ylim(0.9 * min(ends), 4 * min(ends))  # the first steps are far above
        bottom.axhline(25, color="gray", linestyle=":", label="chance")
        bottom.set_xlim(top.get_xlim())
    return save(study, name, figure, drawn)


# ----------------------------------------------------------------------------------------------------------------------
# The questions: lines of markdown each


def losses(study, name, share=1.0, frames=16):
    return column(finals(study.rows, name, share), f"loss_{frames}")


def directions(study, name, share=1.0, frames=16):
    return column(samples(study.rows, name, frames, share), "direction")


def answer_a(study):
    names = "16", "fixed-16"
    found = {"Validation loss at 16 frames": losses, "Share of right directions": directions}
    lines = [
        "- " + compare("rotary", "fixed", what, *(values(study, name) for name in names))
        for what, values in found.items()
    ]
    lines.append("")
    lines += table(ARM_TITLES, [arm_row(study.rows, name, 1.0, 16) for name in names])
    return lines + draw_compute(study, "A", {"rotary (16) and fixed positions": names})


def answer_b(study):
    lines = []
    for patch, base in ((4, "16"), (2, "patch 2: 16"), (1, "patch 1: 16")):
        for name in [arm.name for arm in BY_NAME.values() if "B" in arm.questions and arm.patch == patch]:
            if name == base:
                continue
            lines.append(compare(name, base, "Loss at 16 frames", losses(study, name), losses(study, base)))
            lines.append(compare(name, base, "Directions right", directions(study, name), directions(study, base)))
            if 0.6 in BY_NAME[name].shares:
                lines += [reaches(study, name, base)]
        even, skip = ("4-8-16 even", "8-16") if patch == 4 else (f"patch {patch}: 4-8-16", f"patch {patch}: 8-16")
        what = f"What the 4-frame phase is worth at temporal patch {patch}, loss"
        lines += [compare(even, skip, what, losses(study, even), losses(study, skip)), ""]
    arms = [arm for arm in BY_NAME.values() if "B" in arm.questions]
    lines = ["- " + line if line else "" for line in lines]
    lines += table(ARM_TITLES, [arm_row(study.rows, arm.name, share, 16) for arm in arms for share in arm.shares])
    panels = {"temporal patch 4": SCHEDULES}
    panels |= {f"temporal patch {n}": [f"patch {n}: {word}" for word in ("16", "8-16", "4-8-16")] for n in (2, 1)}
    return lines + draw_compute(study, "B", panels) + answer_bump(study)


def reaches(study, name, base):
    """The goal: as low a loss with 60% of the compute as 16 frames from the start with all of it."""
    early, whole = losses(study, name, 0.6), losses(study, base)
    line = compare(f"{name} at 60%", f"{base} at 100%", "Goal (at most 0)", early, whole)
    seeds = early.keys() & whole.keys()
    if not seeds:
        return line
    met = np.mean([early[seed] - whole[seed] for seed in seeds]) <= 0
    return f"{line} The goal is {'met' if met else 'missed'} in the mean."


def answer_bump(study):
    """Does the loss rise where the number of frames changes, and for how long?"""
    lines = ["### The bump at a switch", ""]
    lines += ["Validation loss as a share of a zero predictor's, at the frames of the phase: before a switch those of "
              "the phase that ends, after it those of the new one. Gone: the first validation that is no higher than "
              "the one before the switch.", ""]  # fmt: skip
    cells, drawn = [], False
    figure, panels = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained", sharey=True)
    for number, name in enumerate(BUMPS):
        phases, _ = phases_of(BY_NAME[name], 1.0, study.size)
        for axes, (before, after) in zip(panels, zip(phases, phases[1:], strict=False), strict=True):
            found = [bump(study.rows, name, seed, before, after) for seed in finals(study.rows, name)]
            found = [one for one in found if one]
            cells.append([name, f"{before[0]} to {after[0]}", *bump_cells(found)])
            for seed, one in enumerate(found):
                label = name if seed == 0 else None
                early = one["places"] <= 0.2
                axes.plot(100 * one["places"][early], one["ratios"][early], color=COLORS[number], label=label,
                          marker=MARKERS[number], markersize=4, alpha=0.7)  # fmt: skip
            drawn |= bool(found)
            axes.set(title=f"{before[0]} to {after[0]} frames", xlabel="share of the new phase, %", xlim=(-0.5, 20))
            axes.axvline(2, color="gray", linestyle=":")
            axes.axhline(1, color="gray", linestyle="--")
    panels[0].set(ylabel="loss / loss before the switch")
    titles = ["arm", "switch", "highest loss / before", "gone after, share of the phase", "goal of 2%"]
    return lines + table(titles, cells) + save(study, "B-bump", figure, drawn)


def bump(rows, name, seed, before, after):
    """Places in the new phase (shares of it) and loss there over the loss before the switch; None if not known."""
    wanted = {"arm": name, "seed": seed, "share": 1.0, "kind": "train"}
    run = [row for row in rows if wanted.items() <= row.items() and row["loss_rel"] is not None]
    run.sort(key=lambda row: row["step"])
    start, length = before[1], after[1] - before[1]
    old = [row["loss_rel"] for row in run if row["step"] == start]
    new = [row for row in run if start < row["step"] <= after[1]]
    if not (old and new):
        return None
    places = np.array([(row["step"] - start) / length for row in new])
    ratios = np.array([row["loss_rel"] / old[0] for row in new])
    gone = places[ratios <= 1]
    return {"places": places, "ratios": ratios, "gone": gone[0] if len(gone) else math.inf, "highest": ratios.max()}


def bump_cells(found):
    if not found:
        return ["not run"] * 3
    gone = [one["gone"] for one in found]
    shown = ", ".join("never" if share == math.inf else f"{share:.1%}" for share in gone)
    highest = dict(enumerate(one["highest"] for one in found))
    return [mean_cell(highest, 2), shown, f"{sum(share <= 0.02 for share in gone)} of {len(gone)} seeds"]


def answer_c(study):
    names = {"4": 4, "8": 8, "16": 16, "4-8-16 even": 16}
    lines = []
    for name, trained in names.items():
        other = [frames for frames in LENGTHS if frames != trained]
        own, found = pooled(samples(study.rows, name, trained)), {}
        for frames in other:
            found[frames] = pooled(samples(study.rows, name, frames))
        if own is None or not any(found.values()):
            lines.append(f"- Trained last on {trained} frames ({name}): not run yet.")
            continue
        held = [n for n, part in found.items() if part and part[1][1] >= own[1][0]]  # the intervals meet
        lost = [n for n, part in found.items() if part and n not in held]
        lines.append(f"- Trained last on {trained} frames ({name}), {own[0]:.0%} of the directions right there: no "
                     f"worse, within the intervals, at {listed(held)} frames, worse at {listed(lost)}.")  # fmt: skip
    lines += ["", *table(["arm", "sampled frames", "direction right (95%)", "speed / true", "seam score (1 = none)",
                          "largest drift"],
                         [c_row(study, name, frames, "none") for name in names for frames in LENGTHS])]  # fmt: skip
    figure, panels = plt.subplots(1, 2, figsize=(14, 6), layout="constrained")
    drawn = False
    for number, (name, trained) in enumerate(names.items()):
        made = [samples(study.rows, name, frames) for frames in LENGTHS]
        label = f"trained on {trained}" if name.isdecimal() else f"trained on {name}"
        drawn |= draw_shares(panels[0], LENGTHS, made, label=label, **look_of(number))
        draw_means(panels[1], LENGTHS, made, "seam", label=label, **look_of(number))
    panels[0].set(ylabel="direction right, %", ylim=(-3, 103))
    panels[1].set(ylabel="seam score (1 = no seam)")
    for axes in panels:
        axes.set(xlabel="sampled frames", xticks=[4, 8, 12, 16, 24, 32])
    return lines + save(study, "C", figure, drawn) + answer_scale(study)


def listed(numbers):
    return ", ".join(map(str, numbers)) or "none"


def c_row(study, name, frames, method):
    made = samples(study.rows, name, frames, rope_scale=method)
    cells = [mean_cell(column(made, key), 2) for key in ("speed", "seam", "drift")]
    return [name, str(frames) + ("" if method == "none" else f", {method}"), share_cell(made), *cells]


def answer_scale(study):
    """Rotary time positions beyond the trained length."""
    lines, cells, drawn = ["### --rope-scale when sampling", ""], [], False
    figure, panels = plt.subplots(1, 3, figsize=(16, 5.5), layout="constrained", sharey=True)
    for axes, name in zip(panels, ("4", "8", "16"), strict=True):
        lengths = BY_NAME[name].scaled
        for number, method in enumerate(ROPE_SCALES):
            made = [samples(study.rows, name, frames, rope_scale=method) for frames in lengths]
            drawn |= draw_shares(axes, lengths, made, label=method, **look_of(number))
            cells += [c_row(study, name, frames, method) for frames in lengths]
        for frames in lengths:
            lines.append(best_scale(study, name, frames))
        axes.set(title=f"trained on {name} frames", xlabel="sampled frames", xticks=lengths)
    panels[0].set(ylabel="direction right, %", ylim=(-3, 103))
    titles = ["arm", "sampled frames", "direction right (95%)", "speed / true", "seam score", "largest drift"]
    return lines + [""] + table(titles, cells) + save(study, "C-scale", figure, drawn)


def best_scale(study, name, frames):
    """A sentence: does a method beat none, on the seeds that both have?"""
    place = f"- Trained on {name}, sampled at {frames} frames"
    plain = directions(study, name, 1.0, frames)
    found = {}
    for method in ROPE_SCALES[1:]:
        made = samples(study.rows, name, frames, rope_scale=method)
        if seeds := made.keys() & plain.keys():
            none = {seed: samples(study.rows, name, frames)[seed] for seed in seeds}
            found[method] = pooled({seed: made[seed] for seed in seeds}), pooled(none)
    if not found:
        return f"{place}: not run yet."
    best = max(found, key=lambda method: found[method][0][0])
    (share, (low, high), clips), (none, (none_low, none_high), _) = found[best]
    verdict = "the intervals are apart" if low > none_high or high < none_low else "the intervals meet: not told apart"
    return f"{place}: best is {best} with {share:.1%} right, none has {none:.1%} ({clips} clips each): {verdict}."


def answer_d(study):
    arm, lines, cells = BY_NAME["intervals 1-3"], [], []
    figure, axes = plt.subplots(figsize=(8, 6), layout="constrained")
    places, truths, found, halves = [], [], [], []
    for scale in arm.time_scales:
        made = samples(study.rows, arm.name, 8, time_scale=scale)
        speeds = column(made, "speed")
        cells.append([f"{scale:g}", share_cell(made), mean_cell(speeds, 3)])
        if speeds:
            true = next(iter(column(made, "true_speed").values()))
            mean, half = np.mean(list(speeds.values())), half_width(list(speeds.values()))
            places, truths = [*places, scale], [*truths, true]
            found, halves = [*found, mean * true], [*halves, (half or 0) * true]
            held = "within" if abs(mean - 1) <= 0.1 else "not within"
            ends = "" if half is None else f", 95% {mean - half:.3f} to {mean + half:.3f}"
            lines.append(f"- At {scale:g} s per frame the displacement is {mean:.3f} of the true one ({len(speeds)} "
                         f"seeds{ends}): {held} 10%.")  # fmt: skip
        else:
            lines.append(f"- At {scale:g} s per frame: not run yet.")
    axes.plot(places, truths, color="black", linestyle="--", label="true")
    axes.fill_between(places, [0.9 * x for x in truths], [1.1 * x for x in truths], color="gray", alpha=0.2)
    axes.errorbar(places, found, halves, capsize=4, label="generated (95%)", **look_of(0))
    axes.set(xlabel="time scale, seconds per frame", ylabel="displacement, px per frame", ylim=(0, None))
    lines += ["", *table(["seconds per frame", "direction right (95%)", "displacement / true"], cells)]
    return lines + save(study, "D", figure, bool(places))


FACTORS = (
    "theta 1000", "theta 10000", "split 16,8,8", "split 4,14,14", "QK norm", "AdamW", "patch 2: 16", "patch 1: 16",
)  # fmt: skip
SHIFTS = 1, 2, 3, 5


def answer_e(study):
    lines, names = [], ["16", *FACTORS]
    for name in FACTORS:
        lines.append("- " + compare(name, "16", "Loss at 16 frames", losses(study, name), losses(study, "16")))
    for frames in (4, 8, 16):
        lines.append("- " + best_shift(study, frames))
    lines += ["", "The base, 16, has theta 100, channels 10, 10, 10 of a head of 32, temporal patch 4, no QK norm, "
              "Muon, gamma shift 3.", ""]  # fmt: skip
    lines += table(ARM_TITLES, [arm_row(study.rows, name, 1.0, 16) for name in names])
    cells = []
    for frames in (4, 8, 16):
        cells += [[str(frames), str(shift), *arm_row(study.rows, shifted(frames, shift), 1.0, frames)[4:]]
                  for shift in SHIFTS]  # fmt: skip
    lines += table(["frames", "gamma shift", *ARM_TITLES[4:]], cells)
    figure, panels = plt.subplots(1, 2, figsize=(15, 6.5), layout="constrained")
    drawn = False
    for place, name in enumerate(FACTORS):
        own, base = losses(study, name), losses(study, "16")
        gaps = {seed: {"gap": own[seed] - base[seed]} for seed in own.keys() & base.keys()}
        values = [row["gap"] for row in gaps.values()]
        if values:
            panels[0].errorbar(np.mean(values), place, xerr=half_width(values) or 0, capsize=4, **look_of(0))
            panels[0].scatter(values, [place] * len(values), color="black", s=20, zorder=3)
            drawn = True
    panels[0].set_yticks(range(len(FACTORS)), FACTORS)
    panels[0].axvline(0, color="gray", linestyle="--")
    panels[0].set(xlabel='validation loss minus that of "16" (95%)')
    for number, frames in enumerate((4, 8, 16)):
        made = [samples(study.rows, shifted(frames, shift), frames) for shift in SHIFTS]
        drawn |= draw_shares(panels[1], SHIFTS, made, label=f"{frames} frames", **look_of(number))
    panels[1].set(xlabel="gamma shift", ylabel="direction right, %", xticks=SHIFTS, ylim=(-3, 103))
    return lines + save(study, "E", figure, drawn)


def shifted(frames, shift):
    return str(frames) if shift == 3 else f"{frames} frames, gamma shift {shift}"


def best_shift(study, frames):
    found = {shift: pooled(samples(study.rows, shifted(frames, shift), frames)) for shift in SHIFTS}
    found = {shift: part for shift, part in found.items() if part}
    if len(found) < len(SHIFTS):
        return f"Gamma shift at {frames} frames: not run yet ({len(found)} of {len(SHIFTS)})."
    best = max(found, key=lambda shift: found[shift][0])
    alike = [shift for shift in found if shift != best and found[shift][1][1] >= found[best][1][0]]
    return (f"Gamma shift at {frames} frames: most directions are right with {best} ({found[best][0]:.1%}); within the "
            f"intervals as good: {listed(alike)}.")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# UCF-101, on paper

UCF_CLIPS = 9537  # videos of the first training list
PEAK, UTILISATIONS = 989e12, (0.2, 0.4)  # FLOP/s of an H100 in bf16, dense; shares of it that training reaches
UCF_PHASES = ((4, 50_000, 256), (8, 50_000, 128), (16, 100 * UCF_CLIPS // 64, 64))  # frames, steps, clips


def answer_f(study):
    """Counted FLOPs of the README's schedule, and what they take on 8 GPUs."""
    settings = {"input_size": 32, "in_channels": 4, "num_classes": 101, "use_rope": True}
    cells, hours_at = [], [f"hours (GPU hours) at {share:.0%}" for share in UTILISATIONS]
    for model in ("EqM-S/4", "EqM-B/2", "EqM-XL/2"):
        config = model_config(model, num_frames=16, **settings)
        spent = [steps * clips * config.training_flops(frames) for frames, steps, clips in UCF_PHASES]
        alone = sum(spent) / (64 * config.training_flops(16))
        hours = [sum(spent) / (8 * PEAK * share) / 3600 for share in UTILISATIONS]
        split = " / ".join(f"{part / sum(spent):.0%}" for part in spent)
        cells.append([model, f"{sum(spent) / 1e18:.2f}", split, *(f"{hour:.2g} ({8 * hour:.2g})" for hour in hours),
                      f"{alone:,.0f}"])  # fmt: skip
    schedule, last = [], 0
    for frames, steps, clips in UCF_PHASES:
        last += steps
        schedule.append(f"{frames}:{last}:{clips}")
    lines = [f"Latents of 32 x 32, the README's phases of 50,000 steps and 100 epochs of {UCF_CLIPS:,} clips; 8 GPUs "
             f"of {PEAK / 1e12:.0f} TFLOP/s (H100, bf16, dense). Not run: hours follow from the counted FLOPs and the "
             "utilisation alone.", "",
             *table(["model", "EFLOP", "4 / 8 / 16 frames", *hours_at,
                     "steps of 64 clips of 16 frames for the same"], cells),
             "```bash", 'torchrun --nproc_per_node=8 EqM/train.py --video --use-rope --model "EqM-S/4" \\',
             "  --data-path datasets/ucf-101-latents --results-dir results/ucf --precision bf16 --resume \\",
             f"  --frames-schedule {','.join(schedule)}", "```", ""]  # fmt: skip
    for name in ("4-8-16 even", "4-8-16 long"):
        lines.append(f"- On Moving Shapes: {reaches(study, name, '16')}")
        lines.append(f"- {pace_of(study.rows, name)}")
    lines.append("- Nothing here says that a result on Moving Shapes carries over to UCF-101.")
    return [*lines, ""]


def pace_of(rows, name):
    """A sentence: seconds per FLOP of an arm over those of 16 frames from the start, on one machine."""
    ratios = {}
    for seed, row in finals(rows, name).items():
        other = finals(rows, "16").get(seed)
        if other and None not in (row["seconds"], other["seconds"]) and row["machine"] == other["machine"]:
            paces = [(one["seconds"] - one["val_seconds"]) / one["flops"] for one in (row, other)]
            ratios[seed] = paces[0] / paces[1]
    return f"Seconds per counted FLOP, {name} / 16: {mean_cell(ratios, 2)}."


# ----------------------------------------------------------------------------------------------------------------------
# The report

ANSWERS = {
    "A": ("Rotary or fixed positions, 16 frames, equal steps", answer_a),
    "B": ("4, 8, then 16 frames, or 16 from the start, at equal compute", answer_b),
    "C": ("Trained at 4, 8, 16 frames, sampled at 4 to 32", answer_c),
    "D": ("Does the displacement per frame follow the time scale?", answer_d),
    "E": ("One factor at a time", answer_e),
    "F": ("What it would take on UCF-101, on paper", answer_f),
}


def report(study):
    """Write the tables and figures from the rows."""
    spent = sum(row["seconds"] for row in last_rows(study.rows)) / 3600
    versions, machines = ({row[name] or "unknown" for row in study.rows} for name in ("code", "machine"))
    lines = ["# Does a frame curriculum with rotary positions pay?", "",
             f"Written by `python scripts/study.py --report` from `study.csv` ({len(study.rows)} rows, version "
             f"{VERSION}, size {study.size.name}), which `python scripts/study.py` measures. {spent:.1f} hours of "
             f"training and sampling so far, on {listed(sorted(machines))}; code "
             f"{listed(sorted(v[:10] for v in versions))}.", "",
             *about(study), *tuning_lines(study)]  # fmt: skip
    for letter, (title, answer) in ANSWERS.items():
        command = f"`python scripts/study.py --only {letter}`" if letter in QUESTIONS else "No run."
        lines += [f"## {letter}. {title}", "", command, "", *answer(study)]
    path = study.out / "study.md"
    with whole_file(path) as file:
        file.write("\n".join(lines).encode())
    say(f"{path}; figures in {study.out / 'figures'}")


def last_rows(rows):
    """Of each run the row of its last step, and all rows of samples: their seconds add up to all that were spent."""
    last = {}
    for row in rows:
        if row["kind"] == "train" and row["seconds"] is not None:
            key = job_key(row)
            last[key] = max(row, last.get(key, row), key=lambda one: one["step"])
    return [*last.values(), *(row for row in rows if row["kind"] == "sample")]


def about(study):
    """What all arms share."""
    size = study.size
    flops = phases_of(BY_NAME["16"], 1.0, size)[1] / 1e12
    return [
        f"Moving Shapes, 16 x 16 px, 1.4 s; depth {size.depth}, width {size.width}, {size.heads} heads, spatial patch "
        f"2; {TOKENS} tokens a step for every arm. 100% compute is {flops:.3g} TFLOP: {size.steps} steps of 8 clips of "
        f"16 frames at temporal patch 4. Runs of 60% decay their learning rate by their own end. Samples: {size.clips} "
        f"clips a run, `ngd`, {size.points - 1} evaluations, guidance {GUIDANCE:g}, averaged weights of the last step. "
        "A share of directions is over the clips of all seeds, with Wilson's 95% interval, which takes clips for "
        "independent; other numbers are mean ± standard error over seeds, in brackets how many; differences are paired "
        "by seed, with Student's 95% interval. Chance is 25% for a direction; real clips have "
        f"{share_text(study.rows)} right.",
        "",
    ]


def share_text(rows):
    values = [row["real_direction"] for row in rows if row["real_direction"] is not None]
    return f"{min(values):.1%} or more" if values else "not been looked at yet"


def tuning_lines(study):
    """The learning rates that were tried, and which was taken."""
    if len(study.size.factors) == 1:
        return []
    cells, edges = [], []
    for name in dict.fromkeys(arm.tuned_as for arm in BY_NAME.values()):
        found, taken = study.tuning(name), study.factor(name)
        shown = ["not run" if factor not in found else f"{found[factor]:.4f}" for factor in study.size.factors]
        cells.append([name, *shown, "not run" if taken is None else f"{taken:g}"])
        if taken in (min(study.size.factors), max(study.size.factors)):
            edges.append(name)
    lines = ["## Learning rates", "",
             f"Factors of Muon {MUON_LR:g} and AdamW {LR:g}; one run each of {TUNE_SHARE:.0%} compute, seed "
             f"{TUNE_SEED}; validation loss at the frames trained last. Arms that are not here take the rate of their "
             "base.", "",
             *table(["arm", *(f"x {factor:g}" for factor in study.size.factors), "taken"], cells)]  # fmt: skip
    if edges:
        lines += [f"At the edge of the grid, so a better one may lie outside: {', '.join(edges)}.", ""]
    return lines


# ----------------------------------------------------------------------------------------------------------------------


def parse_args():
    parser = ArgumentParser(description="Does a frame curriculum with rotary positions pay? Runs, tables, figures.")
    add = parser.add_argument
    only = "questions (A to E) or names of arms; none = all. The learning rates that they need are tuned, too"
    add("--only", nargs="+", metavar="WHAT", help=only)
    add("--minutes", type=POSITIVE, metavar="X", help="start no run that would end later; none = all")
    add("--list", action="store_true", help="say what is done, what is missing and how long it takes; off = do it")
    add("--report", action="store_true", help="write tables and figures of the csv, and end; off = after the runs")
    add("--out", default="results", metavar="DIR", help="study.csv, study.md, figures/ and the run folders study/")
    add("--data-path", metavar="DIR", help="Moving Shapes, made where it is missing; none = in --out")
    add("--miniature", action="store_true", help="tiny models and few steps, to try the script; off = the study")
    return parser.parse_args()


def main():
    args = parse_args()
    try:
        if args.list and args.report:
            raise UserError("--list and --report: give one of them")
        if not args.list:
            check_writable("--out", args.out)
        study = Study(args)
        if args.report and not study.rows:
            raise UserError(f"--report: {study.csv} is not there; wanted the csv that the study writes: run it first")
    except UserError as error:
        fail(error)
    try:
        if args.list:
            tell(study)
        elif args.report:
            report(study)
        else:
            go_on(study, args.minutes)
            report(study)
    except (UserError, OSError) as error:
        fail(error, status=1)
    except KeyboardInterrupt:
        fail("interrupted: the same command goes on", status=1)


if __name__ == "__main__":
    main()
