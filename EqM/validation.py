"""Validation on the same clips, noise and gammas each time: losses depend only on the weights."""

import math
from contextlib import suppress
from functools import partial
from itertools import chain

import torch

import transport
from models import Condition
from runtime import distributed
from runtime.rng import generator
from runtime.signals import Interrupted
from video.loader import batches_of

CHUNK = 8  # clips in a batch; fixed, so that the sums do not depend on the number of ranks
CLIPS_PER_VIDEO = 4  # upper limit
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
MOSTLY_NOISE = 0.15  # the highest gamma of frames that a model predicts from its condition


def validation_chunks(val, lengths, num_clips):
    """Lists of at most CHUNK pairs (num_frames, index), one pair per validation clip.

    A rank takes every n-th list.
    """
    chunks = []
    for num_frames in lengths:
        count = min(num_clips, CLIPS_PER_VIDEO * len(val[num_frames]))
        clips = [(num_frames, index) for index in range(count)]
        chunks += [clips[first : first + CHUNK] for first in range(0, count, CHUNK)]
    return chunks


@torch.no_grad()
def validate(ema, model, vae, loader, num_frames, precision, device, stop, given=False):
    """({name: loss of the EMA or the raw weights}, equal on all ranks; this rank's corrupt videos).

    The loader yields this rank's chunks. If the ranks must stay together, it yields all chunks, and
    the losses of rank 0 count. given: see `measure`. Raises Interrupted.
    """
    rows = []
    corrupt = []
    batches = batches_of(loader)
    with suppress(Interrupted):
        while (batch := stop.wait(batches)) is not None:
            columns = measure(
                ema, model, vae, batch, precision=precision, device=device, given=given
            )
            rows += torch.stack([column.double() for column in columns], dim=1).tolist()
            corrupt += batch["corrupt"]
    stop.resolve()
    parts = distributed.gather(rows)
    if stop.together:
        parts = parts[:1]
    rows = sorted(chain(*parts))  # in the order of frames and indices
    table = torch.tensor(rows, dtype=torch.float64)
    return summarize(table, num_frames, ema.config.learns), corrupt


def measure(ema, model, vae, batch, precision, device, given):
    """The columns of `summarize` for the clips of a batch, (B,) each.

    Gammas are multiples of the golden ratio modulo 1, so they are uniform. With `given`, the EMA is
    measured a second time with the first half of the frames clean, if clips have several temporal
    patches. With actions, it is also measured from nearly pure noise, with true and with random
    actions.
    """
    config = ema.config
    indices = batch["indices"].tolist()
    gamma = (batch["indices"].double() * GOLDEN_RATIO % 1).float().to(device)
    x = vae.latents_of(batch["clips"].to(device), 0, "validation", indices)
    T = x.shape[2]
    condition = Condition.of(batch["y"], config).to(device)
    draws = (generator(0, "condition", "validation", index) for index in indices)
    others = condition.randomized(config, draws)
    losses = partial(
        config.learns.losses,
        x=x,
        noise=transport.draw_noise(
            0, "validation", indices, x.shape[1:], device, pairs=batch["pairs"]
        ),
        y=condition.y,
        time_scale=batch["time_scales"].to(device),
        clean=x if config.causal else None,
    )
    loss_given, error, error_random = torch.full((3, len(gamma)), -1.0, device=device)  # unknown
    with distributed.autocast(device, precision):
        # a compiled graph of these shapes would serve nothing else
        with ema.without_graphs():
            raw, _, _ = losses(model, gamma=gamma)
        loss, _, _ = losses(ema, gamma=gamma)
        if given and config.temporal_patch_size < T:
            half = config.whole_levels(T // 2)
            is_given = torch.arange(T, device=device) < half
            levels = torch.where(is_given, 1.0, gamma[:, None])  # (B, T)
            loss_given, _, _ = losses(ema, gamma=levels, first=half)
        if others is not None and T > 1:
            low = MOSTLY_NOISE * gamma
            loss_true, _, _ = losses(ema, gamma=low, first=1)
            error = config.learns.data_errors(loss_true, low)
            loss_random, _, _ = losses(ema, gamma=low, first=1, y=others.y)
            error_random = config.learns.data_errors(loss_random, low)
    return (
        torch.full_like(gamma, T),
        batch["indices"].to(device),
        gamma,
        loss,
        raw,
        x.square().flatten(1).mean(dim=1),
        loss_given,
        error,
        error_random,
    )


def summarize(rows, num_frames, objective):
    """{name: mean loss} of float64 rows: frames, index, gamma, loss of the EMA, loss of the raw
    weights, E[x^2], the EMA's loss of the unmasked part with given frames, and the EMA's errors of
    x with true and with random actions. The last three are -1 if they were not measured. The names,
    for clips of num_frames except the last:

    val_loss, val_loss_raw          the EMA, the raw weights
    val_loss_rel                    the EMA, relative to a network that predicts zero
    val_loss_gamma_0.2, ...         the EMA, for gammas from 0.2 to 0.4 and the other fifths
    val_x_error                     the EMA's mean squared error of x from nearly pure noise
    val_action_psnr                 its PSNR with true minus random actions, in dB; 0: ignores them
    val_loss_given, val_loss_f8     the EMA, with given frames, on clips of 8 frames
    """
    frames, _, gamma, loss, raw, square, given, error, error_random = rows.T

    def mean_loss(part):
        mean = loss[part].mean()
        return mean.item(), (mean / objective.zero_loss(square[part].mean())).item()

    usual = frames == num_frames
    metrics = {}
    metrics["val_loss"], metrics["val_loss_rel"] = mean_loss(usual)
    metrics["val_loss_raw"] = raw[usual].mean().item()
    if (given[usual] != -1).any():
        metrics["val_loss_given"] = given[usual].mean().item()
    if (error[usual] != -1).any():
        x_error = error[usual].mean()
        metrics["val_x_error"] = x_error.item()
        ratio = error_random[usual].mean() / x_error
        metrics["val_action_psnr"] = 10 * ratio.log10().item()
    for fifth in range(5):
        if (part := usual & ((gamma * 5).long() == fifth)).any():
            metrics[f"val_loss_gamma_{fifth / 5}"] = loss[part].mean().item()
    lengths = frames.unique().int().tolist()
    if len(lengths) > 1:
        for length in lengths:
            loss_of_length, relative = mean_loss(frames == length)
            metrics[f"val_loss_f{length}"] = loss_of_length
            metrics[f"val_loss_rel_f{length}"] = relative
    return metrics
