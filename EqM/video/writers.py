"""Writes videos to watch (mp4, GIF, one PNG sheet) and as data (npz); images, T = 1, as PNGs and one grid.

A video is a uint8 NumPy array (T, H, W, 3), RGB; several are (N, T, H, W, 3). Files to watch are enlarged by an integer
factor without smoothing, so that each pixel of the model is visible; PNGs of single images and samples.npz are not.
"""

import math
import os
import zipfile
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from runtime.atomic import atomic_write
from runtime.cli import one_line

MIN_SIDE = 128  # px, of the short side of a video to watch
MAX_ROWS, MAX_COLUMNS = 16, 32  # of a sheet
GIF_FRAMES = 64  # of the GIF of a long video, at most
PALETTE_PIXELS = 2**14  # random pixels of a video that its GIF's palette is made from
GRID, IMAGE_GRID = (3, 8), (8, 8)  # most rows and columns of a grid of videos, of images
MAX_NAME_LENGTH = 60  # characters of a name on a sheet
GAP = 2  # px of white between the frames of a sheet
MARK = "#ff7f0e"  # orange: of frames that are marked


def write_samples(folder, parts, num_frames, labels, fps, names=None, marked=None, previews=True):
    """Write all samples of sample_gd.py: an mp4 per video (PNG per image), samples.npz, and previews of them.

    parts: an iterator over (numbers of samples, first frame, their frames from there on, uint8 (n, k, H, W, 3)): the
    parts of a sample in order, and the samples. A part is written before the next is asked for. labels: (N,) integers;
    fps: frames per second; names: N strings for the sheet; marked: the frames of each sample that the sheet marks.
    previews: whether to write a GIF per video, grid.gif and sheet.png (images: grid.png).
    """
    folder, shown, longs = Path(folder), [], {}
    folder.mkdir(parents=True, exist_ok=True)
    most = 0 if not previews else math.prod(IMAGE_GRID) if num_frames == 1 else max(MAX_ROWS, math.prod(GRID))
    with npz_writer(folder / "samples.npz", labels, num_frames) as append:
        for numbers, first, videos in parts:
            if videos.shape[1] == num_frames:
                write_videos(folder, videos, fps, first=numbers[0], gifs=previews)
                append(videos)
                shown += [video[thinned(num_frames)].copy() for video in videos[: max(0, most - len(shown))]]
                continue
            for number, frames in zip(numbers, videos, strict=True):
                if first == 0:
                    longs[number] = LongVideo(folder / f"{number:06d}", num_frames, fps, previews)
                longs[number].add(frames, first)
                if first + len(frames) == num_frames:
                    shown += [longs.pop(number).finish(append)][: max(0, most - len(shown))]
    if previews and num_frames == 1:
        write_sheet(folder / "grid.png", np.stack(shown))
    elif previews:
        shown, kept = np.stack(shown), thinned(num_frames).tolist()
        write_gif(folder / "grid.gif", tile(shown), fps * len(kept) / num_frames)
        marked = marked and [[kept.index(frame) for frame in frames if frame in kept] for frames in marked]
        write_sheet(folder / "sheet.png", shown, names, marked)


def thinned(num_frames):
    """The numbers of at most GIF_FRAMES frames, evenly spaced from the first to the last."""
    return np.linspace(0, num_frames - 1, min(num_frames, GIF_FRAMES)).round().astype(int)


class LongVideo:
    """The files of a video that comes in parts: an mp4, and at the end a thinned GIF and the frames of samples.npz.

    Until then they have temporary names, and the memory holds the frames of the GIF only. gif: whether to write one.
    """

    def __init__(self, path, num_frames, fps, gif):
        self.path, self.num_frames, self.fps = path, num_frames, fps
        self.mp4 = Mp4(path.with_suffix(".mp4.tmp"), fps)
        self.pixels = open(path.with_suffix(".raw.tmp"), "w+b")  # noqa: SIM115 (until `finish`)
        self.kept, self.frames = set(thinned(num_frames).tolist()) if gif else (), []

    def add(self, frames, first):
        self.mp4.add(frames)
        self.shape = frames.shape[1:]
        self.pixels.write(np.ascontiguousarray(frames))
        self.frames += [frame.copy() for number, frame in enumerate(frames, first) if number in self.kept]

    def finish(self, append):
        """Give the files their names; append the frames to samples.npz. Returns the GIF's, (H, W, 3) each."""
        self.mp4.close()
        os.replace(self.path.with_suffix(".mp4.tmp"), self.path.with_suffix(".mp4"))
        if self.frames:
            rate = self.fps * len(self.frames) / self.num_frames
            write_gif(self.path.with_suffix(".gif"), np.stack(self.frames), rate)
        self.pixels.seek(0)
        while part := self.pixels.read(GIF_FRAMES * math.prod(self.shape)):
            append(np.frombuffer(part, np.uint8).reshape(1, -1, *self.shape))
        self.pixels.close()
        os.unlink(self.pixels.name)
        return self.frames


def write_videos(folder, videos, fps, first=0, gifs=True):
    """Write 000000.mp4 and, with `gifs`, 000000.gif, ... (images, T = 1: 000000.png), counting from `first`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for index, video in enumerate(videos, start=first):
        if len(video) == 1:
            Image.fromarray(video[0]).save(folder / f"{index:06d}.png")
        else:
            write_mp4(folder / f"{index:06d}.mp4", video, fps)
            if gifs:
                write_gif(folder / f"{index:06d}.gif", video, fps)


def enlarge(video, min_side=MIN_SIDE):
    """Repeat the pixels of (..., H, W, 3) by the least integer factor that gives even sides of at least min_side px."""
    H, W = video.shape[-3:-1]
    factor = max(1, -(-min_side // min(H, W)))
    if factor % 2 and (H % 2 or W % 2):  # H.264's 4:2:0 needs even sides
        factor += 1
    return video.repeat(factor, axis=-3).repeat(factor, axis=-2)


def write_mp4(path, video, fps):
    """Write (T, H, W, 3) as H.264 in the pixel format that all players support; any fps > 0 and any size."""
    file = Mp4(path, fps)
    file.add(video)
    file.close()


class Mp4:
    """An mp4 to which frames (k, H, W, 3) are added, as `write_mp4` writes it."""

    def __init__(self, path, fps):
        self.container = av.open(str(path), "w", format="mp4")
        self.stream = self.container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))  # 30000/1001
        self.stream.pix_fmt = "yuv420p"
        # crf 12: close to lossless, so that previews show the model and not the codec. x264 looks few frames ahead: it
        # would hold 40 and more of each of the videos that are written at the same time.
        self.stream.options = {"crf": "12", "rc-lookahead": "8"}
        self.stream.thread_count = 1
        self.is_sized = False

    def add(self, frames):
        frames = enlarge(frames)
        if not self.is_sized:
            self.stream.height, self.stream.width = frames.shape[1:3]
            self.is_sized = True
        for frame in frames:
            self.container.mux(self.stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))

    def close(self):
        self.container.mux(self.stream.encode())
        self.container.close()


def write_lossless(path, frames, fps):
    """Write frames, uint8 (H, W, 3) each, as FFV1 in Matroska, a .mkv that decodes to the very same pixels.

    The file has its name once it is whole.
    """
    temporary = Path(path).with_name(Path(path).name + ".tmp")
    with av.open(str(temporary), "w", format="matroska", options={"fflags": "bitexact"}) as file:  # no random numbers
        stream = file.add_stream("ffv1", rate=Fraction(fps).limit_denominator(1001))
        stream.pix_fmt = "bgr0"  # RGB: any other would round
        for number, frame in enumerate(frames):
            if number == 0:
                stream.height, stream.width = frame.shape[:2]
            pixels = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            file.mux(stream.encode(pixels))
        file.mux(stream.encode())
    os.replace(temporary, path)


def write_gif(path, video, fps):
    """Write (T, H, W, 3) as a GIF that loops forever and lasts T / fps seconds.

    Colors are exact if no frame has more than 256. Otherwise all frames share a palette and are not dithered: faster
    than a palette per frame, and a pixel whose color does not change does not flicker.
    GIF delays are in 1/100 s, so those of a 30 fps video alternate between 3 and 4. Browsers slow down delays below 2,
    so above 50 fps the GIF plays slower than the video.
    """
    ends = np.round(np.arange(len(video) + 1) * 100 / fps)
    delays = np.maximum(np.diff(ends), 2).astype(int) * 10  # ms
    frames = [Image.fromarray(frame) for frame in enlarge(video)]
    if any(frame.getcolors(256) is None for frame in frames):  # None: it has more colors
        palette = shared_palette(video)
        frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:], duration=delays.tolist(), loop=0)


def shared_palette(video):
    """The palette of 256 colors, as an image, of all frames of (T, H, W, 3)."""
    pixels = video.reshape(-1, 3)
    few = pixels[np.random.default_rng(0).integers(len(pixels), size=PALETTE_PIXELS)]
    return Image.fromarray(few[None]).quantize(256, kmeans=PALETTE_PIXELS // 100)  # stops when 1% change their color


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


def write_sheet(path, videos, names=None, marked=None):
    """Write (N, T, H, W, 3) as one PNG: a row per video, a column per frame, `names` (N strings) at the left.

    Shows at most the first 16 videos, and 32 frames, evenly spaced from the first to the last. Images (T = 1) are
    shown without names, at most the first 64, in rows of 8. marked: the numbers of the frames of each video that get a
    border of color, such as those that were given.
    """
    T = videos.shape[1]
    if T == 1:
        Image.fromarray(tile(videos, IMAGE_GRID, MIN_SIDE)[0]).save(path)
        return
    shown = np.linspace(0, T - 1, min(T, MAX_COLUMNS)).round().astype(int)
    frames = enlarge(videos[:MAX_ROWS, shown])  # (rows, columns, h, w, 3)
    rows, columns, h, w = frames.shape[:4]
    names = [one_line(str(name)[:MAX_NAME_LENGTH]) for name in names[:rows]] if names is not None else []
    font = ImageFont.load_default(size=16)
    left = max((round(font.getlength(name)) + 4 * GAP for name in names), default=0)  # px

    sheet = np.full((rows * (h + GAP) - GAP, left + columns * (w + GAP) - GAP, 3), 255, np.uint8)
    for row, column in np.ndindex(rows, columns):
        y, x = row * (h + GAP), left + column * (w + GAP)
        sheet[y : y + h, x : x + w] = frames[row, column]
    sheet = Image.fromarray(sheet)
    draw = ImageDraw.Draw(sheet)
    for row, column in np.argwhere([np.isin(shown, numbers) for numbers in (marked or [])[:rows]]):
        x, y = left + column * (w + GAP), row * (h + GAP)
        draw.rectangle([x - 1, y - 1, x + w, y + h], outline=MARK, width=1 + GAP)
    for row, name in enumerate(names):
        draw.text((2 * GAP, row * (h + GAP) + h // 2), name, fill="black", font=font, anchor="lm")
    sheet.save(path)


@contextmanager
def npz_writer(path, labels, num_frames):
    """A function that appends videos (n, k, H, W, 3), or one after the other parts of one (1, k, H, W, 3), to the array
    of an .npz: in the end as many videos of num_frames frames as there are labels.

    The file has `arr_0` uint8 (N, T, H, W, 3), images (T = 1) as (N, H, W, 3), and `labels` int64 (N,). Its bytes are
    those of np.savez, which takes all videos at once. Atomic.
    """
    labels, count = np.asarray(labels, dtype=np.int64), 0
    with atomic_write(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:  # zip64: it may have more than 4 GB

            def append(videos):
                nonlocal count
                pixels = np.ascontiguousarray(videos)
                if count == 0:
                    header = np.lib.format.header_data_from_array_1_0(pixels)
                    time = (num_frames,) if num_frames > 1 else ()  # images have no axis of time
                    shape = len(labels), *time, *pixels.shape[2:]
                    np.lib.format.write_array_header_1_0(member, header | {"shape": shape})
                member.write(pixels)
                count += pixels.shape[0] * pixels.shape[1]

            yield append
            assert count == len(labels) * num_frames, f"{count} frames, {len(labels)} labels"
        with archive.open("labels.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array(member, labels)
