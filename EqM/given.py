"""Given frames of samples: which ones, what they show, and the class of their sample."""

import argparse
import re
from functools import lru_cache

import torch

from runtime.cli import UserError, say
from video.inputs import check_apart, find_clips
from video.samples import NO_LABEL

KEPT_CLIPS = 32  # that are kept in memory
NOT_FORCED = "was trained without --forcing, or on clips of one temporal patch, which are not forced"
STILL = 16  # grey levels by which the decoded color of a pixel may change though nothing moves


class Given:
    """The --given frames of the samples of a Source (see generation.py), whose labels it sets. Raises UserError.

    The files of the samples `indices` are read here once, to see whether all are as they should be.
    """

    def __init__(self, args, source, indices):
        self.source = source
        self.clips = find_clips("--given", args.given, ("video", "image"))[: len(source.labels)]
        check_apart(self.clips, args.folder)
        self.frames = [self.choose_frames(args, clip) for clip in self.clips]  # of each clip
        self.set_labels(args.classes)
        self.read = lru_cache(KEPT_CLIPS)(self.read_clip)
        for number in sorted({index % len(self.clips) for index in indices}):
            self.read(number)
        note_forcing(args.ckpt, source)

    def choose_frames(self, args, clip):
        """The numbers of the frames that a clip gives, the same in the sample."""
        T = self.source.num_frames
        if T == 1:
            raise UserError(f"--given {args.given}: samples of 1 frame leave nothing to complete: raise --num-frames")
        if args.given_frames is None:
            return tuple(range(min(clip.count(self.source.time_scale), T // 2)))
        check_frames(args.given_frames, T)
        return args.given_frames

    def set_labels(self, words):
        """A sample's class is that of the folder of its clip, if the model has it, else that of --classes, else none.

        words: those of --classes; only "none" applies to all samples.
        """
        classes, of_flag = self.source.classes, self.source.labels
        if words == ["none"]:
            return
        names = [self.clip_of(index).class_name for index in range(len(of_flag))]
        of_folder = [classes.index(name) if name in classes else None for name in names]
        rest = of_flag.tolist() if words else [NO_LABEL] * len(names)
        pairs = list(zip(of_folder, rest, strict=True))
        self.source.labels = torch.tensor([label if own is None else own for own, label in pairs])
        if words and any(own is not None for own in of_folder):
            say("note: --classes is not for given clips whose folder is one of the model's classes: those keep it")
        unknown = [name for name, own in zip(names, of_folder, strict=True) if own is None and name is not None]
        if unknown and not words:
            say(f"note: the model has no class {unknown[0]}, the folder of a given clip: no label; --classes names one")

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


class Details:
    """Shows given frames as they were read, and in the others, where nothing moves, what the VAE has lost of them.

    A VAE blurs what it decodes, so a still background would jump where a sample goes on. What it lost of the last given
    frame (before all of them: of the first) is added wherever a decoded frame looks as that one does when decoded.
    clips uint8 (n, 3, T, H, W), mask (n, T): where it is true, a frame is given.
    """

    def __init__(self, clips, mask):
        self.clips, self.mask = clips, mask
        self.before = None  # (decoded, as read, whether it is given) of the last given frame so far, (n, 1, ...)

    def add(self, videos, first):
        """The decoded frames from `first` on, uint8 (n, k, H, W, 3), in order window by window, with details."""
        part = slice(first, first + videos.shape[1])
        own = videos, self.clips[:, :, part].permute(0, 2, 3, 4, 1), self.mask[:, part]
        frames = own if self.before is None else [torch.cat(pair, dim=1) for pair in zip(self.before, own, strict=True)]
        sources, rows = nearest_given(frames[2]), torch.arange(len(videos), device=videos.device)
        decoded, real, given = frames
        detailed = []
        for t in range(decoded.shape[1] - videos.shape[1], decoded.shape[1]):
            source = rows, sources[:, t]
            before, frame = decoded[source].float(), decoded[:, t].float()  # (n, H, W, 3)
            change = (frame - before).abs().amax(dim=-1, keepdim=True)
            still = torch.exp(-((change / STILL) ** 2)) * given[source][:, None, None, None]  # 0 where none is given
            detailed.append((frame + still * (real[source].float() - before)).round().clamp(0, 255).byte())
        last = rows[:, None], sources[:, -1:]
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


def note_forcing(ckpt, source):
    if not source.forcing:
        say(f"note: {ckpt} {NOT_FORCED}: the frames that it adds may not fit the given ones")


# ----------------------------------------------------------------------------------------------------------------------
# --given-frames


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
