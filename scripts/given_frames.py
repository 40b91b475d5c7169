"""How well does --forcing teach a model to complete clips, and what does it cost? Moving Shapes, several seeds.

    python scripts/given_frames.py --shares 0 0.5 --seeds 0 1 2         about 10 minutes of a core for each model

Trains the curriculum that the study recommends with a share of forced clips, and scores it on a test set of its own,
288 videos of another seed: completions of clips by evaluate.py --metric prediction, and clips of which nothing is given
by --metric motion. After an interruption the same command continues; several processes share the models. Tables:
results/given_frames.md and .json; models and manifests: results/given-frames.
"""

import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "EqM"))
sys.path.insert(0, str(Path(__file__).resolve().parent / "study"))
from arms import BY_NAME, FULL, GUIDANCE, MINIATURE, PATH_LENGTH, Job, recipe_flags
from report import half_width
from runtime.atomic import atomic_write
from runtime.cli import NATURAL, SHARE, ArgumentParser, UserError, check_writable, fail, say
from study import file_lock, run_script

ARM = BY_NAME["4-8-16 moving"]
TEST_SEED, TEST_VIDEOS = 1, 24  # of the test set; per class
SECONDS = 1.4  # of a video
TASKS = {  # name in the table: flags of evaluate.py
    "8 of 16 given": "--metric prediction --num-frames 16 --given-frames 0-7",
    "8 of 16 given, no label": "--metric prediction --num-frames 16 --given-frames 0-7 --classes none",
    "4 + 4 of 16 given": "--metric prediction --num-frames 16 --given-frames 0-3,12-15",
    "4 + 4 of 16 given, no label": "--metric prediction --num-frames 16 --given-frames 0-3,12-15 --classes none",
    "1 of 16 given": "--metric prediction --num-frames 16 --given-frames 0",
    "nothing given, 16 frames": "--metric motion --num-frames 16",
    "nothing given, 24 frames": "--metric motion --num-frames 24",
}
COLUMNS = {  # title: value of a manifest, factor, digits
    "direction right (%)": ("direction_accuracy", 100, 1),
    "PSNR above repeating (dB)": ("psnr_gain", 1, 1),
    "color and shape kept (%)": ("appearance_kept", 100, 1),
    "speed / true": ("speed_ratio", 1, 2),
}


def parse_args():
    parser = ArgumentParser(description="How well does --forcing teach a model to complete clips? Runs and tables.")
    add = parser.add_argument
    add("--shares", type=SHARE, nargs="+", default=[0.0, 0.5], metavar="P", help="values of --forcing")
    add("--seeds", type=NATURAL, nargs="+", default=[0, 1, 2], metavar="N", help="seeds of the training")
    add("--out", default="results", metavar="DIR", help="for the tables and the folder given-frames")
    add("--compile", action="store_true", help="train with torch.compile; rounds differently")
    add("--miniature", action="store_true", help="tiny models and few steps, to try the script")
    return parser.parse_args()


class Model:
    """One training run of the arm, and its manifests."""

    def __init__(self, args, share, seed):
        self.size = MINIATURE if args.miniature else FULL
        self.root, self.share, self.compile = Path(args.out, "given-frames"), share, args.compile
        self.folder, self.job = self.root / f"forcing{share:g}-seed{seed}", Job(ARM, seed, 1.0)

    @property
    def videos(self):
        return self.size.videos, 0, self.root / "moving-shapes"

    @property
    def test_videos(self):
        return (2 if self.size is MINIATURE else TEST_VIDEOS), TEST_SEED, self.root / "moving-shapes-test"

    def manifest(self, task):
        return self.folder / f"{task.replace(',', '').replace(' ', '-')}.json"

    @property
    def is_done(self):
        return all(self.manifest(task).exists() for task in TASKS)

    def run(self):
        """Make the data, train and score what is missing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with file_lock(self.root / "lock"):
            for count, seed, path in (self.videos, self.test_videos):
                flags = ["--videos-per-class", count, "--seconds", SECONDS, "--seed", seed]
                run_script(["datasets/make_moving_shapes.py", "--out", path, *flags])
        flags = [*recipe_flags(self.job, self.size), "--forcing", self.share, "--data-path", self.videos[2]]
        flags += ["--results-dir", self.folder, "--resume", "--sample-every", 0, "--ckpt-every", 1000, "--keep-last", 1]
        flags += ["--compile"] if self.compile else []
        printed = run_script(["EqM/train.py", *flags], self.folder / "train.log")
        latest = next(self.folder.glob("*/checkpoints/latest.pt"), None)
        if latest is None or "is not finite" in printed:
            raise UserError(f"{self.folder}: the training did not end well; see train.log in it")
        for task, words in TASKS.items():
            if not self.manifest(task).exists():
                self.score(latest, task, words)

    def score(self, ckpt, task, words):
        size, count = self.size, 12 * self.test_videos[0]
        flags = ["--ckpt", ckpt, "--data-path", self.test_videos[2], "--split", "all", "--num-real", count]
        flags += ["--sampler", "ngd", "--num-sampling-steps", size.points, "--cfg-scale", GUIDANCE]
        flags += ["--stepsize", f"{PATH_LENGTH / (size.points - 1):.4g}", "--seed", self.job.seed]
        flags += ["--precision", "bf16", "--num-workers", 0]
        log = self.folder / "evaluate.log"
        run_script(["EqM/evaluate.py", *words.split(), *flags, "--out", self.manifest(task)], log)

    def values(self, task):
        return json.loads(self.manifest(task).read_text())["values"]


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def table(models):
    """{task: {share: {title: the values of its seeds}}}"""
    rows = {}
    for task in TASKS:
        for model in models:
            cell = rows.setdefault(task, {}).setdefault(f"{model.share:g}", {})
            for title, (name, factor, _) in COLUMNS.items():
                value = model.values(task).get(name)
                if value is not None:
                    cell.setdefault(title, []).append(factor * value)
    return rows


def as_markdown(rows, count, seeds):
    """The tables as text: mean over the seeds and, in brackets, their lowest and highest value."""
    lines = ["# Given frames", "", "Made by `scripts/given_frames.py`: the study's 4-8-16 recipe with shares of forced"]
    lines += [f"clips (`--forcing`), {count} test videos, {seeds} seeds each. Mean over the seeds (lowest to highest)."]
    for share in dict.fromkeys(share for cells in rows.values() for share in cells):
        lines += ["", f"## --forcing {share}", "", f"| | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
        for task, cells in rows.items():
            texts = []
            for title, (_, _, digits) in COLUMNS.items():
                values = cells.get(share, {}).get(title)
                ends = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if values and len(values) > 1 else ""
                texts.append(f"{statistics.mean(values):.{digits}f}{ends}" if values else "")
            lines.append(f"| {task} | {' | '.join(texts)} |")
    return "\n".join([*lines, *difference_lines(rows)]) + "\n"


def difference_lines(rows):
    """What forcing costs where nothing is given: the difference of each share to 0, seed by seed."""
    lines, title = [], "direction right (%)"
    for task, cells in rows.items():
        for share in cells if task.startswith("nothing") and "0" in cells else ():
            pairs = list(zip(cells[share][title], cells["0"][title], strict=True))
            if share != "0":
                gaps = [own - other for own, other in pairs]
                mean, half = statistics.mean(gaps), half_width(gaps)
                spread = "" if half is None else f" ({mean - half:+.1f} to {mean + half:+.1f})"
                lines.append(f"- {task}, --forcing {share} minus 0: {mean:+.1f} points{spread}")
    return ["", "95% intervals by Student's t over the seeds:", "", *lines] if lines else []


def write_tables(args, models):
    rows = table(models)
    count = 12 * models[0].test_videos[0]
    with atomic_write(Path(args.out, "given_frames.json")) as file:
        file.write(json.dumps({"videos": count, "seeds": args.seeds, "tasks": rows}, indent=1).encode())
    with atomic_write(Path(args.out, "given_frames.md")) as file:
        file.write(as_markdown(rows, count, len(args.seeds)).encode())


def main():
    args = parse_args()
    try:
        check_writable("--out", args.out)
    except UserError as error:
        fail(error)
    models = [Model(args, share, seed) for seed in args.seeds for share in args.shares]
    try:
        for model in models:
            model.folder.mkdir(parents=True, exist_ok=True)
            with file_lock(model.folder / "lock", wait=False) as is_mine:
                if is_mine and not model.is_done:
                    say(f"{model.folder.name}")
                    model.run()
        if all(model.is_done for model in models):
            write_tables(args, models)
            say(f"{Path(args.out, 'given_frames.md')}")
    except (UserError, OSError) as error:
        fail(error, status=1)


if __name__ == "__main__":
    main()
