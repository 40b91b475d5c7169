"""Validation: the same clips, noise and gammas each time, so that the losses depend on the weights alone."""

import math
from contextlib import suppress

import torch

import transport
from runtime import distributed
from runtime.rng import normal
from runtime.signals import Interrupted
from video.loader import batches_of

CHUNK = 8  # clips that are validated together; fixed, so that the sums do not depend on the number of ranks
CLIPS_PER_VIDEO = 4  # at most
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def validation_chunks(val, lengths, num_clips):
    """The (num_frames, index) of all validation clips, in lists of at most CHUNK; a rank takes every n-th list."""
    chunks = []
    for num_frames in lengths:
        count = min(num_clips, CLIPS_PER_VIDEO * len(val[num_frames]))
        keys = [(num_frames, index) for index in range(count)]
        chunks += [keys[first : first + CHUNK] for first in range(0, count, CHUNK)]
    return chunks


@torch.no_grad()
def validate(ema, model, vae, loader, num_frames, precision, device, stop):
    """({name: value}, equal on all ranks, of the EMA and of the raw weights; this rank's bad videos).

    The loader gives this rank's validation chunks. Gammas are uniform: multiples of the golden ratio, modulo 1. The
    chunks are the same on any number of ranks. Raises Interrupted.
    """
    rows, bad, batches = [], [], batches_of(loader)
    with suppress(Interrupted):
        while (batch := stop.wait(batches)) is not None:
            indices, labels, time_scale = batch["indices"], batch["labels"].to(device), batch["time_scales"].to(device)
            gamma = (indices.double() * GOLDEN_RATIO % 1).float()
            x = vae.latents_of(batch["clips"].to(device), 0, "validation", indices.tolist())
            noise = normal(0, "noise", "validation", indices.tolist(), x.shape[1:], device)
            gamma = gamma.to(device)
            x_gamma = transport.interpolate(x, noise, gamma)
            losses = []
            for network in (ema, model):
                with distributed.autocast(device, precision):
                    f = network(x_gamma, labels, time_scale)
                losses.append(transport.loss(f, x, noise, gamma))
            frames = torch.full_like(gamma, batch["clips"].shape[-3])
            columns = frames, indices.to(device), gamma, *losses, x.square().flatten(1).mean(1)
            rows.append(torch.stack([column.double() for column in columns], dim=1).cpu())
            bad += batch["bad"]
    stop.settle()
    rows = torch.cat([row for part in distributed.gather(rows) for row in part])
    rows = torch.tensor(sorted(rows.tolist()), dtype=torch.float64)  # in the order of frames and indices
    return summarize(rows, num_frames), bad


def summarize(rows, num_frames):
    """{name: value} of float64 rows: frames, index, gamma, loss of the EMA and of the raw weights, E[x^2].

    val_loss is the EMA's at num_frames, val_loss_raw that of the raw weights, val_loss_gamma_0.2 the EMA's for gammas
    from 0.2 to 0.4 (and so on, in fifths), val_loss_f8 the EMA's at 8 frames; "rel" means relative to the loss of a
    network that predicts zero.
    """

    def mean_loss(part):
        _, _, _, loss, _, square = part.mean(dim=0)
        return loss.item(), (loss / transport.zero_loss(square)).item()

    own, metrics = rows[rows[:, 0] == num_frames], {}
    metrics["val_loss"], metrics["val_loss_rel"] = mean_loss(own)
    metrics["val_loss_raw"] = own[:, 4].mean().item()
    for fifth in range(5):
        part = own[(own[:, 2] * 5).long() == fifth]
        if len(part):
            metrics[f"val_loss_gamma_{fifth / 5}"] = part[:, 3].mean().item()
    lengths = rows[:, 0].unique().int().tolist()
    for length in lengths if len(lengths) > 1 else []:
        part = rows[rows[:, 0] == length]
        metrics[f"val_loss_f{length}"], metrics[f"val_loss_rel_f{length}"] = mean_loss(part)
    return metrics
