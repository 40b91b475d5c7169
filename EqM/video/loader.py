"""Loader processes: how they start and end, their batches, and the copies to the device."""

import atexit
import functools
import multiprocessing
import os
import signal
from multiprocessing import resource_tracker

import torch
from torch.utils.data import DataLoader, get_worker_info

from runtime.cli import UserError
from runtime.distributed import die_with_parent
from runtime.signals import STOP_SIGNALS
from video.clips import ClipsByFrames, collate

PATH_BYTES = 4096


def make_loader(clips, batches, num_workers, timeout, device):
    """A DataLoader over clips, a dict num_frames -> Clips; batches yields lists of (num_frames, index).
    timeout: seconds to wait for a batch of the loader processes, 0 = no limit.
    """
    watch, settings = LoaderWatch(num_workers), worker_settings(num_workers, timeout)
    for data_set in clips.values():
        data_set.note = watch.note
    settings |= {"batch_sampler": batches, "collate_fn": collate, "pin_memory": device.type == "cuda"}
    loader = DataLoader(ClipsByFrames(clips), **settings)
    loader.watch = watch
    return loader


def worker_settings(num_workers, timeout=0):
    """The settings of a DataLoader with so many loader processes; 0: it reads in this one. timeout: see make_loader."""
    if not num_workers:
        return {}
    settings = {"multiprocessing_context": "spawn", "persistent_workers": True, "prefetch_factor": 4}
    start = functools.partial(start_worker, os.getpid())
    return settings | {"num_workers": num_workers, "worker_init_fn": start, "timeout": timeout}


def start_worker(parent, _):
    """Runs first in a loader process: it ends when its rank, the process `parent`, ends."""
    die_with_parent(signal.SIGKILL)
    if os.getppid() != parent:  # the rank ended before that
        os._exit(1)


class LoaderWatch:
    """The file that each loader process is reading, to name one that hangs."""

    def __init__(self, num_workers):
        self.slots = [multiprocessing.RawArray("c", PATH_BYTES) for _ in range(num_workers)]  # shared memory

    def note(self, path):
        """This loader process is reading `path`; "" = none."""
        if (worker := get_worker_info()) is not None:
            self.slots[worker.id].value = os.fsencode(path)[: PATH_BYTES - 1]

    def __str__(self):
        return ", ".join(os.fsdecode(slot.value) for slot in self.slots if slot.value) or "no file"


@atexit.register
def end_children():
    """Kill the loader processes. They block SIGTERM, so at exit Python would wait for one that is busy or hangs."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else torch would report their end as an error
    for child in multiprocessing.active_children():
        child.kill()


def batches_of(loader):
    """An iterator over the batches of a DataLoader of Clips. UserErrors of its processes are raised without traceback.

    A timeout becomes a UserError that names the files being read. This call starts the processes, as new ones
    ("spawn"): a fork of this process could wait forever for a lock that a thread of gloo or TensorBoard held at that
    moment. They inherit the blocked signals, which torchrun, a terminal or a cluster sends to the whole process group:
    the rank still needs them for the current step.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # those that come are delivered afterwards
    try:
        if loader.num_workers:
            resource_tracker.ensure_running()  # a helper of multiprocessing, whose start unblocks some of the signals
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        iterator = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return _iterate(loader, iterator)


def _iterate(loader, iterator):
    try:
        yield from iterator
    except UserError as error:
        raise UserError(str(error).rsplit("UserError: ", 1)[-1].strip()) from error
    except (ConnectionError, EOFError) as error:  # killed while it handed over a batch, before the DataLoader knows
        raise RuntimeError("DataLoader worker (pid unknown) exited unexpectedly") from error
    except RuntimeError as error:
        if "timed out" not in str(error):
            raise
        late = f"no batch within this many seconds, the loader processes are reading {loader.watch}"
        advice = "remove or repair the file that hangs, or raise the limit"
        raise UserError(f"--loader-timeout {loader.timeout:g}: {late}: {advice}") from error


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
