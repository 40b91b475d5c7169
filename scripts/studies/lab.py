"""What the studies share: runs that continue after a kill and that several processes can share, and tables.

A Run trains a model, samples from it and scores the samples with the project's own scripts, in a folder of its own. The
same command continues after an interruption. Start it several times to share the runs between processes: on 2 cores,
two with OMP_NUM_THREADS=1 are much faster than one with two threads.
"""

import fcntl
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

# Let waiting threads sleep instead of spin, here and in child processes: beside other work on the machine, a step with
# spinning threads takes many times as long. Must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from scipy.special import stdtrit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "EqM"))

from runtime import distributed
from runtime.atomic import atomic_write
from runtime.cli import NATURAL, ArgumentParser, UserError, check_writable, fail, say
from runtime.metrics import read_metrics
from scoring.stats import cell, mean_and_error  # noqa: F401 (cell: for people.py)

ROOT = Path(__file__).resolve().parents[2]
WAIT_SECONDS = 2.0  # before looking again for runs that other processes left


def study_parser(doc, seeds=None, trains=True):
    """A parser with the flags that studies share; `seeds` is the default of --seeds."""
    parser = ArgumentParser(description=doc.partition("\n")[0])
    add = parser.add_argument
    add("--out", type=writable, default="results", metavar="DIR", help="for the tables and the folder of the runs")
    add("--miniature", action="store_true", help="tiny models and few steps, to try the script")
    if trains:
        add("--compile", action="store_true", help="train with torch.compile; rounds differently")
    if seeds is not None:
        add("--seeds", type=NATURAL, nargs="+", default=seeds, help="seeds of the training")
    return parser


def writable(folder):
    """The `type` of --out."""
    try:
        check_writable("--out", folder)
    except UserError as error:
        fail(error)
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# Runs


@contextmanager
def file_lock(path, wait=True):
    """Lock a file against other processes, until the context or this process ends. Yields whether it is locked."""
    with open(path, "a") as file:
        is_locked = False
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            is_locked = True
        yield is_locked


def script(*words, log, **environment):
    """Run a script of the repository, which is stopped if this process dies. What it prints is added to the log.

    Returns its peak memory in MiB. Raises UserError if it fails.
    """
    command = map(str, ["bash" if words[0].endswith(".sh") else sys.executable, ROOT / words[0], *words[1:]])
    with open(log, "a") as file:
        streams, on_its_death = {"stdout": file, "stderr": file}, partial(distributed.die_with_parent, signal.SIGTERM)
        process = subprocess.Popen(list(command), **streams, env=os.environ | environment, preexec_fn=on_its_death)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except KeyboardInterrupt:  # the script has received SIGINT as well and saves
            process.wait()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last_line = Path(log).read_text(errors="replace").strip().rpartition("\n")[2]
        raise UserError(f"{words[0]} ended with status {process.returncode} ({last_line}); see {log}")
    return usage.ru_maxrss / 1024


@dataclass(eq=False)
class Run:
    """A model, its samples and their scores, in a folder of its own."""

    folder: Path
    data: dict = field(default_factory=dict)  # {folder: flags of make_moving_shapes.py}
    training: list = field(default_factory=list)  # flags of train.py
    last_step: int = 0
    tasks: dict = field(default_factory=dict)  # {name: (flags of sample_gd.py, metrics of evaluate.py)}
    metrics: dict = field(default_factory=dict)  # {metric: flags of evaluate.py}

    def path(self, task, name="samples.json"):
        """A file in the folder of the samples of a task, where its scores are, too: METRIC.json."""
        return self.folder / task.replace(",", "").replace(" ", "-") / name

    def unscored(self, metric):
        """The folders of the samples that a metric has not scored yet."""
        paths = [self.path(task, f"{metric}.json") for task, (_, metrics) in self.tasks.items() if metric in metrics]
        return [path.parent for path in paths if not path.exists()]

    @property
    def is_done(self):
        return not any(map(self.unscored, self.metrics))

    def estimate(self):
        """About the seconds that the missing parts take."""
        return 0.0

    def scores(self, task, metric):
        """The manifest that evaluate.py has written."""
        return json.loads(self.path(task, f"{metric}.json").read_text())

    def values(self, task):
        """The values of all metrics of a task, by name."""
        found = {}
        for metric in self.tasks[task][1]:
            found |= self.scores(task, metric)["values"]
        return found

    def validations(self):
        """The rows of metrics.jsonl that have a validation."""
        rows = [row for path in sorted(self.folder.glob("*/metrics.jsonl"))[-1:] for row in read_metrics(path)[0]]
        return [row for row in rows if row.get("val_loss") is not None]

    def checkpoint(self):
        """The path of latest.pt if the training has reached its last step, else None."""
        is_trained = any(row["step"] == self.last_step for row in self.validations())
        return next(self.folder.glob("*/checkpoints/latest.pt"), None) if is_trained else None

    def script(self, *words, **environment):
        return script(*words, log=self.folder / f"{Path(words[0]).stem}.log", **environment)

    def make_data(self):
        for folder, flags in self.data.items():
            with file_lock(self.folder.parent / "lock"):
                self.script("datasets/make_moving_shapes.py", "--out", folder, *flags)

    def train(self):
        """Train, or continue, to the last step. Returns the path of latest.pt. Raises UserError."""
        if self.checkpoint() is None:
            flags = ["--results-dir", self.folder, "--resume", "--log-every", self.last_step, "--sample-every", 0]
            self.script("EqM/train.py", *self.training, *flags, "--ckpt-every", 250, "--keep-last", 1)
        if self.checkpoint() is None:
            raise UserError(f"{self.folder}: the training was stopped: run the same command to continue")
        return self.checkpoint()

    def sample(self, ckpt):
        for task, (flags, _) in self.tasks.items():
            if not self.path(task).exists():
                words = ["--video", "--ckpt", ckpt, "--folder", self.path(task).parent, "--no-previews"]
                self.script("EqM/sample_gd.py", *words, *flags)

    def score(self):
        for metric, flags in self.metrics.items():
            if folders := self.unscored(metric):
                out = f"{metric}.json" if len(folders) > 1 else folders[0] / f"{metric}.json"
                words = ["--metric", metric, "--samples", *folders, "--num-workers", 0, "--out", out]
                self.script("EqM/evaluate.py", *words, *flags)

    def run(self):
        """Make, train, sample and score what is missing. Raises UserError."""
        self.make_data()
        self.sample(self.train())
        self.score()


def run_all(runs, minutes=math.inf):
    """Run what is not done, each run by one process, and wait for those of other processes.

    No run is started that would end after so many minutes, by its estimate.
    """
    end = time.monotonic() + 60 * minutes
    while waiting := [run for run in runs if not run.is_done]:
        for run in waiting:
            run.folder.mkdir(parents=True, exist_ok=True)
            with file_lock(run.folder / "lock", wait=False) as is_mine:
                if is_mine and not run.is_done:
                    if time.monotonic() + run.estimate() >= end:
                        say(f"{run.folder.name} takes about {run.estimate() / 60:.1f} minutes: run again to continue")
                        return
                    say(f"{len(waiting)} runs to do; {run.folder.name}")
                    run.run()
                    break
        else:
            if time.monotonic() >= end:
                say("other processes run the rest: run again to continue")
                return
            time.sleep(WAIT_SECONDS)
    say("all is done")


def data_sets(folder, count, test_count, *flags):
    """The `data` of a Run: so many videos per class in a folder, and a test set of another seed in FOLDER-test."""
    flags = [*flags, "--videos-per-class"]
    return {folder: [*flags, count], folder.with_name(f"{folder.name}-test"): [*flags, test_count, "--seed", 1]}


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def half_width(values):
    """Half the width of the 95% interval of the mean (Student's t); None for fewer than two values."""
    _, error = mean_and_error(values)
    return None if error is None else float(stdtrit(len(values) - 1, 0.975)) * error


def mean_cell(values, digits):
    """Values of several seeds as text: their mean and, in brackets, the lowest and the highest."""
    ends = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{ends}" if values else ""


def table(titles, rows):
    """Lines of markdown: a table of texts, and an empty line."""
    head = " ".join(f"| {title}".strip() for title in titles)
    return [f"{head} |", "|---" * len(titles) + "|", *(f"| {' | '.join(row)} |" for row in rows), ""]


def collect(runs, task, columns):
    """{title: what the runs have of it, in units of the table} of columns {title: (value, factor, digits)}."""
    values = [run.values(task) for run in runs]
    return {
        title: [factor * own[name] for own in values if own.get(name) is not None]
        for title, (name, factor, _) in columns.items()
    }


def seed_table(rows, columns):
    """Lines of markdown: a table of {name of a row: what `collect` has found}."""
    return table(["", *columns], [
        [name, *(mean_cell(found.get(title, []), digits) for title, (_, _, digits) in columns.items())]
        for name, found in rows.items()
    ])  # fmt: skip


def write_results(out, name, lines, content=None):
    """Write lines to NAME.md and the content they are made of to NAME.json in the folder `out`; print the tables."""
    files = {Path(out, f"{name}.md"): "\n".join(lines).rstrip()}
    if content is not None:
        files[Path(out, f"{name}.json")] = json.dumps(content, indent=1)
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(f"{text}\n".encode())
    for line in lines:
        if line.startswith("|"):
            say(line)
    say(f"results: {', '.join(map(str, files))}")
