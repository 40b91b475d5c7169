"""Pixels <-> latents. The only place that knows a scale factor.

`none` models pixels in [-1, 1]; `ema` and `mse` are Stability's fine-tuned VAEs of Stable Diffusion; a directory
holds any diffusers AutoencoderKL. Frames are encoded one by one, so time is never compressed here.
"""

import os
import textwrap

import torch
from safetensors import SafetensorError, safe_open

from runtime.cli import UserError, say
from runtime.distributed import rank
from runtime.rng import normal
from runtime.untrusted import check_regular, read_json

PUBLISHED = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}
FILES = ["config.json", "diffusion_pytorch_model.safetensors"]
CHUNK = 8  # frames that go through the VAE at once: a clip of 64 frames of 256 px would not fit many GPUs


class VAE:
    """Between clips uint8 (B, 3, T, H, W) and latents float32 (B, C, T, H/f, W/f).

    `channels` is C (3 for pixels), `downsample` is f (1 for pixels), `name` is what --vae said. Starts on the CPU.
    """

    def __init__(self, name, model=None):
        self.name, self.model = name, model
        self.channels, self.downsample, self.scale, self.shift = 3, 1, 1.0, 0.0
        if model is not None:
            self.channels = model.config.latent_channels
            self.downsample = 2 ** (len(model.config.block_out_channels) - 1)
            self.scale = model.config.scaling_factor
            self.shift = model.config.shift_factor or 0.0

    @property
    def place(self):
        """The name as others may keep it: a directory's is absolute."""
        return os.path.abspath(self.name) if os.path.isdir(self.name) else self.name

    def to(self, device):
        if self.model is not None:
            self.model.to(device)
        return self

    @torch.no_grad()
    def posterior(self, clips):
        """Mean and standard deviation of the latents of uint8 (B, 3, T, H, W), unscaled; pixels have no std (None)."""
        if self.model is None:
            return _to_float(clips), None

        def encode(frames):
            distribution = self.model.encode(_to_float(frames)).latent_dist
            return torch.cat([distribution.mean, distribution.std], dim=1)

        return _by_frames(encode, clips).float().chunk(2, dim=1)  # 2 x (B, C, T, H/f, W/f)

    def sample(self, mean, std, noise=None):
        """Scaled latents (B, C, T, h, w) = mean + std * noise; noise is standard normal, None takes the mean."""
        latents = mean if noise is None or std is None else mean + std * noise
        return (latents - self.shift) * self.scale

    def encode(self, clips, noise=None):
        """uint8 (B, 3, T, H, W) -> scaled latents (B, C, T, H/f, W/f); noise as in `sample`."""
        return self.sample(*self.posterior(clips), noise)

    def latents_of(self, clips, seed, stream, indices):
        """Scaled latents (B, C, T, h, w) of a batch of clips, posterior noise a function of (seed, stream, index).

        clips: uint8 (B, 3, T, H, W), or from a latent cache mean and standard deviation, float16 (B, 2, C, T, h, w).
        """
        mean, std = self.posterior(clips) if clips.dtype == torch.uint8 else clips.float().unbind(1)
        noise = None if std is None else normal(seed, "posterior", stream, indices, mean.shape[1:], mean.device)
        return self.sample(mean, std, noise)

    @torch.no_grad()
    def decode(self, latents):
        """Scaled latents (B, C, T, h, w) -> uint8 (B, T, H, W, 3), clamped to the range of pixels."""
        if len(latents) == 0:  # a rank without samples; not every layer takes an empty batch
            B, _, T, h, w = latents.shape
            return torch.empty(B, T, h * self.downsample, w * self.downsample, 3, dtype=torch.uint8)
        latents = latents.float() / self.scale + self.shift
        pixels = _by_frames(_to_uint8 if self.model is None else self._decode_frames, latents)
        return pixels.permute(0, 2, 3, 4, 1).contiguous()

    def _decode_frames(self, latents):
        return _to_uint8(self.model.decode(latents).sample)


def load_vae(name):
    """The VAE that --vae names: 'none', 'ema', 'mse' or a directory; frozen. Raises UserError if it can't be loaded."""
    if name == "none":
        return VAE(name)
    if name not in PUBLISHED and not os.path.isdir(name):
        raise UserError(f"--vae {name}: neither none, ema or mse nor a directory; give one of these")
    directory = _download(name) if name in PUBLISHED else name
    try:
        _check_files(directory)
    except ValueError as error:
        raise UserError(f"--vae {name}: {error}; give the directory of a diffusers AutoencoderKL") from error

    from diffusers import AutoencoderKL  # takes seconds to import
    from diffusers.utils import logging

    logging.set_verbosity_error()
    try:
        model, info = AutoencoderKL.from_pretrained(
            directory,
            low_cpu_mem_usage=False,
            output_loading_info=True,
            use_safetensors=True,  # no pickle
        )
    # A missing or damaged file, a wrong config, wrong shapes; whatever a config of wrong types makes fail.
    except (OSError, ValueError, RuntimeError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        found = textwrap.shorten(str(error), 300)
        raise UserError(f"--vae {name}: {found} Give the directory of a diffusers AutoencoderKL") from error
    if missing := info["missing_keys"]:  # diffusers would leave them random
        raise UserError(f"--vae {name}: the weights lack {len(missing)} tensors of its config.json, {missing[0]} first")
    return VAE(name, model.requires_grad_(False).eval())


def _check_files(directory):
    """Raise ValueError unless the VAE that the config describes has no more layers, and none wider, than the weights.

    A config is believed before any weights are looked at, and could ask for any amount of memory.
    """
    try:
        file = FILES[0]
        settings = read_json(os.path.join(directory, file), most=2**20)
        file = FILES[1]
        check_regular(os.path.join(directory, file))
        with safe_open(os.path.join(directory, file), "pt") as weights:
            shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"its {file} can't be read ({error})") from error
    widest = max((size for shape in shapes for size in shape), default=0)
    for name in ("block_out_channels", "layers_per_block", "latent_channels", "in_channels", "out_channels"):
        values = settings.get(name, 1) if isinstance(settings, dict) else None
        values = values if isinstance(values, list) else [values]
        most = len(shapes) if name == "layers_per_block" else widest
        if len(values) > len(shapes) or not all(isinstance(value, int) and 0 < value <= most for value in values):
            raise ValueError(f"its {FILES[0]} has {name} {str(values)[:50]}, which its {FILES[1]} has not")


def _download(name):
    """The directory of a published VAE in Hugging Face's cache; the network is asked only when it is not there yet."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    repo = PUBLISHED[name]
    try:
        return os.path.dirname([hf_hub_download(repo, file, local_files_only=True) for file in FILES][0])
    except LocalEntryNotFoundError:
        say(f"--vae {name}: downloading {repo} (335 MB, once; without internet, give --vae a directory that holds it)")
    if rank() != 0:
        disable_progress_bars()
    try:
        return snapshot_download(repo, allow_patterns=FILES)
    except OSError as error:  # huggingface_hub's errors: no connection, HTTP status, disk full
        raise UserError(
            f"--vae {name}: can't download {repo} ({type(error).__name__}); copy it to this machine and give "
            "--vae its directory, or use --vae none"
        ) from error


def _by_frames(function, clips):
    """Apply a function of frames (n, C, H, W) to (B, C, T, H, W), CHUNK frames at a time."""
    frames = clips.transpose(1, 2).flatten(0, 1)  # (B T, C, H, W)
    frames = torch.cat([function(part) for part in frames.split(CHUNK)])
    return frames.unflatten(0, (clips.shape[0], clips.shape[2])).transpose(1, 2)


def _to_float(pixels):
    return pixels.float() / 127.5 - 1


def _to_uint8(pixels):
    return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
