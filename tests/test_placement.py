"""All tensors are on the device of the network, checked without a GPU: the device "meta" replaces
it.

A meta tensor has a shape, a type and a device, but no values. So the code runs as on a GPU, while
everything on the CPU is real: files, labels, random draws. `OneDevice` sees each operation,
including backward passes and optimizers, and refuses tensors on both devices. It also notes where
the CPU waits for the GPU, and invents the values read there: True, 1, zeros, a mask that is true
everywhere. So every gradient is finite, and no sample stops early.

These tests miss autocast (meta has none), generators on the device (CPU generators replace them),
kernels, numerics, torch.compile, several ranks and streams. Other tests check values."""

from contextlib import nullcontext
from shlex import split

import pytest
import torch
import torch.optim.optimizer as torch_optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from models import EqM, EqM_models, model_config
from runtime import distributed, rng
from tiny_data import make_images, random_checkpoint
from training import (
    IMAGES,
    TINY,
    Training,
    batch_of,
    losses_of,
    record_calls,
    run_here,
    sample_here,
)
from transport import draw_gammas

# A copy to a meta tensor has nothing to copy
pytestmark = pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")

GPU = torch.device("meta")
aten = torch.ops.aten
# and the position of the source in their arguments
COPIES = {aten.copy_.default: 1, aten._to_copy.default: 0}
# bytes; the CPU waits for a larger copy to a GPU, also a non-blocking one, unless it is pinned
STAGED = 2**16
# their kernels take no scalar from the CPU
FUSED = (aten._fused_adamw_.default, aten._fused_adamw_.tensor_lr)


class OneDevice(TorchDispatchMode):
    """Fails the test at an operation on tensors of two devices; `waits` names operations that wait
    for the GPU.
    """

    def __init__(self):
        super().__init__()
        self.waits = []
        self.pinned = []

    def pin(self, tensor):
        self.pinned.append(tensor.clone())
        return self.pinned[-1]

    def is_wait(self, source, non_blocking):
        """Whether the CPU waits for a copy from itself to the GPU."""
        is_pinned = source.data_ptr() in {tensor.data_ptr() for tensor in self.pinned}
        return not non_blocking or (source.nbytes > STAGED and not is_pinned)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in COPIES:
            return self.copy(function, args, kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
        devices = set()
        for tensor in tensors:
            if tensor.dim() or on_gpu(tensor) or function in FUSED:
                devices.add(tensor.device)
        if len(devices) > 1:
            shapes = [(tensor.device.type, *tensor.shape) for tensor in tensors]
            pytest.fail(f"{function}: {shapes}")
        # item(), float(), bool(), tolist()
        if function is aten._local_scalar_dense.default and on_gpu(args[0]):
            self.waits.append(function)
            return torch.ones((), dtype=args[0].dtype).item()
        if function is aten.index.Tensor and on_gpu(args[0]):
            tensor, indices = args
            indices = [self.true_everywhere(index, function) for index in indices]
            return function(tensor, indices)
        return function(*args, **kwargs)

    def copy(self, function, args, kwargs):
        """A copy may have two devices. The CPU waits for it, except for some non-blocking copies to
        the GPU.
        """
        position = COPIES[function]
        source = args[position]
        non_blocking = kwargs.get("non_blocking") or True in args[2:]
        device = torch.device(kwargs.get("device") or args[0].device)
        if on_gpu(source) and device != GPU:
            self.waits.append(function)
            args = list(args)
            args[position] = torch.ones(source.shape, dtype=source.dtype)
        elif not on_gpu(source) and device == GPU and self.is_wait(source, non_blocking):
            self.waits.append(function)
        return function(*args, **kwargs)

    def true_everywhere(self, index, function):
        if index is None or index.dtype != torch.bool:
            return index
        self.waits.append(function)
        return torch.arange(len(index), device=index.device)


def on_gpu(tensor):
    return tensor.device == GPU


@pytest.fixture
def gpu(monkeypatch):
    """Run the test under a OneDevice that replaces the GPU, also on a machine that has one."""
    generator = rng.generator
    monkeypatch.setattr(rng, "generator", lambda *key, device="cpu": generator(*key))
    monkeypatch.setattr(distributed, "autocast", lambda device, precision: nullcontext())
    monkeypatch.setattr(distributed, "start", lambda *_, **__: GPU)
    monkeypatch.setattr(
        torch_optimizer, "_get_fused_kernels_supported_devices", lambda: ["cpu", "meta"]
    )
    with OneDevice() as mode:
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: mode.pin(tensor))
        yield mode


MUON = """
    --optimizer muon
    --num-frames 6
    --val-frames 4
    --forcing 0.5
    --position-table space
    --rope-speed 0.5
    --qk-norm
    --gamma-shift 2
    --grad-checkpoint
    --sample-every 0
"""
RUNS = {
    "adamw, pixels through a VAE": "--vae VAE --disp --grad-accum 2",
    "muon, padded and forced clips": MUON,
    "energy": "--ebm dot --grad-checkpoint --sampler ngd --stop-below",
    "fixed positions, cached latents": "--vae VAE --ebm l2",
    "causal": "--causal --num-frames 8 --context-noise 0.2 --own-context 0.5 --objective flow",
    "images": "--val-clips 4",
}


@pytest.mark.parametrize("kind", RUNS)
def test_training_and_resuming_stay_on_the_gpu_and_steps_do_not_wait(
    kind, latents, tiny_vae, gpu, shapes, tmp_path, monkeypatch
):
    flags = [tiny_vae if flag == "VAE" else flag for flag in split(RUNS[kind])]
    base = TINY
    data = shapes
    if kind == "images":
        base = IMAGES
        data = make_images(tmp_path / "data", 12)
    elif "latents" in kind:
        base = [flag for flag in TINY if flag != "--use-rope"]
        data = latents
    training = Training(data, tmp_path / "results", 5, flags=flags, base=base)
    # evaluations are at the end, as are samples
    often = split("--precision fp32 --log-every 5 --val-every 5 --ckpt-every 5")
    waits = record_calls(monkeypatch, train, "update_ema", lambda *_: len(gpu.waits))
    assert run_here(training, *often, stop_after=3) == 3
    assert waits[2] == waits[1] == waits[0]
    assert run_here(training, *often, "--resume") == 2
    assert waits[4] == waits[3]
    row = training.rows()[-1]
    assert row["step"] == 5
    assert "val_loss" in row


def test_levels_of_regions_are_copied_from_pinned_memory_and_are_the_drawn_ones(gpu):
    clips = torch.zeros(4, 3, 8, 64, 64, dtype=torch.uint8)
    batch = batch_of(clips.pin_memory())  # as the loader does
    config = model_config("EqM-S/4", num_classes=2, use_rope=True, input_size=64)
    regions = {"forcing": 0.5, "forcing_regions": 0.5}
    losses_of(lambda x, *_, **__: x, batch, config, GPU, **regions)
    assert gpu.waits == []
    _, levels = gpu.pinned
    assert torch.equal(levels, draw_gammas(5, 7, range(4), 8, 4, 3.0, 0.5, 1, 0.5, 64))


SAMPLING = "--num-frames 6 --num-samples 3 --batch-size 2 --no-previews --precision fp32"


@pytest.mark.parametrize(
    ("flags", "ebm"),
    [
        ("--sampler ngd --mu 0.3 --cfg-scale 1", "none"),
        ("--sampler ngd --stop-below 1", "none"),
        ("--sampler heun", "none"),
        ("--sampler ngd --report-energy", "dot"),
    ],
)
def test_sampling_stays_on_the_gpu_and_waits_only_to_stop_samples(
    flags, ebm, gpu, tmp_path, monkeypatch
):
    ckpt = random_checkpoint(tmp_path / "c.pt", num_frames=8, use_rope=True, ebm=ebm)
    waits = record_calls(monkeypatch, EqM, "forward", lambda *_, **__: len(gpu.waits))
    sample_here(ckpt, tmp_path / "s", *split(SAMPLING), *split(flags))
    assert len(waits) >= 2 * 3
    assert (len(set(waits)) > 2) == ("--stop-below" in flags)  # 2 batches


def test_clips_without_a_time_scale_are_on_the_gpu(gpu):
    model = EqM_models["EqM-Ti/4"](input_size=8, depth=1, num_classes=5, use_rope=True).to(GPU)
    x = torch.zeros(2, 4, 8, 8, 8, device=GPU)
    y = torch.zeros(2, dtype=torch.int64, device=GPU)
    assert on_gpu(model(x, y))
