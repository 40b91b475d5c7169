"""Compare positions and frame curricula at equal compute, with several seeds, on known motion.

    python scripts/studies/study.py --list          what is done and missing, and how long it takes
    python scripts/studies/study.py --minutes 150   run or continue; start no run that ends later
    python scripts/studies/study.py --only A B      some questions (A to D), or arms by name
    python scripts/studies/study.py --report        only write tables and figures, from the csv

A: which positions are best: fixed, rotary, rotary with a table of height and width ("table"), or
these with --rope-speed ("moving")?
B: which curriculum of 4, 8, then 16 frames?
C: how much compute until the motion is correct?
D: which --rope-speed, for which motion?

An arm is a training recipe. A run is an arm with a seed and a share of the compute. All runs with
the same share have the same counted FLOPs. The learning rate decays to zero at the end of each run,
so 60% of the compute is a separate run. study.csv in results/studies/positions holds the finished
results, and study.json the commands that made them. The folders in its folder study matter only for
interrupted runs: see lab.py.
"""

import csv
import hashlib
import io
import json
import math
import shutil
import statistics
import time
from operator import itemgetter
from pathlib import Path

import arms
import lab
from arms import BY_NAME, SHARE_SEEDS, VERSION
from benchmark import machine
from lab import UserError, say
from report import write_report
from runtime.cli import POSITIVE, one_line_errors, wrong_input

QUESTIONS = "A", "B", "C", "D"
SECONDS_PER_FRAME = 0.04  # of the videos and of all samples
SECONDS_PER_FLOP = 7e-12  # estimate for 2 cores (AVX-512, bf16), until a run has measured it
METRICS = "motion", "consistency"
SCORES = {  # column of the csv: value of these metrics
    "direction": "direction_accuracy",
    "shape": "shape_accuracy",
    "speed": "speed_ratio",
    "area": "area_ratio",
    "seam": "seam_score",
    "drift": "largest_drift",
}
COLUMNS = [
    "version",
    "recipe",
    "arm",
    "seed",
    "share",
    "kind",
    "step",
    "frames",
    "loss",
    "loss_rel",
    "loss_16",
    "train_loss",
    "clips",
    "right",
    "direction",
    "shape",
    "speed",
    "area",
    "real_direction",
    "seam",
    "drift",
    "flops",
    "seconds",
    "compiled",
    "code",
    "machine",
]
TEXTS = {"recipe", "arm", "kind", "code", "machine"}
TRAIN_COLUMNS = {  # column of the csv: name in metrics.jsonl
    "step": "step",
    "frames": "num_frames",
    "loss": "val_loss",
    "loss_rel": "val_loss_rel",
    "loss_16": "val_loss_f16",
    "train_loss": "train_loss",
    "flops": "flops",
    "seconds": "seconds",
}


def read_rows(path):
    """The rows of a csv as dicts of texts and floats; None for an empty cell. Raises UserError."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        header, *lines = csv.reader(file)
    if header != COLUMNS:
        raise UserError(
            f"{path}: has other columns; expected those of version {VERSION}; move the file away"
        )
    rows = []
    for line in lines:
        row = dict(zip(COLUMNS, line, strict=True))
        for name in row.keys() - TEXTS:
            row[name] = float(row[name]) if row[name] else None
        rows.append(row)
    return rows


def write_rows(path, rows):
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        cells = []
        for name in COLUMNS:
            value = row[name]
            cells.append(f"{value:.6g}" if isinstance(value, float) else value)
        writer.writerow(cells)
    lab.write_file(path, text.getvalue().encode())


def key_of(row):
    return row["arm"], row["seed"], row["share"]


class Study:
    """The paths, csv rows and runs of a study.

    Raises UserError for rows of other arms, recipes or versions.
    """

    def __init__(self, args):
        self.args = args
        self.size = arms.size_of(args)
        self.out = Path(args.out)
        self.folder = Path(args.out, "study")
        self.csv = Path(args.out, "study.csv")
        runs = []
        for arm in arms.ARMS:
            for share in (1.0, *arm.shares):
                seeds = min(arm.seeds if share == 1 else SHARE_SEEDS, self.size.most_seeds)
                runs += [StudyRun(self, arm, seed, share) for seed in range(seeds)]
        recipes = {run.key: run.recipe for run in runs}
        for row in self.rows:
            if (row["version"], row["recipe"]) != (VERSION, recipes.get(key_of(row))):
                what = f"a row of arm {row['arm']!r} has another version or recipe (flags, sizes)"
                raise UserError(
                    f"{self.csv}: {what}; expected version {VERSION}; move the file away"
                )
        # Expensive runs with little information come last: extra seeds, then long runs.
        runs.sort(
            key=lambda run: (run.share > 1, run.seed >= SHARE_SEEDS, run.share != 1, run.seed)
        )
        chosen = set(args.only or QUESTIONS)
        self.runs = [run for run in runs if {run.arm.name, *run.arm.questions} & chosen]

    @property
    def rows(self):
        return read_rows(self.csv)

    def last_rows(self):
        """The last training row of each run, and all sample rows.

        Their seconds add up to the time spent.
        """
        last = {}
        sampled = []
        for row in sorted(self.rows, key=itemgetter("step")):
            if row["kind"] == "sample":
                sampled.append(row)
            elif row["seconds"] is not None:
                last[key_of(row)] = row
        return [*last.values(), *sampled]


class StudyRun(lab.Run):
    """A run of an arm with a seed and a share of the compute. Its results are rows of the csv."""

    def __init__(self, study, arm, seed, share):
        self.study = study
        self.arm = arm
        self.seed = seed
        self.share = share
        size = study.size
        self.key = (arm.name, seed, share)
        _, self.flops = arms.plan(arm, share, size)
        # num_frames of its samples; one row each
        self.lengths = arm.lengths if share == 1 else (16,)
        pace = [arm.pace] if arm.pace else []
        # everything that determines the rows
        about = [
            arms.recipe_flags(
                arm,
                seed=seed,
                share=share,
                size=size,
            ),
            size.videos,
            size.clips,
            size.points,
            arms.PATH_LENGTH,
            arms.GUIDANCE,
            *pace,
        ]
        self.recipe = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]
        data = study.folder / "-".join(["moving-shapes", *pace])
        sampling = (
            f"--num-samples {size.clips} --seed {seed} --time-scale {SECONDS_PER_FRAME} "
            f"{arms.sampling_flags(size)} --num-frames"
        )
        name = f"{arm.name}-seed{seed}-compute{share:g}-{self.recipe}"
        super().__init__(
            study.folder / name.replace(" ", "-"),
            data={data: ["--seconds", arms.PACES[arm.pace], "--videos-per-class", size.videos]},
            **arms.training(
                study.args,
                arm=arm,
                seed=seed,
                flags=["--data-path", data],
                share=share,
            ),
            tasks={
                f"{frames} frames": (f"{sampling} {frames}".split(), METRICS)
                for frames in self.lengths
            },
            metrics=dict.fromkeys(METRICS, ["--data-path", data, "--num-real", size.clips]),
        )

    @property
    def is_done(self):
        """Whether the csv has the samples, or shows that the training diverged."""
        return any(row["kind"] == "sample" or row["loss"] == math.inf for row in self.rows())

    def rows(self):
        return [row for row in self.study.rows if key_of(row) == self.key]

    def estimate(self):
        """Estimate the seconds for the missing parts, from this machine's rows if it has any."""
        is_trained = any(row["step"] == self.last_step for row in self.rows())
        flops = sum(arms.sampling_flops(frames, self.study.size) for frames in self.lengths)
        flops += 0 if is_trained else self.flops
        rows = lab.rows_with({"machine": machine()}, self.study.last_rows())
        speeds = [row["seconds"] / row["flops"] for row in rows]
        return flops * (statistics.median(speeds) if speeds else SECONDS_PER_FLOP)

    def run(self):
        self.make_data()
        try:
            ckpt = self.train()
        except UserError as error:
            if "is not finite" not in str(error):
                raise
            rows = self.train_rows()
            step = rows[-1]["step"] + 1 if rows else 1
            rows.append({"kind": "train", "step": step, "loss": math.inf, "loss_16": math.inf})
            self.add(rows)
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
        """A row of the csv for each validation."""
        rows = []
        for row in self.validations():
            if row["num_frames"] == 16:
                row["val_loss_f16"] = row["val_loss"]  # not logged if 16 is the only length
            values = {column: row.get(name) for column, name in TRAIN_COLUMNS.items()}
            rows.append({"kind": "train"} | values)
        return rows

    def sample_rows(self, seconds):
        """A row of the csv for each length of the samples.

        seconds: the total time, split by FLOPs.
        """
        rows = []
        flops = [arms.sampling_flops(num_frames, self.study.size) for num_frames in self.lengths]
        for task, num_frames, spent in zip(self.tasks, self.lengths, flops, strict=True):
            motion = self.scores(task, "motion")["result"]
            values = self.values(task)
            row = {"kind": "sample", "step": self.last_step, "frames": num_frames}
            row |= {name: motion["generated"][name] for name in ("clips", "right")}
            row |= {column: values[name] for column, name in SCORES.items()}
            row["real_direction"] = motion["real"]["direction_accuracy"]
            row["flops"] = spent
            row["seconds"] = seconds * spent / sum(flops)
            rows.append(row)
        return rows

    def add(self, rows):
        """Add rows to the csv, replacing rows with the same run, kind, step and frames."""
        study = self.study
        command = lab.made()
        del command["date"]  # a later row of the same command replaces its date
        common = {
            "version": VERSION,
            "recipe": self.recipe,
            "code": command["code"],
            "machine": command["machine"],
            "arm": self.arm.name,
            "seed": self.seed,
            "share": self.share,
            "compiled": int(study.args.compile),
        }
        rows = [dict.fromkeys(COLUMNS) | common | row for row in rows]
        with lab.file_lock(study.folder / "lock"):
            keyed = {}
            for row in study.rows + rows:
                keyed[*key_of(row), row["kind"], row["step"], row["frames"]] = row
            write_rows(study.csv, keyed.values())
            lab.add_rows(study.csv.with_suffix(".json"), [{}], replaces=command)


def print_status(study):
    """Print a line per arm: how many runs are done, and the hours left."""
    hours_left = {run: run.estimate() / 3600 for run in study.runs if not run.is_done}
    say(f"{'arm':<28} {'questions':<9} {'runs done':>9} {'hours left':>10}")
    for arm in dict.fromkeys(run.arm for run in study.runs):
        runs = [run for run in study.runs if run.arm == arm]
        hours = [hours_left[run] for run in runs if run in hours_left]
        done = f"{len(runs) - len(hours):>4} / {len(runs):<2}"
        say(f"{arm.name:<28} {arm.questions:<9} {done} {sum(hours):>10.2f}")
    say(f"{len(study.runs)} runs, {sum(hours_left.values()):.1f} hours left")


def parse_args():
    parser = lab.study_parser(__doc__, "positions")
    add = parser.add_argument
    only_print = parser.add_mutually_exclusive_group().add_argument
    add(
        "--only",
        nargs="+",
        choices=(*QUESTIONS, *BY_NAME),
        metavar="WHAT",
        help="questions (A to D) or names of arms; default: all",
    )
    add(
        "--minutes",
        type=POSITIVE,
        default=math.inf,
        help="start no run that would end after this many minutes; default: no limit",
    )
    only_print("--list", action="store_true", help="only print what is done and what is missing")
    only_print(
        "--report", action="store_true", help="only write tables and figures, from study.csv"
    )
    return parser.parse_args()


@one_line_errors()
def main():
    args = parse_args()
    with wrong_input():
        study = Study(args)
        if args.report and not study.rows:
            raise UserError(
                f"--report: {study.csv} does not exist or is empty; run the study without "
                "--report first"
            )
    if args.list:
        print_status(study)
        return
    if not args.report:
        lab.run_all(study.runs, args.minutes)
    # another process may write the report at the same time
    with lab.file_lock(study.folder / "lock"):
        write_report(study)


if __name__ == "__main__":
    main()
