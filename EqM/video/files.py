"""Metadata and frames of one file: a video, or an image, which is a clip of one frame.

Frames are upright and equally far apart in time: if the frame rate varies, frame k is the one whose
time stamp is closest to k / fps. Any problem with a file raises UnreadableError.
"""

import os
import re
import warnings
from bisect import bisect
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import PurePosixPath

import av
import decord
import numpy as np
import torch.nn.functional as F
from PIL import ExifTags, Image

from runtime.cli import plural
from runtime.untrusted import FPS, check_regular
from video.decode import decode_from, read_packets

SUFFIXES = {
    "video": (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"),
    "image": (".jpeg", ".jpg", ".png", ".webp"),
}
IMAGE_FORMATS = "JPEG", "PNG", "WEBP"  # of the content: many .jpg files are PNGs
# gives time_scale 1/25 s, the model's default and the value of published image models
IMAGE_FPS = 25.0
UPRIGHT = (
    "FLIP_LEFT_RIGHT",
    "ROTATE_180",
    "FLIP_TOP_BOTTOM",
    "TRANSPOSE",
    "ROTATE_270",
    "TRANSVERSE",
    "ROTATE_90",
)
# EXIF orientation -> the transpose that turns an image upright
EXIF_TRANSPOSES = dict(enumerate(UPRIGHT, start=2))
# per frame of a video: four times 8K; decoding a pixel takes ten bytes of memory or more
MAX_PIXELS = 2**27
# of AVI; Matroska, WebM; MP4, QuickTime. FFmpeg would also open the files in a playlist
SIGNATURE = re.compile(
    rb"RIFF|\x1a\x45\xdf\xa3|.{4}(ftyp|moov|mdat|free|skip|wide|pnot|styp|moof|sidx|uuid)",
    re.DOTALL,
)
# decord, FFmpeg and Video raise these: not a video, cut short, a frame that can't be decoded
NO_VIDEO = (
    OSError,
    RuntimeError,
    AssertionError,
    IndexError,
    StopIteration,
    TypeError,
    ValueError,
    av.FFmpegError,
    decord.DECORDError,
    decord.DECORDLimitReachedError,
)
# Not an image, truncated or missing; bad PNG or EXIF; bad header; far too many pixels; lost palette
# (the last two)
NO_IMAGE = OSError, SyntaxError, ValueError, Image.DecompressionBombError, AssertionError, TypeError

decord.logging.set_level(decord.logging.QUIET)  # errors that matter become UnreadableError
warnings.filterwarnings("ignore", module="PIL")  # likewise


class UnreadableError(Exception):
    """A file that can't be opened, or a frame of it that can't be decoded."""


@dataclass(frozen=True, slots=True)  # slots: an image set has millions
class Video:
    """The metadata of one file in a data set."""

    path: str  # relative to the data folder, with forward slashes
    class_name: str
    num_frames: int
    fps: float  # average over the file
    # px, of the upright frame; None for images, because the scan does not open them
    height: int | None
    width: int | None
    # whether the frame rate varies: frame k need not be the k-th frame of the file
    varies: bool = False
    # see decode.py; empty: decord reads all clips
    keyframes: list = field(default=(), compare=False, repr=False)

    def __post_init__(self):  # a header or an index may contain anything
        lowest, highest = FPS
        if not (1 <= self.num_frames < 2**31 and lowest <= self.fps <= highest):
            raise ValueError(f"{plural(self.num_frames, 'frame')} at {self.fps} per second")

    @property
    def key(self):
        """Class/stem, which a video and its cache file share."""
        return f"{self.class_name}/{PurePosixPath(self.path).stem}"


def has_suffix(kind, path):
    """Whether a path ends in a suffix of a kind, "video" or "image"."""
    return str(path).lower().endswith(SUFFIXES[kind])


def probe(root, class_name, path):
    """The Video of a file.

    Reads the packets of a video and decodes one frame at most. Does not open an image.
    """
    if has_suffix("image", path):
        return Video(path, class_name, num_frames=1, fps=IMAGE_FPS, height=None, width=None)
    file_path = os.path.join(root, path)
    with _errors_of(file_path), _open_packets(file_path) as packets:
        claimed = max((stream.frames for stream in packets.streams.video), default=0)
        if claimed > os.path.getsize(file_path):  # decord would allocate memory for them, or abort
            raise OSError(f"claims {claimed} frames")
        with _open_video(file_path) as reader:
            _, height, width, _ = reader.get_batch([]).shape
            num_frames, fps, stored = _read_timing(reader)
            video = Video(
                path=path,
                class_name=class_name,
                num_frames=num_frames,
                fps=fps,
                height=height,
                width=width,
                varies=stored is not None,
            )
            return _with_packets(packets, video, reader)


def why_unreadable(path):
    """Why `probe` can't open a video, and what to do about it."""
    if os.path.islink(path) and not os.path.exists(path):
        target = os.readlink(path)
        return f"a link to {target}, which does not exist; restore that file or remove the link"
    with suppress(*NO_VIDEO):
        if os.path.isfile(path) and os.path.getsize(path) == 0:
            return "an empty file; copy it again or remove it"
        with _open_packets(path) as packets:
            if not packets.streams.video:
                return "has no video stream, only sound or text; remove it"
    return "can't be opened; repair or remove it"


def _with_packets(packets, video, reader):
    """The Video that both PyAV (packets) and decord (reader) have opened, with its keyframes.

    Without them if they are uncertain, or if PyAV and decord differ in the first frame.
    """
    with suppress(*NO_VIDEO):
        num_frames, keyframes = read_packets(packets, video.num_frames)
        if not video.varies:  # else its frames are chosen from all that decord counts
            video = replace(video, num_frames=num_frames)
        with_keyframes = replace(video, keyframes=keyframes)
        frames = decode_from(packets, keyframes[0], video.height, video.width)
        pixels = next(frames)()
        with suppress(*NO_VIDEO):  # decord fails if one packet of HEVC releases several frames
            is_same = np.array_equal(pixels, _pixels(reader.next()))
            return with_keyframes if is_same else video
        return with_keyframes
    return video


def _open_packets(path):
    """A container of PyAV. Raises OSError, av.FFmpegError."""
    return av.open(_safe_path(path), metadata_errors="ignore")


def _safe_path(path):
    """The absolute path of a file that FFmpeg opens as a video. Raises OSError."""
    check_regular(path)
    with open(path, "rb") as file:
        if not SIGNATURE.match(file.read(8)):
            raise OSError("not an AVI, Matroska, WebM, MP4 or QuickTime file")
    return os.path.abspath(path)  # FFmpeg would read a relative name such as concat:x as a command


@contextmanager
def _errors_of(path):
    """Errors of a file and its decoder in the body become UnreadableError."""
    try:
        yield
    except NO_VIDEO as error:
        raise UnreadableError(f"{path}: {str(error) or 'ends too early'}") from error


@contextmanager
def _open_video(path):
    """A decord reader at the first frame.

    Errors of the file and of decord become UnreadableError, also in the body.
    """
    with _errors_of(path):
        # decord replaces lost frames by copies, up to the share fault_tol; 0 = no limit
        reader = decord.VideoReader(
            _safe_path(path), ctx=decord.cpu(0), num_threads=1, fault_tol=1e-6
        )
        _, height, width, _ = reader.get_batch([]).shape
        if height * width > MAX_PIXELS:
            raise OSError(f"{width} x {height} pixels")
        yield reader


def _read_timing(reader):
    """(number of frames, average frames per second, the number of the stored frame for each frame;
    None = the same).
    """
    num_frames = len(reader)
    fps = reader.get_avg_fps()
    times = reader.get_frame_timestamp(range(num_frames))[:, 0].astype(np.float64)
    if num_frames == 1 or not (np.diff(times) > 0).all():  # as in AVIs
        return num_frames, fps, None
    times = times[times >= 0]  # an edit list removes the other frames
    if len(times) < 2:
        return len(times), fps, None
    measured = float((len(times) - 1) / (times[-1] - times[0]))
    varies = abs(measured - fps) > 0.01 * fps  # less is due to the rounding of time stamps
    equally_far = np.linspace(times[0], times[-1], len(times))
    closest = np.searchsorted((times[1:] + times[:-1]) / 2, equally_far)
    is_same = np.array_equal(closest, np.arange(len(times)))
    stored = None if is_same else closest.tolist()
    return len(times), measured if varies else fps, stored


def read_frames(root, video, frame_indices):
    """The frames at `frame_indices`, which ascend, of a video or image: uint8 (T, H, W, 3).

    Raises UnreadableError.
    """
    (frames,) = _read_parts(root, video, [frame_indices])
    return frames


def read_all_frames(root, video, chunk_size=16):
    """Yield all frames in order, in chunks uint8 (T, H, W, 3) with T <= chunk_size: an hour of
    1080p exceeds memory.
    """
    indices = range(video.num_frames)
    firsts = indices[::chunk_size]
    return _read_parts(root, video, [indices[first : first + chunk_size] for first in firsts])


def _read_parts(root, video, parts):
    """Yield the frames of each list of frame indices. Indices ascend over all lists."""
    # PyAV decodes from the last keyframe before them, decord from the first frame on: decord
    # returns wrong frames when it seeks, also in get_batch, in AVIs and near keyframes of open
    # GOPs. If the faster one fails, the other continues
    path = os.path.join(root, video.path)
    if has_suffix("image", path):
        yield _read_image(path)
        return
    decoders = [_from_start]
    if video.keyframes:
        # decord decodes a whole video faster
        is_early = parts[0][0] < video.keyframes[1][0]
        decoders.insert(is_early, _from_keyframe)
    done = 0
    for decoder in decoders:
        try:
            for frames in decoder(path, video, parts[done:]):
                yield frames
                done += 1
            return
        except UnreadableError:
            if decoder is decoders[-1]:
                raise


def _from_start(path, video, parts):
    """Yield what _read_parts does, with decord."""
    with _open_video(path) as reader:
        decoded = (partial(_pixels, frame) for frame in iter(reader.next, None))
        yield from _pick(decoded, 0, _stored(reader, parts))


def _from_keyframe(path, video, parts):
    """Yield what _read_parts does, with PyAV."""
    with _errors_of(path):
        if video.varies:
            with _open_video(path) as reader:
                parts = _stored(reader, parts)
        numbers = [number for number, _, _ in video.keyframes]
        keyframe = video.keyframes[bisect(numbers, parts[0][0]) - 1]
        with _open_packets(path) as packets:
            frames = decode_from(packets, keyframe, video.height, video.width)
            yield from _pick(frames, keyframe[0], parts)


def _stored(reader, parts):
    """The numbers of the stored frames for lists of frame indices."""
    _, _, stored = _read_timing(reader)
    if stored is None:
        return parts
    return [[stored[index] for index in frame_indices] for frame_indices in parts]


def _pick(decoded, first, parts):
    """Yield the frames of each list of numbers.

    `decoded` yields a function per frame, from the number `first` on.
    """
    number = first - 1
    pixels = None
    for numbers in parts:
        frames = []
        for chosen in numbers:
            while number < chosen:
                number += 1
                pixels = next(decoded, None)
            if pixels is None:
                raise OSError("ends too early")
            frames.append(pixels())
        yield np.stack(frames)


def _pixels(frame):
    """A frame of decord as uint8 (H, W, 3), without the padding of its rows.

    If a padded row is a multiple of the width (32, 48, 96, ...), decord mistakes the padding for
    more channels, and get_batch refuses the video.
    """
    height, width, channels = frame.shape
    rows = frame.asnumpy().reshape(height, width * channels)
    return rows[:, : 3 * width].reshape(height, width, 3)


def _read_image(path):
    """An image, or an animation's first frame, without its alpha channel: uint8 (1, H, W, 3)."""
    try:
        check_regular(path)
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            orientation = image.getexif().get(ExifTags.Base.Orientation)
            if image.mode == "I;16":  # convert() would clip all values above 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = image.convert("RGB")
            if orientation in EXIF_TRANSPOSES:
                transpose = Image.Transpose[EXIF_TRANSPOSES[orientation]]
                image = image.transpose(transpose)
            return np.array(image)[None]
    except NO_IMAGE as error:
        raise UnreadableError(f"{path}: {error}") from error


def resize_and_crop(frames, image_size):
    """Resize the short side and crop the center of uint8 (T, C, H, W) to a square image_size."""
    size = frames.shape[-2:]
    scale = image_size / min(size)
    height, width = [max(image_size, round(side * scale)) for side in size]
    if size != (height, width):
        frames = F.interpolate(frames, (height, width), mode="bilinear", antialias=True)
    top = (height - image_size) // 2
    left = (width - image_size) // 2
    return frames[..., top : top + image_size, left : left + image_size]
