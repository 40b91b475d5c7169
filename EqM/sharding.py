"""Models larger than a GPU (--shard): FSDP2 spreads weights, gradients, optimizer states and EMA.

Each rank holds a share of the rows of every tensor, as a DTensor. The ranks gather one block at a
time to compute with it, so all ranks must make the same forward passes in the same order. Functions
import torch's modules for this themselves, because the import takes a third as long as torch
itself.
"""

import warnings
from copy import deepcopy

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from models import EqM, position_table
from runtime.distributed import MIXED, world_size


def make_networks(config, device, shard, precision="fp32"):
    """Return (model, its EMA without gradients).

    The weights are the same whether `shard` is set or not. precision: of --precision. If it is
    mixed, call sharded networks only under autocast, see `empty_network`.
    """
    if not shard:
        model = EqM(config).to(device)
        return model, deepcopy(model).eval().requires_grad_(False)
    from torch.distributed.device_mesh import init_device_mesh

    # no code changes it in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(device.type, (world_size(),))
    with FullDraws():
        model = empty_network(config, mesh, device, precision)
        model.initialize_weights()
    ema = empty_network(config, mesh, device, precision).eval().requires_grad_(False)
    ema.load_state_dict(model.state_dict())
    # A sample stops when its field is small: if rounding made ranks disagree, some would hang.
    ema.register_forward_hook(of_first_rank)
    return model, ema


def empty_network(config, mesh, device, precision):
    """Return a network without values, with the blocks and the root sharded.

    In mixed precision, the ranks gather rounded weights, half as many bytes. The results are the
    same bit for bit, because autocast would round the weights of products, too. So call the network
    only under autocast.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    with torch.device("meta"):
        network = EqM(config)
    # With an energy only the root: with sharded blocks, double backward fails (torch 2.13)
    splits = config.ebm == "none"
    table = network.y_embedder
    for part in (table, *network.blocks, network) if splits else (network,):
        # the table is in no product
        rounded = MIXED.get(precision) if splits and part is not table else None
        policy = MixedPrecisionPolicy(
            rounded, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        fully_shard(part, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    network.to_empty(device=device)
    if config.has_table:
        network.pos_embed = position_table(config).to(device)
    return network


class FullDraws(TorchDispatchMode):
    """Draw the initial weights of a DTensor as a full tensor on the CPU, as without sharding, and
    keep its rows.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in (torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default):
            return func(*args, **kwargs)
        target, *rest = args
        drawn = func(torch.empty(target.shape, device="cpu"), *rest, **kwargs)
        # meta: no values
        return target.copy_(shard_like(drawn, target)) if is_sharded(target) else target


def is_sharded(tensor):
    return hasattr(tensor, "full_tensor")


def shard_like(full, tensor, sender=None):
    """Return this rank's rows of a full tensor if `tensor` is a DTensor.

    Rank `sender` has it; None: all ranks do.
    """
    if not is_sharded(tensor):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        full.detach(), tensor.device_mesh, tensor.placements, src_data_rank=sender
    )


def full_tensor(tensor):
    """Return a DTensor as a full tensor on every rank, and any other tensor unchanged.

    All ranks must call this.
    """
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def scatter(full, like, owner):
    """Shard a full bfloat16 tensor of rank `owner` in the same way as `like`.

    The other ranks pass None.
    """
    if full is None:
        full = torch.empty(like.shape, dtype=torch.bfloat16, device=like.device)
    # not every backend has bfloat16
    return shard_like(full.view(torch.uint8), like, owner).view(torch.bfloat16)


def of_first_rank(network, inputs, output):
    """Forward hook that returns the output of rank 0 on all ranks."""
    output = output.contiguous()
    dist.broadcast(output.view(torch.uint8), 0)  # as bytes: not every backend has bfloat16
    return output
