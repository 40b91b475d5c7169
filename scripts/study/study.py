"""What should positions be, and does a frame curriculum pay? Equal compute, several seeds, motion with a known truth.

    python scripts/study/study.py --list                  what is done, what is missing, hours
    python scripts/study/study.py --minutes 150           continue; start no run that would not fit
    python scripts/study/study.py --only A B              some questions (A to C), or arms by name
    python scripts/study/study.py --report                only write tables and figures, from the csv

A: fixed positions, rotary ones, rotary ones beside a table of height and width ("table"), those with --rope-speed
("moving"). B: which curriculum of 4, 8, then 16 frames. C: the compute at which motion becomes right.

An arm is a recipe; a run is an arm with a seed and a share of the compute. All runs of a share have the same counted
FLOPs: the steps of each phase follow from EqMConfig.training_flops. The learning rate decays to zero at the end of each
run, so a run with 60% of the compute is a run of its own, not the first part of a longer one. After an interruption the
same command continues: rows in results/study.csv are done; the run folders in results/study are needed only for an
interrupted run. Several processes may run at once and share the runs: on 2 cores, two with OMP_NUM_THREADS=1 are much
faster than one with two threads.
"""

import fcntl
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
from functools import cached_property
from pathlib import Path

# Let waiting threads sleep instead of spin, here and in child processes: beside other work on the machine, a step with
# spinning threads takes many times as long. Must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "EqM"))
from arms import (  # fmt: skip
    BY_NAME,
    COLUMNS,
    FULL,
    MINIATURE,
    QUESTIONS,
    SCORES,
    SECONDS_PER_FRAME,
    VERSION,
    all_jobs,
    check_rows,
    fingerprint,
    job_key,
    job_of,
    last_rows,
    phases_of,
    read_rows,
    recipe_flags,
    row_key,
    run_flops,
    sampling_flags,
    sampling_flops,
    write_rows,
)
from report import write_report
from runtime import distributed
from runtime.atomic import atomic_write
from runtime.cli import POSITIVE, ArgumentParser, UserError, check_writable, fail, say
from runtime.metrics import read_metrics
from scoring import consistency, manifest, motion, sources

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS, TRACKING_SECONDS = 8.0, 5e-4  # per run; per tracked frame
SECONDS_PER_FLOP = 7e-12  # on 2 cores (AVX-512, bf16)
WAIT_SECONDS = 2.0  # before looking again for runs that other processes left


# ----------------------------------------------------------------------------------------------------------------------
# What is done and what is missing


class Study:
    """The paths, the rows of the csv and the jobs of a study."""

    def __init__(self, args):
        self.size = MINIATURE if args.miniature else FULL
        self.out, self.folder, self.csv = Path(args.out), Path(args.out, "study"), Path(args.out, "study.csv")
        self.data = Path(args.data_path or self.folder / "moving-shapes")
        self.names, self.compile = choose_arms(args.only), args.compile
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

    def job_folder(self, job):
        """The folder of a run; another recipe has another folder."""
        return self.folder / f"{job.name}-{fingerprint(job, self.size)}"

    def add(self, job, rows):
        """Add rows of a job to the csv; they replace rows with the same key."""
        common = {"version": VERSION, "recipe": fingerprint(job, self.size), "code": self.code, "machine": self.machine}
        common |= {"arm": job.arm.name, "seed": job.seed, "share": job.share, "compiled": int(self.compile)}
        rows = [dict.fromkeys(COLUMNS) | common | row for row in rows]
        keys = {row_key(row) for row in rows}
        with file_lock(self.folder / "lock"):
            self.rows = [row for row in read_rows(self.csv) if row_key(row) not in keys] + rows
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
        """Whether the csv has the last step of a run, or a row that says that it diverged."""
        last_step = phases_of(job.arm, job.share, self.size)[0][-1][1]
        return any(row["step"] == last_step or row["loss"] == math.inf for row in self.train_rows(job))

    def missing_lengths(self, job):
        """The num_frames of the samples of a job without a row; none if the run diverged."""
        if any(row["loss"] == math.inf for row in self.train_rows(job)):
            return []
        found = [row["frames"] for row in self.rows if row["kind"] == "sample" and job_key(row) == job.key]
        return [num_frames for num_frames in job.lengths if num_frames not in found]

    def is_done(self, job):
        return self.is_trained(job) and not self.missing_lengths(job)

    def jobs(self):
        """All jobs of the chosen arms, in the order in which they run."""
        return all_jobs(self.names, self.size)

    def estimate(self, job):
        """Seconds that the missing parts of a job will take, from the rows of this machine, else a rough guess."""
        seconds = 0.0
        if not self.is_trained(job):
            seconds += START_SECONDS + run_flops(job, self.size) * self.training_pace(job.arm.name)
        for num_frames in self.missing_lengths(job):
            flops = sampling_flops(num_frames, self.size)
            seconds += TRACKING_SECONDS * self.size.clips * num_frames + flops * self.sampling_pace
        return seconds

    def training_pace(self, name):
        """Median seconds per FLOP of an arm's runs on this machine, else of all runs, else a guess."""
        rows = [row for row in last_rows(self.rows) if row["kind"] == "train" and row["machine"] == self.machine]
        paces = [row["seconds"] / run_flops(job_of(row), self.size) for row in rows]
        own = [pace for pace, row in zip(paces, rows, strict=True) if row["arm"] == name]
        return float(np.median(own or paces or [SECONDS_PER_FLOP]))

    @property
    def sampling_pace(self):
        rows = [row for row in self.rows if row["kind"] == "sample" and row["machine"] == self.machine]
        return float(np.median([row["seconds"] / row["flops"] for row in rows] or [SECONDS_PER_FLOP]))


@contextmanager
def file_lock(path, wait=True):
    """Lock a file against other processes, until the context or this process ends. Yields whether it is locked."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def choose_arms(words):
    """The names of the arms that --only selects, by question or by name, in their order. Raises UserError."""
    chosen = set()
    for word in words or QUESTIONS:
        if word in BY_NAME:
            chosen.add(word)
        elif word in tuple(QUESTIONS):
            chosen |= {name for name, arm in BY_NAME.items() if word in arm.questions}
        else:
            known = ", ".join(repr(name) for name in BY_NAME)
            raise UserError(f"--only {word}: wanted questions ({', '.join(QUESTIONS)}) or arms ({known})")
    return [name for name in BY_NAME if name in chosen]


def machine_name():
    """The GPU, or the processor and the number of threads; times are comparable on the same machine only."""
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
    """Make the Moving Shapes videos, 1.4 s long: long enough for 32 frames."""
    flags = ["--out", study.data, "--videos-per-class", study.size.videos, "--seconds", 1.4]
    with file_lock(study.folder / "lock"):
        run_script(["datasets/make_moving_shapes.py", *flags])


def run_script(words, log=None):
    """Run a script of the repository; it is stopped if this process dies.

    Returns what it printed, if that goes to a log. Raises UserError if it fails, except for a training loss that is not
    finite.
    """
    command = [sys.executable, *(str(word) for word in (ROOT / words[0], *words[1:]))]
    with open(log or os.devnull, "a+") as file:
        began = file.tell()
        process = subprocess.Popen(command, stdout=file, stderr=file if log else None, preexec_fn=end_with_parent)
        try:
            status = process.wait()
        except KeyboardInterrupt:  # train.py has received SIGINT as well and saves
            process.wait()
            raise
        file.seek(began)
        printed = file.read() if log else ""
    if status and "is not finite" not in printed:
        where = f"; see {log}" if log else ""
        raise UserError(f"{words[0]} ended with status {status}{where}")
    return printed


def end_with_parent():
    distributed.die_with_parent(signal.SIGTERM)  # on SIGTERM train.py saves


def train_job(study, job):
    """Train, or continue, up to the last step, and add the validations to the csv. Returns whether that was reached."""
    folder = study.job_folder(job)
    folder.mkdir(parents=True, exist_ok=True)
    paths = ["--data-path", study.data, "--results-dir", folder, "--resume"]
    last_step = phases_of(job.arm, job.share, study.size)[0][-1][1]
    quiet = ["--log-every", last_step, "--sample-every", 0, "--ckpt-every", 250, "--keep-last", 1]
    quiet += ["--compile"] if study.compile else []
    printed = run_script(["EqM/train.py", *recipe_flags(job, study.size), *paths, *quiet], folder / "train.log")
    (run,) = (path.parent for path in folder.glob("*/metrics.jsonl"))
    rows = [train_row(metrics) for metrics in read_validations(run / "metrics.jsonl")]
    if "is not finite" in printed:  # diverged
        step = rows[-1]["step"] + 1 if rows else 1
        rows.append({"kind": "train", "step": step, "loss": math.inf, "loss_16": math.inf})
    elif not rows or rows[-1]["step"] < last_step:
        return False
    study.add(job, rows)
    return True


def read_validations(path):
    """The rows of a metrics.jsonl that have a validation."""
    rows = read_metrics(path)[0] if path.exists() else []
    return [metrics for metrics in rows if metrics.get("val_loss") is not None]


def train_row(metrics):
    """The row of the csv for a row of metrics.jsonl."""
    names = {"loss": "val_loss", "loss_rel": "val_loss_rel", "loss_16": "val_loss_f16", "frames": "num_frames"}
    names |= {name: name for name in ("step", "train_loss", "flops", "seconds")}
    row = {"kind": "train"} | {column: metrics.get(name) for column, name in names.items()}
    if metrics["num_frames"] == 16:
        row["loss_16"] = metrics["val_loss"]  # metrics has no val_loss_f16 if this is the only length
    return row


class Sampler:
    """Samples clips and scores them as evaluate.py does; the scores of real clips are cached."""

    def __init__(self, study):
        self.study, self.real = study, {}  # real: num_frames -> scores
        self.device = distributed.start()

    def flags(self, job, path, num_frames):
        """The flags of evaluate.py, as a namespace."""
        size = self.study.size
        parser = ArgumentParser()
        sources.add_checkpoint_flags(parser)
        words = ["--num-frames", num_frames, "--num-samples", size.clips, "--seed", job.seed]
        words += ["--time-scale", SECONDS_PER_FRAME, *sampling_flags(size)]
        settings = {"ckpt": path, "data_path": self.study.data, "batch_size": 16, "num_workers": 0}
        settings |= {"num_real": size.clips, "split": "val", "val_fraction": 0.05}
        return Namespace(**vars(parser.parse_args([str(word) for word in words])) | settings)

    def row(self, job, path, num_frames):
        """The row of the csv for samples of a checkpoint with that many frames."""
        args = self.flags(job, path, num_frames)
        began = time.monotonic()
        generated = sources.FromCheckpoint(args)
        generated.to(self.device)
        measured, scores = self.score(sources.generated_stream(args, generated))
        seconds = time.monotonic() - began
        if num_frames not in self.real:
            clips, _, _, _ = sources.find_real(args, generated)
            self.real[num_frames] = self.score(sources.real_stream(args, clips, self.device, []))
        real_measured, real_scores = self.real[num_frames]
        drift = consistency.summarize(measured, real_measured, generated.temporal_patch_size)
        row = {"kind": "sample", "step": generated.source.step, "frames": num_frames}
        row |= {"clips": scores["clips"], "right": scores["right"]}
        row |= {column: scores[name] for column, name in SCORES.items()}
        row |= {"seam": drift["seam_score"], "drift": drift["largest_drift"]}
        row |= {"real_direction": real_scores["direction_accuracy"], "seconds": seconds}
        return row | {"flops": sampling_flops(num_frames, self.study.size)}

    def score(self, stream):
        """(what consistency.measure gives, stacked over clips; the summary of motion.py) of a stream of sources.py."""
        tracks, truths, measured = [], [], []
        for _, clips, names, time_scales in stream:
            for clip, name, time_scale in zip(clips.cpu(), names, time_scales, strict=True):
                tracks.append(motion.track(clip.numpy()))
                truths.append(motion.read_truth(self.study.data / "shapes.json", name, clip.shape[1], time_scale))
                measured.append(consistency.measure(clip))
        return [torch.stack(column) for column in zip(*measured, strict=True)], motion.summarize(tracks, truths)


def run_job(study, job, sampler):
    """Run the missing parts of a job. Returns whether it is done."""
    folder = study.job_folder(job)
    (latest,) = list(folder.glob("*/checkpoints/latest.pt")) or [None]
    if not study.is_trained(job) or (study.missing_lengths(job) and latest is None):
        if not train_job(study, job):
            return False
        (latest,) = list(folder.glob("*/checkpoints/latest.pt")) or [None]
    for num_frames in study.missing_lengths(job):
        study.add(job, [sampler.row(job, latest, num_frames)])
    for path in folder.glob("*/checkpoints/*.pt"):
        if job.seed or path.name != "latest.pt":
            path.unlink()
    return True


def run_jobs(study, minutes):
    """Run jobs until all are done or the next does not fit into the minutes; other processes keep their jobs."""
    make_folders(study)
    sampler, began = None, time.monotonic()
    while missing := [job for job in study.jobs() if not study.is_done(job)]:
        left = math.inf if minutes is None else max(0, 60 * minutes - (time.monotonic() - began))
        with claim_job(study, missing) as job:
            seconds = study.estimate(job) if job else 0
            if seconds >= left:
                reason = f"{job.name} takes about {seconds / 60:.1f} min" if job else "other processes run the rest"
                say(f"{reason}, {left / 60:.1f} min are left: run again to continue")
                return
            if job:
                say(f"{len(missing)} runs to do; {job.name}, about {seconds / 60:.1f} min")
                if sampler is None:
                    make_data(study)
                    sampler = Sampler(study)
                if not run_job(study, job, sampler):
                    say(f"stopped in {job.name}: run again to continue")
                    return
        if not job:
            time.sleep(WAIT_SECONDS)
        study.rows = read_rows(study.csv)
    say("all is done")


@contextmanager
def claim_job(study, jobs):
    """Lock the first job that can run and that no other process has locked. Yields it, or None if there is none."""
    for job in jobs:
        study.job_folder(job).mkdir(parents=True, exist_ok=True)
        with file_lock(study.job_folder(job) / "lock", wait=False) as is_locked:
            study.rows = read_rows(study.csv)
            if is_locked and not study.is_done(job):
                yield job
                return
    yield None


def make_folders(study):
    study.folder.mkdir(parents=True, exist_ok=True)
    about = study.folder / "study.json"
    with file_lock(study.folder / "lock"), atomic_write(about) as file:
        file.write((json.dumps({"version": VERSION, "size": study.size.name}) + "\n").encode())


def print_status(study):
    """Print what is done and what is missing, a line per arm."""
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


def parse_args():
    parser = ArgumentParser(description="What should positions be, and does a curriculum pay? Runs, tables, figures.")
    add = parser.add_argument
    only = "questions (A to C) or names of arms; default: all"
    add("--only", nargs="+", metavar="WHAT", help=only)
    add("--minutes", type=POSITIVE, metavar="X", help="start no run that would end later than this; default: no limit")
    add("--compile", action="store_true", help="train with torch.compile; rounds differently")
    add("--list", action="store_true", help="only print what is done, what is missing and how long it takes")
    add("--report", action="store_true", help="only write the tables and figures of study.csv")
    add("--out", default="results", metavar="DIR", help="for study.csv, study.md, figures/ and the run folders study/")
    data = "Moving Shapes videos, made if missing; default: study/moving-shapes in --out"
    add("--data-path", metavar="DIR", help=data)
    add("--miniature", action="store_true", help="tiny models and few steps, to try the script")
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
            raise UserError(f"--report: {study.csv} does not exist or is empty: run the study without --report first")
    except UserError as error:
        fail(error)
    try:
        if args.list:
            print_status(study)
        elif args.report:
            write_report(study)
        else:
            run_jobs(study, args.minutes)
            with file_lock(study.folder / "lock"):  # another process may end and write it at the same time
                write_report(study)
    except (UserError, OSError) as error:
        fail(error, status=1)
    except KeyboardInterrupt:
        fail("interrupted: the same command continues", status=1)


if __name__ == "__main__":
    main()
