"""How close is each part to its own limit? Ratios, measured side by side in one process, with their spread.

    python scripts/benchmark.py                      all ratios, 10 minutes on 2 cores; writes results/benchmark.*
    python scripts/benchmark.py --only step growth   some parts (see PARTS), printed only
    python scripts/benchmark.py --only sizes --precision bf16 --compile   no ratios: clips/s and MFU of some models
    python scripts/benchmark.py --model EqM-XL/2 --batch-size 8 --precision bf16 --compile --only step

Absolute times on a shared machine are unreliable, so the two sides of a ratio alternate and each pair of calls gives
one ratio; a row has their median and quartiles. The floor of a training step is the time that its FLOPs (torch's
counter) take at the rate that this machine reaches in matrix products of the model's own shapes.
"""

import argparse
import gc
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "EqM"))
import generation
import optim
import transport
from forcing import draw_gammas
from models import NAMES, EqM_models, math_attention, model_config
from rope import RotaryEmbedding3D, apply_rotary
from runtime import distributed
from runtime.cli import COUNT, ArgumentParser, UserError, check_speed_flags, fail, number
from runtime.distributed import keep_freed_memory, set_precision
from runtime.metrics import peak_tflops
from runtime.rng import normal
from runtime.signals import StopSignal
from vae import VAE
from video.clips import Batches, Clips
from video.files import read_frames, read_latents
from video.index import LATENTS_FILE, LATENTS_FORMAT, latents_path, scan_videos
from video.loader import batches_of, make_loader, on_device

NUM_CLASSES = 101
FRAMES = 4, 8, 16  # of the parts memory and sizes
# Tokens per step of the part sizes; on a GPU with about 60 KB of activations per token, block and 1,000 channels in
# mind, for 80 GB. Fewer where they do not fit. A CPU only shows that the part works.
GPU_SIZES = {"EqM-S/4": 65_536, "EqM-B/2": 65_536, "EqM-XL/2": 16_384}
CPU_SIZES = {"EqM-Ti/4": 512}
warnings.filterwarnings("ignore", message="a token holds")


def parse_args():
    parser = ArgumentParser(description="How close is each part of training and sampling to its own limit?")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, metavar="PART", help=f"some of {', '.join(PARTS)}; default: all but sizes"
    )
    parser.add_argument("--model", choices=NAMES, default="EqM-S/4", metavar="NAME", help="EqM-{Ti,S,B,L,XL}/{2,4,8}")
    parser.add_argument("--num-frames", type=COUNT, default=16, metavar="N", help="frames per clip")
    parser.add_argument("--batch-size", type=COUNT, default=4, metavar="N", help="clips per step")
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16", "fp16"], default="fp32", help="of the network")
    parser.add_argument("--compile", action="store_true", help="compile the transformer blocks with torch.compile")
    parser.add_argument("--pairs", type=number(int, least=3), default=12, metavar="N", help="pairs of calls per row")
    peak = "only print the peak memory of two training steps, in MB"
    parser.add_argument("--peak-memory", action="store_true", help=peak)
    parser.add_argument("--grad-checkpoint", action="store_true", help="recompute activations in --peak-memory")
    return parser.parse_args()


# ----------------------------------------------------------------------------------------------------------------------
# Ratios


def changed(args, **flags):
    return argparse.Namespace(**vars(args) | flags)


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(function):
    """Seconds that a call takes."""
    synchronize()
    began = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - began


def measure_ratios(a, b, pairs, warm_up=2):
    """Time a and b in pairs of calls; they alternate in who is first.

    Returns the ratio of a's seconds to b's for each pair, (pairs,), and the median seconds of a and of b.
    """
    for _ in range(warm_up):
        a(), b()
    seconds = []
    for pair in range(pairs):
        if pair % 2:
            seconds_b = seconds_of(b)
            seconds.append((seconds_of(a), seconds_b))
        else:
            seconds.append((seconds_of(a), seconds_of(b)))
    seconds_a, seconds_b = np.array(seconds).T
    return seconds_a / seconds_b, np.median(seconds_a), np.median(seconds_b)


class Report:
    """Collects the rows and prints each as it is added."""

    def __init__(self):
        self.rows = []

    def add(self, name, values, goal=None, note=""):
        low, middle, high = np.quantile(np.atleast_1d(values), [0.25, 0.5, 0.75]).tolist()
        row = {"ratio": name, "median": middle, "quartiles": [low, high], "goal": goal, "note": note}
        self.rows.append(row)
        print(f"{name}: {middle:.3f} ({low:.3f} to {high:.3f}){f', goal {goal}' if goal else ''}; {note}", flush=True)

    def markdown(self):
        lines = ["| ratio | measured | quartiles | goal | |", "|---|---|---|---|---|"]
        for row in self.rows:
            low, high = row["quartiles"]
            cells = [row["ratio"], f"{row['median']:.3g}", f"{low:.3g} - {high:.3g}", row["goal"] or "", row["note"]]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# A training step, without loading data


class Step:
    """A training step as in train.py (forward, backward, clipping, optimizer, EMA) on a fixed random batch."""

    def __init__(self, args, precision=None, optimizer="adamw", **settings):
        self.precision = precision or args.precision
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        settings = {"num_classes": NUM_CLASSES, "num_frames": args.num_frames, "use_rope": True} | settings
        self.model = EqM_models[args.model](**settings).to(self.device)
        with torch.no_grad():
            for parameter in self.model.parameters():  # some layers are zero at first, which may be faster
                parameter.normal_(std=0.02)
        self.ema = deepcopy(self.model).requires_grad_(False)
        if args.compile:
            self.model.compile_blocks()
        self.optimizers = make_optimizers(self.model, optimizer)
        side, channels = self.model.config.input_size, self.model.config.in_channels
        self.x = torch.randn(args.batch_size, channels, args.num_frames, side, side, device=self.device)
        self.y = torch.randint(NUM_CLASSES, (args.batch_size,), device=self.device)

    def backward(self):
        """Forward and backward."""
        with distributed.autocast(self.device, self.precision):
            loss = self.model(self.x, self.y).float().square().mean()
        loss.backward()

    def update(self):
        """Clipping, optimizer and EMA."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        optim.update_ema(self.ema, self.model, 0.9999)

    def zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def __call__(self):
        self.backward()
        self.update()
        self.zero_grad()

    def flops(self):
        """FLOPs of forward and backward: matrix products and attention."""
        eager = torch.compiler.set_stance("force_eager")  # the counter does not see into compiled blocks
        with eager, FlopCounterMode(display=False) as counter, math_attention():  # nor the CPU's flash attention
            self.backward()
        self.zero_grad()
        return counter.get_total_flops()

    def products(self):
        """(FLOPs, function to run) of one block's matrix products, forward and backward, as F.linear computes them."""
        config, D = self.model.config, self.model.config.hidden_size
        t, h, w = config.grid(self.x.shape[2])
        tokens = len(self.x) * t * h * w
        dtype = distributed.MIXED.get(self.precision, torch.float32)

        def random(*shape):
            return torch.randn(*shape, device=self.device, dtype=dtype)

        sizes = [(D, 3 * D), (D, D), (D, 4 * D), (4 * D, D)]
        layers = [(random(tokens, inner), random(outer, inner), random(tokens, outer)) for inner, outer in sizes]

        def run():
            for x, weight, gradient in layers:
                torch.mm(x, weight.T)
                torch.mm(gradient, weight)
                torch.mm(gradient.T, x)

        return sum(3 * 2 * tokens * fan_in * fan_out for fan_in, fan_out in sizes), run


class ForcedStep(Step):
    """A step with the objective of train.py, noise and levels drawn anew, and a share of forced clips."""

    def __init__(self, args, share):
        super().__init__(args)
        self.share, self.count = share, 0

    def backward(self):
        B, _, T, _, _ = self.x.shape
        indices, self.count = range(self.count, self.count + B), self.count + B
        noise = normal(0, "noise", 0, indices, self.x.shape[1:], self.device)
        patch = self.model.config.temporal_patch_size
        gamma = draw_gammas(0, 0, indices, T, patch, share=self.share).to(self.device)
        with distributed.autocast(self.device, self.precision):
            f = self.model(transport.interpolate(self.x, noise, gamma), self.y)
            loss = transport.loss(f, self.x, noise, gamma).mean()
        loss.backward()


def make_optimizers(model, name):
    """The optimizers of train.py, which change next to nothing."""
    return optim.make_optimizers(model, argparse.Namespace(optimizer=name, lr=1e-9, muon_lr=1e-9, weight_decay=0.0))


def measure_step(args, report):
    """The whole step and its parts against the floor of its matrix products; bf16 against fp32."""
    ours = Step(args)
    product_flops, products = ours.products()
    scale = ours.flops() / product_flops
    values, seconds, product_seconds = measure_ratios(ours, products, args.pairs)
    floor, rate = scale * product_seconds, product_flops / product_seconds / 1e9
    note = f"{seconds:.3f} s; floor {floor:.3f} s at {rate:.0f} GFLOP/s"
    report.add(f"{args.precision} step / floor of its matrix products", values / scale, "<= 1.15", note)
    inner = Step(args)
    values, seconds, _ = measure_ratios(lambda: (inner.backward(), inner.zero_grad()), products, args.pairs)
    report.add("its forward and backward / the same floor", values / scale, None, f"{seconds:.3f} s")

    updated = Step(args)
    updated.backward()
    values, seconds, _ = measure_ratios(updated.update, ours, args.pairs)
    report.add("EMA + optimizer + clipping / step", values, "<= 0.08", f"{seconds:.3f} s")
    if args.precision == "fp32":
        values, bf16, fp32 = measure_ratios(Step(args, "bf16"), ours, args.pairs)
        report.add("bf16 step / fp32 step", values, "<= 0.65", f"{bf16:.3f} and {fp32:.3f} s")


def measure_positions(args, report):
    """Rotary against fixed positions, the best ones against plain rotary ones, our rotation against the common one."""
    values, rotary, fixed = measure_ratios(Step(args), Step(args, use_rope=False), 2 * args.pairs)
    report.add("RoPE step / fixed step", values, "<= 1.01", f"{rotary:.3f} and {fixed:.3f} s")
    best = Step(args, position_table="space", rope_speed=0.5)
    values, table, plain = measure_ratios(best, Step(args), 2 * args.pairs)
    report.add("RoPE step with table and speed / without", values, "<= 1.03", f"{table:.3f} and {plain:.3f} s")
    step = Step(args)
    config, device = step.model.config, step.device
    grid, head_dim = config.grid(args.num_frames), config.head_dim
    q = torch.randn(args.batch_size, config.num_heads, math.prod(grid), head_dim, device=device, requires_grad=True)
    time_scale = torch.full((args.batch_size,), 0.04, device=device)
    cos, sin = RotaryEmbedding3D(head_dim, 10_000.0)(grid, time_scale)
    values, ours, theirs = measure_ratios(
        lambda: apply_rotary(q, cos, sin).sum().backward(),
        lambda: rotate_per_axis(q, grid).sum().backward(),
        args.pairs,
    )
    note = f"{1000 * ours:.1f} and {1000 * theirs:.1f} ms, forward and backward"
    report.add("our rotation / a loop over axes that concatenates", values, "<= 0.25", note)


def measure_forcing(args, report):
    """A step with noise levels per frame in half of the clips against one level for each clip."""
    values, forced, plain = measure_ratios(ForcedStep(args, 0.5), ForcedStep(args, 0.0), 2 * args.pairs)
    report.add("step with --forcing 0.5 / without", values, "<= 1.03", f"{forced:.3f} and {plain:.3f} s")


def measure_energy(args, report):
    """The cost of the second derivative of EqM-E, which torch.compile does not have."""
    args = changed(args, compile=False)
    values, ours, plain = measure_ratios(Step(args, ebm="dot"), Step(args), args.pairs)
    report.add("step with --ebm dot / without", values, None, f"{ours:.3f} and {plain:.3f} s")


def rotate_per_axis(q, grid, theta=10_000.0):
    """The common implementation: rotate the two halves of each axis' channels in a loop, then concatenate."""
    n, parts = 2 * (q.shape[-1] // 6), []
    axes = (torch.arange(size, dtype=torch.float32, device=q.device) for size in grid)
    positions = torch.meshgrid(*axes, indexing="ij")
    for axis, position in enumerate(positions):
        part = q[..., axis * n : (axis + 1) * n]
        angles = position.flatten()[:, None] * theta ** -(torch.arange(n // 2, device=q.device) / (n // 2))
        angles = torch.cat([angles, angles], dim=-1)
        swapped = torch.cat([-part[..., n // 2 :], part[..., : n // 2]], dim=-1)
        parts.append(part * angles.cos() + swapped * angles.sin())
    return torch.cat([*parts, q[..., 3 * n :]], dim=-1)


# ----------------------------------------------------------------------------------------------------------------------
# Memory and time over the number of frames


def peak_memory(args):
    """Peak memory of model, optimizer, EMA and two steps in MB, on the GPU or else of this process."""
    before = resident_memory()
    step = Step(args)
    step.model.grad_checkpoint = args.grad_checkpoint
    step(), step()
    return torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else resident_memory("VmHWM") - before


def resident_memory(field="VmRSS"):
    """Memory of this process in MB: now, or with "VmHWM" the peak. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1e3


def measure_memory(args, report):
    """Peak memory over the number of frames; each measurement has its own process."""
    for flags, goals in ((), ("<= 2.0", "<= 4.0")), (("--grad-checkpoint",), ("<= 1.5", "<= 2.5")):
        command = [sys.executable, __file__, "--peak-memory", "--model", args.model, "--precision", args.precision]
        command += ["--batch-size", str(args.batch_size), *flags, *["--compile"] * args.compile]
        peaks = []
        for num_frames in FRAMES:
            words = [*command, "--num-frames", str(num_frames)]
            printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
            peaks.append(float(printed.split()[-1]))
        for num_frames, peak, goal in zip((8, 16), peaks[1:], goals, strict=True):
            name = f"peak memory at {num_frames} frames / at 4{', --grad-checkpoint' if flags else ''}"
            report.add(name, peak / peaks[0], goal, f"{peak:.0f} and {peaks[0]:.0f} MB, with model, optimizer and EMA")


def measure_growth(args, report):
    """The time of a step over the number of frames, and the exponent of its growth."""
    frames = (4, 8, 16, 32, 64)
    steps = [Step(changed(args, num_frames=num_frames)) for num_frames in frames]
    rounds = []
    for step in 2 * steps:
        step()
    for _ in range(max(3, args.pairs // 3)):
        rounds.append([seconds_of(step) for step in steps])
    seconds = np.array(rounds)  # (rounds, len(frames))
    for last, goal in ((3, "<= 1.3"), (5, None)):
        exponents = np.polyfit(np.log(frames[:last]), np.log(seconds[:, :last]).T, 1)[0]
        medians = ", ".join(f"{value:.2f}" for value in np.median(seconds[:, :last], axis=0))
        report.add(f"exponent of the step time up to {frames[last - 1]} frames", exponents, goal, f"{medians} s")
    report.growth = frames, seconds


def measure_sizes(args, report):
    """Clips per second, TFLOP/s and their share of the device's peak for some models and numbers of frames."""
    report.sizes = []
    for name, tokens in (GPU_SIZES if torch.cuda.is_available() else CPU_SIZES).items():
        for num_frames in FRAMES:
            report.sizes.append(time_size(changed(args, model=name, num_frames=num_frames), tokens))
            print(sizes_table(report.sizes[-1:]).splitlines()[-1], flush=True)


def time_size(args, tokens):
    """A row of `sizes_table`: steps with about that many tokens, with half as many as long as they do not fit."""
    batch_size = max(1, tokens // math.prod(model_config(args.model).grid(args.num_frames)))
    row = {"model": args.model, "frames": args.num_frames, "clips": 0}
    while batch_size and not row["clips"]:
        try:
            row |= time_step(changed(args, batch_size=batch_size))
        except torch.OutOfMemoryError:
            batch_size //= 2
        gc.collect()  # not in the handler, where the error still holds what did not fit
        torch.cuda.empty_cache()
    return row


def time_step(args):
    """{clips, seconds, tflops: TFLOP/s, mfu: of the GPU's highest rate, memory: peak in GB} of a training step."""
    torch.compiler.reset()  # torch compiles a function for a few models only
    step = Step(args)
    step(), step()
    row = {"clips": args.batch_size, "mfu": None, "memory": None}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    row["seconds"] = float(np.median([seconds_of(step) for _ in range(args.pairs)]))
    flops = args.batch_size * step.model.config.training_flops(args.num_frames)
    row["tflops"] = flops / row["seconds"] / 1e12
    if torch.cuda.is_available():
        row["memory"] = torch.cuda.max_memory_allocated() / 1e9
        if peak := peak_tflops(torch.cuda.get_device_name(), args.precision):
            row["mfu"] = row["tflops"] / peak
    return row


def sizes_table(rows):
    """The rows of `time_size` in Markdown; what is not known is "-"."""
    names = ["model", "frames", "clips a step", "s a step", "clips/s", "TFLOP/s", "MFU", "peak memory, GB"]
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for row in rows:
        cells = [row["model"], str(row["frames"]), *["does not fit", *"-----"]]
        if row["clips"]:
            mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
            memory = "-" if row["memory"] is None else f"{row['memory']:.1f}"
            speed = f"{row['seconds']:.3g}", f"{row['clips'] / row['seconds']:.4g}", f"{row['tflops']:.3g}"
            cells[2:] = [str(row["clips"]), *speed, mfu, memory]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot_growth(path, args, frames, seconds):
    """Write a figure of seconds (rounds, len(frames)) over frames."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 14, "axes.grid": True, "grid.alpha": 0.3})
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    median = np.median(seconds, axis=0)
    low, high = np.quantile(seconds, [0.25, 0.75], axis=0)
    axes.errorbar(frames, median, [median - low, high - median], marker="o", capsize=3, label=args.model)
    line = median[0] * np.array(frames) / frames[0]
    axes.plot(frames, line, color="black", linestyle=":", label="linear in the number of frames")
    axes.set(xscale="log", yscale="log", xlabel="frames per clip", ylabel="seconds per training step")
    axes.set_xticks(frames, [str(num_frames) for num_frames in frames])
    ticks = 2.0 ** np.arange(np.floor(np.log2(median[0])), np.ceil(np.log2(median[-1])) + 1)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=100)


# ----------------------------------------------------------------------------------------------------------------------
# Two ranks


def measure_optimizer(args, report):
    """Muon's step where two ranks share the matrices, against that of one rank for all of them."""
    if torch.cuda.device_count() == 1:
        print("optimizer: left out, it takes two GPUs (or none)")
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(time_muon, (folder, args.model, args.pairs), nprocs=2)
        shared, alone = torch.load(Path(folder, "seconds.pt"), weights_only=True).numpy().T
    note = f"{np.median(shared):.3f} and {np.median(alone):.3f} s, matrices of {args.model}"
    report.add("Muon's step on 2 ranks / on one", shared / alone, "<= 0.65", note)


def time_muon(rank, folder, model, pairs):
    """Run as one of two ranks; rank 0 writes the seconds of both kinds of steps, (pairs, 2): shared, alone.

    While rank 0 steps alone, the other waits.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.set_num_threads(1)  # as torchrun does
    keep_freed_memory()  # as every run on the CPU does
    alone = random_muon(model, device)  # for one rank, as it is made outside a process group
    join(rank, folder, "nccl" if on_gpu else "gloo")
    shared, seconds = random_muon(model, device), []
    for pair in range(2 + pairs):
        pair_seconds = {}
        for muon in (shared, alone) if pair % 2 else (alone, shared):
            torch.distributed.barrier()
            pair_seconds[muon] = seconds_of(muon.step) if muon is shared or rank == 0 else 0.0
        seconds.append((pair_seconds[shared], pair_seconds[alone]))
    if rank == 0:
        torch.save(torch.tensor(seconds[2:]), Path(folder, "seconds.pt"))
    torch.distributed.destroy_process_group()


def random_muon(model, device):
    """Muon for the matrices of a model, which have random gradients."""
    torch.manual_seed(0)
    with warnings.catch_warnings(action="ignore"):
        _, muon = make_optimizers(EqM_models[model](num_classes=1).to(device), "muon")
    for weight in muon.param_groups[0]["params"]:
        weight.grad = torch.randn_like(weight)
    return muon


def join(rank, folder, backend="gloo"):
    """Join a process group of two, which meet in `folder`."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    torch.distributed.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=2)


def measure_stopping(args, report):
    """The time in which two ranks agree, at each step, whether to stop for a signal; training overlaps most of it."""
    step = Step(args)
    step()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(time_agreement, (folder, args.pairs), nprocs=2)
        seconds = torch.load(Path(folder, "seconds.pt"), weights_only=True).numpy()
    values = np.array([agreement / seconds_of(step) for agreement in seconds])
    note = f"{1e3 * np.median(seconds):.2g} ms, not overlapped"
    report.add("agreeing on a stop, 2 processes / step", values, "<= 0.005", note)


def time_agreement(rank, folder, count, calls=50):
    """Run as one of two processes; rank 0 writes the seconds per agreement, (count,)."""
    torch.set_num_threads(1)  # as torchrun does
    join(rank, folder)
    stop = StopSignal()

    def agree():
        for _ in range(calls):
            stop.ask()
            stop.agreed()

    seconds = torch.tensor([seconds_of(agree) / calls for _ in range(count + 1)][1:])
    if rank == 0:
        torch.save(seconds, Path(folder, "seconds.pt"))
    torch.distributed.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


def measure_sampling(args, report):
    """Guided sampling against the same number of evaluations of the network, with and without class as one batch."""
    step, evaluations = Step(args), 4
    model, x, y, device = step.model.requires_grad_(False), step.x, step.y, step.device
    time_scale = torch.full((len(x),), 0.04, device=device)
    both = torch.cat([x, x]), torch.cat([y, y]), torch.cat([time_scale, time_scale])

    @torch.no_grad()
    def forward():
        with distributed.autocast(device, args.precision):
            for _ in range(evaluations):
                model(*both)

    def sample():
        generation.generate(
            model, x, y, time_scale, NUM_CLASSES, guidance=4.0, precision=args.precision, show=False,
            method="ngd", num_steps=evaluations + 1, step_size=0.0017, momentum=0.3,
        )  # fmt: skip

    values, ours, floor = measure_ratios(sample, forward, args.pairs, warm_up=1)
    note = f"{ours:.2f} and {floor:.2f} s for {evaluations} evaluations"
    report.add("guided sampling / its evaluations alone", values, "<= 1.05", note)


# ----------------------------------------------------------------------------------------------------------------------
# Data: latents against videos


def measure_data(args, report):
    """Reading some frames against all, waiting for the loader, encoding on the fly against a latent cache."""
    with tempfile.TemporaryDirectory() as folder:
        videos, cache = Path(folder, "videos"), Path(folder, "latents")
        make = [sys.executable, Path(__file__).parent.parent / "datasets/make_moving_shapes.py", "--out", videos]
        of_164_frames = ["--videos-per-class", "2", "--size", "256", "--seconds", "6.56"]
        subprocess.run([*make, *of_164_frames], check=True, capture_output=True)
        measure_reading(args, report, "of a video", videos, read_frames)
        write_random_cache(videos, cache)
        measure_reading(args, report, "of latents", cache, read_latents)
        measure_loading(args, report, cache)


def measure_reading(args, report, what, root, function):
    """Reading a clip from a random start, as in training, against reading all frames."""
    scan = scan_videos(root)
    starts = iter(np.random.default_rng(0).permutation(164 - args.num_frames).tolist() * 100)

    def read(frames):
        return function(root, scan.videos[0], frames)

    def read_clip():
        start = next(starts)
        read(range(start, start + args.num_frames))

    values, clip, whole = measure_ratios(read_clip, lambda: read(range(164)), 4 * args.pairs)
    note = f"{1000 * clip:.2g} and {1000 * whole:.2g} ms, 256 px"
    report.add(f"read {args.num_frames} of 164 frames {what} / all", values, "<= 0.3", note)


def write_random_cache(videos, cache, side=32):
    """Write a latent cache of the videos with random latents of 4 channels and side x side."""
    scan = scan_videos(videos)
    for video in scan.videos:
        path = cache / latents_path(video)
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (video.num_frames, 4, side, side)
        safetensors.torch.save_file({name: torch.rand(shape).half() for name in ("mean", "std")}, path)
    cached = [asdict(replace(video, path=latents_path(video))) for video in scan.videos]
    vae = {"vae": "ema", "image_size": 8 * side, "channels": 4, "downsample": 8, "scale": 0.18215, "shift": 0.0}
    settings = {"format": LATENTS_FORMAT, **vae, "flips": False, "unreadable": []}
    (cache / LATENTS_FILE).write_text(json.dumps(settings | {"classes": scan.classes, "videos": cached}))


def measure_loading(args, report, cache):
    """The loop of loader and step of train.py on a latent cache, and the time that encoding with the VAE would add."""
    scan, step, num_steps, warm_up = scan_videos(cache), Step(args), 4 * args.pairs, 4
    clips = {args.num_frames: Clips(cache, scan.videos, scan.classes, args.num_frames, 256, flip=False)}
    indices = Batches(0, warm_up + num_steps, args.batch_size, 0, 1)
    keys = [[(args.num_frames, index) for index in batch] for batch in indices]
    loader = make_loader(clips, keys, 2, 0, step.device)
    waited, took = [], []
    batches = on_device(batches_of(loader), step.device)
    for _ in keys:
        began = time.perf_counter()
        batch = next(batches)
        received = time.perf_counter()
        mean, std = batch["clips"].float().unbind(1)
        step.x = mean + std * torch.randn_like(mean)
        step()
        synchronize()
        waited.append(received - began)
        took.append(time.perf_counter() - began)
    waited, took = np.array(waited[warm_up:]), np.array(took[warm_up:])
    report.add("loader wait / step, cached, 2 workers", waited / took, "<= 0.05", f"{1000 * np.median(waited):.1f} ms")

    from diffusers import AutoencoderKL  # takes seconds to import

    vae = VAE("random weights", AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
    ).requires_grad_(False)).to(step.device)  # fmt: skip
    two_frames = torch.randint(256, (1, 3, 2, 256, 256), dtype=torch.uint8, device=step.device)
    values, encoding, training = measure_ratios(lambda: vae.posterior(two_frames), step, 3, warm_up=1)
    frames = args.batch_size * args.num_frames
    note = f"a frame takes {encoding / 2:.2f} s to encode, a step has {frames}; SD's VAE with random weights"
    speedup = 1 + values / 2 * frames * training / np.median(took)
    report.add("clips/s from a cache / on the fly", speedup, ">= 50", note)


PARTS = {
    "step": measure_step,
    "positions": measure_positions,
    "forcing": measure_forcing,
    "energy": measure_energy,
    "optimizer": measure_optimizer,
    "memory": measure_memory,
    "growth": measure_growth,
    "sampling": measure_sampling,
    "data": measure_data,
    "stopping": measure_stopping,
    "sizes": measure_sizes,
}


def main():
    args = parse_args()
    try:
        check_speed_flags(args)
    except UserError as error:
        fail(error)
    set_precision(args.precision)
    keep_freed_memory()  # as every run on the CPU does
    if args.peak_memory:
        print(peak_memory(args))
        return
    on_gpu = torch.cuda.is_available()
    machine = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads of {processor_name()}"
    title = (
        f"{machine}, torch {torch.__version__}, {args.precision}{', compiled' if args.compile else ''}: {args.model}, "
        f"{args.batch_size} clips of {args.num_frames} x 32 x 32 latents"
    )
    print(title, flush=True)
    report, began = Report(), time.monotonic()
    for name in args.only or [name for name in PARTS if name != "sizes"]:
        PARTS[name](args, report)
    print(f"{time.monotonic() - began:.0f} s")
    if not args.only:
        results = Path(__file__).resolve().parent.parent / "results"
        plot_growth(results / "figures/growth.png", args, *report.growth)
        (results / "benchmark.md").write_text(f"{title}\n\n{report.markdown()}\n")
        frames, seconds = report.growth
        result = {"title": title, "rows": report.rows, "frames": frames, "seconds_per_step": seconds.tolist()}
        (results / "benchmark.json").write_text(json.dumps(result, indent=1) + "\n")


def processor_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
