"""Every tensor is on the device of the network, checked without a GPU: the device "meta" takes its place.

A meta tensor has a shape, a type and a device, but no values. So the code runs as on a GPU, `.to(device)` included, and
what stays on the CPU is real: files, labels, random draws. `OneDevice` sees each operation, those of the backward pass
and of the optimizers too, and refuses one that has tensors on both devices; meta itself lets some of them pass, a
lookup in an embedding or the update of the EMA. `OneDevice` also notes where the CPU waits for the GPU, and makes up
what is read there: True, 1, zeros, a mask that is true everywhere. So of a branch on such a value one side runs: every
gradient is finite, no sample stops early.

This can't see autocast to bf16 or fp16 (meta has none), generators on the device (those of the CPU stand in), kernels
and their numerics (fused AdamW and attention included), torch.compile, several ranks, streams, whether memory is
pinned, or waits that are no operation here, as of torch.tensor(value, device=device). No value is checked: the other
tests do that.
"""

from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.optim.optimizer as torch_optimizer
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import checkpoint
import generation
import models
import rope
import samplers
import train
import transport
from checkpoint import Progress, Start
from models import EqM, EqMConfig
from optim import check_gradient, make_optimizers, update_ema
from runtime import distributed, rng
from runtime.signals import StopSignal
from tiny_data import make_vae
from training import Training, run_here
from vae import VAE, load_vae
from validation import validate
from video.clips import collate

# A copy to a meta tensor has nothing to copy
pytestmark = pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")

GPU = torch.device("meta")
CONFIG = EqMConfig(
    input_size=4, patch_size=2, temporal_patch_size=4, in_channels=3, hidden_size=48, depth=1, num_heads=2,
    num_classes=5, num_frames=8, use_rope=True, qk_norm=True,
)  # fmt: skip
ARGS = SimpleNamespace(
    global_seed=0, gamma_shift=2.0, precision="fp32", disp=False, optimizer="adamw", lr=1e-3, muon_lr=1e-2,
    weight_decay=0.1, forcing=0.5,
)  # fmt: skip
SCALER = torch.amp.GradScaler("cpu", enabled=False)

aten = torch.ops.aten
COPIES = {aten.copy_.default: 1, aten._to_copy.default: 0}  # and the place of the source in their arguments
FUSED = aten._fused_adamw_.default, aten._fused_adamw_.tensor_lr  # their kernels take no scalar from the CPU


class WrongDevice(Exception):  # noqa: N818 (as the errors of the project)
    """An operation has tensors on two devices."""


class OneDevice(TorchDispatchMode):
    """Raises WrongDevice for an operation on tensors of two devices; `waits` names those that wait for the GPU."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in COPIES:
            return self.copy(function, args, kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
        devices = {part.device for part in tensors if part.dim() or on_gpu(part) or function in FUSED}
        if len(devices) > 1:
            raise WrongDevice(f"{function}: {', '.join(f'{part.device.type} {tuple(part.shape)}' for part in tensors)}")
        if function is aten._local_scalar_dense.default and on_gpu(args[0]):  # item(), float(), bool(), tolist()
            self.waits.append(function)
            return torch.ones((), dtype=args[0].dtype).item()
        if function is aten.index.Tensor and on_gpu(args[0]):
            args = args[0], [self.true_everywhere(index, function) for index in args[1]]
        return function(*args, **kwargs)

    def copy(self, function, args, kwargs):
        """A copy may be from one device to the other; only one to the GPU, if it is asked to, lets the CPU go on."""
        place = COPIES[function]
        source, non_blocking = args[place], kwargs.get("non_blocking") or True in args[2:]
        device = torch.device(kwargs.get("device") or args[0].device)
        if on_gpu(source) and device != GPU:
            self.waits.append(function)
            args = *args[:place], torch.ones(source.shape, dtype=source.dtype), *args[place + 1 :]
        elif not on_gpu(source) and device == GPU and not non_blocking:
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
    """The stand-in for a GPU: its OneDevice, under which the test runs."""
    generator = rng.generator
    monkeypatch.setattr(rng, "generator", lambda *key, device="cpu": generator(*key))
    monkeypatch.setattr(distributed, "autocast", lambda device, precision: nullcontext())
    monkeypatch.setattr(torch_optimizer, "_get_fused_kernels_supported_devices", lambda: ["cpu", "meta"])
    with OneDevice() as mode:
        yield mode


def device_types(value):
    """The types of the devices of all tensors in a state."""
    return {leaf.device.type for leaf in tree_leaves(value) if torch.is_tensor(leaf)}


def batch_of(clip, count=2):
    """A batch of the loader, of clips like this one."""
    sample = {"clip": clip, "time_scale": 0.08, "video": "A/a.avi", "bad": []}
    return collate([sample | {"label": index, "index": index} for index in range(count)])


def pixels(num_frames=8):
    return torch.zeros(3, num_frames, 4, 4, dtype=torch.uint8)


def trained(config, args, device):
    """(model, EMA, optimizers) as train.py makes them."""
    model = EqM(config).to(device)
    return model, deepcopy(model).eval().requires_grad_(False), make_optimizers(model, args)


def step(model, ema, optimizers, vae, batch, args, device):
    """One step as in the loop of train.py. Returns the norm of the gradient and the losses."""
    losses, _ = train.training_losses(model, vae, batch, model.config, args, 0, device)
    sum(losses.values()).backward()
    norm = clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    update_ema(ema, model, 0.9)
    return norm, list(losses.values())


def run_steps(gpu, config=CONFIG, vae=None, clip=None, grad_checkpoint=False, **flags):
    """Two steps, the second with the optimizers' state of the first; all that they leave must be on the GPU.

    gpu.waits is then that of the steps alone. Returns the norm of the gradient and the losses.
    """
    args = SimpleNamespace(**vars(ARGS) | flags)
    model, ema, optimizers = trained(config, args, GPU)
    model.grad_checkpoint = grad_checkpoint
    vae = (vae or VAE("none")).to(GPU)
    gpu.waits.clear()
    for _ in range(2):
        norm, losses = step(model, ema, optimizers, vae, batch_of(pixels() if clip is None else clip), args, GPU)
    states = [model.state_dict(), ema.state_dict(), [optimizer.state_dict() for optimizer in optimizers]]
    assert [device_types(part) for part in (norm, losses, *states)] == [{"meta"}] * 5
    return norm, losses


def check_steps(gpu, *settings, **flags):
    """The steps never wait for the GPU either."""
    results = run_steps(gpu, *settings, **flags)
    assert gpu.waits == []
    return results


# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_training_step_is_on_the_gpu_and_never_waits_for_it(gpu, optimizer):
    check_steps(gpu, optimizer=optimizer)


def test_a_step_on_latents_of_a_cache_is_on_the_gpu(gpu):
    check_steps(gpu, clip=torch.zeros(2, 3, 8, 4, 4, dtype=torch.float16))  # mean and std


def test_a_step_on_pixels_that_a_vae_encodes_is_on_the_gpu(gpu, tmp_path):
    config, clip = replace(CONFIG, in_channels=4), torch.zeros(3, 8, 8, 8, dtype=torch.uint8)
    check_steps(gpu, config, load_vae(make_vae(tmp_path)), clip)


def test_the_dispersive_loss_is_on_the_gpu(gpu):
    _, losses = check_steps(gpu, disp=True)
    assert len(losses) == 2


@pytest.mark.parametrize("ebm", ["none", "dot"])
def test_recomputed_activations_are_on_the_gpu(gpu, ebm):
    check_steps(gpu, replace(CONFIG, ebm=ebm), grad_checkpoint=True)


@pytest.mark.parametrize("ebm", ["dot", "l2"])
def test_training_on_an_energy_is_on_the_gpu(gpu, ebm):
    check_steps(gpu, replace(CONFIG, ebm=ebm))


MOVING = {"position_table": "space", "rope_speed": 0.5}


@pytest.mark.parametrize("positions", [{"use_rope": False}, {}, MOVING], ids=str)
def test_all_kinds_of_positions_of_padded_clips_are_on_the_gpu(gpu, positions):
    check_steps(gpu, replace(CONFIG, **positions, num_frames=6), clip=pixels(6))


def test_images_are_on_the_gpu(gpu):
    check_steps(gpu, replace(CONFIG, use_rope=False, num_frames=1, temporal_patch_size=1), clip=pixels(1))


def test_clips_without_a_time_scale_are_on_the_gpu(gpu):
    x, y = torch.zeros(2, 3, 8, 4, 4, device=GPU), torch.zeros(2, dtype=torch.int64, device=GPU)
    assert on_gpu(EqM(CONFIG).to(GPU)(x, y))


def test_only_the_check_of_the_gradient_waits_and_its_answer_stays_on_the_gpu(gpu):
    norm, losses = check_steps(gpu)
    skip, tolerated = check_gradient(norm, losses, SCALER)
    assert not skip and on_gpu(tolerated)
    assert gpu.waits == [aten._local_scalar_dense.default]  # once: a finite gradient needs no look at the losses


# Validation, sampling, decoding, resuming -----------------------------------------------------------------------------


class Loader(list):
    num_workers = 0


def test_validation_is_on_the_gpu(gpu):
    model, ema, _ = trained(CONFIG, ARGS, GPU)
    loader = Loader([batch_of(pixels()), batch_of(pixels(6))])
    metrics, bad = validate(ema, model, VAE("none"), loader, 8, "fp32", GPU, StopSignal())
    assert {"val_loss", "val_loss_raw"} <= metrics.keys() and bad == []  # values read from the GPU are made up


SAMPLERS = {
    "gd": {"method": "gd"},
    "ngd": {"method": "ngd", "momentum": 0.3},
    "ngd that may stop": {"method": "ngd", "stop_below": 1.0},
    "euler": {"method": "euler"},
    "heun": {"method": "heun"},
}


def check_sampling(gpu, config, guidance, settings):
    """Sampling is on the GPU, and waits for it after the last step of a batch, before that only if samples may stop."""
    model = EqM(config).to(GPU).requires_grad_(False)
    start = torch.zeros(3, 3, 6, 4, 4, device=GPU)
    labels, time_scale = torch.arange(3, device=GPU), torch.full((3,), 0.04, device=GPU)
    energy = None if config.ebm == "none" else model.energy
    gpu.waits.clear()
    results = generation.generate(
        model, start, labels, time_scale, null_label=5, guidance=guidance, batch_size=2, show=False, energy=energy,
        num_steps=3, **settings,
    )  # fmt: skip
    assert device_types(results) == {"meta"}
    assert results[0].shape == start.shape and len(results[1]) == 3
    of_steps = len(gpu.waits) - 2  # batches
    assert of_steps > 0 if "stop_below" in settings else of_steps == 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_is_on_the_gpu_and_its_steps_wait_only_to_stop_samples(gpu, sampler):
    check_sampling(gpu, CONFIG, 4.0, SAMPLERS[sampler])


def test_sampling_without_guidance_is_on_the_gpu(gpu):
    check_sampling(gpu, CONFIG, 1.0, SAMPLERS["ngd"])


@pytest.mark.parametrize("ebm", ["dot", "l2"])
def test_sampling_from_an_energy_and_recording_it_are_on_the_gpu(gpu, ebm):
    check_sampling(gpu, replace(CONFIG, ebm=ebm), 4.0, SAMPLERS["ngd"])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_field_that_is_sampled_without_a_network_stays_on_the_gpu(gpu, sampler):
    x = torch.ones(2, 3, device=GPU)
    results = samplers.sample(lambda x, keep: -x, x, num_steps=3, **SAMPLERS[sampler])
    assert device_types(results) == {"meta"}


def test_a_vae_encodes_and_decodes_on_the_gpu(gpu, tmp_path):
    for vae in (VAE("none"), load_vae(make_vae(tmp_path)).to(GPU)):
        gpu.waits.clear()
        latents = vae.encode(torch.zeros(2, 3, 5, 8, 8, dtype=torch.uint8, device=GPU))
        videos = vae.decode(latents)
        assert on_gpu(latents) and on_gpu(videos) and videos.shape == (2, 5, 8, 8, 3)
        assert gpu.waits == []


def saved_start(args):
    """A Start at a checkpoint: a step on the CPU, as torch.load gives it there."""
    model, ema, optimizers = parts = trained(CONFIG, args, torch.device("cpu"))
    step(*parts, VAE("none"), batch_of(pixels()), args, torch.device("cpu"))
    states = {"states": [optimizer.state_dict() for optimizer in optimizers]}
    state = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": states}
    return Start(Progress(), "a file that is loaded", state=deepcopy(state))


def check_resumed(gpu, args):
    """What a checkpoint holds is on the GPU once it is loaded, and the next step runs."""
    start = saved_start(args)
    assert device_types(start.state) == {"cpu"}
    parts = trained(CONFIG, args, GPU)
    checkpoint.load_run(start, *parts, SCALER)
    gpu.waits.clear()
    step(*parts, VAE("none"), batch_of(pixels()), args, GPU)
    assert gpu.waits == []
    assert device_types([optimizer.state_dict() for optimizer in parts[2]]) == {"meta"}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_and_optimizer_states_are_on_the_gpu_after_a_resume(gpu, optimizer):
    check_resumed(gpu, SimpleNamespace(**vars(ARGS) | {"optimizer": optimizer}))


# Whole runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_on_gpu(gpu, monkeypatch):
    """train.py gets the stand-in as its device, also on a machine with a GPU."""
    monkeypatch.setattr(distributed, "start", lambda patience: GPU)
    return gpu


FP32 = ["--precision", "fp32"]


RUNS = {
    "adamw": ["--disp", "--grad-accum", 2, "--skip-nonfinite", 1],
    "muon": ["--optimizer", "muon", "--num-frames", 6, "--val-frames", 4, "--forcing", 0.5],
    "energy": ["--ebm", "dot", "--grad-checkpoint", "--sampler", "ngd", "--stop-below"],
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_whole_run_and_its_resume_are_on_the_gpu(run_on_gpu, shapes, tmp_path, kind):
    flags = [*FP32, *RUNS[kind], "--vae", make_vae(tmp_path / "vae")]
    training = Training(shapes, tmp_path / "results", 5, flags=flags)
    assert run_here(training, stop_after=3) == 3
    assert run_here(training, "--resume") == 2
    assert training.rows()[-1]["step"] == 5


def test_a_run_waits_for_the_gpu_as_often_for_many_steps_as_for_few(run_on_gpu, shapes, tmp_path):
    counts = []
    for steps in (1, 4):
        run_on_gpu.waits.clear()
        rare = ["--log-every", 9, "--val-every", 9, "--ckpt-every", 9, "--sample-every", 0]
        assert run_here(Training(shapes, tmp_path / str(steps), steps, flags=FP32), *rare) == steps
        counts.append(len(run_on_gpu.waits))
    assert counts[0] == counts[1] > 0


# Mistakes that only a GPU would show ----------------------------------------------------------------------------------


def labels_on_the_cpu(patch):
    forward = models.LabelEmbedder.forward
    patch.setattr(models.LabelEmbedder, "forward", lambda self, labels: forward(self, labels.cpu()))


def noise_on_the_cpu(patch):
    patch.setattr(train, "normal", lambda *key_and_shape: rng.normal(*key_and_shape[:-1]))


def positions_on_the_cpu(patch):
    forward = rope.RotaryEmbedding3D.forward
    patch.setattr(rope.RotaryEmbedding3D, "forward", lambda self, grid, scale: forward(self, grid, scale.cpu()))


def new_tensors_on_the_cpu(patch):
    arange = torch.arange
    patch.setattr(torch, "arange", lambda *range, device=None, **settings: arange(*range, **settings))


def optimizer_on_the_cpu(patch):
    def load(optimizers, saved):
        for optimizer, state in zip(optimizers, saved, strict=True):
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            optimizer.state.update({weights[number]: value for number, value in state["state"].items()})

    patch.setattr(checkpoint, "load_optimizers", load)


def ema_on_the_cpu(patch):
    patch.setattr(EqM, "__deepcopy__", lambda self, memo: EqM(self.config), raising=False)


@pytest.mark.parametrize(
    ("mistake", "operation"),
    [
        (labels_on_the_cpu, "aten.embedding"),
        (noise_on_the_cpu, "aten.mul"),
        (positions_on_the_cpu, "aten.mul"),
        (new_tensors_on_the_cpu, "aten.mul"),
        (optimizer_on_the_cpu, "aten._fused_adamw_"),
        (ema_on_the_cpu, "aten._foreach_lerp_"),
    ],
)
def test_a_tensor_left_on_the_cpu_is_found(gpu, monkeypatch, mistake, operation):
    mistake(monkeypatch)
    with pytest.raises(WrongDevice, match=operation):
        check_resumed(gpu, ARGS)  # which finds nothing without the mistake: see the tests above


def loss_that_is_read(patch):
    loss = transport.loss
    patch.setattr(transport, "loss", lambda *parts: loss(*parts) + 0 * loss(*parts).mean().item())


def batch_that_blocks(patch):
    latents_of = VAE.latents_of
    patch.setattr(VAE, "latents_of", lambda self, clips, *key: latents_of(self, clips.cpu().to(clips.device), *key))


@pytest.mark.parametrize(
    ("mistake", "operation"), [(loss_that_is_read, "_local_scalar_dense"), (batch_that_blocks, "_to_copy")]
)
def test_a_step_that_waits_for_the_gpu_is_found(gpu, monkeypatch, mistake, operation):
    mistake(monkeypatch)
    run_steps(gpu)  # which waits for nothing without the mistake: see the tests above
    assert any(operation in str(wait) for wait in gpu.waits)
