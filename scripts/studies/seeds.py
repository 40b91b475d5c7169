"""How do the quickstart's accuracies vary over seeds, and which training shift suits it?

    python scripts/studies/seeds.py               5 seeds of two shifts, 10 minutes of one core each
    GPUS=1 python scripts/studies/seeds.py & \
        GPUS=1 python scripts/studies/seeds.py    two processes share the runs

The script runs scripts/quickstart.sh with its default steps and batches. It samples 288 clips each
of 4, 16 and 24 frames and scores them against videos made with another seed. Fixed before the runs:
a shift needs at least 90% of the directions and 85% of the shapes right with each seed and length.
If both have that, the better one has more clips with the right direction and shape, as the mean
over seeds and lengths. The script writes seeds.md and .json in results/studies/positions. Models
and scores are in its folder runs (see lab.py).
"""

import itertools
import os
import statistics
from pathlib import Path

import lab
from runtime.cli import one_line_errors
from shapes import BOTH_RIGHT

SHIFTS = (1, 2)  # --gamma-shift of training
CLIPS = 288  # of each length
LENGTHS = ("4", "16", "24")  # in frames
COLUMNS = (
    lab.Column("direction accuracy (%)", "direction_accuracy"),
    lab.Column("shape accuracy (%)", "shape_accuracy"),
)
TINY = {"STEPS_1": "1", "STEPS_2": "2", "STEPS_3": "3", "GPUS": "1", "VIDEOS": "2"}
TINY |= dict.fromkeys(("BATCH_1", "BATCH_2", "BATCH_3"), "4")


class QuickstartRun(lab.Run):
    """The quickstart's model for one seed and shift, its samples and their scores."""

    def train(self):
        """Run or continue the quickstart. Returns the path of best.pt."""
        videos, _ = self.data
        self.script(
            "scripts/quickstart.sh",
            SEED=str(self.about["seed"]),
            GAMMA_SHIFT=str(self.about["shift"]),
            DATA=str(videos),
            FRAMES="16",
            SAMPLES="12",
            EXP=os.path.relpath(self.folder, lab.ROOT / "results"),
            **self.training,
        )
        return max(self.folder.glob("*/checkpoints/best.pt"), key=os.path.getmtime)


def make_run(args, seed, shift):
    clips = 4 if args.miniature else CLIPS
    count, test_count = (2, 2) if args.miniature else (60, 8)
    root = Path(args.out).resolve()
    data = lab.data_sets(root / "runs/quickstart-shapes", count, test_count)
    _, test = data
    flags = f"--num-samples {clips} --precision {lab.PRECISION} --seed {seed} --num-frames"
    return QuickstartRun(
        out=root / "seeds.json",
        about={"seed": seed, "shift": shift},
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
    seeds = dict.fromkeys(row["seed"] for row in rows)
    for column in COLUMNS:
        cells = []
        for frames, shift in itertools.product(LENGTHS, SHIFTS):
            values = lab.by_seed(rows, {"shift": shift}, column.of(frames))
            if values:
                numbers = [min(values.values()), statistics.median(values.values())]
                numbers += [values.get(seed) for seed in seeds]
                texts = ["" if number is None else f"{number:.1f}" for number in numbers]
                cells.append([frames, str(shift), *texts])
        titles = ["frames", "training shift", f"lowest {column.title}", "median"]
        lines += lab.table([*titles, *(f"seed {seed}" for seed in seeds)], cells)
    arms = {f"shift {shift}": {"shift": shift} for shift in SHIFTS}
    cases = []
    for frames in LENGTHS:
        values = lab.by_arm(rows, arms, BOTH_RIGHT.of(frames))
        cases.append((values, tuple(arms), f"{BOTH_RIGHT.title}, {frames} frames", 2))
    return [*lines, *lab.compare(cases)]


parse_args = lab.study_parser(
    __doc__,
    "positions",
    seeds=[*range(5)],
    trains=False,
).parse_args


@one_line_errors()
def main():
    args = parse_args()
    runs = [make_run(args, seed, shift) for seed, shift in itertools.product(args.seeds, SHIFTS)]
    lab.run_study(args, runs, markdown)


if __name__ == "__main__":
    main()
