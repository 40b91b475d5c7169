"""Shared code of the studies: restartable runs that several processes can share, and tables.

A Run trains a model, samples from it and scores the samples with the project's own scripts, in its
own folder. After an interruption, run the same command again to continue. Start it several times to
share the runs: on 2 cores, two processes with OMP_NUM_THREADS=1 are much faster than one process
with two threads.
"""

import fcntl
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from pathlib import Path

# Waiting threads sleep instead of spinning, here and in child processes: on a busy machine,
# spinning makes a step many times slower. Must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from scipy.special import stdtr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine import ROOT, refuse_to_run

from benchmark import made
from runtime import distributed
from runtime.atomic import write_file
from runtime.cli import (
    NATURAL,
    ArgumentParser,
    UserError,
    check_writable,
    fail,
    one_line_errors,
    say,
    wrong_input,
)
from runtime.metrics import read_metrics
from scoring.stats import half95, mean_and_error

refuse_to_run(__name__, "another script in scripts/studies/")

# --precision of training and sampling. On a CPU without AVX-512, bf16 takes ten times as long.
PRECISION = "bf16" if distributed.has_fast_bf16(torch.device("cpu")) else "fp32"
SIGNIFICANT = 0.05  # the largest p value, adjusted by `holm`, of a significant difference
WAIT_SECONDS = 2.0  # between two checks for runs that other processes did not finish


def out_parser(doc, study, what):
    """A parser with the flag --out, a folder for `what`; default: that of the study.

    doc: the docstring of the script.
    """
    summary = " ".join(doc.partition("\n\n")[0].split())
    parser = ArgumentParser(description=summary)
    parser.add_argument(
        "--out",
        type=writable,
        default=f"results/studies/{study}",
        metavar="DIR",
        help=f"folder for {what}",
    )
    return parser


def study_parser(doc, study, seeds=None, trains=True):
    """A parser with the flags that all studies share.

    seeds: the default of --seeds; trains: add --compile.
    """
    parser = out_parser(doc, study, "the tables and the runs")
    add = parser.add_argument
    add("--miniature", action="store_true", help="use tiny models and few steps, to try the script")
    if trains:
        add(
            "--compile",
            action="store_true",
            help="train with torch.compile, which rounds differently",
        )
    if seeds is not None:
        add("--seeds", type=NATURAL, nargs="+", default=seeds, help="training seeds")
    return parser


def writable(folder):
    """Return a folder that can be written, or exit with an error: the `type` of --out."""
    with wrong_input():
        check_writable("--out", folder)
    return folder


# Runs ---------------------------------------------------------------------------------------------


@contextmanager
def file_lock(path, wait=True):
    """Lock a file, in a folder that is made if missing, until the context or this process ends.

    Yields whether this process has the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        is_locked = False
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            is_locked = True
        yield is_locked


@dataclass(eq=False)
class Run:
    """A model, its samples and their scores, in its own folder."""

    folder: Path
    data: dict = field(default_factory=dict)  # {folder: flags of make_moving_shapes.py}
    training: list = field(default_factory=list)  # flags of train.py
    last_step: int = 0
    # {name: (flags of sample_gd.py, metrics of evaluate.py)}
    tasks: dict = field(default_factory=dict)
    metrics: dict = field(default_factory=dict)  # {metric: flags of evaluate.py}

    def path(self, task, name="samples.json"):
        """The path of a file in the sample folder of a task, which also holds METRIC.json."""
        return self.folder / task.replace(",", "").replace(" ", "-") / name

    def unscored(self, metric):
        """The sample folders without a score of this metric."""
        folders = []
        for task, (_, metrics) in self.tasks.items():
            path = self.path(task, f"{metric}.json")
            if metric in metrics and not path.exists():
                folders.append(path.parent)
        return folders

    @property
    def is_done(self):
        return not any(self.unscored(metric) for metric in self.metrics)

    def estimate(self):
        """Estimate the seconds for the missing parts."""
        return 0.0

    def scores(self, task, metric):
        """The manifest of evaluate.py for a task and a metric."""
        return json.loads(self.path(task, f"{metric}.json").read_text())

    def values(self, task):
        """{name: value} of all metrics of a task."""
        values = {}
        _, metrics = self.tasks[task]
        for metric in metrics:
            values |= self.scores(task, metric)["values"]
        return values

    def validations(self):
        """The rows of metrics.jsonl with a validation loss."""
        paths = sorted(self.folder.glob("*/metrics.jsonl"))
        if not paths:
            return []
        rows, *_ = read_metrics(paths[-1])
        return [row for row in rows if row.get("val_loss") is not None]

    def checkpoint(self):
        """The path of latest.pt if the training has reached its last step, else None."""
        is_trained = any(row["step"] == self.last_step for row in self.validations())
        return next(self.folder.glob("*/checkpoints/latest.pt"), None) if is_trained else None

    def script(self, *words, **environment):
        """Run a script of the repository with a log in this folder.

        It stops if this process dies. Raises UserError.
        """
        name, *flags = map(str, words)
        log = self.folder / f"{Path(name).stem}.log"
        program = "bash" if name.endswith(".sh") else sys.executable
        with open(log, "a") as file:
            process = subprocess.Popen(
                [program, ROOT / name, *flags],
                stdout=file,
                stderr=file,
                env=os.environ | environment,
                preexec_fn=partial(distributed.die_with_parent, signal.SIGTERM),
            )
            try:
                status = process.wait()
            except KeyboardInterrupt:  # the script received SIGINT, too, and saves
                process.wait()
                raise
        if status:
            last_line = log.read_text(errors="replace").strip().rpartition("\n")[2]
            raise UserError(f"{name} ended with status {status} ({last_line}); see {log}")

    def make_data(self):
        for folder, flags in self.data.items():
            with file_lock(self.folder.parent / "lock"):
                self.script("datasets/make_moving_shapes.py", "--out", folder, *flags)

    def train(self):
        """Train or resume to the last step. Returns the path of latest.pt. Raises UserError."""
        if self.checkpoint() is None:
            flags = (
                f"--resume --log-every {self.last_step} --sample-every 0 --ckpt-every 250 "
                "--keep-last 1"
            )
            words = [*self.training, "--results-dir", self.folder, *flags.split()]
            self.script("EqM/train.py", *words)
        if self.checkpoint() is None:
            raise UserError(
                f"{self.folder}: the training was stopped; run the same command to continue"
            )
        return self.checkpoint()

    def sample(self, ckpt):
        for task, (flags, _) in self.tasks.items():
            path = self.path(task)
            if not path.exists():
                words = ["--ckpt", ckpt, "--folder", path.parent, "--video", "--no-previews"]
                self.script("EqM/sample_gd.py", *words, *flags)

    def score(self):
        score([self])

    def run(self):
        """Make the data, train, sample and score, skipping what is done. Raises UserError."""
        self.make_data()
        self.sample(self.train())
        self.score()


@dataclass(eq=False)
class JsonRun(Run):
    """A Run that ends with a row in a json file, which holds its scores.

    A row with all tasks is not measured again.
    """

    out: Path = None  # the json file
    about: dict = field(default_factory=dict)  # what tells this row from others

    @property
    def has_row(self):
        rows = rows_with(self.about, read_rows(self.out))
        return any(self.tasks.keys() <= row["values"].keys() for row in rows)

    @property
    def is_done(self):
        return self.has_row

    def row(self):
        values = {"": {"val_loss": self.validations()[-1]["val_loss"]}}
        values |= {task: self.values(task) for task in self.tasks}
        return self.about | {"values": values}

    def score(self):
        super().score()
        add_rows(self.out, [self.row()], replaces=self.about)


def read_rows(path):
    """The rows of a json file; none if it does not exist."""
    return json.loads(path.read_text()) if path.exists() else []


def rows_with(about, rows):
    """The rows that contain the dict `about`."""
    return [row for row in rows if about.items() <= row.items()]


def add_rows(path, rows, replaces=None):
    """Add rows, with what `made` says, to a json file, to which other processes may add meanwhile.

    replaces: a dict; rows that contain it are removed.
    """
    with file_lock(path.with_name(f".{path.stem}.lock")):
        kept = read_rows(path)
        replaced = rows_with(replaces, kept) if replaces else []
        kept = [row for row in kept if row not in replaced]
        kept += [row | made() for row in rows]
        write_file(path, f"{json.dumps(kept, indent=1)}\n".encode())


def run_all(runs, minutes=math.inf):
    """Run all unfinished runs, each in one process, and wait for runs of other processes.

    Starts no run that would end after `minutes`, according to its estimate.
    """
    end = time.monotonic() + 60 * minutes
    while waiting := [run for run in runs if not run.is_done]:
        for run in waiting:
            with file_lock(run.folder / "lock", wait=False) as is_mine:
                if is_mine and not run.is_done:
                    seconds = run.estimate()
                    if time.monotonic() + seconds >= end:
                        minutes = f"{seconds / 60:.1f} minutes"
                        say(f"{run.folder.name} takes about {minutes}; run again to continue")
                        return
                    say(f"{len(waiting)} runs to do; {run.folder.name}")
                    run.run()
                    break
        else:
            if time.monotonic() >= end:
                say("other processes run the rest; run again to continue")
                return
            time.sleep(WAIT_SECONDS)
    say("all is done")


def score(runs):
    """Score the samples of runs that have the same metrics, all folders of a metric in one call.

    Raises UserError.
    """
    first = runs[0]
    for metric, flags in first.metrics.items():
        folders = [folder for run in runs for folder in run.unscored(metric)]
        if not folders:
            continue
        out = Path(f"{metric}.json")
        if len(folders) == 1:
            out = folders[0] / out
        first.script(
            "EqM/evaluate.py",
            "--metric",
            metric,
            "--samples",
            *folders,
            "--num-workers",
            0,
            "--out",
            out,
            *flags,
        )


def data_sets(folder, count, test_count, flags=("--seconds", 1.4)):
    """The `data` of a Run: `count` videos per class in `folder`, and a test set in FOLDER-test.

    The test set has another seed.
    """
    flags = [*flags, "--videos-per-class"]
    return {
        folder: [*flags, count],
        folder.with_name(f"{folder.name}-test"): [*flags, test_count, "--seed", 1],
    }


# Tables -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A column of a table: a value, in the unit of the table."""

    value: str
    factor: float
    digits: int
    task: str | None = None  # whose value it is, in rows of a JsonRun

    def number(self, row):
        """The column's number in a row; None if it is missing."""
        values = row if self.task is None else row["values"].get(self.task, {})
        value = values.get(self.value)
        return None if value is None else self.factor * value


def collect(runs, task, columns):
    """{title: values of the runs}. columns: {title: Column}."""
    scores = [run.values(task) for run in runs]
    values = {}
    for title, column in columns.items():
        numbers = map(column.number, scores)
        values[title] = [number for number in numbers if number is not None]
    return values


def by_seed(rows, about, column):
    """{seed: number} of a Column, of the rows that contain the dict `about`."""
    numbers = {}
    for row in sorted(rows_with(about, rows), key=itemgetter("seed")):
        number = column.number(row)
        if number is not None:
            numbers[row["seed"]] = number
    return numbers


def mean_cell(values, digits):
    """A table cell of {seed: value}: mean (lowest to highest)."""
    if not values:
        return ""
    numbers = values.values()
    mean = f"{statistics.mean(numbers):.{digits}f}"
    low = f"{min(numbers):.{digits}f}"
    high = f"{max(numbers):.{digits}f}"
    return f"{mean} ({low} to {high})" if len(numbers) > 1 else mean


def heading(title, about):
    """Lines of markdown: the title of a page, and what it shows."""
    return [f"# {title}", "", about, ""]


def table(titles, rows):
    """Lines of markdown: a table and an empty line."""
    head = " ".join(f"| {title}".strip() for title in titles)
    rule = "|---" * len(titles)
    lines = [f"{head} |", f"{rule}|"]
    for row in rows:
        cells = " | ".join(row)
        lines.append(f"| {cells} |")
    return [*lines, ""]


def seed_table(names, columns, values):
    """Lines of markdown: a table with a row per name.

    columns: {title: Column}; values: {title: {name: {seed: value}}}.
    """
    rows = []
    for name in names:
        cells = [
            mean_cell(values[title].get(name), column.digits) for title, column in columns.items()
        ]
        rows.append([name, *cells])
    return table(["", *columns], rows)


@dataclass
class Difference:
    """A comparison of two arms: a line of text, the mean difference, and its p value.

    Without several seeds, there is no p value.
    """

    text: str  # without the p value and what follows
    mean: float = 0.0
    p: float | None = None


def difference(values, pair, what, digits=3):
    """The Difference of a pair of arms, paired by seed, where both values are finite.

    values: {arm: {seed: value}}.
    """
    first, second = pair
    firsts = values.get(first, {})
    seconds = values.get(second, {})
    seeds = sorted(firsts.keys() & seconds.keys())
    gaps = [firsts[seed] - seconds[seed] for seed in seeds]
    gaps = [gap for gap in gaps if math.isfinite(gap)]
    mean, error = mean_and_error(gaps)
    if mean is None:
        return Difference(f"- {what}, {first} minus {second}: not run yet.")
    text = f"- {what}: {first} minus {second} is {mean:+.{digits}f}"
    if error is None:
        return Difference(f"{text} (one seed, no interval).")
    half = half95(gaps)
    low = f"{mean - half:+.{digits}f}"
    high = f"{mean + half:+.{digits}f}"
    text += f" (95% {low} to {high}, {len(gaps)} seeds"
    return Difference(text, mean, student_p(gaps))


def student_p(values):
    """The two-sided p value of the mean of two or more values against zero (Student's t)."""
    mean, error = mean_and_error(values)
    if error == 0:
        return float(mean == 0)
    t = abs(mean) / error
    return float(2 * stdtr(len(values) - 1, -t))


def holm(p_values):
    """The p values of the comparisons in one table, adjusted for their number (Holm, 1979)."""
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    left = len(p_values)
    for index in sorted(range(left), key=p_values.__getitem__):
        largest = max(largest, left * p_values[index])
        adjusted[index] = min(1.0, largest)
        left -= 1
    return adjusted


def difference_lines(differences):
    """A line for each Difference of one table.

    Which of them are significant is decided by `holm` over all of them.
    """
    adjusted = iter(holm([one.p for one in differences if one.p is not None]))
    lines = []
    for one in differences:
        line = one.text
        if one.p is not None:
            p = next(adjusted)
            verdict = "no significant difference"
            if p <= SIGNIFICANT:
                verdict = "higher" if one.mean > 0 else "lower"
            line += f"; p {p_text(one.p)}, by Holm {p_text(p)}): {verdict}."
        lines.append(line)
    return lines


def p_text(p):
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def newest_metrics(name, kind):
    """The metrics rows of the newest run of this kind (VAE or EqM) in an experiment."""
    folder = Path("results", name)
    names = f"[0-9]*-{kind}-*"
    newest = max(folder.glob(names), default=folder / names)
    rows, *_ = read_metrics(newest / "metrics.jsonl")
    return rows


def read_scores(name, tasks):
    """{task: manifest} of the samples of an experiment of a shell script.

    Raises FileNotFoundError.
    """
    scores = {}
    for task in tasks:
        path = Path("samples", f"{name}-{task}.json")
        scores[task] = json.loads(path.read_text())
    return scores


def read_settings(name):
    """{variable: value}, as text, of a finished experiment of a shell script.

    Raises FileNotFoundError.
    """
    words = shlex.split(Path("results", name, "settings").read_text())
    return dict(word.split("=", 1) for word in words if "=" in word)


def experiment_made(name, script, score):
    """As `made`, with the whole command of an experiment, and the commit that wrote `score`, a
    manifest of its samples.

    Raises FileNotFoundError.
    """
    settings = Path("results", name, "settings").read_text().strip()
    record = made()
    record["command"] = f"EXP={shlex.quote(name)} {settings} bash scripts/{script}"
    record["code"] = score.get("code") or record["code"]
    return record


@dataclass
class ExperimentTable:
    """The command that adds scores of a shell script's experiments to NAME.md and NAME.json.

    read_run(experiment) returns a plain dict with "hours" and perhaps "seed", rows_of(run) {row of
    the table: text}. A run's "notes" are sentences about its column.
    """

    about: str  # docstring of the command
    name: str
    title: str
    script: str
    read_run: Callable
    rows_of: Callable
    brackets: str  # what the intervals are

    def parse_args(self):
        parser = out_parser(self.about, self.name, f"{self.name}.md and {self.name}.json")
        parser.add_argument(
            "runs", nargs="+", metavar="EXP", help=f"finished experiments of {self.script}"
        )
        return parser.parse_args()

    def markdown(self, runs):
        """The lines of NAME.md, with a column per run."""
        columns = list(map(self.column, runs))
        about = (
            f"`scripts/studies/{self.name}.py` wrote this table from runs of "
            f"`scripts/{self.script}`. {self.brackets}"
        )
        concerned = {}  # {note: columns}
        for run, column in zip(runs, columns, strict=True):
            for note in run.get("notes", ()):
                concerned.setdefault(note, []).append(column)
        for note, titles in concerned.items():
            if titles != columns:
                about += f" {'; '.join(titles)}:"
            about += f" {note}"
        texts = list(map(self.rows_of, runs))
        rows = []
        for what in texts[0]:
            rows.append([what, *(text.get(what, "-") for text in texts)])
        lines = heading(self.title, about) + table(["", *columns], rows)
        for run, column in zip(runs, columns, strict=True):
            if "command" in run:
                record = f"commit {run['code'][:10]}, {run['date']}, {run['machine']}"
                note = f" Note: {run['note']}." if "note" in run else ""
                lines.append(f"- {column}: `{run['command']}`; {record}.{note}")
        return lines

    @staticmethod
    def column(run):
        """The title of a run's column. A run replaces older ones with the same title."""
        words = [f"HOURS={run['hours']:g}"]
        if "seed" in run:
            words.append(f"seed {run['seed']}")
        if "objective" in run:
            words.append(run["objective"])
        return ", ".join(words)

    @one_line_errors()
    def main(self):
        args = self.parse_args()
        try:
            runs = list(map(self.read_run, args.runs))
        except FileNotFoundError as error:
            fail(f"{error.filename}: no such file; expected finished runs of scripts/{self.script}")
        titles = set(map(self.column, runs))
        known = read_rows(Path(args.out, f"{self.name}.json"))
        runs += [run for run in known if self.column(run) not in titles]
        defaults = {"seed": 0, "objective": ""}
        runs.sort(key=lambda run: itemgetter("hours", "seed", "objective")(defaults | run))
        write_results(args.out, self.name, self.markdown(runs), runs)


def write_results(out, name, lines, content=None):
    """Write lines to NAME.md and their numbers (`content`) to NAME.json in the folder `out`.

    Print the tables. A dict gets what `made` says as "made". The rows of a list have it already:
    see `add_rows`.
    """
    path = Path(out, f"{name}.json")
    files = {path.with_suffix(".md"): "\n".join(lines).rstrip()}
    if content is not None:
        content = stamped(path, content) if isinstance(content, dict) else content
        files[path] = json.dumps(content, indent=1)
    with file_lock(Path(out, f".{name}.lock")):  # another process may write the same
        for path, text in files.items():
            write_file(path, f"{text}\n".encode())
    for line in lines:
        if line.startswith("|"):
            say(line)
    say(f"results: {', '.join(map(str, files))}")


def stamped(path, content):
    """A dict of results with "made".

    If the file at `path` has the same numbers, they keep what it says there.
    """
    known = read_rows(path)
    record = known.pop("made", None) if isinstance(known, dict) else None
    if record is None or json.dumps(known) != json.dumps(content):
        record = made()
    return {"made": record} | content
