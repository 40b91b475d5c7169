"""VAEs: pixels, a directory of diffusers, published ones; latents, scale, chunks, and what is
refused.
"""

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load, save
from torch.testing import assert_close

import vae as vae_module
from runtime.rng import normal
from runtime.untrusted import file_sha256
from tiny_data import make_vae
from training import error_of, record_calls
from vae import CONFIG, WEIGHTS, check_same, load_vae

SCALE = 0.7
SHIFT = 0.3


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny AutoencoderKL with random weights on disk: 4 channels, downsample 2, scale and
    shift.
    """
    return save_tiny(tmp_path_factory.mktemp("vae"), shift_factor=SHIFT)


def save_tiny(path, **overrides):
    return str(make_vae(path, block_out_channels=(8, 16), scaling_factor=SCALE, **overrides))


def add_to_weights(directory, amount):
    """Change the weights in the directory of a VAE."""
    file = Path(directory, WEIGHTS)
    weights = load(file.read_bytes())
    file.write_bytes(save({name: weight + amount for name, weight in weights.items()}))


@pytest.fixture(scope="module")
def tiny(directory):
    return load_vae(directory)


RANDOM = torch.Generator().manual_seed(1)
CLIPS = torch.randint(0, 256, (2, 3, 5, 8, 16), dtype=torch.uint8, generator=RANDOM)


def test_a_vae_is_known_by_its_weights_and_not_by_its_place(tiny, directory, tmp_path, monkeypatch):
    copy = load_vae(str(shutil.copytree(directory, tmp_path / "copy")))
    assert tiny.sha256 == copy.sha256 == file_sha256(Path(directory, WEIGHTS))
    monkeypatch.chdir(tmp_path)
    Path("none").mkdir()  # a word of --vae is never a folder
    assert load_vae("none").sha256 is None
    assert load_vae("copy").name == copy.name
    check_same(copy, tiny.sha256, "it")
    add_to_weights(tmp_path / "copy", 0.1)
    line = error_of(check_same, load_vae("copy"), tiny.sha256, "it")
    assert line.startswith(f"--vae {tmp_path / 'copy'}: ")
    assert "SHA-256" in line


def test_pixels_survive_the_round_trip_at_all_256_levels_without_diffusers(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 16, 16).expand(1, 3, 2, 16, 16)
    vae = load_vae("none")
    assert vae.name == "none"
    assert vae.channels == 3
    assert vae.downsample == 1
    assert vae.scale == 1
    assert vae.shift == 0
    mean, std = vae.posterior(levels)
    assert std is None
    assert_close(mean, levels / 127.5 - 1)
    assert torch.equal(vae.encode(levels), mean)
    assert torch.equal(vae.latents_of(levels, 0, "s", [0]), mean)
    assert torch.equal(vae.decode(mean), levels.permute(0, 2, 3, 4, 1))
    outside = torch.tensor([-7.0, -1, 0.001, 1, 1.01]).view(1, 1, 1, 1, 5).expand(1, 3, 1, 1, 5)
    assert vae.decode(outside)[0, 0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


@torch.no_grad()
def test_latents_are_those_of_diffusers_shifted_and_scaled_once(tiny):
    frames = CLIPS.transpose(1, 2).flatten(0, 1)  # (10, 3, H, W), as diffusers takes them
    posterior = tiny.model.encode(frames / 127.5 - 1).latent_dist
    means = posterior.mean.unflatten(0, (2, 5)).transpose(1, 2)
    stds = posterior.std.unflatten(0, (2, 5)).transpose(1, 2)
    assert_close(tiny.posterior(CLIPS), (means, stds))
    noise = normal(2, "posterior", "s", [3, 5], means.shape[1:])
    latents = tiny.latents_of(CLIPS, 2, "s", [3, 5])
    assert_close(latents, (means + stds * noise - SHIFT) * SCALE)
    assert_close(tiny.encode(CLIPS), (means - SHIFT) * SCALE)
    decoded = tiny.decode(tiny.encode(CLIPS))
    assert decoded.dtype == torch.uint8
    pixels = tiny.model.decode(posterior.mean).sample.permute(0, 2, 3, 1).unflatten(0, (2, 5))
    expected = ((pixels.clamp(-1, 1) + 1) / 2 * 255).round()
    assert (decoded.float() - expected).abs().max() <= 1  # one level, where the rounding differs


def test_the_model_gets_chunks_of_frames_whose_size_changes_nothing(tiny, monkeypatch):
    expected = tiny.posterior(CLIPS)
    pixels = tiny.decode(tiny.encode(CLIPS))
    monkeypatch.setattr(vae_module, "CHUNK", 4)
    sizes = record_calls(monkeypatch, tiny.model, "encode", len)
    assert_close(tiny.posterior(CLIPS), expected)
    assert sizes == [4, 4, 2]
    assert (tiny.decode(tiny.encode(CLIPS)).int() - pixels.int()).abs().max() <= 1


def without_a_tensor(data):
    weights = load(data)
    del weights["decoder.conv_out.bias"]
    return save(weights)


def of_another_size(data):
    return data.replace(b'"latent_channels": 4', b'"latent_channels": 8')


@pytest.mark.parametrize(
    "name, change, words",
    [
        (CONFIG, lambda data: b"{", r"config\.json.*AutoencoderKL"),
        (CONFIG, of_another_size, ""),
        (WEIGHTS, lambda data: b"x" * 1000, "diffusion_pytorch_model"),
        # not initialized at random
        (WEIGHTS, without_a_tensor, r"lack 1 .*decoder\.conv_out\.bias"),
    ],
)
def test_a_damaged_directory_is_refused_in_a_short_line(directory, tmp_path, name, change, words):
    folder = shutil.copytree(directory, tmp_path / "vae")
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(change(data))
    line = error_of(load_vae, str(folder))
    assert re.search(f"--vae .*{words}", line)
    assert len(line) < 600


def test_a_published_vae_is_taken_from_the_cache_or_refused_in_a_line(
    directory, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert re.search("--vae mse.*stabilityai/sd-vae-ft-mse.*directory", error_of(load_vae, "mse"))
    capfd.readouterr()
    repo = tmp_path / "models--stabilityai--sd-vae-ft-ema"
    shutil.copytree(directory, repo / "snapshots/0123")
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("0123")
    assert load_vae("ema").channels == 4
    assert capfd.readouterr() == ("", "")
