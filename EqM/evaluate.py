"""Score generated videos against the truth that a data set knows.

    python EqM/evaluate.py --metric motion --samples samples --data-path datasets/moving-shapes --out motion.json

--metric motion is for Moving Shapes: does the right shape move the right way, as fast and as large as it should?
A strict tracker (motion.py) answers for the generated clips and, as the ceiling, for real ones beside them.
"""

import json
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

import motion
from distributed import COUNT, ArgumentParser, UserError, check_writable, fail, say
from video_dataset import Clips, check_data_path, latents_settings, long_enough, scan_videos, split_videos

ROWS = {  # what people read, of motion.summarize
    "direction_accuracy": "direction right",
    "shape_accuracy": "shape right",
    "speed_ratio": "speed / true speed",
    "area_ratio": "area / true area",
}


def parse_args():
    parser = ArgumentParser(description="Score generated videos against the truth that a data set knows.")
    parser.add_argument("--metric", choices=["motion"], default="motion", help="motion: of Moving Shapes")
    parser.add_argument("--samples", required=True, metavar="DIR", help="a folder that sample_gd.py has written")
    parser.add_argument("--data-path", required=True, metavar="DIR", help="the data set that the model was trained on")
    parser.add_argument("--num-real", type=COUNT, default=96, metavar="N", help="real clips beside them")
    parser.add_argument("--out", required=True, metavar="FILE.json", help="where the numbers go")
    return parser.parse_args()


def load_samples(folder):
    """(videos uint8 (N, T, H, W, 3), labels (N,), what sample_gd.py wrote of them) of a sample folder."""
    folder = Path(folder)
    try:
        with np.load(folder / "samples.npz") as arrays:
            videos, labels = arrays["arr_0"], arrays["labels"]
        about = json.loads((folder / "samples.json").read_text())
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--samples {folder}: no samples.npz and samples.json of sample_gd.py ({error})") from error
    if videos.ndim != 5 or videos.shape[1] < 2:
        raise UserError(f"--samples {folder}: holds images, --metric motion wants videos of at least 2 frames")
    return videos, labels, about


def real_clips(args, num_frames, size):
    """(clip uint8 (T, H, W, 3), class name, seconds per frame) of videos that did not train, in turn."""
    scan = scan_videos(args.data_path)
    _, val = split_videos(args.data_path, scan.videos, val_fraction=0.05)  # split first, as train.py does
    val, _ = long_enough(val, num_frames, "validation ")
    clips = Clips(args.data_path, val, scan.classes, num_frames, size, flip=False, stream="real")
    for index in tqdm(range(args.num_real), desc="real clips", leave=False):
        item = clips[index]
        yield item["clip"].permute(1, 2, 3, 0).numpy(), scan.classes[item["label"]], item["time_scale"]


def score(clips, shapes_json):
    """motion.summarize of (clip, class name, seconds per frame)."""
    tracks, expected = [], []
    for clip, name, seconds_per_frame in clips:
        tracks.append(motion.track(clip))
        expected.append(motion.truths(shapes_json, name, clip.shape[1], seconds_per_frame))
    return motion.summarize(tracks, expected)


def main():
    args = parse_args()
    try:
        check_writable("--out", os.path.dirname(args.out) or ".")
        check_data_path(args.data_path)
        if latents_settings(args.data_path) is not None:
            raise UserError(f"--data-path {args.data_path}: a latent cache; name the folder of its videos")
        videos, labels, about = load_samples(args.samples)
        shapes_json = Path(args.data_path) / "shapes.json"
        names = [about["classes"][label] for label in labels]
        scales = [about["time_scale"]] * len(videos)
        generated = score(zip(videos, names, scales, strict=True), shapes_json)
        real = score(real_clips(args, *videos.shape[1:3]), shapes_json)
    except UserError as error:
        fail(error)
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    result = {"metric": "motion", "num_frames": videos.shape[1], "generated": generated, "real": real, "samples": about}
    Path(args.out).write_text(json.dumps(result, indent=2))
    say(f"{videos.shape[1]} frames, {len(videos)} clips{'':>14}generated  real")
    for key, title in ROWS.items():
        cells = ["   -" if part[key] is None else f"{part[key]:.3f}" for part in (generated, real)]
        say(f"  {title:<30} {cells[0]:>9} {cells[1]:>6}")


if __name__ == "__main__":
    main()
