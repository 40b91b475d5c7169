"""What every entry script needs around its story: ranks, device, seeds, messages, errors.

The scripts run under torchrun (one process per device) and under plain `python` (one process, no
process group). Nothing here touches the process group or a GPU before `start()`.
"""

import argparse
import hashlib
import os
import sys
import time

import torch
import torch.distributed as dist

PATIENCE = 10  # seconds another rank leaves rank 0 to name an error that all ranks see


class UserError(Exception):
    """Something the user can put right; its text is one line: what was found, wanted, to do."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with errors of one line (no usage dump) that come once under torchrun."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        fail(message)


def rank():
    return int(os.environ.get("RANK", 0))


def local_rank():
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def say(message):
    """Print a line once, from rank 0."""
    if rank() == 0:
        print(message, flush=True)


def fail(message, status=2):
    """End this process with one line on stderr; status 2 = wrong input, 1 = went wrong while running.

    torchrun kills all ranks as soon as one exits, so the others give rank 0 time to speak first;
    they speak themselves only if rank 0 is still fine by then (an error on one node only).
    """
    if rank() != 0:
        time.sleep(PATIENCE)
    text = " ".join(str(message).split())
    print(f"{os.path.basename(sys.argv[0])}: error: {text}", file=sys.stderr, flush=True)
    sys.exit(status)


def start():
    """Join the process group if torchrun started us; returns the device of this rank."""
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier():
    if dist.is_initialized():
        dist.barrier()


def broadcast(value):
    """The Python value that rank 0 holds, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value):
    """The Python values of all ranks, in the order of the ranks, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def generator(seed, purpose, *numbers, device="cpu"):
    """A torch generator that is a function of its arguments alone.

    Every random draw of the project comes from one of these: `purpose` is a word ("noise", "flip"),
    `numbers` say which one (first step of the phase, number of the sample in the stream). So draws
    do not depend on how many workers or ranks there are, nor on where a run was interrupted.
    torch's CPU engine keeps 32 bits of the seed: two of 65,000 samples may well share their noise,
    which does no harm.
    """
    words = " ".join(str(part) for part in (seed, purpose, *numbers))
    digest = hashlib.blake2b(words.encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
