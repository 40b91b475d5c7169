"""The file of a video, of an image (a clip of one frame) or of cached latents: what it says of itself, and its frames.

Files are opened where they are read, a video with one decoding thread. Whatever is wrong with one is UnreadableError.
"""

import os
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath

import av
import decord
import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image
from safetensors import SafetensorError, safe_open

from runtime.untrusted import FPS, check_regular, plain_name

KINDS = "video", "image"  # KINDS[images] is the kind of file that is wanted
SUFFIXES = {"video": (".avi", ".mkv", ".mov", ".mp4", ".webm"), "image": (".jpeg", ".jpg", ".png", ".webp")}
IMAGE_FORMATS = "JPEG", "PNG", "WEBP"  # whatever the suffix says: many a .jpg is a PNG
IMAGE_FPS = 25.0  # makes time_scale 1/25 s, at which the model sees what the published image models see
TURNS = {  # EXIF orientation -> what makes the image upright
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip
LATENTS_SUFFIX = ".safetensors"
MOST_PIXELS = 2**27  # of a frame: four times 8K; decoding takes ten bytes and more of memory for each
VIDEO_STARTS = (  # of AVI, Matroska and WebM, MP4 and QuickTime; FFmpeg would also follow playlists to other files
    (0, (b"RIFF",)),
    (0, (b"\x1a\x45\xdf\xa3",)),
    (4, (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp", b"moof", b"sidx", b"uuid")),
)

decord.logging.set_level(decord.logging.QUIET)  # what matters becomes an UnreadableError
warnings.filterwarnings("ignore", module="PIL")  # and so here


class UnreadableError(Exception):
    """A file that can't be opened, or a frame of it that can't be decoded."""


@dataclass(frozen=True, slots=True)  # slots: an image set has millions
class Video:
    """What a scan finds out about a file of a data set."""

    path: str  # below ROOT, with forward slashes
    class_name: str
    num_frames: int
    fps: float  # average over the file
    height: int | None  # upright; None for images, which the scan does not open
    width: int | None

    @property
    def key(self):
        """Class/stem: the same for a video and for its cached latents."""
        return f"{self.class_name}/{PurePosixPath(self.path).stem}"


def is_a(kind, path):
    """Whether a path ends as files of that kind do, "video" or "image"."""
    return str(path).lower().endswith(SUFFIXES[kind])


def is_cached(video):
    """Whether a Video is one of a latent cache."""
    return video.path.endswith(LATENTS_SUFFIX)


def probe(root, class_name, path):
    """What a file says of itself; nothing is decoded for that, and an image not even opened."""
    if is_a("image", path):
        return Video(path, class_name, num_frames=1, fps=IMAGE_FPS, height=None, width=None)
    _check_claims(os.path.join(root, path))
    with _reader(os.path.join(root, path)) as reader:
        _, height, width, _ = reader.get_batch([]).shape
        num_frames, fps = _timing(reader)
    if not FPS[0] <= fps <= FPS[1]:
        raise UnreadableError(f"{path}: no frame rate")
    return Video(path, class_name, num_frames, fps, height, width)


def _check_video(path):
    """Raise OSError unless a file begins as a video of SUFFIXES does."""
    check_regular(path)
    with open(path, "rb") as file:
        head = file.read(8)
    if not any(head[at : at + 4] in starts for at, starts in VIDEO_STARTS):
        raise OSError("neither AVI, Matroska, WebM, MP4 nor QuickTime")


def _check_claims(path):
    """Raise UnreadableError if a video claims more frames than it has bytes, or frames that are too large.

    decord makes room for as many frames as the header says, and aborts the process where there is none.
    """
    try:
        _check_video(path)
        with av.open(os.path.abspath(path), metadata_errors="ignore") as file:
            for stream in file.streams.video:
                height, width = (getattr(stream, side, 0) for side in ("height", "width"))  # none of an unknown codec
                if stream.frames > os.path.getsize(path) or height * width > MOST_PIXELS:
                    raise OSError(f"claims {stream.frames} frames of {width} x {height} pixels")
    except (OSError, av.FFmpegError) as error:
        raise UnreadableError(f"{path}: {error}") from error


def _timing(reader):
    """Number of frames, and frames per second: what the file's header says, or its time stamps where it has some."""
    num_frames, fps = len(reader), reader.get_avg_fps()
    times = reader.get_frame_timestamp(range(num_frames))[:, 0]
    if num_frames == 1 or not (np.diff(times) > 0).all():  # an AVI
        return num_frames, fps
    times = times[times >= 0]  # an edit list cuts off the others
    measured = float((len(times) - 1) / (times[-1] - times[0])) if len(times) > 1 else fps
    varies = abs(measured - fps) > 0.01 * fps  # less is the rounding of the time stamps
    return len(times), measured if varies else fps


@contextmanager
def _reader(path):
    """A reader at the first frame; whatever is wrong with the file, or decord says against it, is UnreadableError."""
    try:
        _check_video(path)
        with plain_name(path) as name:
            # decord repeats frames in place of lost ones up to this share of the video, but as often as it likes at 0.
            reader = decord.VideoReader(name, ctx=decord.cpu(0), num_threads=1, fault_tol=1e-6)
        _, height, width, _ = reader.get_batch([]).shape
        if height * width > MOST_PIXELS:
            raise OSError(f"{width} x {height} pixels")
        yield reader
    # No file, or none of a video; no frame in it; fewer frames than asked for; the others: a frame can't be decoded.
    except (
        OSError, RuntimeError, AssertionError, IndexError, StopIteration, decord.DECORDError,
        decord.DECORDLimitReachedError,
    ) as error:  # fmt: skip
        raise UnreadableError(f"{path}: {str(error) or 'ends too early'}") from error


def _pixels(frame):
    """A frame of decord's as uint8 (H, W, 3).

    Its rows are padded, and where the padding makes them a multiple of the width (32, 48, 96, ...), decord takes that
    for more channels; its get_batch refuses such videos.
    """
    height, width, channels = frame.shape
    rows = frame.asnumpy().reshape(height, width * channels)
    return rows[:, : 3 * width].reshape(height, width, 3)


def read_frames(root, video, numbers):
    """The frames `numbers` (ascending) of a video, upright: uint8 (T, H, W, 3).

    Raises UnreadableError if one of them can't be decoded, or one before them (at times also one behind them: decord
    decodes ahead). They are decoded in order, for decord's seeking, get_batch included, takes one frame for another: in
    AVIs from their second keyframe on and, with B-frames, at the end; around the keyframes of open GOPs anywhere.
    UCF-101's clips, with hardly a keyframe but the first, cost the same either way.
    """
    path, wanted, frames = os.path.join(root, video.path), set(numbers), []
    if is_a("image", path):
        return _read_image(path)
    with _reader(path) as reader:
        for number in range(numbers[-1] + 1):
            frame = reader.next()
            if number in wanted:
                frames.append(_pixels(frame))
    return np.stack(frames)


def read_all_frames(root, video, piece):
    """All frames of a video in order, as those of read_frames, in pieces of at most `piece`."""
    with _reader(os.path.join(root, video.path)) as reader:
        for first in range(0, video.num_frames, piece):
            yield np.stack([_pixels(reader.next()) for _ in range(min(piece, video.num_frames - first))])


def _read_image(path):
    """The image, of an animation the first, upright and without its alpha channel: uint8 (1, H, W, 3)."""
    try:
        check_regular(path)
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise OSError(f"{image.width} x {image.height} pixels")
            turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
            if image.mode == "I;16":  # convert() would make everything from 255 on white
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = image.convert("RGB")
            return np.array(image if turn is None else image.transpose(Image.Transpose[turn]))[None]
    # No image, truncated or gone; broken PNG or EXIF; broken header; far too many pixels; lost palette (the last two).
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, AssertionError, TypeError) as error:
        raise UnreadableError(f"{path}: {error}") from error


def read_latents(root, video, numbers, flipped=False, shape=None):
    """Mean and standard deviation of the frames `numbers` (ascending) of a video in a cache: float16 (2, C, T, h, w).

    The file is mapped into memory: of what lies between these frames, nothing is read. Raises UnreadableError, also
    unless a frame has `shape`, (C, h, w); None is not checked.
    """
    path, first, parts = os.path.join(root, video.path), numbers[0], []
    try:
        check_regular(path)
        with plain_name(path) as plain, safe_open(plain, "pt") as file:
            for name in ("mean_flipped", "std_flipped") if flipped else ("mean", "std"):
                part = file.get_slice(name)
                dtype, found = part.get_dtype(), tuple(part.get_shape()[1:])
                if dtype != "F16" or found != (shape or found):
                    raise OSError(f"the {name} of a frame is {dtype} {found}, wanted F16 {shape}")
                frames = part[first : numbers[-1] + 1]
                parts.append(frames[[number - first for number in numbers]].transpose(0, 1))
        latents = torch.stack(parts)
    # No such file; truncated or something else; without flips; fewer frames than latents.json says; other shapes.
    except (OSError, SafetensorError, IndexError, RuntimeError) as error:
        raise UnreadableError(f"{path}: {error}") from error
    if not latents.isfinite().all():
        raise UnreadableError(f"{path}: holds numbers that are not finite")
    return latents


def resize_and_crop(frames, image_size):
    """uint8 (T, C, H, W) -> (T, C, image_size, image_size): the short side is resized, the middle is kept."""
    height, width = frames.shape[-2:]
    scale = image_size / min(height, width)
    size = max(image_size, round(height * scale)), max(image_size, round(width * scale))
    if size != (height, width):
        frames = F.interpolate(frames, size, mode="bilinear", antialias=True)
    top, left = (size[0] - image_size) // 2, (size[1] - image_size) // 2
    return frames[..., top : top + image_size, left : left + image_size]
