"""Given frames of samples: which ones, what they show, and how they look beside the sampled ones."""

import argparse
import math
import re
from functools import lru_cache

import torch

from runtime.cli import UserError, say
from video.samples import NO_LABEL

KEPT_CLIPS = 32  # that are kept in memory
NOT_FORCED = "was trained without --forcing, or on clips of one temporal patch, which are not forced"
STATIC = 16  # gray levels by which the decoded color of a pixel may change though nothing moves


class ClipReader:
    """Reads clips for the samples of a Plan: sample k gets clip k // per_clip, and the clips are taken in turn.

    frames: of each clip the numbers of the frames that are read. The clips of the samples `indices` are read here once:
    raises UserError unless all are as they should be.
    """

    def __init__(self, plan, clips, frames, indices, per_clip=1):
        self.plan, self.clips, self.frames = plan, clips, frames
        self.numbers = [index // per_clip % len(clips) for index in range(len(plan.labels))]  # each sample's clip
        self.read = lru_cache(KEPT_CLIPS)(self.read_clip)
        for number in sorted({self.numbers[index] for index in indices}):
            self.read(number)

    def read_clip(self, number):
        """(uint8 (3, T, H, W), black in frames that are not read, mask (T,): whether a frame is read)."""
        T, size, frames = self.plan.num_frames, self.plan.image_size, list(self.frames[number])
        clip, mask = torch.zeros(3, T, size, size, dtype=torch.uint8), torch.zeros(T, dtype=torch.bool)
        clip[:, frames] = self.clips[number].read(frames, self.plan.time_scale, size)
        mask[frames] = True
        return clip, mask

    def __call__(self, indices):
        """(clips uint8 (n, 3, T, H, W), mask (n, T)) of some samples."""
        clips, masks = zip(*(self.read(self.numbers[index]) for index in indices), strict=True)
        return torch.stack(clips), torch.stack(masks)

    def about(self):
        """What samples.json says of the clip of each sample."""
        rows = zip(self.numbers, self.plan.names, self.plan.time_scales, strict=True)
        return [
            {"source": str(self.clips[n]), "frames": as_ranges(self.frames[n]), "class": name, "time_scale": seconds}
            for n, name, seconds in rows
        ]


def open_given(args, plan, clips, indices):
    """The ClipReader of the --given frames; sets the classes and frame rates of the plan's samples. Raises UserError.

    The class of a sample is the folder of its clip, if the model has that class, else that of --classes, else none;
    --classes none is for all samples.
    """
    clips = clips[: math.ceil(len(plan.labels) / args.samples_per_clip)]
    frames = [choose_frames(args, plan, clip) for clip in clips]
    given = ClipReader(plan, clips, frames, indices, args.samples_per_clip)
    own = [clips[number] for number in given.numbers]
    if isinstance(clips[0], DrawnClip):
        plan.time_scales = [clip.seconds for clip in own]
    if args.classes != ["none"]:
        usual = plan.labels.tolist() if args.classes else [NO_LABEL] * len(own)
        labels = {None: NO_LABEL} | {name: label for label, name in enumerate(plan.classes)}
        unknown = [clip.class_name for clip in own if clip.class_name not in labels]
        if unknown and not args.classes:
            say(f"note: the model has no class {unknown[0]}, the folder of a given clip: no label; --classes names one")
        of_folder = [labels.get(clip.class_name, NO_LABEL) for clip in own]
        plan.labels = torch.tensor([b if a == NO_LABEL else a for a, b in zip(of_folder, usual, strict=True)])
    if not plan.forcing:
        say(f"note: {args.ckpt} {NOT_FORCED}: the frames that it adds may not fit the given ones")
    return given


def choose_frames(args, plan, clip):
    """The numbers of the frames that a clip gives, the same in the sample. Raises UserError."""
    T = plan.num_frames
    frames = args.given_frames or tuple(range(min(clip.count(plan.time_scale), T // 2)))
    if not frames or not set(frames) < set(range(T)):
        got = f"--given-frames {as_ranges(frames)}: samples have the frames 0 to {T - 1}"
        raise UserError(f"{got}; expected some of them, but not all")
    return frames


class DrawnClip:
    """A clip of a split of a data folder, as evaluate.py draws it. Has the interface of video.inputs.InputClip.

    flag: how the user named it, for messages; index: in the stream of a Clips; seconds: between its frames.
    """

    def __init__(self, flag, clips, index):
        self.flag, self.clips, self.index = flag, clips, index
        video, _, self.seconds = clips.draw(index)
        self.path, self.class_name = video.path, video.class_name

    def __str__(self):
        return f"{self.path}, clip {self.index}"

    def count(self, seconds_per_frame):
        return self.clips.num_frames

    def read(self, frames, seconds_per_frame, image_size):
        """The frames with these numbers: uint8 (3, n, image_size, image_size). Raises UserError."""
        sample = self.clips[self.index]
        if sample["corrupt"]:
            raise UserError(f"{self.flag}: {sample['corrupt'][0]} can't be decoded; remove it")
        return sample["clip"][:, list(frames)]


class Details:
    """Shows given frames as they were read, and in the others, where nothing moves, what the VAE has lost of them.

    A VAE blurs what it decodes, so a static background would jump where a sample continues. With keep_background, what
    it lost of the last given frame (before all of them: of the first) is added wherever a decoded frame looks as that
    one does when decoded. clips uint8 (n, 3, T, H, W), mask (n, T): where it is true, a frame is given.
    """

    def __init__(self, clips, mask, keep_background=True):
        self.real, self.mask, self.keep_background = clips.permute(0, 2, 3, 4, 1), mask, keep_background
        # (decoded, as read, whether it is given) of the last given frame so far, (n, 1, ...); at first of none
        self.before = self.real[:, :0], self.real[:, :0], mask[:, :0]

    def add(self, videos, first):
        """The decoded frames from `first` on, uint8 (n, k, H, W, 3), in order window by window, with details."""
        part = slice(first, first + videos.shape[1])
        own = videos, self.real[:, part], self.mask[:, part]
        if not self.keep_background:
            return torch.where(own[2][:, :, None, None, None], own[1], videos)
        decoded, real, given = (torch.cat(pair, dim=1) for pair in zip(self.before, own, strict=True))
        nearest, rows = nearest_given(given), torch.arange(len(videos), device=videos.device)
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


def nearest_given(given):
    """For each frame the number of the last given one up to it or else of the first one: (n, T) of a mask (n, T).

    Any number if none is given.
    """
    last = torch.where(given, torch.arange(given.shape[1], device=given.device), -1).cummax(dim=1).values
    return torch.where(last >= 0, last, given.int().argmax(dim=1, keepdim=True))


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
    starts = [frame for frame in frames if frame - 1 not in frames]
    ends = [frame for frame in frames if frame + 1 not in frames]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
