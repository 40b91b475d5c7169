"""Optimizers, their learning rates, gradients that are not finite, and the EMA of the weights."""

import torch


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
        optimizers.append(torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=args.weight_decay))
    return optimizers


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
    return skip, torch.tensor(float(tolerated), device=grad_norm.device)


def ema_decay(args, step, pretrained):
    """--ema-decay; less in the first steps of a model from scratch, so that its random weights are soon forgotten."""
    return args.ema_decay if pretrained else min(args.ema_decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(ema, model, decay):
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
