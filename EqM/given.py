"""Given frames of samples: which ones, what they show, and how they look beside the sampled ones."""

import argparse
import math
import re
from dataclasses import dataclass
from functools import lru_cache

import torch

from runtime.cli import UserError, say
from video.clips import Clips
from video.samples import NO_LABEL

KEPT_CLIPS = 32  # that are kept in memory
NOT_FORCED = "was trained without --forcing, or on clips of one temporal patch, which are not forced"
STATIC = 16  # grey levels by which the decoded color of a pixel may change though nothing moves


class ClipReader:
    """Reads clips for the samples of a Plan: sample k gets clip k // per_clip, and the clips are taken in turn.

    frames: of each clip the numbers of the frames that are read. The clips of the samples `indices` are read here once:
    raises UserError unless all are as they should be.
    """

    def __init__(self, plan, clips, frames, indices, per_clip=1):
        self.plan, self.clips, self.frames, self.per_clip = plan, clips, frames, per_clip
        self.read = lru_cache(KEPT_CLIPS)(self.read_clip)
        for number in sorted({self.number(index) for index in indices}):
            self.read(number)

    def number(self, index):
        """The number of the clip of a sample."""
        return index // self.per_clip % len(self.clips)

    def read_clip(self, number):
        """(uint8 (3, T, H, W), black in frames that are not read, mask (T,): whether a frame is read)."""
        T, size, frames = self.plan.num_frames, self.plan.image_size, list(self.frames[number])
        clip, mask = torch.zeros(3, T, size, size, dtype=torch.uint8), torch.zeros(T, dtype=torch.bool)
        clip[:, frames] = self.clips[number].read(frames, self.plan.time_scale, size)
        mask[frames] = True
        return clip, mask

    def __call__(self, indices):
        """(clips uint8 (n, 3, T, H, W), mask (n, T)) of some samples."""
        pairs = [self.read(self.number(index)) for index in indices]
        return [torch.stack(part) for part in zip(*pairs, strict=True)]


class Given(ClipReader):
    """The --given frames of the samples of a Plan; sets the samples' classes. Raises UserError.

    origin: what samples.json says of the data folder that the clips are drawn from; empty for files.
    """

    def __init__(self, args, plan, indices, clips, origin):
        self.plan, self.origin = plan, origin
        clips = clips[: math.ceil(len(plan.labels) / args.samples_per_clip)]
        frames = [self.choose_frames(args, clip) for clip in clips]
        super().__init__(plan, clips, frames, indices, args.samples_per_clip)
        self.set_labels(args.classes)
        numbers = map(self.number, range(len(plan.labels)))
        self.seconds = [clips[number].seconds if origin else plan.time_scale for number in numbers]
        plan.time_scales = torch.tensor(self.seconds)
        if not plan.forcing:
            say(f"note: {args.ckpt} {NOT_FORCED}: the frames that it adds may not fit the given ones")

    def choose_frames(self, args, clip):
        """The numbers of the frames that a clip gives, the same in the sample."""
        T = self.plan.num_frames
        if T == 1:
            raise UserError(f"--given {args.given}: samples of 1 frame leave nothing to complete: raise --num-frames")
        if args.given_frames is None:
            return tuple(range(min(clip.count(self.plan.time_scale), T // 2)))
        check_frames(args.given_frames, T)
        return args.given_frames

    def set_labels(self, words):
        """A sample's class is the folder of its clip, if the model has that class, else that of --classes, else none.

        words: those of --classes; only "none" applies to all samples.
        """
        if words == ["none"]:
            return
        classes = self.plan.classes
        names = [self.clips[self.number(index)].class_name for index in range(len(self.plan.labels))]
        of_folder = torch.tensor([classes.index(name) if name in classes else NO_LABEL for name in names])
        of_flag = self.plan.labels if words else torch.full_like(of_folder, NO_LABEL)
        self.plan.labels = torch.where(of_folder == NO_LABEL, of_flag, of_folder)
        if words and (of_folder != NO_LABEL).any():
            say("note: --classes is not for given clips whose folder is one of the model's classes: those keep it")
        unknown = [name for name in names if name is not None and name not in classes]
        if unknown and not words:
            say(f"note: the model has no class {unknown[0]}, the folder of a given clip: no label; --classes names one")

    def frames_of(self, index):
        """The numbers of the given frames of a sample."""
        return self.frames[self.number(index)]

    def about(self):
        """What samples.json says of each sample, and of all."""
        rows = [
            {
                "source": str(self.clips[self.number(index)]),
                "frames": as_ranges(self.frames_of(index)),
                "class": name,
                "time_scale": seconds,
            }
            for index, (name, seconds) in enumerate(zip(self.plan.names, self.seconds, strict=True))
        ]
        return {"given": rows} | self.origin


@dataclass(frozen=True)
class DrawnClip:
    """A clip of a split of a data folder, as evaluate.py draws it. Has the interface of video.inputs.InputClip."""

    flag: str  # how the user named it, for messages
    clips: Clips
    index: int  # in their stream

    def __str__(self):
        return f"{self.clips.draw(self.index)[0].path}, clip {self.index}"

    @property
    def class_name(self):
        return self.clips.draw(self.index)[0].class_name

    @property
    def seconds(self):
        """Between its frames."""
        return self.clips.draw(self.index)[2]

    def count(self, seconds_per_frame):
        return self.clips.num_frames

    def read(self, frames, seconds_per_frame, image_size):
        """The frames with these numbers: uint8 (3, n, image_size, image_size). Raises UserError."""
        sample = self.clips[self.index]
        if sample["bad"]:
            raise UserError(f"{self.flag}: {sample['bad'][0]} can't be decoded: remove it")
        return sample["clip"][:, list(frames)]


class Details:
    """Shows given frames as they were read, and in the others, where nothing moves, what the VAE has lost of them.

    A VAE blurs what it decodes, so a static background would jump where a sample continues. What it lost of the last
    given frame (before all of them: of the first) is added wherever a decoded frame looks as that one does when
    decoded. clips uint8 (n, 3, T, H, W), mask (n, T): where it is true, a frame is given.
    """

    def __init__(self, clips, mask):
        self.clips, self.mask = clips, mask
        self.before = None  # (decoded, as read, whether it is given) of the last given frame so far, (n, 1, ...)

    def add(self, videos, first):
        """The decoded frames from `first` on, uint8 (n, k, H, W, 3), in order window by window, with details."""
        part = slice(first, first + videos.shape[1])
        own = videos, self.clips[:, :, part].permute(0, 2, 3, 4, 1), self.mask[:, part]
        frames = own if self.before is None else [torch.cat(pair, dim=1) for pair in zip(self.before, own, strict=True)]
        nearest, rows = nearest_given(frames[2]), torch.arange(len(videos), device=videos.device)
        decoded, real, given = frames
        detailed = []
        for t in range(decoded.shape[1] - videos.shape[1], decoded.shape[1]):
            place = rows, nearest[:, t]
            before, frame = decoded[place].float(), decoded[:, t].float()  # (n, H, W, 3)
            change = (frame - before).abs().amax(dim=-1, keepdim=True)
            static = torch.exp(-((change / STATIC) ** 2)) * given[place][:, None, None, None]  # 0 where none is given
            detailed.append((frame + static * (real[place].float() - before)).round().clamp(0, 255).byte())
        last = rows[:, None], nearest[:, -1:]
        self.before = decoded[last], real[last], given[last]
        return torch.stack(detailed, dim=1)


def paste_given(clips, mask, videos, first):
    """Decoded frames from `first` on, uint8 (n, k, H, W, 3), with the given ones as they were read and no other change.

    clips uint8 (n, 3, T, H, W), mask (n, T): where it is true, a frame is given.
    """
    part = slice(first, first + videos.shape[1])
    return torch.where(mask[:, part, None, None, None], clips[:, :, part].permute(0, 2, 3, 4, 1), videos)


def nearest_given(given):
    """For each frame the number of the last given one up to it or, if there is none, of the first one: (n, T) of a mask
    (n, T). Any number if none is given.
    """
    T = given.shape[1]
    numbers = torch.arange(T, device=given.device).expand_as(given)
    last = torch.where(given, numbers, -1).cummax(dim=1).values
    first = torch.where(given, numbers, T - 1).amin(dim=1, keepdim=True)
    return torch.where(last >= 0, last, first)


# ----------------------------------------------------------------------------------------------------------------------
# --given-frames


def frame_ranges(text):
    """(0, 1, 2, 3, 12, 13) from "0-3,12-13". A `type=` for argparse: raises ArgumentTypeError."""
    frames = set()
    for part in text.split(","):
        match = re.fullmatch("([0-9]{1,5})(?:-([0-9]{1,5}))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected numbers of frames such as 0-3,12-15")
        frames |= set(range(first, last + 1))
    return tuple(sorted(frames))


def as_ranges(frames):
    """ "0-3,12-13" from (0, 1, 2, 3, 12, 13)."""
    known = set(frames)
    starts = [frame for frame in frames if frame - 1 not in known]
    ends = [frame for frame in frames if frame + 1 not in known]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def check_frames(frames, num_frames):
    """Raise UserError unless --given-frames are some of the frames of a sample, but not all."""
    if frames[-1] >= num_frames:
        raise UserError(f"--given-frames {as_ranges(frames)}: the samples have the frames 0 to {num_frames - 1}")
    if len(frames) == num_frames:
        raise UserError(f"--given-frames {as_ranges(frames)}: are all frames of the samples: leave some to sample")
