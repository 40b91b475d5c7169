"""Clips that a user names for sampling: frames to complete (--given), or a start (--init).

They may be videos, pictures, or the samples of an earlier run. Their frames are scaled and cropped as those of training
clips are, and taken at the times that the frames of the model's clips have.
"""

import argparse
import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from runtime.cli import UserError, say
from video.files import SUFFIXES, UnreadableError, has_suffix, probe, read_frames, resize_and_crop
from video.index import list_folder
from video.samples import NO_LABEL, class_name, read_samples

KEPT_CLIPS = 32  # that are kept in memory
KINDS = {True: ("image",), False: ("video", "image")}  # of files for a model of images, of videos


@dataclass(frozen=True)
class GivenClip:
    """A video, a picture, or a sample of an earlier run."""

    flag: str  # how the user named it, for messages: "--given clip.mp4"
    path: str
    class_name: str  # of its folder, or of the sample
    number: int | None = None  # of the sample in a samples.npz

    def __str__(self):
        return self.path if self.number is None else f"{self.path}, sample {self.number}"

    def count(self, seconds_per_frame):
        """How many frames it has at that rate; a picture has 1. Raises UserError."""
        num_frames, seconds = self._timing()
        return 1 + int((num_frames - 1) * seconds / seconds_per_frame + 1e-3)

    def read(self, frames, seconds_per_frame, image_size):
        """The frames with these numbers (ascending) at that rate: uint8 (3, n, image_size, image_size).

        Raises UserError.
        """
        num_frames, seconds = self._timing()
        wanted = [round(frame * seconds_per_frame / seconds) for frame in frames]
        if wanted[-1] >= num_frames:
            found = self.count(seconds_per_frame)
            raise UserError(
                f"{self.flag}: {self} has {found} frames of {seconds_per_frame:.3g} s, wanted {frames[-1] + 1}: name a "
                "longer clip, or fewer frames"
            )
        pixels = torch.from_numpy(self._pixels(sorted(set(wanted)))).permute(0, 3, 1, 2)
        pixels = resize_and_crop(pixels, image_size)  # (n, 3, H, W)
        return pixels[np.unique(wanted, return_inverse=True)[1]].transpose(0, 1)

    def _timing(self):
        """(number of frames, seconds between them)."""
        if self.number is not None:
            about, clips, _ = self._samples()
            return clips.shape[1], about["time_scale"]
        video = self._probe()
        return video.num_frames, 1 / video.fps

    def _pixels(self, frames):
        """uint8 (n, H, W, 3)."""
        if self.number is not None:
            return self._samples()[1][self.number][frames]
        try:
            return read_frames("", self._probe(), frames)
        except UnreadableError as error:
            raise UserError(f"{self.flag}: {self} can't be decoded: name another file") from error

    def _probe(self):
        try:
            return probe("", "", self.path)
        except UnreadableError as error:
            raise UserError(f"{self.flag}: {self} can't be decoded: name another file") from error

    def _samples(self):
        return read_samples(self.flag, os.path.dirname(self.path))


def find_clips(flag, path, images):
    """The clips that a flag such as "--given" names by the path of a file or folder, sorted. Raises UserError.

    A folder holds files, class folders of files, or the samples of an earlier run. images: for a model of images, which
    takes pictures only; one of videos takes both.
    """
    name, path = f"{flag} {path}", str(path)
    samples = path if os.path.basename(path) == "samples.npz" else os.path.join(path, "samples.npz")
    if os.path.isfile(samples):
        about, _, labels = read_samples(name, os.path.dirname(samples))
        return [GivenClip(name, samples, class_name(about["classes"], label), n) for n, label in enumerate(labels)]
    kinds = KINDS[images]
    if os.path.isdir(path):
        folders = [path, *(os.path.join(path, folder) for folder in list_folder(name, path, kinds[0])[0])]
        files = [os.path.join(one, file) for one in folders for file in _files_in(name, one, kinds)]
    else:
        if not os.path.isfile(path):
            raise UserError(f"{name}: no such file or folder")
        files = [path] if any(has_suffix(kind, path) for kind in kinds) else []
    if not files:
        suffixes = " ".join(suffix for kind in kinds for suffix in SUFFIXES[kind])
        raise UserError(f"{name}: no {' or '.join(kinds)}, wanted one of {suffixes}, or a folder of sample_gd.py")
    return [GivenClip(name, file, Path(os.path.abspath(file)).parent.name) for file in files]


def _files_in(name, folder, kinds):
    """The names of the files of some kinds directly in a folder, sorted."""
    return sorted(file for kind in kinds for file in list_folder(name, folder, kind)[1])


class Given:
    """The --given frames of the samples of a source (see generation.py), whose labels it sets. Raises UserError.

    The files of the samples `indices` are read here once, to see whether all are as they should be.
    """

    def __init__(self, args, source, indices):
        self.source, count = source, len(source.labels)
        self.clips = find_clips("--given", args.given, images=False)[:count]
        if source.num_frames == 1:
            raise UserError(f"--given {args.given}: samples of 1 frame leave nothing to complete: raise --num-frames")
        self.frames = [self.choose_frames(args, clip) for clip in self.clips]  # of each clip
        self.set_labels(args)
        self.read = functools.lru_cache(KEPT_CLIPS)(self.read_clip)
        for number in sorted({index % len(self.clips) for index in indices}):
            self.read(number)
        if not source.forcing:
            say(f"note: {args.ckpt} was trained without --forcing: the frames that it adds may not fit the given ones")

    def choose_frames(self, args, clip):
        """The numbers of the frames that a clip gives, the same in the sample."""
        T = self.source.num_frames
        frames = args.given_frames or tuple(range(min(clip.count(self.source.time_scale), T // 2)))
        if frames[-1] >= T:
            raise UserError(f"--given-frames {as_ranges(frames)}: the samples have the frames 0 to {T - 1}")
        if len(frames) == T:
            raise UserError(f"--given-frames {as_ranges(frames)}: leaves none of the {T} frames to sample: give fewer")
        return frames

    def set_labels(self, args):
        """A sample's class is that of the folder of its clip, if the model has it, else of --classes, else none."""
        classes, of_flag = self.source.classes, self.source.labels
        if args.classes == ["none"]:
            return
        names = [self.clip_of(index).class_name for index in range(len(of_flag))]
        of_folder = [classes.index(name) if name in classes else None for name in names]
        rest = of_flag.tolist() if args.classes else [NO_LABEL] * len(names)
        pairs = list(zip(of_folder, rest, strict=True))
        self.source.labels = torch.tensor([label if own is None else own for own, label in pairs])
        if args.classes and any(own is not None for own in of_folder):
            say("note: --classes is not for given clips whose folder is one of the model's classes: those keep it")
        if not args.classes and None in of_folder:
            name = names[of_folder.index(None)]
            say(f"note: the model has no class {name}, the folder of a given clip: no label; --classes names one")

    def clip_of(self, index):
        return self.clips[index % len(self.clips)]

    def frames_of(self, index):
        return self.frames[index % len(self.clips)]

    def read_clip(self, number):
        """(uint8 (3, T, H, W), black where nothing is given, mask (T,))."""
        T, size, frames = self.source.num_frames, self.source.image_size, list(self.frames[number])
        clip, mask = torch.zeros(3, T, size, size, dtype=torch.uint8), torch.zeros(T, dtype=torch.bool)
        clip[:, frames] = self.clips[number].read(frames, self.source.time_scale, size)
        mask[frames] = True
        return clip, mask

    def __call__(self, indices):
        """(clips uint8 (n, 3, T, H, W), mask (n, T)) of some samples."""
        pairs = [self.read(index % len(self.clips)) for index in indices]
        return [torch.stack(part) for part in zip(*pairs, strict=True)]

    def about(self):
        """What samples.json says of each sample."""
        return [
            {"source": str(self.clip_of(index)), "frames": as_ranges(self.frames_of(index)), "class": name}
            for index, name in enumerate(self.source.names)
        ]


# ----------------------------------------------------------------------------------------------------------------------
# Numbers of frames as text


def frame_ranges(text):
    """(0, 1, 2, 3, 12, 13) from "0-3,12-13". A `type=` for argparse: raises ArgumentTypeError."""
    frames = set()
    for part in text.split(","):
        match = re.fullmatch("([0-9]{1,5})(?:-([0-9]{1,5}))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise argparse.ArgumentTypeError(f"found {text!r}, wanted numbers of frames such as 0-3,12-15")
        frames |= set(range(first, last + 1))
    return tuple(sorted(frames))


def as_ranges(frames):
    """ "0-3,12-13" from (0, 1, 2, 3, 12, 13)."""
    starts = [frame for frame in frames if frame - 1 not in frames]
    ends = [frame for frame in frames if frame + 1 not in frames]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
