"""Optimizers, learning rates, the check for gradients that overflow in fp16, and the EMA."""

import math

import torch
import torch.distributed as dist

from runtime import distributed
from runtime.cli import NATURAL, NON_NEGATIVE, POSITIVE, SHARE, UserError
from sharding import full_tensor, is_sharded, scatter

MUON_DECAY = 0.1  # weight decay; without it the weights grow until the learning rate falls


def block_matrices(model):
    """The weight matrices of attention and MLP of an EqM."""
    weights = []
    for block in model.blocks:
        layers = [block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2]
        weights += [layer.weight for layer in layers]
    return weights


def make_optimizers(model, args, matrices_of=block_matrices):
    """Return [AdamW], or with --optimizer muon [AdamW, Muon].

    Muon gets the weights matrices_of(model).
    """
    matrices = matrices_of(model) if args.optimizer == "muon" else []
    by_muon = {id(matrix) for matrix in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in by_muon]
    decay = args.weight_decay
    optimizers = [torch.optim.AdamW(others, lr=args.lr, weight_decay=decay, fused=True)]
    if matrices:
        optimizers.append(Muon(matrices, lr=args.muon_lr, weight_decay=decay))
    return optimizers


class Muon(torch.optim.Optimizer):
    """Step along orthogonalized momenta of matrices (Muon).

    From Jordan et al., kellerjordan.github.io/posts/muon, 2024. One rank orthogonalizes each matrix
    and sends the result to the others. Weights and momenta are full tensors or sharded. A
    convolution's weight (out, in, h, w) is a matrix (out, in h w). lr and weight_decay mean the
    same as in torch.optim.Muon.
    """

    momentum = 0.95  # of Nesterov's method

    def __init__(self, matrices, lr, weight_decay):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        self.ranks = distributed.world_size()
        shapes = [weight.flatten(1).shape for weight in matrices]
        self.batches = assign(shapes, self.ranks)

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        weights = group["params"]
        lr = group["lr"]
        momenta = []
        for weight in weights:
            state = self.state[weight]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(weight)
            momenta.append(state["momentum_buffer"])
        gradients = [weight.grad for weight in weights]
        torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)

        def nesterov_step(index):
            return gradients[index].lerp(momenta[index], self.momentum)

        exchange = self.scattered if is_sharded(weights[0]) else self.broadcast
        for index, direction in exchange(nesterov_step, weights):
            weight = weights[index]
            rows, columns = weight.flatten(1).shape
            scale = math.sqrt(max(1, rows / columns))
            weight.mul_(1 - lr * group["weight_decay"])
            weight.add_(direction, alpha=-lr * scale)

    def broadcast(self, step_of, weights):
        """Yield (index, orthogonalized step_of(index)) of each matrix; ranks hold full weights."""
        results = []
        transfers = []
        for owner, indices in self.batches:
            if owner == distributed.rank():
                steps = torch.stack([step_of(index).flatten(1) for index in indices])
                result = orthogonalize(steps)
            else:
                matrices = torch.stack([weights[index].flatten(1) for index in indices])
                result = torch.empty_like(matrices, dtype=torch.bfloat16)
            results.append(result)
            if self.ranks > 1:  # as bytes: not every backend has bfloat16
                transfer = dist.broadcast(result.view(torch.uint8), owner, async_op=True)
                transfers.append(transfer)
        for transfer in transfers:
            transfer.wait()
        for (_, indices), directions in zip(self.batches, results, strict=True):
            for index, direction in zip(indices, directions, strict=True):
                yield index, direction.view(weights[index].shape)

    def scattered(self, step_of, weights):
        """Yield the same for sharded weights: gather one matrix at a time.

        Only its owner keeps the full tensor.
        """
        gathered = []
        for owner, indices in self.batches:
            steps = []
            for index in indices:
                step = full_tensor(step_of(index))
                if owner == distributed.rank():
                    steps.append(step.bfloat16())
            if steps:
                gathered.append((indices, torch.stack(steps)))
        directions = {}  # of this rank's matrices
        for indices, steps in gathered:  # after all gathers, so that no rank waits for this one
            directions |= zip(indices, orthogonalize(steps), strict=True)
        for owner, indices in self.batches:
            for index in indices:
                yield index, scatter(directions.pop(index, None), weights[index], owner)


def assign(shapes, ranks):
    """Assign matrices to ranks by work. Returns [(rank, indices of its matrices of one shape)]."""

    def cost(index):
        short, long = sorted(shapes[index])
        return short**2 * (2 * long + short)

    work = [0] * ranks
    batches = {}
    for index in sorted(range(len(shapes)), key=cost, reverse=True):
        owner = work.index(min(work))  # the rank with the least work so far
        work[owner] += cost(index)
        batches.setdefault((owner, shapes[index]), []).append(index)
    return [(owner, indices) for (owner, _), indices in batches.items()]


def orthogonalize(x, steps=5, a=3.4445, b=-4.7750, c=2.0315):
    """Approximate U V^T for each matrix U S V^T of x (k, rows, columns), as bfloat16 of its shape.

    Newton-Schulz steps (Jordan et al.) map each singular value s to a s + b s^3 + c s^5. They end
    between 0.7 and 1.2, except where s was close to zero.
    """
    _, rows, columns = x.shape
    is_tall = rows > columns
    x = x.bfloat16()
    norms = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)
    norms = norms.clamp(min=1e-7)
    x = x / norms.bfloat16()
    if not distributed.has_fast_bf16(x.device.type):
        x = x.float()
    for _ in range(steps):
        gram = x.mT @ x if is_tall else x @ x.mT  # of the shorter side
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        left, right = (x, factor) if is_tall else (factor, x)
        x = torch.baddbmm(x, left, right, beta=a)
    return x.bfloat16()


def set_learning_rates(optimizers, args, step, last_step):
    """Set the learning rates for a global step of a run that ends at last_step.

    They rise over the first --warmup-steps and fall linearly to zero over the last share --lr-decay
    of all steps.
    """
    factor = min(1, step / max(args.warmup_steps, 1))
    if args.lr_decay:
        steps_left = last_step - step + 1
        factor *= min(1, steps_left / (args.lr_decay * last_step))
    for optimizer, lr in zip(optimizers, (args.lr, args.muon_lr), strict=False):
        optimizer.param_groups[0]["lr"] = lr * factor


def learning_rates(optimizers):
    """Return {"lr": learning rate of AdamW}, and with Muon also "muon_lr"."""
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    return dict(zip(("lr", "muon_lr"), rates, strict=False))


def check_fp16(grad_norm, losses):
    """Return (whether to skip a step whose gradient is not finite, 1.0 or 0.0).

    The number is 1.0 if the skip is no error. It is an error only if a loss is not finite either:
    in fp16, gradients overflow now and then, and the scaler then lowers its scale. All ranks have
    the same gradient, so they agree on the skip. The number is about this rank's losses alone.
    """
    skip = not grad_norm.isfinite()
    tolerated = skip and all(loss.isfinite() for loss in losses)
    return skip, torch.full((), float(tolerated), device=grad_norm.device)


def ema_decay(args, steps):
    """Return --ema-decay, or less in the first steps, to forget the initial weights soon."""
    return min(args.ema_decay, (1 + steps) / (10 + steps))


@torch.no_grad()
def update_ema(ema, model, decay):
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


# Flags --------------------------------------------------------------------------------------------


def add_flags(parser, **defaults):
    """Add the flags of the optimizer and the EMA to the parser of train.py or train_vae.py."""
    add = parser.add_argument_group("optimization").add_argument
    add("--optimizer", choices=["adamw", "muon"], help="muon: Muon for the hidden matrices")
    add("--lr", type=POSITIVE, help="learning rate of AdamW")
    add("--muon-lr", type=POSITIVE, help="learning rate of Muon")
    add("--warmup-steps", type=NATURAL, help="steps up to the full learning rate; 0 = off")
    add(
        "--lr-decay",
        type=SHARE,
        help="fraction of the steps, at the end, in which the rate falls to 0; 0 = off",
    )
    add(
        "--weight-decay",
        type=NON_NEGATIVE,
        help=(
            f"decoupled weight decay; 0 = off; default: {MUON_DECAY} with --optimizer muon of "
            "train.py, else 0"
        ),
    )
    add("--clip-grad", type=NON_NEGATIVE, help="largest norm of the gradient; 0 = off")
    add("--ema-decay", type=SHARE, help="decay of the EMA weights; lower at first")
    add("--global-seed", type=NATURAL, default=0, help="seed of every random draw")
    parser.set_defaults(**defaults)


def check_flags(args):
    """Raise UserError for a --muon-lr that --optimizer does not use."""
    if "muon_lr" in args.typed and args.optimizer != "muon":
        raise UserError(
            f"--muon-lr {args.muon_lr}: applies to --optimizer muon; add that, or remove it"
        )
