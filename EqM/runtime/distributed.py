"""Ranks and their device: start and stop, precision, communication between the ranks.

The scripts run under torchrun (one process per device) and under plain `python` (one process, no process group).
Nothing here touches the process group or a GPU before `start()`.
"""

import ctypes
import gc
import itertools
import os
import signal
import socket
import sys
import time
import uuid
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

SHARE_TIME = timedelta(hours=1)  # ranks wait for one that has more to do: opens all videos, samples a last batch
STEP_TIME = timedelta(minutes=10)  # in training, where all do the same
STORE_TIME = 30  # seconds for torchrun to answer
MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}  # --precision that needs autocast


def rank():
    return int(os.environ.get("RANK", 0))


def local_rank():
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def is_started():
    return dist.is_initialized()


def die_with_parent(number):
    """Have the system send this process a signal when its parent process dies. On Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(number))  # PR_SET_PDEATHSIG


if "TORCHELASTIC_RUN_ID" in os.environ:  # ranks have sessions of their own and would outlive a torchrun that is killed
    die_with_parent(signal.SIGTERM)


def start(timeout=SHARE_TIME):
    """Join the process group if torchrun started us; returns the device of this rank.

    timeout is that of a collective. Raises ConnectionError if torchrun does not answer.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if "RANK" in os.environ:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # Python values need no GPU
        ranks = {"rank": rank(), "world_size": world_size()}
        dist.init_process_group(backend, store=rendezvous_store(), timeout=timeout, **ranks)
    return device


def keep_freed_memory():
    """Let the C library (glibc) keep freed memory instead of returning it to the system.

    On the CPU a step allocates and frees the same gigabytes; getting them anew, page by page, takes a tenth of it.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(-4, 0)  # M_MMAP_MAX: no block comes directly from the system
        library.mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing goes back to it


def rendezvous_store():
    """The store through which the ranks find each other, under a prefix that only the ranks of this attempt have.

    When torchrun restarts its ranks, its store still holds the addresses of those that died (torch 2.13). So rank 0
    chooses a random prefix, and each other rank continues once rank 0 has answered it under that prefix.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # it is torchrun's and was there before this process
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            socket.create_connection(place, STORE_TIME).close()
        except OSError as error:
            raise ConnectionError(f"torchrun does not answer ({error}): start it again") from error
    store, _, _ = next(dist.rendezvous("env://", timeout=SHARE_TIME))
    mine = uuid.uuid4().hex
    if rank() == 0:
        store.set("attempt", mine)
        for other in range(1, world_size()):
            store.set(f"{mine}/{other}/answer", store.get(f"{mine}/{other}"))
        return dist.PrefixStore(mine, store)
    while True:
        attempt = store.get("attempt").decode()  # may be that of an earlier attempt, for a while
        store.set(f"{attempt}/{rank()}", mine)
        answer = f"{attempt}/{rank()}/answer"
        if store.check([answer]) and store.get(answer).decode() == mine:
            return dist.PrefixStore(attempt, store)
        time.sleep(0.05)


def stop():
    """Leave the process group, once all ranks are done."""
    if is_started():
        dist.barrier()
        # DDP sits in reference cycles and holds the group. Unless its threads end here, they may still run while the
        # interpreter shuts down, and gloo aborts the process ("terminate called without an active exception").
        gc.collect()
        dist.destroy_process_group()


def set_precision(precision):
    """Let products and convolutions in float32 use TF32, or not: the part of --precision that is not autocast.

    In mixed precision the VAE's convolutions may, too: they run in float32 beside the network.
    """
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"


def autocast(device, precision):
    """The context in which a network runs in that --precision: mixed for bf16 and fp16, else unchanged.

    Casts are not kept until its end, as no weight is used twice: of a sharded network they would be all weights.
    """
    return torch.autocast(device.type, MIXED.get(precision), enabled=precision in MIXED, cache_enabled=False)


def parallel(model):
    """The model wrapped in DDP, which averages gradients over the ranks; the model itself in a single process."""
    if not is_started():
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 has a new name for it that 2.9 does not know
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def broadcast(value):
    """The Python value that rank 0 holds, on every rank."""
    if not is_started():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value):
    """The Python values of all ranks, in the order of the ranks, on every rank."""
    if not is_started():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_in_order(rows):
    """The rows (index, ...) of all ranks, sorted by index, as columns without the index, on every rank."""
    rows = sorted(itertools.chain(*gather(rows)), key=lambda row: row[0])
    return list(zip(*rows, strict=True))[1:]


def call_and_wait(function):
    """Call a function on all ranks, and wait up to an hour for those to which it gives more work."""
    group = dist.new_group(backend="gloo", timeout=SHARE_TIME) if is_started() else None
    function()
    if group is not None:
        dist.barrier(group=group)


def average(tensor):
    """The mean of a tensor over all ranks, on every rank."""
    if is_started():
        dist.all_reduce(tensor)
        tensor /= world_size()
    return tensor


def own_indices(count, block=1):
    """Those of the indices 0 ... count - 1 that this rank works on; the ranks take blocks of so many in turn."""
    return [index for index in range(count) if index // block % world_size() == rank()]


def gather_on_first(value):
    """The Python values of all ranks, in the order of the ranks, on rank 0; None on the others."""
    if not is_started():
        return [value]
    values = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values


def collect(indices, items):
    """What the ranks computed for their indices, in order, on rank 0: items (len(indices), ...) -> (count, ...).

    The other ranks get None. A rank without indices may give any tensor.
    """
    parts = gather_on_first((indices, items.cpu()))
    if parts is None:
        return None
    indices, items = zip(*(part for part in parts if part[0]), strict=True)
    return torch.cat(items)[torch.tensor(list(itertools.chain(*indices))).argsort()]
