"""train_vae.py: a small VAE of the frames of a data folder, that all other scripts take as --vae
DIR.
"""

import math
import shutil
from dataclasses import replace
from shlex import split

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import autoencoder
import train_vae
from autoencoder import (
    Autoencoder,
    hidden_matrices,
    jitter_colors,
    losses_of,
    make_autoencoder,
    psnr,
    residual_blocks,
)
from test_transport import normal
from training import TINY_VAE, Training, compare, content, record_calls, refused, run_here
from vae import load_vae
from video.loader import batches_of

STEPS = 7


@pytest.fixture(scope="module")
def made(shapes, tmp_path_factory):
    """A run that nothing has disturbed, and the frames that each of its validations measures: held
    out, then others.
    """
    training = Training(
        data=shapes,
        results=tmp_path_factory.mktemp("vae") / "r",
        steps=STEPS,
        base=TINY_VAE,
        script="train_vae.py",
    )

    def frames_and_videos(ema, loader, device):
        batches = list(batches_of(loader))
        videos = {video for batch in batches for video in batch["videos"]}
        return torch.cat([batch["clips"] for batch in batches]), videos

    with pytest.MonkeyPatch.context() as patch:
        seen = record_calls(patch, autoencoder, "measure", frames_and_videos)
        assert run_here(training) == STEPS
    return training, seen


@pytest.fixture(scope="module")
def whole(made):
    return made[0]


def test_losses_match_their_definitions():
    x = torch.rand(2, 3, 8, 8)
    zeros = torch.zeros(2, 4, 2, 2)
    assert not any(losses_of(x, x, zeros, zeros).values())
    losses = losses_of(x, x + 0.25, zeros, zeros)
    assert losses["pixel_loss"].item() == pytest.approx(0.25)
    assert losses["gradient_loss"].item() < 1e-6
    ramp = torch.arange(8.0).expand(2, 3, 8, 8)  # one more per column, as much in each row
    losses = losses_of(x, x + 0.5 * ramp, zeros, zeros)
    assert losses["gradient_loss"].item() == pytest.approx(0.5)
    # the KL loss is in nats per latent value
    mean = torch.randn(2, 4, 3, 3)
    logvar = torch.randn(2, 4, 3, 3)
    posterior = torch.distributions.Normal(mean, (logvar / 2).exp())
    standard = torch.distributions.Normal(0.0, 1.0)
    divergence = torch.distributions.kl_divergence(posterior, standard).mean()
    losses = losses_of(x, x, mean, logvar)
    assert losses["kl_loss"].item() == pytest.approx(1e-4 * divergence.item(), rel=1e-5)


def test_the_psnr_of_a_constant_error_is_known():
    real = torch.zeros(3, 8, 8, 3, dtype=torch.uint8)
    for error, expected in ((0, 99), (1, 48.1308), (5, 34.1514), (255, 0)):
        assert psnr(real, real + error).tolist() == pytest.approx([expected] * 3, abs=1e-4)


def test_the_color_change_of_a_frame_is_affine_and_depends_on_its_index():
    x = torch.rand(6, 3, 8, 8) * 0.1  # far from the ends, where colors are clamped
    assert torch.equal(jitter_colors(x, 0, range(6), share=0), x)
    changed = jitter_colors(x, 0, range(6), share=1)
    assert torch.equal(jitter_colors(x[3:], 0, range(3, 6), share=1), changed[3:])
    for before, after in zip(x.flatten(2).mT, changed.flatten(2).mT, strict=True):  # (64, 3)
        pixels = torch.cat([before, torch.ones(64, 1)], dim=1)
        change = torch.linalg.lstsq(pixels, after).solution
        assert_close(pixels @ change, after, atol=1e-4, rtol=0)
        assert (after - before).abs().max() > 0.02
    assert jitter_colors(torch.ones(6, 3, 8, 8), 0, range(6), share=1).max() <= 1


def test_at_first_residual_blocks_change_nothing_and_latents_have_little_noise():
    torch.manual_seed(0)
    model = make_autoencoder([8, 16, 16], 4, 32)
    for block in residual_blocks(model):
        x = torch.randn(2, block.in_channels, 8, 8)
        expected = block.conv_shortcut(x) if block.conv_shortcut else x
        assert_close(block(x, None), expected)
    frames = torch.rand(2, 3, 32, 32) * 2 - 1
    decoded, mean, logvar = Autoencoder(model)(frames, torch.zeros(2, 4, 8, 8))
    assert mean.shape == logvar.shape == (2, 4, 8, 8)
    assert 0.01 < (logvar / 2).exp().mean() < 0.1 < mean.std()
    assert_close(decoded, model.decode(mean).sample)  # without noise


def test_muon_trains_all_convolutions_of_a_vae_but_the_first_and_last_ones():
    model = make_autoencoder([8, 16, 16], 4, 32)
    kernels = {name for name, weight in model.named_parameters() if weight.dim() == 4}
    hidden = {id(weight) for weight in hidden_matrices(model)}
    others = {name for name in kernels if id(model.get_parameter(name)) not in hidden}
    assert others == {
        "encoder.conv_in.weight",
        "encoder.conv_out.weight",
        "quant_conv.weight",
        "post_quant_conv.weight",
        "decoder.conv_in.weight",
        "decoder.conv_out.weight",
    }


def test_the_latents_of_training_frames_have_mean_0_and_deviation_1(made):
    training, [*_, (frames, _)] = made
    vae = load_vae(str(training.folder / "vae"))
    assert vae.channels == 2
    assert vae.downsample == 4
    mean, std = vae.posterior(frames)
    noise = normal(200, *mean.shape[1:])
    latents = torch.cat([(mean + std * part - vae.shift) * vae.scale for part in noise.split(20)])
    assert latents.mean().item() == pytest.approx(0, abs=0.02)
    assert latents.std().item() == pytest.approx(1, abs=0.02)


def test_the_validation_psnr_equals_the_exported_vaes_on_held_out_frames(made):
    training, [*_, (frames, held_out), (_, others)] = made
    assert held_out.isdisjoint(others)
    vae = load_vae(str(training.folder / "vae"))
    decoded = vae.decode(vae.encode(frames))[:, 0]  # (B, H, W, 3)
    errors = frames[:, :, 0].movedim(1, -1).double() - decoded
    scores = [10 * math.log10(255**2 / error.square().mean()) for error in errors]
    assert training.rows()[-1]["val_psnr"] == pytest.approx(np.mean(scores), abs=0.02)


def test_it_learns_and_writes_sheets_of_reconstructions(whole):
    scores = [row["val_psnr"] for row in whole.rows() if "val_psnr" in row]
    assert len(scores) == 2
    assert scores[-1] > scores[0]
    assert content(whole.folder / "samples").keys() == {"0000005.png", "0000007.png"}


@pytest.mark.parametrize("stop_after", [5, STEPS])  # validation is due; all is done but that
def test_an_interrupted_run_resumed_from_cached_frames_ends_bit_for_bit_like_the_whole_run(
    whole, tmp_path, stop_after
):
    parts = replace(whole, results=tmp_path / "parts")
    assert run_here(parts, stop_after=stop_after) == stop_after
    latest = parts.folder / "checkpoints/latest.pt"
    state = parts.saved()
    del state["config"]["typed"]
    torch.save(state, latest)  # as the tree before wrote it
    assert run_here(parts, "--resume", "--cache-frames") == STEPS - stop_after
    assert compare(whole, parts) == []
    assert content(parts.folder / "vae") == content(whole.folder / "vae")


def test_a_finished_run_says_so_and_other_widths_are_another_run(whole, tmp_path, capsys):
    copy = replace(whole, results=shutil.copytree(whole.results, tmp_path / "copy"))
    assert run_here(copy, "--resume") == 0
    assert "is finished at step 7" in capsys.readouterr().out
    assert compare(whole, copy) == []
    assert content(copy.folder / "vae") == content(whole.folder / "vae")
    line = refused(capsys, train_vae, *copy.command_flags("--resume", "--optimizer", "adamw"))
    assert "trained with --optimizer muon, got adamw: give the same" in line
    line = refused(capsys, train_vae, *copy.command_flags("--resume", "--max-steps", 6))
    assert "--max-steps 6: the checkpoint is at step 7 already" in line
    run_here(copy, *split("--resume --widths 8 8 16 --max-steps 1"))
    assert "--resume: no run VAE-16px-f4-c2-8-8-16 in" in capsys.readouterr().out
    assert len(list(copy.results.glob("[0-9]*"))) == 2
