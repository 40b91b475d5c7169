"""How much does the quickstart depend on its seed? Trains it with several seeds and scores each on a test set.

    python scripts/seeds.py --seeds 0 1 2 3 4                       about 15 minutes of a core for each seed
    OMP_NUM_THREADS=1 GPUS=1 python scripts/seeds.py & OMP_NUM_THREADS=1 GPUS=1 python scripts/seeds.py

Runs scripts/quickstart.sh with its default steps and batches, samples 288 clips of 4, 16 and 24 frames, and scores them
against videos of another seed. After an interruption the same command continues; several processes share the seeds.
Table: results/seeds.md and .json; models and scores: results/seeds.
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
from runtime.cli import NATURAL, ArgumentParser, UserError, say
from study import ROOT, end_with_parent, file_lock, run_script
from trained import run_all

CLIPS, LENGTHS = 288, (4, 16, 24)  # clips of each number of frames
DATA = {"moving-shapes": ["--videos-per-class", 60], "moving-shapes-test": ["--videos-per-class", 8, "--seed", 1]}
COLUMNS = {"directions right (%)": "direction_accuracy", "shapes right (%)": "shape_accuracy"}


def parse_args():
    parser = ArgumentParser(description="How much does the quickstart depend on its seed? Runs and a table.")
    parser.add_argument("--seeds", type=NATURAL, nargs="+", default=[0, 1, 2, 3, 4], metavar="N", help="values of SEED")
    return parser.parse_args()


class Model:
    """A quickstart with its seed, its samples and their scores, in a folder of its own."""

    def __init__(self, out, seed):
        self.seed, self.folder = seed, Path(out, "seeds", f"seed{seed}")
        self.scores = {frames: self.folder / f"samples-f{frames}" / "motion.json" for frames in LENGTHS}

    @property
    def is_done(self):
        return all(path.exists() for path in self.scores.values())

    def run(self):
        """Make the data, train, sample and score what is missing. Raises UserError."""
        with file_lock(self.folder.parent / "lock"):
            for name, flags in DATA.items():
                place = self.folder.parent / name
                run_script(["datasets/make_moving_shapes.py", "--out", place, "--seconds", 1.4, *flags])
        best, log = self.train(), self.folder / "score.log"
        flags = ["--num-samples", CLIPS, "--folder", self.folder / "samples", "--no-previews"]
        flags += ["--precision", "bf16", "--seed", self.seed]
        run_script(["EqM/sample_gd.py", "--video", "--ckpt", best, "--num-frames", *LENGTHS, *flags], log)
        flags = ["--data-path", place, "--split", "all", "--num-real", 96, "--num-workers", 0]
        for path in self.scores.values():
            run_script(["EqM/evaluate.py", "--metric", "motion", "--samples", path.parent, *flags, "--out", path], log)

    def train(self):
        """Train, or continue. Returns the path of best.pt."""
        variables = {"EXP": f"seeds/seed{self.seed}", "SEED": str(self.seed), "FRAMES": "16", "SAMPLES": "12"}
        variables |= {"DATA": str(self.folder.parent / "moving-shapes")}
        command, environment = ["bash", ROOT / "scripts/quickstart.sh"], os.environ | variables
        with open(self.folder / "quickstart.log", "a") as log:
            done = subprocess.run(command, env=environment, stdout=log, stderr=log, preexec_fn=end_with_parent)
        if done.returncode:
            raise UserError(f"quickstart.sh ended with status {done.returncode}; see {self.folder}/quickstart.log")
        return max(self.folder.glob("*/checkpoints/best.pt"), key=os.path.getmtime)


def write_table(out, models):
    rows, parts = [], ["lowest", "median", *(f"seed {model.seed}" for model in models)]
    for frames in LENGTHS:
        found = [json.loads(model.scores[frames].read_text())["values"] for model in models]
        values = {title: [100 * one[name] for one in found] for title, name in COLUMNS.items()}
        rows.append({"frames": frames} | values)
    lines = ["# Seeds of the quickstart", "", f"Made by `scripts/seeds.py`: {CLIPS} clips of each number of frames."]
    for title in COLUMNS:
        lines += ["", f"| frames | {title}: {' | '.join(parts)} |", "|---" * (1 + len(parts)) + "|"]
        for row in rows:
            cells = min(row[title]), statistics.median(row[title]), *row[title]
            lines.append(f"| {row['frames']} | {' | '.join(f'{value:.1f}' for value in cells)} |")
    with atomic_write(Path(out, "seeds.json")) as file:
        content = {"seeds": [model.seed for model in models], "clips": CLIPS, "rows": rows}
        file.write((json.dumps(content, indent=1) + "\n").encode())
    with atomic_write(Path(out, "seeds.md")) as file:
        file.write(("\n".join(lines) + "\n").encode())
    for line in lines[4:]:
        say(line)


def main():
    args, out = parse_args(), ROOT / "results"
    args.out, models = out, [Model(out, seed) for seed in args.seeds]
    run_all(args, models, lambda: write_table(out, models))


if __name__ == "__main__":
    main()
