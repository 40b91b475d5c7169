"""Metadata and frames of one file: a video, or an image, which is a clip of one frame.

Frames are upright and equally far apart in time: if the frame rate varies, frame k is the one whose time stamp is
closest to k / fps. Any problem with a file raises UnreadableError.
"""

import os
import re
import warnings
from bisect import bisect
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import PurePosixPath

import av
import decord
import numpy as np
import torch.nn.functional as F
from PIL import ExifTags, Image

from runtime.cli import plural
from runtime.untrusted import FPS, check_regular
from video.decode import decode_from, find_keyframes

SUFFIXES = {"video": (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"), "image": (".jpeg", ".jpg", ".png", ".webp")}
IMAGE_FORMATS = "JPEG", "PNG", "WEBP"  # of the content: many .jpg files are PNGs
IMAGE_FPS = 25.0  # gives time_scale 1/25 s, the model's default and the value of published image models
UPRIGHT = "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"
EXIF_TRANSPOSES = dict(enumerate(UPRIGHT, start=2))  # EXIF orientation -> the transpose that turns an image upright
MAX_PIXELS = 2**27  # per frame of a video: four times 8K; decoding a pixel takes ten bytes of memory or more
SIGNATURE = re.compile(  # of AVI; Matroska, WebM; MP4, QuickTime. FFmpeg would also open the files in a playlist
    rb"RIFF|\x1a\x45\xdf\xa3|.{4}(ftyp|moov|mdat|free|skip|wide|pnot|styp|moof|sidx|uuid)", re.DOTALL
)
ERRORS = (  # of decord, FFmpeg, Pillow and Video: another kind of file, cut short, a frame or header with nonsense
    OSError, RuntimeError, AssertionError, IndexError, StopIteration, SyntaxError, TypeError, ValueError,
    av.FFmpegError, decord.DECORDError, decord.DECORDLimitReachedError, Image.DecompressionBombError,
)  # fmt: skip

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
    height: int | None  # px, of the upright frame; None for images, because the scan does not open them
    width: int | None
    varies: bool = False  # whether the frame rate varies: frame k need not be the k-th frame of the file
    keyframes: list = field(default=(), compare=False, repr=False)  # see decode.py; empty: decord reads all clips

    def __post_init__(self):  # a header or an index may contain anything
        if not (1 <= self.num_frames < 2**31 and FPS[0] <= self.fps <= FPS[1]):
            raise ValueError(f"{plural(self.num_frames, 'frame')} at {self.fps} per second")

    @property
    def key(self):
        """Class/stem, which a video and its cache file share."""
        return f"{self.class_name}/{PurePosixPath(self.path).stem}"


def has_suffix(kind, path):
    """Whether a path ends in a suffix of a kind, "video" or "image"."""
    return str(path).lower().endswith(SUFFIXES[kind])


def probe(root, class_name, path):
    """The Video of a file. Reads the packets of a video and decodes one frame at most. Does not open an image."""
    if has_suffix("image", path):
        return Video(path, class_name, num_frames=1, fps=IMAGE_FPS, height=None, width=None)
    place = os.path.join(root, path)
    with _errors_of(place):
        with av.open(_safe_path(place), metadata_errors="ignore") as file:
            claimed = max((stream.frames for stream in file.streams.video), default=0)
        if claimed > os.path.getsize(place):  # decord would allocate memory for them, or abort
            raise OSError(f"claims {claimed} frames")
        reader = _open_video(place)
        _, height, width, _ = reader.get_batch([]).shape
        num_frames, fps, stored = _read_timing(reader)
        video = Video(path, class_name, num_frames, fps, height, width, varies=stored is not None)
        return replace(video, keyframes=_usable_keyframes(_safe_path(place), video, reader))


def _usable_keyframes(path, video, reader):
    """The keyframes of a video; () if they are uncertain, or if PyAV and decord differ in the first frame."""
    with suppress(*ERRORS):
        keyframes = find_keyframes(path, video.num_frames)
        pixels = next(decode_from(path, keyframes[0], video.height, video.width))()
        with suppress(*ERRORS):  # decord fails if one packet of HEVC releases several frames
            return keyframes if np.array_equal(pixels, _pixels(reader.next())) else ()
        return keyframes
    return ()


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
    except ERRORS as error:
        raise UnreadableError(f"{path}: {str(error) or 'ends too early'}") from error


def _open_video(path):
    """A decord reader at the first frame."""
    # decord replaces lost frames by copies, up to the share fault_tol of the video; 0 = no limit
    reader = decord.VideoReader(_safe_path(path), ctx=decord.cpu(0), num_threads=1, fault_tol=1e-6)
    _, height, width, _ = reader.get_batch([]).shape
    if height * width > MAX_PIXELS:
        raise OSError(f"{width} x {height} pixels")
    return reader


def _read_timing(reader):
    """(number of frames, average frames per second, the number of the stored frame for each frame; None = the same)."""
    num_frames, fps = len(reader), reader.get_avg_fps()
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
    return len(times), measured if varies else fps, None if is_same else closest.tolist()


def read_frames(root, video, frame_indices):
    """The frames at `frame_indices`, which ascend, of a video or image: uint8 (T, H, W, 3). Raises UnreadableError."""
    return np.stack(list(_frames(root, video, frame_indices)))


def read_all_frames(root, video, chunk_size=16):
    """Yield all frames in order, in chunks uint8 (T, H, W, 3) with T <= chunk_size: an hour of 1080p exceeds memory."""
    frames = _frames(root, video, range(video.num_frames))
    while chunk := list(islice(frames, chunk_size)):
        yield np.stack(chunk)


def _frames(root, video, numbers):
    """Yield the frames with these numbers, which ascend, uint8 (H, W, 3) each. Raises UnreadableError."""
    path, done, decoders = os.path.join(root, video.path), 0, [_from_start]
    with _errors_of(path):
        if has_suffix("image", path):
            yield _read_image(path)
            return
        if video.varies:
            _, _, stored = _read_timing(_open_video(path))
            numbers = [stored[number] for number in numbers] if stored else numbers
        # PyAV decodes from the last keyframe before them, decord from the first frame on: decord returns wrong frames
        # when it seeks, also in get_batch, in AVIs and near keyframes of open GOPs. If one fails, the other continues
        if video.keyframes:
            decoders.insert(numbers[0] < video.keyframes[1][0], _from_keyframe)  # decord decodes a whole video faster
        for decoder in decoders:
            with suppress(*[] if decoder is decoders[-1] else ERRORS):
                for frame in decoder(path, video, numbers[done:]):
                    yield frame
                    done += 1
                return


def _from_start(path, video, numbers):
    """An iterator over the frames with these numbers, decoded by decord."""
    reader = _open_video(path)
    return _pick((partial(_pixels, frame) for frame in iter(reader.next, None)), 0, numbers)


def _from_keyframe(path, video, numbers):
    """An iterator over the frames with these numbers, decoded by PyAV."""
    keyframe = video.keyframes[bisect(video.keyframes, numbers[0], key=lambda keyframe: keyframe[0]) - 1]
    return _pick(decode_from(_safe_path(path), keyframe, video.height, video.width), keyframe[0], numbers)


def _pick(decoded, first, numbers):
    """Yield the frames with these numbers. `decoded` yields a function per frame, from the number `first` on."""
    number, pixels = first - 1, None
    for chosen in numbers:
        while number < chosen:
            number, pixels = number + 1, next(decoded, None)
        if pixels is None:
            raise OSError("ends too early")
        yield pixels()


def _pixels(frame):
    """A frame of decord as uint8 (H, W, 3), without the padding of its rows. If a padded row is a multiple of the width
    (32, 48, 96, ...), decord mistakes the padding for more channels, and get_batch refuses the video.
    """
    height, width, channels = frame.shape
    rows = frame.asnumpy().reshape(height, width * channels)
    return rows[:, : 3 * width].reshape(height, width, 3)


def _read_image(path):
    """An image, or the first frame of an animation, without its alpha channel: uint8 (H, W, 3)."""
    check_regular(path)
    with Image.open(path, formats=IMAGE_FORMATS) as image:
        transpose = EXIF_TRANSPOSES.get(image.getexif().get(ExifTags.Base.Orientation))
        if image.mode == "I;16":  # convert() would clip all values above 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image.convert("RGB")
        return np.array(image if transpose is None else image.transpose(Image.Transpose[transpose]))


def resize_and_crop(frames, image_size):
    """Resize the short side and crop the center: uint8 (T, C, H, W) -> (T, C, image_size, image_size)."""
    height, width = frames.shape[-2:]
    scale = image_size / min(height, width)
    size = max(image_size, round(height * scale)), max(image_size, round(width * scale))
    if size != (height, width):
        frames = F.interpolate(frames, size, mode="bilinear", antialias=True)
    top, left = (size[0] - image_size) // 2, (size[1] - image_size) // 2
    return frames[..., top : top + image_size, left : left + image_size]
