"""Count the memory of training on GPUs, without one. Writes results/memory.json and results/memory.md.

    python scripts/memory.py        about a minute

Steps run on tensors without values (torch's fake tensors), and a counter follows which of them are alive. Two depths
and two batches give the bytes per block and per clip. What fits on a GPU is then calculated.
"""

import itertools
import json
import math
import weakref
from engine import ROOT
from unittest.mock import MagicMock, patch

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import models
from models import GRAD_CHECKPOINTS, EqM_models
from runtime import distributed
from runtime.cli import ArgumentParser, one_line_errors

MODELS, FRAMES, FLAGS = ("S/2", "B/2", "L/2", "XL/2"), (4, 8, 16, 32), (None, *reversed(GRAD_CHECKPOINTS))
GPUS, USABLE = (24, 40, 80, 141), 0.9  # GB; the rest is for CUDA, NCCL and gaps between tensors
RANKS = 8  # of --shard
COUNTED = 16  # frames; the bytes of a clip grow with its tokens
STATES = 20  # bytes per weight: weight, gradient, two of AdamW, EMA
GATHERED = 16  # bytes per weight of a block, with --shard: two blocks of bf16 weights, bf16 and fp32 gradients
SETTINGS = {"num_classes": 101, "use_rope": True}
FLOPS = {  # of what torch does not count, from shapes
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *qkv, **_: sdpa_flop_count(*qkv[:3]),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda gradient, *qkv, **_: (
        sdpa_backward_flop_count(gradient, *qkv[:3])
    ),
}


def parse_args():
    parser = ArgumentParser(description="Count what training keeps in memory, and say how many clips fit on a GPU.")
    return parser.parse_args()


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors that something holds, besides the given ones: `now`, and at the `peak`."""

    def __init__(self, given):
        super().__init__()
        self.sizes, self.now, self.peak = dict.fromkeys(part.untyped_storage()._cdata for part in given), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for storage in [part.untyped_storage() for part in tree_leaves(made) if torch.is_tensor(part)]:
            if (key := storage._cdata) not in self.sizes:
                self.sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, key)
        self.peak = max(self.peak, self.now)
        return made

    def forget(self, key):
        self.now -= self.sizes.pop(key)


def count_step(name, flag, clips, depth):
    """(bytes kept for the backward pass, bytes at the peak, FLOPs) of a bf16 step, without weights and gradients.

    As on a GPU, one kernel computes attention, and autocast has addcmul compute in float32.
    """
    addcmul = torch.addcmul
    in_float = patch.object(torch, "addcmul", lambda *parts: addcmul(*(part.float() for part in parts)))
    with FakeTensorMode(), in_float, patch.object(models, "attend", F.scaled_dot_product_attention):
        model = EqM_models[f"EqM-{name}"](depth=depth, **SETTINGS)
        model.grad_checkpoint = flag
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight)  # in the buckets of DDP all the time
        x, y = torch.empty(clips, 4, COUNTED, 32, 32), torch.zeros(clips, dtype=torch.long)
        given = x, y, *model.parameters(), *(weight.grad for weight in model.parameters())
        counter = FlopCounterMode(display=False, custom_mapping=FLOPS)
        counter.mod_tracker = MagicMock(parents={"Global"})  # that tracker would hold tensors
        with Alive(given) as alive, counter:
            with distributed.autocast(x.device, "bf16"):
                f = model(x, y)
            kept = alive.now
            f.float().square().mean().backward()
    return kept, alive.peak, counter.get_total_flops()


def measure(name, flag):
    """The numbers of weights, and for a clip: MB kept for the backward pass, MB at the peak, GFLOPs of a step."""
    with torch.device("meta"):
        model = EqM_models[f"EqM-{name}"](**SETTINGS)
    weights, block = (sum(map(torch.numel, part.parameters())) for part in (model, model.blocks[0]))
    steps = {at: np.array(count_step(name, flag, *at)) for at in itertools.product((1, 2), (1, 2))}  # clips, depth
    one, two = (steps[clips, 1] + (len(model.blocks) - 1) * (steps[clips, 2] - steps[clips, 1]) for clips in (1, 2))
    kept, peak, flops = (two - one).tolist()
    fixed = one.tolist()[1] - peak  # such as rounded weights
    return {
        "model": name, "flag": flag or "off", "weights": weights, "block": block, "kept_mb": kept / 1e6,
        "peak_mb": peak / 1e6, "fixed_mb": fixed / 1e6, "gflops": flops / 1e9,
    }  # fmt: skip


def fitting_clips(row, frames, gb, ranks):
    """How many clips of so many frames a GPU of so many GB can train on at once."""
    once = GATHERED * row["block"] if ranks > 1 else 1e6 * row["fixed_mb"]  # --shard gathers rounded weights
    free = USABLE * 1e9 * gb - STATES * row["weights"] / ranks - once
    return max(0, math.floor(free / (1e6 * row["peak_mb"] * frames / COUNTED)))


def tables(rows):
    """The tables of results/memory.md, as lines, from the rows of results/memory.json."""
    lines = ["| model | off (MB) | selective (MB) | full (MB) | FLOPs, selective / off | FLOPs, full / off |"]
    lines += ["|---|---|---|---|---|---|"]
    by_model = {name: [row for row in rows if row["model"] == name] for name in MODELS}
    for name, own in by_model.items():
        kept, ratios = (f"{row['kept_mb']:.0f}" for row in own), (row["gflops"] / own[0]["gflops"] for row in own[1:])
        lines.append(f"| {' | '.join([name, *kept, *(f'{ratio:.3f}' for ratio in ratios)])} |")
    lines += ["", f"| model, frames | {' | '.join(f'{gb} GB' for gb in GPUS)} |", f"|---|{'---|' * len(GPUS)}"]
    for ranks, (name, own), frames in itertools.product((1, RANKS), by_model.items(), FRAMES):
        cells = ("/".join(str(fitting_clips(row, frames, gb, ranks)) for row in own) for gb in GPUS)
        lines.append(f"| {name}, {frames}{', `--shard`' if ranks > 1 else ''} | {' | '.join(cells)} |")
    return lines


@one_line_errors()
def main():
    parse_args()
    rows = [measure(*both) for both in itertools.product(MODELS, FLAGS)]
    (ROOT / "results/memory.json").write_text(json.dumps(rows, indent=1) + "\n")
    title = f"# Memory of training, counted with torch {torch.__version__}"
    (ROOT / "results/memory.md").write_text("\n".join([title, "", *tables(rows), ""]))


if __name__ == "__main__":
    main()
