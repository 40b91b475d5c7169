"""Loader processes: their start and end, the batches they give, the copies to the device."""

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

# Seconds of rest before processes are forked: gloo's threads clean up after the last message, and a fork in the middle
# of that deadlocks the child, which in Python 3.11 waits for the lock on the list of threads that one of them held.
QUIET = 0.1
PATH_BYTES = 4096


def make_loader(clips, batches, num_workers, timeout, device):
    """A DataLoader of {num_frames: Clips}; batches are lists of (num_frames, index).

    timeout: seconds that loader processes may take for a batch, 0 = any number.
    """
    settings = {"num_workers": num_workers, "collate_fn": collate, "pin_memory": device.type == "cuda"}
    if num_workers:
        start = functools.partial(start_worker, os.getpid())
        settings |= {"persistent_workers": True, "prefetch_factor": 4, "worker_init_fn": start, "timeout": timeout}
    return DataLoader(ClipsByFrames(clips, LoaderWatch(num_workers)), batch_sampler=batches, **settings)


def start_worker(parent, _):
    """The first call in a loader process: let it end with its rank, the process `parent`, and not before.

    A signal to a whole process group (from torchrun, a terminal, a cluster) is for the rank, which still needs its
    loader processes for the step under way.
    """
    die_with_parent(signal.SIGKILL)
    if os.getppid() != parent:  # it died before that
        os._exit(1)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    for file in runs._locks:  # or the worker would hold the run's lock after the death of its rank
        file.close()


class LoaderWatch:
    """Which file each loader process is reading, so that one that hangs can be named."""

    def __init__(self, num_workers):
        self.slots = [multiprocessing.RawArray("c", PATH_BYTES) for _ in range(num_workers)]  # shared memory

    def note(self, path):
        if (worker := get_worker_info()) is not None:
            self.slots[worker.id].value = os.fsencode(path)[: PATH_BYTES - 1]

    def reading(self):
        return [os.fsdecode(slot.value) for slot in self.slots if slot.value]


@atexit.register
def end_children():
    """Kill loader processes: they ignore SIGTERM, so Python would wait at exit for one that is busy or hangs."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report their end as an error
    for child in multiprocessing.active_children():
        child.kill()


def batches_of(loader):
    """An iterator over the batches of a DataLoader of Clips; a UserError in a loader process comes without traceback.

    A timeout becomes a UserError that names the files being read. The processes are forked by this call, not at the
    first batch, when threads of this process may hold locks that the fork would never release.
    """
    if loader.num_workers:
        time.sleep(QUIET)
    return _batches(loader, iter(loader))


def _batches(loader, iterator):
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
            f"are reading {files}: remove or repair what hangs, or raise the limit"
        ) from None


def on_device(batches, device):
    """The batches with their clips on the device. A GPU copies them while it computes the step before."""
    if device.type != "cuda":
        yield from batches
        return
    copies, compute = torch.cuda.Stream(), torch.cuda.current_stream()
    for batch in batches:
        with torch.cuda.stream(copies):
            clips = batch["clips"].to(device, non_blocking=True)
        compute.wait_stream(copies)
        clips.record_stream(compute)  # or its memory could be given away while it is in use
        yield batch | {"clips": clips}
