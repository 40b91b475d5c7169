"""Measure how much the quickstart depends on its seed: train several seeds, score on a test set.

    python scripts/studies/seeds.py --seeds 0 1 2 3 4   about 15 minutes of one core per seed
    GPUS=1 python scripts/studies/seeds.py & \
        GPUS=1 python scripts/studies/seeds.py          two processes share the runs

The script runs scripts/quickstart.sh with its default steps and batches. It samples 288 clips each
of 4, 16 and 24 frames and scores them against videos made with another seed. It writes
results/seeds.md and .json. Models and scores are in results/seeds (see lab.py).
"""

import os
import statistics
from pathlib import Path

import lab
from runtime.cli import one_line_errors

# clips of each length; frames
CLIPS = 288
LENGTHS = (4, 16, 24)
# Title: (value of a manifest, factor, digits)
COLUMNS = {
    "direction accuracy (%)": ("direction_accuracy", 100, 1),
    "shape accuracy (%)": ("shape_accuracy", 100, 1),
}
TINY = {"STEPS_1": "1", "STEPS_2": "2", "STEPS_3": "3", "GPUS": "1", "VIDEOS": "2"}
TINY |= dict.fromkeys(("BATCH_1", "BATCH_2", "BATCH_3"), "4")


class QuickstartRun(lab.Run):
    """The quickstart's model for one seed, its samples and their scores."""

    def __init__(self, args, seed):
        self.seed = seed
        self.tiny = TINY if args.miniature else {}
        root = Path(args.out, "seeds").resolve()
        clips, *counts = (4, 2, 2) if self.tiny else (CLIPS, 60, 8)
        data = lab.data_sets(root / "moving-shapes", *counts, "--seconds", 1.4)
        self.videos, test = data
        flags = [
            "--num-samples",
            clips,
            "--precision",
            lab.PRECISION,
            "--seed",
            seed,
            "--num-frames",
        ]
        super().__init__(
            root / f"seed{seed}",
            data,
            tasks={f"samples-f{frames}": ([*flags, frames], ("motion",)) for frames in LENGTHS},
            metrics={
                "motion": ["--data-path", test, "--split", "all", "--num-real", min(96, clips)]
            },
        )

    def train(self):
        """Run or continue the quickstart. Returns the path of best.pt."""
        variables = {
            "SEED": str(self.seed),
            "DATA": str(self.videos),
            "FRAMES": "16",
            "SAMPLES": "12",
        }
        variables |= {"EXP": os.path.relpath(self.folder, lab.ROOT / "results")}
        self.script("scripts/quickstart.sh", **variables, **self.tiny)
        return max(self.folder.glob("*/checkpoints/best.pt"), key=os.path.getmtime)


def markdown(content):
    about = (
        "`scripts/studies/seeds.py` wrote these tables. Each cell is the score of "
        f"{content['clips']} clips."
    )
    lines, seeds = (
        ["# Seeds of the quickstart", "", about, ""],
        [f"seed {seed}" for seed in content["seeds"]],
    )
    for title in COLUMNS:
        rows = {row["frames"]: row[title] for row in content["rows"]}
        rows = {
            frames: (min(values), statistics.median(values), *values)
            for frames, values in rows.items()
        }
        cells = [
            [str(frames), *(f"{value:.1f}" for value in values)] for frames, values in rows.items()
        ]
        lines += lab.table(["frames", f"lowest {title}", "median", *seeds], cells)
    return lines


parse_args = lab.study_parser(__doc__, seeds=[0, 1, 2, 3, 4], trains=False).parse_args


@one_line_errors()
def main():
    args = parse_args()
    runs = [QuickstartRun(args, seed) for seed in args.seeds]
    lab.run_all(runs)
    tasks = zip(LENGTHS, runs[0].tasks, strict=True)
    rows = [{"frames": frames} | lab.collect(runs, task, COLUMNS) for frames, task in tasks]
    content = {"seeds": args.seeds, "clips": CLIPS, "rows": rows}
    lab.write_results(args.out, "seeds", markdown(content), content)


if __name__ == "__main__":
    main()
