"""Given frames of samples: how to choose, read and show them."""

import argparse
import math
import re
from functools import lru_cache

import torch

from runtime.cli import UserError, plural, say
from video.samples import NO_LABEL, class_names

KEPT_CLIPS = 32  # clips in the memory of a ClipReader
NOT_FORCED = (
    "was trained without --forcing, or on clips of one temporal patch, which are not forced"
)
STATIC = 16  # gray levels by which decoding may change the color of a pixel where nothing moves


class ClipReader:
    """Reads clips for the samples of a Plan: sample k gets clip k // per_clip, and after the last
    clip the first again.

    frames holds the frame numbers to read from each clip. The constructor reads the clips of the
    samples `indices` once, so it raises UserError if one can't be read.
    """

    def __init__(self, plan, clips, frames, indices, per_clip=1):
        self.plan = plan
        self.clips = clips
        self.frames = frames
        # each sample's clip
        self.numbers = [index // per_clip % len(clips) for index in range(len(plan.conditions))]
        self.read = lru_cache(KEPT_CLIPS)(self.read_clip)
        for number in sorted({self.numbers[index] for index in indices}):
            self.read(number)

    def read_clip(self, number):
        """Return the frames to read, uint8 (3, T, H, W), others black, and a mask (T,) of them."""
        T = self.plan.num_frames
        size = self.plan.image_size
        frames = list(self.frames[number])
        clip = torch.zeros(3, T, size, size, dtype=torch.uint8)
        mask = torch.zeros(T, dtype=torch.bool)
        clip[:, frames] = self.clips[number].read(frames, self.plan.time_scale, size)
        mask[frames] = True
        return clip, mask

    def __call__(self, indices):
        """Return clips uint8 (n, 3, T, H, W) and masks (n, T) of the samples `indices`."""
        clips, masks = zip(*(self.read(self.numbers[index]) for index in indices), strict=True)
        return torch.stack(clips), torch.stack(masks)

    def about(self):
        """Return what samples.json says about the clip of each sample."""
        rows = zip(self.numbers, self.plan.names, self.plan.time_scales, strict=True)
        return [
            {
                "source": str(self.clips[n]),
                "frames": as_ranges(self.frames[n]),
                "class": name,
                "time_scale": seconds,
            }
            for n, name, seconds in rows
        ]


def open_given(args, plan, clips, indices):
    """Return the ClipReader of --given, and set the classes and frame rates of the plan's samples.

    Raises UserError. The class of a sample is the folder of its clip if the model has this class,
    else from --classes, else none. With --classes none, no sample has a class.
    """
    clips = clips[: math.ceil(len(plan.conditions) / args.samples_per_clip)]
    frames = [choose_frames(args, plan, clip) for clip in clips]
    given = ClipReader(plan, clips, frames, indices, args.samples_per_clip)
    clips_of_samples = [clips[number] for number in given.numbers]
    if isinstance(clips[0], DrawnClip):
        plan.time_scales = [clip.seconds for clip in clips_of_samples]
    if args.classes != ["none"]:
        names = [clip.class_name for clip in clips_of_samples]
        usual = plan.conditions.tolist() if args.classes else [NO_LABEL] * len(names)
        labels = {name: label for label, name in enumerate(plan.classes)}
        unknown = [name for name in names if name not in {None, *labels}]
        if unknown and not args.classes:
            say(
                f"note: the model has no class {unknown[0]}, the folder of a given clip: no "
                "label; --classes names one"
            )
        plan.conditions = torch.tensor(
            [labels.get(name, label) for name, label in zip(names, usual, strict=True)]
        )
        plan.names = class_names(plan.classes, plan.conditions)
    if not plan.forcing:
        say(f"note: {args.ckpt} {NOT_FORCED}: new frames may not fit the given ones")
    return given


def choose_frames(args, plan, clip):
    """Return the numbers of the given frames, which are the same in the clip and the sample.

    Raises UserError.
    """
    T = plan.num_frames
    config = plan.model.config
    unit = config.level_frames
    count = min(clip.count(plan.time_scale), config.whole_levels(T // 2))
    frames = args.given_frames or tuple(range(count // unit * unit))
    if count < unit and not frames:
        raise UserError(
            f"--given {clip}: has {plural(count, 'frame')}; expected at least {unit}, a temporal "
            "patch"
        )
    if not frames or not set(frames) < set(range(T)):
        got = f"--given-frames {as_ranges(frames)}: samples have the frames 0 to {T - 1}"
        raise UserError(f"{got}; expected some of them, but not all")
    patches = {frame // unit for frame in frames}
    end = T if plan.window == T else math.ceil(T / unit) * unit
    if set(frames) != {frame for frame in range(end) if frame // unit in patches}:
        why = (
            f"splits a temporal patch of {unit} frames, which has one noise level in --objective "
            f"{config.objective}"
        )
        raise UserError(
            f"--given-frames {as_ranges(frames)}: {why}; expected whole patches, such as "
            f"0-{unit - 1}"
        )
    return frames


class DrawnClip:
    """A clip of a data folder, drawn from a Clips as in evaluate.py.

    Has the interface of video.inputs.InputClip.
    """

    def __init__(self, flag, clips, index):
        self.flag = flag
        self.clips = clips
        self.index = index
        video, _, self.seconds = clips.draw(index)
        self.path = video.path
        self.class_name = video.class_name

    def __str__(self):
        return f"{self.path}, clip {self.index}"

    def count(self, seconds_per_frame):
        return self.clips.num_frames

    def read(self, frames, seconds_per_frame, image_size):
        """Return frames by their numbers, uint8 (3, n, image_size, image_size).

        Raises UserError.
        """
        sample = self.clips[self.index]
        if sample["corrupt"]:
            raise UserError(f"{self.flag}: {sample['corrupt'][0]} can't be decoded; remove it")
        return sample["clip"][:, list(frames)]


class Details:
    """Restores given frames in decoded videos and, with keep_background, the detail of static parts
    of other frames.

    A VAE blurs, so a static background would jump after the last given frame. What the VAE lost in
    that frame is added to later frames, wherever they equal its decoded version. Frames before all
    given ones use the first given frame. clips are uint8 (n, 3, T, H, W); mask (n, T) is true for
    given frames.
    """

    def __init__(self, clips, mask, keep_background=True):
        self.real = clips.permute(0, 2, 3, 4, 1)
        self.mask = mask
        self.keep_background = keep_background
        # The last given frame so far: (decoded, as read, is it given?), (n, 1, ...), or empty.
        self.before = self.real[:, :0], self.real[:, :0], mask[:, :0]

    def add(self, videos, first):
        """Return decoded frames uint8 (n, k, H, W, 3) with detail.

        Call it in order; `first` is the first frame.
        """
        part = slice(first, first + videos.shape[1])
        own = videos, self.real[:, part], self.mask[:, part]
        if not self.keep_background:
            return torch.where(own[2][:, :, None, None, None], own[1], videos)
        decoded, real, mask = (
            torch.cat(pair, dim=1) for pair in zip(self.before, own, strict=True)
        )
        nearest = nearest_given(mask)
        rows = torch.arange(len(videos), device=videos.device)
        detailed = []
        for t in range(decoded.shape[1] - videos.shape[1], decoded.shape[1]):
            place = rows, nearest[:, t]
            # (n, H, W, 3)
            before = decoded[place].float()
            frame = decoded[:, t].float()
            change = (frame - before).abs().amax(dim=-1, keepdim=True)
            # 0 without given frames
            static = torch.exp(-((change / STATIC) ** 2)) * mask[place][:, None, None, None]
            detailed.append(
                (frame + static * (real[place].float() - before)).round().clamp(0, 255).byte()
            )
        last = rows[:, None], nearest[:, -1:]
        self.before = decoded[last], real[last], mask[last]
        return torch.stack(detailed, dim=1)


def nearest_given(mask):
    """Return (n, T): the last given frame up to each frame, or else the first.

    mask (n, T) is true for given frames.
    """
    last = (
        torch.where(mask, torch.arange(mask.shape[1], device=mask.device), -1).cummax(dim=1).values
    )
    return torch.where(last >= 0, last, mask.int().argmax(dim=1, keepdim=True))


def frame_ranges(text):
    """Return (0, 1, 2, 3, 12, 13) for "0-3,12-13".

    A `type=` for argparse: raises ArgumentTypeError.
    """
    frames = set()
    for part in text.split(","):
        match = re.fullmatch("([0-9]{1,5})(?:-([0-9]{1,5}))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise argparse.ArgumentTypeError(
                f"got {text!r}, expected numbers of frames such as 0-3,12-15"
            )
        frames |= set(range(first, last + 1))
    return tuple(sorted(frames))


def as_ranges(frames):
    """Return "0-3,12-13" for (0, 1, 2, 3, 12, 13)."""
    starts = [frame for frame in frames if frame - 1 not in frames]
    ends = [frame for frame in frames if frame + 1 not in frames]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
