"""Measure how long videos made in windows stay correct. Bouncing shapes, 256 frames, several seeds.

    python scripts/studies/long_videos.py                                                   the published table
    python scripts/studies/long_videos.py --overlaps 4 8 12 --guidances 1 1.5 --seeds 0 1   compare settings

The models follow the recommended recipe of study.py, but train on 8 and 16 frames, with 1.6 times the compute, three of
four clips forced, and other positions. With fixed positions, they train on 16 frames only. The shapes turn at the
borders of the frame. The scores of long videos say whether a shape stays one object to the end, how fast it is, where
it turns, and how visible the seams of windows are. The script also compares the memory of sample_gd.py for short and
long videos. It writes results/long_videos.md and .json. Models, samples and scores are in results/long-videos (see
lab.py).
"""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import lab
from arms import GUIDANCE, INTERVALS, POSITIONS, RECOMMENDED, sampling_flags, size_of, training
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


def make_run(args, positions, seed):
    """The lab.Run of a model with these positions and its long videos for each overlap and guidance."""
    arm = replace(ARM, flags=POSITIONS[positions] + INTERVALS)
    if positions == "fixed":
        arm = replace(arm, phases=((16, 1.0),))
    size, root = size_of(args), Path(args.out, "long-videos")
    clips, frames, seconds, of_test, _ = TINY if args.miniature else FULL
    data = lab.data_sets(root / "bouncing-shapes", size.videos, of_test, "--bounce", "--seconds", seconds)
    videos, test = data
    flags = ["--num-frames", frames, "--num-samples", clips, "--window", WINDOW, *sampling_flags(size), "--seed", seed]
    return lab.Run(
        root / f"{positions.replace(' ', '-')}-seed{seed}-compute{COMPUTE:g}",
        data,
        **training(args, arm, seed, COMPUTE, "--forcing", FORCING, "--data-path", videos),
        tasks={
            f"{positions}, overlap {overlap}, guidance {scale:g}": (
                [*flags, "--overlap", overlap, "--cfg-scale", scale],
                METRICS,
            )
            for overlap, scale in itertools.product(args.overlaps, args.guidances)
        },
        metrics=dict.fromkeys(METRICS, ["--data-path", test, "--split", "all", "--num-real", clips]),
    )


def measure_memory(run, frames, clips):
    """{num_frames: peak memory in MiB} of sampling short and long videos, measured once."""
    path = run.folder / "memory.json"
    with lab.file_lock(run.folder / "lock"):  # another process may measure at the same time
        if not path.exists():
            words = ["--video", "--ckpt", run.checkpoint(), "--folder", run.folder / "memory-samples"]
            words += ["--window", WINDOW, "--num-sampling-steps", 3, "--num-samples", clips, "--num-frames"]
            path.write_text(json.dumps({str(n): run.script("EqM/sample_gd.py", *words, n) for n in (SHORT, frames)}))
    return json.loads(path.read_text())


def markdown(content):
    frames, count = content["num_frames"], len(content["seeds"])
    lines = [
        "# Longer than any training clip", "",
        "`scripts/studies/long_videos.py` wrote this table. The models train on bouncing shapes with the study's "
        f"recipe on 8 and 16 frames, {COMPUTE} times its compute and `--forcing {FORCING}`. Each samples "
        f"{content['videos']} videos of {frames} frames in windows of {WINDOW}, with {count} "
        f"seed{'s' if count > 1 else ''}. Cells hold the mean over seeds (lowest to highest).", "",
    ]  # fmt: skip
    lines += lab.seed_table(content["samplings"], COLUMNS)
    lines += lab.differences(content["samplings"], COLUMNS, [*COLUMNS][:2])
    ratio = lab.mean_cell([peaks[str(frames)] / peaks[str(SHORT)] for peaks in content["memory"]], 2)
    return [*lines, f"Peak memory of `sample_gd.py` for {frames} frames, relative to {SHORT} frames: {ratio}."]


def parse_args():
    parser = lab.study_parser(__doc__, seeds=[0])
    add = parser.add_argument
    overlap = number(int, least=1, most=WINDOW - 1)
    add("--overlaps", type=overlap, nargs="+", default=[8], help="values of --overlap of sample_gd.py")
    add("--positions", nargs="+", choices=POSITIONS, default=[*POSITIONS], metavar="NAME", help="see arms.py")
    add("--guidances", type=NON_NEGATIVE, nargs="+", default=[GUIDANCE], help="values of --cfg-scale")
    return parser.parse_args()


@one_line_errors()
def main():
    args = parse_args()
    clips, frames, *_, memory_clips = TINY if args.miniature else FULL
    runs = {name: [make_run(args, name, seed) for seed in args.seeds] for name in args.positions}
    lab.run_all([run for group in zip(*runs.values(), strict=True) for run in group])
    content = {"videos": clips, "num_frames": frames, "seeds": args.seeds}
    content["memory"] = [measure_memory(runs[args.positions[-1]][0], frames, memory_clips)]
    content["samplings"] = {
        task: lab.collect(group, task, COLUMNS) for group in runs.values() for task in group[0].tasks
    }
    lab.write_results(args.out, "long_videos", markdown(content), content)


if __name__ == "__main__":
    main()
