"""Sampling is gradient descent on the learned field (arXiv 2510.02300, section 3.3).

Everything here takes the network as a callable, so it is tested on fields whose answer is known.
"""

import torch
from tqdm import tqdm

METHODS = ("gd", "ngd")


def sample(field, x, method="gd", num_steps=250, step_size=0.0017, momentum=0.3, stop_below=None, progress=None):
    """Descend from x (B, ...) along a field; returns the end points and the evaluations spent.

    field(x, keep) is the field of the samples that are still running; keep (b,) int64 are their
    indices in the batch. method: "gd", x <- x + eta f(x), or "ngd" (Nesterov), x <- x + eta f(x +
    eta mu m) where m is the last f. num_steps counts the points, so there are num_steps - 1
    evaluations. With stop_below, a sample whose f has a root mean square below it stays where it is
    and leaves the batch. progress: a tqdm bar that is moved by one per evaluation of the batch.

    Returns x (B, ...) and evaluations (B,) int64.
    """
    assert method in METHODS, method
    momentum = momentum if method == "ngd" else 0.0
    x, last_f = x.clone(), torch.zeros_like(x)
    keep = torch.arange(len(x), device=x.device)
    evaluations = torch.zeros_like(keep)
    for _ in range(num_steps - 1):
        f = field(x[keep] + step_size * momentum * last_f[keep], keep)
        evaluations[keep] += 1
        if progress is not None:
            progress.update()
        if stop_below is not None:
            moving = f.square().flatten(1).mean(dim=1).sqrt() >= stop_below
            keep, f = keep[moving], f[moving]
            if len(keep) == 0:
                break
        x[keep] += step_size * f
        last_f[keep] = f
    return x, evaluations


def guided(network, labels, time_scale, guidance, null_label):
    """The field with classifier-free guidance, f_null + s (f_class - f_null), on all channels.

    network(x, y, time_scale) -> f; labels (B,) int64, time_scale (B,) seconds per frame. Both halves
    go through the network as one batch; guidance 1 needs, and evaluates, the class half only.
    """

    def field(x, keep):
        y, scale = labels[keep], time_scale[keep]
        if guidance == 1:
            return network(x, y, scale).float()
        null = torch.full_like(y, null_label)
        f_null, f_class = network(x.repeat(2, 1, 1, 1, 1), torch.cat([null, y]), scale.repeat(2)).float().chunk(2)
        return f_null + guidance * (f_class - f_null)

    return field


@torch.no_grad()
def generate(
    network, noise, labels, time_scale, null_label, guidance, precision="fp32", batch_size=16, show=True, **settings
):
    """Turn noise into samples, batch by batch, with one progress bar for all of them.

    noise (N, C, T, H, W) float32, labels (N,), time_scale (N,); settings are those of `sample`.
    precision "bf16" is for the network only, positions of the descent stay float32.
    Returns samples (N, C, T, H, W) and evaluations (N,).
    """
    if len(noise) == 0:  # more ranks than samples
        return noise, labels
    batches = list(zip(*(part.split(batch_size) for part in (noise, labels, time_scale)), strict=True))
    total, results = len(batches) * (settings["num_steps"] - 1), []
    with (
        tqdm(total=total, desc="sampling", unit="step", leave=False, disable=not show) as progress,
        torch.autocast(noise.device.type, torch.bfloat16, enabled=precision == "bf16"),
    ):
        for x, y, scale in batches:
            field = guided(network, y, scale, guidance, null_label)
            results.append(sample(field, x, progress=progress, **settings))
    samples, evaluations = zip(*results, strict=True)
    return torch.cat(samples), torch.cat(evaluations)
