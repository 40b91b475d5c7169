"""Pairs of noise and sample: what sample_gd.py keeps, and students that train on it."""

import numpy as np
import pytest
import torch

import sample_gd
from tiny_data import make_vae, random_checkpoint
from training import refused, sample_here
from vae import load_vae

FRAMES = 4


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """A folder with checkpoints of random networks: pixels.pt, and latents.pt with its VAE."""
    folder = tmp_path_factory.mktemp("teachers")
    vae = make_vae(folder / "vae")
    settings = {"num_frames": FRAMES, "use_rope": True, "depth": 1}
    random_checkpoint(folder / "pixels.pt", **settings)
    random_checkpoint(folder / "latents.pt", vae=vae, **settings)
    return folder


def test_kept_latents_are_what_the_vae_decodes(teachers, tmp_path):
    flags = ["--num-samples", 5, "--batch-size", 2, "--save-latents"]
    clips, _ = sample_here(teachers / "latents.pt", tmp_path / "s", *flags)
    latents = np.load(tmp_path / "s/latents.npy")
    vae = load_vae(str(teachers / "vae"))
    assert latents.shape == (5, vae.channels, FRAMES, 8, 8)
    scaled = (torch.from_numpy(latents) - vae.shift) * vae.scale
    difference = vae.decode(scaled).int() - torch.from_numpy(clips)
    assert difference.abs().max() <= 1  # scaled and unscaled again
    sample_here(teachers / "latents.pt", tmp_path / "s")
    assert not (tmp_path / "s/latents.npy").exists()


def test_latents_are_kept_of_one_window_and_of_a_vae(teachers, tmp_path, capsys):
    places = ["--video", "--folder", tmp_path / "s", "--save-latents", "--ckpt"]
    line = refused(capsys, sample_gd, *places, teachers / "pixels.pt")
    assert "--save-latents: " in line and "works on pixels" in line
    flags = [teachers / "latents.pt", "--num-frames", 12, "--window", 8]
    line = refused(capsys, sample_gd, *places, *flags)
    assert "--save-latents: the 12 frames are made in windows of 8" in line
