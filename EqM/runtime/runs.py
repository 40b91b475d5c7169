"""Run folders: names, the lock that allows one writer, and the run of a restarted process."""

import fcntl
import itertools
import json
import os
import re
import socket
import time
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from runtime.cli import UserError, say, writing

# a run of train.py
RUN_NAME = re.compile(
    r"[0-9]+-(?P<model>EqM-.+?)-f(?P<num_frames>[0-9-]+)(?P<use_rope>-rope)?(?P<causal>-causal)?"
)
LOCK_TIMEOUT = 10  # seconds in which the processes of a killed run end

_locks = []  # open files; a lock lasts as long as its file is open


def run_number(folder):
    """Return 7 for .../007-EqM-S-4-f4-rope, and -1 for anything that is not a run folder."""
    number = folder.name.split("-")[0]
    return int(number) if number.isdecimal() else -1


def make_run_folder(results_dir, name):
    """Make, lock and return a new run folder, results_dir/NNN-name, with its subfolders."""
    root = Path(results_dir)
    root.mkdir(parents=True, exist_ok=True)
    while True:
        last = max(map(run_number, root.iterdir()), default=-1)
        folder = root / f"{last + 1:03d}-{name}"
        with suppress(FileExistsError):  # two runs that start at once
            folder.mkdir()
            break
    (folder / "checkpoints").mkdir()
    (folder / "samples").mkdir()
    lock(folder)
    return folder


def newest_run(results_dir, name):
    """Return the newest run folder of that name, a glob pattern, or None.

    After a restart by torchrun, it is the newest one of this job: others may run beside it.
    """
    folders = sorted(Path(results_dir).glob(f"[0-9]*-{name}"), key=run_number, reverse=True)
    of_job = filter(is_restarted, folders)
    return next(itertools.chain(of_job, folders), None)


def name_similar(results_dir, name):
    """Name the newest run of train.py that differs from a missing run in one flag.

    "" if there is none.
    """
    expected = RUN_NAME.fullmatch(f"0-{name}")
    if not expected:
        return ""
    for folder in sorted(Path(results_dir).glob("[0-9]*-EqM-*"), key=run_number, reverse=True):
        run = RUN_NAME.fullmatch(folder.name)
        if not run:
            continue
        flags = expected.groupdict("").items()
        different = [flag for flag, value in flags if not fnmatch(run[flag] or "", value)]
        if len(different) == 1:
            return (
                f"; {folder.name} differs only in --{different[0].replace('_', '-')}: change it to "
                "resume that run"
            )
    return ""


def results_of(ckpt):
    """The results folder of a run's checkpoint.

    None for any other file and for a value that is not a path.
    """
    if not isinstance(ckpt, str):
        return None
    folder = Path(ckpt).parent
    is_run = folder.name == "checkpoints" and folder.is_dir()
    return folder.parent.parent if is_run else None


def remove_temporary_files(folder):
    """Remove the half-written files of a killed process. Call this only with the folder's lock."""
    for path in Path(folder).rglob("*.tmp"):
        if path.is_file():
            path.unlink()


def keep_last(folder, count, step, always=()):
    """Remove a run's numbered checkpoints but the last `count` (None: all) and steps `always`.

    Those after `step`, which a run that went back has left, do not count and stay.
    """
    steps = {
        int(path.stem): path
        for path in Path(folder, "checkpoints").glob("*.pt")
        if path.stem.isdecimal()
    }
    past = sorted(one for one in steps if one <= step)
    for old in past[:-count] if count else ():
        if old not in always:
            steps[old].unlink()


def job_name():
    """The name of the user's job, the same for all its processes, also for restarted ones."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return f"{socket.gethostname()}/{os.getppid()}" if run_id == "none" else run_id


def check_job():
    """Raise UserError if ranks that torchrun restarts could not find their run."""
    machines = os.environ.get("GROUP_WORLD_SIZE", "1")
    if machines != "1" and os.environ.get("TORCHELASTIC_RUN_ID", "none") == "none":
        raise UserError(
            f"torchrun --nnodes={machines}: --rdzv-id is missing; restarts need it: add any name"
        )


def lock(folder):
    """Lock a run folder for the lifetime of this process.

    Raises UserError if another process holds the lock.
    """
    try:
        file = open(Path(folder, "lock"), "a+")  # noqa: SIM115 (open for the whole run)
    except OSError as error:
        raise UserError(
            f"{folder}: can't be written ({error.strerror}); name another --results-dir"
        ) from error
    until = time.monotonic() + LOCK_TIMEOUT
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > until:
                file.seek(0)
                who = file.read() or "unknown"
                raise UserError(
                    f"{folder}: another process writes to it ({who}): wait, or stop that process"
                ) from None
            time.sleep(0.1)
        except OSError as error:
            say(
                f"note: {folder} is not protected against a second writer, as its file system has "
                f"no file locks ({error.strerror}): start one run there at a time"
            )
            break
    with writing(file.name):
        file.truncate(0)
        json.dump({"job": job_name(), "host": socket.gethostname(), "pid": os.getpid()}, file)
        file.flush()
    _locks.append(file)


def is_restarted(folder):
    """Whether torchrun started this process to replace one that wrote to the run folder."""
    # With several machines the count is useless: only the machine whose process died has counted
    if (
        int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0
        and os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    ):
        return False
    with suppress(OSError, ValueError):  # no lock yet, or a damaged one
        for _ in range(10):
            if text := Path(folder, "lock").read_text():
                return json.loads(text)["job"] == job_name()
            time.sleep(0.1)  # rank 0 may be writing it
    return False
