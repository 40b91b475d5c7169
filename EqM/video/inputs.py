"""Clips that a user names for sampling: frames to complete (--given), or an initial clip (--init).

Frames are scaled and cropped as in training, and taken at the frame rate of the model's clips.
"""

import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from runtime.cli import UserError, plural
from video.files import SUFFIXES, UnreadableError, probe, read_frames, resize_and_crop
from video.index import list_files
from video.samples import class_name, read_samples, time_scales_of


@dataclass
class InputClip:
    """A video, a picture, or a sample of an earlier run."""

    flag: str  # the flag that named it, for messages: "--given clip.mp4"
    path: str
    class_name: str | None  # the name of its folder, or the class of the sample
    number: int | None = None  # of the sample in its samples.npz
    stored: tuple | None = None  # see `open`; None until a file is opened

    def __str__(self):
        return self.path if self.number is None else f"{self.path}, sample {self.number}"

    def count(self, seconds_per_frame):
        """The number of frames at that rate; 1 for a picture. Raises UserError."""
        num_frames, seconds, _ = self.open()
        return 1 + int((num_frames - 1) * seconds / seconds_per_frame + 1e-3)

    def read(self, frames, seconds_per_frame, image_size):
        """The frames with these numbers, which ascend, at that rate: uint8 (3, n, size, size).

        Raises UserError.
        """
        num_frames, seconds, read_stored = self.open()
        closest = closest_frames(frames, seconds_per_frame, seconds)
        if closest[-1] >= num_frames:
            raise UserError(
                f"{self.flag}: {self} has {plural(self.count(seconds_per_frame), 'frame')} of "
                f"{seconds_per_frame:.3g} s, expected {frames[-1] + 1}; name a longer clip, or "
                "fewer frames"
            )
        stored, rows = np.unique(closest, return_inverse=True)  # at a high rate, some frames repeat
        pixels = torch.from_numpy(read_stored(stored.tolist())).permute(0, 3, 1, 2)  # (n, 3, H, W)
        return resize_and_crop(pixels, image_size)[rows].transpose(0, 1)

    def open(self):
        """(number of frames, seconds between them, function that reads frames by number).

        Frames are (n, H, W, 3).
        """
        if self.stored is None:
            video = self._decode(probe, "", "", self.path)
            read_stored = partial(self._decode, read_frames, "", video)
            self.stored = video.num_frames, 1 / video.fps, read_stored
        return self.stored

    def _decode(self, function, *arguments):
        try:
            return function(*arguments)
        except UnreadableError as error:
            raise UserError(f"{self.flag}: {self} can't be decoded; name another file") from error


def closest_frames(frames, seconds_per_frame, stored_seconds):
    """The numbers of the stored frames that are closest in time to some frames.

    Of two that are equally close, always the later one: at half the rate, every frame then shows
    twice. `round` would take the even one, so that frames show three times and once in turn.
    """
    ratio = seconds_per_frame / stored_seconds
    return [math.floor(frame * ratio + 0.5 + 1e-6) for frame in frames]  # 1e-6: of rounding


def find_clips(flag, path, kinds, cleared=None):
    """The clips in a file or folder that a flag such as "--given" names, sorted. Raises UserError.

    A folder contains files of these kinds ("video", "image"), class folders of them, or samples of
    sample_gd.py. None may be in the folder `cleared`, from which sample_gd.py removes earlier
    samples.
    """
    flag = f"{flag} {path or repr('')}"
    path = str(path)
    samples = path if os.path.basename(path) == "samples.npz" else os.path.join(path, "samples.npz")
    if path and os.path.isfile(samples):
        clips = sampled_clips(flag, samples)
    elif not os.path.exists(path):
        raise UserError(f"{flag}: no such file or folder")
    else:
        files = [path]
        if os.path.isdir(path):
            files = [os.path.join(path, file) for file in list_files(flag, path)]
        suffixes = sum([SUFFIXES[kind] for kind in kinds], ())
        files = [file for file in files if file.lower().endswith(suffixes)]
        clips = [InputClip(flag, file, Path(os.path.abspath(file)).parent.name) for file in files]
        if not clips:
            raise UserError(
                f"{flag}: no {' or '.join(kinds)}; expected one of {' '.join(suffixes)}, or a "
                "folder of sample_gd.py"
            )
    for clip in clips if cleared else ():
        if os.path.realpath(os.path.dirname(clip.path)) == os.path.realpath(cleared):
            raise UserError(
                f"{flag}: {clip.path} is in --folder {cleared}, which is cleared; name another "
                "folder"
            )
    return clips


def sampled_clips(flag, path):
    """The samples in a samples.npz. Raises UserError."""
    about, videos, labels = read_samples(flag, os.path.dirname(path))
    time_scales = time_scales_of(about, len(videos))
    clips = []
    for number, (video, label) in enumerate(zip(videos, labels.tolist(), strict=True)):
        clip = InputClip(
            flag=flag,
            path=path,
            class_name=class_name(about["classes"], label),
            number=number,
            stored=(len(video), time_scales[number], video.__getitem__),
        )
        clips.append(clip)
    return clips
