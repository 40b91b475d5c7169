"""Draw samples of one or several folders as one PNG with labels: a row per sample, a column per frame.

    python scripts/picture.py samples/demo-f7 samples/demo-f16 samples/continued --out picture.png

Rows show at most COLUMNS frames, evenly spaced from the first to the last; given frames have an orange border.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "EqM"))
from runtime.atomic import atomic_write
from runtime.cli import COUNT, ArgumentParser, UserError, check_writable, fail, one_line_errors, say
from scoring.sources import Samples
from video.drawing import MARGIN, draw_row, evenly_spaced

COLUMNS, SIDE, GAP = 12, 64, 4  # frames of a row; px of a frame, and between two
LEFT, TITLE = 128, 30  # px: width of the class names, height of a title
FONT_SIZE, MAX_NAME_LENGTH = 15, 16  # px, characters


def parse_args():
    parser = ArgumentParser(description="Draw samples of one or several folders as one PNG with labels.")
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="folders that sample_gd.py has written")
    parser.add_argument("--rows", type=COUNT, default=4, help="samples of each folder, the first ones")
    parser.add_argument("--out", required=True, metavar="FILE.png", help="the picture")
    return parser.parse_args()


def draw_folder(samples, rows):
    """The first `rows` samples of a folder, under a title: uint8 (h, w, 3)."""
    T, size, font = samples.num_frames, samples.image_size, ImageFont.load_default(FONT_SIZE)
    clips, shown = samples.clips[:rows], evenly_spaced(T, COLUMNS)
    picture = Image.new("RGB", (LEFT + COLUMNS * (SIDE + GAP), TITLE + len(clips) * (SIDE + GAP)), "white")
    continued = "clips continued from the frames in orange, " if samples.given[0] else ""
    title = f"{continued}{T} frames, {1 / samples.time_scale:.3g} per second, {size} x {size} px"
    ImageDraw.Draw(picture).text((MARGIN, TITLE // 2), title, "#555555", font, anchor="lm")
    smooth = Image.Resampling.NEAREST if size < SIDE else Image.Resampling.LANCZOS
    for row, clip in enumerate(clips):
        frames = np.stack([Image.fromarray(frame).resize((SIDE, SIDE), smooth) for frame in clip[shown]])
        marked, name = np.isin(shown, samples.given[row]), (samples.names[row] or "none")[:MAX_NAME_LENGTH]
        draw_row(picture, LEFT, TITLE + row * (SIDE + GAP), frames, marked, name, font, GAP)
    return np.asarray(picture)


@one_line_errors()
def main():
    args = parse_args()
    try:
        check_writable("--out", Path(args.out).parent)
        rows = [draw_folder(Samples(folder, "FOLDER"), args.rows) for folder in args.folders]
    except UserError as error:
        fail(error)
    picture = Image.fromarray(np.concatenate(rows))
    with atomic_write(args.out) as file:
        picture.save(file, "PNG", optimize=True)
    say(f"{args.out}: {picture.width} x {picture.height} px, {Path(args.out).stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
