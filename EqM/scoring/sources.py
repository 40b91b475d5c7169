"""Where the clips that evaluate.py scores come from: a checkpoint, a folder of sample_gd.py, a data set.

The first two look the same: classes (names), labels (num_samples,), num_frames, image_size, time_scale (seconds per
frame), images (T = 1), patch (frames per temporal patch, None if not known), and read(numbers) after to(device).
"""

import hashlib
import json
import os
import statistics
import struct
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import generation
from generation import sha256
from runtime import distributed
from runtime.cli import UserError, say
from runtime.distributed import rank
from runtime.untrusted import FPS, check_regular, read_json
from video.clips import Clips, collate
from video.index import scan_videos, split_videos
from video.loader import batches_of

REAL_SEED = 0  # of the real clips' starts; --seed is that of the generated ones
RESIZE = "short side to image_size (bilinear, antialiased), center crop; a detector resizes further by itself"


class FromCheckpoint:
    """Clips that are sampled when they are needed. Raises UserError for flags and checkpoints that do not fit."""

    def __init__(self, args):
        self.args, self.source = args, generation.open_checkpoint(args)
        self.classes, self.labels = self.source.classes, self.source.labels
        self.num_frames, self.time_scale = self.source.num_frames, self.source.time_scale
        self.image_size, self.images = self.source.image_size, not self.source.video
        self.patch = self.source.model.config.temporal_patch_size
        self.evaluations = []  # of this rank's samples

    def to(self, device):
        self.device = device
        self.source.to(device, self.args)

    def read(self, numbers):
        """uint8 (n, T, H, W, 3) of the samples `numbers`."""
        settings = generation.sampling_settings(self.args)
        clips, evaluations, _ = generation.generate_clips(
            self.source, numbers, self.args.seed, self.device, settings, self.args.batch_size, show=False
        )
        self.evaluations += evaluations.tolist()
        return clips

    def provenance(self):
        return generation.provenance(self.source, self.args) | {"classes": self.args.classes or "all"}


class FromFolder:
    """Clips that sample_gd.py has written, of which only those that are needed are read. Raises UserError."""

    def __init__(self, args):
        self.folder, here = Path(args.samples), f"--samples {args.samples}"
        self.about, self.clips, labels = read_samples(here, self.folder)
        self.classes, self.time_scale = self.about["classes"], self.about["time_scale"]
        if args.num_samples and args.num_samples > len(labels):
            raise UserError(f"--num-samples {args.num_samples}: {here} has {len(labels)}: leave the flag out")
        self.labels = torch.from_numpy(np.array(labels))[: args.num_samples]
        self.num_frames, self.image_size = self.clips.shape[1:3]
        self.images = self.num_frames == 1
        self.patch = args.temporal_patch_size or self.about["source"].get("temporal_patch_size")
        self.evaluations = []

    def to(self, device):
        self.device = device

    def read(self, numbers):
        return torch.from_numpy(self.clips[numbers]).to(self.device)

    def provenance(self):
        about = {name: value for name, value in self.about.items() if name != "classes"}
        return {"samples": str(self.folder), "samples_sha256": sha256(self.folder / "samples.npz")} | about


def read_samples(here, folder):
    """(what samples.json says, clips uint8 (N, T, H, W, 3) mapped into memory, labels int64 (N,)) of a sample folder.

    Raises UserError, which begins with `here`.
    """
    try:
        about = read_json(Path(folder, "samples.json"))
        check_regular(Path(folder, "samples.npz"))
        clips, labels = (map_npz(Path(folder, "samples.npz"), name) for name in ("arr_0", "labels"))
        if clips.dtype != np.uint8 or clips.ndim not in (4, 5) or len(labels) != len(clips):
            found = f"{clips.dtype} {list(clips.shape)} with {len(labels)} labels"
            raise ValueError(f"found {found}, wanted uint8 [N, T, H, W, 3] with N labels")
        classes, scale = about["classes"], about["time_scale"]
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise ValueError("its classes are no names")
        if not isinstance(scale, (int, float)) or not FPS[0] <= 1 / scale <= FPS[1]:
            raise ValueError(f"{scale!r} seconds per frame")
        if labels.dtype != np.int64 or (len(labels) and labels.min() < 0):
            raise ValueError("its labels are no classes")
        if len(labels) and labels.max() >= len(classes):
            raise ValueError(f"label {labels.max()}, but samples.json names {len(classes)} classes")
        if not all(isinstance(about.setdefault(part, {}), dict) for part in ("source", "flags")):
            raise ValueError("its source or its flags are no names with values")
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, zipfile.BadZipFile) as error:
        raise UserError(f"{here}: no samples.npz and samples.json of sample_gd.py ({error})") from error
    return about, clips if clips.ndim == 5 else clips[:, None], labels


def map_npz(path, name):
    """An array of an uncompressed .npz, mapped into memory. Raises ValueError or KeyError if it can't be."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{name}.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed")
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, fortran, dtype = header(file)
            start = file.tell()
    if dtype.hasobject or fortran:
        raise ValueError(f"{name} is no plain array: are the clips of one size?")
    with open(path, "rb") as file:  # the data come behind the member's own header and the array's
        file.seek(member.header_offset + 26)
        start += member.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
    return np.memmap(path, dtype, "r", start, shape) if 0 not in shape else np.empty(shape, dtype)


def find_real(args, made):
    """(Clips of the real videos, what the manifest says of them, a hash of all that decides them); one rank only.

    The interval between their frames is the whole number that comes closest to the generated clips' seconds per frame.
    Raises UserError.
    """
    scan = scan_videos(args.data_path, images=made.images)
    for path in scan.unreadable:
        say(f"{path} can't be opened, it is left out")
    parts = split_videos(args.data_path, scan.videos, args.val_fraction)  # before any is left out, as train.py does
    videos = parts[args.split == "val"]
    fps = statistics.median(video.fps for video in videos)
    interval = max(1, round(made.time_scale * fps))
    span = (made.num_frames - 1) * interval + 1
    kept = [video for video in videos if video.num_frames >= span]
    if not kept:
        longest = max(video.num_frames for video in videos)
        raise UserError(f"--data-path {args.data_path}: the longest video of --split {args.split} has {longest} frames,"
                        f" clips of {made.num_frames} frames that are {interval} apart take {span}")  # fmt: skip
    if abs(interval / fps - made.time_scale) > 0.01 * made.time_scale:
        say(f"note: real frames are {interval / fps:.3g} s apart, generated ones {made.time_scale:.3g} s")
    if len(kept) < args.num_real:
        say(f"note: {len(kept)} videos of --split {args.split} give {args.num_real} clips, so some give several")
    clips = Clips(args.data_path, kept, scan.classes, made.num_frames, made.image_size, (interval, interval),
                  flip=False, seed=REAL_SEED, stream="real")  # fmt: skip
    stats = [os.stat(os.path.join(args.data_path, video.path)) for video in kept]
    sizes = [(video.path, stat.st_size) for video, stat in zip(kept, stats, strict=True)]
    about = {
        "data_path": str(args.data_path),
        "split": args.split,
        "num_videos": len(kept),
        "videos_sha256": hashed(sizes),  # of names and sizes
        "num_clips": args.num_real,
        "num_frames": made.num_frames,
        "frame_interval": interval,
        "fps": fps,
        "image_size": made.image_size,
        "resize": RESIZE,
        "flip": False,
        "seed": REAL_SEED,
    }
    decides = {name: value for name, value in about.items() if name != "data_path"}
    return clips, about, hashed([decides, [stat.st_mtime_ns for stat in stats]])


def hashed(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Streams of (numbers, clips uint8 (n, T, H, W, 3), class names, seconds per frame) of this rank


def bar(title, numbers):
    return tqdm(total=len(numbers), desc=title, unit="clip", leave=False, disable=rank() != 0)


def split_up(numbers, size):
    return [numbers[first : first + size] for first in range(0, len(numbers), size)]


def generated_stream(args, made):
    numbers = distributed.own_indices(args.num_samples)
    with bar("generated clips", numbers) as progress:
        for part in split_up(numbers, args.batch_size):
            names = [made.classes[label] for label in made.labels[part]]
            yield part, made.read(part), names, [made.time_scale] * len(part)
            progress.update(len(part))


def real_stream(args, clips, device, bad):
    """Paths of videos that can't be decoded go to `bad`."""
    numbers = distributed.own_indices(args.num_real)
    chunks = split_up(numbers, args.batch_size)
    loader = DataLoader(clips, batch_sampler=chunks, num_workers=args.num_workers, collate_fn=collate)
    with bar("real clips", numbers) as progress:
        for batch in batches_of(loader):
            names = [clips.classes[label] for label in batch["labels"]]
            videos = batch["clips"].permute(0, 2, 3, 4, 1).to(device)
            yield batch["indices"].tolist(), videos, names, batch["time_scales"].tolist()
            bad += batch["bad"]
            progress.update(len(names))
