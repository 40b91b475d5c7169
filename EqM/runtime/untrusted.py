"""Files that anybody may have made: nothing in them is run, and what they claim is checked before memory is taken.

A small file can claim anything: an array of petabytes, an archive that inflates a million times, a JSON text that never
ends, or be no file at all but a pipe that keeps whoever opens it waiting. What is refused here raises ValueError or
OSError with the reason; the callers say which flag or file it was.
"""

import json
import math
import os
import re
import stat
import zipfile
from contextlib import contextmanager

import numpy as np

FPS = 1e-3, 1e6  # the lowest and the highest frame rate that is believed
JSON_BYTES = 2**28  # of a text: an index of a million videos takes 150 MB
ARCHIVE_ERRORS = (OSError, ValueError, EOFError, LookupError, RuntimeError, zipfile.BadZipFile)  # of reading a zip

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
    """A name by which libraries in C++ and Rust can open a file. Raises OSError.

    It is absolute, as FFmpeg takes some (`concat:...`) for what they say; and UTF-8, in place of a path that is not.
    """
    if is_text(path):
        yield os.path.abspath(path)
    else:
        with open(path, "rb") as file:
            yield f"/dev/fd/{file.fileno()}"


def read_json(path, most=JSON_BYTES):
    """What a JSON file of at most `most` bytes says. Raises OSError or ValueError."""
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

    torch and NumPy store, so that no member may take more memory than it has bytes in the file; each has a CRC-32,
    which tells damage that nobody else looks for.
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
