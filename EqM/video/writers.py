"""Writes videos to watch (mp4, GIF, one PNG sheet) and as data (npz); images, T = 1, as PNGs and one grid.

A video is a uint8 NumPy array (T, H, W, 3), RGB; several are (N, T, H, W, 3). Files to watch are enlarged by an integer
factor without smoothing, so that each pixel of the model is visible; PNGs of single images and samples.npz are not.
"""

import math
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryFile

import av
import numpy as np
from PIL import Image, ImageFont

from runtime.atomic import atomic_write
from runtime.cli import one_line
from video.drawing import GAP, GRID, IMAGE_GRID, MARGIN, MIN_SIDE, draw_row, enlarge, evenly_spaced, tile

MAX_ROWS, MAX_COLUMNS = 16, 32  # of a sheet
GIF_FRAMES = 64  # of the GIF of a long video, at most
PALETTE_PIXELS = 2**14  # random pixels of a video that its GIF's palette is made from
FONT_SIZE, MAX_NAME_LENGTH = 16, 60  # px and characters of a name on a sheet


def write_samples(folder, parts, num_frames, labels, fps, names=None, marked=None, previews=True):
    """Write all samples of sample_gd.py: an mp4 per video (PNG per image), samples.npz, and previews of them.

    parts: an iterator over (numbers of samples, first frame, their frames from there on, uint8 (n, k, H, W, 3)), in
    order. labels: (N,) integers; names: N strings for the sheet; marked: the frames of each sample that it marks;
    previews: whether to write GIFs, grid and sheet.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=folder) as file:  # the pixels: they may not fit into memory, and may come frame by frame
        for numbers, first, clips in parts:
            shape = len(labels), num_frames, *clips.shape[2:]
            for number, frames in zip(numbers, clips, strict=True):
                file.seek((number * num_frames + first) * frames[0].size)
                file.write(np.ascontiguousarray(frames))
            file.flush()
            if first + clips.shape[1] == num_frames:
                videos = np.memmap(file, np.uint8, "r", shape=(numbers[-1] + 1, *shape[1:]))[numbers[0] :]
                write_videos(folder, videos, fps, numbers[0], previews, GIF_FRAMES if first else num_frames)
        videos = np.memmap(file, np.uint8, "r", shape=shape)
        with atomic_write(folder / "samples.npz") as archive:
            pixels = videos if num_frames > 1 else videos[:, 0]  # images: no axis of time
            np.savez(archive, arr_0=pixels, labels=np.asarray(labels, np.int64))
        if previews:
            write_previews(folder, videos, fps, names, marked)


def write_previews(folder, videos, fps, names, marked):
    """Write grid.gif and sheet.png of videos, grid.png of images; the arguments are those of write_samples."""
    num_frames = videos.shape[1]
    kept = evenly_spaced(num_frames, GIF_FRAMES).tolist()
    videos = videos[: math.prod(IMAGE_GRID) if num_frames == 1 else max(MAX_ROWS, math.prod(GRID)), kept]
    if num_frames > 1:
        write_gif(folder / "grid.gif", tile(videos), fps * len(kept) / num_frames)
        marked = marked and [[kept.index(frame) for frame in frames if frame in kept] for frames in marked]
    write_sheet(folder / ("sheet.png" if num_frames > 1 else "grid.png"), videos, names, marked)


def write_videos(folder, videos, fps, first=0, gifs=True, gif_frames=None):
    """Write 000000.mp4 (images: .png), ..., from number `first` on; `gifs`: also GIFs of at most gif_frames frames."""
    folder, T = Path(folder), videos.shape[1]
    folder.mkdir(parents=True, exist_ok=True)
    shown = evenly_spaced(T, gif_frames or T)
    for index, video in enumerate(videos, start=first):
        if T == 1:
            Image.fromarray(video[0]).save(folder / f"{index:06d}.png")
        else:
            write_mp4(folder / f"{index:06d}.mp4", video, fps)
            if gifs:
                write_gif(folder / f"{index:06d}.gif", video[shown], fps * len(shown) / T)


def write_mp4(path, video, fps):
    """Write (T, H, W, 3) as H.264 in the pixel format that all players support; any fps > 0 and any size."""
    # crf 12 is close to lossless: a preview shows the model, not the codec. A short lookahead holds few frames.
    options = {"crf": "12", "rc-lookahead": "8", "threads": "1"}
    with av.open(str(path), "w", format="mp4") as file:
        encode(file, map(enlarge, video), fps, "libx264", "yuv420p", options)


def write_lossless(path, frames, fps):
    """Write frames, uint8 (H, W, 3) each, as FFV1: a .mkv that decodes to the very same pixels. Atomic."""
    bitexact = {"fflags": "bitexact"}  # without random numbers
    with atomic_write(path) as file, av.open(file, "w", format="matroska", options=bitexact) as movie:
        encode(movie, frames, fps, "ffv1", "bgr0", {})  # RGB: any other would round


def encode(file, frames, fps, codec, pixel_format, options):
    """Write an iterator over frames (H, W, 3) to a container of PyAV."""
    stream = file.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)  # 30000/1001
    stream.pix_fmt = pixel_format
    for number, frame in enumerate(frames):
        if number == 0:
            stream.height, stream.width = frame.shape[:2]
        file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
    file.mux(stream.encode())


def write_gif(path, video, fps):
    """Write (T, H, W, 3) as a GIF that loops forever and lasts T / fps seconds.

    Colors are exact if no frame has more than 256. Otherwise all frames share a palette and are not dithered: faster
    than a palette per frame, and a pixel whose color does not change does not flicker. Delays are in 1/100 s, so those
    of 30 fps alternate between 3 and 4. Browsers slow down delays below 2, so above 50 fps the GIF plays slower.
    """
    ends = np.round(np.arange(len(video) + 1) * 100 / fps)
    delays = np.maximum(np.diff(ends), 2).astype(int) * 10  # ms
    frames = [Image.fromarray(frame) for frame in enlarge(video)]
    if any(frame.getcolors(256) is None for frame in frames):  # None: it has more colors
        pixels = video.reshape(-1, 3)
        few = pixels[np.random.default_rng(0).integers(len(pixels), size=PALETTE_PIXELS)]
        palette = Image.fromarray(few[None]).quantize(256, kmeans=PALETTE_PIXELS // 100)  # stops when 1% change
        frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:], duration=delays.tolist(), loop=0)


def write_sheet(path, videos, names=None, marked=None):
    """Write (N, T, H, W, 3) as one PNG: a row per video, a column per frame, `names` (N strings) at the left.

    Shows the first 16 videos and 32 frames, evenly spaced; of images (T = 1) the first 64, in rows of 8, without names.
    marked: the numbers of the frames of each video that get a border of color, such as given ones.
    """
    T = videos.shape[1]
    if T == 1:
        Image.fromarray(tile(videos, IMAGE_GRID, MIN_SIDE)[0]).save(path)
        return
    shown = evenly_spaced(T, MAX_COLUMNS)
    frames = enlarge(videos[:MAX_ROWS, shown])  # (rows, columns, h, w, 3)
    rows, columns, h, w = frames.shape[:4]
    font = ImageFont.load_default(FONT_SIZE)
    names = [one_line(str(name)[:MAX_NAME_LENGTH]) for name in names[:rows]] if names else [""] * rows
    left = max(round(font.getlength(name)) + 2 * MARGIN if name else 0 for name in names)  # px
    sheet = Image.new("RGB", (left + columns * (w + GAP) - GAP, rows * (h + GAP) - GAP), "white")
    for row, name in enumerate(names):
        draw_row(sheet, left, row * (h + GAP), frames[row], np.isin(shown, marked[row] if marked else []), name, font)
    sheet.save(path)
