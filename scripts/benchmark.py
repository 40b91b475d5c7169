"""Measure how close each part of training and sampling is to its own limit, as ratios with spread.

    python scripts/benchmark.py                      all ratios, up to 10 minutes on 2 cores;
                                                     writes results/studies/speed/benchmark.*
    python scripts/benchmark.py --only step growth   some parts (see PARTS), printed only
    python scripts/benchmark.py --only sizes \
        --precision bf16 --compile                   no ratios: clips/s and MFU of some models
    python scripts/benchmark.py --model EqM-XL/2 --batch-size 8 --precision bf16 --compile \
        --only step

Absolute times on a shared machine are unreliable. So the two sides of a ratio run in turns in one
process, and each pair of calls gives one ratio. The matrix-product floor of a training step is the
time of its FLOPs at this machine's speed for matrix products of the same shapes.
"""

import argparse
import datetime
import gc
import itertools
import json
import os
import platform
import re
import shlex
import sys
import time
import warnings
from engine import ROOT
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

import optim
import transport
from models import NAMES, Condition, EqM_models, model_config
from runtime import distributed
from runtime.cli import (
    COUNT,
    ArgumentParser,
    check_speed_flags,
    number,
    one_line_errors,
    wrong_input,
)
from runtime.metrics import device_stats
from samplers import guided, sample
from scoring.manifest import code_commit

ON_GPU = torch.cuda.is_available()
NUM_CLASSES = 101
NEARLY_NO_CHANGE = argparse.Namespace(optimizer="adamw", lr=1e-9, weight_decay=0.0)
FRAMES = 4, 8, 16  # of the part sizes
VARIABLES = "GPUS", "PRECISION"  # of the environment, which shell scripts read that a study starts
WARM_UP = 2  # untimed calls at the start
synchronize = torch.cuda.synchronize if ON_GPU else lambda: None
# Tokens per step of the part "sizes": 80 GB at about 60 KB of activations per token, block and
# 1,000 channels. They are halved until they fit. A CPU only shows that the part works.
SIZES = {"EqM-S/4": 65_536, "EqM-B/2": 65_536, "EqM-XL/2": 16_384} if ON_GPU else {"EqM-Ti/4": 512}
warnings.filterwarnings("ignore", message="a token holds")


def parse_args():
    parser = ArgumentParser(
        description="Measure how close each part of training and sampling is to its limit."
    )
    add = parser.add_argument
    add(
        "--only",
        nargs="+",
        choices=PARTS,
        metavar="PART",
        help=f"some of {', '.join(PARTS)}; default: all but sizes",
    )
    add(
        "--model",
        choices=NAMES,
        default="EqM-S/4",
        metavar="NAME",
        help="EqM-{Ti,S,B,L,XL}/{2,4,8}",
    )
    add("--num-frames", type=COUNT, default=16, help="frames per clip")
    add("--batch-size", type=COUNT, default=4, help="clips per step")
    add(
        "--precision",
        choices=["fp32", "tf32", "bf16", "fp16"],
        default="fp32",
        help="precision of the network",
    )
    add("--compile", action="store_true", help="compile the transformer blocks with torch.compile")
    add("--pairs", type=number(int, least=3), default=12, help="pairs of calls per row")
    return parser.parse_args()


def changed(args, **flags):
    return argparse.Namespace(**vars(args) | flags)


# Ratios and tables --------------------------------------------------------------------------------


def seconds_of(function):
    synchronize()
    began = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - began


def measure_ratios(a, b, pairs):
    """Ratios (pairs,) of a's seconds to b's, and the median seconds of each.

    a and b take turns in going first.
    """
    for _ in range(WARM_UP):
        a()
        b()
    seconds_a = np.empty(pairs)
    seconds_b = np.empty(pairs)
    for pair in range(pairs):
        if pair % 2:
            seconds_b[pair] = seconds_of(b)
        seconds_a[pair] = seconds_of(a)
        if not pair % 2:
            seconds_b[pair] = seconds_of(b)
    return seconds_a / seconds_b, np.median(seconds_a), np.median(seconds_b)


class Report:
    """Collects rows, and prints each row when it is added."""

    def __init__(self):
        self.rows = []

    def add(self, name, values, goal=None, note=""):
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
        row = {
            "ratio": name,
            "median": middle,
            "quartiles": [low, high],
            "goal": goal,
            "note": note,
        }
        self.rows.append(row)
        line = f"{name}: {middle:.3f} ({low:.3f} to {high:.3f})"
        if goal:
            line += f", goal {goal}"
        print(f"{line}; {note}", flush=True)

    def compare(self, name, a, b, pairs, goal=None, note="{:.3f} and {:.3f} s"):
        """Add a row for the time of a / the time of b. The note shows both medians."""
        ratios, seconds_a, seconds_b = measure_ratios(a, b, pairs)
        self.add(name=name, values=ratios, goal=goal, note=note.format(seconds_a, seconds_b))

    def markdown(self):
        lines = ["| ratio | median | quartiles | goal | details |", "|---|---|---|---|---|"]
        for row in self.rows:
            low, high = row["quartiles"]
            value = f"{row['median']:.3g} | {low:.3g} - {high:.3g}"
            lines.append(f"| {row['ratio']} | {value} | {row['goal'] or ''} | {row['note']} |")
        return "\n".join(lines)


# A training step, without loading data ------------------------------------------------------------


class Step:
    """A training step as in train.py (forward, backward, clipping, optimizer, EMA) on fixed random
    clips and noise.
    """

    def __init__(self, args, forcing=0.0, **settings):
        self.precision = args.precision
        self.forcing = forcing
        self.device = torch.device("cuda" if ON_GPU else "cpu")
        torch.manual_seed(0)
        usual = {"num_classes": NUM_CLASSES, "num_frames": args.num_frames, "use_rope": True}
        self.model = EqM_models[args.model](**usual | settings).to(self.device)
        with torch.no_grad():
            # some layers start at zero, which may be faster
            for parameter in self.model.parameters():
                parameter.normal_(std=0.02)
        self.ema = deepcopy(self.model).requires_grad_(False)
        if args.compile:
            self.model.compile_blocks()
        self.optimizers = optim.make_optimizers(self.model, NEARLY_NO_CHANGE)
        self.config = self.model.config
        side = self.config.input_size
        shape = (args.batch_size, self.config.in_channels, args.num_frames, side, side)
        self.x = torch.randn(shape, device=self.device)
        self.noise = torch.randn(shape, device=self.device)
        self.y = torch.randint(NUM_CLASSES, shape[:1], device=self.device)
        self.indices = range(args.batch_size)
        self.flops = args.batch_size * self.config.training_flops(args.num_frames)

    def backward(self):
        """Run forward and backward, with new noise levels each time."""
        self.indices = range(self.indices.stop, self.indices.stop + len(self.x))
        gamma = transport.draw_gammas(
            0,
            0,
            self.indices,
            self.x.shape[2],
            self.config.temporal_patch_size,
            share=self.forcing,
        )
        gamma = gamma.to(self.device)
        with distributed.autocast(self.device, self.precision):
            losses, *_ = self.config.learns.losses(
                self.model, self.x, self.noise, gamma, self.y, None
            )
            loss = losses.mean()
        loss.backward()

    def update(self):
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        optim.update_ema(self.ema, self.model, 0.9999)

    def __call__(self):
        self.backward()
        self.update()
        self.model.zero_grad()

    def products(self):
        """(FLOPs, function that runs them) of one block's matrix products, as in F.linear.

        Both forward and backward.
        """
        D = self.config.hidden_size
        N = len(self.x) * self.config.num_tokens(self.x.shape[2])
        dtype = distributed.MIXED.get(self.precision, torch.float32)
        random = partial(torch.randn, device=self.device, dtype=dtype)
        layers = []
        flops = 0
        for inner, outer in ((D, 3 * D), (D, D), (D, 4 * D), (4 * D, D)):
            x = random(N, inner)
            weight = random(outer, inner)
            gradient = random(N, outer)
            layers.append((x, weight, gradient))
            flops += 3 * 2 * N * inner * outer

        def run():
            for x, weight, gradient in layers:
                torch.mm(x, weight.T)
                torch.mm(gradient, weight)
                torch.mm(gradient.T, x)

        return flops, run


def measure_step(args, report):
    """Measure a step and its parts against the matrix-product floor, and bf16 against fp32."""
    ours = Step(args)
    updated = Step(args)

    def backward():
        ours.backward()
        ours.model.zero_grad()

    product_flops, products = ours.products()
    scale = ours.flops / product_flops
    values, seconds, product_seconds = measure_ratios(ours, products, args.pairs)
    floor = scale * product_seconds
    rate = product_flops / product_seconds / 1e9
    note = f"{seconds:.3f} s; floor {floor:.3f} s at {rate:.0f} GFLOP/s"
    report.add(
        name=f"{args.precision} step / matrix-product floor",
        values=values / scale,
        goal="<= 1.15",
        note=note,
    )
    values, seconds, _ = measure_ratios(backward, products, args.pairs)
    name = f"{args.precision} forward and backward / matrix-product floor"
    report.add(name, values / scale, note=f"{seconds:.3f} s")
    updated.backward()
    report.compare(
        name="EMA + optimizer + clipping / step",
        a=updated.update,
        b=ours,
        pairs=args.pairs,
        goal="<= 0.08",
        note="{:.3f} s",
    )
    if args.precision == "fp32":
        report.compare(
            name="bf16 step / fp32 step",
            a=Step(changed(args, precision="bf16")),
            b=ours,
            pairs=args.pairs,
            goal="<= 0.65",
        )


def measure_positions(args, report):
    rotary = Step(args)
    report.compare(
        name="step with rotary positions / with fixed positions",
        a=rotary,
        b=Step(args, use_rope=False),
        pairs=2 * args.pairs,
        goal="<= 1.01",
    )
    report.compare(
        name="rotary step with table and speed / without",
        a=Step(args, position_table="space", rope_speed=0.5),
        b=rotary,
        pairs=2 * args.pairs,
        goal="<= 1.03",
    )


def measure_forcing(args, report):
    report.compare(
        name="step with --forcing 0.5 / without",
        a=Step(args, forcing=0.5),
        b=Step(args),
        pairs=2 * args.pairs,
        goal="<= 1.03",
    )


def measure_energy(args, report):
    args = changed(args, compile=False)  # torch.compile can't differentiate EqM-E twice
    report.compare(
        name="step with --ebm dot / without",
        a=Step(args, ebm="dot"),
        b=Step(args),
        pairs=2 * args.pairs,
    )


def measure_sampling(args, report):
    """Measure guided sampling against the same number of network evaluations, with and without
    class in one batch.
    """
    step = Step(args)
    evaluations = 4
    model = step.model.requires_grad_(False)
    x = step.x
    y = step.y
    time_scale = torch.full((len(x),), 0.04, device=step.device)
    both_x = torch.cat([x, x])
    both_y = torch.cat([y, y])
    both_scales = torch.cat([time_scale, time_scale])
    field = guided(model, Condition.of(y, model.config), time_scale, guidance=4.0)

    def forward():
        for _ in range(evaluations):
            model(both_x, both_y, both_scales)

    sampling = partial(sample, field, x, "ngd", evaluations + 1)
    with torch.no_grad(), distributed.autocast(step.device, args.precision):
        report.compare(
            name="guided sampling / its evaluations alone",
            a=sampling,
            b=forward,
            pairs=args.pairs,
            goal="<= 1.05",
            note=f"{{:.2f}} and {{:.2f}} s for {evaluations} evaluations",
        )


# Memory and time over the number of frames, and of some models ------------------------------------


def measure_memory(args, report):
    """Measure peak memory over the number of frames, each in its own process."""
    for flag, recompute, goals in (
        ("", None, {8: "<= 2.0", 16: "<= 4.0"}),
        (", --grad-checkpoint", "full", {8: "<= 1.5", 16: "<= 2.5"}),
    ):
        first = in_new_process(peak_memory, changed(args, num_frames=4), recompute)
        for num_frames, goal in goals.items():
            size = changed(args, num_frames=num_frames)
            peak = in_new_process(peak_memory, size, recompute)
            report.add(
                name=f"peak memory at {num_frames} frames / at 4{flag}",
                values=peak / first,
                goal=goal,
                note=f"{peak:.0f} and {first:.0f} MB, with model, optimizer and EMA",
            )


def in_new_process(function, *args):
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def peak_memory(args, recompute):
    """Peak memory in MB of model, optimizer, EMA and two steps: of the GPU, or of this process
    without a GPU.
    """

    def resident(field):  # Linux only
        status = Path("/proc/self/status").read_text()
        return int(re.search(rf"{field}:\s+(\d+)", status)[1]) / 1e3

    distributed.keep_freed_memory()  # as every run on the CPU does
    before = resident("VmRSS")
    step = Step(args)
    step.model.grad_checkpoint = recompute
    step()
    step()
    if ON_GPU:
        return torch.cuda.max_memory_allocated() / 1e6
    return resident("VmHWM") - before


def measure_growth(args, report):
    """Measure the time of a step over the number of frames, and the exponent of its growth."""
    frames = 4, 8, 16, 32, 64
    steps = [Step(changed(args, num_frames=num_frames)) for num_frames in frames]
    for step in WARM_UP * steps:
        step()
    rounds = max(3, args.pairs // 3)
    seconds = np.array([[seconds_of(step) for step in steps] for _ in range(rounds)])
    medians = [f"{value:.2f}" for value in np.median(seconds, axis=0)]
    for count, goal in ((3, "<= 1.3"), (5, None)):
        x = np.log(frames[:count])
        y = np.log(seconds[:, :count])
        slopes, _ = np.polyfit(x, y.T, deg=1)
        report.add(
            name=f"growth exponent of the step time up to {frames[count - 1]} frames",
            values=slopes,
            goal=goal,
            note=f"{', '.join(medians[:count])} s",
        )


def measure_sizes(args, report):
    """Print clips per second, TFLOP/s and MFU (share of the device's peak) for some models and
    numbers of frames.
    """
    titles = "clips a step | s a step | clips/s | TFLOP/s | MFU | peak memory, GB"
    print(f"| model | frames | {titles} |\n|{'---|' * 8}")
    for model, num_frames in itertools.product(SIZES, FRAMES):
        tokens = model_config(model).num_tokens(num_frames)
        clips = max(1, SIZES[model] // tokens)
        cells = "does not fit | - | - | - | - | -"
        while clips:
            try:
                size = changed(args, model=model, num_frames=num_frames, batch_size=clips)
                cells = time_step(size)
                clips = 0
            except torch.OutOfMemoryError:
                clips //= 2
            gc.collect()  # not in the handler, where the error still holds what did not fit
            torch.cuda.empty_cache()
        print(f"| {model} | {num_frames} | {cells} |", flush=True)


def time_step(args):
    """The cells "clips | seconds | clips/s | TFLOP/s | MFU | peak memory" of a training step.

    "-" if unknown.
    """
    torch.compiler.reset()  # torch limits how many models it compiles a function for
    step = Step(args)
    for _ in range(WARM_UP):
        step()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    seconds = np.median([seconds_of(step) for _ in range(args.pairs)])
    rate = args.batch_size / seconds
    tflops = step.flops / seconds / 1e12
    stats = device_stats(step.device, args.precision, tflops)
    mfu = f"{stats['mfu']:.1%}" if "mfu" in stats else "-"
    memory = f"{stats['gpu_memory_gb']:.1f}" if "gpu_memory_gb" in stats else "-"
    return f"{args.batch_size} | {seconds:.3g} | {rate:.4g} | {tflops:.3g} | {mfu} | {memory}"


PARTS = {
    "step": measure_step,
    "positions": measure_positions,
    "forcing": measure_forcing,
    "energy": measure_energy,
    "memory": measure_memory,
    "growth": measure_growth,
    "sampling": measure_sampling,
    "sizes": measure_sizes,
}


@one_line_errors()
def main():
    args = parse_args()
    with wrong_input():
        check_speed_flags(args)
    distributed.set_precision(args.precision)
    distributed.keep_freed_memory()  # as every run on the CPU does
    precision = args.precision
    if args.compile:
        precision += ", compiled"
    title = (
        f"{machine()}, torch {torch.__version__}, {precision}: {args.model}, {args.batch_size} "
        f"clips of {args.num_frames} x 32 x 32 latents"
    )
    print(title, flush=True)
    report = Report()
    began = time.monotonic()
    results = ROOT / "results/studies/speed"
    for name in args.only or [name for name in PARTS if name != "sizes"]:
        PARTS[name](args, report)
    print(f"{time.monotonic() - began:.0f} s")
    if not args.only:
        (results / "benchmark.md").write_text(f"{title}\n\n{report.markdown()}\n")
        text = json.dumps({"made": made(), "title": title, "rows": report.rows}, indent=1)
        (results / "benchmark.json").write_text(text + "\n")


def machine():
    """The name of the GPU, or the name of the processor and the number of threads in use."""
    if ON_GPU:
        return torch.cuda.get_device_name()
    about = Path("/proc/cpuinfo")
    text = about.read_text() if about.exists() else ""
    match = re.search(r"model name\s*: (.*)", text)
    name = match[1] if match else platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def made():
    """How to repeat this process's work: {"code": commit, "command", "date" in UTC, "machine"}."""
    script = Path(sys.argv[0]).resolve()
    if script.is_relative_to(ROOT):
        script = script.relative_to(ROOT)
    variables = [f"{name}={os.environ[name]}" for name in VARIABLES if os.environ.get(name)]
    command = [*variables, "python", str(script), *sys.argv[1:]]
    return {
        "code": code_commit() or "",
        "command": shlex.join(command),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
    }


if __name__ == "__main__":
    main()
