"""Files that anybody may have made: nothing in them is run, and their claims are checked before memory is taken.

A small file can claim anything: an array of petabytes, an archive that inflates a million times, a JSON text that never
ends; or it is a pipe, which keeps its reader waiting. What is refused here raises ValueError or OSError with the
reason; the callers say which flag or file it was.
"""

import argparse
import copy
import json
import math
import os
import pickle
import pickletools
import re
import stat
import warnings
import zipfile
from contextlib import contextmanager

import numpy as np
import torch

FPS = 1e-3, 1e6  # the lowest and the highest frame rate that is accepted
JSON_BYTES = 2**28  # of a file: an index of a million videos takes 150 MB
CONFIG_BYTES = 2**24  # of the config of a model
ARCHIVE_ERRORS = (OSError, ValueError, EOFError, LookupError, RuntimeError, zipfile.BadZipFile)  # of reading a zip
# What torch.save writes for tensors and plain values; torch.load would also accept names that allocate memory.
GLOBALS = re.compile(
    r"torch (BFloat16|Bool|Byte|Char|Double|Float|Half|Int|Long|Short)Storage|collections OrderedDict|"
    r"torch\._utils _rebuild_(tensor_v2|parameter)|argparse Namespace"  # the last is in published files
)

HEADER = re.compile(  # of an .npy of plain numbers
    r"\{'descr': '[<>|][biuf](?P<bytes>[1248])', 'fortran_order': (True|False), "
    r"'shape': \((?P<shape>(\d{1,18}, ?)*(\d{1,18})?)\), \} *\n"
)


def check_regular(path):
    """Raise OSError unless `path` is a plain file, or a link to one: a pipe, a device or a socket may never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{'a folder' if os.path.isdir(path) else 'a pipe or a device'}, wanted a plain file")


def is_text(path):
    """Whether the bytes of a path are UTF-8."""
    return not any("\ud800" <= letter <= "\udfff" for letter in os.fspath(path))


@contextmanager
def plain_name(path):
    """A name under which libraries in C++ and Rust can open a file. Raises OSError.

    It is absolute, as FFmpeg would interpret names such as `concat:...`; and it is UTF-8 even if the path is not.
    """
    if is_text(path):
        yield os.path.abspath(path)
    else:
        with open(path, "rb") as file:
            yield f"/dev/fd/{file.fileno()}"


def read_json(path, most=JSON_BYTES):
    """The content of a JSON file of at most `most` bytes. Raises OSError or ValueError."""
    check_regular(path)
    if os.path.getsize(path) > most:
        raise ValueError(f"more than {most} bytes")
    with open(path, "rb") as file:
        text = file.read(most)
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def check_archive(file):
    """Raise one of ARCHIVE_ERRORS unless an open zip file is whole; returns the names of its members.

    torch and NumPy do not compress, so no member may take more memory than it has bytes in the file; each has a CRC-32,
    which reveals damage that nothing else would notice.
    """
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("holds compressed data")
        if sum(member.file_size for member in members) > os.fstat(file.fileno()).st_size:
            raise ValueError("claims to hold more than it does")
        if len(set(archive.namelist())) < len(members):
            raise ValueError("holds a name twice")
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} is damaged")
        return archive.namelist()


def read_npz(path):
    """The arrays of an .npz of np.savez, by name. Raises OSError or ValueError."""
    check_regular(path)
    try:
        with open(path, "rb") as file:
            check_archive(file)
            file.seek(0)
            with zipfile.ZipFile(file) as archive:
                for member in archive.infolist():
                    with archive.open(member) as part:
                        check_header(part, member.file_size)
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
    except ARCHIVE_ERRORS as error:
        raise ValueError(f"no sound .npz ({error})") from error


def check_header(part, size):
    """Raise ValueError unless an .npy of `size` bytes begins as np.save writes it and claims just what it has."""
    start = part.read(10)
    text = part.read(int.from_bytes(start[8:], "little")).decode("latin-1")
    found = HEADER.fullmatch(text)
    if start[:8] != b"\x93NUMPY\x01\x00" or not found:
        raise ValueError("an .npy that np.save has not written")
    shape = [int(side) for side in re.findall(r"\d+", found["shape"])]
    if math.prod(shape) * int(found["bytes"]) != size - len(start) - len(text):
        raise ValueError(f"claims an array of {shape}"[:200])


# ----------------------------------------------------------------------------------------------------------------------
# Files of torch.save, and what may stand in them


def read_torch(path):
    """The content of a file of torch.save, on the CPU: tensors and plain values.

    Raises pickle.UnpicklingError if it is no such file or holds code, OSError if it can't be read, and one of
    ARCHIVE_ERRORS, TypeError, AttributeError or AssertionError if it is damaged: what torch.load raises depends on
    where the damage is. The file is mapped into memory, so nothing in it can claim more than it has, and then copied.
    """
    check_regular(path)
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":  # an archive; before torch 1.6 a file was a single pickle
            raise pickle.UnpicklingError("no archive")
        check_pickles(file, check_archive(file))
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # torch's hints on foreign pickles; the refusal says enough
            with plain_name(path) as name:
                return copy.deepcopy(torch.load(name, map_location="cpu", weights_only=True, mmap=True))


def check_pickles(file, names):
    """Raise UnpicklingError if an archive of torch.save names anything but tensors and plain values."""
    with zipfile.ZipFile(file) as archive:
        for name in names:
            if name.endswith(".pkl"):
                for opcode, value, _ in pickletools.genops(archive.read(name)):
                    if opcode.name == "GLOBAL" and not GLOBALS.fullmatch(value):
                        raise pickle.UnpicklingError(f"holds {value}")


def is_count(value, least=0):
    return isinstance(value, int) and least <= value < 2**53


def is_number(value):
    return isinstance(value, (int, float)) and not math.isnan(value)


def is_named(value):
    """Whether value is a dict whose keys are all strings."""
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def is_strings(value):
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def is_plain(value):
    """Whether value can be the value of a flag: a number, a string, None, or a list of these."""
    parts = value if isinstance(value, list) else [value]
    return all(part is None or isinstance(part, (str, int, float)) for part in parts)


def is_weights(value):
    """Whether value is a dict of names and floating-point tensors that do not share memory.

    A tensor that repeats one number, or many tensors that share one, take no room in a file but all of it in a model.
    """
    if not is_named(value):
        return False
    tensors = list(value.values())
    if not all(torch.is_tensor(tensor) and tensor.is_floating_point() for tensor in tensors):
        return False
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(tensor.nbytes for tensor in tensors) <= sum(storages.values())


def text_size(value):
    """Characters of a plain value. A string that occurs a million times is stored in a pickle only once."""
    return sum(len(part) if isinstance(part, str) else 8 for part in (value if isinstance(value, list) else [value]))
