"""The code that tests/test_sharding.py runs on each of several ranks."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import checkpoint
from models import model_config
from optim import make_optimizers, update_ema
from runtime import distributed
from runtime.rng import normal
from sharding import full_tensor, is_sharded, make_networks
from training import differences, error_of

SMALL = {
    "input_size": 8,
    "in_channels": 1,
    "hidden_size": 100,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 3,
}
KINDS = {  # settings of a Run
    "accumulation": {
        "micro_batches": 2,
        "grad_checkpoint": "selective",
        "objective": "flow",
        "causal": True,
        "context": 4,
    },
    "muon": {"optimizer": "muon", "precision": "bf16", "qk_norm": True, "position_table": "space"},
    "energy": {"ebm": "l2"},
}
# settings of a Run that is trained with weights gathered in its precision, and in fp32
GATHERED = {
    "bf16": {"qk_norm": True},
    "fp16": {
        "objective": "flow",
        "position_table": "space",
        "micro_batches": 2,
        "grad_checkpoint": "selective",
    },
}
LABELS = torch.tensor([0, 3])
CPU = torch.device("cpu")
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


class Run:
    """A small model with its EMA and optimizers, sharded or not."""

    def __init__(
        self,
        shard,
        micro_batches=1,
        optimizer="adamw",
        precision="fp32",
        gathered=None,
        grad_checkpoint=None,
        **settings,
    ):
        self.shard = shard
        self.micro_batches = micro_batches
        self.precision = precision
        self.optimizer = optimizer
        self.config = model_config("EqM-Ti/4", num_frames=4, use_rope=True, **SMALL, **settings)
        self.told = {"gamma": torch.tensor([0.25, 0.75])} if self.config.objective == "flow" else {}
        if self.config.causal:
            self.told["clean"] = normal(0, "clean", 0, [1, 2], (1, 4, 8, 8))
        torch.manual_seed(0)
        self.model, self.ema = make_networks(self.config, CPU, shard, gathered or precision)
        self.model.grad_checkpoint = grad_checkpoint
        flags = SimpleNamespace(optimizer=optimizer, lr=1e-3, muon_lr=1e-3, weight_decay=0.1)
        self.optimizers = make_optimizers(self.model, flags)

    def train(self, steps=2):
        """Train. Returns (norm of the last gradient, bytes that this rank holds of weights,
        gradients and states).
        """
        network = self.model if self.shard else distributed.parallel(self.model)
        for step in range(steps):
            self.backward(network, step)
            gradients = [weight.grad for weight in self.model.parameters()]
            grad_norm = full_tensor(clip_grad_norm_(self.model.parameters(), 0.5))
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            update_ema(self.ema, self.model, 0.5)
            # as validation does: this must not leave full weights behind
            with torch.no_grad(), distributed.autocast(CPU, self.precision):
                for model in (self.model, self.ema):
                    model(torch.zeros(2, 1, 4, 8, 8), LABELS, **self.told)
        states = tree_leaves([optimizer.state_dict()["state"] for optimizer in self.optimizers])
        states = [state for state in states if state.dim()]
        weights = [*self.model.parameters(), *self.ema.parameters()]
        return grad_norm, local_bytes([*weights, *gradients, *states])

    def backward(self, network, step):
        for number in range(self.micro_batches):
            indices = [distributed.rank(), 9]
            x = normal(step, "x", number, indices, (1, 4, 8, 8))
            target = normal(step, "t", number, indices, (1, 4, 8, 8))
            is_last = number == self.micro_batches - 1
            with nullcontext() if self.shard or is_last else network.no_sync():
                with distributed.autocast(CPU, self.precision):
                    f, features = network(x, LABELS, return_features=True, **self.told)
                loss = (f.float() - target).square().mean()
                loss += features.float().square().mean()  # as with --disp
                (loss / self.micro_batches).backward()

    def state(self):
        about = {"model": vars(self.config), "training": {"optimizer": self.optimizer}}
        return checkpoint.run_state(
            about,
            self.model,
            self.ema,
            self.optimizers,
            NO_SCALER,
            checkpoint.Progress(),
        )

    def weights(self):
        """Full copies of the weights and of the EMA weights."""
        return [
            {name: full_tensor(value).clone() for name, value in network.state_dict().items()}
            for network in (self.model, self.ema)
        ]


def local_bytes(tensors):
    """Count the bytes that this rank holds of these tensors. Some share their memory."""
    parts = [
        (tensor.to_local() if is_sharded(tensor) else tensor).untyped_storage()
        for tensor in tensors
    ]
    return sum({part.data_ptr(): part.nbytes() for part in parts}.values())


def train_both(kind):
    """Train with DDP and sharded. Returns (results of both, the two runs)."""
    runs = [Run(shard, **KINDS[kind]) for shard in (False, True)]
    start = [run.weights() for run in runs]
    usual, sharded = runs
    norm, _ = usual.train()
    sharded_norm, held = sharded.train()
    full_bytes = local_bytes(usual.model.parameters())
    block = local_bytes(usual.model.blocks[0].parameters())
    results = {
        "start": start,
        "end": [run.weights() for run in runs],
        "norms": (norm.item(), sharded_norm.item()),
        "bytes": (held, full_bytes, block),
    }
    return results, runs


class Traffic(TorchDispatchMode):
    """Counts the bytes of collectives, by the largest tensor of each."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            sizes = [part.nbytes for part in tree_leaves(args) if torch.is_tensor(part)]
            self.bytes += max(sizes, default=0)
        return func(*args, **(kwargs or {}))


def train_with(precision, gathered):
    """Train with weights gathered in some precision. Returns (bytes sent, bytes kept for a backward
    pass, weights).
    """
    run = Run(True, precision=precision, gathered=gathered, **GATHERED[precision])
    saved = []
    kept = []

    def unpack(tensor):
        kept.append(local_bytes(saved))
        return tensor

    with (
        Traffic() as traffic,
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, unpack),
    ):
        run.backward(run.model, 0)
    run.train(steps=1)
    return traffic.bytes, kept[0], run.weights()


def save_and_load(folder, usual, run):
    """Save a sharded run, load it, save it again. Returns the contents of both files and the state
    of the DDP run.
    """
    path = Path(folder, "checkpoints/latest.pt")
    contents = []
    path.parent.mkdir(exist_ok=True)
    for _ in range(2):
        writer = checkpoint.Writer(folder)
        writer.write(run.state(), [], before=lambda: None, after=lambda: None)
        writer.wait()
        distributed.average(torch.zeros(1))  # until rank 0 has written
        contents.append(torch.load(path))
        run = Run(True, **KINDS["muon"])
        start = checkpoint.Start(
            checkpoint.Progress(), "a file that was loaded", state=contents[-1]
        )
        checkpoint.load_run(start, run.model, run.ema, run.optimizers, NO_SCALER)
    return [*contents, usual.state()]


def save_without_memory(folder, run):
    checkpoint.free_bytes = lambda: 1000
    write = checkpoint.Writer(folder).write
    return error_of(write, run.state(), [], before=None, after=None)


def overflow():
    """Return (scale, which weights have changed) after a step whose gradient overflows only on
    rank 1.
    """
    run = Run(True, **KINDS["accumulation"])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = run.weights()
    loss = run.model(torch.ones(2, 1, 4, 8, 8), LABELS, **run.told).sum()
    if distributed.rank() == 1:
        loss = loss * torch.inf
    scaler.scale(loss).backward()
    (adamw,) = run.optimizers
    scaler.unscale_(adamw)
    scaler.step(adamw)
    scaler.update()
    return scaler.get_scale(), differences(before, run.weights())


def main(folder):
    distributed.start()
    found = {}
    runs = {}
    for kind in KINDS:
        found[kind], runs[kind] = train_both(kind)
    for precision in GATHERED:
        found[precision] = [train_with(precision, gathered) for gathered in ("fp32", precision)]
    found["saved"] = save_and_load(folder, *runs["muon"])
    found["refusal"] = save_without_memory(folder, runs["energy"][1])
    found["overflow"] = overflow()
    distributed.stop()
    return found
