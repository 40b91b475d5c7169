"""Reads files from untrusted sources: runs no code in them, and checks the sizes they claim before it allocates memory.

A small file can claim an array of petabytes, an archive that inflates a million times or a JSON text that never ends,
and a pipe blocks its reader. Refused files raise ValueError or OSError with the reason; callers add the flag or file.
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
from safetensors import SafetensorError, safe_open

FPS = 1e-3, 1e6  # lowest and highest accepted frame rate
JSON_BYTES = 2**28  # largest JSON file: an index of a million videos has 150 MB
CONFIG_BYTES = 2**24  # largest model config
ARCHIVE_ERRORS = (OSError, ValueError, EOFError, LookupError, RuntimeError, zipfile.BadZipFile)  # of reading a zip
# The globals that torch.save writes for tensors and plain values; torch.load also accepts some that allocate memory.
GLOBALS = re.compile(
    r"torch (BFloat16|Bool|Byte|Char|Double|Float|Half|Int|Long|Short)Storage|collections OrderedDict|"
    r"torch\._utils _rebuild_(tensor_v2|parameter)|argparse Namespace"  # the last is in published files
)

NPY_HEADER = re.compile(  # of an array of numbers
    r"\{'descr': '[<>|][biuf](?P<bytes>[1248])', 'fortran_order': (True|False), "
    r"'shape': \((?P<shape>(\d{1,18}, ?)*(\d{1,18})?)\), \} *\n"
)


def check_regular(path):
    """Raise OSError unless `path` is a regular file or a link to one: a pipe, device or socket may never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{'a folder' if os.path.isdir(path) else 'a pipe or a device'}, wanted a regular file")


def is_text(path):
    """Whether a path is valid UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in os.fspath(path))


@contextmanager
def plain_name(path):
    """A context with a path by which C++ and Rust libraries can open the file. Raises OSError.

    It is absolute, as FFmpeg interprets names such as `concat:...`, and UTF-8 even if the given path is not.
    """
    if is_text(path):
        yield os.path.abspath(path)
    else:
        with open(path, "rb") as file:
            yield f"/dev/fd/{file.fileno()}"


def read_json(path, max_bytes=JSON_BYTES):
    """The content of a JSON file of at most max_bytes. Raises OSError or ValueError."""
    check_regular(path)
    if os.path.getsize(path) > max_bytes:
        raise ValueError(f"more than {max_bytes} bytes")
    with open(path, "rb") as file:
        text = file.read(max_bytes)
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def check_archive(file):
    """Raise one of ARCHIVE_ERRORS unless an open zip file is intact and uncompressed. Returns the names of its members.

    torch and NumPy do not compress, so members never need more memory than the file has bytes. The CRC-32 of each is
    checked, as it reveals damage that no later check would find.
    """
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("holds compressed data")
        if sum(member.file_size for member in members) > os.fstat(file.fileno()).st_size:
            raise ValueError("claims to hold more bytes than it has")
        if len(set(archive.namelist())) < len(members):
            raise ValueError("holds a name twice")
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} is damaged")
        return archive.namelist()


def read_npz(path):
    """A dict of the arrays in an .npz file of np.savez. Raises OSError or ValueError."""
    check_regular(path)
    try:
        with open(path, "rb") as file:
            check_archive(file)
            file.seek(0)
            with zipfile.ZipFile(file) as archive:
                for member in archive.infolist():
                    with archive.open(member) as part:
                        check_npy_header(part, member.file_size)
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
    except ARCHIVE_ERRORS as error:
        raise ValueError(f"not a valid .npz ({error})") from error


def check_npy_header(part, size):
    """Raise ValueError unless an .npy of `size` bytes has a header of np.save and an array of exactly its size."""
    start = part.read(10)
    text = part.read(int.from_bytes(start[8:], "little")).decode("latin-1")
    found = NPY_HEADER.fullmatch(text)
    if start[:8] != b"\x93NUMPY\x01\x00" or not found:
        raise ValueError("an .npy that was not written by np.save")
    shape = [int(side) for side in re.findall(r"\d+", found["shape"])]
    if math.prod(shape) * int(found["bytes"]) != size - len(start) - len(text):
        raise ValueError(f"claims an array of {shape}"[:200])


def check_vae_files(config, weights):
    """Raise ValueError unless the config of an AutoencoderKL has no more layers than its weights, and none wider.

    diffusers builds the model from the config before it reads the weights, so a config could claim any memory.
    """
    try:
        path = config
        settings = read_json(config, max_bytes=2**20)
        path = weights
        check_regular(weights)
        with safe_open(weights, "pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"its {os.path.basename(path)} can't be read ({error})") from error
    widest = max((size for shape in shapes for size in shape), default=0)
    for name in ("block_out_channels", "layers_per_block", "latent_channels", "in_channels", "out_channels"):
        values = settings.get(name, 1) if isinstance(settings, dict) else None
        values = values if isinstance(values, list) else [values]
        most = len(shapes) if name == "layers_per_block" else widest
        if len(values) > len(shapes) or not all(isinstance(value, int) and 0 < value <= most for value in values):
            found = f"its {os.path.basename(config)} has {name} {str(values)[:50]}"
            raise ValueError(f"{found}, more than the tensors of its {os.path.basename(weights)}")


# ----------------------------------------------------------------------------------------------------------------------
# Files of torch.save, and the types and ranges of values in them


def read_torch(path):
    """The content of a file of torch.save, on the CPU: tensors and plain values.

    Raises pickle.UnpicklingError if it is not such a file or holds code, OSError if it can't be read, and one of
    ARCHIVE_ERRORS, TypeError, AttributeError or AssertionError if it is damaged: torch.load's error depends on where
    the damage is. The file is mapped into memory, so it can't claim more than its size, and then copied.
    """
    check_regular(path)
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":  # a zip archive; before torch 1.6 the file was a single pickle
            raise pickle.UnpicklingError("not an archive")
        check_pickles(file, check_archive(file))
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # torch's warnings on foreign pickles; the error says enough
            with plain_name(path) as name:
                return copy.deepcopy(torch.load(name, map_location="cpu", weights_only=True, mmap=True))


def check_pickles(file, names):
    """Raise UnpicklingError if a pickle in an archive of torch.save refers to anything but GLOBALS."""
    with zipfile.ZipFile(file) as archive:
        for name in names:
            if name.endswith(".pkl"):
                for opcode, value, _ in pickletools.genops(archive.read(name)):
                    if opcode.name == "GLOBAL" and not GLOBALS.fullmatch(value):
                        raise pickle.UnpicklingError(f"holds {value}")


def is_count(value, least=0):
    """Whether value is an integer of at least `least`, and small enough to be exact as a float."""
    return isinstance(value, int) and least <= value < 2**53


def is_number(value):
    """Whether value is an int or a float, not NaN."""
    return isinstance(value, (int, float)) and not math.isnan(value)


def is_named(value):
    """Whether value is a dict with string keys."""
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def is_strings(value):
    """Whether value is a list of strings."""
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def is_plain(value):
    """Whether value can be that of a flag: a number, a string, None, or a list of these."""
    parts = value if isinstance(value, list) else [value]
    return all(part is None or isinstance(part, (str, int, float)) for part in parts)


def is_weights(value):
    """Whether value is a state dict of floating-point tensors that do not share memory.

    A tensor that repeats one number, or tensors that share memory, are small in a file but full size in a model.
    """
    if not is_named(value):
        return False
    tensors = list(value.values())
    if not all(torch.is_tensor(tensor) and tensor.is_floating_point() for tensor in tensors):
        return False
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(tensor.nbytes for tensor in tensors) <= sum(storages.values())


def text_size(value):
    """Characters of a plain value. A pickle stores a string that occurs a million times only once."""
    return sum(len(part) if isinstance(part, str) else 8 for part in (value if isinstance(value, list) else [value]))
