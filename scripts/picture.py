"""Draw samples of one or several folders as one PNG with labels: a row per sample, a column per frame.

    python scripts/picture.py samples/demo-f7 samples/demo-f16 samples/continued --out picture.png

Rows show at most COLUMNS frames, evenly spaced from the first to the last; given frames have an orange border.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "EqM"))
from gallery import load_samples
from given import frame_ranges
from runtime.atomic import atomic_write
from runtime.cli import COUNT, ArgumentParser, UserError, check_writable, fail, say
from video.samples import read_samples
from video.writers import MARK

COLUMNS = 12
SIDE, GAP = 64, 4  # px of a frame, and between two
LEFT, TITLE = 128, 30  # px: width of the class names, height of a title
MAX_NAME_LENGTH = 16  # characters


def parse_args():
    parser = ArgumentParser(description="Draw samples of one or several folders as one PNG with labels.")
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="folders that sample_gd.py has written")
    parser.add_argument("--rows", type=COUNT, default=4, metavar="N", help="samples of each folder, the first ones")
    parser.add_argument("--out", required=True, metavar="FILE.png", help="the picture")
    return parser.parse_args()


def title_of(samples):
    """What the rows of a folder show, in words."""
    continued = "clips continued from the frames in orange, " if samples.given(0) else ""
    fps = 1 / samples.about["time_scale"]
    size = f"{samples.image_size} x {samples.image_size} px"
    return f"{continued}{samples.num_frames} frames, {fps:.3g} per second, {size}"


def draw_row(picture, y, clip, name, given):
    """Draw the frames of clip uint8 (T, H, W, 3) from y px down, its name before them; given: numbers of frames."""
    draw = ImageDraw.Draw(picture)
    draw.text((GAP, y + SIDE // 2), name[:MAX_NAME_LENGTH], "black", ImageFont.load_default(size=15), anchor="lm")
    smooth = Image.Resampling.NEAREST if clip.shape[1] < SIDE else Image.Resampling.LANCZOS
    for column, frame in enumerate(np.linspace(0, len(clip) - 1, min(len(clip), COLUMNS)).round().astype(int)):
        x = LEFT + column * (SIDE + GAP)
        picture.paste(Image.fromarray(clip[frame]).resize((SIDE, SIDE), smooth), (x, y))
        if frame in given:
            draw.rectangle([x - 2, y - 2, x + SIDE + 1, y + SIDE + 1], outline=MARK, width=3)


def draw_picture(folders, rows):
    """The picture of the first `rows` samples of each folder. Raises UserError."""
    parts = [load_samples(folder) for folder in folders]
    heights = [TITLE + min(rows, len(samples.labels)) * (SIDE + GAP) for samples in parts]
    picture = Image.new("RGB", (LEFT + COLUMNS * (SIDE + GAP), sum(heights)), "white")
    for samples, top in zip(parts, np.cumsum([0, *heights[:-1]]).tolist(), strict=True):
        _, clips, _ = read_samples(f"FOLDER {samples.folder}", samples.folder)
        font = ImageFont.load_default(size=15)
        ImageDraw.Draw(picture).text((GAP, top + TITLE // 2), title_of(samples), "#555555", font, anchor="lm")
        for row, clip in enumerate(clips[:rows]):
            given = frame_ranges(samples.given(row)["frames"]) if samples.given(row) else ()
            draw_row(picture, top + TITLE + row * (SIDE + GAP), clip, samples.class_name(row), given)
    return picture


def main():
    args = parse_args()
    try:
        check_writable("--out", Path(args.out).parent)
        picture = draw_picture(args.folders, args.rows)
    except UserError as error:
        fail(error)
    try:
        with atomic_write(args.out) as file:
            picture.save(file, "PNG", optimize=True)
    except OSError as error:  # such as a full disk
        fail(error, status=1)
    say(f"{args.out}: {picture.width} x {picture.height} px, {Path(args.out).stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
