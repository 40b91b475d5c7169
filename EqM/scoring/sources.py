"""The clips that evaluate.py scores: generated ones from a checkpoint or a sample folder, real ones from a data set.

FromCheckpoint and FromFolder share an interface: classes (names), labels (num_samples,) int64, num_frames, image_size,
time_scale (seconds per frame), ckpt (path of the model), images (T = 1), temporal_patch_size (None if not known),
window and overlap (in frames; 0 if not known), guidance (None if nobody chose it), evaluations (of the samples of this
rank), provenance() (plain values for JSON), and read(indices) after to(device).
"""

import hashlib
import json
import os
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import generation
from runtime import cli, distributed
from runtime.cli import Bar, UserError, say
from runtime.distributed import rank
from runtime.runs import results_of
from runtime.untrusted import file_sha256
from video.clips import Clips
from video.index import scan_videos, split_videos
from video.loader import batches_of, make_loader
from video.samples import NO_LABEL, class_name, read_samples

REAL_SEED = 0  # of the start frames of the real clips; --seed is for the generated ones
RESIZE = "short side to image_size (bilinear, antialiased), center crop; a detector resizes further by itself"


def add_checkpoint_flags(parser):
    """The flags of FromCheckpoint, except --ckpt and --batch-size. FromFolder reads two of them."""
    add = parser.add_argument_group("sampling from --ckpt").add_argument
    add("--video", action="store_true", default=None, help="require a video model; default: not checked")
    count = "number of generated clips; default: --num-real, or all of --samples"
    generation.add_sample_flags(add, None, count, keep_background=False)  # scores are of what the model makes
    generation.add_checked_flags(parser)
    cli.add_speed_flags(parser)
    generation.add_sampling_flags(parser)


class FromCheckpoint:
    """Clips of --ckpt, sampled when they are read. Raises UserError for flags and checkpoints that do not fit."""

    def __init__(self, args):
        self.args, self.source, self.ckpt = args, generation.open_checkpoint(args), args.ckpt
        self.classes, self.labels = self.source.classes, self.source.labels
        self.num_frames, self.time_scale = self.source.num_frames, self.source.time_scale
        self.image_size, self.images = self.source.image_size, not self.source.video
        self.temporal_patch_size = self.source.model.config.temporal_patch_size
        self.window, self.overlap = self.source.window, self.source.overlap
        self.guidance = chosen_guidance(self.labels, args.cfg_scale, args.guidance_chosen)
        self.evaluations = []

    def to(self, device):
        self.device = device
        self.source.to(device, self.args)

    def read(self, indices, given=None, time_scale=None):
        """The samples `indices`, uint8 (n, T, H, W, 3); given is that of `generate_clips`, time_scale (n,) or None."""
        settings = generation.sampling_settings(self.args)
        source = self.source if time_scale is None else replace(self.source, time_scale=time_scale)
        ((clips, evaluations, _),) = generation.generate_clips(
            source, indices, self.args.seed, self.device, settings, len(indices), given=given,
            keep_background=self.args.keep_background, show=False,
        )  # fmt: skip
        self.evaluations += evaluations.tolist()
        return clips

    def provenance(self):
        every = "those of the real clips" if self.args.metric == "prediction" else "all"
        return generation.provenance(self.source, self.args) | {"classes": self.args.classes or every}


class FromFolder:
    """Clips of --samples, read from the file when they are needed. Raises UserError."""

    def __init__(self, args):
        self.folder, here = Path(args.samples), f"--samples {args.samples}"
        self.about, self.clips, labels = read_samples(here, self.folder)
        self.classes, self.time_scale = self.about["classes"], self.about["time_scale"]
        if args.num_samples and args.num_samples > len(labels):
            raise UserError(f"--num-samples {args.num_samples}: {here} has {len(labels)}: leave the flag out")
        self.labels = torch.from_numpy(np.array(labels))[: args.num_samples]
        self.num_frames, self.image_size = self.clips.shape[1:3]
        self.images, self.ckpt = self.num_frames == 1, self.about["flags"].get("ckpt")
        self.temporal_patch_size = args.temporal_patch_size or self.about["source"].get("temporal_patch_size")
        self.window, self.overlap = (self.about["source"].get(name) or 0 for name in ("window", "overlap"))
        guidance = self.about["flags"].get("cfg_scale")
        is_chosen = isinstance(guidance, int | float) and generation.is_guidance_chosen(self.about["flags"])
        self.guidance = chosen_guidance(self.labels, guidance, is_chosen)
        self.evaluations = []

    def to(self, device):
        self.device = device

    def read(self, indices):
        return torch.from_numpy(self.clips[indices]).to(self.device)

    def provenance(self):
        about = {name: value for name, value in self.about.items() if name not in ("classes", "given")}
        return {"samples": str(self.folder), "samples_sha256": file_sha256(self.folder / "samples.npz")} | about


def chosen_guidance(labels, guidance, is_chosen):
    """The guidance of samples, for the name of a protocol: 1 without labels, None if nobody chose it."""
    return 1.0 if (labels == NO_LABEL).all() else guidance if is_chosen else None


def find_real(args, generated):
    """(Clips of the real videos, the training videos that are long enough, a description of the clips for the manifest,
    a SHA-256 of all that determines them).

    One rank only. The distance from frame to frame is the integer closest to the time_scale of the
    generated clips. Raises UserError.
    """
    scan = scan_videos(args.data_path, results_of(generated.ckpt), images=generated.images)
    for path in scan.unreadable:
        say(f"{path} can't be opened, it is left out")
    train, val = split_videos(args.data_path, scan.videos, args.val_fraction)  # before any is left out, as in train.py
    videos = {"train": train, "val": val, "all": [*train, *val]}[args.split]
    fps = statistics.median(video.fps for video in videos)
    interval = max(1, round(generated.time_scale * fps))
    span = (generated.num_frames - 1) * interval + 1
    usable = [video for video in videos if video.num_frames >= span]
    if not usable:
        longest = max(video.num_frames for video in videos)
        raise UserError(
            f"--data-path {args.data_path}: the longest video of --split {args.split} has {longest} frames, "
            f"{generated.num_frames} frames that are {interval} apart take {span}: sample fewer frames"
        )
    if abs(interval / fps - generated.time_scale) > 0.01 * generated.time_scale:
        say(f"note: real frames are {interval / fps:.3g} s apart, generated frames {generated.time_scale:.3g} s")
    if len(usable) < args.num_real:
        say(f"note: {args.num_real} clips from {len(usable)} videos of --split {args.split}: some give several")
    clips = Clips(args.data_path, usable, scan.classes, generated.num_frames, generated.image_size,
                  (interval, interval), flip=False, seed=REAL_SEED, stream="real")  # fmt: skip
    stats = file_stats(args.data_path, usable)
    about = {
        "data_path": str(args.data_path),
        "split": args.split,
        "num_videos": len(usable),
        "videos_sha256": names_and_sizes(usable, stats),
        "num_clips": args.num_real,
        "num_frames": generated.num_frames,
        "frame_interval": interval,
        "fps": fps,
        "image_size": generated.image_size,
        "resize": RESIZE,
        "flip": False,
        "seed": REAL_SEED,
    }
    determines = {name: value for name, value in about.items() if name != "data_path"}
    key = json_sha256([determines, [stat.st_mtime_ns for stat in stats]])
    training = [video for video in train if video.num_frames >= generated.num_frames]
    return clips, training, about, key


def file_stats(root, videos):
    return [os.stat(os.path.join(root, video.path)) for video in videos]


def names_and_sizes(videos, stats):
    """The SHA-256 of the names and sizes of files."""
    return json_sha256([(video.path, stat.st_size) for video, stat in zip(videos, stats, strict=True)])


def json_sha256(value):
    """The SHA-256 of a plain value, written as JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Streams: the clips of this rank in batches of (indices, clips uint8 (n, T, H, W, 3), class names, time scales)


def progress_bar(title, indices):
    return Bar(total=len(indices), desc=title, unit="clip", leave=False, disable=rank() != 0)


def in_batches(indices, size):
    return [indices[first : first + size] for first in range(0, len(indices), size)]


def generated_stream(args, generated):
    """The stream of a FromCheckpoint or FromFolder."""
    own = distributed.own_indices(args.num_samples)
    with progress_bar("generated clips", own) as progress:
        for indices in in_batches(own, args.batch_size):
            names = [class_name(generated.classes, label) for label in generated.labels[indices].tolist()]
            yield indices, generated.read(indices), names, [generated.time_scale] * len(indices)
            progress.update(len(indices))


def real_stream(args, clips, device, bad):
    """The stream of a Clips. Paths of videos that can't be decoded are added to the list `bad`."""
    own = distributed.own_indices(args.num_real)
    batches = in_batches([(clips.num_frames, index) for index in own], args.batch_size)
    loader = make_loader({clips.num_frames: clips}, batches, args.num_workers, timeout=0, device=device)
    with progress_bar("real clips", own) as progress:
        for batch in batches_of(loader):
            names = [clips.classes[label] for label in batch["labels"]]
            pixels = batch["clips"].permute(0, 2, 3, 4, 1).to(device)
            yield batch["indices"].tolist(), pixels, names, batch["time_scales"].tolist()
            bad += batch["bad"]
            progress.update(len(names))


def predicted_stream(args, generated, clips, device, bad):
    """The real stream with predictions (n, S, T, H, W, 3) after its clips, both as arrays.

    Sample s of clip i is number i * S + s of a FromCheckpoint, whose labels are set here: the class of the clip, if the
    model knows it, or no label where --classes is none. The time between its frames is that of the clip.
    """
    S, mask = args.samples_per_clip, torch.zeros(clips.num_frames, dtype=torch.bool)
    mask[list(args.given_frames)] = True
    for indices, real, names, time_scales in real_stream(args, clips, device, bad):
        known = [generated.classes.index(name) if name in generated.classes else NO_LABEL for name in names]
        labels = torch.full((len(names),), NO_LABEL) if args.classes else torch.tensor(known)
        given, scales = (real.permute(0, 4, 1, 2, 3), mask.expand(len(names), -1)), torch.tensor(time_scales)
        predicted = []
        for number in range(S):
            own = [index * S + number for index in indices]
            generated.labels[own] = labels
            predicted.append(generated.read(own, lambda _, given=given: given, scales).cpu())
        yield indices, real.cpu().numpy(), torch.stack(predicted, dim=1).numpy(), names, time_scales
