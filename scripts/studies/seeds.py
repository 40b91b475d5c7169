"""Measure how the quickstart's accuracies vary over seeds: train and score it on a test set.

    python scripts/studies/seeds.py --seeds 0 1 2 3 4   about 15 minutes of one core per seed
    GPUS=1 python scripts/studies/seeds.py & \
        GPUS=1 python scripts/studies/seeds.py          two processes share the runs

The script runs scripts/quickstart.sh with its default steps and batches. It samples 288 clips each
of 4, 16 and 24 frames and scores them against videos made with another seed. It writes
seeds.md and .json in results/studies/positions. Models and scores are in its folder runs (see
lab.py).
"""

import os
import statistics
from pathlib import Path

import lab
from runtime.cli import one_line_errors

CLIPS = 288  # of each length
LENGTHS = ("4", "16", "24")  # in frames
COLUMNS = (
    lab.Column("direction accuracy (%)", "direction_accuracy"),
    lab.Column("shape accuracy (%)", "shape_accuracy"),
)
TINY = {"STEPS_1": "1", "STEPS_2": "2", "STEPS_3": "3", "GPUS": "1", "VIDEOS": "2"}
TINY |= dict.fromkeys(("BATCH_1", "BATCH_2", "BATCH_3"), "4")


class QuickstartRun(lab.Run):
    """The quickstart's model for one seed, its samples and their scores."""

    def train(self):
        """Run or continue the quickstart. Returns the path of best.pt."""
        videos, _ = self.data
        self.script(
            "scripts/quickstart.sh",
            SEED=str(self.about["seed"]),
            DATA=str(videos),
            FRAMES="16",
            SAMPLES="12",
            EXP=os.path.relpath(self.folder, lab.ROOT / "results"),
            **self.training,
        )
        return max(self.folder.glob("*/checkpoints/best.pt"), key=os.path.getmtime)


def make_run(args, seed):
    clips = 4 if args.miniature else CLIPS
    count, test_count = (2, 2) if args.miniature else (60, 8)
    root = Path(args.out).resolve()
    data = lab.data_sets(root / "runs/quickstart-shapes", count, test_count)
    _, test = data
    flags = f"--num-samples {clips} --precision {lab.PRECISION} --seed {seed} --num-frames"
    return QuickstartRun(
        out=root / "seeds.json",
        about={"seed": seed},
        place="runs/quickstart",
        data=data,
        tasks={frames: (f"{flags} {frames}".split(), ("motion",)) for frames in LENGTHS},
        metrics={"motion": ["--data-path", test, "--split", "all", "--num-real", min(96, clips)]},
        training=TINY if args.miniature else {},  # variables of quickstart.sh
    )


def markdown(rows):
    lines = lab.heading(
        "Seeds of the quickstart",
        f"`scripts/studies/seeds.py` wrote these tables. Each cell is the score of {CLIPS} clips.",
    )
    seeds = [f"seed {row['seed']}" for row in rows]
    for column in COLUMNS:
        cells = []
        for frames in LENGTHS:
            values = lab.by_seed(rows, {}, column.of(frames)).values()
            numbers = [min(values), statistics.median(values), *values]
            cells.append([frames, *(f"{number:.1f}" for number in numbers)])
        lines += lab.table(["frames", f"lowest {column.title}", "median", *seeds], cells)
    return lines


parse_args = lab.study_parser(
    __doc__,
    "positions",
    seeds=[*range(5)],
    trains=False,
).parse_args


@one_line_errors()
def main():
    args = parse_args()
    lab.run_study(args, [make_run(args, seed) for seed in args.seeds], markdown)


if __name__ == "__main__":
    main()
