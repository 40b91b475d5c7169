"""Pixels <-> latents. The only module that applies the VAE's scale factor.

--vae none means pixels in [-1, 1]; ema and mse are Stability AI's fine-tuned VAEs of Stable
Diffusion; a directory holds any AutoencoderKL of diffusers. Frames are encoded one by one, so time
is not compressed.
"""

import hashlib
import os
import textwrap
from pathlib import Path

import torch
from torch import nn

from runtime.cli import UserError, say
from runtime.rng import normal
from runtime.untrusted import file_sha256

REPOSITORIES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}
CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
CHUNK = 8  # frames per call of the model; 64 frames of 256 px at once would not fit on many GPUs


class VAE(nn.Module):
    """Converts between clips uint8 (B, 3, T, H, W) and latents float32 (B, C, T, h, w).

    h = H / downsample. name is none, ema, mse or a directory's absolute path; sha256 is that of the
    weights. Without a model, latents are pixels.
    """

    # of pixels
    channels = 3
    downsample = 1
    scale = 1.0
    shift = 0.0

    def __init__(self, name, model=None, sha256=None):
        super().__init__()
        self.name = name
        self.model = model
        self.sha256 = sha256
        if model is not None:
            config = model.config
            self.channels = config.latent_channels
            self.downsample = 2 ** (len(config.block_out_channels) - 1)
            self.scale = config.scaling_factor
            self.shift = config.shift_factor or 0.0

    @torch.no_grad()
    def posterior(self, clips):
        """(mean, std) of the latents of uint8 (B, 3, T, H, W), unscaled.

        The std of pixels is None.
        """
        if self.model is None:
            return clips.float() / 127.5 - 1, None

        def encode(frames):
            distribution = self.model.encode(frames.float() / 127.5 - 1).latent_dist
            return torch.cat([distribution.mean, distribution.std], dim=1)

        return _by_frames(encode, clips).float().chunk(2, dim=1)  # 2 x (B, C, T, h, w)

    def encode(self, clips):
        """uint8 (B, 3, T, H, W) -> scaled mean latents (B, C, T, h, w)"""
        mean, _ = self.posterior(clips)
        return (mean - self.shift) * self.scale

    def latents_of(self, clips, seed, stream, indices):
        """Scaled latents (B, C, T, h, w) of a batch, with posterior noise that depends only on
        seed, stream and index.

        clips: uint8 (B, 3, T, H, W), or mean and std from a latent cache, float16 (B, 2, C, T, h,
        w).
        """
        if clips.dtype == torch.uint8:
            latents, std = self.posterior(clips)
        else:
            latents, std = clips.float().unbind(1)
        if std is not None:
            noise = normal(seed, "posterior", stream, indices, std.shape[1:], std.device)
            latents = latents + std * noise
        return (latents - self.shift) * self.scale

    def unscale(self, latents):
        """Scaled latents -> latents as `posterior` returns their mean, float32"""
        return latents.float() / self.scale + self.shift

    @torch.no_grad()
    def decode(self, latents):
        """Scaled latents (B, C, T, h, w) -> uint8 (B, T, H, W, 3), clamped to the pixels' range."""

        def decode(frames):
            pixels = frames if self.model is None else self.model.decode(frames).sample
            return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

        videos = _by_frames(decode, self.unscale(latents))
        return videos.permute(0, 2, 3, 4, 1).contiguous()


def surely_differ(name, made):
    """Whether two names of VAEs are certainly of different ones.

    The name of a directory says nothing.
    """
    if not made or name == made:
        return False
    return "none" in (name, made) or {name, made} <= REPOSITORIES.keys()


def load_vae(typed, made=None, owner=None):
    """The frozen VAE of --vae or, if `typed` is None, the VAE `made` of an `owner`.

    An owner is for example the checkpoint.
    """
    name = (made or "ema") if typed is None else typed
    if surely_differ(name, made):
        raise UserError(f"--vae {name}: {owner} was made with {made}; remove --vae")
    if name == "none":
        return VAE(name)
    if name not in REPOSITORIES and not os.path.isdir(name):
        if typed is None:
            raise UserError(f"{owner}'s VAE {name}: not found; pass its new path with --vae")
        raise UserError(
            f"--vae {name}: not found; expected none, ema, mse or a directory of a diffusers "
            "AutoencoderKL"
        )
    directory = _download(name) if name in REPOSITORIES else name

    from diffusers import AutoencoderKL  # takes seconds to import
    from diffusers.utils import logging

    logging.set_verbosity(logging.CRITICAL)  # our line says what is wrong
    try:
        model, info = AutoencoderKL.from_pretrained(
            directory,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except Exception as error:  # missing and damaged files raise errors of many kinds
        reason = textwrap.shorten(str(error), 300).rstrip(".")
        raise UserError(
            f"--vae {name}: {reason}; pass the directory of a diffusers AutoencoderKL"
        ) from error
    missing = info["missing_keys"]
    if missing:  # diffusers would initialize them at random
        raise UserError(
            f"--vae {name}: the weights lack {len(missing)} tensors of its {CONFIG}, {missing[0]} "
            "first"
        )
    hashes = [file_sha256(path) for path in sorted(Path(directory).glob("*.safetensors"))]
    sha256 = hashes[0]
    if len(hashes) > 1:
        sha256 = hashlib.sha256(" ".join(hashes).encode()).hexdigest()
    name = name if name in REPOSITORIES else os.path.abspath(name)
    return VAE(name, model.requires_grad_(False).eval(), sha256)


def check_same(vae, sha256, owner):
    """Raise UserError unless a VAE's weights have this SHA-256.

    None, as in older files, is not checked.
    """
    if sha256 not in (None, vae.sha256):
        raise UserError(
            f"--vae {vae.name}: another VAE: its weights have SHA-256 {str(vae.sha256)[:12]}..., "
            f"{owner} was made with {sha256[:12]}...; pass the path of that one"
        )


def _download(name):
    """The local directory of a published VAE, downloaded unless Hugging Face's cache has it.

    Raises UserError.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repo = REPOSITORIES[name]

    def directory(**options):
        hf_hub_download(repo, CONFIG, **options)
        return os.path.dirname(hf_hub_download(repo, WEIGHTS, **options))

    try:
        return directory(local_files_only=True)
    except LocalEntryNotFoundError:
        say(
            f"--vae {name}: downloading {repo} (335 MB, once; without internet, pass a directory "
            "that holds it)"
        )
    try:
        return directory()
    except OSError as error:  # huggingface_hub's errors: no connection, HTTP status, disk full
        raise UserError(
            f"--vae {name}: can't download {repo} ({type(error).__name__}): copy it to this "
            "machine and pass its directory, or use --vae none"
        ) from error


def _by_frames(function, clips):
    """Apply a function of frames (n, C, H, W) to clips (B, C, T, H, W), CHUNK frames at a time."""
    B, _, T = clips.shape[:3]
    frames = clips.transpose(1, 2).flatten(0, 1)  # (B T, C, H, W)
    frames = torch.cat([function(part) for part in frames.split(CHUNK)])
    return frames.unflatten(0, (B, T)).transpose(1, 2)
