"""Given frames of samples: how to choose, read and show them."""

import argparse
import math
import os
import re
from functools import lru_cache

import torch
import torch.nn.functional as F

from runtime.cli import COUNT, SHARE, UserError, flag_text, plural, say
from runtime.distributed import rank
from video.actions import NO_ACTION, find_actions
from video.inputs import closest_frames, find_clips
from video.samples import NO_LABEL
from video.source import check_data_path

SAME_RATE = 0.05  # relative difference of frame rates that does not count
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
        # what is read lasts as long, for each clip, however long the video becomes
        self.num_frames = 1 + max(map(max, frames))
        # each sample's clip
        self.numbers = [index // per_clip % len(clips) for index in range(len(plan.conditions))]
        self.read = lru_cache(KEPT_CLIPS)(self.read_clip)
        needed = {self.numbers[index] for index in indices}
        for number in sorted(needed):
            self.read(number)

    def read_clip(self, number):
        """Return the frames to read, uint8 (3, T, H, W), others black, and a mask (T,) of them.

        The last frame that is read from some clip is number T - 1.
        """
        frames = list(self.frames[number])
        T = self.num_frames
        size = self.plan.image_size
        clip = torch.zeros(3, T, size, size, dtype=torch.uint8)
        mask = torch.zeros(T, dtype=torch.bool)
        clip[:, frames] = self.clips[number].read(frames, self.plan.time_scale, size)
        mask[frames] = True
        return clip, mask

    def __call__(self, indices):
        """Return clips uint8 (n, 3, T, H, W) and masks (n, T) of the samples `indices`."""
        clips, masks = zip(*[self.read(self.numbers[index]) for index in indices], strict=True)
        return torch.stack(clips), torch.stack(masks)

    def about(self):
        """Return what samples.json says about the clip of each sample."""
        plan = self.plan
        return [
            {
                "source": str(self.clips[number]),
                "frames": as_ranges(self.frames[number]),
                "class": name,
                "time_scale": seconds,
            }
            for number, name, seconds in zip(
                self.numbers, plan.names, plan.time_scales, strict=True
            )
        ]


def open_given(args, plan, clips, indices):
    """Return the ClipReader of --given, and set the classes and frame rates of the plan's samples.

    Raises UserError. The class of a sample is the folder of its clip if the model has this class,
    else from --classes, else none, or with actions the only one. With --classes none, no sample has
    a class. Spans of --classes name the class of each patch, also of the given ones.
    """
    num_clips = math.ceil(len(plan.conditions) / args.samples_per_clip)
    clips = clips[:num_clips]
    given = ClipReader(
        plan=plan,
        clips=clips,
        frames=[choose_frames(args, plan, clip) for clip in clips],
        indices=indices,
        per_clip=args.samples_per_clip,
    )
    lengths = {len(frames) for frames in given.frames}
    if plan.model.config.causal and len(lengths) > 1:
        raise UserError(
            f"--given {args.given}: some clips give {min(lengths)} frames, some {max(lengths)}; "
            f"set --given-frames, such as 0-{min(lengths) - 1}"
        )
    clip_of_sample = [clips[number] for number in given.numbers]
    if isinstance(clips[0], DrawnClip):
        plan.time_scales = [clip.seconds for clip in clip_of_sample]
    if args.classes != ["none"] and plan.spans is None:
        labels_by_name = {name: label for label, name in enumerate(plan.classes)}
        # In training, clips without a class have no actions either
        is_known = args.classes or (plan.actions is not None and len(plan.classes) == 1)
        labels = plan.conditions.tolist() if is_known else [NO_LABEL] * len(plan.conditions)
        unknown = []
        for sample, clip in enumerate(clip_of_sample):
            if clip.class_name in labels_by_name:
                labels[sample] = labels_by_name[clip.class_name]
            elif clip.class_name is not None:
                unknown.append(clip.class_name)
        if unknown and not is_known:
            say(
                f"note: the model has no class {unknown[0]}, the folder of a given clip: no "
                "label; --classes names one"
            )
        plan.conditions = torch.tensor(labels)
    if not plan.forcing:
        say(f"note: {args.ckpt} {NOT_FORCED}: new frames may not fit the given ones")
    if plan.actions is not None:
        set_given_actions(plan, given)
    return given


def set_given_actions(plan, given):
    """Set the actions of given frames where a file beside their clip has them, else none.

    Raises UserError.
    """
    recorded = [
        recorded_actions(plan, clip, frames)
        for clip, frames in zip(given.clips, given.frames, strict=True)
    ]
    for sample, number in enumerate(given.numbers):
        plan.actions[sample, list(given.frames[number])] = recorded[number]
    plan.actions[:, 0] = NO_ACTION


def recorded_actions(plan, clip, frames):
    """The actions of some frames of a clip, (n,) int64. Raises UserError."""
    none = torch.full((len(frames),), NO_ACTION)
    path, num_frames, stored = stored_frames(clip, frames, plan.time_scale)
    try:
        actions = find_actions(path, num_frames, plan.model.config.action_names)
    except (OSError, ValueError) as error:
        raise UserError(f"{clip.flag}: the actions of {path}: {error}; write them again") from error
    if actions is None:
        return none
    if stored is None:
        say(f"note: {clip.flag}: {path} has another frame rate than the model, so no actions")
        return none
    return torch.tensor(actions[stored])


def stored_frames(clip, frames, seconds_per_frame):
    """(path of a clip's file, its number of frames, the numbers in it of some frames, or None if
    these do not follow each other as the frames do).
    """
    if isinstance(clip, DrawnClip):
        video, indices, _ = clip.clips.draw(clip.index)
        path = os.path.join(clip.clips.source.root, video.path)
        num_frames = video.num_frames
        stored = [indices[frame] for frame in frames]
        ratio = 1.0  # the model is told the rate of the clip
    else:
        path = clip.path
        num_frames, seconds, _ = clip.open()
        stored = closest_frames(frames, seconds_per_frame, seconds)
        ratio = seconds_per_frame / seconds
    is_as_long = stored[-1] - stored[0] == frames[-1] - frames[0]
    # two frames at another rate can be as long, by rounding
    has_same_rate = is_as_long and abs(ratio - 1) < SAME_RATE
    return path, num_frames, stored if has_same_rate else None


def choose_frames(args, plan, clip):
    """Return the numbers of the given frames, which are the same in the clip and the sample.

    Raises UserError.
    """
    T = plan.num_frames
    config = plan.model.config
    unit = config.level_frames
    count = min(clip.count(plan.time_scale), config.whole_levels(T // 2))
    first_half = range(count // unit * unit)
    frames = args.given_frames or tuple(first_half)
    if not frames:
        raise UserError(
            f"--given {clip}: has {plural(count, 'frame')}; expected at least {unit}, a temporal "
            "patch"
        )
    if not set(frames) < set(range(T)):
        raise UserError(
            f"--given-frames {as_ranges(frames)}: samples have the frames 0 to {T - 1}; expected "
            "some of them, but not all"
        )
    if config.causal and frames != tuple(range(len(frames))):
        raise UserError(
            f"--given-frames {as_ranges(frames)}: a causal model continues the first frames; "
            f"expected these, such as 0-{unit - 1}"
        )
    patches = {frame // unit for frame in frames}
    end = T if plan.window == T else math.ceil(T / unit) * unit
    in_patches = [frame for frame in range(end) if frame // unit in patches]
    if sorted(frames) != in_patches:
        raise UserError(
            f"--given-frames {as_ranges(frames)}: splits a temporal patch of {unit} frames, which "
            f"has one noise level in --objective {config.objective}; expected whole patches, such "
            f"as 0-{unit - 1}"
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
    given frames. Frames after T are not given.
    """

    def __init__(self, clips, mask, keep_background=True):
        self.clips = clips
        self.real = clips.permute(0, 2, 3, 4, 1)
        self.mask = mask
        self.keep_background = keep_background
        # The last given frame so far, decoded and as read, (2, n, 1, H, W, 3), and whether it is
        # given (n, 1). At first both are empty.
        self.last_frames = torch.stack([self.real[:, :0]] * 2)
        self.last_mask = mask[:, :0]

    def add(self, videos, first):
        """Return decoded frames uint8 (n, k, H, W, 3) with detail.

        Call it in order; `first` is the first frame.
        """
        end = first + videos.shape[1]
        real = self.real[:, first:end]
        mask = self.mask[:, first:end]
        after = videos.shape[1] - real.shape[1]
        real = F.pad(real, (0, 0, 0, 0, 0, 0, 0, after))
        mask = F.pad(mask, (0, after))
        if not self.keep_background:
            return torch.where(mask[:, :, None, None, None], real, videos)
        frames = torch.cat([self.last_frames, torch.stack([videos, real])], dim=2)
        mask = torch.cat([self.last_mask, mask], dim=1)
        nearest = nearest_given(mask)
        rows = torch.arange(len(videos), device=videos.device)
        detailed = []
        for t in range(self.last_mask.shape[1], mask.shape[1]):
            given_decoded, given_real = frames[:, rows, nearest[:, t]].float()  # (n, H, W, 3)
            is_given = mask[rows, nearest[:, t]]  # false without given frames
            frame = frames[0, :, t].float()
            change = (frame - given_decoded).abs().amax(dim=-1, keepdim=True)
            static = torch.exp(-((change / STATIC) ** 2)) * is_given[:, None, None, None]
            frame = frame + static * (given_real - given_decoded)
            detailed.append(frame.round().clamp(0, 255).byte())
        last = nearest[:, -1:]
        self.last_frames = frames[:, rows[:, None], last]
        self.last_mask = mask.gather(1, last)
        return torch.stack(detailed, dim=1)


def nearest_given(mask):
    """Return (n, T): the last given frame up to each frame, or else the first.

    mask (n, T) is true for given frames.
    """
    numbers = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, numbers, -1).cummax(dim=1).values
    first = mask.int().argmax(dim=1, keepdim=True)
    return torch.where(last >= 0, last, first)


def frame_ranges(text):
    """Return (0, 1, 2, 3, 12, 13) for "0-3,12-13".

    A `type=` for argparse: raises ArgumentTypeError.
    """
    frames = set()
    for part in text.split(","):
        match = re.fullmatch("([0-9]{1,5})(?:-([0-9]{1,5}))?", part.strip())
        numbers = range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()
        if not numbers:
            raise argparse.ArgumentTypeError(
                f"got {text!r}, expected numbers of frames such as 0-3,12-15"
            )
        frames.update(numbers)
    return tuple(sorted(frames))


def as_ranges(frames):
    """Return "0-3,12-13" for (0, 1, 2, 3, 12, 13)."""
    starts = [frame for frame in frames if frame - 1 not in frames]
    ends = [frame for frame in frames if frame + 1 not in frames]
    pairs = zip(starts, ends, strict=True)
    return ",".join(str(start) if start == end else f"{start}-{end}" for start, end in pairs)


# Flags --------------------------------------------------------------------------------------------


def add_flags(parser):
    """Add the flags of clips to continue or to start from to the parser of sample_gd.py."""
    add = parser.add_argument_group("clips to continue, or to start from").add_argument
    add(
        "--given",
        metavar="PATH",
        help="continue this video or picture, a folder of them, or earlier samples",
    )
    add(
        "--given-split",
        choices=["train", "val", "all"],
        help="continue clips of this split of the folder --given",
    )
    add(
        "--val-fraction",
        type=SHARE,
        default=0.05,
        help="fraction of the videos in val; use the value of training",
    )
    add(
        "--given-frames",
        type=frame_ranges,
        metavar="A-B",
        help="such as 0-3,12-15; default: up to half of a sample",
    )
    add(
        "--samples-per-clip",
        type=COUNT,
        default=1,
        metavar="S",
        help="samples that continue each clip of --given",
    )
    add(
        "--keep-background",
        action=argparse.BooleanOptionalAction,
        default=True,
        help=(
            "where nothing moves, restore detail of given frames that the VAE loses; scores need "
            "the --no- form"
        ),
    )
    add(
        "--init",
        metavar="PATH",
        help="start from this video or picture instead of noise; all frames change",
    )
    add(
        "--init-gamma",
        type=SHARE,
        help="share of --init in the initial latents; default: 0.5 with --init",
    )


def check_flags(args):
    """Raise UserError for contradictions among --given, --init and the flags that need them."""
    if args.given is None:
        off = {
            "given_frames": None,
            "given_split": None,
            "samples_per_clip": 1,
            "keep_background": True,
        }
        for name, value in off.items():
            if getattr(args, name) != value:
                raise UserError(
                    f"{flag_text(args, name)}: applies to clips of --given; add that, or remove it"
                )
    if None not in (args.given, args.init):
        raise UserError(
            f"{flag_text(args, 'given')}: keeps its frames, but --init changes all of them; "
            "remove one of the two flags"
        )
    if args.init_gamma is not None and args.init is None:
        raise UserError(
            f"--init-gamma {args.init_gamma}: sets the share of --init in the initial latents; "
            "add --init, or remove it"
        )


def check_clips(args):
    """Raise UserError if there are no clips where --given and --init say. Opens no video."""
    if args.given_split is not None:
        if rank() == 0:  # the others wait for rank 0 in start()
            check_data_path(args.given, cached=False)
    elif args.given is not None:
        given_clips(args)
    if args.init is not None:
        init_clips(args)


def given_clips(args):
    """The clips of --given. Raises UserError."""
    return find_clips("--given", args.given, ("video", "image"), args.folder)


def init_clips(args):
    """The clips of --init. Raises UserError."""
    kind = "video" if args.video else "image"
    return find_clips("--init", args.init, (kind,), args.folder)
