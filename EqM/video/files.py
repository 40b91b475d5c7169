"""One file: a video, an image (a clip of one frame) or the cached latents of a video. Its metadata and its frames.

Frames are upright, as the file says how it was filmed, and equally far apart in time: of a file with a variable frame
rate frame k is the one whose time stamp is closest to k / fps. Sound is not read.

A file is opened where it is read, a video with one decoding thread. Whatever is wrong with it raises UnreadableError.
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

from runtime.untrusted import FPS, check_regular

SUFFIXES = {"video": (".avi", ".mkv", ".mov", ".mp4", ".webm"), "image": (".jpeg", ".jpg", ".png", ".webp")}
IMAGE_FORMATS = "JPEG", "PNG", "WEBP"  # checked by content, not by suffix: many .jpg files are PNGs
IMAGE_FPS = 25.0  # gives the model's default time_scale, 1/25 s, which published image models use
EXIF_TRANSPOSES = {  # EXIF orientation -> the transpose that makes the image upright
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip
LATENTS_SUFFIX = ".safetensors"
MAX_PIXELS = 2**27  # per frame: four times 8K; decoding takes ten bytes of memory or more for each
SIGNATURES = (  # (offset, bytes) of AVI; Matroska, WebM; MP4, QuickTime. FFmpeg would also open a playlist's files
    (0, (b"RIFF",)),
    (0, (b"\x1a\x45\xdf\xa3",)),
    (4, (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp", b"moof", b"sidx", b"uuid")),
)

decord.logging.set_level(decord.logging.QUIET)  # real errors are raised as UnreadableError
warnings.filterwarnings("ignore", module="PIL")  # the same


class UnreadableError(Exception):
    """A file that can't be opened, or a frame of it that can't be decoded."""


@dataclass(frozen=True, slots=True)  # slots: an image set has millions
class Video:
    """The metadata of one file of a data set."""

    path: str  # relative to the data folder, with forward slashes
    class_name: str
    num_frames: int
    fps: float  # average over the file
    height: int | None  # px, of the upright frame; None for images, which the scan does not open
    width: int | None

    @property
    def key(self):
        """Class/stem, the same for a video and its cached latents."""
        return f"{self.class_name}/{PurePosixPath(self.path).stem}"


def media_kind(images):
    """The kind of file that is read, a key of SUFFIXES."""
    return "image" if images else "video"


def has_suffix(kind, path):
    """Whether the suffix of a path is one of this kind, "video" or "image"."""
    return str(path).lower().endswith(SUFFIXES[kind])


def is_cached(video):
    """Whether a Video belongs to a latent cache."""
    return video.path.endswith(LATENTS_SUFFIX)


def probe(root, class_name, path):
    """The Video of a file. Reads a video's headers, decodes no frame; an image is not even opened."""
    if has_suffix("image", path):
        return Video(path, class_name, num_frames=1, fps=IMAGE_FPS, height=None, width=None)
    _check_header(os.path.join(root, path))
    with _open_video(os.path.join(root, path)) as reader:
        _, height, width, _ = reader.get_batch([]).shape
        num_frames, fps, _ = _read_timing(reader)
    if not FPS[0] <= fps <= FPS[1]:
        raise UnreadableError(f"{path}: a frame rate of {fps}")
    return Video(path, class_name, num_frames, fps, height, width)


def _check_signature(path):
    """Raise OSError unless a file is a plain file that begins as one of the SIGNATURES."""
    check_regular(path)
    with open(path, "rb") as file:
        head = file.read(8)
    if not any(head[offset : offset + 4] in signatures for offset, signatures in SIGNATURES):
        raise OSError("not an AVI, Matroska, WebM, MP4 or QuickTime file")


def _check_header(path):
    """Raise UnreadableError if a video claims more frames than it has bytes.

    decord allocates memory for as many frames as a damaged header claims, and aborts the process if that fails.
    """
    try:
        _check_signature(path)
        with av.open(os.path.abspath(path), metadata_errors="ignore") as file:
            for stream in file.streams.video:
                if stream.frames > os.path.getsize(path):
                    raise OSError(f"claims {stream.frames} frames")
    except (OSError, av.FFmpegError) as error:
        raise UnreadableError(f"{path}: {error}") from error


def _read_timing(reader):
    """(number of frames, average frames per second, the stored frame for each of these frames; None: it is the same).

    From the time stamps, or from the header where there are none.
    """
    num_frames, fps = len(reader), reader.get_avg_fps()
    times = reader.get_frame_timestamp(range(num_frames))[:, 0].astype(np.float64)
    if num_frames == 1 or not (np.diff(times) > 0).all():  # AVIs have no usable ones
        return num_frames, fps, None
    times = times[times >= 0]  # an edit list removes the others
    if len(times) < 2:
        return len(times), fps, None
    measured = float((len(times) - 1) / (times[-1] - times[0]))
    varies = abs(measured - fps) > 0.01 * fps  # below that it is the rounding of the time stamps
    equally_far = np.linspace(times[0], times[-1], len(times))
    closest = np.searchsorted((times[1:] + times[:-1]) / 2, equally_far)
    is_same = np.array_equal(closest, np.arange(len(times)))
    return len(times), measured if varies else fps, None if is_same else closest.tolist()


def _frame_decoder(reader):
    """A function that decodes the frame with a number as a uint8 array (H, W, 3); the numbers must not fall."""
    _, _, stored = _read_timing(reader)
    number, frame = -1, None

    def decode(index):
        nonlocal number, frame
        wanted = index if stored is None else stored[index]
        while number < wanted:
            number, frame = number + 1, reader.next()
        return _to_array(frame)

    return decode


@contextmanager
def _open_video(path):
    """A decord reader at the first frame. Errors of the file and of decord become UnreadableError, also in the body."""
    try:
        _check_signature(path)
        # FFmpeg would take a relative name such as concat:x for a command. decord replaces lost frames by repeated ones
        # up to the share fault_tol of the video; 0 would mean without limit.
        reader = decord.VideoReader(os.path.abspath(path), ctx=decord.cpu(0), num_threads=1, fault_tol=1e-6)
        _, height, width, _ = reader.get_batch([]).shape
        if height * width > MAX_PIXELS:
            raise OSError(f"{width} x {height} pixels")
        yield reader
    # Not a file or not a video; no frame in it; fewer frames than asked for; the others: a frame can't be decoded.
    except (
        OSError, RuntimeError, AssertionError, IndexError, StopIteration, decord.DECORDError,
        decord.DECORDLimitReachedError,
    ) as error:  # fmt: skip
        raise UnreadableError(f"{path}: {str(error) or 'ends too early'}") from error


def _to_array(frame):
    """A decord frame as a uint8 array (H, W, 3).

    Its rows are padded. Where a padded row is a multiple of the width (32, 48, 96, ...), decord mistakes the padding
    for more channels, and its get_batch refuses such videos.
    """
    height, width, channels = frame.shape
    rows = frame.asnumpy().reshape(height, width * channels)
    return rows[:, : 3 * width].reshape(height, width, 3)


def read_frames(root, video, frame_indices):
    """The frames at `frame_indices` (ascending) of a video, upright: uint8 (T, H, W, 3).

    Raises UnreadableError if one of them or one before them can't be decoded (at times also one after them: decord
    decodes ahead). Frames are decoded in order, because decord's seeking, get_batch included, returns wrong frames: in
    AVIs from the second keyframe on and, with B-frames, at the end; in any container around keyframes of open GOPs.
    For UCF-101's clips, which have few keyframes after the first, decoding in order costs the same as seeking.
    """
    path = os.path.join(root, video.path)
    if has_suffix("image", path):
        return _read_image(path)
    with _open_video(path) as reader:
        decode = _frame_decoder(reader)
        return np.stack([decode(index) for index in frame_indices])


def read_all_frames(root, video, chunk_size):
    """Yields all frames of a video in order, upright, in chunks uint8 (T, H, W, 3) with T <= chunk_size."""
    with _open_video(os.path.join(root, video.path)) as reader:
        decode = _frame_decoder(reader)
        for first in range(0, video.num_frames, chunk_size):
            yield np.stack([decode(index) for index in range(first, min(first + chunk_size, video.num_frames))])


def _read_image(path):
    """An image (of an animation the first frame), upright, without its alpha channel: uint8 (1, H, W, 3)."""
    try:
        check_regular(path)
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise OSError(f"{image.width} x {image.height} pixels")
            transpose = EXIF_TRANSPOSES.get(image.getexif().get(ExifTags.Base.Orientation))
            if image.mode == "I;16":  # convert() would make every value from 255 on white
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = image.convert("RGB")
            return np.array(image if transpose is None else image.transpose(Image.Transpose[transpose]))[None]
    # Not an image, truncated or gone; bad PNG or EXIF; bad header; far too many pixels; lost palette (the last two).
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, AssertionError, TypeError) as error:
        raise UnreadableError(f"{path}: {error}") from error


def read_latents(root, video, frame_indices, flipped=False, shape=None):
    """Posterior mean and std of the frames at `frame_indices` (ascending) of a cached video: float16 (2, C, T, h, w).

    The file is mapped into memory, so frames between these are not read. Raises UnreadableError, also if the latents
    of a frame do not have `shape`, (C, h, w); None is not checked.
    """
    path, first, parts = os.path.join(root, video.path), frame_indices[0], []
    try:
        check_regular(path)
        with safe_open(path, "pt") as file:
            for name in ("mean_flipped", "std_flipped") if flipped else ("mean", "std"):
                part = file.get_slice(name)
                dtype, found = part.get_dtype(), tuple(part.get_shape()[1:])
                if dtype != "F16" or found != (shape or found):
                    raise OSError(f"{name} is {dtype} {found} per frame, wanted F16 {shape}")
                frames = part[first : frame_indices[-1] + 1]
                parts.append(frames[[frame_index - first for frame_index in frame_indices]].transpose(0, 1))
        latents = torch.stack(parts)
    # Not a file; truncated or something else, or without flips; fewer frames than latents.json says; other shapes.
    except (OSError, SafetensorError, IndexError, RuntimeError) as error:
        raise UnreadableError(f"{path}: {error}") from error
    if not latents.isfinite().all():
        raise UnreadableError(f"{path}: holds values that are not finite")
    return latents


def latents_metadata(root, path):
    """The metadata of a latents file, a dict of strings; None if it is missing, damaged or has none."""
    try:
        check_regular(os.path.join(root, path))
        with safe_open(os.path.join(root, path), "pt") as file:
            return file.metadata()
    except (OSError, SafetensorError):
        return None


def resize_and_crop(frames, image_size):
    """uint8 (T, C, H, W) -> (T, C, image_size, image_size): resizes the short side, then crops the center."""
    height, width = frames.shape[-2:]
    scale = image_size / min(height, width)
    size = max(image_size, round(height * scale)), max(image_size, round(width * scale))
    if size != (height, width):
        frames = F.interpolate(frames, size, mode="bilinear", antialias=True)
    top, left = (size[0] - image_size) // 2, (size[1] - image_size) // 2
    return frames[..., top : top + image_size, left : left + image_size]
