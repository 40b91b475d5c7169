"""Tiny data for several tests: a VAE, images, a latent cache, checkpoints, samples."""

import json
import os
from dataclasses import asdict

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

import checkpoint
from models import EqM, model_config
from video.files import Video
from video.source import LATENTS_FORMAT


class Code:
    """Unpickling an instance makes the folder `ran` in the current folder."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def make_vae(folder, **overrides):
    """Write an AutoencoderKL with fixed random weights, 4 channels and downsampling 2. Returns the
    folder.
    """
    from diffusers import AutoencoderKL  # takes seconds to import

    torch.manual_seed(0)
    kinds = {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    }
    sizes = {
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 16,
    }
    AutoencoderKL(**kinds | sizes | overrides).save_pretrained(folder)
    return folder


def make_images(root, count, suffix=".png"):
    """Write `count` random images, 20 x 16 px, alternating between the classes A and B. Returns
    root.
    """
    for index in range(count):
        folder = root / "AB"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (16, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}{suffix}")
    return root


LATENTS_SETTINGS = {  # of a latent cache
    "format": LATENTS_FORMAT,
    "vae": "ema",
    "image_size": 16,
    "channels": 4,
    "downsample": 2,
    "scale": 0.18215,
    "shift": 0.0,
    "flips": True,
}


def make_latents(folder):
    """Write a latent cache of three videos of one class, with random latents."""
    videos = []
    for size, name in enumerate("abc"):
        (folder / "A").mkdir(parents=True, exist_ok=True)
        parts = {
            part: torch.rand(6, 4, 8, 8).half()
            for part in ("mean", "std", "mean_flipped", "std_flipped")
        }
        save_file(parts, folder / f"A/{name}.safetensors", metadata={"source_bytes": str(size)})
        video = Video(f"A/{name}.safetensors", "A", 6, 25.0, 16, 16)
        videos.append(asdict(video))
    counts = {"num_videos": 3, "num_frames": 18, "classes": ["A"], "unreadable": []}
    content = LATENTS_SETTINGS | counts | {"videos": videos}
    (folder / "latents.json").write_text(json.dumps(content, indent=1))


def make_state(step=10, **settings):
    """Return the dict of a checkpoint as train.py writes it, of a named model so that --model can
    be checked.
    """
    config = model_config(
        "EqM-Ti/4",
        **({"input_size": 16, "in_channels": 3, "num_classes": 2, "depth": 6} | settings),
    )
    data = {
        "vae": "none",
        "image_size": 16,
        "fps": 25.0,
        "frame_interval": [1],
        "classes": ["A", "B"],
        "time_scale": 0.04,
        "longest_time_scale": 0.04,
    }
    training = {
        "model": "EqM-Ti/4",
        "num_frames": config.num_frames,
        "video": config.num_frames > 1,
    }
    return {
        "version": checkpoint.VERSION,
        "config": {"model": vars(config), "data": data, "training": training},
        "model": EqM(config).state_dict(),
        "ema": EqM(config).state_dict(),
        "optimizer": {"kind": "adamw", "states": []},
        "step": step,
        "phase": {"first_step": 0, "position": 40, "ema_start": 0},
        "best_loss": 1.0,
    }


def save_checkpoint(path, **settings):
    """Write what make_state returns. Returns the path."""
    checkpoint.save(path, make_state(**settings))
    return path


def random_checkpoint(path, vae="none", training=(), **settings):
    """Write a checkpoint of a small model with fixed random EMA weights. Returns the path.

    vae is a folder of `make_vae` or another --vae; training holds flags of its run.
    """
    latents = {} if vae == "none" else {"input_size": 8, "in_channels": 4}
    small = {"depth": 1, "hidden_size": 48, "num_heads": 2, "num_frames": 1}
    state = make_state(
        **small | latents | {"temporal_patch_size": 4 if "num_frames" in settings else 1} | settings
    )
    for weight in state["ema"].values():
        weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    size = state["config"]["model"]["input_size"] * (1 if vae == "none" else 2)
    state["config"]["data"] |= {"vae": str(vae), "image_size": size}
    state["config"]["training"] |= training
    checkpoint.save(path, state)
    return path


def write_npz(path, videos, labels):
    """Write a samples.npz of videos (N, T, H, W, 3) at once."""
    np.savez(
        path,
        arr_0=videos if videos.shape[1] > 1 else videos[:, 0],
        labels=np.asarray(labels, np.int64),
    )


def make_samples(folder):
    """Write a sample folder of two clips, as sample_gd.py does."""
    write_npz(folder / "samples.npz", np.zeros((2, 3, 8, 8, 3), np.uint8), labels=[0, 0])
    (folder / "samples.json").write_text(
        json.dumps({"classes": ["A"], "time_scale": 0.04, "flags": {"video": True}})
    )


def flip_bit(path, tensor):
    """Flip one bit of a tensor in a file."""
    content = bytearray(path.read_bytes())
    weights = tensor.numpy().tobytes()
    content[content.index(weights) + len(weights) // 2] ^= 4
    path.write_bytes(content)
