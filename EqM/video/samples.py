"""The samples.json and samples.npz of a folder of sample_gd.py, read again."""

import os
import struct
import zipfile
from pathlib import Path

import numpy as np

from runtime.cli import UserError
from runtime.untrusted import FPS, check_regular, read_json

UNFINISHED = "samples.unfinished"  # a file that is in the folder while samples are written
NO_LABEL = -1  # in samples.npz, of a sample that was made without a label


def class_name(classes, label):
    """The name of the class with a label; None without one, for NO_LABEL."""
    return classes[label] if label != NO_LABEL else None


def read_samples(here, folder):
    """(content of samples.json, clips uint8 (N, T, H, W, 3) mapped into memory, labels (N,) int64) of a sample folder.

    Raises UserError; its text begins with `here`.
    """
    try:
        about = read_json(Path(folder, "samples.json"))
        check_regular(Path(folder, "samples.npz"))
        clips, labels = (map_npz(Path(folder, "samples.npz"), name) for name in ("arr_0", "labels"))
        is_rgb = clips.dtype == np.uint8 and clips.ndim in (4, 5) and clips.shape[-1] == 3 and 0 not in clips.shape[1:]
        if not is_rgb or len(labels) != len(clips):
            found = f"{clips.dtype} {list(clips.shape)} with {len(labels)} labels"
            raise ValueError(f"found {found}, wanted uint8 [N, T, H, W, 3] with N labels")
        classes, scale = about["classes"], about["time_scale"]
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise ValueError("classes must be a list of names")
        if not isinstance(scale, (int, float)) or not FPS[0] <= 1 / scale <= FPS[1]:
            raise ValueError(f"time_scale must be {1 / FPS[1]:g} to {1 / FPS[0]:g} seconds per frame, found {scale!r}")
        if labels.dtype != np.int64 or (len(labels) and labels.min() < NO_LABEL):
            raise ValueError(f"labels must be int64 and at least {NO_LABEL}")
        if len(labels) and labels.max() >= len(classes):
            raise ValueError(f"label {labels.max()}, but samples.json names {len(classes)} classes")
        if not all(isinstance(about.setdefault(part, {}), dict) for part in ("source", "flags")):
            raise ValueError("source and flags must be JSON objects")
    except FileNotFoundError as error:
        if not os.path.isdir(folder):
            raise UserError(f"{here}: no such folder; wanted one that sample_gd.py has written") from error
        if os.path.exists(os.path.join(folder, UNFINISHED)):
            raise UserError(f"{here}: its samples are not finished: run sample_gd.py again") from error
        found = f"no {Path(error.filename).name} in it"
        raise UserError(f"{here}: {found}; wanted a folder that sample_gd.py has written") from error
    except Exception as error:  # numpy's and zipfile's depend on where the damage is
        reason = f"samples.npz or samples.json of sample_gd.py is missing or damaged ({error})"
        raise UserError(f"{here}: {reason}; sample again") from error
    return about, clips if clips.ndim == 5 else clips[:, None], labels


def map_npz(path, name):
    """An array of an uncompressed .npz, mapped into memory. Raises OSError, BadZipFile, ValueError or KeyError."""
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
        raise ValueError(f"{name} is not a plain array: all clips must be of one size")
    with open(path, "rb") as file:  # the data follow the header of the zip member and that of the array
        file.seek(member.header_offset + 26)
        start += member.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
    return np.memmap(path, dtype, "r", start, shape) if 0 not in shape else np.empty(shape, dtype)
