"""The study machine: runs that can be interrupted and shared, their rows, and tables of these.

A study is a list of Runs. A Run trains a model, samples from it and scores the samples with the
project's own scripts, in its own folder, and ends as a row of a json file. After an interruption,
run the same command again to continue. Start it several times to share the runs: on 2 cores, two
processes with OMP_NUM_THREADS=1 are much faster than one process with two threads.

A row has what tells it from others (such as "objective" and "seed"), how it was made, and "values":
{task: {name: number}}. The task "" is the training.
"""

import fcntl
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import runpy
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path

# Waiting threads sleep instead of spinning, here and in child processes: on a busy machine,
# spinning makes a step many times slower. Must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from scipy.special import stdtr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine import ROOT, refuse_to_run

from benchmark import machine, made
from runtime import distributed
from runtime.atomic import write_file
from runtime.cli import (
    NATURAL,
    POSITIVE,
    ArgumentParser,
    UserError,
    check_writable,
    fail,
    say,
    wrong_input,
)
from runtime.metrics import read_metrics
from scoring.stats import half95, mean_and_error

refuse_to_run(__name__, "another script in scripts/studies/")

# --precision of training and sampling. On some CPUs, bf16 is slower than fp32.
PRECISION = "bf16" if distributed.has_fast_bf16("cpu") else "fp32"
SIGNIFICANT = 0.05  # the largest p value, adjusted by `holm`, of a significant difference
FORK = multiprocessing.get_context("fork")
WAIT_SECONDS = 2.0  # between two checks for runs that other processes did not finish
USUAL_SECONDS = 600.0  # of a run, until this machine has made a row

# The command --------------------------------------------------------------------------------------


def out_parser(doc, study, what):
    """A parser with the flag --out, a folder for `what`; default: that of the study.

    doc: the docstring of the script.
    """
    parser = ArgumentParser(description=" ".join(doc.partition("\n\n")[0].split()))
    parser.add_argument(
        "--out",
        type=writable,
        default=f"results/studies/{study}",
        metavar="DIR",
        help=f"folder for {what}",
    )
    return parser


def study_parser(doc, study, seeds, trains=True, tunes=False, arms=()):
    """A parser with the flags that all studies share.

    seeds: the default of --seeds; trains: add --compile; tunes: add --tune; arms: the choices of
    --arms.
    """
    parser = out_parser(doc, study, "the tables and the runs")
    add = parser.add_argument
    add("--miniature", action="store_true", help="use tiny models, to try the script; needs --out")
    if trains:
        add(
            "--compile",
            action="store_true",
            help="train with torch.compile, which rounds differently",
        )
    add("--seeds", type=NATURAL, nargs="+", default=seeds, help="training seeds")
    add(
        "--minutes",
        type=POSITIVE,
        default=math.inf,
        help="start no run that would end after this many minutes; default: no limit",
    )
    if tunes:
        add("--tune", action="store_true", help="try all settings, instead of the main runs")
    if arms:
        add(
            "--arms",
            choices=arms,
            nargs="+",
            default=[*arms],
            metavar="ARM",
            help=f"of {', '.join(arms)}; default: all",
        )
    instead = parser.add_mutually_exclusive_group().add_argument
    instead("--list", action="store_true", help="only print how many runs are done")
    instead("--report", action="store_true", help="only write the tables, from the rows")
    return parser


def writable(folder):
    """Return a folder that can be written, or exit with an error: the `type` of --out."""
    with wrong_input():
        check_writable("--out", folder)
    return folder


def tuned_runs(args, table, cases, main_run):
    """The main runs of (seed, arm) in `cases`, with what tuning chose.

    table: the name of the tuning's json file; main_run(args, arm, seed, rows): a Run, from these
    rows.
    """
    rows = read_rows(Path(args.out, f"{table}.json"))
    runs = []
    for seed, name in cases:
        with wrong_input():
            run = main_run(args, name, seed, rows)
        runs.append(run)
    return runs


def run_study(args, runs, markdown):
    """Run what is missing and write the table of all rows. markdown(rows): its lines."""
    if args.miniature and Path(args.out).resolve().parent == Path("results/studies").resolve():
        fail(f"--miniature: its rows would join those in {args.out}; add another --out")
    is_tuning = "tune" in args and args.tune
    if is_tuning and "seeds" in args.typed:
        fail("--seeds: tuning has its own seeds; remove the flag, or --tune")
    if is_tuning and not runs:
        fail(f"--arms {args.arms[0]}: has no tuning of its own; name other arms")
    if not runs:
        fail(f"--seeds {args.seeds[0]}: these arms have other seeds; remove the flag")
    out = runs[0].out
    if args.list:
        done = sum(run.is_done for run in runs)
        say(f"{done} of {len(runs)} runs are done; {out}")
        return
    if not args.report:
        run_all(runs, args.minutes)
        finish(runs)
    rows = runs[0].rows()
    if rows:
        write_results(args.out, out.stem, markdown(rows))
    elif args.report:
        fail(f"--report: {out} has no rows; run the study without --report first")


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


def folder_name(parts):
    return re.sub("[ ,/]+", "-", "-".join(map(str, parts)))


def cpu_seconds_of_children():
    """The CPU seconds of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@contextmanager
def one_thread():
    """Measure in this process without starting torch's threads.

    They don't survive a fork, so the next script would wait for them forever.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run_script(path, flags, environment, log):
    """Run a script of the repository in this process, which a study forked for it."""
    distributed.die_with_parent(signal.SIGTERM)
    for stdout_or_stderr in (1, 2):
        os.dup2(log.fileno(), stdout_or_stderr)
    os.environ.update(environment)
    if path.suffix == ".sh":
        sys.exit(run_shell(path, flags))
    sys.argv = [str(path), *flags]
    runpy.run_path(str(path), run_name="__main__")


def run_shell(path, flags):
    """Run a shell script and return its status. All its processes get the signals that stop this
    one: the end of bash alone would leave the command that it waits for.
    """
    process = subprocess.Popen(["bash", path, *flags], process_group=0)
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, lambda number, _: os.killpg(process.pid, number))
    return process.wait()


@dataclass(eq=False)
class Run:
    """A model, its samples and their scores, in its own folder, and its row."""

    out: Path  # the json file of the rows
    about: dict  # what tells this row from others
    data: dict = field(default_factory=dict)  # {folder: flags of `maker`}
    maker: str = "datasets/make_moving_shapes.py"
    training: list = field(default_factory=list)  # flags of train.py
    last_step: int = 0
    # {name: (flags of sample_gd.py, metrics of evaluate.py)}
    tasks: dict = field(default_factory=dict)
    metrics: dict = field(default_factory=dict)  # {metric: flags of evaluate.py}
    more: dict = field(default_factory=dict)  # for the row
    place: str = "runs"  # the folder of their folders
    is_scored_last: bool = False  # with all others in one call, if a metric takes long to prepare
    read: Callable = lambda path: read_rows(path)  # reads the rows of `out`

    @property
    def folder(self):
        """Runs with the same settings share their model, whatever their table."""
        return self.out.parent / self.place / folder_name(self.about.values())

    def path(self, task, name="samples.json"):
        """The path of a file in the sample folder of a task, which also holds METRIC.json."""
        return self.folder / folder_name([task]) / name

    def rows(self):
        return self.read(self.out)

    @property
    def has_row(self):
        """Whether the rows have all tasks, which are not measured again."""
        size = self.about.get("size")
        rows = [row for row in self.rows() if row.get("size") == size]
        known = tasks_of(rows_with(self.about, rows))
        return bool(known) and self.tasks.keys() <= known.keys()

    @property
    def is_sampled(self):
        return all(self.path(task).exists() for task in self.tasks)

    @property
    def is_done(self):
        return (self.is_scored_last and self.is_sampled) or self.has_row

    def unscored(self, metric):
        """The sample folders without a score of this metric."""
        folders = []
        for task, (_, metrics) in self.tasks.items():
            path = self.path(task, f"{metric}.json")
            if metric in metrics and not path.exists():
                folders.append(path.parent)
        return folders

    def values(self, task):
        """{name: number} of all metrics of a task, the evaluations and CPU seconds of sampling."""
        samples = json.loads(self.path(task).read_text())
        values = {}
        for metric in self.tasks[task][1]:
            values |= json.loads(self.path(task, f"{metric}.json").read_text())["values"]
        values["evaluations"] = samples["mean_evaluations"]
        cost = self.path(task, "cost.json")
        if cost.exists():
            values |= json.loads(cost.read_text())
        return values

    def row(self):
        metrics, *_ = read_metrics(max(self.folder.glob("*/metrics.jsonl")))
        losses = [row["val_loss"] for row in metrics if row.get("val_loss") is not None]
        values = {"": {"val_loss": losses[-1]}}
        values |= {task: self.values(task) for task in self.tasks}
        return self.about | self.more | {"values": values}

    def checkpoint(self):
        """The path of latest.pt if the training has saved its last step, else None."""
        folder = max(self.folder.glob("*/checkpoints"), default=None)
        # metrics.jsonl may have a step that was not saved
        is_trained = folder and Path(folder, f"{self.last_step:07d}.pt").exists()
        return folder / "latest.pt" if is_trained else None

    def script(self, *words, **environment):
        """Run a script of the repository with a log in this folder.

        It stops if this process dies. Raises UserError.
        """
        name, *flags = map(str, words)
        log = self.folder / f"{Path(name).stem}.log"
        with open(log, "a") as file:
            # A fork: to import torch again would take longer than many scripts
            process = FORK.Process(target=run_script, args=(ROOT / name, flags, environment, file))
            process.start()
            try:
                process.join()
            except KeyboardInterrupt:  # the script received SIGINT, too, and saves
                process.join()
                raise
        if process.exitcode:
            last_line = log.read_text(errors="replace").strip().rpartition("\n")[2]
            raise UserError(f"{name} ended with status {process.exitcode} ({last_line}); see {log}")

    def make_data(self):
        for folder, flags in self.data.items():
            with file_lock(self.folder.parent / "lock"):
                self.script(self.maker, "--out", folder, *flags)

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

    def sample(self, ckpt, task):
        """Make the samples of a task, and note the CPU seconds if it was not interrupted."""
        folder = self.path(task).parent
        is_new = not folder.exists()
        flags, _ = self.tasks[task]
        words = ["--ckpt", ckpt, "--folder", folder, "--video", "--no-previews"]
        began = cpu_seconds_of_children()
        self.script("EqM/sample_gd.py", *words, *flags)
        if is_new:
            cost = {"cpu_seconds": cpu_seconds_of_children() - began}
            write_file(folder / "cost.json", json.dumps(cost).encode())

    def run(self):
        """Make the data, train, sample and score, skipping what is done. Raises UserError."""
        self.make_data()
        began = time.monotonic()
        try:
            ckpt = self.train()
            for task in self.tasks:
                if not self.path(task).exists():
                    self.sample(ckpt, task)
        except UserError as error:
            if "not finite" not in str(error):
                raise
            lost = {"values": {"": {"val_loss": math.inf}} | dict.fromkeys(self.tasks, {})}
            add_rows(self.out, [self.about | self.more | lost], replaces=self.about)
            return
        self.more["seconds"] = time.monotonic() - began  # since the last interruption
        if not self.is_scored_last:
            finish([self])


def run_all(runs, minutes=math.inf):
    """Run all unfinished runs, each in one process, and wait for runs of other processes.

    Starts no run that would end after `minutes`, if it takes as long as others on this machine.
    """
    end = time.monotonic() + 60 * minutes
    while waiting := [run for run in runs if not run.is_done]:
        rows = rows_with({"machine": machine()}, waiting[0].rows())
        known = [row["seconds"] for row in rows if row.get("seconds")]
        seconds = statistics.median(known) if known else USUAL_SECONDS
        for run in waiting:
            with file_lock(run.folder / "lock", wait=False) as is_mine:
                if is_mine and not run.is_done:
                    if time.monotonic() + seconds >= end:
                        say(f"a run takes about {seconds / 60:.1f} minutes; run again to continue")
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


def finish(runs):
    """Score the samples of runs that have the same metrics, all folders of a metric in one call,
    and add their rows.

    Raises UserError.
    """
    with file_lock(runs[0].folder / "score.lock"):  # another process may score the same
        runs = [run for run in runs if run.is_sampled and not run.has_row]
        if not runs:
            return
        first = runs[0]
        for metric, flags in first.metrics.items():
            folders = [folder for run in runs for folder in run.unscored(metric)]
            if folders:
                out = folders[0] / f"{metric}.json" if len(folders) == 1 else f"{metric}.json"
                words = ["--metric", metric, "--samples", *folders, "--num-workers", 0]
                first.script("EqM/evaluate.py", *words, "--out", out, *flags)
        for run in runs:
            with one_thread():
                row = run.row()
            add_rows(run.out, [row], replaces=run.about)


def data_sets(folder, count, test_count, flags=("--seconds", 1.4)):
    """The `data` of a Run: `count` videos per class in `folder`, and a test set in FOLDER-test.

    The test set has another seed.
    """
    flags = [*flags, "--videos-per-class"]
    return {
        folder: [*flags, count],
        folder.with_name(f"{folder.name}-test"): [*flags, test_count, "--seed", 1],
    }


# Rows ---------------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Column:
    """A column of a table: a value, in the unit of the table."""

    title: str
    value: str
    factor: float = 100
    digits: int = 1
    task: str = ""  # whose value it is

    def of(self, task):
        return replace(self, task=task)

    def number(self, row):
        """The column's number in a row; None if it is missing."""
        values = row["values"].get(self.task, {})
        if self.title in values:  # of an earlier version, in the unit of the table
            return values[self.title]
        value = values.get(self.value)
        return None if value is None else self.factor * value


def by_seed(rows, about, column):
    """{seed: number} of a Column, of the rows that contain the dict `about`.

    NaN for runs that diverged before they had a score.
    """
    numbers = {}
    of_arm = sorted(rows_with(about, rows), key=itemgetter("seed"))
    has_task = column.task in tasks_of(of_arm)
    for row in of_arm:
        number = column.number(row)
        loss = row["values"].get("", {}).get("val_loss", 0.0)
        if number is None and has_task and not math.isfinite(loss):
            number = math.nan
        if number is not None:
            numbers[row["seed"]] = number
    return numbers


def tasks_of(rows):
    """The names of all tasks, in their order, without the training."""
    tasks = dict.fromkeys(itertools.chain.from_iterable(row["values"] for row in rows))
    tasks.pop("", None)
    return tasks


def by_arm(rows, arms, column):
    """{arm: {seed: number}} of a Column. arms: {arm: what its rows contain}."""
    return {arm: by_seed(rows, about, column) for arm, about in arms.items()}


# Tables -------------------------------------------------------------------------------------------


def diverged_note(numbers, finite):
    """What to add to a result of the finite numbers alone, such as "; 2 of 6 diverged"."""
    lost = len(numbers) - len(finite)
    return f"; {lost} of {len(numbers)} diverged" if lost else ""


def mean_cell(values, digits):
    """A table cell of {seed: value}: mean (lowest to highest); how many diverged."""
    finite = [*filter(math.isfinite, values.values())]
    note = diverged_note(values, finite)
    if not finite:
        return note.removeprefix("; ")
    mean = f"{statistics.mean(finite):.{digits}f}"
    if len(finite) == 1:
        return mean + note
    return f"{mean} ({min(finite):.{digits}f} to {max(finite):.{digits}f}){note}"


def made_with(rows):
    """A sentence: with which precision, on which machines and by which code the rows were made."""
    kinds = []
    for name in ("precision", "machine", "code"):
        values = sorted({row.get(name, "?") for row in rows})
        if name == "code":
            values = [commit[:10] for commit in values]
        kinds.append(f"{name} {', '.join(values)}")
    return f"Made with {'; '.join(kinds)}."


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

    columns: {title: digits}; values: {title: {name: {seed: value}}}.
    """
    rows = []
    for name in names:
        cells = [mean_cell(values[title].get(name), digits) for title, digits in columns.items()]
        rows.append([name, *cells])
    return table(["", *columns], rows)


def arm_table(rows, arms, columns):
    """Lines of markdown: a row per arm that has rows, a Column per column. arms: see `by_arm`."""
    values = {column.title: by_arm(rows, arms, column) for column in columns}
    names = [name for name, about in arms.items() if rows_with(about, rows)]
    return seed_table(names, {column.title: column.digits for column in columns}, values)


def gaps_of(values, pair):
    """(differences of two arms of {arm: {seed: value}}, by seed, where both are finite; a note if
    others are not).
    """
    firsts, seconds = (values.get(arm, {}) for arm in pair)
    seeds = sorted(firsts.keys() & seconds.keys())
    gaps = [firsts[seed] - seconds[seed] for seed in seeds]
    finite = [*filter(math.isfinite, gaps)]
    return finite, diverged_note(gaps, finite)


def compare(cases):
    """A line for each difference of two arms in a table, with its p value if there are seeds.

    cases: (values {arm: {seed: value}}, pair of arms, what it is, digits). Which differences are
    significant is decided by `holm` over all of them.
    """
    differences = [gaps_of(values, pair) for values, pair, *_ in cases]
    adjusted = iter(holm([student_p(gaps) for gaps, _ in differences if len(gaps) > 1]))
    lines = []
    for (_, (first, second), what, digits), (gaps, note) in zip(cases, differences, strict=True):
        mean, error = mean_and_error(gaps)
        if mean is None:
            why = note.removeprefix("; ") or "not run yet"
            lines.append(f"- {what}, {first} minus {second}: {why}.")
            continue
        line = f"- {what}: {first} minus {second} is {mean:+.{digits}f}"
        if error is None:
            lines.append(f"{line} (one seed, no interval{note}).")
            continue
        p = next(adjusted)
        if error == 0:
            lines.append(f"{line} (the same with {len(gaps)} seeds, no interval{note}).")
            continue
        half = half95(gaps)
        interval = f"{mean - half:+.{digits}f} to {mean + half:+.{digits}f}"
        verdict = "no significant difference"
        if p <= SIGNIFICANT:
            verdict = "higher" if mean > 0 else "lower"
        lines.append(
            f"{line} (95% {interval}, {len(gaps)} seeds{note}; p {p_text(student_p(gaps))}, by "
            f"Holm {p_text(p)}): {verdict}."
        )
    return lines


def student_p(values):
    """The two-sided p value of the mean of two or more values against zero (Student's t).

    1 for equal values: shares of few clips are equal by chance, which is no proof.
    """
    mean, error = mean_and_error(values)
    if error == 0:
        return 1.0
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


def p_text(p):
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def write_results(out, name, lines, rows=None):
    """Write lines to NAME.md, and rows to NAME.json, in the folder `out`. Print the tables."""
    path = Path(out, f"{name}.md")
    files = {path: "\n".join(lines).rstrip()}
    if rows is not None:
        files[path.with_suffix(".json")] = json.dumps(rows, indent=1)
    with file_lock(Path(out, f".{name}.lock")):  # another process may write the same
        for path, text in files.items():
            write_file(path, f"{text}\n".encode())
    for line in lines:
        if line.startswith("|"):
            say(line)
    say(f"results: {', '.join(map(str, files))}")
