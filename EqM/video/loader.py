"""Loader processes: their start and end, their batches, and the copies to the device."""

import atexit
import multiprocessing
import os
import signal
import sys
from multiprocessing import resource_tracker

import torch
from torch.utils.data import DataLoader, get_worker_info

from runtime.cli import UserError
from runtime.distributed import die_with_parent
from runtime.signals import STOP_SIGNALS
from video.clips import collate

PATH_BYTES = 4096
# it cleans up after a kill
sys.warnoptions.append("ignore::UserWarning:multiprocessing.resource_tracker")


class ClipsByFrames(torch.utils.data.Dataset):
    """One data set from a dict num_frames -> Clips or Mix. Its keys are (num_frames, index)."""

    def __init__(self, clips, num_workers=0):
        self.clips = clips
        # in shared memory
        self.files = [multiprocessing.RawArray("c", PATH_BYTES) for _ in range(num_workers)]
        for data_set in clips.values():
            for part in data_set.parts:
                part.note = self.note

    def __getitem__(self, key):
        num_frames, index = key
        return self.clips[num_frames][index]

    def note(self, path):
        """Record that this loader process is reading `path`; "" = no file."""
        if (worker := get_worker_info()) is not None:
            self.files[worker.id].value = os.fsencode(path)[: PATH_BYTES - 1]

    def being_read(self):
        """The names of the files that the loader processes are reading.

        A message has them if one hangs.
        """
        return ", ".join(os.fsdecode(file.value) for file in self.files if file.value) or "no file"


def make_loader(clips, batches, num_workers, timeout, device):
    """A DataLoader over `clips`, a dict num_frames -> Clips or Mix.

    `batches` yields lists of (num_frames, index).
    """
    return DataLoader(
        ClipsByFrames(clips, num_workers),
        batch_sampler=batches,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        **worker_settings(num_workers, timeout),
    )


def worker_settings(num_workers, timeout=0):
    """The settings of a DataLoader with num_workers processes; 0 = read in this process.

    timeout: seconds per batch.
    """
    if not num_workers:
        return {}
    return {
        "multiprocessing_context": "spawn",
        "persistent_workers": True,
        "prefetch_factor": 4,
        "num_workers": num_workers,
        "worker_init_fn": start_worker,
        "timeout": timeout,
    }


def start_worker(_):
    """Make this loader process end when its rank ends."""
    die_with_parent(signal.SIGKILL)
    if os.getppid() != multiprocessing.parent_process().pid:  # the rank has already ended
        os._exit(1)


@atexit.register
def end_children():
    """Kill the loader processes.

    They block SIGTERM, so Python would wait at exit for one that is busy or hangs.
    """
    # otherwise torch would report their end as an error
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        child.kill()


def batches_of(loader):
    """An iterator over the batches of a DataLoader of Clips. This call starts the loader processes.

    A UserError of a process is raised here without its traceback. A timeout becomes a UserError
    that names the files being read. The processes are new ones ("spawn"): a fork could wait forever
    for a lock that a thread of gloo or TensorBoard held at that moment. They inherit blocked
    signals, because torchrun, terminals and clusters signal the whole process group, and the rank
    still needs the processes for the current step.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # they are delivered afterwards
    try:
        if loader.num_workers:
            # a helper of multiprocessing; its start unblocks some of the signals
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        iterator = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return _iterate(loader, iterator)


def _iterate(loader, iterator):
    try:
        yield from iterator
    except UserError as error:
        raise type(error)(str(error).rsplit(f"{type(error).__name__}: ", 1)[-1].strip()) from error
    except (ConnectionError, EOFError) as error:
        # the process was killed while it handed over a batch
        raise RuntimeError("DataLoader worker (pid unknown) exited unexpectedly") from error
    except RuntimeError as error:
        if "timed out" not in str(error):
            raise
        raise UserError(
            f"--loader-timeout {loader.timeout:g}: no batch for this many seconds; the loader "
            f"processes are reading {loader.dataset.being_read()}; remove or repair the file that "
            "hangs, or raise the limit"
        ) from error


def on_device(batches, device):
    """Yield the batches with their clips on the device.

    A GPU copies clips while it computes the previous step.
    """
    if device.type != "cuda":
        yield from batches
        return
    copies = torch.cuda.Stream()
    compute = torch.cuda.current_stream()
    for batch in batches:
        with torch.cuda.stream(copies):
            clips = batch["clips"].to(device, non_blocking=True)
        compute.wait_stream(copies)
        clips.record_stream(compute)  # otherwise their memory could be reused too early
        yield batch | {"clips": clips}
