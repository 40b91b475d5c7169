import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vae as vae_module
from runtime.cli import UserError
from vae import load_vae

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


@pytest.fixture(scope="module")
def tiny(directory):
    return load_vae(directory)


def random_clips(frames=3):
    """Two clips, uint8 (2, 3, frames, 8, 16)."""
    return torch.randint(0, 256, (2, 3, frames, 8, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def frame_of(clips, b, t):
    """Frame t of clip b as the input of diffusers: (1, 3, H, W) in [-1, 1]."""
    return clips[b, :, t][None].float() / 127.5 - 1


def test_pixels_survive_the_round_trip_at_all_256_levels():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 16, 16).expand(1, 3, 2, 16, 16)
    vae = load_vae("none")
    latents = vae.encode(levels)
    assert latents.shape == (1, 3, 2, 16, 16) and latents.dtype == torch.float32
    assert latents.min() == -1 and latents.max() == 1
    decoded = vae.decode(latents)
    assert decoded.dtype == torch.uint8
    assert torch.equal(decoded, levels.permute(0, 2, 3, 4, 1))


def test_pixels_have_no_posterior_noise_and_no_scale():
    vae, clips = load_vae("none"), random_clips()
    mean, std = vae.posterior(clips)
    assert std is None
    assert torch.equal(vae.encode(clips, noise=torch.randn(mean.shape)), mean)
    assert (vae.name, vae.channels, vae.downsample, vae.scale, vae.shift) == ("none", 3, 1, 1, 0)


def test_decoded_pixels_are_clamped_and_rounded():
    latents = torch.tensor([-7.0, -1, 0.001, 1, 1.01]).view(1, 1, 1, 1, 5).expand(1, 3, 1, 1, 5)
    assert load_vae("none").decode(latents)[0, 0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_channels_downsample_and_scale_come_from_the_config_of_a_directory(tiny, directory):
    assert (tiny.name, tiny.channels, tiny.downsample, tiny.scale) == (directory, 4, 2, SCALE)


def test_the_model_is_frozen_and_in_eval_mode(tiny):
    assert not tiny.model.training
    assert not any(parameter.requires_grad for parameter in tiny.model.parameters())
    clips = random_clips()
    assert not tiny.decode(tiny.encode(clips)).requires_grad


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


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_the_chunk_size_changes_nothing(tiny, monkeypatch, chunk):
    clips = random_clips(frames=5)
    expected = tiny.posterior(clips)
    pixels = tiny.decode(tiny.encode(clips))
    monkeypatch.setattr(vae_module, "CHUNK", chunk)
    torch.testing.assert_close(tiny.posterior(clips), expected)
    assert (tiny.decode(tiny.encode(clips)).int() - pixels.int()).abs().max() <= 1


def test_the_model_gets_at_most_a_chunk_of_frames_at_once(tiny, monkeypatch):
    sizes, encode = [], tiny.model.encode

    def count(frames):
        sizes.append(len(frames))
        return encode(frames)

    monkeypatch.setattr(tiny.model, "encode", count)
    tiny.encode(random_clips(frames=5))
    assert sizes == [8, 2]


@pytest.mark.parametrize("word", ["emma", "stabilityai/sd-vae-ft-ema", "no/such/directory", ""])
def test_a_name_that_is_not_a_vae_or_a_directory_is_refused(word):
    with pytest.raises(UserError, match="--vae.*none, ema or mse.*directory"):
        load_vae(word)


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--vae .*config\.json.*AutoencoderKL"):
        load_vae(str(tmp_path))


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 1000])
def test_damaged_weights_are_refused(tmp_path, damage):
    file = Path(save_tiny(tmp_path)) / "diffusion_pytorch_model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match="--vae .*diffusion_pytorch_model"):
        load_vae(str(tmp_path))


def test_a_config_that_is_not_json_is_refused(tmp_path):
    (Path(save_tiny(tmp_path)) / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"--vae .*config\.json"):
        load_vae(str(tmp_path))


def test_weights_that_lack_a_tensor_are_refused_and_not_initialized_at_random(tmp_path):
    from safetensors.torch import load_file, save_file

    file = Path(save_tiny(tmp_path)) / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["decoder.conv_out.bias"]
    save_file(state, file)
    with pytest.raises(UserError, match=r"--vae .*lack 1 .*decoder\.conv_out\.bias"):
        load_vae(str(tmp_path))


def test_weights_of_another_size_are_refused_in_a_short_line(tmp_path):
    config = Path(save_tiny(tmp_path)) / "config.json"
    config.write_text(config.read_text().replace('"latent_channels": 4', '"latent_channels": 8'))
    with pytest.raises(UserError, match="--vae") as caught:
        load_vae(str(tmp_path))
    assert len(str(caught.value)) < 600


def run_python(code, **environment):
    source = str(Path(vae_module.__file__).parent)
    environment = {**os.environ, "PYTHONPATH": source, **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_pixels_need_neither_diffusers_nor_the_network():
    code = "import sys, vae; vae.load_vae('none'); print({'diffusers', 'huggingface_hub'} & set(sys.modules))"
    assert run_python(code).stdout == "set()\n"


def test_a_published_vae_that_is_not_cached_offline_is_one_line_that_says_what_to_do(tmp_path):
    code = "import vae\ntry: vae.load_vae('mse')\nexcept vae.UserError as error: raise SystemExit(str(error))"
    result = run_python(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    (line,) = result.stderr.splitlines()
    assert "--vae mse" in line and "stabilityai/sd-vae-ft-mse" in line and "directory" in line


def test_a_published_vae_in_the_cache_is_loaded_without_the_network(tmp_path):
    repo = tmp_path / "hub" / "models--stabilityai--sd-vae-ft-ema"
    save_tiny(repo / "snapshots" / "0123")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123")
    code = "import vae; print(vae.load_vae('ema').channels)"
    result = run_python(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert (result.returncode, result.stdout, result.stderr) == (0, "4\n", "")
