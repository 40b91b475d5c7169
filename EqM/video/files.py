"""Metadata and frames of one file: a video, or an image, which is a clip of one frame.

Frames are upright and equally far apart in time: if the frame rate varies, frame k is the one whose time stamp is
closest to k / fps. Any problem with a file raises UnreadableError.
"""

import os
import re
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath

import av
import decord
import numpy as np
import torch.nn.functional as F
from PIL import ExifTags, Image

from runtime.cli import plural
from runtime.untrusted import FPS, check_regular

SUFFIXES = {"video": (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"), "image": (".jpeg", ".jpg", ".png", ".webp")}
IMAGE_FORMATS = "JPEG", "PNG", "WEBP"  # of the content: many .jpg files are PNGs
IMAGE_FPS = 25.0  # gives time_scale 1/25 s, the model's default and the value of published image models
EXIF_TRANSPOSES = {  # EXIF orientation -> the transpose that turns the image upright
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
    8: "ROTATE_90",
}  # fmt: skip
MAX_PIXELS = 2**27  # per frame of a video: four times 8K; decoding a pixel takes ten bytes of memory or more
SIGNATURE = re.compile(  # of AVI; Matroska, WebM; MP4, QuickTime. FFmpeg would also open the files in a playlist
    rb"RIFF|\x1a\x45\xdf\xa3|.{4}(ftyp|moov|mdat|free|skip|wide|pnot|styp|moof|sidx|uuid)", re.DOTALL
)
NO_VIDEO = (  # decord, FFmpeg and Video raise these: not a video, cut short, a frame that can't be decoded
    OSError, RuntimeError, AssertionError, IndexError, StopIteration, ValueError, av.FFmpegError, decord.DECORDError,
    decord.DECORDLimitReachedError,
)  # fmt: skip
# Not an image, truncated or missing; bad PNG or EXIF; bad header; far too many pixels; lost palette (the last two)
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
    height: int | None  # px, of the upright frame; None for images, because the scan does not open them
    width: int | None

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
    """The Video of a file. Reads the headers of a video but decodes no frame, and does not open an image."""
    if has_suffix("image", path):
        return Video(path, class_name, num_frames=1, fps=IMAGE_FPS, height=None, width=None)
    with _open_video(os.path.join(root, path), check_length=True) as reader:
        _, height, width, _ = reader.get_batch([]).shape
        num_frames, fps, _ = _read_timing(reader)
        return Video(path, class_name, num_frames, fps, height, width)


@contextmanager
def _open_video(path, check_length=False):
    """A decord reader at the first frame. Errors of the file and of decord become UnreadableError, also in the body.

    check_length: refuse more frames than the file has bytes; decord would allocate memory for them, or abort.
    """
    try:
        check_regular(path)
        with open(path, "rb") as file:
            if not SIGNATURE.match(file.read(8)):
                raise OSError("not an AVI, Matroska, WebM, MP4 or QuickTime file")
        path = os.path.abspath(path)  # FFmpeg would read a relative name such as concat:x as a command
        if check_length:
            with av.open(path, metadata_errors="ignore") as file:
                claimed = max((stream.frames for stream in file.streams.video), default=0)
            if claimed > os.path.getsize(path):
                raise OSError(f"claims {claimed} frames")
        # decord replaces lost frames by copies, up to the share fault_tol of the video; 0 = no limit
        reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1, fault_tol=1e-6)
        _, height, width, _ = reader.get_batch([]).shape
        if height * width > MAX_PIXELS:
            raise OSError(f"{width} x {height} pixels")
        yield reader
    except NO_VIDEO as error:
        raise UnreadableError(f"{path}: {str(error) or 'ends too early'}") from error


def _read_timing(reader):
    """(number of frames, average frames per second, the number of the stored frame for each frame; None = the same).

    They come from the time stamps, or from the header if there are none.
    """
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
    """The frames at `frame_indices`, which ascend, of a video or image: uint8 (T, H, W, 3).

    Raises UnreadableError if one of them or an earlier one can't be decoded. Sometimes a later one is enough, because
    decord decodes ahead. Frames are decoded in order, because decord returns wrong frames when it seeks, also in
    get_batch: in AVIs after the second keyframe and, with B-frames, at the end; in all containers near keyframes of
    open GOPs.
    """
    (frames,) = _read_parts(root, video, [frame_indices])
    return frames


def read_all_frames(root, video, chunk_size=16):
    """Yield all frames in order, in chunks uint8 (T, H, W, 3) with T <= chunk_size: an hour of 1080p exceeds memory."""
    firsts = range(0, video.num_frames, chunk_size)
    return _read_parts(root, video, [range(first, min(first + chunk_size, video.num_frames)) for first in firsts])


def _read_parts(root, video, parts):
    """Yield the frames of each list of frame indices. Indices ascend over all lists."""
    path, number, frame = os.path.join(root, video.path), -1, None
    if has_suffix("image", path):
        yield _read_image(path)
        return
    with _open_video(path) as reader:
        _, _, stored = _read_timing(reader)
        for frame_indices in parts:
            frames = []
            for index in frame_indices:
                last = index if stored is None else stored[index]
                while number < last:
                    number, frame = number + 1, reader.next()
                # Rows are padded. If a padded row is a multiple of the width (32, 48, 96, ...), decord mistakes the
                # padding for more channels, and get_batch refuses the video.
                height, width, channels = frame.shape
                rows = frame.asnumpy().reshape(height, width * channels)
                frames.append(rows[:, : 3 * width].reshape(height, width, 3))
            yield np.stack(frames)


def _read_image(path):
    """An image, or the first frame of an animation, without its alpha channel: uint8 (1, H, W, 3)."""
    try:
        check_regular(path)
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            transpose = EXIF_TRANSPOSES.get(image.getexif().get(ExifTags.Base.Orientation))
            if image.mode == "I;16":  # convert() would clip all values above 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = image.convert("RGB")
            return np.array(image if transpose is None else image.transpose(Image.Transpose[transpose]))[None]
    except NO_IMAGE as error:
        raise UnreadableError(f"{path}: {error}") from error


def resize_and_crop(frames, image_size):
    """Resize the short side and crop the center: uint8 (T, C, H, W) -> (T, C, image_size, image_size)."""
    height, width = frames.shape[-2:]
    scale = image_size / min(height, width)
    size = max(image_size, round(height * scale)), max(image_size, round(width * scale))
    if size != (height, width):
        frames = F.interpolate(frames, size, mode="bilinear", antialias=True)
    top, left = (size[0] - image_size) // 2, (size[1] - image_size) // 2
    return frames[..., top : top + image_size, left : left + image_size]
