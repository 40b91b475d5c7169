"""Loader processes: how they start and end, their batches, and the copies to the device."""

import atexit
import functools
import multiprocessing
import os
import signal
import time

import torch
from torch.utils.data import DataLoader, get_worker_info

from runtime import runs
from runtime.cli import UserError
from runtime.distributed import die_with_parent
from runtime.signals import STOP_SIGNALS
from video.clips import ClipsByFrames, collate

# Seconds to wait before processes are forked. gloo's threads clean up after the last message; a fork during that
# deadlocks the child, as in Python 3.11 it waits for a lock on the list of threads that one of them held.
FORK_DELAY = 0.1
PATH_BYTES = 4096


def make_loader(clips, batches, num_workers, timeout, device):
    """A DataLoader over clips, a dict num_frames -> Clips; batches yields lists of (num_frames, index).

    timeout: seconds to wait for a batch of the loader processes, 0 = no limit.
    """
    settings = {"num_workers": num_workers, "collate_fn": collate, "pin_memory": device.type == "cuda"}
    if num_workers:
        start = functools.partial(start_worker, os.getpid())
        settings |= {"persistent_workers": True, "prefetch_factor": 4, "worker_init_fn": start, "timeout": timeout}
    return DataLoader(ClipsByFrames(clips, LoaderWatch(num_workers)), batch_sampler=batches, **settings)


def start_worker(parent, _):
    """Runs first in a loader process: it ends when its rank, the process `parent`, ends, and not before.

    It ignores signals that torchrun, a terminal or a cluster sends to the whole process group: the rank still needs
    its loader processes for the current step.
    """
    die_with_parent(signal.SIGKILL)
    if os.getppid() != parent:  # the rank ended before that
        os._exit(1)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    for file in runs._locks:  # else this process would hold the run's lock after its rank has ended
        file.close()


class LoaderWatch:
    """The file that each loader process is reading, so that an error can name one that hangs."""

    def __init__(self, num_workers):
        self.slots = [multiprocessing.RawArray("c", PATH_BYTES) for _ in range(num_workers)]  # shared memory

    def note(self, path):
        """Called in a loader process: it is reading `path`; "" = none."""
        if (worker := get_worker_info()) is not None:
            self.slots[worker.id].value = os.fsencode(path)[: PATH_BYTES - 1]

    def reading(self):
        """The paths that are being read."""
        return [os.fsdecode(slot.value) for slot in self.slots if slot.value]


@atexit.register
def end_children():
    """Kill the loader processes. They ignore SIGTERM, so at exit Python would wait for one that is busy or hangs."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else torch would report their end as an error
    for child in multiprocessing.active_children():
        child.kill()


def batches_of(loader):
    """An iterator over the batches of a DataLoader of Clips. UserErrors of its processes are raised without traceback.

    A timeout becomes a UserError that names the files being read. The processes are forked by this call, not at the
    first batch: by then threads of this process may hold locks that are never released in a forked process.
    """
    if loader.num_workers:
        time.sleep(FORK_DELAY)
    return _iterate(loader, iter(loader))


def _iterate(loader, iterator):
    try:
        yield from iterator
    except UserError as error:
        raise UserError(str(error).rsplit("UserError: ", 1)[-1]) from None
    except RuntimeError as error:
        if "timed out" not in str(error):
            raise
        files = ", ".join(loader.dataset.watch.reading()) or "no file"
        raise UserError(
            f"--loader-timeout {loader.timeout:g}: no batch within this many seconds, the loader processes "
            f"are reading {files}: remove or repair the file that hangs, or raise the limit"
        ) from None


def on_device(batches, device):
    """Yields the batches with their clips on the device. A GPU copies them while it computes the previous step."""
    if device.type != "cuda":
        yield from batches
        return
    copies, compute = torch.cuda.Stream(), torch.cuda.current_stream()
    for batch in batches:
        with torch.cuda.stream(copies):
            clips = batch["clips"].to(device, non_blocking=True)
        compute.wait_stream(copies)
        clips.record_stream(compute)  # else their memory could be reused while it is in use
        yield batch | {"clips": clips}
