"""Files written completely or not at all, even across a kill or power cut; why a write failed."""

import errno
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

FULL = errno.ENOSPC, errno.EDQUOT  # of a disk


@contextmanager
def atomic_write(path, shared=False):
    """Open a binary file for writing.

    `path` keeps its old content until the new content is complete and on disk. shared: several
    processes may write it at once, so each has a temporary file of its own.
    """
    path = Path(path)
    unique = f".{os.urandom(4).hex()}" if shared else ""
    temporary = path.with_name(f"{path.name}{unique}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except Exception as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if getattr(error, "errno", None) in FULL:
            error.filename = str(path)
        raise


def write_file(path, data, shared=False):
    """Write bytes to a file, all or nothing. shared: see `atomic_write`."""
    with atomic_write(path, shared) as file:
        file.write(data)


def link(path, name):
    """Give a file a second name in the same folder.

    It replaces an older file of that name in one step.
    """
    path = Path(path)
    target = path.with_name(name)
    if target.exists() and path.samefile(target):  # renaming would leave both
        return
    temporary = path.with_name(name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, temporary)
        sync(temporary)
    os.replace(temporary, target)
    sync(path.parent)


def sync(path):
    """Call fsync, so that the bytes of a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def why_unwritable(path, error, needed=None):
    """Explain in one line why writing `path` raised an OSError: its folder is gone, its disk is
    full, or the error.

    needed: the size of the file in bytes, if it is known.
    """
    path = Path(path)
    missing = [folder for folder in path.absolute().parents if not folder.exists()]
    if missing:
        return (
            f"{missing[-1]} was deleted or moved during the run; put it back, then continue "
            "(training: --resume)"
        )
    if error.errno not in FULL:
        return f"{path} can't be written ({error.strerror or error})"
    disk = next(folder for folder in path.resolve().parents if folder.is_mount())
    free = size_text(shutil.disk_usage(disk).free)
    reason = f"{error.strerror}; the disk {disk} has {free} free"
    if needed is not None:
        reason += f", the file needs {size_text(needed)}"
    return f"{path} can't be written ({reason}); {what_to_delete(path)}"


def what_to_delete(path):
    """Advise how to free space: by the numbered checkpoints of the same run that best.pt and
    latest.pt do not share.
    """
    run = next((folder for folder in path.parents if (folder / "lock").exists()), path)
    numbered = sorted(run.glob("checkpoints/[0-9]*.pt"))
    older = [file for file in numbered if file.stat().st_nlink == 1]
    if not older:
        return "free some space there"
    names = older[0].name
    if len(older) > 1:
        names += f" to {older[-1].name}"
    size = size_text(sum(file.stat().st_size for file in older))
    return f"free some space there, for example delete {names} ({size}) in {older[0].parent}"


def size_text(num_bytes):
    """A size for messages, such as "10.8 GB" or "3.25 MB"."""
    if num_bytes >= 999.5e6:
        return f"{num_bytes / 1e9:.1f} GB"
    return f"{num_bytes / 1e6:.3g} MB"
