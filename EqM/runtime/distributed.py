"""Ranks and their devices: start and stop, precision, communication.

The scripts run under torchrun (one process per device) or under plain `python` (one process, no
process group). Nothing here touches the process group or a GPU before `start()`.
"""

import ctypes
import gc
import itertools
import os
import re
import signal
import socket
import sys
import time
import uuid
import warnings
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

# Timeouts of ranks that wait for others
STEP_TIME = timedelta(minutes=10)  # in training, where all ranks do the same
SHARE_TIME = timedelta(hours=1)  # in training, while one rank has more to do: it opens all videos
WORK_TIME = timedelta(days=30)  # in other scripts, where one rank may encode or sample for hours
STORE_TIME = 30  # seconds for torchrun to answer
MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}  # values of --precision that use autocast
FAST_BF16 = re.compile("amx_bf16|AuthenticAMD.*avx512_bf16", re.DOTALL)  # in /proc/cpuinfo


def rank():
    return int(os.environ.get("RANK", 0))


def local_rank():
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def die_with_parent(number):
    """Let Linux send this process a signal when its parent process dies; elsewhere do nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(number))  # PR_SET_PDEATHSIG


# ranks have their own sessions and would outlive a killed torchrun
if "TORCHELASTIC_RUN_ID" in os.environ:
    die_with_parent(signal.SIGTERM)


def start(timeout=WORK_TIME):
    """Join the process group, if torchrun started this process.

    Returns this rank's device. timeout: of collectives.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if "RANK" in os.environ:
        # Python values need no GPU
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            store=rendezvous_store(),
            timeout=timeout,
            rank=rank(),
            world_size=world_size(),
        )
    return device


def keep_freed_memory():
    """Let the C library (glibc) keep freed memory.

    On the CPU, new pages would cost a tenth of each step's time.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(-4, 0)  # M_MMAP_MAX: no block comes directly from the system
        library.mallopt(-1, -1)  # M_TRIM_THRESHOLD: no memory returns to the system


def rendezvous_store():
    """The store through which the ranks of this attempt find each other.

    Only they know its prefix.
    """
    # torchrun started it before this process
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            socket.create_connection(address, STORE_TIME).close()
        except OSError as error:
            raise ConnectionError(f"torchrun does not answer ({error}): start it again") from error
    store, _, _ = next(dist.rendezvous("env://", timeout=SHARE_TIME))
    # When torchrun restarts its ranks, its store still holds the addresses of the dead ranks (torch
    # 2.13). So rank 0 chooses a random prefix, and each other rank continues once rank 0 has
    # answered it under that prefix.
    word = uuid.uuid4().hex
    if rank() == 0:
        store.set("attempt", word)
        for other in range(1, world_size()):
            question = store.get(f"{word}/{other}")
            store.set(f"{word}/{other}/answer", question)
        return dist.PrefixStore(word, store)
    while True:
        attempt = store.get("attempt").decode()  # at first perhaps of an earlier attempt
        question = f"{attempt}/{rank()}"
        answer = f"{question}/answer"
        store.set(question, word)
        if store.check([answer]) and store.get(answer).decode() == word:
            return dist.PrefixStore(attempt, store)
        time.sleep(0.05)


def stop():
    """Leave the process group once all ranks are done."""
    if dist.is_initialized():
        dist.barrier()
        # Reference cycles with DDP hold the group. Its threads must end here: if they still run
        # while the interpreter shuts down, gloo aborts the process ("terminate called without an
        # active exception").
        gc.collect()
        dist.destroy_process_group()


def set_precision(precision):
    """Switch TF32 for float32 products and convolutions on or off.

    This is the part of --precision besides autocast.
    """
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    # in mixed precision the VAE's convolutions are float32
    torch.backends.cudnn.allow_tf32 = precision != "fp32"


def autocast(device, precision):
    """The context in which a network runs with that --precision.

    It is mixed for bf16 and fp16, else unchanged.
    """
    # Casts are not cached: no weight is used twice, and the cache of a sharded network would
    # hold all weights
    return torch.autocast(
        device.type,
        dtype=MIXED.get(precision),
        enabled=precision in MIXED,
        cache_enabled=False,
    )


@cache
def has_fast_bf16(device_type):
    """Whether products in bfloat16 are faster than in float32. device_type: "cuda" or "cpu".

    AMX makes them fast, as do the bf16 instructions of AMD's processors. On a Xeon with such
    instructions but without AMX, they take twice as long as in float32; on other CPUs, up to ten
    times.
    """
    if device_type != "cpu":
        return True
    about = Path("/proc/cpuinfo")
    return about.exists() and bool(FAST_BF16.search(about.read_text()))


def parallel(model):
    """Wrap the model in DDP, which averages gradients over the ranks.

    In a single process return the model.
    """
    if not dist.is_initialized():
        return model
    with warnings.catch_warnings():
        # torch 2.9 does not know the new name of torch 2.13
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def broadcast(value):
    """Return rank 0's Python value on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value, on_all=True):
    """Return the Python values of all ranks, in their order, on every rank or on rank 0 alone."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    if on_all:
        dist.all_gather_object(values, value)
    else:
        dist.gather_object(value, values if rank() == 0 else None)
    return values


def gather_items(items):
    """Return the items of all ranks' lists, in the order of the ranks, on every rank."""
    return [*itertools.chain(*gather(items))]


def gather_in_order(rows):
    """Return the rows (index, ...) of all ranks, sorted by index, as columns without the index.

    Every rank gets them.
    """
    rows = sorted(gather_items(rows), key=lambda row: row[0])
    _, *columns = zip(*rows, strict=True)
    return columns


def call_and_wait(function):
    """Call a function on all ranks, and wait up to an hour for ranks that have more to do."""
    group = dist.new_group(backend="gloo", timeout=SHARE_TIME) if dist.is_initialized() else None
    function()
    if group is not None:
        dist.barrier(group=group)


def average(tensor):
    """Return the mean of a tensor over all ranks, on every rank."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= world_size()
    return tensor


def own_indices(count, block=1):
    """This rank's share of the indices 0 ... count - 1.

    The ranks take blocks of that size in turn.
    """
    return [index for index in range(count) if index // block % world_size() == rank()]


def collect(indices, items):
    """On rank 0, the items (len(indices), ...) of all ranks in the order of their indices, (count,
    ...); else None.
    """
    parts = gather((indices, items.cpu()), on_all=False)
    if rank() != 0:
        return None
    # a rank without indices passes any tensor
    indices, items = zip(*[part for part in parts if part[0]], strict=True)
    order = torch.tensor([*itertools.chain(*indices)]).argsort()
    return torch.cat(items)[order]
