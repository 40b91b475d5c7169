"""Frames in pictures: enlarged, in a grid, in named rows, with a note.

Frames are uint8 arrays (..., H, W, 3), RGB.
"""

import math
import unicodedata
from functools import cache
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

from runtime.cli import one_line, say

MIN_SIDE = 128  # px: the short side of a video to watch
# most rows and columns in a grid of videos, of images
GRID = (3, 8)
IMAGE_GRID = (8, 8)
GAP = 2  # px of white between frames
MARGIN = 4  # px of white left and right of a name
MARK = "#ff7f0e"  # orange: border of marked frames
FONT_SIZE = 22  # px: readable at half size
MAX_NAME_LENGTH = 70  # characters


@cache
def font():
    """A font with accents."""
    import matplotlib  # loads slowly

    path = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
    return ImageFont.truetype(path, FONT_SIZE)


@cache
def drawable(name, replacement):
    """A name as one short line.

    The replacement, with a note once per name, if the font lacks one of its characters.
    """
    name = unicodedata.normalize("NFC", name)
    name = one_line(name[:MAX_NAME_LENGTH])
    pictures = [bytes(font().getmask(letter)) for letter in name]
    missing = bytes(font().getmask("\uffff"))
    if missing not in pictures:
        return name
    say(
        f"note: the font of pictures lacks characters of {name}: pictures say {replacement!r} "
        "instead"
    )
    return replacement


def few(shown, total, what):
    """A list with the note "16 of 40 videos"; empty if a picture shows all of them."""
    return [f"{shown} of {total} {what}"] if shown < total else []


def evenly_spaced(count, most):
    """At most `most` of the numbers 0 to count - 1, evenly spaced from first to last: (n,)."""
    numbers = np.linspace(0, count - 1, min(count, most))
    return numbers.round().astype(int)


def enlarge(video, min_side=MIN_SIDE):
    """Repeat the pixels of (..., H, W, 3) by the smallest integer factor that makes sides even and
    >= min_side px.
    """
    H, W = video.shape[-3:-1]
    factor = math.ceil(min_side / min(H, W))
    has_odd_side = H % 2 or W % 2
    if has_odd_side and factor % 2:  # H.264's 4:2:0 needs even sides
        factor += 1
    video = video.repeat(factor, axis=-3)
    return video.repeat(factor, axis=-2)


def tile(videos, grid=GRID, min_side=MIN_SIDE // 2):
    """The first rows x columns videos in a grid: (N, T, H, W, 3) -> one video (T, h, w, 3)."""
    rows, columns = grid
    videos = enlarge(videos[: rows * columns], min_side)
    N, T, H, W, _ = videos.shape
    columns = min(N, columns)
    num_cells = columns * math.ceil(N / columns)
    cells = np.full((num_cells, T, H + GAP, W + GAP, 3), 255, np.uint8)
    cells[:N, :, :H, :W] = videos
    return rearrange(cells, "(rows columns) t h w c -> t (rows h) (columns w) c", columns=columns)


def text_line(text):
    """A picture (h, w, 3) of a line of text."""
    line = Image.new("RGB", (name_width(text), 2 * FONT_SIZE), "white")
    draw = ImageDraw.Draw(line)
    draw.text((MARGIN, FONT_SIZE), text, "black", font(), anchor="lm")
    return np.asarray(line)


def name_width(name):
    """The width of a name with its margins in px."""
    return round(font().getlength(name)) + 2 * MARGIN


def stack(*pictures):
    """Pictures, or videos of one length, (..., h, w, 3) above each other.

    Narrow ones get white at their right.
    """
    width = max(picture.shape[-2] for picture in pictures)
    padded = []
    for picture in pictures:
        sides = [(0, 0)] * picture.ndim
        sides[-2] = (0, width - picture.shape[-2])
        padded.append(np.pad(picture, sides, constant_values=255))
    return np.concatenate(padded, axis=-3)


def add_notes(picture, notes):
    """A picture or video (..., h, w, 3) above a line of notes (of `few`); unchanged without any."""
    if not notes:
        return picture
    line = text_line(f"Shows {', '.join(notes)}.")
    lines = np.broadcast_to(line, picture.shape[:-3] + line.shape)
    return stack(picture, lines)


def draw_sheet(frames, names, marked, left=0, gap=GAP):
    """A picture of rows of frames (N, n, h, w, 3) with N names at their left.

    Frames that are marked get a border.
    """
    N, n, h, w = frames.shape[:4]
    # in px
    for name in names:
        if name:
            left = max(left, name_width(name))
    width = left + n * (w + gap) - gap
    height = N * (h + gap) - gap
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(names):
        middle = row * (h + gap) + h // 2
        draw.text((MARGIN, middle), name, "black", font(), anchor="lm")
    for row, column in np.ndindex(N, n):
        x = left + column * (w + gap)
        y = row * (h + gap)
        frame = Image.fromarray(frames[row, column])
        sheet.paste(frame, (x, y))
        if marked[row][column]:
            border = gap // 2
            top_left = (x - border, y - border)
            bottom_right = (x + w - 1 + border, y + h - 1 + border)
            draw.rectangle([top_left, bottom_right], outline=MARK, width=3)
    return np.asarray(sheet)
