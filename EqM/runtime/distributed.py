"""What every entry script needs around its story: ranks, device, seeds, messages, errors.

The scripts run under torchrun (one process per device) and under plain `python` (one process, no
process group). Nothing here touches the process group or a GPU before `start()`.
"""

import argparse
import ctypes
import gc
import hashlib
import math
import os
import shutil
import signal
import socket
import sys
import time
import uuid
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from samplers import DESCENTS, SOLVERS

SCAN_TIME = timedelta(hours=1)  # the others wait for rank 0 to open every video of a large set for the first time
STORE_TIME = 30  # seconds for torchrun to answer
PATIENCE = 10  # seconds another rank leaves rank 0 to name an error that all ranks see


def die_with_parent(number):
    """Have the system send this process a signal when the one that started it dies. On Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(number))  # PR_SET_PDEATHSIG


if "TORCHELASTIC_RUN_ID" in os.environ:  # ranks have sessions of their own and would outlive a torchrun that is killed
    die_with_parent(signal.SIGTERM)


class UserError(Exception):
    """Something the user can put right; its text is one line: what was found, wanted, to do."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with errors of one line (no usage dump) that come once under torchrun."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        fail(message)


def number(kind, above=None, least=None, most=None):
    """A `type=` for argparse: an int or a finite float within bounds (above is exclusive)."""
    bounds = {"above": above, "at least": least, "at most": most}
    wanted = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)

    def parse(text):
        value = kind(text)
        too_small = (above is not None and not value > above) or (least is not None and not value >= least)
        if too_small or (most is not None and not value <= most) or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"found {text}, wanted a number {wanted}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return parse


def check_writable(flag, folder):
    """Raise UserError unless `folder` can be made or written to; touches nothing."""
    if not str(folder):
        raise UserError(f"{flag} '': an empty name; name a folder")
    place = Path(folder).absolute()
    if long := [part for part in place.parts if len(os.fsencode(part)) > 255]:
        raise UserError(f"{flag} {folder}: {long[0][:20]}... is longer than 255 bytes; name a shorter one")
    while not os.path.lexists(place):  # a link that leads nowhere stands in the way as a file does
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"{flag} {folder}: {place} is not a folder that can be written to; name another")


STOP_BELOW = 1.0  # as accurate as 250 points with 57% of their evaluations: scripts/adaptive_compute.py
COUNT, NATURAL = number(int, least=1, most=2**31 - 1), number(int, least=0, most=2**63 - 1)
POSITIVE, NON_NEGATIVE, SHARE = number(float, above=0), number(float, least=0), number(float, least=0, most=1)


def add_speed_flags(parser):
    """The flags of every script that runs a network for long; `check_speed_flags` and `set_precision` go with them."""
    add = parser.add_argument_group("speed").add_argument
    precision = "bf16 and fp16 are mixed precision, tf32 rounds within matrix products; tf32 and fp16 want a GPU"
    add("--precision", choices=["fp32", "tf32", "bf16", "fp16"], default="fp32", help=precision)
    add("--compile", action="store_true", help="let torch compile the blocks; off = do not")
    return add


def check_speed_flags(args):
    """Raise UserError if this machine can't do what --precision and --compile ask for."""
    if args.precision in ("tf32", "fp16") and not torch.cuda.is_available():
        raise UserError(f"--precision {args.precision} wants a GPU, there is none: take bf16 or fp32")
    if args.compile and not any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++"))):
        raise UserError("--compile needs a C++ compiler, there is none: install the package g++, or leave it out")


def set_precision(precision):
    """What is not a matter of autocast: whether matrix products of float32 may be TF32."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"


def add_sampling_flags(parser):
    """The flags of every script that samples; `sampling_settings` turns them into arguments of samplers.generate."""
    add = parser.add_argument_group("sampling").add_argument
    samplers = "gradient descent, plain or Nesterov's; or the ODE in gamma, for comparison"
    add("--sampler", choices=[*DESCENTS, *SOLVERS], default="gd", help=samplers)
    add("--num-sampling-steps", type=number(int, least=2), default=250, metavar="N", help="points; one step less")
    add("--stepsize", type=POSITIVE, default=0.0017, metavar="X", help="of gd and ngd, eta")
    add("--mu", type=NON_NEGATIVE, default=0.3, metavar="X", help="momentum of ngd")
    adaptive = f"gd and ngd stop a sample whose field has a root mean square below R, {STOP_BELOW} if none is named"
    add("--stop-below", type=POSITIVE, nargs="?", const=STOP_BELOW, metavar="R", help=adaptive + "; not given = off")
    add("--cfg-scale", type=NON_NEGATIVE, default=4.0, metavar="X", help="classifier-free guidance; 1 = off")


def check_sampling_flags(args):
    """Raise UserError for sampling flags that contradict each other."""
    if args.stop_below is not None and args.sampler in SOLVERS:
        raise UserError(f"--stop-below {args.stop_below}: {args.sampler} has a fixed number of steps; use gd or ngd")


def sampling_settings(args):
    return {
        "method": args.sampler,
        "num_steps": args.num_sampling_steps,
        "step_size": args.stepsize,
        "momentum": args.mu,
        "stop_below": args.stop_below,
        "guidance": args.cfg_scale,
        "precision": args.precision,
    }


def rank():
    return int(os.environ.get("RANK", 0))


def local_rank():
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def one_line(text, encoding="utf-8"):
    """Text as one line that a terminal or log of an encoding takes.

    Names of files may hold line ends, escape sequences and bytes that are no text: these are spelled out.
    """
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    return line.encode(encoding, "backslashreplace").decode(encoding)


def say(message, log=None):
    """Print a line once, from rank 0, without tearing a progress bar; `log` is a file that gets it too."""
    message = one_line(message)
    if rank() == 0:
        tqdm.write(one_line(message, sys.stdout.encoding or "utf-8"))
        if log is not None:
            with open(log, "a", encoding="utf-8") as file:
                file.write(message + "\n")


def fail(message, status=2, patience=PATIENCE):
    """End this process with one line on stderr; status 2 = wrong input, 1 = went wrong while running.

    torchrun kills all ranks as soon as one exits, so the others give rank 0 time to speak first;
    they speak themselves only if rank 0 is still fine by then (an error on one node only).
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun may end this rank before it speaks
    if rank() != 0:
        time.sleep(patience)
    text = one_line(" ".join(str(message).split()), sys.stderr.encoding or "utf-8")
    tqdm.write(f"{os.path.basename(sys.argv[0])}: error: {text}", file=sys.stderr)  # not into a progress bar
    sys.exit(status)


def check_devices():
    """Raise UserError if torchrun started more processes than this machine has GPUs (a machine without one: any)."""
    if torch.cuda.is_available() and local_rank() >= torch.cuda.device_count():
        found = os.environ.get("LOCAL_WORLD_SIZE", local_rank() + 1)
        raise UserError(f"--nproc_per_node={found}: this machine has {torch.cuda.device_count()} GPUs; start as many")


def keep_freed_memory():
    """Let the C library (glibc) keep memory that is freed, instead of giving it back to the system.

    On the CPU a training step allocates and frees the same gigabytes each time; to get them anew, page by page, takes
    a tenth of it.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(-4, 0)  # M_MMAP_MAX: no block comes directly from the system
        library.mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing goes back to it


def start():
    """Join the process group if torchrun started us; returns the device of this rank."""
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        keep_freed_memory()
    if "RANK" in os.environ:
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = attempt_store()
        dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size(), timeout=SCAN_TIME)
    return device


def attempt_store():
    """The store through which the ranks find each other, under a name that only the ranks of this attempt have.

    When torchrun restarts its ranks, its store still holds the addresses of those that died (torch 2.13). So rank 0
    makes up a name, and the others go on once rank 0 has answered them by theirs.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # it is torchrun's and was there before this process
        try:
            place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            socket.create_connection(place, STORE_TIME).close()
        except OSError as error:
            fail(f"torchrun does not answer ({error}): it may have been killed; start it again", status=1, patience=0)
    store, _, _ = next(dist.rendezvous("env://", timeout=SCAN_TIME))
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


def parallel(model):
    """The model that averages its gradients over the ranks; the model itself in a single process."""
    if not is_started():
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 has a new name for it that 2.9 does not know
        return DistributedDataParallel(model, broadcast_buffers=False)


def is_started():
    return dist.is_available() and dist.is_initialized()


def stop():
    """Leave the process group, once all ranks are done."""
    if is_started():
        dist.barrier()
        # DDP sits in reference cycles and holds the group. Unless its threads end here, they now and then meet an
        # interpreter that is going away, and gloo aborts the process ("terminate called without an active exception").
        gc.collect()
        dist.destroy_process_group()


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


def share(count):
    """The numbers below count that this rank takes care of."""
    return list(range(rank(), count, world_size()))


def collect(numbers, items):
    """Put what the ranks made for their numbers in order, on rank 0: items (len(numbers), ...) -> (count, ...).

    The other ranks get None.
    """
    parts = [None] * world_size() if rank() == 0 else None
    if is_started():
        dist.gather_object((numbers, items.cpu()), parts)
    else:
        parts = [(numbers, items.cpu())]
    if rank() != 0:
        return None
    ordered = items.new_empty(sum(len(numbers) for numbers, _ in parts), *items.shape[1:], device="cpu")
    for numbers, part in parts:
        ordered[numbers] = part
    return ordered


def average(tensor):
    """The mean of a tensor over all ranks, on every rank."""
    if is_started():
        dist.all_reduce(tensor)
        tensor /= world_size()
    return tensor


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


def uniform(seed, purpose, stream, numbers):
    """A number in [0, 1) for each sample of a stream, (len(numbers),) float32 on the CPU."""
    return torch.stack([torch.rand((), generator=generator(seed, purpose, stream, number)) for number in numbers])


def normal(seed, purpose, stream, numbers, shape, device="cpu"):
    """Standard normal noise for each sample of a stream, (len(numbers), *shape) float32."""
    noise = torch.empty(len(numbers), *shape, device=device)
    for row, number in zip(noise, numbers, strict=True):
        row.normal_(generator=generator(seed, purpose, stream, number, device=device))
    return noise
