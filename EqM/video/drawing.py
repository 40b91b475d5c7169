"""Frames in pictures: enlarged, in a grid, and in rows with names. Frames are uint8 arrays (..., H, W, 3), RGB."""

import numpy as np
from PIL import Image, ImageDraw

MIN_SIDE = 128  # px, of the short side of a video to watch
GRID, IMAGE_GRID = (3, 8), (8, 8)  # most rows and columns of a grid of videos, of images
GAP = 2  # px of white between frames
MARGIN = 4  # px of white left and right of a name
MARK = "#ff7f0e"  # orange: of frames that are marked


def evenly_spaced(count, most):
    """At most `most` of the numbers 0 to count - 1, evenly spaced from the first to the last: (n,)."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int)


def enlarge(video, min_side=MIN_SIDE):
    """Repeat the pixels of (..., H, W, 3) by the least integer factor that gives even sides of at least min_side px."""
    H, W = video.shape[-3:-1]
    factor = max(1, -(-min_side // min(H, W)))
    if factor % 2 and (H % 2 or W % 2):  # H.264's 4:2:0 needs even sides
        factor += 1
    return video.repeat(factor, axis=-3).repeat(factor, axis=-2)


def tile(videos, grid=GRID, min_side=MIN_SIDE // 2):
    """The first rows x columns videos in a grid: (N, T, H, W, 3) -> one video (T, h, w, 3)."""
    videos = enlarge(videos[: grid[0] * grid[1]], min_side)
    N, T, H, W, _ = videos.shape
    columns = min(N, grid[1])
    rows = -(-N // columns)
    cells = np.full((rows * columns, T, H + GAP, W + GAP, 3), 255, np.uint8)
    cells[:N, :, :H, :W] = videos
    cells = cells.reshape(rows, columns, T, H + GAP, W + GAP, 3).transpose(2, 0, 3, 1, 4, 5)
    return cells.reshape(T, rows * (H + GAP), columns * (W + GAP), 3)


def draw_row(picture, x, y, frames, marked, name, font, gap=GAP):
    """Draw a name at the left of a picture, and frames (n, h, w, 3) from (x, y) on; those `marked` (n,) in a frame."""
    h, w = frames.shape[1:3]
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, y + h // 2), name, "black", font, anchor="lm")
    for frame, is_marked in zip(frames, marked, strict=True):
        picture.paste(Image.fromarray(frame), (x, y))
        if is_marked:
            corners = x - gap // 2, y - gap // 2, x + w - 1 + gap // 2, y + h - 1 + gap // 2
            draw.rectangle(corners, outline=MARK, width=3)
        x += w + gap
