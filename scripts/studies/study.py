"""What should positions be, and does a frame curriculum pay? Equal compute, several seeds, motion with a known truth.

    python scripts/studies/study.py --list                  what is done, what is missing, hours
    python scripts/studies/study.py --minutes 150           continue; start no run that would not fit
    python scripts/studies/study.py --only A B              some questions (A to C), or arms by name
    python scripts/studies/study.py --report                only write tables and figures, from the csv

A: fixed positions, rotary ones, rotary ones beside a table of height and width ("table"), those with --rope-speed
("moving"). B: which curriculum of 4, 8, then 16 frames. C: the compute at which motion becomes right.

An arm is a recipe; a run is an arm with a seed and a share of the compute. All runs of a share have the same counted
FLOPs: the steps of each phase follow from EqMConfig.training_flops. The learning rate decays to zero at the end of each
run, so a run with 60% of the compute is a run of its own, not the first part of a longer one. After an interruption the
same command continues, and several processes can share the runs (see lab.py). Rows in results/study.csv are done; the
run folders in results/study are needed only for an interrupted run.
"""

import csv
import hashlib
import io
import json
import math
import os
import platform
import shutil
import time
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

import arms
import lab
from arms import BY_NAME, SHARE_SEEDS, VERSION
from lab import UserError, fail, say
from report import write_report
from runtime.cli import POSITIVE, one_line_errors
from scoring.manifest import code_commit

QUESTIONS = "A", "B", "C"
SECONDS_PER_FRAME = 0.04  # of the videos, and of all samples
SECONDS_PER_FLOP = 7e-12  # on 2 cores (AVX-512, bf16), before a run has measured it
SCORES = {  # column: its name in the scores of --metric motion
    "direction": "direction_accuracy", "shape": "shape_accuracy", "speed": "speed_ratio", "area": "area_ratio",
}  # fmt: skip
COLUMNS = [
    "version", "recipe", "arm", "seed", "share", "kind", "step", "frames", "loss", "loss_rel", "loss_16", "train_loss",
    "clips", "right", *SCORES, "real_direction", "seam", "drift", "flops", "seconds", "compiled", "code", "machine",
]  # fmt: skip
TEXTS = {"recipe", "arm", "kind", "code", "machine"}
TRAIN_COLUMNS = {  # of the rows of trainings: the name in metrics.jsonl
    "step": "step", "frames": "num_frames", "loss": "val_loss", "loss_rel": "val_loss_rel", "loss_16": "val_loss_f16",
    "train_loss": "train_loss", "flops": "flops", "seconds": "seconds",
}  # fmt: skip


def read_rows(path):
    """The rows of a csv, texts and floats, an empty cell as None. Raises UserError."""

    def parse(name, text):
        return text if name in TEXTS else float(text) if text else None

    try:
        with open(path, newline="") as file:
            header, *lines = csv.reader(file)
        if header != COLUMNS:
            raise ValueError(f"its columns are not those of version {VERSION}")
        return [{name: parse(name, text) for name, text in zip(COLUMNS, line, strict=True)} for line in lines]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: not a csv of the study ({error}): move it away") from error


def write_rows(path, rows):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
    with lab.atomic_write(path) as file:
        file.write(text.getvalue().encode())


def key_of(row):
    return row["arm"], row["seed"], row["share"]


class Study:
    """The paths, the rows of the csv and the runs of a study."""

    def __init__(self, args):
        self.args, self.size = args, arms.size_of(args)
        self.out, self.folder, self.csv = Path(args.out), Path(args.out, "study"), Path(args.out, "study.csv")
        self.data = Path(args.data_path or self.folder / "moving-shapes")
        runs = []
        for arm in arms.ARMS:
            for share, count in {1.0: arm.seeds, **dict.fromkeys(arm.shares, SHARE_SEEDS)}.items():
                runs += [StudyRun(self, arm, seed, share) for seed in range(min(count, self.size.most_seeds))]
        self.check_rows({run.key: run.recipe for run in runs})
        chosen = choose_arms(args.only)
        # What costs most and says least comes last: long runs, and before them more seeds
        order = {run: (run.share > 1, run.seed >= SHARE_SEEDS, run.share != 1, run.seed) for run in runs}
        self.runs = sorted([run for run in runs if run.arm.name in chosen], key=order.get)

    @property
    def rows(self):
        return read_rows(self.csv)

    def check_rows(self, recipes):
        """Raise UserError for rows of another version or recipe than {key of a run: recipe}."""
        for row in self.rows:
            found = f"{self.csv}: a row of arm {row['arm']!r}"
            if row["version"] != VERSION:
                raise UserError(f"{found} is of version {row['version']:g}, this is {VERSION}: move the csv away")
            if row["recipe"] != recipes.get(key_of(row)):
                raise UserError(f"{found} is of another recipe (flags, sizes): move the csv away, or remove those rows")

    def left(self, runs):
        rows = self.rows
        return [run for run in runs if any(run.left(rows))]

    def estimate(self, run):
        """About the seconds that the missing parts of a run will take, by the rows of this machine if there are any."""
        needs_training, lengths = run.left(self.rows)
        flops = needs_training * run.flops + sum(arms.sampling_flops(frames, self.size) for frames in lengths)
        paces = [row["seconds"] / row["flops"] for row in self.last_rows() if row["machine"] == self.machine]
        return flops * float(np.median(paces or [SECONDS_PER_FLOP]))

    def last_rows(self):
        """The row of the last step of each run and all rows of samples; their seconds add up to the time spent."""
        rows = sorted(self.rows, key=lambda row: row["step"])
        last = {key_of(row): row for row in rows if row["kind"] == "train" and row["seconds"] is not None}
        return [*last.values(), *(row for row in rows if row["kind"] == "sample")]

    @cached_property
    def machine(self):
        """The GPU, or the processor and the number of threads; times are comparable on the same machine only."""
        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
        name = platform.processor() or platform.machine()
        for line in Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []:
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
        return f"{name}, {torch.get_num_threads()} threads"


def choose_arms(words):
    """The names of the arms that --only selects, by question or by name. Raises UserError."""
    for word in words or ():
        if word not in (*QUESTIONS, *BY_NAME):
            known = ", ".join(map(repr, BY_NAME))
            raise UserError(f"--only {word}: unknown; expected questions ({', '.join(QUESTIONS)}) or arms ({known})")
    return [arm.name for arm in arms.ARMS if not words or {arm.name, *arm.questions} & set(words)]


class StudyRun(lab.Run):
    """An arm with a seed and a share of the compute. Its results are rows of the csv."""

    def __init__(self, study, arm, seed, share):
        self.study, self.arm, self.seed, self.share, self.size = study, arm, seed, share, study.size
        self.key, (_, self.flops) = (arm.name, seed, share), arms.plan(arm, share, self.size)
        self.lengths = arm.lengths if share == 1 else (16,)  # num_frames of its samples, a row each
        flags, size = arms.recipe_flags(arm, seed, share, self.size), self.size  # what determines the rows
        about = [flags, size.videos, size.clips, size.points, arms.PATH_LENGTH, arms.GUIDANCE]
        self.recipe = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]
        sampling = ["--num-samples", size.clips, "--seed", seed, "--time-scale", SECONDS_PER_FRAME]
        sampling += arms.sampling_flags(size)
        real = ["--data-path", study.data, "--num-real", size.clips]
        super().__init__(
            study.folder / f"{arm.name}-seed{seed}-compute{share:g}-{self.recipe}".replace(" ", "-"),
            data={study.data: ["--seconds", 1.4, "--videos-per-class", size.videos]},  # long enough for 32 frames
            **arms.training(study.args, arm, seed, share, "--data-path", study.data),
            tasks={f"{n} frames": ([*sampling, "--num-frames", n], ("motion", "consistency")) for n in self.lengths},
            metrics={"motion": real, "consistency": real},
        )

    def left(self, rows):
        """(whether the csv lacks the last step of the training, the num_frames of the samples that it lacks)."""
        own = [row for row in rows if key_of(row) == self.key]
        if any(row["loss"] == math.inf for row in own):  # it diverged
            return False, []
        is_trained = any((row["kind"], row["step"]) == ("train", self.last_step) for row in own)
        found = [row["frames"] for row in own if row["kind"] == "sample"]
        return not is_trained, [num_frames for num_frames in self.lengths if num_frames not in found]

    def run(self):
        self.make_data()
        try:
            ckpt = self.train()
        except UserError as error:
            if "is not finite" not in str(error):
                raise
            rows = self.train_rows()
            step = rows[-1]["step"] + 1 if rows else 1
            self.add([*rows, {"kind": "train", "step": step, "loss": math.inf, "loss_16": math.inf}])
            return
        self.add(self.train_rows())
        began = time.monotonic()
        self.sample(ckpt)
        self.score()
        self.add(self.sample_rows(time.monotonic() - began))
        for path in self.folder.glob("*/checkpoints/*.pt"):
            if self.seed or path.name != "latest.pt":
                path.unlink()
        for task in self.tasks:
            shutil.rmtree(self.path(task).parent)

    def train_rows(self):
        """The rows of the validations."""
        rows = []
        for row in self.validations():
            if row["num_frames"] == 16:
                row["val_loss_f16"] = row["val_loss"]  # missing if this is the only length
            rows.append({"kind": "train"} | {column: row.get(name) for column, name in TRAIN_COLUMNS.items()})
        return rows

    def sample_rows(self, seconds):
        """The rows of the samples, which have taken so many seconds in all."""
        rows, flops = [], [arms.sampling_flops(num_frames, self.size) for num_frames in self.lengths]
        for task, num_frames, own in zip(self.tasks, self.lengths, flops, strict=True):
            motion, values = self.scores(task, "motion")["result"], self.values(task)
            row = {"kind": "sample", "step": self.last_step, "frames": num_frames}
            row |= {name: motion["generated"][name] for name in ("clips", "right")}
            row |= {column: values[name] for column, name in SCORES.items()}
            row |= {"real_direction": motion["real"]["direction_accuracy"], "seam": values["seam_score"]}
            row |= {"drift": values["largest_drift"], "flops": own, "seconds": seconds * own / sum(flops)}
            rows.append(row)
        return rows

    def add(self, rows):
        """Add rows to the csv; they replace rows with the same run, kind, step and frames."""
        study = self.study
        common = {"version": VERSION, "recipe": self.recipe, "code": code_commit() or "", "machine": study.machine}
        common |= {"arm": self.arm.name, "seed": self.seed, "share": self.share, "compiled": int(study.args.compile)}

        def key(row):
            return *key_of(row), row["kind"], row["step"], row["frames"]

        rows = [dict.fromkeys(COLUMNS) | common | row for row in rows]
        with lab.file_lock(study.folder / "lock"):
            keys = set(map(key, rows))
            write_rows(study.csv, [row for row in study.rows if key(row) not in keys] + rows)


def print_status(study):
    """Print what is done and what is missing, a line per arm."""
    left = {run: study.estimate(run) / 3600 for run in study.left(study.runs)}  # hours
    say(f"{'arm':<28} {'questions':<9} {'runs done':>9} {'hours left':>10}")
    for arm in dict.fromkeys(run.arm for run in study.runs):
        own = [run for run in study.runs if run.arm == arm]
        hours = [left[run] for run in own if run in left]
        say(f"{arm.name:<28} {arm.questions:<9} {len(own) - len(hours):>4} / {len(own):<2} {sum(hours):>10.2f}")
    say(f"{len(study.runs)} runs, {sum(left.values()):.1f} hours left")


def parse_args():
    parser = lab.study_parser(__doc__)
    add, only_print = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    only = "questions (A to C) or names of arms; default: all"
    add("--only", nargs="+", metavar="WHAT", help=only)
    add("--minutes", type=POSITIVE, metavar="X", help="start no run that would end later than this; default: no limit")
    only_print("--list", action="store_true", help="only print what is done, what is missing and how long it takes")
    only_print("--report", action="store_true", help="only write the tables and figures of study.csv")
    data = "Moving Shapes videos, made if missing; default: study/moving-shapes in --out"
    add("--data-path", metavar="DIR", help=data)
    return parser.parse_args()


@one_line_errors()
def main():
    args = parse_args()
    try:
        study = Study(args)
        if args.report and not study.rows:
            raise UserError(f"--report: {study.csv} does not exist or is empty: run the study without --report first")
    except UserError as error:
        fail(error)
    if args.list:
        print_status(study)
        return
    study.folder.mkdir(parents=True, exist_ok=True)
    if not args.report:
        lab.run_all(study.runs, study.left, study.estimate, args.minutes)
    with lab.file_lock(study.folder / "lock"):  # another process may write it at the same time
        write_report(study)


if __name__ == "__main__":
    main()
