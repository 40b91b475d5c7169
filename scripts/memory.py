"""Count the memory of training on GPUs, without one.

Writes memory.json and memory.md in results/studies/speed.

    python scripts/memory.py        about a minute

Steps run on tensors without values (torch's fake tensors), and a counter follows which of them are
alive. Two depths give the bytes per block, two batches those per clip. The peak grows a little
slower in small batches than in large ones, so between these two the script counts slightly too
much. What fits on a GPU is then calculated, and what a copy of a checkpoint takes on the host:
there, torch rounds the memory of each tensor up to a power of two.
"""

import itertools
import json
import math
import weakref
from engine import ROOT
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import models
from benchmark import made
from models import GRAD_CHECKPOINTS, EqM_models
from runtime import distributed
from runtime.cli import ArgumentParser, one_line_errors
from runtime.memory import pinned_bytes

PLACE = ROOT / "results/studies/speed"  # of the tables
MODELS = ("S/4", "S/2", "B/2", "L/2", "XL/2")
CAUSAL = ("S/4", "S/2", "XL/2")  # models that are counted with --causal, too
FLAGS = (None, *reversed(GRAD_CHECKPOINTS))
# GB; the rest is for CUDA, NCCL and gaps between tensors
GPUS = (24, 40, 80, 141)
USABLE = 0.9
RANKS = 8  # of --shard
# the bytes of a clip grow with its frames
COUNTED = 16
FRAMES = (4, 8, 16, 32)
BATCHES = 1, 256  # that are counted
STATES = 20  # bytes per weight: weight, gradient, two of AdamW, EMA
# bytes per weight of a block, with --shard: two blocks' bf16 weights, bf16 and fp32 gradients
GATHERED = 16
# tensors of a weight in a checkpoint: weight, EMA, two of AdamW; each has 4 bytes per value
SAVED = 4
SETTINGS = {"num_classes": 101, "use_rope": True}
CAUSAL_SETTINGS = SETTINGS | {"causal": True, "context": COUNTED}


def parse_args():
    return ArgumentParser(
        description="Count what training keeps in memory, and say what fits on a GPU."
    ).parse_args()


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors that something holds, but the given ones: `now` and at `peak`."""

    def __init__(self, given):
        super().__init__()
        self.sizes = dict.fromkeys(part.untyped_storage()._cdata for part in given)
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if not torch.is_tensor(result):
                continue
            storage = result.untyped_storage()
            key = storage._cdata
            if key not in self.sizes:
                self.sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, key)
        self.peak = max(self.peak, self.now)
        return results

    def forget(self, key):
        self.now -= self.sizes.pop(key)


def count_step(name, flag, clips, depth, settings):
    """(bytes kept for backward, bytes at the peak) of a bf16 step, without weights and gradients.

    settings: SETTINGS or CAUSAL_SETTINGS. A causal model also passes the clean clip.
    As on a GPU, one kernel computes attention, and autocast has addcmul compute in float32.
    """
    addcmul = torch.addcmul

    def addcmul_in_float(x, a, b):
        return addcmul(x.float(), a.float(), b.float())

    with (
        FakeTensorMode(),
        patch.object(torch, "addcmul", addcmul_in_float),
        patch.object(models, "attend", F.scaled_dot_product_attention),
    ):
        model = EqM_models[f"EqM-{name}"](depth=depth, **settings)
        model.grad_checkpoint = flag
        x = torch.empty(clips, 4, COUNTED, 32, 32)
        y = torch.zeros(clips, dtype=torch.long)
        given = [x, y]
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight)  # in the buckets of DDP all the time
            given += [weight, weight.grad]
        with Alive(given) as alive:
            with distributed.autocast(x.device, "bf16"):
                f = model(x, y, clean=x if model.config.causal else None)
            kept = alive.now
            # this and the next: means, deviations
            batches = torch.empty(2, 2, *x.shape, dtype=torch.half)
            f.float().square().mean().backward()
    del batches
    return kept, alive.peak


def measure(name, flag, causal=False):
    """The numbers of weights, MB that a step keeps and has at its peak, per clip and once, and
    GFLOPs per clip.
    """
    settings = CAUSAL_SETTINGS if causal else SETTINGS
    with torch.device("meta"):
        model = EqM_models[f"EqM-{name}"](**settings)
    weights = list(model.parameters())
    pinned = SAVED * sum(pinned_bytes(weight.nbytes) for weight in weights)
    others = len(model.blocks) - 1
    sizes = []
    for clips in BATCHES:
        step = partial(count_step, name=name, flag=flag, clips=clips, settings=settings)
        shallow = np.array(step(depth=1))
        deep = np.array(step(depth=2))
        sizes.append(shallow + others * (deep - shallow))
    few, many = sizes
    per_clip = (many - few) / (BATCHES[1] - BATCHES[0])
    once = few - BATCHES[0] * per_clip  # rounded weights
    kept, peak = per_clip.tolist()
    kept_once, peak_once = once.tolist()
    return {
        "model": f"{name}, causal" if causal else name,
        "flag": flag or "off",
        "weights": sum(map(torch.numel, weights)),
        "block": sum(map(torch.numel, model.blocks[0].parameters())),
        "kept_mb": kept / 1e6,
        "peak_mb": peak / 1e6,
        "kept_once_mb": kept_once / 1e6,
        "peak_once_mb": peak_once / 1e6,
        "gflops": model.config.training_flops(COUNTED, flag) / 1e9,
        "pinned_mb": pinned / 1e6,
    }


def read_rows():
    return json.loads((PLACE / "memory.json").read_text())["rows"]


def fitting_clips(row, frames, gb, ranks):
    """How many clips of so many frames a GPU of so many GB can train on at once."""
    once = 1e6 * row["peak_once_mb"]
    if ranks > 1:  # --shard gathers rounded weights
        once = GATHERED * row["block"]
    free = USABLE * 1e9 * gb - STATES * row["weights"] / ranks - once
    clip = 1e6 * row["peak_mb"] * frames / COUNTED
    return max(0, math.floor(free / clip))


def tables(rows):
    """The tables of memory.md, as lines, from the rows of memory.json."""
    lines = [
        "| model | `--grad-checkpoint` | MB per clip | MB once | FLOPs / off |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        off = next(other for other in rows if other["model"] == row["model"])
        kept = row["kept_mb"]
        once = row["kept_once_mb"]
        flops = row["gflops"] / off["gflops"]
        name = f"{row['model']} | {row['flag']}"
        lines.append(f"| {name} | {kept:.0f} | {once:.0f} | {flops:.3f} |")
    titles = "".join(f" {gb} GB |" for gb in GPUS)
    for frames in FRAMES:
        lines += [
            "",
            f"## Clips of {frames} frames that fit on a GPU",
            "",
            f"| model | `--grad-checkpoint` |{titles}",
            f"|---|---|{'---|' * len(GPUS)}",
        ]
        for ranks, row in itertools.product((1, RANKS), rows):
            name = row["model"]
            if ranks > 1:
                name += ", `--shard`"
            line = f"| {name} | {row['flag']} |"
            for gb in GPUS:
                clips = fitting_clips(row=row, frames=frames, gb=gb, ranks=ranks)
                line += f" {clips} |"
            lines.append(line)
    lines += [
        "",
        "## Copy of a checkpoint in the host memory of rank 0",
        "",
        "| model | checkpoint (GB) | pinned memory (GB) |",
        "|---|---|---|",
    ]
    for row in rows[: len(MODELS) * len(FLAGS) : len(FLAGS)]:  # no flag changes it
        checkpoint = 4 * SAVED * row["weights"] / 1e9
        pinned = row["pinned_mb"] / 1e3
        lines.append(f"| {row['model']} | {checkpoint:.2f} | {pinned:.2f} |")
    return lines


@one_line_errors()
def main():
    parse_args()
    rows = list(itertools.starmap(measure, itertools.product(MODELS, FLAGS)))
    rows += itertools.starmap(measure, itertools.product(CAUSAL, FLAGS, [True]))
    content = {"made": made(), "rows": rows}
    (PLACE / "memory.json").write_text(json.dumps(content, indent=1) + "\n")
    title = f"# Memory of training, counted with torch {torch.__version__}"
    (PLACE / "memory.md").write_text("\n".join([title, "", *tables(rows), ""]))


if __name__ == "__main__":
    main()
