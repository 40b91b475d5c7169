"""Models of the arm that the study recommends, trained and scored for other questions, restartable."""

import json
import statistics
from pathlib import Path

from arms import BY_NAME, FULL, MINIATURE, Job, recipe_flags, sampling_flags
from runtime.cli import NATURAL, ArgumentParser, UserError, check_writable, fail, say
from study import file_lock, run_script


def study_parser(description, seeds):
    """The flags that the scripts of such models share."""
    parser = ArgumentParser(description=description)
    add = parser.add_argument
    add("--seeds", type=NATURAL, nargs="+", default=seeds, metavar="N", help="seeds of the training")
    add("--out", default="results", metavar="DIR", help="for the tables and the folder of the models")
    add("--compile", action="store_true", help="train with torch.compile; rounds differently")
    add("--miniature", action="store_true", help="tiny models and few steps, to try the script")
    return parser


class Trained:
    """One training run of the arm with a share of forced clips, and the manifests of its scores, all in one folder.

    tasks: what is scored, a manifest each.
    """

    arm, compute = BY_NAME["4-8-16 moving"], 1.0  # and the share of the study's compute

    def __init__(self, args, folder, seed, share, tasks):
        self.size, self.compile = MINIATURE if args.miniature else FULL, args.compile
        self.folder, self.seed, self.share, self.tasks = Path(folder), seed, share, tasks

    def manifest(self, task):
        return self.folder / f"{task.replace(',', '').replace(' ', '-')}.json"

    @property
    def is_done(self):
        return all(self.manifest(task).exists() for task in self.tasks)

    def values(self, task):
        return json.loads(self.manifest(task).read_text())["values"]

    def make_videos(self, path, *flags):
        """Moving Shapes, unless they are there; several processes may ask for them."""
        with file_lock(self.folder.parent / "lock"):
            run_script(["datasets/make_moving_shapes.py", "--out", path, *flags])

    def train(self, data):
        """Train, or continue, to the last step. Returns the path of latest.pt; raises UserError."""
        flags = recipe_flags(Job(self.arm, self.seed, self.compute), self.size)
        flags += ["--forcing", self.share, "--data-path", data]
        flags += ["--results-dir", self.folder, "--resume", "--sample-every", 0, "--ckpt-every", 1000, "--keep-last", 1]
        flags += ["--compile"] if self.compile else []
        printed = run_script(["EqM/train.py", *flags], self.folder / "train.log")
        latest = next(self.folder.glob("*/checkpoints/latest.pt"), None)
        if latest is None or "is not finite" in printed:
            raise UserError(f"{self.folder}: the training did not end well; see train.log in it")
        return latest

    @property
    def sampling_flags(self):
        return [*sampling_flags(self.size), "--seed", self.seed]

    def run_script(self, *words):
        return run_script(words, self.folder / "score.log")


def cell(values, digits):
    """Values of several seeds as text: their mean and, in brackets, the lowest and the highest."""
    ends = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{ends}" if values else ""


def run_all(args, models, write_tables):
    """Run the models that are not done and that no other process has, then write_tables() if all are done."""
    try:
        check_writable("--out", args.out)
    except UserError as error:
        fail(error)
    try:
        for model in models:
            model.folder.mkdir(parents=True, exist_ok=True)
            with file_lock(model.folder / "lock", wait=False) as is_mine:
                if is_mine and not model.is_done:
                    say(f"{model.folder.name}")
                    model.run()
        if all(model.is_done for model in models):
            write_tables()
    except (UserError, OSError) as error:
        fail(error, status=1)
