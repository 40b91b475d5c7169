"""Measure how close each part of training and sampling is to its own limit, as ratios with their spread.

    python scripts/benchmark.py                      all ratios, 10 minutes on 2 cores; writes results/benchmark.*
    python scripts/benchmark.py --only step growth   some parts (see PARTS), printed only
    python scripts/benchmark.py --only sizes --precision bf16 --compile   no ratios: clips/s and MFU of some models
    python scripts/benchmark.py --model EqM-XL/2 --batch-size 8 --precision bf16 --compile --only step

Absolute times on a shared machine are unreliable. So the two sides of a ratio run in turns in one process, and each
pair of calls gives one ratio. The matrix-product floor of a training step is the time of its FLOPs at this machine's
speed for matrix products of the same shapes.
"""

import argparse
import gc
import itertools
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from engine import ROOT
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
import torch.distributed as dist

import optim
import transport
from models import NAMES, Condition, EqM_models, model_config
from rope import RotaryEmbedding3D, apply_rotary
from runtime import distributed
from runtime.cli import COUNT, ArgumentParser, check_speed_flags, number, one_line_errors, wrong_input
from runtime.metrics import device_stats, read_metrics
from runtime.signals import StopSignal
from samplers import guided, sample
from scoring.plots import plt, save_figure
from video.source import open_source
from video.writers import encode

ON_GPU = torch.cuda.is_available()
NUM_CLASSES, NEARLY_NO_CHANGE = 101, {"lr": 1e-9, "muon_lr": 1e-9, "weight_decay": 0.0}
FRAMES = 4, 8, 16  # of the parts memory and sizes
WARM_UP = 2  # untimed calls at the start
synchronize = torch.cuda.synchronize if ON_GPU else lambda: None
# Tokens per step of the part "sizes": 80 GB at about 60 KB of activations per token, block and 1,000 channels. They are
# halved until they fit. A CPU only shows that the part works.
SIZES = {"EqM-S/4": 65_536, "EqM-B/2": 65_536, "EqM-XL/2": 16_384} if ON_GPU else {"EqM-Ti/4": 512}
warnings.filterwarnings("ignore", message="a token holds")


def parse_args():
    parser = ArgumentParser(description="Measure how close each part of training and sampling is to its limit.")
    add = parser.add_argument
    parts = f"some of {', '.join(PARTS)}; default: all but sizes"
    add("--only", nargs="+", choices=PARTS, metavar="PART", help=parts)
    add("--model", choices=NAMES, default="EqM-S/4", metavar="NAME", help="EqM-{Ti,S,B,L,XL}/{2,4,8}")
    add("--num-frames", type=COUNT, default=16, help="frames per clip")
    add("--batch-size", type=COUNT, default=4, help="clips per step")
    add("--precision", choices=["fp32", "tf32", "bf16", "fp16"], default="fp32", help="precision of the network")
    add("--compile", action="store_true", help="compile the transformer blocks with torch.compile")
    add("--pairs", type=number(int, least=3), default=12, help="pairs of calls per row")
    return parser.parse_args()


def changed(args, **flags):
    return argparse.Namespace(**vars(args) | flags)


# Ratios and tables ----------------------------------------------------------------------------------------------------


def seconds_of(function):
    synchronize()
    began = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - began


def measure_ratios(a, b, pairs):
    """Ratios (pairs,) of a's seconds to b's, and the median seconds of each. a and b take turns in going first."""
    for _ in range(WARM_UP):
        a(), b()
    seconds = np.empty((pairs, 2))
    for pair in range(pairs):
        for side in (1, 0) if pair % 2 else (0, 1):
            seconds[pair, side] = seconds_of((a, b)[side])
    return seconds[:, 0] / seconds[:, 1], *np.median(seconds, axis=0)


class Report:
    """Collects rows, and prints each row when it is added."""

    def __init__(self):
        self.rows, self.growth = [], None

    def add(self, name, values, goal=None, note=""):
        low, middle, high = np.quantile(np.atleast_1d(values), [0.25, 0.5, 0.75]).tolist()
        row = {"ratio": name, "median": middle, "quartiles": [low, high], "goal": goal, "note": note}
        self.rows.append(row)
        print(f"{name}: {middle:.3f} ({low:.3f} to {high:.3f}){f', goal {goal}' if goal else ''}; {note}", flush=True)

    def compare(self, name, a, b, pairs, goal=None, note="{:.3f} and {:.3f} s", unit=1):
        """Add a row for the time of a / the time of b. The note shows both medians, in units of 1/unit seconds."""
        values, *seconds = measure_ratios(a, b, pairs)
        self.add(name, values, goal, note.format(*(unit * median for median in seconds)))

    def markdown(self):
        lines = ["| ratio | median | quartiles | goal | details |", "|---|---|---|---|---|"]
        for row in self.rows:
            spread = "{:.3g} - {:.3g}".format(*row["quartiles"])
            lines.append(f"| {row['ratio']} | {row['median']:.3g} | {spread} | {row['goal'] or ''} | {row['note']} |")
        return "\n".join(lines)


# A training step, without loading data --------------------------------------------------------------------------------


class Step:
    """A training step as in train.py (forward, backward, clipping, optimizer, EMA) on fixed random clips and noise."""

    def __init__(self, args, optimizer="adamw", forcing=0.0, **settings):
        self.precision, self.forcing = args.precision, forcing
        self.device = torch.device("cuda" if ON_GPU else "cpu")
        torch.manual_seed(0)
        settings = {"num_classes": NUM_CLASSES, "num_frames": args.num_frames, "use_rope": True} | settings
        self.model = EqM_models[args.model](**settings).to(self.device)
        with torch.no_grad():
            for parameter in self.model.parameters():  # some layers start at zero, which may be faster
                parameter.normal_(std=0.02)
        self.ema = deepcopy(self.model).requires_grad_(False)
        if args.compile:
            self.model.compile_blocks()
        self.optimizers = optim.make_optimizers(self.model, argparse.Namespace(optimizer=optimizer, **NEARLY_NO_CHANGE))
        side, channels = self.model.config.input_size, self.model.config.in_channels
        shape = args.batch_size, channels, args.num_frames, side, side
        self.x, self.noise = (torch.randn(shape, device=self.device) for _ in range(2))
        self.y, self.indices = torch.randint(NUM_CLASSES, shape[:1], device=self.device), range(args.batch_size)
        self.flops = args.batch_size * self.model.config.training_flops(args.num_frames)

    def backward(self):
        """Run forward and backward, with new noise levels each time."""
        self.indices = range(self.indices.stop, self.indices.stop + len(self.x))
        frames, patch = self.x.shape[2], self.model.config.temporal_patch_size
        gamma = transport.draw_gammas(0, 0, self.indices, frames, patch, share=self.forcing).to(self.device)
        with distributed.autocast(self.device, self.precision):
            losses, *_ = transport.losses(self.model, self.x, self.noise, gamma, self.y, None)
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
        """(FLOPs, function that runs them) of one block's matrix products, forward and backward, as in F.linear."""
        D, N = self.model.config.hidden_size, len(self.x) * math.prod(self.model.config.grid(self.x.shape[2]))
        random = partial(torch.randn, device=self.device, dtype=distributed.MIXED.get(self.precision, torch.float32))
        sizes = [(D, 3 * D), (D, D), (D, 4 * D), (4 * D, D)]
        layers = [(random(N, inner), random(outer, inner), random(N, outer)) for inner, outer in sizes]

        def run():
            for x, weight, gradient in layers:
                torch.mm(x, weight.T)
                torch.mm(gradient, weight)
                torch.mm(gradient.T, x)

        return sum(3 * 2 * N * inner * outer for inner, outer in sizes), run


def measure_step(args, report):
    """Measure a step and its parts against the matrix-product floor, and bf16 against fp32."""
    ours, updated = Step(args), Step(args)
    product_flops, products = ours.products()
    scale = ours.flops / product_flops
    values, seconds, product_seconds = measure_ratios(ours, products, args.pairs)
    floor, rate = scale * product_seconds, product_flops / product_seconds / 1e9
    note = f"{seconds:.3f} s; floor {floor:.3f} s at {rate:.0f} GFLOP/s"
    report.add(f"{args.precision} step / matrix-product floor", values / scale, "<= 1.15", note)
    values, seconds, _ = measure_ratios(lambda: (ours.backward(), ours.model.zero_grad()), products, args.pairs)
    name = f"{args.precision} forward and backward / matrix-product floor"
    report.add(name, values / scale, None, f"{seconds:.3f} s")
    updated.backward()
    report.compare("EMA + optimizer + clipping / step", updated.update, ours, args.pairs, "<= 0.08", "{:.3f} s")
    if args.precision == "fp32":
        report.compare("bf16 step / fp32 step", Step(changed(args, precision="bf16")), ours, args.pairs, "<= 0.65")


def measure_positions(args, report):
    """Measure rotary against fixed positions, the best against plain rotary ones, and our rotation against a loop."""
    fixed, best, plain = Step(args, use_rope=False), Step(args, position_table="space", rope_speed=0.5), Step(args)
    report.compare("step with rotary positions / with fixed positions", plain, fixed, 2 * args.pairs, "<= 1.01")
    report.compare("rotary step with table and speed / without", best, plain, 2 * args.pairs, "<= 1.03")
    grid, head_dim = plain.model.config.grid(args.num_frames), plain.model.config.head_dim
    shape = args.batch_size, plain.model.config.num_heads, math.prod(grid), head_dim
    q = torch.randn(shape, device=plain.device, requires_grad=True)
    cos, sin = RotaryEmbedding3D(head_dim)(grid, torch.full(shape[:1], 0.04, device=plain.device))
    report.compare(
        "our rotation / rotation axis by axis",
        lambda: apply_rotary(q, cos, sin).sum().backward(), lambda: rotate_per_axis(q, grid).sum().backward(),
        args.pairs, "<= 0.25", "{:.1f} and {:.1f} ms, forward and backward", unit=1000,
    )  # fmt: skip


def compare_with_plain(name, settings, goal, args, report):
    """Measure a step with some settings against a step without. torch.compile can't differentiate EqM-E twice."""
    args = changed(args, compile=args.compile and "ebm" not in settings)
    report.compare(name, Step(args, **settings), Step(args), 2 * args.pairs, goal)


def rotate_per_axis(q, grid, theta=10_000.0):
    """Rotate q in the common way: loop over the axes, rotate the two halves of their channels, then concatenate."""
    n, parts = 2 * (q.shape[-1] // 6), []
    axes = (torch.arange(size, dtype=torch.float32, device=q.device) for size in grid)
    for axis, position in enumerate(torch.meshgrid(*axes, indexing="ij")):
        part = q[..., axis * n : (axis + 1) * n]
        angles = position.flatten()[:, None] * theta ** -(torch.arange(n // 2, device=q.device) / (n // 2))
        angles = torch.cat([angles, angles], dim=-1)
        swapped = torch.cat([-part[..., n // 2 :], part[..., : n // 2]], dim=-1)
        parts.append(part * angles.cos() + swapped * angles.sin())
    return torch.cat([*parts, q[..., 3 * n :]], dim=-1)


def measure_sampling(args, report):
    """Measure guided sampling against the same number of network evaluations, with and without class in one batch."""
    step, evaluations = Step(args), 4
    model, x, y = step.model.requires_grad_(False), step.x, step.y
    time_scale = torch.full((len(x),), 0.04, device=step.device)
    both = torch.cat([x, x]), torch.cat([y, y]), torch.cat([time_scale, time_scale])
    field = guided(model, Condition(y, NUM_CLASSES), time_scale, guidance=4.0)

    def forward():
        for _ in range(evaluations):
            model(*both)

    sampling = partial(sample, field, x, "ngd", evaluations + 1)
    note = f"{{:.2f}} and {{:.2f}} s for {evaluations} evaluations"
    with torch.no_grad(), distributed.autocast(step.device, args.precision):
        report.compare("guided sampling / its evaluations alone", sampling, forward, args.pairs, "<= 1.05", note)


# Memory and time over the number of frames, and of some models --------------------------------------------------------


def measure_memory(args, report):
    """Measure peak memory over the number of frames, each in its own process."""
    goals = {"": ("<= 2.0", "<= 4.0"), ", --grad-checkpoint": ("<= 1.5", "<= 2.5")}
    for flag in goals:
        sizes = (changed(args, num_frames=num_frames) for num_frames in FRAMES)
        first, *peaks = (in_processes(1, peak_memory, size, bool(flag)) for size in sizes)
        for num_frames, peak, goal in zip(FRAMES[1:], peaks, goals[flag], strict=True):
            note = f"{peak:.0f} and {first:.0f} MB, with model, optimizer and EMA"
            report.add(f"peak memory at {num_frames} frames / at 4{flag}", peak / first, goal, note)


def peak_memory(rank, join, args, recompute):
    """Peak memory in MB of model, optimizer, EMA and two steps: of the GPU, or of this process without a GPU."""

    def resident(field):  # Linux only
        return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3

    before, step = resident("VmRSS"), Step(args)
    step.model.grad_checkpoint = recompute
    step(), step()
    return torch.cuda.max_memory_allocated() / 1e6 if ON_GPU else resident("VmHWM") - before


def measure_growth(args, report):
    """Measure the time of a step over the number of frames, and the exponent of its growth."""
    frames = 4, 8, 16, 32, 64
    steps = [Step(changed(args, num_frames=num_frames)) for num_frames in frames]
    for step in WARM_UP * steps:
        step()
    seconds = np.array([[seconds_of(step) for step in steps] for _ in range(max(3, args.pairs // 3))])
    for last, goal in ((3, "<= 1.3"), (5, None)):
        exponents = np.polyfit(np.log(frames[:last]), np.log(seconds[:, :last]).T, 1)[0]
        note = ", ".join(f"{value:.2f}" for value in np.median(seconds[:, :last], axis=0)) + " s"
        report.add(f"growth exponent of the step time up to {frames[last - 1]} frames", exponents, goal, note)
    report.growth = {"frames": frames, "seconds_per_step": seconds.tolist()}


def plot_growth(path, label, frames, seconds_per_step):
    """Write a figure of seconds_per_step (rounds, len(frames)) over frames."""
    figure, axes = plt.subplots()
    low, median, high = np.quantile(seconds_per_step, [0.25, 0.5, 0.75], axis=0)
    axes.errorbar(frames, median, [median - low, high - median], marker="o", capsize=3, label=label)
    line = median[0] * np.array(frames) / frames[0]
    axes.plot(frames, line, color="black", linestyle=":", label="linear in the number of frames")
    axes.set(xscale="log", yscale="log", xlabel="frames per clip", ylabel="seconds per training step")
    ticks = 2.0 ** np.arange(np.floor(np.log2(median[0])), np.ceil(np.log2(median[-1])) + 1)
    axes.set_xticks(frames, map(str, frames))
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend()
    save_figure(figure, path)


def measure_sizes(args, report):
    """Print clips per second, TFLOP/s and MFU (share of the device's peak) for some models and numbers of frames."""
    header = ["model", "frames", "clips a step", "s a step", "clips/s", "TFLOP/s", "MFU", "peak memory, GB"]
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for (model, tokens), num_frames in itertools.product(SIZES.items(), FRAMES):
        clips, cells = max(1, tokens // math.prod(model_config(model).grid(num_frames))), None
        while clips and not cells:
            try:
                cells = time_step(changed(args, model=model, num_frames=num_frames, batch_size=clips))
            except torch.OutOfMemoryError:
                clips //= 2
            gc.collect()  # not in the handler, where the error still holds what did not fit
            torch.cuda.empty_cache()
        print(f"| {' | '.join([model, str(num_frames), *(cells or ['does not fit', *'-----'])])} |", flush=True)


def time_step(args):
    """The cells [clips, seconds, clips/s, TFLOP/s, MFU, peak memory] of a training step; "-" if unknown."""
    torch.compiler.reset()  # torch limits how many models it compiles a function for
    step = Step(args)
    for _ in range(WARM_UP):
        step()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    seconds = float(np.median([seconds_of(step) for _ in range(args.pairs)]))
    tflops = step.flops / seconds / 1e12
    stats, forms = device_stats(step.device, args.precision, tflops), {"mfu": ".1%", "gpu_memory_gb": ".1f"}
    known = (format(stats[name], form) if name in stats else "-" for name, form in forms.items())
    return [str(args.batch_size), f"{seconds:.3g}", f"{args.batch_size / seconds:.4g}", f"{tflops:.3g}", *known]


# Processes ------------------------------------------------------------------------------------------------------------


def in_processes(count, function, *args):
    """Run function(rank, join, *args) in `count` processes, which join() groups; returns rank 0's result, via JSON."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run_rank, (count, folder, function, args), nprocs=count)
        return json.loads(Path(folder, "result.json").read_text())


def run_rank(rank, count, folder, function, args):
    distributed.keep_freed_memory()  # as every run on the CPU does
    if count > 1:
        torch.set_num_threads(1)  # as torchrun does

    def join():
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count)}
        backend = "cpu:gloo,cuda:nccl" if ON_GPU else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=count)

    result = function(rank, join, *args)
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()


def measure_optimizer(args, report):
    """Measure Muon's step with two ranks sharing the matrices, against one rank with all matrices."""
    if torch.cuda.device_count() == 1:
        print("optimizer: skipped; it needs two GPUs or none")
        return
    ratios, shared, alone = in_processes(2, time_muon, args)
    report.add("Muon's step on 2 ranks / on one", ratios, "<= 0.65", f"{shared:.3f} and {alone:.3f} s, {args.model}")


def time_muon(rank, join, args):
    """The result of measure_ratios: a step shared by two ranks against a step of rank 0, while rank 1 waits."""
    if ON_GPU:
        torch.cuda.set_device(rank)
    alone = random_muon(args)  # for one rank, because the process group does not exist yet
    join()
    shared = random_muon(args)
    steps = [shared.step, alone.step if rank == 0 else lambda: None]
    ratios, *seconds = measure_ratios(*(lambda step=step: (dist.barrier(), step()) for step in steps), args.pairs)
    return ratios.tolist(), *seconds


def random_muon(args):
    """A Muon optimizer for the matrices of a model, with random gradients."""
    _, muon = Step(changed(args, compile=False), optimizer="muon").optimizers
    for weight in muon.param_groups[0]["params"]:
        weight.grad = torch.randn_like(weight)
    return muon


def measure_stopping(args, report):
    """Measure how long two ranks vote, at each step, on stopping for a signal. Training overlaps most of this."""
    step = Step(args)
    step()
    seconds = in_processes(2, time_vote, args.pairs)
    values = [vote / seconds_of(step) for vote in seconds]
    note = f"{1e3 * np.median(seconds):.2g} ms, not overlapped"
    report.add("stop vote of 2 processes / step", values, "<= 0.005", note)


def time_vote(rank, join, count, calls=50):
    """[seconds per vote] of `count` measurements."""
    join()
    stop = StopSignal()

    def vote():
        for _ in range(calls):
            stop.vote()
            stop.resolve()

    return [seconds_of(vote) / calls for _ in range(count + 1)][1:]


def measure_data(args, report):
    """Reading part of a long video or cache, waiting for the loader, encoding on the fly against a latent cache."""
    with tempfile.TemporaryDirectory() as folder:
        shapes, vae, cache, results = (Path(folder, name) for name in ("shapes", "vae", "cache", "results"))
        of_164_frames = "--videos-per-class", 2, "--size", 256, "--seconds", 6.56
        run_script("datasets/make_moving_shapes.py", "--out", shapes, *of_164_frames)
        videos = (shapes / "CircleUp").rename(Path(folder, "videos"))  # two are enough
        random_vae([4] * 4, norm_num_groups=4).save_pretrained(vae)
        run_script("EqM/cache_latents.py", "--data-path", videos, "--vae", vae, "--image-size", 256, "--out", cache)
        measure_long_video(args, report, Path(folder, "long"))
        source = open_source(cache, 256)
        read, note = partial(source.read, source.videos()[0]), "{:.2g} and {:.2g} ms, 256 px"
        sides = clip_reader(args, read, 164), partial(read, range(164))
        name = f"read {args.num_frames} of 164 frames of latents / all"
        report.compare(name, *sides, 4 * args.pairs, "<= 0.3", note, unit=1000)
        run_script(
            "EqM/train.py", "--video", "--use-rope", "--data-path", cache, "--no-flip", "--results-dir", results,
            "--model", args.model, "--num-frames", args.num_frames, "--global-batch-size", args.batch_size,
            "--precision", args.precision, *["--compile"] * args.compile, "--num-workers", 2, "--log-every", 1,
            "--max-steps", 4 * args.pairs + 4, "--sample-every", 0, "--val-clips", 1,
        )  # fmt: skip
        rows = read_metrics(next(results.glob("*/metrics.jsonl")))[0][4:]  # without the first ones
    waits = np.array([row["wait_frac"] for row in rows])
    note = f"{1000 * np.median([row['wait_frac'] * args.batch_size / row['clips_per_s'] for row in rows]):.1f} ms"
    report.add("loader wait / step, cached, 2 workers", waits, "<= 0.05", note)

    step, vae = Step(args), random_vae([128, 256, 512, 512], layers_per_block=2)
    two_frames, frames = torch.rand(2, 3, 256, 256, device=step.device), args.batch_size * args.num_frames
    encode = partial(torch.no_grad()(vae.to(step.device).encode), two_frames)
    values, seconds, _ = measure_ratios(encode, step, 3)
    note = f"a frame takes {seconds / 2:.2f} s to encode, a step has {frames}; SD's VAE with random weights"
    report.add("clips/s from a latent cache / encoding on the fly", 1 + values / 2 * frames, ">= 50", note)


def measure_long_video(args, report, folder, num_frames=1500):
    """Reading clips of a 60 s video from the keyframe before each, against decoding from the first frame on."""
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (36, 64, 3), np.uint8).repeat(10, 0).repeat(10, 1)
    frames = (np.roll(noise, (2 * index, 3 * index), (0, 1)) for index in range(num_frames))
    with av.open(str(folder / "long.mp4"), "w") as file:
        encode(file, frames, 25, "libx264", "yuv420p", {"preset": "veryfast"})
    source = open_source(folder, 256)
    (video,) = source.videos()
    both = video, replace(video, keyframes=())
    sides = (clip_reader(args, partial(source.read, side), num_frames) for side in both)
    name = f"read {args.num_frames} of {num_frames} frames from a keyframe / from the start"
    report.compare(name, *sides, 2 * args.pairs, "<= 0.3", "{:.0f} and {:.0f} ms, 360p", unit=1000)


def clip_reader(args, read, num_frames):
    """A function that reads a clip from a random start, as in training."""
    draw, frames = np.random.default_rng(0), range(num_frames)

    def read_clip():
        start = draw.integers(num_frames - args.num_frames)
        read(frames[start : start + args.num_frames])

    return read_clip


def run_script(script, *flags):
    subprocess.run([sys.executable, ROOT / script, *map(str, flags)], check=True, capture_output=True)


def random_vae(widths, **settings):
    """An AutoencoderKL like Stable Diffusion's (4 channels, downsampling 8) with random weights."""
    from diffusers import AutoencoderKL  # takes seconds to import

    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    return AutoencoderKL(**blocks, block_out_channels=widths, latent_channels=4, **settings)


PARTS = {
    "step": measure_step,
    "positions": measure_positions,
    "forcing": partial(compare_with_plain, "step with --forcing 0.5 / without", {"forcing": 0.5}, "<= 1.03"),
    "energy": partial(compare_with_plain, "step with --ebm dot / without", {"ebm": "dot"}, None),
    "optimizer": measure_optimizer,
    "memory": measure_memory,
    "growth": measure_growth,
    "sampling": measure_sampling,
    "data": measure_data,
    "stopping": measure_stopping,
    "sizes": measure_sizes,
}


@one_line_errors()
def main():
    args = parse_args()
    with wrong_input():
        check_speed_flags(args)
    distributed.set_precision(args.precision)
    distributed.keep_freed_memory()  # as every run on the CPU does
    title = f"{machine()}, torch {torch.__version__}, {args.precision}{', compiled' if args.compile else ''}: "
    title += f"{args.model}, {args.batch_size} clips of {args.num_frames} x 32 x 32 latents"
    print(title, flush=True)
    report, began, results = Report(), time.monotonic(), ROOT / "results"
    for name in args.only or [name for name in PARTS if name != "sizes"]:
        PARTS[name](args, report)
    print(f"{time.monotonic() - began:.0f} s")
    if not args.only:
        plot_growth(results / "figures/growth.png", args.model, **report.growth)
        (results / "benchmark.md").write_text(f"{title}\n\n{report.markdown()}\n")
        result = {"title": title, "rows": report.rows} | report.growth
        (results / "benchmark.json").write_text(json.dumps(result, indent=1) + "\n")


def machine():
    """The name of the GPU, or the name of the processor and the number of threads in use."""
    if ON_GPU:
        return torch.cuda.get_device_name()
    about = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", about.read_text()) if about.exists() else None
    return f"{name[1] if name else platform.machine()}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
