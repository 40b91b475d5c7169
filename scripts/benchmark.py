"""How much a training step costs, side by side in one process: ratios, with their spread.

    python scripts/benchmark.py                 RoPE / fixed: EqM-S/4, 4 clips of 16 x 32 x 32 latents, 2 minutes
    python scripts/benchmark.py --compare dot   an energy (EqM-E) / none, both with RoPE
    python scripts/benchmark.py --precision bf16 --pairs 30

Seconds on a shared machine say little, so the two sides take turns and each pair gives one ratio.
"""

import platform
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "EqM"))
from distributed import ArgumentParser, number
from models import NAMES, EqM_models

PAIRS = {  # what is compared: (with it, without it)
    "rope": ({"use_rope": True}, {"use_rope": False}),
    "dot": ({"use_rope": True, "ebm": "dot"}, {"use_rope": True}),
    "l2": ({"use_rope": True, "ebm": "l2"}, {"use_rope": True}),
}


def parse_args():
    parser = ArgumentParser(description="The cost of a training step with something / without it.")
    count = number(int, least=1)
    parser.add_argument("--compare", choices=PAIRS, default="rope", help="rope / fixed positions, or an energy / none")
    parser.add_argument("--model", choices=NAMES, default="EqM-S/4", metavar="NAME", help="EqM-S/4 ...")
    parser.add_argument("--num-frames", type=count, default=16, metavar="N", help="frames per clip")
    parser.add_argument("--batch-size", type=count, default=4, metavar="N", help="clips per step")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16 is mixed precision")
    parser.add_argument("--pairs", type=number(int, least=3), default=25, metavar="N", help="pairs of steps measured")
    return parser.parse_args()


def make_step(args, device, settings):
    """A function that runs forward and backward of one batch and returns the seconds it took."""
    torch.manual_seed(0)
    model = EqM_models[args.model](num_classes=101, num_frames=args.num_frames, **settings).to(device)
    with torch.no_grad():
        for parameter in model.parameters():  # zero-initialised layers would make some products free of work
            parameter.normal_(std=0.02)
    side, channels = model.config.input_size, model.config.in_channels
    x = torch.randn(args.batch_size, channels, args.num_frames, side, side, device=device)
    y = torch.randint(101, (args.batch_size,), device=device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def step():
        wait()
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            loss = model(x, y).float().square().mean()
        loss.backward()
        model.zero_grad()
        wait()
        return time.perf_counter() - began

    return step


def compare(step, base, pairs):
    """The ratio step / base of each pair, and the seconds of base; who goes first alternates."""
    for warm_up in (base, step, base, step):
        warm_up()
    ratios, seconds = [], []
    for pair in range(pairs):
        first, second = (base, step) if pair % 2 else (step, base)
        a, b = first(), second()
        of_base, of_step = (a, b) if pair % 2 else (b, a)
        ratios.append(of_step / of_base)
        seconds.append(of_base)
    return torch.tensor(ratios), torch.tensor(seconds)


def main():
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{platform.machine()}, {machine}, torch {torch.__version__}, {args.precision}")
    print(f"{args.model}, {args.batch_size} x {args.num_frames} frames, forward and backward, {args.pairs} pairs")
    ratios, seconds = compare(*(make_step(args, device, settings) for settings in PAIRS[args.compare]), args.pairs)
    low, middle, high = ratios.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    # The median has about 1.25 x the standard error of the mean; the quartiles stand for the noise of one pair.
    error = 1.25 * (high - low) / 1.35 / len(ratios) ** 0.5
    print(f"a step without {args.compare} {seconds.median():.3f} s")
    print(f"a step with {args.compare} / without {middle:.3f} +- {error:.3f} (quartiles {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
