"""How long does a video made in windows stay right? Bouncing shapes, 256 frames, several seeds.

    python scripts/long_videos.py                                            the table of the default
    python scripts/long_videos.py --overlaps 4 8 12 --guidances 1 1.5 --clips 24 --seeds 0 1     what is best

Trains the recipe that the study recommends, but on 8 and 16 frames and with 1.6 times its compute, with three of four
clips forced, on videos of shapes that turn at the borders of the frame. Makes long videos of every class by
sample_gd.py and scores them by evaluate.py: one object to the end, its speed, its turns, and the seams of windows. Then
it measures the memory of sample_gd.py for short and long videos. After an interruption the same command continues;
several processes share the models. Tables: results/long_videos.md and .json; models, samples and manifests:
results/long-videos.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "EqM"))
sys.path.insert(0, str(Path(__file__).resolve().parent / "study"))
from arms import GUIDANCE, MINIATURE
from runtime.atomic import atomic_write
from runtime.cli import NON_NEGATIVE, UserError, number, say
from study import ROOT, end_with_parent
from trained import Trained, cell, run_all, study_parser

SHARE = 0.75  # of the clips that are forced in training
WINDOW = 16
SECONDS = 12  # of a video, at 25 frames per second
TEST_SEED, TEST_VIDEOS = 1, 16  # of the real videos that scores are compared with; per class
SHORT = 32  # frames of the videos whose memory is compared with that of long ones
COLUMNS = {  # title: value of a manifest, factor, digits
    "one object to the end (%)": ("one_object", 100, 0),
    "turns at the borders only (%)": ("turns_right", 100, 0),
    "speed of the windows / true: 5%": ("speed_low", 1, 2),
    "median": ("speed_median", 1, 2),
    "95%": ("speed_high", 1, 2),
    "seam score of windows": ("window_seam_score", 1, 2),
}


def parse_args():
    parser = study_parser("How long does a video made in windows stay right? Runs and tables.", seeds=[0])
    add = parser.add_argument
    overlap = number(int, least=1, most=WINDOW - 1)
    add("--overlaps", type=overlap, nargs="+", default=[8], metavar="N", help="values of --overlap of sample_gd.py")
    add("--guidances", type=NON_NEGATIVE, nargs="+", default=[GUIDANCE], metavar="X", help="values of --cfg-scale")
    add("--clips", type=number(int, least=2), default=96, metavar="N", help="videos that are made")
    frames = number(int, least=2 * WINDOW, most=25 * SECONDS)
    add("--num-frames", type=frames, default=256, metavar="N", help="their frames")
    return parser.parse_args()


class Model(Trained):
    arm, compute = replace(Trained.arm, phases=((8, 1 / 3), (16, 2 / 3))), 1.6

    def __init__(self, args, seed):
        self.root, self.args = Path(args.out, "long-videos"), args
        self.samplings = {
            f"overlap {overlap}, guidance {guidance:g}": ["--overlap", overlap, "--cfg-scale", guidance]
            for overlap in args.overlaps for guidance in args.guidances
        }  # fmt: skip
        tasks = [self.task(name, metric) for name in self.samplings for metric in ("motion", "consistency")]
        self.memory = f"memory of {SHORT} and {args.num_frames} frames"
        super().__init__(args, self.root / f"seed{seed}-compute{self.compute:g}", seed, SHARE, [*tasks, self.memory])

    def task(self, name, what):
        return f"{self.args.clips} clips of {self.args.num_frames}, {name}, {what}"

    def run(self):
        """Make the data, train, sample and score what is missing."""
        data, test = self.root / "bouncing-shapes", self.root / "bouncing-shapes-test"
        shared = ["--bounce", "--seconds", SECONDS]
        self.make_videos(data, *shared, "--videos-per-class", self.size.videos)
        per_class = 2 if self.size is MINIATURE else TEST_VIDEOS
        self.make_videos(test, *shared, "--videos-per-class", per_class, "--seed", TEST_SEED)
        latest = self.train(data)
        for name, flags in self.samplings.items():
            for metric in ("motion", "consistency"):
                if not self.manifest(self.task(name, metric)).exists():
                    self.score(latest, test, name, flags, metric)
        if not self.manifest(self.memory).exists():
            self.measure_memory(latest)

    def score(self, latest, test, name, flags, metric):
        samples, args = self.manifest(self.task(name, "samples")).with_suffix(""), self.args
        if not (samples / "samples.json").exists():
            words = ["--ckpt", latest, "--video", "--num-frames", args.num_frames, "--num-samples", args.clips]
            words += ["--window", WINDOW]
            self.run_script("EqM/sample_gd.py", *words, *self.sampling_flags, *flags, "--folder", samples)
        words = ["--samples", samples, "--data-path", test, "--split", "all", "--num-real", args.clips]
        words += ["--num-workers", 0, "--out", self.manifest(self.task(name, metric))]
        self.run_script("EqM/evaluate.py", "--metric", metric, *words)

    def measure_memory(self, latest):
        """The peak memory, MiB, of sample_gd.py for 16 short and 16 long videos, in a file like the manifests."""
        values = {}
        for num_frames in (SHORT, self.args.num_frames):
            words = ["--ckpt", latest, "--video", "--num-frames", num_frames, "--window", WINDOW, "--num-samples", 16]
            words += ["--num-sampling-steps", 3, "--folder", self.folder / "memory-samples"]
            values[num_frames] = peak_memory("EqM/sample_gd.py", *words)
        with atomic_write(self.manifest(self.memory)) as file:
            file.write(json.dumps({"values": values}).encode())


def peak_memory(*words):
    """The largest resident memory, MiB, of a script of the repository. Raises UserError if it fails."""
    command = [sys.executable, *(str(word) for word in (ROOT / words[0], *words[1:]))]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **quiet, preexec_fn=end_with_parent)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"{words[0]} ended with status {process.returncode}")
    return usage.ru_maxrss / 1024


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def table(models):
    """{sampling: {title: the values of its seeds}}"""
    rows = {}
    for name in models[0].samplings:
        values = [
            model.values(model.task(name, "motion")) | model.values(model.task(name, "consistency")) for model in models
        ]
        for title, (key, factor, _) in COLUMNS.items():
            found = [factor * own[key] for own in values if own.get(key) is not None]
            rows.setdefault(name, {})[title] = found
    return rows


def as_markdown(rows, memory, args):
    seeds = f"{len(args.seeds)} seeds" if len(args.seeds) > 1 else "1 seed"
    lines = ["# Longer than any training clip", ""]
    lines += ["Made by `scripts/long_videos.py`: the study's recipe on 8 and 16 frames with"]
    lines += [f"{Model.compute} times its compute and `--forcing {SHARE}`, bouncing shapes; {args.clips} videos of"]
    lines += [f"{args.num_frames} frames in windows of {WINDOW}; {seeds}: mean (lowest to highest).", ""]
    lines += [f"| | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name, found in rows.items():
        cells = [cell(found[title], digits) for title, (_, _, digits) in COLUMNS.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    ratios = [values[str(args.num_frames)] / values[str(SHORT)] for values in memory]
    lines += ["", f"Peak memory of `sample_gd.py`, {args.num_frames} frames against {SHORT}: {cell(ratios, 2)} times."]
    return "\n".join(lines) + "\n"


def write_tables(args, models):
    rows, memory = table(models), [model.values(model.memory) for model in models]
    about = {"videos": args.clips, "num_frames": args.num_frames, "seeds": args.seeds, "memory": memory}
    with atomic_write(Path(args.out, "long_videos.json")) as file:
        file.write(json.dumps(about | {"samplings": rows}, indent=1).encode())
    with atomic_write(Path(args.out, "long_videos.md")) as file:
        file.write(as_markdown(rows, memory, args).encode())
    say(f"{Path(args.out, 'long_videos.md')}")


def main():
    args = parse_args()
    models = [Model(args, seed) for seed in args.seeds]
    run_all(args, models, lambda: write_tables(args, models))


if __name__ == "__main__":
    main()
