"""Read files from untrusted sources: run no code, and refuse corrupt ones with the reason.

Callers add the file's name.
"""

import argparse
import hashlib
import json
import os
import pickle
import stat
import warnings
import zipfile
import zlib

import torch
from torch.utils._pytree import tree_leaves

from runtime.distributed import local_rank

FPS = 1e-3, 1e6  # lowest and highest accepted frame rate


def check_regular(path):
    """Raise OSError unless `path` is a regular file, or a link to one, with a UTF-8 name."""
    # reading a pipe or a device may never end; C++ and Rust libraries take no other names
    if not stat.S_ISREG(os.stat(path).st_mode) or not is_text(path):
        raise OSError("expected a regular file with a UTF-8 name")


def is_text(path):
    """Whether a path is valid UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in os.fspath(path))


def read_json(path):
    """The content of a JSON file. Raises OSError or ValueError."""
    check_regular(path)
    with open(path, "rb") as file:
        return json.load(file)


def file_sha256(path):
    """The SHA-256 of a file, which may be larger than the memory. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_torch(path, names=None):
    """The content of a file of torch.save: tensors, which are mapped into memory, and plain values.

    names: the parts of a dict that the caller needs; if it has none of them, all. The first rank of
    each machine compares their tensors with the file's CRCs; nothing reads the other tensors.
    None: every rank compares all tensors, so that each of them knows whether the file is damaged.
    Raises pickle.UnpicklingError if the file is of another kind or holds code, OSError if it can't
    be read, and any other Exception if it is corrupt. If someone shortens a mapped file, its reader
    dies of SIGBUS; our own files are replaced by renaming.
    """
    check_regular(path)
    with open(path, "rb") as file:
        # a zip archive; before torch 1.6 the file was a single pickle
        if file.read(4) != b"PK\3\4":
            raise pickle.UnpicklingError("not an archive")
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            for member in members:
                with archive.open(member) as part:  # unlike torch, zipfile checks the member's name
                    if member.filename.endswith("data.pkl"):
                        part.read()  # raises an error if its CRC is wrong
    is_stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
    # in published files
    with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
        # torch's warnings on foreign pickles; the error says enough
        warnings.simplefilter("ignore")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_stored)
    if names is None or local_rank() == 0:
        sums = {(member.file_size, member.CRC) for member in members}
        parts = []
        if names and isinstance(content, dict):
            parts = [content[name] for name in names if name in content]
        check_tensors(parts or content, sums)
    return content


def check_tensors(value, sums):
    """Raise ValueError unless each tensor in `value` is a member of an archive with these `sums`.

    A sum is (size, CRC-32).
    """
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    by_address = {(storage.data_ptr(), len(storage)): storage for storage in storages}
    # in the order of the file, as a disk reads ahead
    for _, storage in sorted(by_address.items()):
        data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        # torch does not tell which member became which tensor
        if (data.nbytes, zlib.crc32(data)) not in sums:
            raise ValueError("a tensor is damaged")
