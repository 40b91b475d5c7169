"""Checkpoints: written so that no crash damages one, read so that none can run code.

--ckpt names a file of train.py, a folder of scripts/export.py or a file of the published image models; `load` returns
the dict of a train.py file for all three.

A file holds a dict of tensors and plain Python values:
    version    format of the file
    config     {"model": fields of EqMConfig, "data": vae, image_size, fps, ..., "training": the flags}
    model, ema flat state dicts
    optimizer  {"kind": "adamw" or "muon", "states": [state dicts], "scaler": state dict}; None in files of others
    step       global step, over all phases
    phase      the other fields of Progress
    best_loss  lowest validation loss of the phase
    run        {"window": StepStats that were not logged yet, "bad_videos": their paths}
"""

import errno
import hashlib
import math
import os
import pickle
import threading
import warnings
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch

import transport
from models import SHAPE, EqM, EqMConfig, model_name, model_shape
from published import load_published, published_parts, read_export
from runtime import distributed
from runtime.atomic import atomic_write, link
from runtime.cli import UserError, say
from runtime.distributed import rank
from runtime.memory import free_bytes
from runtime.runs import is_restarted, lock, newest_run, remove_temporary_files
from runtime.untrusted import check_types, read_torch
from schedule import current_phase, is_due
from sharding import is_sharded, shard_like, whole

VERSION = 1
PARTS = ("model", "ema", "optimizer", "run")  # those that hold tensors
CONFIG_TYPES = {  # what sampling and training take from the parts of a config
    "model": {},
    "data": {"vae": str, "vae_sha256": str | None, "image_size": int | None, "fps": float, "frame_interval": list,
             "classes": list, "time_scale": float | int | None, "longest_time_scale": float | int | None},
    "training": {"model": str, "num_frames": int, "video": bool},
}
ADDED = {"rope_speed": 0.0, "position_table": "none"}  # fields of EqMConfig that older files lack: what they meant
FLAGS = {  # the flag of a field of EqMConfig
    "num_classes": "--num-classes",
    "num_frames": "--num-frames",
    "temporal_patch_size": "--temporal-patch-size",
    "rope_theta": "--rope-theta",
    "rope_split": "--rope-split",
    "rope_speed": "--rope-speed",
    "qk_norm": "--qk-norm",
    "input_size": "--image-size",
    "in_channels": "--vae",
    "ebm": "--ebm",
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

    def phase(self):
        """What a checkpoint holds besides the step and the best loss."""
        return {name: value for name, value in asdict(self).items() if name not in ("step", "best_loss")}

    def last_step(self, max_steps, epochs, num_videos, batch_size):
        """The step to end at: max_steps or `epochs` of this phase, whichever comes first; without both, 1400 epochs."""
        if max_steps and not epochs:
            return max_steps
        by_epochs = self.first_step + math.ceil((epochs or 1400) * num_videos / batch_size)
        return min(by_epochs, max_steps or by_epochs)


def progress_of(state):
    """The Progress that the dict of a checkpoint holds."""
    phase = {name: value for name, value in state["phase"].items() if name != "pretrained"}  # of earlier versions
    return Progress(state["step"], best_loss=state.get("best_loss", math.inf), **phase)


def trained_time_scale(data):
    """Seconds per frame of the clips that a model was trained on, from config["data"]."""
    return data.get("time_scale") or data["frame_interval"][0] / data["fps"]  # older files have no time_scale


def longest_time_scale(data):
    """Seconds per frame of the training clips whose frames are farthest apart, from config["data"]."""
    nearest, farthest = data["frame_interval"][0], data["frame_interval"][-1]
    return data.get("longest_time_scale") or trained_time_scale(data) * farthest / nearest  # older files: in theory


# ----------------------------------------------------------------------------------------------------------------------
# Saving


def save(path, state):
    """Write a checkpoint: to a temporary file, flushed to the disk, then renamed to `path`.

    Whatever goes wrong, `path` holds either its old content or all of the new. Raises UserError if it can't be
    written.
    """
    try:
        with atomic_write(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch wraps a full disk in a RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        advice = "free some space: " if getattr(error, "errno", None) == errno.ENOSPC else ""
        raise UserError(f"{path} can't be written ({reason}); {advice}older checkpoints are intact") from error


def run_state(config, model, ema, optimizers, scaler, progress, unlogged, bad_videos):
    """The content of a run's checkpoint. unlogged: StepStats.averaged, or None."""
    return {
        "version": VERSION,
        "config": config,
        "model": model.state_dict(),
        "ema": ema.state_dict(),
        "optimizer": {
            "kind": config["training"]["optimizer"],
            "states": [optimizer.state_dict() for optimizer in optimizers],
            "scaler": scaler.state_dict(),
        },
        "step": progress.step,
        "phase": progress.phase(),
        "best_loss": progress.best_loss,
        "run": {"window": unlogged, "bad_videos": list(bad_videos)},
    }


class Writer:
    """Writes the checkpoints of a run, on rank 0 only: training stands still while the tensors are copied, no longer.

    A thread writes the copy, one at a time. What it raises is raised by the next call of a method. Of a sharded state
    the copy is whole: the ranks gather one tensor after another.
    """

    def __init__(self, folder):
        self.path = Path(folder, "checkpoints", "latest.pt")
        self.copies = {}  # {place in the state: tensor on the CPU}, for all checkpoints of the run
        self.thread, self.error = None, None

    def write(self, state, names, before, after):
        """Save a state as latest.pt and under its other names; the thread calls before() first and after() last.

        All ranks call it. Raises UserError, as `check_memory` does.
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
            try:
                if copied is not None:
                    copied.synchronize()
                before()
                save(self.path, state)
                for name in names:
                    link(self.path, name)
                after()
            except BaseException as error:  # noqa: BLE001 (raised again by `check`)
                self.error = error

        self.thread = threading.Thread(target=run, name="checkpoint")
        self.thread.start()

    def copy(self, value, place=()):
        """A state with its tensors copied into memory of the CPU, that of the copies before if the shapes agree."""
        if isinstance(value, dict):
            return {name: self.copy(part, (*place, name)) for name, part in value.items()}
        if isinstance(value, list):
            return [self.copy(part, (*place, index)) for index, part in enumerate(value)]
        if not isinstance(value, torch.Tensor):
            return value
        value = whole(value)
        if rank() != 0:
            return None
        if place not in self.copies or self.copies[place].shape != value.shape:
            self.copies[place] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return self.copies[place].copy_(value, non_blocking=True)

    def check_memory(self, state):
        """Raise UserError, on all ranks, if the copy of a sharded state does not fit into rank 0's host memory."""
        if not any(map(is_sharded, state["model"].values())):
            return
        parts = [*state["model"].values(), *state["ema"].values()]
        for optimizer in state["optimizer"]["states"]:
            parts += [value for values in optimizer["state"].values() for value in values.values()]
        needed = 0 if self.copies else sum(part.numel() * part.element_size() for part in parts)
        needed, free = distributed.broadcast((needed, free_bytes()))
        if needed > free:
            raise UserError(
                f"--shard: a checkpoint takes {needed / 1e9:.3g} GB of host memory on the machine of rank 0, which has "
                f"{free / 1e9:.3g} GB free: choose one with more; earlier checkpoints are intact"
            )

    def check(self):
        """Raise what went wrong in the thread, if anything did."""
        if self.error is not None:
            raise self.error

    def wait(self):
        """Return once nothing is being written."""
        if self.thread is not None:
            self.thread.join()
        self.check()


def names_at(progress, last_step, every):
    """The names of this step's checkpoint besides latest.pt."""
    names = [f"{progress.step:07d}.pt"] if is_due(progress.step, last_step, every) else []
    return names + (["best.pt"] if progress.best_step == progress.step else [])


def complete_names(start, phases, every):
    """Give the checkpoint that a run resumes from all its names: the run may have been killed while it did that."""
    if rank() == 0 and start.resumes and not start.unlogged:
        last_step = current_phase(phases, start.progress.first_step).last_step
        for name in ["latest.pt", *names_at(start.progress, last_step, every)]:
            link(start.path, name)


# ----------------------------------------------------------------------------------------------------------------------
# Loading


def load(path, parts=PARTS, **asked):
    """The dict of a checkpoint; asked are the fields of EqMConfig that --model and --ebm give.

    The tensors of a file stay there and are read when they are used, so that no rank needs a copy of its own. `parts`
    names the parts that the caller uses: damage in their tensors is found here, damage in other tensors is not. Raises
    UserError if the file is damaged or not a checkpoint, or a published file that does not hold what was asked for.
    """
    if os.path.isdir(path):
        about, weights = read_export(path)
        check_version(path, about["version"])
        state = from_elsewhere({part: about[part] for part in CONFIG_TYPES}, weights, weights, about["step"])
    else:
        state = read_file(path, partial(used_parts, names=parts))
        if (published := published_parts(state)) is not None:
            return from_elsewhere(*load_published(path, *published, asked))
    wanted = {"version", "config", "model", "ema", "optimizer", "step", "phase", "best_loss"}
    if not isinstance(state, dict) or not wanted <= state.keys():
        names = ", ".join(sorted(wanted))
        raise UserError(f"--ckpt {path}: not a checkpoint of this project; wanted a dict with {names}")
    check_version(path, state["version"])
    try:
        for part, types in CONFIG_TYPES.items():
            check_types(state["config"].get(part), types)
        check_times(state["config"]["data"])
    except (ValueError, AttributeError) as error:
        raise UserError(f"--ckpt {path}: damaged: its {part} settings: {error}; use another checkpoint") from error
    return state


def used_parts(state, names):
    """The parts with these names in the content of a checkpoint or a published file, whose optimizer nobody uses."""
    published = published_parts(state)
    state = {"model": published[0], "ema": published[1]} if published else state
    return [state.get(name) for name in names] if isinstance(state, dict) else []


def load_stamped(path, parts=PARTS, **asked):
    """(`stamp_of` a checkpoint, its dict as of `load`): what `check_unchanged` needs once the tensors are read."""
    return stamp_of(path), load(path, parts, **asked)


def stamp_of(path):
    """Size and time of the last change of a file or folder; None if there is none."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def check_unchanged(path, stamp):
    """Raise UserError if a checkpoint was replaced since it had that stamp, that is, while its tensors were read."""
    if stamp_of(path) != stamp:
        raise UserError(f"--ckpt {path}: was replaced while it was being read: start again")


def check_times(data):
    """Raise ValueError unless intervals and times of config["data"] are numbers that a training can have."""
    intervals, times = data["frame_interval"], (data.get("time_scale"), data.get("longest_time_scale"))
    if len(intervals) not in (1, 2) or not all(type(frames) is int and frames > 0 for frames in intervals):
        raise ValueError(f"frame_interval is {str(intervals)[:50]}, expected one or two counts of frames")
    if not all(time is None or 0 < time < math.inf for time in times):
        raise ValueError(f"the times between frames are {times}, expected seconds above 0")


def check_version(path, version):
    if not isinstance(version, int) or version != VERSION:
        found = str(version)[:20] if isinstance(version, (int, str)) else type(version).__name__
        raise UserError(f"--ckpt {path}: has format version {found}, this code reads version {VERSION}")


def read_file(path, used=None):
    """The content of a file of torch.save; `used` is an argument of `read_torch`. Raises UserError."""
    flag = f"--ckpt {path}"
    try:
        return read_torch(path, used)
    except FileNotFoundError:
        raise UserError(f"{flag}: no such file; wanted a checkpoint, for example RUN/checkpoints/best.pt") from None
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{flag}: not a checkpoint, or one that holds code (only tensors and plain values are loaded)"
        ) from error
    except OSError as error:
        raise UserError(f"{flag}: can't be read ({error.strerror or error}); wanted a checkpoint file") from error
    except Exception as error:
        raise UserError(f"{flag}: damaged or cut short; use another checkpoint, or copy it again") from error


def from_elsewhere(config, model, ema, step):
    """The dict of a checkpoint that train.py has not written: no optimizer, no phase."""
    phase = {"first_step": step, "position": 0, "ema_start": step}
    return {
        "version": VERSION, "config": config, "model": model, "ema": ema, "optimizer": None, "step": step,
        "phase": phase, "best_loss": math.inf,
    }  # fmt: skip


def load_model(path, use_ema=True, model=None, video=None, **checks):
    """Rebuild the network of a checkpoint: (model in eval mode on the CPU, config of the file, step).

    checks are fields of EqMConfig that must agree, such as use_rope=True, and video says whether it must be a model of
    videos or of images; None is not checked. Only published files need `model`, their --model. Raises UserError.
    """
    part = "ema" if use_ema else "model"
    stamp, state = load_stamped(path, [part], **model_shape(model), ebm=checks.get("ebm"))
    config = config_of(path, state)
    check_name(path, state, model)
    if not use_ema and state["model"] is state["ema"]:
        raise UserError(f"--no-ema: --ckpt {path} holds EMA weights only: leave the flag out")
    if video is not None:
        check_kind(path, state, video)
    check(path, config, **checks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is narrow: training has said so
        network = EqM(config)
    load_weights(path, network, state[part])
    check_unchanged(path, stamp)
    return network.eval(), state["config"], state["step"]


def weights_sha256(weights):
    """The SHA-256 of a flat state dict: of names, shapes and values in float32."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {tuple(value.shape)} ".encode())
        digest.update(value.float().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def say_if_old(path, step):
    """Say so if a best.pt is older than the latest.pt beside it by more than a fifth of the steps of its phase."""
    latest = Path(path).with_name("latest.pt")
    if Path(path).name != "best.pt" or not latest.is_file():
        return
    try:
        newest = load(latest, parts=[])
    except UserError:  # of another checkpoint than the one that is asked for
        return
    if newest["step"] - step > (newest["step"] - newest["phase"].get("first_step", 0)) / 5:
        say(
            f"note: best.pt is of step {step}, latest.pt of step {newest['step']}, and no lower validation loss was "
            f"measured since: --ckpt {latest} samples the newest weights"
        )


def load_run(start, model, ema, optimizers, scaler):
    """Restore everything that is trained from the checkpoint of a Start. Raises UserError."""
    state = start.state
    load_weights(start.path, model, state["model"])
    load_weights(start.path, ema, state["ema"])
    if state["optimizer"]:  # exported and published models have none
        load_optimizers(optimizers, state["optimizer"]["states"])
        if scaler.is_enabled() and state["optimizer"].get("scaler"):  # the last phase may have been in bf16
            scaler.load_state_dict(state["optimizer"]["scaler"])
    check_unchanged(start.path, start.stamp)


def with_classes(state, classes, num_classes):
    """The dict of a checkpoint for other classes, for --new-classes.

    A class that it knows by name keeps its embedding, others begin with that of no label. The optimizer starts afresh.
    """
    before, null = state["config"]["data"]["classes"], state["config"]["model"]["num_classes"]
    rows = [before.index(name) if name in before else null for name in classes]
    rows += [null] * (num_classes + 1 - len(rows))
    table = "y_embedder.embedding_table.weight"
    parts = {part: state[part] | {table: state[part][table][rows]} for part in ("model", "ema")}
    return state | parts | {"optimizer": None}


def load_weights(path, model, weights):
    """load_state_dict, also of whole weights into a sharded model, with one line that names the first mismatch."""
    try:
        own = model.state_dict()
        model.load_state_dict({name: shard_like(value, own.get(name)) for name, value in weights.items()})
    except (RuntimeError, AttributeError) as error:  # the latter if they are no dict
        mismatch = str(error).splitlines()[1:2] or [str(error)]
        raise UserError(f"--ckpt {path}: its weights do not match its config: {mismatch[0].strip()}") from error


def load_optimizers(optimizers, saved):
    """Restore the optimizers' state of each weight; settings such as the learning rate stay those of the flags."""
    for optimizer, state in zip(optimizers, saved, strict=True):
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        parts = {
            index: {name: shard_like(value, weights[index]) if value.dim() else value for name, value in values.items()}
            for index, values in state["state"].items()
        }
        optimizer.load_state_dict({"state": parts, "param_groups": optimizer.state_dict()["param_groups"]})
        for values in optimizer.state.values():  # on the CPU they would still be those of the file
            values |= {name: value.clone() for name, value in values.items() if isinstance(value, torch.Tensor)}


def config_of(path, state):
    """The EqMConfig of a loaded checkpoint, which its weights match. Raises UserError."""
    saved = ADDED | state["config"]["model"]
    known = {field.name for field in fields(EqMConfig)}
    if set(saved) != known:
        raise UserError(f"--ckpt {path}: its model has other settings ({', '.join(sorted(set(saved) ^ known))})")
    try:
        check_types(saved, EqMConfig.__annotations__)
        config = EqMConfig(**saved)
    except (ValueError, TypeError) as error:
        raise UserError(f"--ckpt {path}: damaged: the settings of its model are invalid ({error})") from error
    with warnings.catch_warnings(), torch.device("meta"):  # shapes only, without memory
        warnings.simplefilter("ignore")  # about narrow models (the real one will warn), and that this copies no weights
        network = EqM(config)
        for part in ("model", "ema"):
            load_weights(path, network, state[part])
    return config


# ----------------------------------------------------------------------------------------------------------------------
# Whether a checkpoint is what was asked for


def check(path, saved, **wanted):
    """Raise UserError, naming the flag, unless the checkpoint's EqMConfig has the wanted values; None is not checked.

    The kind of positions is checked too: with rotary ones num_frames, which no weight depends on, may differ.
    """
    wanted = {name: value for name, value in wanted.items() if value is not None}
    flag = f"--ckpt {path}"
    if wanted.pop("use_rope", saved.use_rope) != saved.use_rope:
        if saved.use_rope:
            raise UserError(f"{flag}: trained with --use-rope, which is missing here: add it")
        raise UserError(
            f"{flag}: trained with fixed positions, --use-rope asks for rotary ones; "
            "it cannot be converted: retrain with --use-rope"
        )
    if saved.use_rope:
        wanted.pop("num_frames", None)
    table = wanted.pop("position_table", saved.position_table)
    if table != saved.position_table:
        raise UserError(
            f"{flag}: trained with --position-table {saved.position_table}, found {table}: its weights know no other "
            "positions and cannot be converted; leave the flag out, or retrain"
        )
    found, asked = model_name(**asdict(saved)), model_name(**asdict(saved) | wanted)
    if found != asked:
        advice = "leave out --model, --depth, --hidden-size and --num-heads: the checkpoint has them"
        raise UserError(f"{flag}: holds {found}, --model asks for {asked}: {advice}")
    for name in wanted.keys() - set(SHAPE):
        if getattr(saved, name) != wanted[name]:
            raise UserError(
                f"{flag}: has {name.replace('_', ' ')} {getattr(saved, name)}, "
                f"{FLAGS.get(name, name)} gives {wanted[name]}: they must agree"
                + (" (fixed positions are tied to it; --use-rope models are not)" if name == "num_frames" else "")
            )


def check_name(path, state, name):
    """Raise UserError unless a checkpoint was trained as --model NAME; None is not checked."""
    if name and name != (trained := state["config"]["training"]["model"]):
        raise UserError(f"--model {name}: --ckpt {path} has {trained}: leave the flag out")


def check_kind(path, state, video):
    """Raise UserError unless a checkpoint is a model of videos, or of images, as --video says."""
    if state["config"]["training"]["video"] != video:
        raise UserError(
            f"--ckpt {path}: holds an image model, --video asks for videos: leave it out"
            if video
            else f"--ckpt {path}: holds a video model: add --video"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Where training starts


@dataclass
class Start:
    """Where training starts: from scratch, from --ckpt, or where a run was interrupted."""

    progress: Progress
    path: Path | None = None  # of the checkpoint
    stamp: tuple | None = None  # see `stamp_of`
    state: dict | None = None  # and its content
    folder: Path | None = None  # of the run to resume, also if it has no checkpoint yet

    @property
    def resumes(self):
        """Whether the checkpoint is one of the run itself."""
        return self.folder is not None and self.path is not None and self.path.parent.parent == self.folder

    @property
    def unlogged(self):
        """The StepStats of a run that was stopped before it could log them; None in any other case."""
        window = self.run.get("window")
        if window and "mean_square" in window["names"]:  # earlier versions had E[x^2] instead of the loss of zero
            column, rows = window["names"].index("mean_square"), window["rows"].clone()
            rows[:, column] = transport.zero_loss(rows[:, column])
            names = ["target_square" if name == "mean_square" else name for name in window["names"]]
            window = {"names": names, "rows": rows}
        return window

    @property
    def run(self):
        """What the checkpoint says of the run itself; empty unless the run is resumed."""
        return (self.state.get("run") or {}) if self.resumes else {}

    def describe(self):
        """What must be the same on all machines."""
        return str(self.path), self.progress.step, str(self.folder)

    def kept(self, name):
        """The value that the run had for a flag; None unless it is resumed."""
        return self.state["config"]["training"].get(name) if self.resumes else None

    @property
    def bad_videos(self):
        return self.run.get("bad_videos", [])


def find_start(args, name):
    """The Start that the flags of train.py ask for.

    With --resume, or restarted by torchrun, the newest run of that name is resumed, from its beginning if it has no
    intact checkpoint; its folder is locked from here on. Raises UserError.
    """
    folder = newest_run(args.results_dir, name)
    if folder and not args.resume and not is_restarted(folder):
        folder = None
    if args.resume and folder is None:
        where = Path(args.results_dir, f"[0-9]*-{name}")
        say(f"--resume: nothing to resume in {where}: starting from {args.ckpt or 'the beginning'}")
    start, asked = Start(Progress(), folder=folder), asked_shape(args)
    if folder:
        if rank() == 0:
            lock(folder)
            remove_temporary_files(folder)
        start.path, start.stamp, start.state = newest_checkpoint(folder, **asked)
    if start.path is None and args.ckpt:
        start.path, (start.stamp, start.state) = Path(args.ckpt), load_stamped(args.ckpt, **asked)
    if start.path is None:
        return start
    state, step = start.state, start.state["step"]
    kind = state["optimizer"]["kind"] if state["optimizer"] else args.optimizer
    if kind != args.optimizer and not (args.new_classes and not start.resumes):
        flag = "--resume," if start.resumes else "--ckpt"
        raise UserError(f"{flag} {start.path}: trained with --optimizer {kind}, found {args.optimizer}: give the same")
    if start.resumes:
        start.progress = progress_of(state)
        args.ckpt = state["config"]["training"].get("ckpt")  # where the phase started, for the record
    elif args.max_steps and args.max_steps <= step:
        raise UserError(
            f"--max-steps {args.max_steps}: the checkpoint has {step} steps already, and steps are counted over all "
            "phases; give a larger number"
        )
    else:
        ema_start = step if args.new_classes else state["phase"].get("ema_start", 0)
        start.progress = Progress(step, first_step=step, ema_start=ema_start)
    return start


def asked_shape(args):
    """What `load` needs to know of the flags of train.py."""
    given = {name: value for name in SHAPE if (value := getattr(args, name, None)) is not None}
    return model_shape(args.model) | given | {"ebm": args.ebm}


def newest_checkpoint(folder, **asked):
    """(path, stamp, dict as of `load_stamped`) of the newest intact checkpoint of a run; three None without any.

    Damaged ones are named. latest.pt is always the newest; the others are read only if it is missing or damaged.
    """
    found, latest = [], Path(folder, "checkpoints", "latest.pt")
    for path in sorted(latest.parent.glob("*.pt"), key=lambda path: (path != latest, path)):
        try:
            found.append((path, *load_stamped(path, **asked)))
        except UserError as error:
            say(f"note: {error}")
            continue
        if path == latest:
            break
    return max(found, key=lambda one: one[2]["step"], default=(None, None, None))
