"""Models larger than a GPU (--shard): weights, gradients, optimizer states and EMA are spread over the ranks by FSDP2.

Each rank holds a share of the rows of every tensor, as a DTensor. Blocks are gathered one at a time while they compute,
so all ranks have to make the same forward passes in the same order. torch's parts for this are imported where they are
used: that takes as long as a third of torch itself.
"""

import warnings
from copy import deepcopy

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from models import EqM, position_table
from runtime.distributed import world_size


def make_networks(config, device, shard):
    """(model, its EMA, which needs no gradient), with the same weights whether they are sharded or not."""
    if not shard:
        model = EqM(config).to(device)
        return model, deepcopy(model).eval().requires_grad_(False)
    from torch.distributed.device_mesh import init_device_mesh

    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing is done to it in place
    mesh = init_device_mesh(device.type, (world_size(),))
    with FullDraws():  # also of the numbers that layers draw when they are made, which are not used
        model = empty_network(config, mesh, device)
        model.initialize_weights()
    ema = empty_network(config, mesh, device).eval().requires_grad_(False)
    ema.load_state_dict(model.state_dict())
    ema.register_forward_hook(of_first_rank)
    return model, ema


def empty_network(config, mesh, device):
    """A network of which each block is sharded, and the root with the rest. Its weights are not set yet.

    With an energy the root alone: with sharded blocks the backward pass of the gradient fails (torch 2.13).
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    with torch.device("meta"):
        network = EqM(config)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in (*(network.blocks if config.ebm == "none" else ()), network):
        fully_shard(part, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    network.to_empty(device=device)
    if config.has_table:
        network.pos_embed = position_table(config).to(device)
    return network


class FullDraws(TorchDispatchMode):
    """Random numbers are drawn for a full tensor on the CPU, one tensor at a time; a DTensor keeps its rows of them.

    So each weight gets the value that it has in a model that is not sharded. On the meta device nothing is kept.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in (torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default):
            return func(*args, **kwargs)
        target, *rest = args
        drawn = func(torch.empty(target.shape, device="cpu"), *rest, **kwargs)
        return target.copy_(shard_like(drawn, target)) if is_sharded(target) else target


def is_sharded(tensor):
    return hasattr(tensor, "full_tensor")


def shard_like(full, tensor, sender=None):
    """This rank's rows of a full tensor, or all if `tensor` is no DTensor. Rank `sender` sends it, or all have it."""
    if not is_sharded(tensor):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.detach(), tensor.device_mesh, tensor.placements, src_data_rank=sender)


def full_tensor(tensor):
    """A DTensor as a full tensor on every rank; all ranks have to call it. Any other tensor itself."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def scatter(full, like, owner):
    """A full bfloat16 tensor of the rank `owner`, sharded as `like`; the other ranks give None."""
    if full is None:
        full = torch.empty(like.shape, dtype=torch.bfloat16, device=like.device)
    return shard_like(full.view(torch.uint8), like, owner).view(torch.bfloat16)  # not every backend has bfloat16


def of_first_rank(network, inputs, output):
    """A forward hook: the output of rank 0, on all ranks.

    A sample stops when its field is small. If ranks rounded differently and disagreed on that, some would wait forever.
    """
    output = output.contiguous()
    dist.broadcast(output.view(torch.uint8), 0)  # as bytes: not every backend has bfloat16
    return output
