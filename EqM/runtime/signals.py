"""What may befall a long run from outside: signals that ask it to stop, a second writer, processes that are lost."""

import atexit
import fcntl
import json
import multiprocessing
import os
import re
import signal
import socket
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import get_worker_info

from runtime.distributed import UserError, die_with_parent, fail, is_started, say

STOP_SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP
LOCK_PATIENCE = 10  # seconds; within them the processes of a run that was killed are gone
PATH_BYTES = 4096

_locks = []  # open files; a lock lasts as long as its file is open


class Interrupted(Exception):  # noqa: N818 (nothing went wrong)
    """The run is to stop; what was under way is left and done again later."""


class StopSignal:
    """SIGTERM, SIGINT, SIGUSR1 or SIGHUP, sent to any rank, asks all of them to stop at the same step.

    The ranks agree by a sum over a group of its own, on the CPU: `ask` starts it before a step and `agreed` reads it
    after the step, so nobody waits. A second SIGINT ends the process at once.
    """

    def __init__(self):
        self.name, self.pending = None, None
        self.group = dist.new_group(backend="gloo") if is_started() else None
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as SIGHUP is under nohup
                signal.signal(number, self._note)

    def _note(self, number, frame):
        self.name = self.name or signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def ask(self):
        if self.group is not None:
            self.flag = torch.tensor([float(self.name is not None)])
            self.pending = dist.all_reduce(self.flag, group=self.group, async_op=True)

    def agreed(self):
        """Whether any rank had been asked to stop when it came to `ask` (here, if nobody called that): alike on all."""
        if self.group is None:
            return self.name is not None
        if self.pending is None:
            self.ask()
        self.pending.wait()
        self.pending = None
        return self.flag.item() > 0

    def check(self):
        """Raise Interrupted if this rank was asked to stop; others may not know: see `settle`."""
        if self.name is not None:
            raise Interrupted

    def settle(self):
        """Raise Interrupted, on all ranks, if any was asked to stop."""
        if self.agreed():
            raise Interrupted


# ----------------------------------------------------------------------------------------------------------------------
# One writer


def job():
    """Names what a user has started: the same for all its processes and for those that torchrun starts anew."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return f"{socket.gethostname()}/{os.getppid()}" if run_id == "none" else run_id


def check_job():
    """Raise UserError where ranks that torchrun starts again could not know the run that they belong to."""
    machines = os.environ.get("GROUP_WORLD_SIZE", "1")
    if machines != "1" and os.environ.get("TORCHELASTIC_RUN_ID", "none") == "none":
        raise UserError(f"torchrun --nnodes={machines} without --rdzv-id, which names the run for restarts: give one")


def lock(folder):
    """Keep a run folder to this process for as long as that lives. Raises UserError if another one has it."""
    try:
        file = open(Path(folder, "lock"), "a+")  # noqa: SIM115 (open for the whole run)
    except OSError as error:
        raise UserError(f"{folder} can't be written to ({error.strerror}): name another --results-dir") from error
    until = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > until:
                file.seek(0)
                who = file.read() or "unknown"
                raise UserError(f"{folder}: another process writes to it ({who}): wait, or stop that one") from None
            time.sleep(0.1)
        except OSError as error:
            say(f"note: {folder} can't be locked ({error.strerror}): take care that only one run writes to it")
            break
    file.truncate(0)
    file.write(json.dumps({"job": job(), "host": socket.gethostname(), "pid": os.getpid()}))
    file.flush()
    _locks.append(file)


def is_restarted(folder):
    """Whether torchrun has started this process in place of one that wrote to the run folder.

    Between machines its count of restarts tells nothing: only the machine of the process that died has counted.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0 and os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        return False
    try:
        return json.loads(Path(folder, "lock").read_text())["job"] == job()
    except (OSError, ValueError, KeyError, TypeError):
        return False


# ----------------------------------------------------------------------------------------------------------------------
# Processes that are lost


def start_worker(parent, _):
    """The start of a loader process: it ends with its rank, the process `parent`, and by nothing else.

    Whoever signals a whole process group (torchrun, a terminal, a cluster) means the rank, which still needs it for
    the step under way.
    """
    die_with_parent(signal.SIGKILL)
    if os.getppid() != parent:  # it died before that
        os._exit(1)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    for file in _locks:  # or the worker would hold the lock after the death of its rank
        file.close()


class LoaderWatch:
    """Which file each loader process is reading, for the case that one never comes back from it."""

    def __init__(self, num_workers):
        self.slots = [multiprocessing.RawArray("c", PATH_BYTES) for _ in range(num_workers)]  # shared memory

    def note(self, path):
        if (worker := get_worker_info()) is not None:
            self.slots[worker.id].value = os.fsencode(path)[: PATH_BYTES - 1]

    def reading(self):
        return [os.fsdecode(slot.value) for slot in self.slots if slot.value]


@atexit.register
def end_children():
    """Loader processes ignore the signal that Python ends them with: it would wait for one that is busy or hangs."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would complain of their end
    for child in multiprocessing.active_children():
        child.kill()


@contextmanager
def one_line_errors(*others):
    """What goes wrong while running ends the process with status 1 and one line, if it is known what it means.

    That is UserError, what a disk or a memory that is not enough raises, the loss of a process, and `others`.
    """
    try:
        yield
    except (UserError, OSError, torch.OutOfMemoryError, *others) as error:
        fail(error, status=1)
    except RuntimeError as error:
        if (line := explain(error)) is None:
            raise
        fail(line, status=1, patience=0)


def explain(error):
    """One line for an error that comes from a process that is gone, None for any other."""
    text = str(error)
    if killed := re.search(r"DataLoader worker \(pid.*?\) (exited unexpectedly|is killed by signal: [\w ]+)", text):
        return (
            f"a loader process {killed[1]}: most likely the machine ran out of memory (or /dev/shm is too small): "
            "lower --num-workers; what is saved is intact, the same command with --resume goes on"
        )
    first, safe = text.partition("\n")[0], "what is saved is intact"
    if re.search(r"Connection (closed|reset) by peer|Broken pipe|remote process exited", text):
        return f"another rank has ended, its own message says why ({first}); {safe}"
    if isinstance(error, dist.DistError) or "gloo" in text.lower():
        return (
            f"the ranks can't talk to each other ({first}); {safe}; where there are several networks, "
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose one"
        )
    return None
