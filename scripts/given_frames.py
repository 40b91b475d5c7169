"""How well does --forcing teach a model to complete clips, and what does it cost? Moving Shapes, several seeds.

    python scripts/given_frames.py --shares 0 0.75 --seeds 0 1 2         about 10 minutes of a core for each model

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
from arms import MINIATURE
from report import half_width
from runtime.atomic import atomic_write
from runtime.cli import SHARE, say
from trained import Trained, cell, run_all, study_parser

TEST_SEED, TEST_VIDEOS = 1, 24  # of the test set; per class
SECONDS = 1.4  # of a video
TASKS = {  # name in the table: flags of evaluate.py
    "8 of 16 given": "--metric prediction --num-frames 16 --given-frames 0-7",
    "8 of 16 given, no label": "--metric prediction --num-frames 16 --given-frames 0-7 --classes none",
    "4 + 4 of 16 given": "--metric prediction --num-frames 16 --given-frames 0-3,12-15",
    "4 + 4 of 16 given, no label": "--metric prediction --num-frames 16 --given-frames 0-3,12-15 --classes none",
    "1 of 16 given": "--metric prediction --num-frames 16 --given-frames 0",
    "nothing given, 16 frames": "--metric motion --num-frames 16",
    "nothing given, 24 frames at once": "--metric motion --num-frames 24 --window 24",
}
COLUMNS = {  # title: value of a manifest, factor, digits
    "direction right (%)": ("direction_accuracy", 100, 1),
    "PSNR above repeating (dB)": ("psnr_gain", 1, 1),
    "color and shape kept (%)": ("appearance_kept", 100, 1),
    "speed / true": ("speed_ratio", 1, 2),
}


def parse_args():
    parser = study_parser("How well does --forcing teach a model to complete clips? Runs and tables.", seeds=[0, 1, 2])
    shares = "values of --forcing"
    parser.add_argument("--shares", type=SHARE, nargs="+", default=[0.0, 0.75], metavar="P", help=shares)
    return parser.parse_args()


class Model(Trained):
    def __init__(self, args, share, seed):
        self.root = Path(args.out, "given-frames")
        super().__init__(args, self.root / f"forcing{share:g}-seed{seed}", seed, share, TASKS)

    @property
    def test_videos(self):
        return 2 if self.size is MINIATURE else TEST_VIDEOS  # per class

    def run(self):
        """Make the data, train and score what is missing."""
        data, test = self.root / "moving-shapes", self.root / "moving-shapes-test"
        self.make_videos(data, "--videos-per-class", self.size.videos, "--seconds", SECONDS)
        self.make_videos(test, "--videos-per-class", self.test_videos, "--seconds", SECONDS, "--seed", TEST_SEED)
        latest = self.train(data)
        for task, words in TASKS.items():
            if not self.manifest(task).exists():
                flags = ["--ckpt", latest, "--data-path", test, "--split", "all", "--num-real", 12 * self.test_videos]
                flags += [*self.sampling_flags, "--num-workers", 0, "--out", self.manifest(task)]
                self.run_script("EqM/evaluate.py", *words.split(), *flags)


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
            texts = [cell(cells.get(share, {}).get(title, []), digits) for title, (_, _, digits) in COLUMNS.items()]
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
    count = 12 * models[0].test_videos
    with atomic_write(Path(args.out, "given_frames.json")) as file:
        file.write(json.dumps({"videos": count, "seeds": args.seeds, "tasks": rows}, indent=1).encode())
    with atomic_write(Path(args.out, "given_frames.md")) as file:
        file.write(as_markdown(rows, count, len(args.seeds)).encode())
    say(f"{Path(args.out, 'given_frames.md')}")


def main():
    args = parse_args()
    models = [Model(args, share, seed) for seed in args.seeds for share in args.shares]
    run_all(args, models, lambda: write_tables(args, models))


if __name__ == "__main__":
    main()
