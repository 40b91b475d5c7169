"""Does a frame curriculum with rotary positions pay? Equal compute, several seeds, Moving Shapes with a known truth.

    python scripts/study/study.py --list                  what is done, what is missing, hours
    python scripts/study/study.py --minutes 140           go on, start no run that would not fit (all: 9 core-hours)
    python scripts/study/study.py --only A B              some questions (A to E), or arms by their names
    python scripts/study/study.py --report                tables and figures again, from the csv alone

A: rotary or fixed positions. B: 4, 8, then 16 frames, or 16 from the start, at equal compute. C: other numbers of
frames than were trained. D: does the motion follow the time between frames? E: one factor at a time. F: UCF-101, on
paper.

An arm is a recipe; a run is an arm with a seed, a learning rate and a share of the compute. All runs of a share have
the same counted FLOPs, so phases have the steps that follow from EqMConfig.training_flops, and each decays its
learning rate to zero by its own end: a run of 60% is one of its own, not the middle of a longer one. The rate of a main
arm is tuned first, on the same three factors and another seed, with runs of 30%. Interrupted anywhere, the same command
goes on: what results/study.csv holds is done; run folders, in results/study, are needed only for an interrupted run.
The command may run several times at once, each with its own runs: two with OMP_NUM_THREADS=1 do on 2 cores 1.6 times
what one with two threads does.
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

# Threads that wait sleep instead of spinning, here and in what is started from here: beside other work on the machine a
# step of two spinning threads takes many times as long. To be said before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "EqM"))
import evaluate
from arms import (  # fmt: skip
    ARMS,
    BY_NAME,
    COLUMNS,
    FULL,
    GUIDANCE,
    MINIATURE,
    QUESTIONS,
    SCORES,
    TUNE_SEED,
    TUNE_SHARE,
    VERSION,
    WAY,
    Job,
    check_rows,
    fingerprint,
    job_key,
    job_of,
    last_rows,
    phases_of,
    read_rows,
    recipe_flags,
    row_key,
    sampling_flops,
    training_work,
    write_rows,
)
from report import report
from runtime import distributed
from runtime.atomic import atomic_write
from runtime.cli import POSITIVE, ArgumentParser, UserError, check_writable, fail, say
from runtime.metrics import read_metrics
from scoring import consistency, manifest, motion, sources

ROOT = Path(__file__).resolve().parents[2]


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
    with held(study.folder / "lock"), atomic_write(about) as file:
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
            with held(study.folder / "lock"):  # another process may come to its end at the same moment
                report(study)
    except (UserError, OSError) as error:
        fail(error, status=1)
    except KeyboardInterrupt:
        fail("interrupted: the same command goes on", status=1)


if __name__ == "__main__":
    main()
