import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load, save

import vae as vae_module
from runtime.cli import UserError
from vae import check_same, load_vae

SCALE = 0.7


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny AutoencoderKL with random weights on disk: 4 channels, downsample 2."""
    return save_tiny(tmp_path_factory.mktemp("vae"))


def save_tiny(path, **overrides):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4, sample_size=16,
        **{"scaling_factor": SCALE, **overrides},
    )  # fmt: skip
    model.save_pretrained(path)
    return str(path)


def add_to_weights(directory, amount):
    """Change the weights in the directory of a VAE."""
    file = Path(directory, "diffusion_pytorch_model.safetensors")
    file.write_bytes(save({name: tensor + amount for name, tensor in load(file.read_bytes()).items()}))


@pytest.fixture(scope="module")
def tiny(directory):
    return load_vae(directory)


def random_clips(frames=3):
    """Two clips, uint8 (2, 3, frames, 8, 16)."""
    return torch.randint(0, 256, (2, 3, frames, 8, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def frame_of(clips, b, t):
    """Frame t of clip b as the input of diffusers: (1, 3, H, W) in [-1, 1]."""
    return clips[b, :, t][None].float() / 127.5 - 1


def test_a_vae_is_known_by_its_weights_and_not_by_its_place(directory, tmp_path):
    vae, copy = load_vae(directory), load_vae(str(shutil.copytree(directory, tmp_path / "copy")))
    (file,) = Path(directory).glob("*.safetensors")
    assert vae.sha256 == copy.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert load_vae("none").sha256 is None
    check_same(copy, vae.sha256, "it")
    check_same(copy, None, "a file of an earlier version")
    add_to_weights(tmp_path / "copy", 0.1)
    with pytest.raises(UserError, match=r"--vae .*copy: another VAE: its weights have SHA-256 .* it was made with"):
        check_same(load_vae(str(tmp_path / "copy")), vae.sha256, "it")


def test_pixels_survive_the_round_trip_at_all_256_levels():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 16, 16).expand(1, 3, 2, 16, 16)
    vae = load_vae("none")
    latents = vae.encode(levels)
    assert latents.shape == (1, 3, 2, 16, 16) and latents.dtype == torch.float32
    assert latents.min() == -1 and latents.max() == 1
    decoded = vae.decode(latents)
    assert decoded.dtype == torch.uint8
    assert torch.equal(decoded, levels.permute(0, 2, 3, 4, 1))


def test_pixels_have_no_posterior_noise_and_no_scale_and_are_clamped_and_rounded():
    vae, clips = load_vae("none"), random_clips()
    mean, std = vae.posterior(clips)
    assert std is None
    assert torch.equal(vae.encode(clips, noise=torch.randn(mean.shape)), mean)
    assert (vae.name, vae.channels, vae.downsample, vae.scale, vae.shift) == ("none", 3, 1, 1, 0)
    latents = torch.tensor([-7.0, -1, 0.001, 1, 1.01]).view(1, 1, 1, 1, 5).expand(1, 3, 1, 1, 5)
    assert vae.decode(latents)[0, 0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_a_directory_gives_a_frozen_model_with_the_channels_downsampling_and_scale_of_its_config(tiny, directory):
    assert (tiny.name, tiny.channels, tiny.downsample, tiny.scale) == (directory, 4, 2, SCALE)
    assert not tiny.model.training
    assert not any(parameter.requires_grad for parameter in tiny.model.parameters())
    assert not tiny.decode(tiny.encode(random_clips())).requires_grad


def test_the_posterior_equals_that_of_diffusers_frame_by_frame(tiny):
    clips = random_clips()
    mean, std = tiny.posterior(clips)
    assert mean.shape == std.shape == (2, 4, 3, 4, 8)
    assert mean.dtype == std.dtype == torch.float32
    for b in range(2):
        for t in range(3):
            with torch.no_grad():
                expected = tiny.model.encode(frame_of(clips, b, t)).latent_dist
            torch.testing.assert_close(mean[b, :, t], expected.mean[0])
            torch.testing.assert_close(std[b, :, t], expected.std[0])


def test_latents_are_mean_plus_std_times_noise_scaled_once(tiny):
    clips = random_clips()
    mean, std = tiny.posterior(clips)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(tiny.encode(clips, noise), (mean + std * noise) * SCALE)
    torch.testing.assert_close(tiny.encode(clips), mean * SCALE)


def test_decoding_undoes_the_scale_and_equals_that_of_diffusers(tiny):
    clips = random_clips()
    decoded = tiny.decode(tiny.encode(clips))
    assert decoded.shape == (2, 3, 8, 16, 3) and decoded.dtype == torch.uint8
    with torch.no_grad():
        z = tiny.model.encode(frame_of(clips, 1, 2)).latent_dist.mean
        pixels = tiny.model.decode(z).sample[0].permute(1, 2, 0)
    expected = ((pixels.clamp(-1, 1) + 1) / 2 * 255).round()
    assert (decoded[1, 2].float() - expected).abs().max() <= 1  # one level, where the rounding differs


def test_a_shift_factor_is_subtracted_before_the_scale_and_added_back(tiny, tmp_path):
    shifted = load_vae(save_tiny(tmp_path, shift_factor=0.3))  # same weights
    clips = random_clips()
    latents = shifted.encode(clips)
    torch.testing.assert_close(latents, (tiny.posterior(clips)[0] - 0.3) * SCALE)
    difference = shifted.decode(latents).int() - tiny.decode(tiny.encode(clips)).int()
    assert difference.abs().max() <= 1


@pytest.mark.parametrize(("chunk", "sizes"), [(1, [1] * 10), (4, [4, 4, 2]), (8, [8, 2]), (100, [10])])
def test_the_model_gets_at_most_a_chunk_of_frames_at_once_and_its_size_changes_nothing(tiny, monkeypatch, chunk, sizes):
    assert vae_module.CHUNK == 8
    clips, found, encode = random_clips(frames=5), [], tiny.model.encode
    expected = tiny.posterior(clips)
    pixels = tiny.decode(tiny.encode(clips))
    monkeypatch.setattr(vae_module, "CHUNK", chunk)
    monkeypatch.setattr(tiny.model, "encode", lambda frames: found.append(len(frames)) or encode(frames))
    torch.testing.assert_close(tiny.posterior(clips), expected)
    assert found == sizes
    assert (tiny.decode(tiny.encode(clips)).int() - pixels.int()).abs().max() <= 1


@pytest.mark.parametrize("word", ["emma", "no/such/directory", ""])
def test_a_name_that_is_not_a_vae_or_a_directory_is_refused(word):
    with pytest.raises(UserError, match="--vae.*none, ema or mse.*directory"):
        load_vae(word)


def without_a_tensor(data):
    state = load(data)
    del state["decoder.conv_out.bias"]
    return save(state)


WEIGHTS, CONFIG = vae_module.WEIGHTS, vae_module.CONFIG
DAMAGES = {  # what: (file, the change of its bytes, words of the message)
    "no config": (CONFIG, None, r"config\.json.*AutoencoderKL"),
    "a config that is not JSON": (CONFIG, lambda data: b"{", r"config\.json"),
    "weights that are cut": (WEIGHTS, lambda data: data[: len(data) // 2], "diffusion_pytorch_model"),
    "no weights": (WEIGHTS, None, "diffusion_pytorch_model"),
    "weights of something else": (WEIGHTS, lambda data: b"x" * 1000, "diffusion_pytorch_model"),
    "a tensor less": (WEIGHTS, without_a_tensor, r"lack 1 .*decoder\.conv_out\.bias"),  # not initialized at random
    "another size": (CONFIG, lambda data: data.replace(b'"latent_channels": 4', b'"latent_channels": 8'), ""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_directory_is_refused_in_a_short_line(directory, tmp_path, damage):
    folder = shutil.copytree(directory, tmp_path / "vae")
    name, change, words = DAMAGES[damage]
    data = (folder / name).read_bytes()
    (folder / name).unlink()
    if change:
        assert change(data) != data
        (folder / name).write_bytes(change(data))
    with pytest.raises(UserError, match=f"--vae .*{words}") as error:
        load_vae(str(folder))
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """The folder of Hugging Face's cache, empty, without the network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_published_vae_that_is_not_cached_offline_is_one_line_that_says_what_to_do(offline):
    with pytest.raises(UserError, match="--vae mse.*stabilityai/sd-vae-ft-mse.*directory") as error:
        load_vae("mse")
    assert "\n" not in str(error.value)


def test_a_published_vae_in_the_cache_is_loaded_without_the_network(directory, offline, capfd):
    repo = offline / "models--stabilityai--sd-vae-ft-ema"
    shutil.copytree(directory, repo / "snapshots/0123")
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("0123")
    assert load_vae("ema").channels == 4
    assert capfd.readouterr() == ("", "")
