"""Files that are written whole or not at all, also across a kill or a power cut."""

import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_write(path):
    """A binary file to write to. `path` holds its old content until the new one is complete and on the disk."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except Exception:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def link(path, name):
    """Give a file a second name beside it, which replaces an older file of that name at once."""
    path = Path(path)
    if path.with_name(name).exists() and path.samefile(path.with_name(name)):  # renaming would leave both
        return
    temporary = path.with_name(name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, temporary)
        sync(temporary)
    os.replace(temporary, path.with_name(name))
    sync(path.parent)


def sync(path):
    """fsync: make the bytes of a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
