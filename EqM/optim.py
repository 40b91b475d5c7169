"""Optimizers, their learning rates, gradients that are not finite, and the EMA of the weights."""

import math
from itertools import groupby

import torch
import torch.distributed as dist

from runtime import distributed

MUON_DECAY = 0.1  # weight decay; without any the weights grow as long as the learning rate does not fall


def make_optimizers(model, args):
    """[AdamW], or with --optimizer muon [AdamW, Muon]: Muon for the weight matrices of attention and MLP."""
    matrices = []
    if args.optimizer == "muon":
        for block in model.blocks:
            matrices += [block.attn.qkv.weight, block.attn.proj.weight, block.mlp.fc1.weight, block.mlp.fc2.weight]
    by_muon = {id(weight) for weight in matrices}
    rest = [weight for weight in model.parameters() if id(weight) not in by_muon]
    optimizers = [torch.optim.AdamW(rest, lr=args.lr, weight_decay=args.weight_decay, fused=True)]
    if matrices:
        optimizers.append(Muon(matrices, lr=args.muon_lr, weight_decay=args.weight_decay))
    return optimizers


# ----------------------------------------------------------------------------------------------------------------------
# Muon


class Muon(torch.optim.Optimizer):
    """Descends along momenta that were made orthogonal (Jordan et al., kellerjordan.github.io/posts/muon, 2024).

    That takes many matrix products. The ranks share the matrices out and give each other the results; weights and
    momenta are on all of them. lr and weight_decay are those of torch.optim.Muon.
    """

    momentum = 0.95  # Nesterov's

    def __init__(self, matrices, lr, weight_decay):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        self.ranks = distributed.world_size() if distributed.is_started() else 1
        self.rank = distributed.rank() if self.ranks > 1 else 0
        self.owners = share_out([weight.shape for weight in matrices], self.ranks)

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        weights = group["params"]
        gradients = [weight.grad for weight in weights]
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        momenta = [self.state[weight]["momentum_buffer"] for weight in weights]
        torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
        own = [index for index, owner in enumerate(self.owners) if owner == self.rank]
        directions = orthogonalize([gradients[index].lerp(momenta[index], self.momentum) for index in own])
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        for weight, direction in zip(weights, self.gather(directions, weights), strict=True):
            rows, columns = weight.shape
            weight.add_(direction, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))

    def gather(self, own, weights):
        """The directions of all weights, in their order, from those that each rank has computed."""
        if self.ranks == 1:
            return own
        sizes = [0] * self.ranks  # values per rank
        for weight, owner in zip(weights, self.owners, strict=True):
            sizes[owner] += weight.numel()
        mine = torch.zeros(max(sizes), dtype=torch.bfloat16, device=weights[0].device)
        if own:
            torch.cat([direction.flatten() for direction in own], out=mine[: sizes[self.rank]])
        parts = [torch.empty_like(mine) for _ in sizes]
        # As bytes: not every backend has bfloat16
        dist.all_gather([part.view(torch.uint8) for part in parts], mine.view(torch.uint8))
        directions = []
        for weight, owner in zip(weights, self.owners, strict=True):
            directions.append(parts[owner][: weight.numel()].view_as(weight))
            parts[owner] = parts[owner][weight.numel() :]
        return directions


def share_out(shapes, ranks):
    """The rank that orthogonalises each matrix: the largest comes first and goes where there is least to do yet."""
    work, owners = [0] * ranks, [0] * len(shapes)
    costs = [min(shape) ** 2 * (2 * max(shape) + min(shape)) for shape in shapes]
    for index in sorted(range(len(shapes)), key=costs.__getitem__, reverse=True):
        owners[index] = work.index(min(work))
        work[owners[index]] += costs[index]
    return owners


def orthogonalize(matrices):
    """U V^T for each matrix U S V^T, nearly: the singular values end between 0.7 and 1.2. bfloat16, shapes as given.

    Five quintic Newton-Schulz steps (Jordan et al.) in bfloat16, for all matrices of one shape at once.
    """
    results = [None] * len(matrices)

    def shape(index):
        return sorted(matrices[index].shape)

    for _, group in groupby(sorted(range(len(matrices)), key=shape), key=shape):
        group = list(group)
        is_tall = [matrices[index].shape[0] > matrices[index].shape[1] for index in group]
        wide = [matrices[index].mT if tall else matrices[index] for index, tall in zip(group, is_tall, strict=True)]
        for index, tall, result in zip(group, is_tall, newton_schulz(torch.stack(wide).bfloat16()), strict=True):
            results[index] = result.mT if tall else result
    return results


def newton_schulz(x, steps=5, a=3.4445, b=-4.7750, c=2.0315):
    """(k, rows, columns), rows <= columns, with norms of at most 1: each singular value s -> a s + b s^3 + c s^5."""
    norms = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)
    x = x / norms.clamp(min=1e-7).bfloat16()
    for _ in range(steps):
        gram = x @ x.mT  # (k, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


# ----------------------------------------------------------------------------------------------------------------------
# Learning rates, gradients, EMA


def lr_multiplier(args, step, last_step):
    """The factor on the learning rate at a step of a run up to last_step; both are global.

    It rises over the first steps of the run (--warmup-steps) and falls linearly to zero over the last share of it
    (--lr-decay).
    """
    factor = min(1, step / max(args.warmup_steps, 1))
    if args.lr_decay:
        factor *= min(1, (last_step - step + 1) / (args.lr_decay * last_step))
    return factor


def set_learning_rates(optimizers, args, multiplier):
    for optimizer, lr in zip(optimizers, (args.lr, args.muon_lr), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = lr * multiplier


def check_gradient(grad_norm, losses, scaler):
    """(skip, tolerated): whether the gradient is not finite, and whether that is no error: 0. or 1., on the device.

    Without fp16 it is left to --skip-nonfinite. In fp16 gradients overflow now and then, and the scaler then scales by
    less: an error only if a loss is not finite either. All ranks have the same gradient, so they agree.
    """
    skip = not grad_norm.isfinite()
    tolerated = skip and (not scaler.is_enabled() or all(loss.isfinite() for loss in losses))
    return skip, torch.full((), float(tolerated), device=grad_norm.device)


def ema_decay(args, step, pretrained):
    """--ema-decay; less in the first steps of a model from scratch, so that its random weights are soon forgotten."""
    return args.ema_decay if pretrained else min(args.ema_decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(ema, model, decay):
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
