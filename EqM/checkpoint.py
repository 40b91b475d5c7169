"""Checkpoints: written so that no crash spoils one, read so that none can run code.

A file holds a dict of tensors and plain Python values:
    version    format of the file
    config     {"model": fields of EqMConfig, "data": vae, image_size, fps, ..., "training": the flags}
    model, ema flat state dicts
    optimizer  {"kind": "adamw" or "muon", "states": [state dicts]}
    step       global step, over all phases
    phase      {"first_step": where the phase began, "position": samples taken from its stream}
    best_loss  lowest validation loss of the phase
"""

import errno
import math
import os
import pickle
import shutil
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from distributed import UserError
from models import SIZES, EqM, EqMConfig, model_config

VERSION = 1
FLAGS = {  # what a user types for a field of EqMConfig
    "num_classes": "--num-classes",
    "num_frames": "--num-frames",
    "temporal_patch_size": "--temporal-patch-size",
    "rope_theta": "--rope-theta",
    "qk_norm": "--qk-norm",
    "input_size": "--image-size",
    "in_channels": "--vae",
}


def save(path, state):
    """Write a checkpoint: to a temporary file, flushed to the disk, then renamed over `path`.

    Whatever goes wrong, `path` holds either its old content or all of the new. Raises UserError if
    the disk is full or refuses.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch wraps a full disk in a RuntimeError
        temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        advice = "free some space: " if getattr(error, "errno", None) == errno.ENOSPC else ""
        raise UserError(f"{path} can't be written ({reason}); {advice}older checkpoints are intact") from error


def link(path, name):
    """Give a checkpoint a second name beside it (latest.pt), replacing the old bearer of that name at once."""
    path = Path(path)
    temporary = path.with_name(name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, temporary)
    os.replace(temporary, path.with_name(name))
    sync_folder(path.parent)


def sync_folder(folder):
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(path):
    """The dict of a checkpoint file, on the CPU. Raises UserError if it is not a whole checkpoint of ours."""
    flag = f"--ckpt {path}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's hints on foreign pickles; the refusal says enough
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{flag}: no such file; wanted a checkpoint, for example RUN/checkpoints/best.pt") from None
    except (IsADirectoryError, PermissionError) as error:
        raise UserError(f"{flag}: can't be read ({error.strerror}); wanted a checkpoint file") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{flag}: not a checkpoint, or one that holds code (only tensors and plain values are loaded)"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        # What torch.load raises on damaged files depends on where the damage is.
        raise UserError(f"{flag}: damaged or cut short; use another checkpoint, or copy it again") from error
    wanted = {"version", "config", "model", "ema", "optimizer", "step", "phase", "best_loss"}
    parts = {"model", "data", "training"}
    if not isinstance(state, dict) or not wanted <= state.keys() or set(state["config"]) != parts:
        raise UserError(f"{flag}: not a checkpoint of this project; wanted a dict with {', '.join(sorted(wanted))}")
    if state["version"] != VERSION:
        raise UserError(f"{flag}: has format version {state['version']}, this code reads version {VERSION}")
    return state


def config_of(path, state):
    """The EqMConfig that a loaded checkpoint was made with."""
    saved = state["config"]["model"]
    known = {field.name for field in fields(EqMConfig)}
    if set(saved) != known:
        raise UserError(f"--ckpt {path}: its model has other settings ({', '.join(sorted(set(saved) ^ known))})")
    return EqMConfig(**saved)


SHAPE = ("depth", "hidden_size", "num_heads", "patch_size")  # the fields of EqMConfig that --model decides


def shape_of(name):
    """What --model NAME says of the configuration, for `check`: nothing if there is no name."""
    config = model_config(name) if name else None
    return {field: getattr(config, field) for field in SHAPE if config}


def model_name(depth, hidden_size, num_heads, patch_size, **_):
    """The --model of a configuration, given its fields."""
    names = {shape: name for name, shape in SIZES.items()}
    odd = f"(depth {depth}, width {hidden_size}, heads {num_heads})"
    return f"EqM-{names.get((depth, hidden_size, num_heads), odd)}/{patch_size}"


def check(path, saved, **wanted):
    """Raise UserError, naming the flag, unless the checkpoint's EqMConfig has the wanted values.

    A wanted value of None is not checked. What the positions allow is checked as well: with rotary
    positions num_frames and rope_theta, which are no shapes, may differ.
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
    mine, asked = model_name(**asdict(saved)), model_name(**asdict(saved) | wanted)
    if mine != asked:
        raise UserError(f"{flag}: holds {mine}, --model asks for {asked}: give one that fits")
    for name in wanted.keys() - set(SHAPE):
        if getattr(saved, name) != wanted[name]:
            raise UserError(
                f"{flag}: has {name.replace('_', ' ')} {getattr(saved, name)}, "
                f"{FLAGS.get(name, name)} gives {wanted[name]}: they must agree"
                + (" (fixed positions are tied to it; --use-rope models are not)" if name == "num_frames" else "")
            )


def load_model(path, use_ema=True, **checks):
    """Rebuild the network of a checkpoint: (model in eval mode on the CPU, config of the file, step).

    checks are fields of EqMConfig that must agree, such as use_rope=True; None is not checked.
    Raises UserError.
    """
    state = load(path)
    config = config_of(path, state)
    check(path, config, **checks)
    model = EqM(config)
    load_weights(path, model, state["ema" if use_ema else "model"])
    return model.eval(), state["config"], state["step"]


def load_weights(path, model, weights):
    """load_state_dict, with one line that names the first mismatch."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        mismatch = str(error).splitlines()[1:2] or [str(error)]
        raise UserError(f"--ckpt {path}: its weights are not those of its config: {mismatch[0].strip()}") from error


def run_number(folder):
    """7 of .../007-EqM-S-4-f4-rope; -1 for what is no run folder."""
    number = folder.name.split("-")[0]
    return int(number) if number.isdecimal() else -1


def make_run_folder(results_dir, name):
    """A new run folder, results_dir/NNN-name, with its subfolders."""
    root = Path(results_dir)
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f"{max(map(run_number, root.iterdir()), default=-1) + 1:03d}-{name}"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "samples").mkdir()
    return folder


def newest_run(results_dir, name):
    """The newest run folder of that name, or None if there is none or it never came to a checkpoint."""
    newest = max(Path(results_dir).glob(f"[0-9]*-{name}"), key=run_number, default=None)
    return newest if newest and (newest / "checkpoints" / "latest.pt").exists() else None


@dataclass
class Progress:
    """Where a run stands. Steps are global: a phase that starts from a checkpoint goes on counting."""

    step: int = 0
    first_step: int = 0  # of the phase; it also names the phase's stream of samples
    position: int = 0  # samples taken from that stream
    best_loss: float = math.inf  # lowest validation loss of the phase

    def last_step(self, max_steps, epochs, num_videos, batch_size):
        """The step to end at: max_steps or `epochs` of this phase, whichever comes first; without both, 1400 epochs."""
        if max_steps and not epochs:
            return max_steps
        by_epochs = self.first_step + math.ceil((epochs or 1400) * num_videos / batch_size)
        return min(by_epochs, max_steps or by_epochs)


def find_start(args, name):
    """(checkpoint to start from or None, Progress, folder of the run to go on with or None).

    args are the flags of train.py; with --resume, or restarted by torchrun, the newest run of that name goes on.
    Raises UserError.
    """
    folder = None
    if args.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        folder = newest_run(args.results_dir, name)
    path = folder / "checkpoints" / "latest.pt" if folder else args.ckpt
    if not path:
        return None, Progress(), None
    args.ckpt, state = path, load(path)
    step, kind = state["step"], state["optimizer"]["kind"]
    if kind != args.optimizer:
        raise UserError(f"--ckpt {path}: trained with --optimizer {kind}, found {args.optimizer}: give the same")
    if folder:
        return state, Progress(step, **state["phase"], best_loss=state["best_loss"]), folder
    if args.max_steps and args.max_steps <= step:
        raise UserError(
            f"--max-steps {args.max_steps}: the checkpoint has {step} steps already, and steps are counted over all "
            "phases; give a larger number"
        )
    return state, Progress(step, first_step=step), None
