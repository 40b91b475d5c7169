"""Checkpoints: written so that no crash damages one, read so that none can run code.

--ckpt names a file of train.py, a folder of scripts/export.py or a file of the published image models; `load` returns
this dict of tensors and plain Python values for all three; only train.py's have a "run":
    version    format of the file
    config     {"model": fields of EqMConfig, "data": vae, image_size, fps, ..., "training": all flags, "typed": the
               names of the flags that the user gave}
    model, ema flat state dicts
    optimizer  {"kind": "adamw" or "muon", "states": [state dicts], "scaler": state dict}; None in files of others
    step       global step, over all phases
    phase      the other fields of Progress
    best_loss  lowest validation loss of the phase
    run        {"window": averages of steps that were not logged yet, or None, "bad_videos": paths of corrupt videos}
"""

import hashlib
import math
import os
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

from models import SHAPE, EqM, EqMConfig, model_name, model_shape
from published import load_published, published_parts, read_export
from runtime import distributed
from runtime.atomic import atomic_write, link
from runtime.cli import UserError, say
from runtime.distributed import rank
from runtime.memory import free_bytes
from runtime.runs import is_restarted, lock, newest_run, remove_temporary_files
from runtime.untrusted import read_torch
from schedule import current_phase, is_due
from sharding import full_tensor, is_sharded, shard_like

VERSION = 1
KEYS = {"version", "config", "model", "ema", "optimizer", "step", "phase", "best_loss"}
PARTS = ("model", "ema", "optimizer", "run")  # those that hold tensors
SETTINGS = {  # what every config has
    "model": set(EqMConfig.__annotations__),
    "data": {"vae", "image_size", "time_scale", "longest_time_scale"},
    "training": {"model", "num_frames", "video"},
}


@dataclass
class Progress:
    """Where a run stands. Steps are global: a phase that starts from a checkpoint continues the count."""

    step: int = 0
    first_step: int = 0  # of the phase; it also names the phase's stream of samples
    position: int = 0  # samples taken from that stream
    best_loss: float = math.inf  # lowest validation loss of the phase
    best_step: int = -1  # and its step
    skipped: int = 0  # steps in a row whose gradient was not finite
    seconds: float = 0.0  # of the run, without interruptions
    flops: float = 0.0  # of the run's training steps
    ema_start: int = 0  # the step at which the average of the weights began: see optim.ema_decay

    def count_step(self, batch_size, flops_per_clip):
        self.step, self.position = self.step + 1, self.position + batch_size
        self.flops += batch_size * flops_per_clip

    def begin_phase(self):
        """Start another phase here, with its own stream and its own best loss."""
        self.first_step, self.position, self.best_loss, self.best_step = self.step, 0, math.inf, -1


# ----------------------------------------------------------------------------------------------------------------------
# Saving


def save(path, state):
    """Write a checkpoint to a temporary file, flush it to the disk, then rename it to `path`.

    Whatever goes wrong, `path` holds its old content or all of the new. Raises UserError if it can't be written.
    """
    try:
        with atomic_write(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch wraps a full disk in a RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{path} can't be written ({reason}); older checkpoints are intact") from error


def run_state(config, model, ema, optimizers, scaler, progress):
    """The content of a run's checkpoint, but for its "run"."""
    phase = asdict(progress)
    states = [optimizer.state_dict() for optimizer in optimizers]
    return {
        "version": VERSION,
        "config": config,
        "model": model.state_dict(),
        "ema": ema.state_dict(),
        "optimizer": {"kind": config["training"]["optimizer"], "states": states, "scaler": scaler.state_dict()},
        "step": phase.pop("step"),
        "best_loss": phase.pop("best_loss"),
        "phase": phase,
    }


class Writer:
    """Writes the checkpoints of a run, on rank 0 only. Training stands still only while the tensors are copied.

    A thread writes one copy at a time; the next call of a method raises the error it had. All ranks gather the full
    tensors of a sharded state.
    """

    def __init__(self, folder):
        self.path = Path(folder, "checkpoints", "latest.pt")
        self.copies = {}  # {place in the state: tensor on the CPU}, the same memory for all checkpoints of the run
        self.thread, self.writing = ThreadPoolExecutor(1, "checkpoint"), None

    def write(self, state, names, before, after):
        """Save a state as latest.pt and under its other names; the thread calls before() first and after() last.

        All ranks call it. Raises UserError.
        """
        self.wait()
        self.check_memory(state)
        state, copied = self.copy(state), None
        if rank() != 0:
            return
        if torch.cuda.is_available():
            copied = torch.cuda.Event(blocking=True)  # whoever waits for it sleeps
            copied.record()  # the next step waits for the copies by itself, as it comes after them on the GPU

        def run():
            if copied is not None:
                copied.synchronize()
            before()
            save(self.path, state)
            for name in names:
                link(self.path, name)
            after()

        self.writing = self.thread.submit(run)

    def copy(self, value, place=()):
        """A state with its tensors copied to the CPU, into the memory of the previous copies where shapes agree."""
        if isinstance(value, dict):
            return {name: self.copy(part, (*place, name)) for name, part in value.items()}
        if isinstance(value, list):
            return [self.copy(part, (*place, index)) for index, part in enumerate(value)]
        if not isinstance(value, torch.Tensor):
            return value
        value = full_tensor(value)
        if rank() != 0:
            return None
        if place not in self.copies or self.copies[place].shape != value.shape:
            self.copies[place] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return self.copies[place].copy_(value, non_blocking=True)

    def check_memory(self, state):
        """Raise UserError, on all ranks, if the copy of a sharded state does not fit into rank 0's host memory."""
        if not any(map(is_sharded, state["model"].values())):
            return
        tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]
        needed = 0 if self.copies else sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        needed, free = distributed.broadcast((needed, free_bytes()))
        if needed > free:
            raise UserError(
                f"--shard: a checkpoint takes {needed / 1e9:.3g} GB of memory on the machine of rank 0, which has "
                f"{free / 1e9:.3g} GB free: choose one with more; earlier checkpoints are intact"
            )

    def check(self):
        """Raise what went wrong in the thread, if anything did."""
        if self.writing is not None and self.writing.done():
            self.writing.result()

    def wait(self):
        """Return once nothing is being written; raises what went wrong."""
        if self.writing is not None:
            self.writing.result()


def names_at(progress, last_step, every):
    """The names of this step's checkpoint besides latest.pt."""
    names = [f"{progress.step:07d}.pt"] if is_due(progress.step, last_step, every) else []
    return names + (["best.pt"] if progress.best_step == progress.step else [])


def complete_names(start, phases, every):
    """Link the resumed checkpoint to all its names: the run may have been killed before it had done so."""
    if rank() == 0 and start.resumes and not start.unlogged:
        last_step = current_phase(phases, start.progress.first_step).last_step
        for name in ["latest.pt", *names_at(start.progress, last_step, every)]:
            link(start.path, name)


# ----------------------------------------------------------------------------------------------------------------------
# Loading


def load(path, parts=PARTS, **asked):
    """The dict of a checkpoint; asked are the fields of EqMConfig that --model and --ebm give.

    The tensors of a file stay there and are read when they are used, so that no rank needs a copy of its own. Damage is
    found here in the tensors of `parts`, which the caller uses, and in no others. Raises UserError.
    """
    if os.path.isdir(path):
        state = from_elsewhere(*read_export(path))
    else:
        state = read_file(path, partial(used_parts, names=parts))
        if published := published_parts(state):
            return from_elsewhere(*load_published(path, *published, asked))
    if not isinstance(state, dict) or not state.keys() >= KEYS:
        expected = f"a dict with {', '.join(sorted(KEYS))}"
        raise UserError(f"--ckpt {path}: not a checkpoint of this project; expected {expected}")
    if state["version"] != VERSION:
        raise UserError(f"--ckpt {path}: has format version {state['version']}, this code reads version {VERSION}")
    if not all(names <= state["config"][part].keys() for part, names in SETTINGS.items()):
        raise UserError(f"--ckpt {path}: lacks settings; commit f311e33 reads older files")  # of all earlier commits
    return state


def used_parts(state, names):
    """The parts with these names in the content of a checkpoint or a published file, whose optimizer nobody uses."""
    if published := published_parts(state):
        state = {"model": published[0], "ema": published[1]}
    return [state.get(name) for name in names] if isinstance(state, dict) else []


def read_file(path, used=None):
    """The content of a file of torch.save; `used` is an argument of `read_torch`. Raises UserError."""
    try:
        return read_torch(path, used)
    except FileNotFoundError:
        reason = "no such file; expected a checkpoint, for example RUN/checkpoints/best.pt"
    except pickle.UnpicklingError:
        reason = "not a checkpoint, or one that holds code (only tensors and plain values are loaded)"
    except OSError as error:
        reason = f"can't be read ({error.strerror or error}); expected a checkpoint file"
    except Exception as error:
        reason = f"damaged or cut short ({type(error).__name__}); use another checkpoint, or copy it again"
    raise UserError(f"--ckpt {path}: {reason}")


def from_elsewhere(config, model, ema, step, version=VERSION):
    """The dict of a checkpoint that train.py has not written: no optimizer, no phase."""
    phase = {"first_step": step, "position": 0, "ema_start": step}
    state = {"version": version, "config": config, "model": model, "ema": ema, "optimizer": None, "step": step}
    return state | {"phase": phase, "best_loss": math.inf}


def load_model(path, use_ema=True, model=None, video=None, **checks):
    """Rebuild the network of a checkpoint: (model in eval mode on the CPU, config of the file, step).

    checks are fields of EqMConfig that must agree, such as use_rope=True, and video says whether it must be a model of
    videos or of images; None is not checked. Only published files need `model`, their --model. Raises UserError.
    """
    part, flag = "ema" if use_ema else "model", f"--ckpt {path}"
    state = load(path, [part], **model_shape(model), ebm=checks.get("ebm"))
    config = config_of(flag, state)
    check_kind(flag, state, model, video)
    if not use_ema and state["model"] is state["ema"]:
        raise UserError(f"--no-ema: {flag} holds EMA weights only; remove the flag")
    check(flag, config, **checks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is narrow: training has said so
        network = EqM(config)
    network.load_state_dict(state[part])
    return network.eval(), state["config"], state["step"]


def weights_sha256(weights):
    """The SHA-256 of a flat state dict: of names, shapes and values in float32."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {tuple(value.shape)} ".encode())
        digest.update(value.float().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_run(start, model, ema, optimizers, scaler):
    """Restore everything that is trained from the checkpoint of a Start."""
    state = start.state
    load_weights(model, state["model"])
    load_weights(ema, state["ema"])
    if state["optimizer"]:  # exported and published models have none
        load_optimizers(optimizers, state["optimizer"]["states"])
        if scaler.is_enabled() and state["optimizer"]["scaler"]:  # the last phase may have been in bf16
            scaler.load_state_dict(state["optimizer"]["scaler"])


def load_weights(model, weights):
    """load_state_dict, also of full tensors into a sharded model."""
    own = model.state_dict()
    model.load_state_dict({name: shard_like(value, own[name]) for name, value in weights.items()})


def load_optimizers(optimizers, saved):
    """Restore the optimizers' state of each weight; settings such as the learning rate stay those of the flags."""
    for optimizer, state in zip(optimizers, saved, strict=True):
        weights = optimizer.param_groups[0]["params"]
        parts = {
            index: {name: shard_like(value, weights[index]) if value.dim() else value for name, value in values.items()}
            for index, values in state["state"].items()
        }
        optimizer.load_state_dict({"state": parts, "param_groups": optimizer.state_dict()["param_groups"]})
        for values in optimizer.state.values():  # on the CPU they would still map the file
            values |= {name: value.clone() for name, value in values.items()}


def config_of(flag, state):
    """The EqMConfig of a loaded checkpoint, which its weights match. Raises UserError."""
    try:
        config = EqMConfig(**state["config"]["model"])
    except (ValueError, TypeError) as error:
        raise UserError(f"{flag}: damaged: the settings of its model are invalid ({error})") from error
    with warnings.catch_warnings(), torch.device("meta"):  # shapes only, without memory
        warnings.simplefilter("ignore")  # that it is narrow: the real one will warn
        expected = {name: value.shape for name, value in EqM(config).state_dict().items()}
    for part in ("model", "ema"):
        got = {name: value.shape for name, value in state[part].items()}
        wrong = [name for name in expected | got if expected.get(name) != got.get(name)]
        if wrong:
            shapes = " and ".join(str(shape and tuple(shape)) for shape in (got.get(wrong[0]), expected.get(wrong[0])))
            raise UserError(f"{flag}: its weights do not match its config: shapes of {wrong[0]} are {shapes}")
    return config


def check(flag, saved, **asked):
    """Raise UserError unless the checkpoint's EqMConfig has the values that were asked for; None is not checked.

    flag names the checkpoint in the message. The kind of positions is checked too: with rotary ones num_frames, which
    no weight depends on, may differ.
    """
    asked = {name: value for name, value in asked.items() if value is not None}
    if asked.pop("use_rope", saved.use_rope) != saved.use_rope:
        fixed = "fixed positions cannot be converted: retrain with --use-rope, or remove it"
        raise UserError(f"{flag}: {'trained with --use-rope: add it' if saved.use_rope else fixed}")
    if saved.use_rope:
        asked.pop("num_frames", None)
    got, expected = model_name(**asdict(saved)), model_name(**asdict(saved) | asked)
    if got != expected:
        advice = "remove --model, --depth, --hidden-size and --num-heads: the checkpoint has them"
        raise UserError(f"{flag}: holds {got}, --model asks for {expected}: {advice}")
    for name in asked.keys() - set(SHAPE):
        if getattr(saved, name) != asked[name]:
            own = {"input_size": "--image-size", "in_channels": "--vae"}.get(name, f"--{name.replace('_', '-')}")
            tied = " (fixed positions are tied to it; --use-rope models are not)" if name == "num_frames" else ""
            words = f"has {name.replace('_', ' ')} {getattr(saved, name)}, {own} gives {asked[name]}"
            raise UserError(f"{flag}: {words}: they must agree{tied}")


def check_kind(flag, state, model=None, video=None):
    """Raise UserError unless a checkpoint was trained with this --model and --video; None is not checked."""
    training = state["config"]["training"]
    if model not in (None, training["model"]):
        raise UserError(f"--model {model}: {flag} has {training['model']}; remove the flag")
    if video not in (None, training["video"]):
        kind = "an image model, --video asks for videos: remove it" if video else "a video model: add --video"
        raise UserError(f"{flag}: holds {kind}")


# ----------------------------------------------------------------------------------------------------------------------
# Where training starts


@dataclass
class Start:
    """Where training starts: from scratch, from --ckpt, or where a run was interrupted."""

    progress: Progress
    path: Path | None = None  # of the checkpoint
    state: dict | None = None  # and its content
    folder: Path | None = None  # of the run to resume, also if it has no checkpoint yet

    @property
    def resumes(self):
        """Whether the checkpoint is one of the run itself."""
        return self.folder is not None and self.path is not None and self.path.parent.parent == self.folder

    @property
    def flag(self):
        """How messages name the checkpoint."""
        return f"--resume, {self.path}" if self.resumes else f"--ckpt {self.path}"

    @property
    def config(self):
        """The config of the checkpoint; empty without one."""
        return self.state["config"] if self.state else {"model": {}, "data": {}, "training": {}}

    @property
    def unlogged(self):
        """The StepStats.averaged of steps that the run had not logged when it stopped; else None."""
        return self.state["run"]["window"] if self.resumes else None

    @property
    def bad_videos(self):
        return self.state["run"]["bad_videos"] if self.resumes else []

    def kept(self, name):
        """The value that the run had for a flag; None unless it is resumed."""
        return self.config["training"].get(name) if self.resumes else None


def find_start(args, name):
    """The Start that the flags of train.py ask for. This is the policy of resuming.

    With --resume, or restarted by torchrun, the newest run of that name is locked and continues from its newest intact
    checkpoint. If there is none, --ckpt starts a new phase with its model, EMA, optimizer and step; without --ckpt
    training starts from scratch. Raises UserError.
    """
    asked = asked_shape(args)
    start = find_resumed(args, name, args.ckpt or "the beginning", **asked)
    if start.path is None and args.ckpt:
        start.path, start.state = Path(args.ckpt), load(args.ckpt, **asked)
    if start.path is None:
        return start
    state, step = start.state, start.state["step"]
    kind = state["optimizer"]["kind"] if state["optimizer"] else args.optimizer
    if kind != args.optimizer and not (args.new_classes and not start.resumes):
        raise UserError(f"{start.flag}: trained with --optimizer {kind}, got {args.optimizer}: give the same")
    if start.resumes:
        return start
    if args.max_steps and args.max_steps <= step:
        advice = "steps are counted over all phases; give a larger number"
        raise UserError(f"--max-steps {args.max_steps}: the checkpoint is at step {step} already; {advice}")
    start.progress = Progress(step, step, ema_start=step if args.new_classes else state["phase"]["ema_start"])
    return start


def find_resumed(args, name, otherwise, read=load, **asked):
    """The Start of the run to resume, at its newest intact checkpoint if it has one; from scratch if there is none."""
    start = Start(Progress(), folder=folder_to_resume(args, name, otherwise))
    if start.folder:
        start.path, start.state = newest_checkpoint(start.folder, read, **asked)
    if state := start.state:
        start.progress = Progress(state["step"], best_loss=state["best_loss"], **state["phase"])
    return start


def folder_to_resume(args, name, otherwise):
    """The newest run folder of that name, locked, if --resume or a restart by torchrun asks for it; None if not.

    otherwise says where training starts if there is none. Raises UserError.
    """
    folder = newest_run(args.results_dir, name)
    if folder is None and args.resume:
        say(f"--resume: nothing to resume in {Path(args.results_dir, f'[0-9]*-{name}')}: starting from {otherwise}")
    if folder is None or not (args.resume or is_restarted(folder)):
        return None
    if rank() == 0:
        lock(folder)
        remove_temporary_files(folder)
    return folder


def asked_shape(args):
    """What `load` needs to know of the flags of train.py."""
    typed = {name: value for name in SHAPE if (value := getattr(args, name, None)) is not None}
    return model_shape(args.model) | typed | {"ebm": args.ebm}


def newest_checkpoint(folder, read=load, **asked):
    """(path, dict as of `load`) of the newest intact checkpoint of a run; two None without any.

    Damaged ones are named. latest.pt is always the newest; the others are read only if it is missing or damaged.
    """
    intact, latest = [], Path(folder, "checkpoints", "latest.pt")
    for path in sorted(latest.parent.glob("*.pt"), key=lambda path: (path != latest, path)):
        try:
            intact.append((path, read(path, **asked)))
        except UserError as error:
            say(f"note: {error}")
        if intact and path == latest:
            break
    return max(intact, key=lambda one: one[1]["step"], default=(None, None))
