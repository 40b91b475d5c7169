"""Tables of experiments that a shell script ran: a column for each, in NAME.md and NAME.json."""

import itertools
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import lab
from benchmark import made
from runtime.cli import fail, one_line_errors
from runtime.metrics import read_metrics

lab.refuse_to_run(__name__, "scripts/studies/sprites.py")

# values of --metric classifier
CLASSIFIED = "clips", "right", "share", "interval95", "static", "IS", "H(y|x)", "H(y)"

# The files of a finished experiment. The functions raise FileNotFoundError.


def read_settings(name):
    """{variable: value}, as text."""
    words = shlex.split(Path("results", name, "settings").read_text())
    return dict(word.split("=", 1) for word in words if "=" in word)


def newest_metrics(name, kind):
    """The metrics rows of the newest run of this kind (VAE or EqM)."""
    folder = Path("results", name)
    names = f"[0-9]*-{kind}-*"
    newest = max(folder.glob(names), default=folder / names)
    rows, *_ = read_metrics(newest / "metrics.jsonl")
    return rows


def begin_run(name, script, tasks):
    """(what all experiments have in a run, {task: what evaluate.py wrote about its samples}).

    The command is that of the whole experiment, the commit that of the first score.
    """
    settings = read_settings(name)
    if "VAE" in settings:
        rows, *_ = read_metrics(Path(settings["VAE"]).parent / "metrics.jsonl")
    else:
        rows = newest_metrics(name, "VAE")
    vae = rows[-1]
    model = newest_metrics(name, "EqM")[-1]
    paths = {task: Path("samples", f"{name}-{task}.json") for task in tasks}
    scores = {task: json.loads(path.read_text()) for task, path in paths.items()}
    classified = scores["classifier"]["result"]
    text = Path("results", name, "settings").read_text().strip()
    run = made() | {"command": f"EXP={shlex.quote(name)} {text} bash scripts/{script}"}
    run["code"] = scores[tasks[0]].get("code") or run["code"]
    run |= {
        "hours": float(settings["HOURS"]),
        "vae_steps": vae["step"],
        "vae_psnr": vae["val_psnr"],
        "steps": model["step"],
        "minutes_of_model": model["seconds"] / 60,
    }
    for kind in ("real", "samples"):
        run[f"classifier_{kind}"] = {
            key: value for key, value in classified[kind].items() if key in CLASSIFIED
        }
    return run, scores


@dataclass
class ExperimentTable:
    """The command that adds scores of a shell script's experiments to NAME.md and NAME.json.

    read_run(name) returns a plain dict with "hours" and perhaps "seed", rows_of(run) {row of
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
        parser = lab.out_parser(self.about, self.name, f"{self.name}.md and {self.name}.json")
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
        notes = dict.fromkeys(itertools.chain.from_iterable(run.get("notes", ()) for run in runs))
        for note in notes:
            titles = [self.column(run) for run in runs if note in run.get("notes", ())]
            if titles != columns:
                about += f" {'; '.join(titles)}:"
            about += f" {note}"
        texts = list(map(self.rows_of, runs))
        rows = [[what, *(text.get(what, "-") for text in texts)] for what in texts[0]]
        lines = lab.heading(self.title, about) + lab.table(["", *columns], rows)
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
        known = lab.read_rows(Path(args.out, f"{self.name}.json"))
        runs += [run for run in known if self.column(run) not in titles]
        defaults = {"seed": 0, "objective": ""}
        runs.sort(key=lambda run: itemgetter("hours", "seed", "objective")(defaults | run))
        lab.write_results(
            args.out,
            self.name,
            lines=self.markdown(runs),
            rows=runs,
        )
