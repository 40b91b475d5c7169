"""A GPU against the CPU, speed flags, ranks, a kill, a save. scripts/gpu_check.py runs this and
collects the rows.

Limits are a few times what rounding was measured to make on a CPU: above what other kernels make of
it, far below what a mistake makes. Without a GPU the sizes are tiny. GPUS is the number of ranks.
"""

import math
import os
from copy import deepcopy
from dataclasses import replace
from functools import partial
from shlex import split
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import benchmark
import checkpoint
import memory
from models import EqM, model_config
from process import kill_all
from runtime.cli import precisions
from runtime.distributed import autocast, set_precision
from test_models import distance as relative_error
from training import PYTHON, ROOT, TORCHRUN, Training

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
PRECISIONS = precisions()
RANKS = int(os.environ.get("GPUS", 0)) or torch.cuda.device_count() or 2
STEPS = 60 if ON_GPU else 40


def checker(record, part):
    """A function that notes a value and its limit, and fails above it; NaN is above every limit."""

    def check(what, value, limit, note=""):
        verdict = "ok" if value <= limit else "FAILED"
        record(part, f"| {what} | {value:.2g} | {limit:g} | {verdict} | {note} |")
        assert verdict == "ok", f"{what}: {value:.2g}, at most {limit:g}; {note}"

    return check


@pytest.fixture
def check(record_property, request):
    return checker(record_property, " ".join(request.function.__doc__.split()))


# Outputs and gradients ----------------------------------------------------------------------------

# Largest relative errors of outputs and of gradients. On a CPU EqM-S/4 has 6e-7 and 3e-6 in fp32,
# 7e-3 and 4e-2 in bf16 and 9e-4 and 6e-3 in fp16. tf32 and fp16 have 3 bits more than bf16, so an
# eighth of its limits.
ERRORS = {
    "fp32": (1e-5, 1e-4),
    "tf32": (2.5e-3, 1.3e-2),
    "bf16": (2e-2, 0.1),
    "fp16": (2.5e-3, 1.3e-2),
}
POSITIONS = {
    "fixed positions": {},
    "rotary": {"use_rope": True},
    "rotary, qk_norm": {"use_rope": True, "qk_norm": True},
    "rotary, moving, position table": {
        "use_rope": True,
        "rope_speed": 0.5,
        "position_table": "space",
    },
}


@torch.no_grad()
def random_network(config):
    """A network in float64 in which every block changes the output: as it is initialized, its
    output is zero.
    """
    network = EqM(config).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        std = 1 / math.sqrt(parameter[0].numel()) if parameter.dim() > 1 else 0.3
        parameter.normal_(std=std, generator=generator)
    return network


def random_inputs(config, num_frames):
    """Two clips, their classes (the second has none) and time scales, and the gradient of the
    output.
    """
    generator = torch.Generator().manual_seed(1)
    shape = (2, 2, config.in_channels, num_frames, config.input_size, config.input_size)
    x, direction = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x, torch.tensor([1, config.num_classes]), torch.tensor([0.04, 0.08]), direction


def outputs_and_gradients(network, x, y, time_scale, direction, precision="fp32"):
    """The output f and the gradients of sum(f * direction) in all parameters, of the network on the
    device of x.
    """
    with autocast(x.device, precision):
        f = network(x, y, time_scale)
    return f.detach(), *torch.autograd.grad(f, list(network.parameters()), direction.to(f.dtype))


def network_errors(network, reference, inputs, precision):
    """Relative errors (of the output, of the worst parameter's gradient) on DEVICE against the
    float64 reference.
    """
    set_precision(precision)
    x, y, time_scale, direction = (part.to(DEVICE) for part in inputs)
    on_device = deepcopy(network).float().to(DEVICE)
    results = outputs_and_gradients(
        on_device,
        x.float(),
        y,
        time_scale,
        direction.float(),
        precision,
    )
    set_precision("fp32")
    results = [part.double().cpu() for part in results]
    output, *gradients = map(relative_error, results, reference)
    return output, max(gradients)


@pytest.mark.parametrize("case", POSITIONS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_outputs_and_gradients(case, precision, check):
    """Relative errors of the device against float64 on the CPU: outputs, and the worst gradient of
    a parameter.
    """
    model = "EqM-S/4"
    size = {}
    if not ON_GPU:
        model = "EqM-Ti/4"
        size = {"depth": 2, "input_size": 16}
    config = model_config(  # 6 frames do not fill the second patch
        model,
        num_classes=12,
        num_frames=6,
        temporal_patch_size=4,
        **size,
        **POSITIONS[case],
    )
    network = random_network(config)
    inputs = random_inputs(config, 6)
    errors = network_errors(network, outputs_and_gradients(network, *inputs), inputs, precision)
    for part, error, limit in zip(("output", "gradients"), errors, ERRORS[precision], strict=True):
        check(f"{precision}, {case}: {part}", error, limit)


def test_hub(check):
    """A clip of torch.hub on the device against the CPU, fp32: mean difference in gray levels."""
    demo = ROOT / "results/demo"
    flags = {"classes": ["CircleLeft"], "num_frames": 8, "precision": "fp32", "weak_ckpt": demo}
    clips = []
    for device in (DEVICE, "cpu"):
        sampler = torch.hub.load(str(ROOT), "demo", source="local", device=device)
        clips.append(sampler(**flags).float())
    check("demo", (clips[0] - clips[1]).abs().mean().item(), 1.0)


# Training runs ------------------------------------------------------------------------------------

# Flags ("": the precision that a run chooses by itself): how far the training loss may be from that
# of a plain run in fp32. After 60 steps on a CPU it is 9e-4 for bf16, 2e-5 for fp16 and less than
# 1e-7 for --compile.
ROUNDING = {
    "": 1e-2,
    "--compile --precision fp32": 1e-3,
    "--grad-checkpoint --precision fp32": 1e-3,
    "--grad-checkpoint selective --compile --precision fp32": 1e-3,
    "--precision tf32": 5e-3,
    "--precision bf16": 1e-2,
    "--precision fp16": 5e-3,
}
# Losses of other kinds of training, / the plain one. On a CPU: muon 0.88, disp 0.98, ebm 0.43.
OTHER_TRAINING = ["--optimizer muon", "--disp", "--ebm dot"]
SHARDED = ["--shard", "--compile --shard"]  # against one process in fp32
ON_A_CPU = ["--grad-checkpoint --precision fp32", "--precision bf16", "--optimizer muon"]


@pytest.fixture(scope="module")
def run(shapes, tmp_path_factory):
    """A function that trains, with torchrun if there are `ranks`, and returns the run.

    It is small enough for the GPU to wait for the loader.
    """
    batch = RANKS * math.ceil((16 if ON_GPU else 8) / RANKS)
    usual = split(f"""
        --model EqM-Ti/2
        --global-batch-size {batch}
        --log-every 10
        --sample-every 0
        --ckpt-every {STEPS // 4}
    """)
    folder = tmp_path_factory.mktemp("runs")

    def run(name, *flags, ranks=1):
        launcher = [*TORCHRUN[:-1], f"--nproc_per_node={ranks}"] if ranks else PYTHON
        training = Training(shapes, folder / name, STEPS, launcher, usual)
        training.run(*flags, timeout=600)
        return training

    return run


@pytest.fixture(scope="module")
def plain(run):
    return run("plain", "--precision", "fp32")


@pytest.fixture(scope="module")
def all_ranks(run, plain):
    return run("ranks", "--precision", "fp32", ranks=RANKS) if RANKS > 1 else plain


LOSSES = ("train_loss", "grad_norm", "val_loss")


def distance(one, other, *names):
    """The largest relative difference of the last rows of two runs in these metrics; of all without
    names.
    """
    row = one.rows()[-1]
    expected = other.rows()[-1]
    return max(
        abs(row[name] - expected[name]) / max(abs(expected[name]), 1e-12)
        for name in names or expected
    )


@pytest.mark.parametrize("flags", [flags for flags in ROUNDING if ON_GPU or flags in ON_A_CPU])
def test_speed_flags(flags, plain, run, check):
    """The last training loss with a flag against a plain run in fp32 with the same draws: relative
    difference.
    """
    if "--precision" in flags and flags.split()[-1] not in PRECISIONS:
        pytest.skip("this GPU does not have it")
    other = run(f"run {flags}", *flags.split())
    check(flags or "no flags", distance(other, plain, "train_loss"), ROUNDING[flags])


@pytest.mark.parametrize(
    "flags", [flags for flags in OTHER_TRAINING if ON_GPU or flags in ON_A_CPU]
)
def test_other_training(flags, plain, run, check):
    """Other kinds of training: the last training loss / the plain one."""
    loss = run(f"run {flags}", *flags.split(), "--precision", "fp32").rows()[-1]["train_loss"]
    check(flags, loss / plain.rows()[-1]["train_loss"], 1.1)


@pytest.mark.skipif(not ON_GPU, reason="FlexAttention has no backward pass on a CPU")
def test_flex_attention(run, check):
    """The last training loss of compiled causal models, which use FlexAttention, against one that
    is not compiled: relative difference.
    """
    flags = ["--causal", "--num-frames", "8", "--precision", "fp32"]
    usual = run("causal", *flags)
    for more in ("--compile", "--compile --grad-checkpoint selective"):
        compiled = run(f"causal {more}", *flags, *more.split())
        check(f"--causal {more}", distance(compiled, usual, "train_loss"), 1e-3)


def test_ranks(plain, all_ranks, run, check):
    """Several ranks (or one of torchrun) against one process, the same global batch, fp32: losses,
    gradient norms.
    """
    if RANKS == 1:
        others = {"1 rank / plain": run("python", ranks=0)}
    else:
        others = {f"{RANKS} ranks / 1": all_ranks}
    is_sharded = RANKS > 1 and ON_GPU
    for flags in SHARDED if is_sharded else ():
        sharded = run(flags, "--precision", "fp32", *flags.split(), ranks=RANKS)
        others[f"{RANKS} ranks, {flags} / 1"] = sharded
    for name, other in others.items():
        check(name, distance(other, plain, *LOSSES), 1e-3)
    if is_sharded and "bf16" in PRECISIONS:  # --shard gathers rounded weights
        sharded = run("bf16 --shard", "--precision", "bf16", "--shard", ranks=RANKS)
        whole = run("bf16", "--precision", "bf16", ranks=RANKS)
        check("--shard / without, bf16", distance(sharded, whole, *LOSSES), 1e-2)


@pytest.mark.skipif(
    not ON_GPU or "bf16" not in PRECISIONS, reason="counts the memory of a GPU, in bf16"
)
@pytest.mark.parametrize(
    "row",
    [row for row in memory.read_rows() if row["model"] == "XL/2"],
    ids=lambda row: row["flag"],
)
def test_memory(row, check):
    """Peak memory of a step of EqM-XL/2 with 2 clips of 16 frames, bf16, against the counts:
    relative difference.
    """
    expected = memory.STATES * row["weights"] + 1e6 * (row["peak_once_mb"] + 2 * row["peak_mb"])
    if torch.cuda.get_device_properties(0).total_memory < 1.1 * expected:
        pytest.skip(f"takes {expected / 1e9:.0f} GB")
    args = SimpleNamespace(
        model="EqM-XL/2",
        num_frames=memory.COUNTED,
        batch_size=2,
        precision="bf16",
        compile=False,
    )
    step = benchmark.Step(args, num_classes=memory.SETTINGS["num_classes"])
    step.model.grad_checkpoint = None if row["flag"] == "off" else row["flag"]
    step()  # makes the optimizer states
    step.backward()  # gradients exist all the time, as in the buckets of DDP
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated()
    del step
    torch.cuda.empty_cache()
    note = f"{peak / 1e9:.2f} GB"
    check(f"--grad-checkpoint {row['flag']}", abs(peak / expected - 1), 0.1, note)


def test_a_kill_and_a_resume(all_ranks, check):
    """All processes of a run die half-way by SIGKILL and --resume ends it: its last metrics against
    the whole run's.
    """
    killed = replace(all_ranks, results=all_ranks.results.with_name("killed"))
    process = killed.start("--precision", "fp32", until=STEPS // 2)
    kill_all(process)
    process.communicate()
    step = killed.last_step()
    saved = max(int(path.stem) for path in killed.folder.glob("checkpoints/[0-9]*.pt"))
    assert 0 < saved <= step < STEPS
    killed.run("--precision", "fp32", "--resume", timeout=600)
    limit = 1e-3 if ON_GPU else 0  # the backward pass of attention adds in no fixed order on a GPU
    note = f"killed after step {step}, resumed from {saved}"
    check("resumed / whole", distance(killed, all_ranks), limit, note)


def test_a_save(tmp_path, check):
    """A save, which overlaps training: seconds until training continues, MB, tensors that
    differ.
    """
    args = SimpleNamespace(
        model="EqM-B/2" if ON_GPU else "EqM-Ti/4",
        num_frames=4,
        batch_size=1,
        precision=PRECISIONS[-1],
        compile=False,
    )
    step = benchmark.Step(args)
    step()
    expected = deepcopy(step.model).cpu().state_dict()
    state = {
        "step": 0,
        "model": step.model.state_dict(),
        "ema": step.ema.state_dict(),
        "optimizer": [optimizer.state_dict() for optimizer in step.optimizers],
    }
    (tmp_path / "checkpoints").mkdir()
    writer = checkpoint.Writer(tmp_path)
    write = partial(writer.write, state, [], before=lambda: None, after=lambda: None)
    times = []
    for _ in range(4):
        times.append([benchmark.seconds_of(write), benchmark.seconds_of(writer.wait)])
    pause, wait = np.median(times[1:], axis=0)  # the first one takes longer
    note = f"{writer.path.stat().st_size / 1e6:.0f} MB are written after {pause + wait:.2g} s"
    what = f"{args.model} with EMA and optimizer: training pauses, s"
    check(what, pause, math.inf, note)
    write()
    with torch.no_grad():
        torch._foreach_add_(list(step.model.parameters()), 1.0)  # training changes them right after
    writer.wait()
    saved = torch.load(writer.path, weights_only=True)["model"]
    changed = [name for name in expected if not torch.equal(saved[name], expected[name])]
    check("tensors that differ", len(changed), 0)
