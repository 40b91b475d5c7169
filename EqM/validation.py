"""Validation: the same clips, noise and gammas each time, so that the losses depend on the weights alone."""

import math
from contextlib import suppress
from functools import partial
from itertools import chain

import torch

import transport
from models import Condition
from runtime import distributed
from runtime.rng import normal
from runtime.signals import Interrupted
from video.loader import batches_of

CHUNK = 8  # clips that are validated together; fixed, so that the sums do not depend on the number of ranks
CLIPS_PER_VIDEO = 4  # at most
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def validation_chunks(val, lengths, num_clips):
    """The (num_frames, index) of all validation clips, in lists of at most CHUNK; a rank takes every n-th list."""
    keys = [[(n, index) for index in range(min(num_clips, CLIPS_PER_VIDEO * len(val[n])))] for n in lengths]
    return [own[first : first + CHUNK] for own in keys for first in range(0, len(own), CHUNK)]


@torch.no_grad()
def validate(ema, model, vae, loader, num_frames, precision, device, stop, given=False):
    """({name: value}, equal on all ranks, of the EMA and of the raw weights; this rank's corrupt videos).

    The loader gives this rank's chunks; if the ranks have to stay together, each has all, and rank 0's losses count.
    Gammas are uniform: multiples of the golden ratio, modulo 1. given: the EMA also with the first half of the frames
    clean, if a clip has several temporal patches. Raises Interrupted.
    """
    rows, corrupt, batches = [], [], batches_of(loader)
    with suppress(Interrupted):
        while (batch := stop.wait(batches)) is not None:
            indices, time_scale = batch["indices"].tolist(), batch["time_scales"].to(device)
            gamma = (batch["indices"].double() * GOLDEN_RATIO % 1).float().to(device)
            x = vae.latents_of(batch["clips"].to(device), 0, "validation", indices)
            noise = normal(0, "noise", "validation", indices, x.shape[1:], device)
            y, T = Condition.of(batch["y"], ema.config).to(device).y, x.shape[2]

            losses = partial(transport.losses, x=x, noise=noise, y=y, time_scale=time_scale)
            with distributed.autocast(device, precision):
                with torch.compiler.set_stance("force_eager"):  # or it would make a graph that nothing else uses
                    raw = losses(model, gamma=gamma)[0]
                columns = [losses(ema, gamma=gamma)[0], raw, x.square().flatten(1).mean(dim=1)]
                if given and ema.config.temporal_patch_size < T:
                    columns.append(losses(ema, gamma=transport.half_given(gamma, T), first=T // 2)[0])
                else:
                    columns.append(torch.full_like(gamma, -1))  # no loss is negative
            columns = [torch.full_like(gamma, T), batch["indices"].to(device), gamma, *columns]
            rows += torch.stack([column.double() for column in columns], dim=1).tolist()
            corrupt += batch["corrupt"]
    stop.resolve()
    parts = distributed.gather(rows)
    rows = sorted(chain(*(parts[:1] if stop.together else parts)))  # in the order of frames and indices
    return summarize(torch.tensor(rows, dtype=torch.float64), num_frames), corrupt


def summarize(rows, num_frames):
    """{name: value} of float64 rows: frames, index, gamma, loss of the EMA and of the raw weights, E[x^2], and the
    EMA's loss of the frames that are not given (-1: none are given).

    val_loss is the EMA's at num_frames, val_loss_raw that of the raw weights, val_loss_gamma_0.2 the EMA's for gammas
    from 0.2 to 0.4 (and so on, in fifths), val_loss_f8 the EMA's at 8 frames; "rel" means relative to the loss of a
    network that predicts zero. val_loss_given is the EMA's at num_frames with given frames.
    """

    frames, _, gamma, loss, raw, square, given = rows.T

    def mean_loss(part):
        mean = loss[part].mean()
        return mean.item(), (mean / transport.zero_loss(square[part].mean())).item()

    own, metrics = frames == num_frames, {}
    metrics["val_loss"], metrics["val_loss_rel"] = mean_loss(own)
    metrics["val_loss_raw"] = raw[own].mean().item()
    if (given[own] != -1).any():
        metrics["val_loss_given"] = given[own].mean().item()
    for fifth in range(5):
        if (part := own & ((gamma * 5).long() == fifth)).any():
            metrics[f"val_loss_gamma_{fifth / 5}"] = loss[part].mean().item()
    lengths = frames.unique().int().tolist()
    for length in lengths if len(lengths) > 1 else []:
        metrics[f"val_loss_f{length}"], metrics[f"val_loss_rel_f{length}"] = mean_loss(frames == length)
    return metrics
