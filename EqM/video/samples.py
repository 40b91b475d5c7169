"""Reads samples.json and samples.npz of a sample folder, which sample_gd.py writes."""

import os
import struct
import zipfile
from pathlib import Path

import numpy as np

from runtime.cli import UserError, check_writable, plural
from runtime.untrusted import check_regular, read_json
from video.files import has_suffix

UNFINISHED = "samples.unfinished"  # a file in the folder while samples are written
LATENTS = "latents.npy"  # float32 (N, C, T, h, w), as the VAE decodes them
NO_LABEL = -1  # in samples.npz: the sample has no label
WRITTEN = [  # the files of a sample folder, besides samples.json and scores
    "[0-9]" * 6 + ".mp4",
    "[0-9]" * 6 + ".gif",
    "[0-9]" * 6 + ".png",
    "samples.npz",
    "samples.npz.tmp",
    LATENTS,
    "grid.gif",
    "grid.png",
    "sheet.png",
    "gallery.html",
    "evaluations.csv",
    "evaluations.png",
    "energy.csv",
    "energy.png",
]


def is_sample_folder(folder):
    """Whether sample_gd.py has written a folder (a Path), or has begun to."""
    return (folder / "samples.json").exists() or (folder / UNFINISHED).exists()


def folders_of_samples(paths):
    """The sample folders among the folders of these paths, sorted. Opens nothing."""
    marks = [path for path in paths if os.path.basename(path) in ("samples.json", UNFINISHED)]
    return sorted({os.path.dirname(path) for path in marks})


def foreign_files(folder):
    """The files in a folder (a Path) that sample_gd.py did not write; [] if it is a sample folder.

    Videos and images in its class folders count, too: samples beside them would be training data.
    """
    if is_sample_folder(folder):
        return []
    files = []
    for path in sorted(folder.glob("[!.]*")):
        if not path.is_dir():
            files.append(path)
        elif not is_sample_folder(path):
            for file in sorted(path.glob("[!.]*")):
                if has_suffix("video", file) or has_suffix("image", file):
                    files.append(file)
    return files


def class_name(classes, label):
    """The name of the class with a label; None for NO_LABEL."""
    return classes[label] if label != NO_LABEL else None


def class_names(classes, labels):
    """The name of the class of each label (N,), or "none"."""
    return [class_name(classes, label) or "none" for label in labels.tolist()]


def time_scales_of(about, count):
    """The seconds per frame of each of `count` samples, by the content of samples.json. Samples
    that continue clips of a data set have those of their clips.
    """
    usual = about["time_scale"]
    seconds = [entry.get("time_scale", usual) for entry in about.get("given", ())]
    return seconds or [usual] * count


def read_samples(here, folder):
    """(content of samples.json, clips uint8 (N, T, H, W, 3) mapped into memory, labels (N,) int64)
    of a sample folder.

    Raises UserError with a text that begins with `here`.
    """
    archive = Path(folder, "samples.npz")
    try:
        about = read_json(Path(folder, "samples.json"))
        check_regular(archive)
        clips = map_npz(archive, "arr_0")
        labels = map_npz(archive, "labels")
        shape = list(clips.shape)
        if clips.dtype != np.uint8 or len(shape) not in (4, 5) or shape[-1] != 3 or 0 in shape:
            raise ValueError(f"got {clips.dtype} {shape}, expected uint8 [N, T, H, W, 3]")
        num_classes = len(about["classes"])
        are_labels = NO_LABEL <= labels.min() <= labels.max() < num_classes
        if len(labels) != len(clips) or not are_labels:
            raise ValueError(
                f"{plural(len(clips), 'clip')}, {plural(len(labels), 'label')} up to label "
                f"{labels.max()}, {plural(num_classes, 'class')} in samples.json"
            )
        if not about["time_scale"] > 0:
            raise ValueError(f"time_scale is {about['time_scale']}, expected seconds per frame")
        about = {"source": {}, "flags": {}} | about
    except FileNotFoundError as error:
        if os.path.exists(os.path.join(folder, UNFINISHED)):
            raise UserError(
                f"{here}: its samples are not finished: run sample_gd.py again"
            ) from error
        has_folder = os.path.isdir(folder)
        reason = f"no {Path(error.filename).name} in it" if has_folder else "no such folder"
        raise UserError(f"{here}: {reason}; expected a sample folder of sample_gd.py") from error
    except Exception as error:  # the place of the damage decides which one numpy or zipfile raises
        raise UserError(
            f"{here}: samples.npz or samples.json of sample_gd.py is missing or damaged ({error}); "
            "sample again"
        ) from error
    videos = clips if clips.ndim == 5 else clips[:, None]
    return about, videos, labels


def map_npz(path, name):
    """An array of a file of np.savez, mapped into memory.

    Raises OSError, BadZipFile, ValueError or KeyError.
    """
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{name}.npy")
        with archive.open(member) as file:
            np.lib.format.read_magic(file)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            start = file.tell()
    if member.compress_type != zipfile.ZIP_STORED or fortran or dtype.hasobject:
        raise ValueError(f"{name} is compressed or not a plain array of clips of one size")
    # the data follow the header of the zip member and the header of the array
    with open(path, "rb") as file:
        file.seek(member.header_offset + 26)
        start += member.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
    return np.memmap(path, dtype, "r", start, shape)


def check_folder(args):
    """Raise UserError if --folder can't be written, or holds files that must stay.

    These are other files than samples and, without --overwrite, samples of another run.
    """
    check_writable("--folder", args.folder)
    folder = Path(args.folder)
    others = foreign_files(folder)
    if others:
        raise UserError(
            f"--folder {args.folder}: {others[0].relative_to(folder)} was not made by "
            "sample_gd.py; name a new folder"
        )
    if not (folder / "samples.json").exists() or args.overwrite:
        return
    try:
        ckpt = str(read_json(folder / "samples.json")["flags"]["ckpt"])
    except (OSError, ValueError, KeyError, TypeError):
        ckpt = "another program"
    if model_of(ckpt) != model_of(args.ckpt):
        raise UserError(
            f"--folder {args.folder}: has samples of {ckpt}; name another folder, or add "
            "--overwrite"
        )


def model_of(ckpt):
    """The run folder of a checkpoint, or the path of another model."""
    file = Path(ckpt).resolve()
    return file.parents[1] if file.parent.name == "checkpoints" else file
