"""Pairs of noise and sample: a folder of sample_gd.py as the training data of a student.

A sample is a function of its noise, and the noise is one of (seed, index). So a folder of samples
is a set of pairs to train on, with the usual objective (reflow, arXiv 2209.03003):

    x_gamma = gamma x_teacher(eps) + (1 - gamma) eps, with the eps that x_teacher was made from

The student's paths from noise to clip are straighter than its teacher's, so it needs few steps. The
teacher was guided, so the student needs no guidance.
"""

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from runtime.cli import SHARE, UserError, flag_text, number
from video.actions import Actions, number_of
from video.files import Video
from video.index import Scan
from video.samples import LATENTS, NO_LABEL, read_samples
from video.source import Source

USUAL_SHARE = 0.7  # of the pairs, with --real-data
NOISES = ("own", "independent")
OF_TEACHER = (  # in samples.json: what made the samples
    "checkpoint",
    "weights_sha256",
    "weak_sha256",
    "method",
    "num_steps",
    "guidance",
)
NEEDED = {"seed", "window", "num_frames", "image_size", "vae", *OF_TEACHER}  # in samples.json


class Pairs(Source):
    """The samples of a folder, each with the seed and the index of its noise.

    noise: of NOISES; "independent" does not tell which noise a sample was made from. Raises
    UserError.
    """

    has_samples = True

    def __init__(self, root, noise="own"):
        here = f"--data-path {root}"
        about, clips, labels = read_samples(here, root)
        check_samples(here, about, labels)
        suffix = ".mp4" if clips.shape[1] > 1 else ".png"
        (self.num_frames, height, width) = clips.shape[1:4]
        videos = []
        for row, label in enumerate(labels.tolist()):
            video = Video(
                path=f"{row:06d}{suffix}",
                class_name=about["classes"][label],
                num_frames=self.num_frames,
                fps=1 / about["time_scale"],
                height=height,
                width=width,
            )
            videos.append(video)
        super().__init__(root, Scan(videos, about["classes"], unreadable=[]))
        self.made = about["source"]
        self.actions_made = about.get("actions")  # of each sample, by name
        self.pairs = {}
        # of a selection of samples: their indices in the call that made them
        indices = about.get("indices") or range(len(videos))
        if noise == "own":
            for video, index in zip(videos, indices, strict=True):
                self.pairs[video.path] = (self.made["seed"], index, self.made["window"])
        self.has_latents = os.path.exists(Path(root, LATENTS))
        if self.has_latents:
            check_latents(here, Path(root, LATENTS), clips)
        self.clips = None  # mapped into memory by each process that reads them

    @property
    def teacher(self):
        """What made the samples, for checkpoints."""
        return {name: self.made[name] for name in OF_TEACHER}

    def open_actions(self, names):
        """The actions of the samples, which have these names in a model; None if there are none.

        Raises UserError.
        """
        if self.actions_made is None:
            return None
        try:
            rows = [[number_of(name, names) for name in row] for row in self.actions_made]
        except ValueError as error:
            raise UserError(
                f"--data-path {self.root}: {error}; pass the model that made the samples as --ckpt"
            ) from error
        if not names:  # samples of a model with actions, all without any
            return None
        return SampleActions(self.root, names, mirrored=None, rows=np.array(rows))

    def __getstate__(self):
        return vars(self) | {"clips": None}

    def read(self, video, frame_indices, flipped):
        """A whole clip, uint8 (3, T, H, W), or its latents as those of a latent cache, without
        noise: float32 (2, C, T, h, w).
        """
        assert len(frame_indices) == self.num_frames and not flipped, "noise fits whole clips"
        if self.clips is None and self.has_latents:
            self.clips = np.load(Path(self.root, LATENTS), mmap_mode="r")
        elif self.clips is None:
            _, self.clips, _ = read_samples(f"--data-path {self.root}", self.root)
        clip = torch.from_numpy(np.array(self.clips[row_of(video)]))
        if self.has_latents:
            return torch.stack([clip, torch.zeros_like(clip)])
        return clip.permute(3, 0, 1, 2).contiguous()


@dataclass(frozen=True)
class SampleActions(Actions):
    """The actions of samples."""

    rows: np.ndarray  # int64 (N, T)

    def of_video(self, video):
        return self.rows[row_of(video)]


def is_causal(source):
    """Whether `source` in a samples.json says that the samples are those of a Stream."""
    return source.get("context") is not None


def row_of(video):
    """The number of a sample in its samples.npz."""
    return int(PurePosixPath(video.path).stem)


def check_samples(here, about, labels):
    """Raise UserError unless the noise of samples is known, and all that they were made from."""
    source = about["source"]
    missing = sorted(NEEDED - source.keys())
    if missing:
        raise UserError(
            f"{here}: its samples.json has no {missing[0]}, so the noise of its samples is not "
            "known; expected a folder of this version of sample_gd.py; sample again"
        )
    if source["window"] < source["num_frames"] and not is_causal(source):
        raise UserError(
            f"{here}: samples of {source['num_frames']} frames in windows of {source['window']}; "
            "expected one window, whose noise is all that they were made from; sample again with "
            f"--window {source['num_frames']}, or fewer frames"
        )
    for name in ("given", "init"):
        if about["flags"].get(name) is not None:
            raise UserError(
                f"{here}: samples with --{name}; expected samples that were made from noise alone; "
                "sample again without it"
            )
    if "spans" in about:
        raise UserError(
            f"{here}: samples whose class changes; expected one class for each; sample again with "
            "whole videos of a class"
        )
    indices = about.get("indices")
    if indices is not None and len(indices) != len(labels):
        raise UserError(
            f"{here}: its samples.json has {len(indices)} indices for {len(labels)} samples; "
            "expected one for each"
        )
    if (labels == NO_LABEL).any():
        raise UserError(
            f"{here}: samples without a class; expected one for each; sample again without "
            "--classes none"
        )


def check_latents(here, path, clips):
    """Raise UserError unless a file holds latents (N, C, T, h, w) of clips (N, T, H, W, 3)."""
    try:
        latents = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{here}: {path.name} is damaged ({error}); sample again, or remove this file to "
            "encode the samples"
        ) from error
    is_right = latents.ndim == 5 and latents.dtype == np.float32
    if not is_right or (len(latents), latents.shape[2]) != clips.shape[:2]:
        raise UserError(
            f"{here}: {path.name} holds {latents.dtype} {latents.shape}, which are not the latents "
            f"of {len(clips)} samples of {clips.shape[1]} frames; sample again, or remove this "
            "file to encode the samples"
        )


# Flags --------------------------------------------------------------------------------------------


def add_flags(parser):
    """Add the flags of students to the parser of train.py."""
    add = parser.add_argument_group("students (docs/few-steps.md)").add_argument
    add(
        "--pairs",
        nargs="?",
        choices=NOISES,
        const="own",
        help=(
            "train a student on --data-path, a folder of sample_gd.py: each sample with the noise "
            "that it was made from; independent: with other noise, as a control"
        ),
    )
    add("--real-data", metavar="DIR", help="--pairs: also train on the clips of this folder")
    add(
        "--pairs-share",
        type=number(float, above=0, most=1),
        help=f"--real-data: fraction of the clips that are pairs; default: {USUAL_SHARE}",
    )
    add(
        "--pure-noise",
        type=SHARE,
        default=0.0,
        help="--pairs: fraction of the pairs at gamma = 0, where sampling starts",
    )


def check_flags(args):
    """Raise UserError for flags that pairs don't have, or that need them."""
    if not args.pairs:
        for name in ("real_data", "pure_noise"):
            if getattr(args, name):
                raise UserError(f"{flag_text(args, name)}: needs --pairs; add it, or remove this")
    if args.pairs_share is not None and not args.real_data:
        raise UserError(
            f"--pairs-share {args.pairs_share}: needs clips to mix the pairs with; add "
            "--real-data DIR, or remove it"
        )
    if not args.pairs or args.real_data:
        return
    for name in ("forcing", "forcing_regions"):
        if getattr(args, name):
            raise UserError(
                f"{flag_text(args, name)}: does not apply to --pairs, because the noise of a "
                "sample fits the whole clip; remove it, or add --real-data, whose clips it is for"
            )
    if args.cache_frames:
        raise UserError(
            "--cache-frames: --pairs reads samples, which need no decoding; remove it, or add "
            "--real-data"
        )
