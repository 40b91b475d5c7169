"""Writing so that neither a kill nor a power cut leaves half a file."""

import os
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path):
    """A file to write to that is there under its name whole, and on the disk, or not at all."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except (OSError, RuntimeError):
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def sync(path):
    """Make the bytes of a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
