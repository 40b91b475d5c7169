"""Measure how long videos made in windows stay correct. Bouncing shapes, 256 frames, several seeds.

    python scripts/studies/long_videos.py                                                   the published table
    python scripts/studies/long_videos.py --overlaps 4 8 12 --guidances 1 1.5 --seeds 0 1   compare settings

The model follows the recommended recipe of study.py, but trains on 8 and 16 frames, with 1.6 times the compute and
three of four clips forced. Its shapes turn at the borders of the frame. The scores of long videos say whether a shape
stays one object to the end, how fast it is, where it turns, and how visible the seams of windows are. The script also
compares the memory of sample_gd.py for short and long videos. It writes results/long_videos.md and .json. Models,
samples and scores are in results/long-videos (see lab.py).
"""

import json
from dataclasses import replace
from pathlib import Path

import lab
from arms import GUIDANCE, RECOMMENDED, sampling_flags, size_of, training
from runtime.cli import NON_NEGATIVE, number, one_line_errors

ARM = replace(RECOMMENDED, phases=((8, 1 / 3), (16, 2 / 3)))
COMPUTE, FORCING = 1.6, 0.75  # relative to the study's full compute; share of forced clips in training
WINDOW, SHORT = 16, 32  # frames per window; frames of the short videos in the comparison of memory
# Samples and their frames; seconds of a training video; test videos per class; samples in the comparison of memory
FULL, TINY = (96, 256, 12, 16, 16), (2, 40, 2, 2, 2)
METRICS = "motion", "consistency"
COLUMNS = {  # title: (value of a manifest, factor, digits)
    "one object to the end (%)": ("one_object", 100, 0),
    "turns at the borders only (%)": ("turns_right", 100, 0),
    "5% quantile of window speed / true": ("speed_low", 1, 2),
    "median": ("speed_median", 1, 2),
    "95% quantile": ("speed_high", 1, 2),
    "seam score of windows": ("window_seam_score", 1, 2),
}


class LongRun(lab.Run):
    """A model, its long videos for each overlap and guidance, and the peak memory of sampling them."""

    def __init__(self, args, seed):
        size, root = size_of(args), Path(args.out, "long-videos")
        self.clips, self.frames, seconds, of_test, self.memory_clips = TINY if args.miniature else FULL
        data = lab.data_sets(root / "bouncing-shapes", size.videos, of_test, "--bounce", "--seconds", seconds)
        videos, test = data
        flags = ["--num-frames", self.frames, "--num-samples", self.clips, "--window", WINDOW]
        flags += [*sampling_flags(size), "--seed", seed]
        real = ["--data-path", test, "--split", "all", "--num-real", self.clips]
        super().__init__(
            root / f"seed{seed}-compute{COMPUTE:g}",
            data,
            **training(args, ARM, seed, COMPUTE, "--forcing", FORCING, "--data-path", videos),
            tasks={
                f"overlap {overlap}, guidance {guidance:g}": (
                    [*flags, "--overlap", overlap, "--cfg-scale", guidance], METRICS
                )
                for overlap in args.overlaps for guidance in args.guidances
            },
            metrics=dict.fromkeys(METRICS, real),
        )  # fmt: skip
        self.memory = self.folder / "memory.json"  # {num_frames: MiB}

    @property
    def is_done(self):
        return super().is_done and self.memory.exists()

    def run(self):
        super().run()
        if not self.memory.exists():
            words = ["--video", "--ckpt", self.checkpoint(), "--folder", self.folder / "memory-samples"]
            words += ["--window", WINDOW, "--num-sampling-steps", 3, "--num-samples", self.memory_clips, "--num-frames"]
            peaks = {str(frames): self.script("EqM/sample_gd.py", *words, frames) for frames in (SHORT, self.frames)}
            self.memory.write_text(json.dumps(peaks))


def markdown(content):
    frames, count = content["num_frames"], len(content["seeds"])
    lines = [
        "# Longer than any training clip", "",
        "`scripts/studies/long_videos.py` wrote this table. The model trains on bouncing shapes with the study's "
        f"recipe on 8 and 16 frames, {COMPUTE} times its compute and `--forcing {FORCING}`. It samples "
        f"{content['videos']} videos of {frames} frames in windows of {WINDOW}, with {count} "
        f"seed{'s' if count > 1 else ''}. Cells hold the mean over seeds (lowest to highest).", "",
    ]  # fmt: skip
    lines += lab.seed_table(content["samplings"], COLUMNS)
    ratio = lab.mean_cell([peaks[str(frames)] / peaks[str(SHORT)] for peaks in content["memory"]], 2)
    return [*lines, f"Peak memory of `sample_gd.py` for {frames} frames, relative to {SHORT} frames: {ratio}."]


def parse_args():
    parser = lab.study_parser(__doc__, seeds=[0])
    add = parser.add_argument
    overlap = number(int, least=1, most=WINDOW - 1)
    add("--overlaps", type=overlap, nargs="+", default=[8], help="values of --overlap of sample_gd.py")
    add("--guidances", type=NON_NEGATIVE, nargs="+", default=[GUIDANCE], help="values of --cfg-scale")
    return parser.parse_args()


@one_line_errors()
def main():
    args = parse_args()
    runs = [LongRun(args, seed) for seed in args.seeds]
    lab.run_all(runs)
    content = {"videos": runs[0].clips, "num_frames": runs[0].frames, "seeds": args.seeds}
    content["memory"] = [json.loads(run.memory.read_text()) for run in runs]
    content["samplings"] = {task: lab.collect(runs, task, COLUMNS) for task in runs[0].tasks}
    lab.write_results(args.out, "long_videos", markdown(content), content)


if __name__ == "__main__":
    main()
