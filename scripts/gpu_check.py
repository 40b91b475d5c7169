"""What scripts/gpu_check.sh runs: a GPU against the CPU, flags, ranks, a kill, speed, a save.

Each part prints its rows as they come; at the end they go to results/gpu.md. Limits are a few times what rounding was
measured to make on a CPU: above what other kernels make of it, far below what a mistake makes.
"""

import argparse
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

# Let waiting threads sleep instead of spin: beside other work a step with spinning threads takes many times as long.
# Must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "EqM"))
import benchmark
import checkpoint
from models import EqM, model_config
from runtime.atomic import atomic_write
from runtime.cli import COUNT, ArgumentParser, UserError, check_writable, fail, has_bf16, one_line_errors
from runtime.distributed import autocast, set_precision
from runtime.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# Largest relative errors of outputs and of gradients. On a CPU EqM-S/4 has 6e-7 and 3e-6 in fp32, where other kernels
# add in another order, and 7e-3 and 4e-2 in bf16. tf32 and fp16 have 3 bits more than bf16, so an eighth of its limits
# (fp16 has 9e-4 and 6e-3).
ERRORS = {"fp32": (1e-5, 1e-4), "tf32": (2.5e-3, 1.3e-2), "bf16": (2e-2, 0.1), "fp16": (2.5e-3, 1.3e-2)}
MEASURED = {"clips_per_s", "tflops_per_s", "mfu", "gpu_memory_gb", "wait_frac", "seconds", "val_seconds"}
HEADER = "| what | measured | at most | | |\n|---|---|---|---|---|"
NO_END = 600  # seconds after which a run hangs


def parse_args():
    parser = ArgumentParser(description="Check that a machine with GPUs trains as it should, and measure its speed.")
    gpus = "how many GPUs the parts with several ranks use; default: all, without a GPU 2 processes"
    parser.add_argument("gpus", nargs="?", type=COUNT, metavar="GPUS", help=gpus)
    out = "file for the tables; default: results/gpu.md, without a GPU none"
    parser.add_argument("--out", type=Path, metavar="FILE", help=out)
    args = parser.parse_args()
    found = torch.cuda.device_count()
    if ON_GPU and (args.gpus or 0) > found:
        raise UserError(f"GPUS {args.gpus}: this machine has {found}; give at most as many")
    args.gpus = args.gpus or found or 2
    args.out = args.out or (ROOT / "results/gpu.md" if ON_GPU else None)
    if args.out:
        check_writable("--out", args.out.parent)
        if args.out.is_dir():
            raise UserError(f"--out {args.out}: a folder is in the way; name a file")
    return args


class Checks:
    """The parts, each with its rows: what was compared, the measured value, its limit. NaN is above every limit."""

    def __init__(self, title):
        self.lines, self.failed, self.count = [f"# {title}"], [], 0
        print(title, flush=True)

    def part(self, heading, text, header=HEADER):
        """Begin a part: its heading, what it does, the first lines of its table."""
        self.lines += ["", f"## {heading}", "", text, "", *header.splitlines()]
        print(f"\n{heading}. {text}", flush=True)

    def add(self, what, value, limit, note=""):
        """A row that is ok or FAILED."""
        self.count += 1
        verdict = "ok" if value <= limit else "FAILED"
        if verdict != "ok":
            self.failed.append(what)
        self.lines.append(f"| {what} | {value:.2g} | {limit:g} | {verdict} | {note} |")
        print(f"{verdict}: {what}: {value:.2g}, at most {limit:g}{f'; {note}' if note else ''}", flush=True)

    def show(self, what, value, note):
        """A row without a limit: its part has a header of its own."""
        self.lines.append(f"| {what} | {value:.2g} | {note} |")
        print(f"{what}: {value:.2g} s; {note}", flush=True)

    def summary(self):
        """One line; it names what failed."""
        if not self.failed:
            return f"all {self.count} checks are ok"
        return f"{len(self.failed)} of {self.count} checks FAILED: {'; '.join(self.failed)}"


# ----------------------------------------------------------------------------------------------------------------------
# Outputs and gradients


def relative_error(value, reference):
    """The norm of the difference / the norm of the reference, in float64."""
    value, reference = value.detach().double().cpu(), reference.detach().double().cpu()
    return ((value - reference).norm() / reference.norm()).item()


@torch.no_grad()
def random_network(config, seed=0):
    """A network in float64 in which every block changes the output: as it is initialised, its output is zero."""
    with warnings.catch_warnings(action="ignore"):
        network = EqM(config).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        std = 1 / math.sqrt(parameter[0].numel()) if parameter.dim() > 1 else 0.3
        parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return network


def outputs_and_gradients(network, x, y, time_scale, direction, precision):
    """The output f and the gradients of sum(f * direction) in all parameters, of the network on the device of x."""
    with autocast(x.device, precision):
        f = network(x, y, time_scale)
    return f, torch.autograd.grad(f, list(network.parameters()), direction.to(f.dtype))


def network_errors(network, reference, inputs, precision):
    """Relative errors (of the output, of the worst parameter's gradient) on DEVICE against the float64 reference."""
    set_precision(precision)
    x, y, time_scale, direction = (part.to(DEVICE) for part in inputs)
    on_device = deepcopy(network).float().to(DEVICE)
    f, gradients = outputs_and_gradients(on_device, x.float(), y, time_scale, direction.float(), precision)
    set_precision("fp32")
    worst = max(map(relative_error, gradients, reference[1]))
    return relative_error(f, reference[0]), worst


def check_outputs(checks, args):
    """6 frames do not fill the second temporal patch of 4: the clip is padded inside the network."""
    size = {"num_classes": 12, "num_frames": 6, "temporal_patch_size": 4}
    model = "EqM-S/4" if ON_GPU else "EqM-Ti/4"
    size |= {} if ON_GPU else {"depth": 2, "input_size": 16}
    against = "of the GPU" if ON_GPU else "of the CPU (there is no GPU: this says nothing about one)"
    checks.part(
        "Outputs and gradients",
        f"{model}, random weights, 2 clips of 6 frames: relative errors {against} against float64 on the CPU. Of the "
        "gradients that of the worst parameter.",
    )
    cases = {
        "fixed positions": {},
        "rotary": {"use_rope": True},
        "rotary, qk_norm": {"use_rope": True, "qk_norm": True},
        "rotary, moving, position table": {"use_rope": True, "rope_speed": 0.5, "position_table": "space"},
    }
    generator = torch.Generator().manual_seed(1)
    for case, settings in cases.items():
        config = model_config(model, **size, **settings)
        network, shape = random_network(config), (2, config.in_channels, 6, config.input_size, config.input_size)
        x, direction = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        inputs = x, torch.tensor([3, 12]), torch.tensor([0.04, 0.08]), direction
        reference = outputs_and_gradients(network, *inputs, "fp32")
        for precision in precisions():
            errors = network_errors(network, reference, inputs, precision)
            for part, error, limit in zip(("output", "gradients"), errors, ERRORS[precision], strict=True):
                checks.add(f"{precision}, {case}: {part}", error, limit)


def precisions():
    """Those that this machine has."""
    if not ON_GPU:
        return ["fp32", "bf16"]
    return ["fp32", *["tf32", "bf16"] * has_bf16(), "fp16"]


# ----------------------------------------------------------------------------------------------------------------------
# Training runs


@dataclass
class Runs:
    """Short runs of EqM/train.py on Moving Shapes, small enough for the GPU to wait for the loader."""

    root: Path  # for the data and, by name, for logs and results
    steps: int
    batch: int

    def start(self, name, ranks, *flags):
        """The process of torchrun, or with no ranks of plain Python, in a session of its own."""
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
        command = [
            sys.executable, *launcher, ROOT / "EqM/train.py", "--video", "--model", "EqM-Ti/2", "--depth", 2,
            "--hidden-size", 96, "--num-heads", 2, "--use-rope", "--num-frames", 4, "--vae", "none", "--image-size", 16,
            "--no-flip", "--data-path", self.root / "shapes", "--results-dir", self.root / name, "--lr", 1e-3,
            "--max-steps", self.steps, "--global-batch-size", self.batch, "--num-workers", 0, "--val-clips", 4,
            "--log-every", 10, "--sample-every", 0, "--ckpt-every", self.steps // 4, *flags,
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        with open(self.log(name), "a") as log:
            return subprocess.Popen(
                [str(part) for part in command], stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def run(self, name, ranks, *flags):
        """(last row of metrics, clips/s in words); ({}, what went wrong) if the run does not end well."""
        process = self.start(name, ranks, *flags)
        try:
            status = process.wait(timeout=NO_END)
        except subprocess.TimeoutExpired:
            return {}, f"no end after {NO_END} s"
        finally:
            kill_all(process)
        if status != 0:
            return {}, f"status {status}: {error_line(self.log(name).read_text())}"
        row = self.rows(name)[-1]
        return row, f"{row['clips_per_s']:.0f} clips/s"

    def log(self, name):
        return self.root / f"{name}.log"

    def rows(self, name):
        paths = list((self.root / name).glob("*/metrics.jsonl"))
        return read_metrics(paths[0])[0] if paths else []

    def saved_step(self, name):
        """The step of the newest numbered checkpoint, 0 without one."""
        paths = (self.root / name).glob("*/checkpoints/[0-9]*.pt")
        return max((int(path.stem) for path in paths), default=0)


def make_runs(root, args):
    make = [sys.executable, ROOT / "datasets/make_moving_shapes.py", "--out", root / "shapes"]
    subprocess.run([*make, "--videos-per-class", "2", "--size", "16"], check=True, capture_output=True)
    clips = 16 if ON_GPU else 8
    return Runs(root, 60 if ON_GPU else 40, args.gpus * math.ceil(clips / args.gpus))


def error_line(log):
    """What a log says of its end: our first line with an error, else that of the last exception, else the last."""
    lines = [line for line in log.replace("\r", "\n").splitlines() if line.strip()]
    ours = [line for line in lines if ".py: error: " in line]
    others = [line for line in lines if "Error: " in line and "ChildFailedError" not in line]  # that is torchrun's
    return (ours[:1] or others[-1:] or lines[-1:] or ["no output"])[0].strip().replace("|", "/")


def distance(row, other, names):
    """The largest relative difference of two rows of metrics in these names; NaN if one lacks them."""
    pairs = [(row.get(name), other.get(name)) for name in names]
    if any(None in pair for pair in pairs):
        return math.nan
    return max(0.0 if one == two else abs(one - two) / max(abs(two), 1e-12) for one, two in pairs)


# flags: how far the training loss may be from that of a plain run in fp32. After 60 steps on a CPU it is 9e-4 for bf16,
# 2e-5 for fp16 and less than 1e-7 for --compile. Later differences grow, as between any runs that round differently.
ROUNDING = {
    (): 1e-2,  # the precision that a run chooses by itself
    ("--compile", "--precision", "fp32"): 1e-3,
    ("--grad-checkpoint", "--precision", "fp32"): 1e-3,
    ("--precision", "tf32"): 5e-3,
    ("--precision", "bf16"): 1e-2,
    ("--precision", "fp16"): 5e-3,
}
# Losses of other kinds of training, / the plain one. On a CPU: muon 0.88, disp 0.98, ebm 0.43.
OTHER_TRAINING = [("--optimizer", "muon"), ("--disp",), ("--ebm", "dot")]
ON_A_CPU = [("--grad-checkpoint", "--precision", "fp32"), ("--precision", "bf16"), ("--optimizer", "muon")]


def check_flags(checks, runs):
    """Returns the last row of the plain run."""
    checks.part(
        "Flags",
        f"torchrun EqM/train.py, one rank, {runs.steps} steps of {runs.batch} clips, a small model: status 0, and the "
        "last training loss against that of a plain run in fp32 with the same draws. Clips/s are those of the loader.",
    )
    plain, note = runs.run("plain", 1, "--precision", "fp32")
    checks.add("--precision fp32: status", 0 if plain else math.nan, 0, note)
    for flags, limit in ROUNDING.items():
        known = "--precision" not in flags or flags[-1] in precisions()
        if known and (ON_GPU or flags in ON_A_CPU):
            row, note = runs.run("-".join(["run", *flags]), 1, *flags)
            what = f"{' '.join(flags) or 'no flags'}: relative difference of the loss"
            checks.add(what, distance(row, plain, ["train_loss"]), limit, note)
    for flags in OTHER_TRAINING:
        if ON_GPU or flags in ON_A_CPU:
            row, note = runs.run("-".join(["run", *flags]), 1, *flags, "--precision", "fp32")
            ratio = row.get("train_loss", math.nan) / plain.get("train_loss", math.nan)
            checks.add(f"{' '.join(flags)}, which trains differently: loss / plain loss", ratio, 1.1, note)
    return plain


def check_ranks(checks, runs, ranks, plain):
    """Returns the last row of the run of that many ranks."""
    what = f"{ranks} ranks against 1" if ranks > 1 else "1 rank of torchrun against a plain `python`, without DDP"
    checks.part("Ranks", f"{what}, the same global batch of {runs.batch} clips, fp32.")
    if ranks > 1:
        row, note = runs.run("ranks", ranks, "--precision", "fp32")
        whole = row
    else:
        row, note = runs.run("python", 0, "--precision", "fp32")
        whole = plain
    names = ["train_loss", "grad_norm", "val_loss"]
    checks.add("largest relative difference of losses and gradient norm", distance(row, plain, names), 1e-3, note)
    if ranks > 1 and ON_GPU:
        row, note = runs.run("shard", ranks, "--precision", "fp32", "--shard")
        checks.add("--shard: the same difference", distance(row, plain, names), 1e-3, note)
    return whole


# ----------------------------------------------------------------------------------------------------------------------
# A kill


def check_resume(checks, runs, ranks, whole):
    limit = 1e-3 if ON_GPU else 0
    why = "the backward pass of attention adds in no fixed order on a GPU" if ON_GPU else "on a CPU bit for bit"
    checks.part(
        "A kill and a resume",
        f"All processes of a run of {ranks} {'rank' if ranks == 1 else 'ranks'} die by SIGKILL half-way; --resume "
        "finishes it. The last row of its metrics (losses, gradient norm, validation) against that of the undisturbed "
        f"run; {why}.",
    )
    process = runs.start("killed", ranks, "--precision", "fp32")
    try:
        note = wait_for_step(process, runs, "killed", runs.steps // 2)
    finally:
        kill_all(process)
    row = {}
    if not note:
        killed, saved = runs.rows("killed")[-1]["step"], runs.saved_step("killed")
        row, note = runs.run("killed", ranks, "--precision", "fp32", "--resume")
        note = note if not row else f"killed after step {killed} of {runs.steps}, went on from step {saved}"
        row = row if saved else {}
    names = sorted(whole.keys() - MEASURED) or ["train_loss"]
    checks.add("largest relative difference of a value", distance(row, whole, names), limit, note)


def wait_for_step(process, runs, name, step):
    """Wait until a run has logged a step; returns what went wrong, "" if nothing did."""
    until = time.monotonic() + NO_END
    while time.monotonic() < until:
        if process.poll() is not None:
            return f"ended before it was killed: {error_line(runs.log(name).read_text())}"
        if any(row["step"] >= step for row in runs.rows(name)):
            return ""
        time.sleep(0.02)
    return f"no step {step} within {NO_END} s"


def kill_all(process):
    """SIGKILL for a process and all that it has started, children first: a rank has a session of its own."""
    if process.poll() is not None:
        return
    parents, found = {}, [process.pid]
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            parents[int(place.name)] = int((place / "stat").read_text().rsplit(")", 1)[1].split()[1])
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    for pid in reversed(found):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


# ----------------------------------------------------------------------------------------------------------------------
# Speed


def benchmark_args():
    precision = "fp16" if ON_GPU and not has_bf16() else "bf16"
    return argparse.Namespace(precision=precision, compile=ON_GPU, pairs=10 if ON_GPU else 3)


def check_speed(checks, args):
    flags = benchmark_args()
    checks.part(
        "Speed",
        f"A training step on random latents of 32 x 32 x 4, {flags.precision}{', compiled' if flags.compile else ''}: "
        "forward, backward, clipping, AdamW, EMA, without loading. Medians. MFU: FLOPs / the highest rate of the GPU.",
        benchmark.sizes_table([]),
    )
    report = benchmark.Report()
    print(benchmark.sizes_table([]).splitlines()[0])
    benchmark.measure_sizes(flags, report)
    checks.lines += benchmark.sizes_table(report.sizes).splitlines()[2:]


def check_save(checks, args):
    model = "EqM-B/2" if ON_GPU else "EqM-Ti/4"
    checks.part(
        "A save",
        f"For how long training stands still for a save of {model} with EMA and optimizer, and until the file is on "
        "the disk (of the temporary folder). The median of three saves after the first.",
        "| what | s | |\n|---|---|---|",
    )
    step = benchmark.Step(benchmark.changed(benchmark_args(), model=model, num_frames=4, batch_size=1, compile=False))
    step()
    state = {"model": step.model.state_dict(), "ema": step.ema.state_dict()}
    state["optimizer"] = [optimizer.state_dict() for optimizer in step.optimizers]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "checkpoints").mkdir()
        writer = checkpoint.Writer(folder)
        first, *others = [time_save(writer, state) for _ in range(4)]
        size, wrong = writer.path.stat().st_size / 1e6, count_wrong(writer, step)
    stands, whole = (statistics.median(times) for times in zip(*others, strict=True))
    checks.show("training stands still", stands, f"for the first save {first[0]:.2g} s")
    checks.show("whole save", whole, f"{size:.0f} MB; the first {first[1]:.2g} s")
    checks.part("What is saved", "The weights in the file against those at the call; they change right after it.")
    checks.add("tensors that differ", wrong, 0)


def count_wrong(writer, step):
    """How many weights in a file are not those at the call of `write`, after which training has gone on at once."""
    weights = step.model.state_dict()
    expected = {name: weight.clone() for name, weight in weights.items()}
    writer.write({"model": weights}, [], before=lambda: None, after=lambda: None)
    with torch.no_grad():
        torch._foreach_add_(list(step.model.parameters()), 1.0)
    writer.wait()
    saved = torch.load(writer.path, weights_only=True)["model"]
    return sum(not torch.equal(saved[name], weight.cpu()) for name, weight in expected.items())


def time_save(writer, state):
    """Seconds until a save lets training go on, and until it is done."""
    benchmark.synchronize()
    began = time.perf_counter()
    writer.write(state, [], before=lambda: None, after=lambda: None)
    benchmark.synchronize()  # the next step would wait for the copies
    stands = time.perf_counter() - began
    writer.wait()
    return stands, time.perf_counter() - began


def title(args):
    if not ON_GPU:
        return f"GPU check WITHOUT a GPU, torch {torch.__version__}: tiny sizes, which only show that the script works"
    return f"GPU check: {args.gpus} x {torch.cuda.get_device_name()}, torch {torch.__version__}"


@one_line_errors()
def main():
    try:
        args = parse_args()
    except UserError as error:
        fail(error)
    began, checks = time.monotonic(), Checks(title(args))
    root = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    check_outputs(checks, args)
    runs = make_runs(root, args)
    plain = check_flags(checks, runs)
    whole = check_ranks(checks, runs, args.gpus, plain)
    check_resume(checks, runs, args.gpus, whole)
    check_speed(checks, args)
    check_save(checks, args)
    checks.lines += ["", f"{checks.summary()[0].upper()}{checks.summary()[1:]}; {time.monotonic() - began:.0f} s."]
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(args.out) as file:
            file.write(("\n".join(checks.lines) + "\n").encode())
    if checks.failed:
        fail(f"{checks.summary()}; the logs of the runs are in {root}", status=1)
    shutil.rmtree(root)
    print(f"\n{checks.summary()}; {time.monotonic() - began:.0f} s{f'; see {args.out}' if args.out else ''}")


if __name__ == "__main__":
    main()
