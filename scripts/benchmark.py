"""How close is each part to its own limit? Ratios, measured side by side in one process, with their spread.

    python scripts/benchmark.py                      everything, 10 minutes on 2 cores; writes results/benchmark.*
    python scripts/benchmark.py --only step growth   some of it (see PARTS), printed only
    python scripts/benchmark.py --model EqM-XL/2 --batch-size 8 --precision bf16 --compile --only step

Seconds on a shared machine say little, so two sides take turns, and each pair of turns gives one ratio: a row is the
median of them, with the quartiles. The floor of a training step is the time that its FLOPs (torch's counter) take at
the rate that this machine reaches in matrix products of the model's own shapes.
"""

import argparse
import json
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
from diffusers import AutoencoderKL
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "EqM"))
import cache_latents
import generation
import optim
from models import NAMES, EqM_models, math_attention
from rope import RotaryEmbedding3D, apply_rotary
from runtime import distributed
from runtime.cli import COUNT, ArgumentParser, UserError, check_speed_flags, fail, number
from runtime.distributed import keep_freed_memory, set_precision
from runtime.signals import StopSignal
from vae import VAE
from video.clips import Batches, Clips, collate
from video.files import read_frames, read_latents
from video.index import LATENTS, LATENTS_FORMAT, scan_videos

CLASSES = 101
warnings.filterwarnings("ignore", message="a token holds")


def parse_args():
    parser = ArgumentParser(description="How close is each part of training and sampling to its own limit?")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--model", choices=NAMES, default="EqM-S/4", metavar="NAME", help="EqM-S/4 ...")
    parser.add_argument("--num-frames", type=COUNT, default=16, metavar="N", help="frames per clip")
    parser.add_argument("--batch-size", type=COUNT, default=4, metavar="N", help="clips per step")
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16", "fp16"], default="fp32", help="of the step")
    parser.add_argument("--compile", action="store_true", help="let torch compile the blocks")
    parser.add_argument("--pairs", type=number(int, least=3), default=12, metavar="N", help="pairs of turns per row")
    parser.add_argument("--peak-memory", action="store_true", help="print the peak memory of two steps, in MB, and end")
    parser.add_argument("--grad-checkpoint", action="store_true", help="in --peak-memory")
    return parser.parse_args()


# ----------------------------------------------------------------------------------------------------------------------
# Taking turns


def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clock(function):
    """Seconds that a call takes."""
    wait()
    began = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - began


def ratios(a, b, pairs, warm_up=2):
    """The ratio of the seconds of a and of b for each pair of turns, and all seconds; who goes first alternates."""
    for _ in range(warm_up):
        a(), b()
    seconds = []
    for pair in range(pairs):
        if pair % 2:
            of_b = clock(b)
            seconds.append((clock(a), of_b))
        else:
            seconds.append((clock(a), clock(b)))
    of_a, of_b = np.array(seconds).T
    return of_a / of_b, np.median(of_a), np.median(of_b)


class Report:
    """The rows, printed as they come."""

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
# A training step, without its data


class Step:
    """Forward, backward, clipping, optimizer and EMA of train.py on a batch that is there already."""

    def __init__(self, args, precision=None, **settings):
        self.precision = precision or args.precision
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        settings = {"num_classes": CLASSES, "num_frames": args.num_frames, "use_rope": True} | settings
        self.model = EqM_models[args.model](**settings).to(self.device)
        with torch.no_grad():
            for parameter in self.model.parameters():  # zero-initialised layers would make some products free of work
                parameter.normal_(std=0.02)
        self.ema = deepcopy(self.model).requires_grad_(False)
        if args.compile:
            self.model.compile_blocks()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-9, fused=True)
        side, channels = self.model.config.input_size, self.model.config.in_channels
        self.x = torch.randn(args.batch_size, channels, args.num_frames, side, side, device=self.device)
        self.y = torch.randint(CLASSES, (args.batch_size,), device=self.device)

    def gradients(self):
        with distributed.autocast(self.device, self.precision):
            loss = self.model(self.x, self.y).float().square().mean()
        loss.backward()

    def update(self):
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        optim.update_ema(self.ema, self.model, 0.9999)

    def __call__(self):
        self.gradients()
        self.update()
        self.optimizer.zero_grad()

    def flops(self):
        """FLOPs of forward and backward, of which nearly all are in matrix products and attention."""
        with FlopCounterMode(display=False) as counter, math_attention():  # it does not know the CPU's flash attention
            self.gradients()
        self.optimizer.zero_grad()
        return counter.get_total_flops()

    def products(self):
        """(FLOPs, function) of the matrix products of one block, forward and backward, as F.linear does them."""
        config, D = self.model.config, self.model.config.hidden_size
        t, h, w = config.grid(self.x.shape[2])
        tokens = len(self.x) * t * h * w
        dtype = distributed.HALF.get(self.precision, torch.float32)

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


def step(args, report):
    """The whole step against its floor; what is around forward and backward; bf16 and rotary positions."""
    ours = Step(args)
    product_flops, products = ours.products()
    scale = ours.flops() / product_flops
    values, seconds, of_products = ratios(ours, products, args.pairs)
    floor, rate = scale * of_products, product_flops / of_products / 1e9
    note = f"{seconds:.3f} s; floor {floor:.3f} s at {rate:.0f} GFLOP/s"
    report.add(f"{args.precision} step / floor of its matrix products", values / scale, "<= 1.15", note)
    inner = Step(args)
    values, seconds, _ = ratios(lambda: (inner.gradients(), inner.optimizer.zero_grad()), products, args.pairs)
    report.add("its forward and backward / the same floor", values / scale, None, f"{seconds:.3f} s")
    if torch.cuda.is_available():
        report.add("model FLOPs utilisation", [1 / (value / scale) for value in values], ">= 0.45", "of the rate above")

    updated = Step(args)
    updated.gradients()
    values, update, _ = ratios(updated.update, ours, args.pairs)
    report.add("EMA + optimizer + clipping / step", values, "<= 0.08", f"{update:.3f} s")
    if args.precision == "fp32":
        values, half, whole = ratios(Step(args, "bf16"), ours, args.pairs)
        report.add("bf16 step / fp32 step", values, "<= 0.65", f"{half:.3f} and {whole:.3f} s")


def positions(args, report):
    """Rotary positions against fixed ones, and our rotation against the usual way to write it."""
    values, rotary, fixed = ratios(Step(args), Step(args, use_rope=False), 2 * args.pairs)
    report.add("RoPE step / fixed step", values, "<= 1.01", f"{rotary:.3f} and {fixed:.3f} s")
    model = Step(args).model
    grid, head_dim = model.config.grid(args.num_frames), model.config.head_dim
    shape = (args.batch_size, model.config.num_heads, int(np.prod(grid)), head_dim)
    q = torch.randn(shape, requires_grad=True)
    cos, sin = RotaryEmbedding3D(head_dim, 10_000.0)(grid, torch.full((args.batch_size,), 0.04))
    values, ours, theirs = ratios(
        lambda: apply_rotary(q, cos, sin).sum().backward(), lambda: per_axis(q, grid).sum().backward(), args.pairs
    )
    note = f"{1000 * ours:.1f} and {1000 * theirs:.1f} ms, forward and backward"
    report.add("our rotation / a loop over axes that concatenates", values, "<= 0.25", note)


def energy(args, report):
    """What the second derivative of EqM-E costs."""
    values, ours, plain = ratios(Step(args, ebm="dot"), Step(args), args.pairs)
    report.add("step with --ebm dot / without", values, None, f"{ours:.3f} and {plain:.3f} s")


def per_axis(q, grid, theta=10_000.0):
    """The usual way: for each axis its angles, its channels split in halves, turned, and all concatenated again."""
    B, h, N, d = q.shape
    n, parts = 2 * (d // 6), []
    places = torch.meshgrid(*(torch.arange(size, dtype=torch.float32) for size in grid), indexing="ij")
    for axis, place in enumerate(places):
        part = q[..., axis * n : (axis + 1) * n]
        angles = place.flatten()[:, None] * theta ** -(torch.arange(n // 2) / (n // 2))
        angles = torch.cat([angles, angles], dim=-1)
        turned = torch.cat([-part[..., n // 2 :], part[..., : n // 2]], dim=-1)
        parts.append(part * angles.cos() + turned * angles.sin())
    return torch.cat([*parts, q[..., 3 * n :]], dim=-1)


# ----------------------------------------------------------------------------------------------------------------------
# Memory and growth


def peak_memory(args):
    """MB that model, optimizer, EMA and two steps need at their peak, on the GPU or in this process."""
    before = resident()
    trained = Step(args)
    trained.model.grad_checkpoint = args.grad_checkpoint
    trained(), trained()
    return torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else resident("VmHWM") - before


def resident(which="VmRSS"):
    """MB of this process that are in memory, or with "VmHWM" were at most (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1e3


def memory(args, report):
    """Peak memory over the frames, each in a process of its own."""
    for flags, goals in ((), ("<= 2.0", "<= 4.0")), (("--grad-checkpoint",), ("<= 1.5", "<= 2.5")):
        command = [sys.executable, __file__, "--peak-memory", "--model", args.model, "--precision", args.precision]
        command += ["--batch-size", str(args.batch_size), *flags]
        peaks = []
        for frames in (4, 8, 16):
            done = subprocess.run([*command, "--num-frames", str(frames)], capture_output=True, text=True, check=True)
            peaks.append(float(done.stdout.split()[-1]))
        for frames, peak, goal in zip((8, 16), peaks[1:], goals, strict=True):
            name = f"peak memory at {frames} frames / at 4{', --grad-checkpoint' if flags else ''}"
            report.add(name, peak / peaks[0], goal, f"{peak:.0f} and {peaks[0]:.0f} MB, with model, optimizer and EMA")


def growth(args, report):
    """The time of a step over the frames, and its exponent."""
    counts = (4, 8, 16, 32, 64)
    steps = {frames: Step(argparse.Namespace(**vars(args) | {"num_frames": frames})) for frames in counts}
    rounds = []
    for step in steps.values():
        step()
    for _ in range(max(3, args.pairs // 3)):
        rounds.append([clock(step) for step in steps.values()])
    seconds = np.array(rounds)  # (rounds, counts)
    for last, goal in ((3, "<= 1.3"), (5, None)):
        exponents = np.polyfit(np.log(counts[:last]), np.log(seconds[:, :last]).T, 1)[0]
        middle = ", ".join(f"{value:.2f}" for value in np.median(seconds[:, :last], axis=0))
        report.add(f"exponent of the step time up to {counts[last - 1]} frames", exponents, goal, f"{middle} s")
    report.growth = counts, seconds


def draw_growth(path, args, counts, seconds):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 14, "axes.grid": True, "grid.alpha": 0.3})
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    middle = np.median(seconds, axis=0)
    low, high = np.quantile(seconds, [0.25, 0.75], axis=0)
    axes.errorbar(counts, middle, [middle - low, high - middle], marker="o", capsize=3, label=args.model)
    line = middle[0] * np.array(counts) / counts[0]
    axes.plot(counts, line, color="black", linestyle=":", label="in step with the frames")
    axes.set(xscale="log", yscale="log", xlabel="frames per clip", ylabel="seconds per training step")
    axes.set_xticks(counts, [str(count) for count in counts])
    ticks = 2.0 ** np.arange(np.floor(np.log2(middle[0])), np.ceil(np.log2(middle[-1])) + 1)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=100)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


def stopping(args, report):
    """What it costs two ranks to agree at each step whether a signal asked them to stop; training hides most of it."""
    step = Step(args)
    step()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(agree, (folder, args.pairs), nprocs=2)
        seconds = torch.load(Path(folder, "seconds.pt"), weights_only=True).numpy()
    values = np.array([of_agreeing / clock(step) for of_agreeing in seconds])
    note = f"{1e3 * np.median(seconds):.2g} ms, not overlapped"
    report.add("agreeing on a stop, 2 processes / step", values, "<= 0.005", note)


def agree(rank, folder, count, calls=50):
    """One of the processes; the first writes the seconds of an agreement, (count,)."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)  # as torchrun does
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    stop = StopSignal()

    def many():
        for _ in range(calls):
            stop.ask()
            stop.agreed()

    seconds = torch.tensor([clock(many) / calls for _ in range(count + 1)][1:])
    if rank == 0:
        torch.save(seconds, Path(folder, "seconds.pt"))
    torch.distributed.destroy_process_group()


def sampling(args, report):
    """Guided sampling against as many evaluations of the network on both halves as one batch."""
    trained, evaluations = Step(args), 4
    model, x, device = trained.model.requires_grad_(False), trained.x, trained.device
    scale = torch.full((len(x),), 0.04, device=device)
    both = torch.cat([x, x]), torch.cat([trained.y, trained.y]), torch.cat([scale, scale])

    @torch.no_grad()
    def forward():
        with distributed.autocast(device, args.precision):
            for _ in range(evaluations):
                model(*both)

    def sample():
        generation.generate(
            model, x, trained.y, scale, CLASSES, guidance=4.0, precision=args.precision, show=False,
            method="ngd", num_steps=evaluations + 1, step_size=0.0017, momentum=0.3,
        )  # fmt: skip

    values, ours, floor = ratios(sample, forward, args.pairs, warm_up=1)
    note = f"{ours:.2f} and {floor:.2f} s for {evaluations} evaluations"
    report.add("guided sampling / its evaluations alone", values, "<= 1.05", note)


# ----------------------------------------------------------------------------------------------------------------------
# Data: latents against videos


def data(args, report):
    """Encoding on the fly against a cache, waiting for the loader, reading a few frames of a video."""
    with tempfile.TemporaryDirectory() as folder:
        videos, cache = Path(folder, "videos"), Path(folder, "latents")
        make = [sys.executable, Path(__file__).parent.parent / "datasets/make_moving_shapes.py", "--out", videos]
        of_164_frames = ["--videos-per-class", "2", "--size", "256", "--seconds", "6.56"]
        subprocess.run([*make, *of_164_frames], check=True, capture_output=True)
        few_frames(args, report, "of a video", videos, read_frames)
        write_random_cache(videos, cache)
        few_frames(args, report, "of latents", cache, read_latents)
        loader_and_encoding(args, report, cache)


def few_frames(args, report, what, root, function):
    """As training reads them, from a random start: in a video they have to be decoded up to there (read_frames)."""
    scan = scan_videos(root)
    starts = iter(np.random.default_rng(0).permutation(164 - args.num_frames).tolist() * 100)

    def read(numbers):
        return function(root, scan.videos[0], numbers)

    def some():
        start = next(starts)
        read(range(start, start + args.num_frames))

    values, ours, whole = ratios(some, lambda: read(range(164)), 4 * args.pairs)
    note = f"{1000 * ours:.2g} and {1000 * whole:.2g} ms, 256 px"
    report.add(f"read {args.num_frames} of 164 frames {what} / all", values, "<= 0.3", note)


def write_random_cache(videos, cache, side=32):
    """A latent cache of those videos that nobody has encoded: only its sizes are true."""
    scan = scan_videos(videos)
    for video in scan.videos:
        path = cache / cache_latents.latents_path(video)
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (video.num_frames, 4, side, side)
        safetensors.torch.save_file({name: torch.rand(shape).half() for name in ("mean", "std")}, path)
    cached = [asdict(replace(video, path=cache_latents.latents_path(video))) for video in scan.videos]
    vae = {"vae": "ema", "image_size": 8 * side, "channels": 4, "downsample": 8, "scale": 0.18215, "shift": 0.0}
    settings = {"format": LATENTS_FORMAT, **vae, "flips": False, "unreadable": []}
    (cache / LATENTS).write_text(json.dumps(settings | {"classes": scan.classes, "videos": cached}))


def loader_and_encoding(args, report, cache):
    """A loop of loader and step as in train.py; and what the VAE would add to it."""
    scan, trained, steps = scan_videos(cache), Step(args), 4 * args.pairs
    clips = Clips(cache, scan.videos, scan.classes, args.num_frames, 256, flip=False)
    numbers = Batches(0, steps + 4, args.batch_size, 0, 1)
    batches = iter(DataLoader(clips, batch_sampler=numbers, collate_fn=collate, num_workers=2))
    waited, took = [], []
    for index in range(steps + 4):
        began = time.perf_counter()
        batch = next(batches)
        between = time.perf_counter()
        mean, std = batch["clips"].to(trained.device).float().unbind(1)
        trained.x = mean + std * torch.randn_like(mean)
        trained()
        wait()
        if index >= 4:  # the workers have started
            waited.append(between - began)
            took.append(time.perf_counter() - began)
    waited, took = np.array(waited), np.array(took)
    report.add("loader wait / step, cached, 2 workers", waited / took, "<= 0.05", f"{1000 * np.median(waited):.1f} ms")

    vae = VAE("random weights", AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
    ).requires_grad_(False)).to(trained.device)  # fmt: skip
    pixels = torch.randint(256, (1, 3, 2, 256, 256), dtype=torch.uint8, device=trained.device)
    values, of_two, of_step = ratios(lambda: vae.posterior(pixels), trained, 3, warm_up=1)
    frames = args.batch_size * args.num_frames
    note = f"a frame takes {of_two / 2:.2f} s to encode, a step has {frames}; SD's VAE with random weights"
    gained = 1 + values / 2 * frames * of_step / np.median(took)
    report.add("clips/s from a cache / on the fly", gained, ">= 50", note)


PARTS = {part.__name__: part for part in (step, positions, energy, memory, growth, sampling, data, stopping)}


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
    gpu = torch.cuda.is_available()
    machine = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} threads of {processor()}"
    title = (
        f"{machine}, torch {torch.__version__}, {args.precision}{', compiled' if args.compile else ''}: {args.model}, "
        f"{args.batch_size} clips of {args.num_frames} x 32 x 32 latents"
    )
    print(title, flush=True)
    report, began = Report(), time.monotonic()
    for name in args.only or PARTS:
        PARTS[name](args, report)
    print(f"{time.monotonic() - began:.0f} s")
    if not args.only:
        results = Path(__file__).resolve().parent.parent / "results"
        draw_growth(results / "figures/growth.png", args, *report.growth)
        (results / "benchmark.md").write_text(f"{title}\n\n{report.markdown()}\n")
        frames, seconds = report.growth
        result = {"title": title, "rows": report.rows, "frames": frames, "seconds_per_step": seconds.tolist()}
        (results / "benchmark.json").write_text(json.dumps(result, indent=1) + "\n")


def processor():
    """Its name as Linux knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
