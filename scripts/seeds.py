"""How much does the quickstart depend on its seed? Trains it with several seeds and scores each on a test set.

    python scripts/seeds.py --seeds 0 1 2 3 4                       about 15 minutes of a core for each seed
    OMP_NUM_THREADS=1 GPUS=1 python scripts/seeds.py & OMP_NUM_THREADS=1 GPUS=1 python scripts/seeds.py

Runs scripts/quickstart.sh, whose variables apply here, too; then samples --clips clips of each of --num-frames, and
scores them against videos of another seed. After an interruption the same command continues; several processes share
the seeds. Table: results/seeds.md and .json; models and scores: results/seeds.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "EqM"))
sys.path.insert(0, str(Path(__file__).resolve().parent / "study"))
from runtime.atomic import atomic_write
from runtime.cli import COUNT, NATURAL, ArgumentParser, UserError, number, say
from study import ROOT, end_with_parent, file_lock, run_script
from trained import run_all

TEST_FLAGS = ["--videos-per-class", 8, "--seconds", 1.4, "--seed", 1]
COLUMNS = {"directions right (%)": "direction_accuracy", "shapes right (%)": "shape_accuracy"}


def parse_args():
    parser = ArgumentParser(description="How much does the quickstart depend on its seed? Runs and a table.")
    add = parser.add_argument
    add("--seeds", type=NATURAL, nargs="+", default=[0, 1, 2, 3, 4], metavar="N", help="values of SEED")
    add("--num-frames", type=COUNT, nargs="+", default=[4, 16, 24], metavar="N", help="frames of the clips")
    add("--clips", type=number(int, least=2), default=288, metavar="N", help="clips of each length")
    add("--out", default="results", metavar="DIR", help="for seeds.md, seeds.json and the folder of the models")
    return parser.parse_args()


class Model:
    """A quickstart with its seed, its samples and their scores, in a folder of its own."""

    def __init__(self, args, seed):
        self.args, self.seed, self.folder = args, seed, Path(args.out, "seeds", f"seed{seed}")

    @property
    def scores(self):
        """{num_frames: path of the manifest}"""
        return {frames: self.folder / f"samples-f{frames}" / "motion.json" for frames in self.args.num_frames}

    @property
    def is_done(self):
        return all(path.exists() for path in self.scores.values())

    def run(self):
        """Train, sample and score what is missing. Raises UserError."""
        data, test = (self.folder.parent / name for name in ("moving-shapes", "moving-shapes-test"))
        with file_lock(self.folder.parent / "lock"):
            run_script(["datasets/make_moving_shapes.py", "--out", test, *TEST_FLAGS])
        self.train(data)
        (best,) = ROOT.glob(f"results/{self.name}/*/checkpoints/best.pt")
        lengths, log = self.args.num_frames, self.folder / "score.log"
        folder = self.folder / ("samples" if len(lengths) > 1 else f"samples-f{lengths[0]}")  # as sample_gd.py names it
        flags = ["--num-samples", self.args.clips, "--folder", folder, "--no-previews"]
        flags += ["--precision", "bf16", "--seed", self.seed]
        run_script(["EqM/sample_gd.py", "--video", "--ckpt", best, "--num-frames", *lengths, *flags], log)
        flags = ["--data-path", test, "--split", "all", "--num-real", 96, "--num-workers", 0]
        for path in self.scores.values():
            run_script(["EqM/evaluate.py", "--metric", "motion", "--samples", path.parent, *flags, "--out", path], log)

    @property
    def name(self):
        return f"seeds/seed{self.seed}"

    def train(self, data):
        variables = {"EXP": self.name, "SEED": str(self.seed), "DATA": str(data), "FRAMES": "16", "SAMPLES": "12"}
        with open(self.folder / "quickstart.log", "a") as log:
            command = ["bash", ROOT / "scripts/quickstart.sh"]
            done = subprocess.run(
                command, env=os.environ | variables, stdout=log, stderr=log, preexec_fn=end_with_parent
            )  # fmt: skip
        if done.returncode:
            raise UserError(f"quickstart.sh ended with status {done.returncode}; see {self.folder}/quickstart.log")


def write_table(args, models):
    rows = []
    for frames in args.num_frames:
        found = [json.loads(model.scores[frames].read_text())["values"] for model in models]
        values = {title: [100 * one[name] for one in found] for title, name in COLUMNS.items()}
        rows.append({"frames": frames} | values)
    parts = ["lowest", "median", *(f"seed {seed}" for seed in args.seeds)]
    head = [f"{title}: {part}" for title in COLUMNS for part in parts]
    lines = ["# Seeds of the quickstart", "", f"Made by `scripts/seeds.py`: {args.clips} clips of each length.", ""]
    lines += [f"| frames | {' | '.join(head)} |", "|---" * (1 + len(head)) + "|"]
    for row in rows:
        numbers = [[min(row[title]), statistics.median(row[title]), *row[title]] for title in COLUMNS]
        lines.append(f"| {row['frames']} | {' | '.join(f'{value:.1f}' for cells in numbers for value in cells)} |")
    with atomic_write(Path(args.out, "seeds.json")) as file:
        file.write((json.dumps({"seeds": args.seeds, "clips": args.clips, "rows": rows}, indent=1) + "\n").encode())
    with atomic_write(Path(args.out, "seeds.md")) as file:
        file.write(("\n".join(lines) + "\n").encode())
    for line in lines[4:]:
        say(line)


def main():
    args = parse_args()
    models = [Model(args, seed) for seed in args.seeds]
    run_all(args, models, lambda: write_table(args, models))


if __name__ == "__main__":
    main()
