"""The small VAE of train_vae.py: network, losses, PSNR, and the folder of --vae DIR."""

import math
import os
import shutil
from pathlib import Path

import torch
from torch import nn

from runtime import distributed
from runtime.atomic import sync
from runtime.rng import generator
from vae import VAE
from video.loader import batches_of

GROUPS = 1  # of the group norms; groups of few channels would lose the colors of a frame
LOG_VARIANCE = -6.0  # of the latents at first: with less noise, the VAE learns slightly faster
# relative to errors of pixels in [-1, 1]: keeps the latents close to normal, and costs few dB
KL_WEIGHT = 1e-4
CHUNK = 16  # frames that are measured together; fixed, so sums don't depend on the number of ranks


def make_autoencoder(widths, latent_channels, image_size):
    """An untrained AutoencoderKL without attention. widths: one per resolution, full size first."""
    from diffusers import AutoencoderKL  # takes seconds to import

    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=tuple(widths),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=GROUPS,
        mid_block_add_attention=False,
        sample_size=image_size,
    )
    # a deep network learns faster if its blocks change nothing at first
    for block in residual_blocks(model):
        nn.init.zeros_(block.conv2.weight)
        nn.init.zeros_(block.conv2.bias)
    nn.init.constant_(model.quant_conv.bias[latent_channels:], LOG_VARIANCE)
    return model


def hidden_parts(model):
    """The parts of an AutoencoderKL between its first and last convolutions."""
    encoder = model.encoder
    decoder = model.decoder
    return [*encoder.down_blocks, encoder.mid_block, decoder.mid_block, *decoder.up_blocks]


def residual_blocks(model):
    """The residual blocks of an AutoencoderKL."""
    return [block for part in hidden_parts(model) for block in part.resnets]


def hidden_matrices(model):
    """The weights that Muon trains: of the convolutions in these parts."""
    weights = []
    for part in hidden_parts(model):
        for layer in part.modules():
            if isinstance(layer, nn.Conv2d):
                weights.append(layer.weight)
    return weights


class Autoencoder(nn.Module):
    """An AutoencoderKL with the forward pass of training."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, noise):
        """x (B, 3, H, W) in [-1, 1], noise (B, C, h, w) -> (reconstructions, mean and log variance
        of the latents).
        """
        posterior = self.model.encode(x).latent_dist
        latents = posterior.mean + posterior.std * noise
        reconstruction = self.model.decode(latents).sample
        return reconstruction, posterior.mean, posterior.logvar


def draw_colors(random, most):
    """(matrix (3, 3), offset (3, 1, 1)) for pixels in [-1, 1]: random saturation, gains, offsets.

    The saturation is from 0 to `most`.
    """
    saturation = most * torch.rand((), generator=random)  # 0: gray
    gain = torch.exp(0.4 * torch.rand(3, 1, generator=random) - 0.2)
    offset = 0.2 * torch.rand(3, 1, 1, generator=random) - 0.1
    gray = torch.full((3, 3), 1 / 3)
    colors = torch.lerp(gray, torch.eye(3), saturation)
    return gain * colors, offset


def jitter_colors(x, seed, indices, share):
    """Frames (B, 3, H, W) in [-1, 1], a share of them in other colors, with channels in any order.

    Few videos show few colors, and a VAE learns no others. The result depends on the seed and the
    frames' indices only.
    """
    matrices = torch.eye(3).repeat(len(x), 1, 1)
    offsets = torch.zeros(len(x), 3, 1, 1)
    for matrix, offset, index in zip(matrices, offsets, indices, strict=True):
        random = generator(seed, "colors", 0, index)
        if torch.rand((), generator=random) < share:
            colors, shift = draw_colors(random, most=4)  # pale videos become colorful
            order = torch.randperm(3, generator=random)
            matrix.copy_(colors[order])
            offset.copy_(shift)
    x = torch.einsum("bij,bjhw->bihw", matrices.to(x.device), x)
    return (x + offsets.to(x.device)).clamp(-1, 1)


def losses_of(x, reconstruction, mean, logvar):
    """{name: loss}, for their sum: absolute errors of pixels and of their gradients, and KL
    divergence per latent value (Kingma and Welling, arXiv 1312.6114, appendix B).
    """
    error = reconstruction.float() - x
    gradient = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    mean = mean.float()
    logvar = logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return {"pixel_loss": error.abs().mean(), "gradient_loss": gradient, "kl_loss": KL_WEIGHT * kl}


def psnr(real, decoded):
    """Peak signal-to-noise ratio of each of uint8 images (B, H, W, 3), in dB: (B,).

    Equal images have 99.
    """
    error = real.double() - decoded.double()
    error = error.square().flatten(1).mean(dim=1)
    return 10 * torch.log10(255**2 / error.clamp(min=255**2 / 10**9.9))


@torch.no_grad()
def measure(model, loader, device):
    """({"psnr", "latent_mean", "latent_std"}, this rank's corrupt videos) for frames of loaders.

    psnr is the mean in dB over the frames, decoded from their mean latents. The statistics are over
    all latent values. The results are the same on all ranks and for any number of ranks.
    """
    rows = []
    corrupt = []
    vae = VAE("measured", model)
    # the values of an earlier export would change the last bits
    vae.scale = 1.0
    vae.shift = 0.0
    for batch in batches_of(loader):
        clips = batch["clips"].to(device)  # (B, 3, 1, H, W)
        mean, std = vae.posterior(clips)  # in float32, like caches and samples
        errors = psnr(clips[:, :, 0].movedim(1, -1), vae.decode(mean)[:, 0])
        mean = mean.double().flatten(1)
        std = std.double().flatten(1)
        columns = [
            batch["indices"],
            errors,
            mean.mean(dim=1),
            (mean.square() + std.square()).mean(dim=1),
        ]
        columns = [column.double().cpu() for column in columns]
        rows += torch.stack(columns, dim=1).tolist()
        corrupt += batch["corrupt"]
    columns = distributed.gather_in_order(rows)
    mean_psnr, mean, second_moment = [math.fsum(column) / len(column) for column in columns]
    std = math.sqrt(second_moment - mean**2)
    return {"psnr": mean_psnr, "latent_mean": mean, "latent_std": std}, corrupt


def export(model, folder, statistics):
    """Write an AutoencoderKL as a folder for --vae DIR.

    A kill may leave no folder, but never half of one.
    """
    folder = Path(folder)
    temporary = folder.with_name(folder.name + ".new")
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a kill
    shutil.rmtree(old, ignore_errors=True)
    model.register_to_config(
        scaling_factor=1 / statistics["latent_std"], shift_factor=statistics["latent_mean"]
    )
    model.save_pretrained(temporary)
    for path in (*temporary.iterdir(), temporary):
        sync(path)
    if folder.exists():
        os.rename(folder, old)
    os.rename(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)
