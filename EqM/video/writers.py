"""Writes videos to watch (mp4, GIF, one PNG sheet) and as data (npz); images, T = 1, as PNGs and one grid.

A video is a uint8 NumPy array (T, H, W, 3), RGB; several are (N, T, H, W, 3). Files to watch are enlarged by an integer
factor without smoothing, so that each pixel of the model is visible; PNGs of single images and samples.npz are not.
"""

import math
import zipfile
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

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
    order; each is written before the next is asked for. labels: (N,) integers; fps: frames per second; names: N strings
    for the sheet; marked: the frames of each sample that it marks. previews: whether to write GIFs, grid and sheet.
    """
    folder, shown, kept = Path(folder), [], evenly_spaced(num_frames, GIF_FRAMES).tolist()
    most = math.prod(IMAGE_GRID) if num_frames == 1 else max(MAX_ROWS, math.prod(GRID))
    folder.mkdir(parents=True, exist_ok=True)
    with npz_writer(folder / "samples.npz", labels, num_frames) as append:
        for first, videos, gif_frames in join_parts(folder, parts, num_frames):
            write_videos(folder, videos, fps, first, previews, gif_frames)
            append(videos)
            shown += [video[kept] for video in videos[: max(0, most - len(shown))]] if previews else []
    if previews and num_frames > 1:
        write_gif(folder / "grid.gif", tile(np.stack(shown)), fps * len(kept) / num_frames)
        marked = marked and [[kept.index(frame) for frame in frames if frame in kept] for frames in marked]
    if previews:
        write_sheet(folder / ("sheet.png" if num_frames > 1 else "grid.png"), np.stack(shown), names, marked)


def join_parts(folder, parts, num_frames):
    """Yield (number of the first, whole videos (n, T, H, W, 3), most frames of their GIFs).

    A video that comes in several parts is collected in a temporary file: all of them may not fit into memory.
    """
    for numbers, first, videos in parts:
        if videos.shape[1] == num_frames:
            yield numbers[0], videos, num_frames
            continue
        for number, frames in zip(numbers, videos, strict=True):
            path = folder / f"{number:06d}.raw.tmp"
            with open(path, "wb" if first == 0 else "ab") as file:
                file.write(np.ascontiguousarray(frames))
            if first + len(frames) == num_frames:
                yield number, np.memmap(path, np.uint8, "r", shape=(1, num_frames, *frames.shape[1:])), GIF_FRAMES
                path.unlink()


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

    Shows at most the first 16 videos, and 32 frames, evenly spaced. Images (T = 1): at most the first 64, in rows of 8,
    without names. marked: the numbers of the frames of each video that get a border of color, such as given ones.
    """
    T = videos.shape[1]
    if T == 1:
        Image.fromarray(tile(videos, IMAGE_GRID, MIN_SIDE)[0]).save(path)
        return
    shown = evenly_spaced(T, MAX_COLUMNS)
    frames = enlarge(videos[:MAX_ROWS, shown])  # (rows, columns, h, w, 3)
    rows, columns, h, w = frames.shape[:4]
    font = ImageFont.load_default(FONT_SIZE)
    names = [""] * rows if names is None else [one_line(str(name)[:MAX_NAME_LENGTH]) for name in names[:rows]]
    left = max(round(font.getlength(name)) + 2 * MARGIN if name else 0 for name in names)  # px
    sheet = Image.new("RGB", (left + columns * (w + GAP) - GAP, rows * (h + GAP) - GAP), "white")
    for row, name in enumerate(names):
        draw_row(sheet, left, row * (h + GAP), frames[row], np.isin(shown, marked[row] if marked else []), name, font)
    sheet.save(path)


@contextmanager
def npz_writer(path, labels, num_frames):
    """A function that appends videos (n, T, H, W, 3) to the array of an .npz: in the end as many as there are labels.

    The file, which is written atomically, has the bytes of np.savez of `arr_0` uint8 (N, T, H, W, 3), of images (T = 1)
    (N, H, W, 3), and `labels` int64 (N,).
    """
    labels, count = np.asarray(labels, dtype=np.int64), 0
    with atomic_write(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:  # zip64: it may have more than 4 GB

            def append(videos):
                nonlocal count
                pixels = np.ascontiguousarray(videos if num_frames > 1 else videos[:, 0])  # images: no axis of time
                if count == 0:
                    header = np.lib.format.header_data_from_array_1_0(pixels)
                    shape = len(labels), *pixels.shape[1:]
                    np.lib.format.write_array_header_1_0(member, header | {"shape": shape})
                member.write(pixels)
                count += len(pixels)

            yield append
            assert count == len(labels), f"{count} videos, {len(labels)} labels"
        with archive.open("labels.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array(member, labels)
