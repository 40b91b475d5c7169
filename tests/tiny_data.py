"""What several tests train on: a tiny VAE and a folder of images, made on the spot."""

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image


def make_vae(folder):
    """An AutoencoderKL with random weights, always the same: 4 channels, downsampling 2. Returns the folder."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16,
    )  # fmt: skip
    vae.save_pretrained(folder)
    return folder


def make_images(root, count, suffix=".png"):
    """`count` images of 20 x 16 px in the classes A and B in turn. Returns root."""
    for number in range(count):
        (root / "AB"[number % 2]).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (16, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "AB"[number % 2] / f"{number}{suffix}")
    return root
