"""Draw samples of folders as one PNG with labels: a row per sample, a column per frame.

    python scripts/picture.py samples/demo-f7 samples/demo-f16 samples/continued --out picture.png

A row shows at most COLUMNS frames, evenly spaced from the first to the last. Given frames have an
orange border.
"""

import engine  # noqa: F401
from pathlib import Path

import numpy as np
from PIL import Image

from runtime.atomic import atomic_write
from runtime.cli import COUNT, ArgumentParser, check_writable, one_line_errors, say, wrong_input
from scoring.sources import Samples
from video.drawing import draw_sheet, evenly_spaced, few, stack, text_line

COLUMNS, SIDE, GAP = 12, 64, 4  # frames of a row; px of a frame, and between two
LEFT, MAX_NAME_LENGTH = 190, 16  # px and characters of the class names


def parse_args():
    parser = ArgumentParser(
        description="Draw samples of one or several folders as one PNG with labels."
    )
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="sample folders of sample_gd.py"
    )
    parser.add_argument(
        "--rows", type=COUNT, default=4, help="number of samples to draw from each folder"
    )
    parser.add_argument("--out", required=True, metavar="FILE.png", help="the picture")
    return parser.parse_args()


def draw_folder(samples, rows):
    """The first `rows` samples of a folder, under a title: uint8 (h, w, 3)."""
    T = samples.num_frames
    size = samples.image_size
    shown = evenly_spaced(samples.num_frames, COLUMNS)
    clips = samples.clips[:rows, shown]
    smooth = Image.Resampling.NEAREST if size < SIDE else Image.Resampling.LANCZOS
    counts = few(len(clips), len(samples), "samples") + (
        few(len(shown), T, "frames") or [f"{T} frames"]
    )
    title = f"{', '.join(counts)}, {1 / samples.time_scale:.3g} per second, {size} x {size} px"
    title += ", given frames in orange" if samples.given[0] else ""
    frames = [
        Image.fromarray(frame).resize((SIDE, SIDE), smooth)
        for frame in clips.reshape(-1, size, size, 3)
    ]
    frames = np.stack(frames).reshape(*clips.shape[:2], SIDE, SIDE, 3)
    names = [samples.shown_class(name)[:MAX_NAME_LENGTH] for name in samples.names[:rows]]
    marked = [np.isin(shown, given) for given in samples.given[:rows]]
    return stack(text_line(title), draw_sheet(frames, names, marked, LEFT, GAP))


@one_line_errors()
def main():
    args = parse_args()
    with wrong_input():
        check_writable("--out", Path(args.out).parent)
        parts = [draw_folder(Samples(folder, "FOLDER"), args.rows) for folder in args.folders]
    picture = Image.fromarray(stack(*parts))
    with atomic_write(args.out) as file:
        picture.save(file, "PNG", optimize=True)
    say(
        f"{args.out}: {picture.width} x {picture.height} px, "
        f"{Path(args.out).stat().st_size / 1e3:.0f} KB"
    )


if __name__ == "__main__":
    main()
