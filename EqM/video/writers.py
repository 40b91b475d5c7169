"""Writes videos to watch (mp4, GIF, one PNG sheet) and as data (npz); images as PNGs and a grid.

A video is a uint8 NumPy array (T, H, W, 3), RGB; several are (N, T, H, W, 3). Files to watch are
enlarged by an integer factor without smoothing, so you see each pixel of the model. PNGs of single
images and samples.npz keep their size.
"""

import math
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryFile

import av
import numpy as np
from PIL import Image

from runtime.atomic import atomic_write
from runtime.cli import writing
from video.drawing import (
    GRID,
    IMAGE_GRID,
    MIN_SIDE,
    add_notes,
    draw_sheet,
    drawable,
    enlarge,
    evenly_spaced,
    few,
    tile,
)

MAX_ROWS = 16  # most videos on a sheet
MAX_COLUMNS = 32  # most frames of a video on a sheet
GIF_FRAMES = 64  # most frames in the GIF of a long video
MOST_DELAY = 65_535  # of a GIF, in 1/100 s
# Most videos whose mp4s grow with each part. Each of them takes an open file and an encoder.
MOST_GROWING = 16
PALETTE_PIXELS = 2**14  # random pixels of a video, from which its GIF gets a palette


def write_samples(folder, parts, num_frames, labels, fps, names=None, marked=None, previews=True):
    """Write all samples of sample_gd.py: an mp4 per video (PNG per image), samples.npz, previews.

    parts: an iterator, in order, over (numbers of samples, first frame, frames uint8 (n, k, H, W,
    3) from there). Each part is written before the next one is made, and players can show the
    growing mp4s of the first videos.
    labels: (N,) integers; fps: of all videos, or (N,); names and marked: those of `write_sheet`;
    previews: whether to write GIFs, grid and sheet.
    """
    rates = np.broadcast_to(fps, len(labels))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    growing = {}  # movies by the numbers of their videos
    # the pixels: they may not fit into memory, and may come frame by frame
    with TemporaryFile(dir=folder) as file:
        for numbers, first, clips in parts:
            video_shape = (num_frames, *clips.shape[2:])
            is_last = first + clips.shape[1] == num_frames
            for number, frames in zip(numbers, clips, strict=True):
                file.seek((number * num_frames + first) * frames[0].size)
                file.write(np.ascontiguousarray(frames))
                if first == 0 and not is_last and len(growing) < MOST_GROWING:
                    growing[number] = growing_mp4(folder / f"{number:06d}.mp4", rates[number])
                if number in growing:
                    growing[number].add(map(enlarge, frames))
            file.flush()
            if is_last:
                videos = np.memmap(file, np.uint8, "r", shape=(numbers[-1] + 1, *video_shape))
                gif_frames = GIF_FRAMES if first else num_frames
                for number in numbers:
                    write_video(
                        path=folder / f"{number:06d}",
                        video=videos[number],
                        fps=rates[number],
                        gif_frames=gif_frames if previews else 0,
                        movie=growing.pop(number, None),
                    )
        videos = np.memmap(file, np.uint8, "r", shape=(len(labels), *video_shape))
        with atomic_write(folder / "samples.npz") as archive:
            pixels = videos if num_frames > 1 else videos[:, 0]  # images: no axis of time
            np.savez(archive, arr_0=pixels, labels=np.asarray(labels, np.int64))
        if not previews:
            return
        if num_frames > 1:
            write_grid(folder / "grid.gif", videos, float(np.median(rates)))
        write_sheet(
            path=folder / ("sheet.png" if num_frames > 1 else "grid.png"),
            videos=videos,
            names=names,
            marked=marked,
            labels=labels,
        )


def write_grid(path, videos, fps):
    """Write the first videos as one GIF. A long video lasts as long, with fewer frames."""
    N, T = videos.shape[:2]
    most = math.prod(GRID)
    shown = evenly_spaced(T, GIF_FRAMES)
    notes = few(most, N, "videos") + few(len(shown), T, "frames")
    grid = tile(videos[:most, shown])
    write_gif(path, add_notes(grid, notes), fps * len(shown) / T)


def write_videos(folder, videos, fps):
    """Write (N, T, H, W, 3) as 000000.mp4 and .gif (images: .png) and so on."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for number, video in enumerate(videos):
        write_video(folder / f"{number:06d}", video, fps, gif_frames=len(video))


def write_video(path, video, fps, gif_frames=0, movie=None):
    """Write (T, H, W, 3) as PATH.mp4, an image as PATH.png.

    gif_frames: also as a GIF of at most so many frames; 0 = none. movie: the Movie of a growing
    mp4, which has all frames already; it is ended.
    """
    T = len(video)
    if T == 1:
        Image.fromarray(video[0]).save(f"{path}.png")
        return
    if movie:
        movie.finish()
        movie.file.close()
    else:
        write_mp4(f"{path}.mp4", video, fps)
    if gif_frames:
        shown = evenly_spaced(T, gif_frames)
        write_gif(f"{path}.gif", video[shown], fps * len(shown) / T)


# H.264 in the pixel format that all players support. crf 12 is close to lossless: you see the
# model, not the codec. A short lookahead keeps few frames in memory.
MP4 = {
    "codec": "libx264",
    "pixel_format": "yuv420p",
    "options": {"crf": "12", "rc-lookahead": "8", "threads": "1"},
}


def write_mp4(path, video, fps):
    """Write (T, H, W, 3) as an mp4. Any fps > 0 and any size."""
    with av.open(str(path), "w", format="mp4") as file:
        encode(file, map(enlarge, video), fps, **MP4)


def growing_mp4(path, fps):
    """Return the Movie of an mp4 that players can show while it grows: all but about the last ten
    frames, which the encoder holds.

    Closing its file makes it an ordinary mp4.
    """
    options = {"movflags": "hybrid_fragmented+frag_every_frame", "flush_packets": "1"}
    return Movie(av.open(str(path), "w", format="mp4", options=options), fps, **MP4)


def write_lossless(path, frames, fps):
    """Write frames, uint8 (H, W, 3) each, as FFV1: a .mkv that decodes to exactly the same pixels.

    Atomic.
    """
    bitexact = {"fflags": "bitexact"}  # no random numbers in the file
    with (
        atomic_write(path) as file,
        av.open(file, "w", format="matroska", options=bitexact) as movie,
    ):
        encode(
            file=movie,
            frames=frames,
            fps=fps,
            codec="ffv1",
            pixel_format="bgr0",  # other formats than RGB round
        )


def encode(file, frames, fps, **settings):
    """Write an iterator over frames (H, W, 3) to a container of PyAV. settings: of its Movie."""
    movie = Movie(file, fps, **settings)
    movie.add(frames)
    movie.finish()


class Movie:
    """A video that grows by frames, in a container of PyAV."""

    def __init__(self, file, fps, codec, pixel_format, options=None):
        self.file = file
        rate = Fraction(fps).limit_denominator(1001)  # such as 30000/1001
        self.stream = file.add_stream(codec, rate=rate, options=options)
        self.stream.pix_fmt = pixel_format

    def add(self, frames):
        """Encode an iterator over frames, uint8 (H, W, 3)."""
        for pixels in frames:
            if not self.stream.codec_context.is_open:
                self.stream.height, self.stream.width = pixels.shape[:2]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            self.file.mux(self.stream.encode(frame))

    def finish(self):
        """Encode the frames that the encoder still holds."""
        self.file.mux(self.stream.encode())


def write_gif(path, video, fps):
    """Write (T, H, W, 3) as a GIF that loops forever and lasts T / fps seconds.

    Colors are exact if no frame has more than 256. Otherwise all frames share a palette without
    dithering: faster than a palette per frame, and no pixel flickers that keeps its color. Delays
    are in 1/100 s, so at 30 fps they alternate between 3 and 4. Browsers slow down delays below 2,
    so above 50 fps the GIF plays slower. The longest delay is 655 s, and Pillow adds up those of
    equal frames, so a GIF that would last longer may play faster.
    """
    ends = np.round(np.arange(len(video) + 1) * 100 / fps)
    longest = max(2, MOST_DELAY // len(video))
    delays = np.clip(np.diff(ends), 2, longest).astype(int) * 10  # ms
    frames = [Image.fromarray(frame) for frame in enlarge(video)]
    if any(frame.getcolors(256) is None for frame in frames):  # None: more than 256 colors
        pixels = video.reshape(-1, 3)
        chosen = np.random.default_rng(0).integers(len(pixels), size=PALETTE_PIXELS)
        drawn = Image.fromarray(pixels[chosen][None])
        palette = drawn.quantize(256, kmeans=PALETTE_PIXELS // 100)  # stops when 1% change
        frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    frames[0].save(
        path,
        format="GIF",
        save_all=True,
        append_images=frames[1:],
        duration=delays.tolist(),
        loop=0,
    )


def write_sheet(path, videos, names=None, marked=None, labels=None, notes=()):
    """Write (N, T, H, W, 3) as one PNG: a row per video, `names` (N strings) at the left.

    A column is a frame. Images (T = 1) are in rows of 8, without names. A line below says how many
    it shows, if not all, after the caller's notes. marked: the frames of each video that get a
    border. labels: numbers of classes, for names the font lacks.
    """
    N, T = videos.shape[:2]
    if T == 1:
        (images,) = tile(videos, IMAGE_GRID, MIN_SIDE)
        notes = [*notes, *few(math.prod(IMAGE_GRID), N, "images")]
        Image.fromarray(add_notes(images, notes)).save(path)
        return
    shown = evenly_spaced(T, MAX_COLUMNS)
    videos = videos[:MAX_ROWS, shown]
    notes = [*notes, *few(MAX_ROWS, N, "videos"), *few(MAX_COLUMNS, T, "frames")]
    if labels is None:
        replacements = [f"row {row}" for row in range(N)]
    else:
        replacements = [f"class {label}" for label in labels]
    names = names or [""] * N
    names = [drawable(*pair) for pair in zip(names[:MAX_ROWS], replacements, strict=False)]
    marks = [np.isin(shown, frames) for frames in marked or [()] * N]
    sheet = draw_sheet(enlarge(videos), names, marks)
    with writing(path):
        Image.fromarray(add_notes(sheet, notes)).save(path)
