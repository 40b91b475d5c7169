"""Measure how much the quickstart depends on its seed: train several seeds, score on a test set.

    python scripts/studies/seeds.py --seeds 0 1 2 3 4   about 15 minutes of one core per seed
    GPUS=1 python scripts/studies/seeds.py & \
        GPUS=1 python scripts/studies/seeds.py          two processes share the runs

The script runs scripts/quickstart.sh with its default steps and batches. It samples 288 clips each
of 4, 16 and 24 frames and scores them against videos made with another seed. It writes
seeds.md and .json in results/studies/positions. Models and scores are in its folder seeds (see
lab.py).
"""

import os
import statistics
from pathlib import Path

import lab
from runtime.cli import one_line_errors

CLIPS = 288  # of each length
LENGTHS = (4, 16, 24)  # in frames
COLUMNS = {
    "direction accuracy (%)": lab.Column("direction_accuracy", 100, 1),
    "shape accuracy (%)": lab.Column("shape_accuracy", 100, 1),
}
TINY = {"STEPS_1": "1", "STEPS_2": "2", "STEPS_3": "3", "GPUS": "1", "VIDEOS": "2"}
TINY |= dict.fromkeys(("BATCH_1", "BATCH_2", "BATCH_3"), "4")


class QuickstartRun(lab.Run):
    """The quickstart's model for one seed, its samples and their scores."""

    def __init__(self, args, seed):
        self.seed = seed
        self.tiny = TINY if args.miniature else {}
        root = Path(args.out, "seeds").resolve()
        clips = 4 if self.tiny else CLIPS
        count, test_count = (2, 2) if self.tiny else (60, 8)
        data = lab.data_sets(root / "moving-shapes", count, test_count)
        self.videos, test = data
        flags = f"--num-samples {clips} --precision {lab.PRECISION} --seed {seed} --num-frames"
        super().__init__(
            root / f"seed{seed}",
            data,
            tasks={
                f"samples-f{frames}": (f"{flags} {frames}".split(), ("motion",))
                for frames in LENGTHS
            },
            metrics={
                "motion": ["--data-path", test, "--split", "all", "--num-real", min(96, clips)]
            },
        )

    def train(self):
        """Run or continue the quickstart. Returns the path of best.pt."""
        self.script(
            "scripts/quickstart.sh",
            SEED=str(self.seed),
            DATA=str(self.videos),
            FRAMES="16",
            SAMPLES="12",
            EXP=os.path.relpath(self.folder, lab.ROOT / "results"),
            **self.tiny,
        )
        return max(self.folder.glob("*/checkpoints/best.pt"), key=os.path.getmtime)


def markdown(content):
    lines = lab.heading(
        "Seeds of the quickstart",
        "`scripts/studies/seeds.py` wrote these tables. Each cell is the score of "
        f"{content['clips']} clips.",
    )
    seeds = [f"seed {seed}" for seed in content["seeds"]]
    for title in COLUMNS:
        cells = []
        for row in content["rows"]:
            values = row[title]
            numbers = [min(values), statistics.median(values), *values]
            texts = [f"{number:.1f}" for number in numbers]
            cells.append([str(row["frames"]), *texts])
        lines += lab.table(["frames", f"lowest {title}", "median", *seeds], cells)
    return lines


parse_args = lab.study_parser(__doc__, "positions", seeds=[0, 1, 2, 3, 4], trains=False).parse_args


@one_line_errors()
def main():
    args = parse_args()
    runs = [QuickstartRun(args, seed) for seed in args.seeds]
    lab.run_all(runs)
    rows = []
    for frames, task in zip(LENGTHS, runs[0].tasks, strict=True):
        rows.append({"frames": frames} | lab.collect(runs, task, COLUMNS))
    content = {"seeds": args.seeds, "clips": CLIPS, "rows": rows}
    lab.write_results(args.out, "seeds", markdown(content), content)


if __name__ == "__main__":
    main()
