"""Checkpoints: written so that no crash spoils one, read so that none can run code.

--ckpt names a file of train.py, a folder of scripts/export.py or a file of the published image models; `load` makes
the first of all three.

A file holds a dict of tensors and plain Python values:
    version    format of the file
    config     {"model": fields of EqMConfig, "data": vae, image_size, fps, ..., "training": the flags}
    model, ema flat state dicts
    optimizer  {"kind": "adamw" or "muon", "states": [state dicts]}; None in what others left: it starts afresh
    step       global step, over all phases
    phase      the other fields of Progress
    best_loss  lowest validation loss of the phase
    run        {"window": what was measured since the last line of metrics, "bad_videos": their paths}
"""

import argparse
import copy
import errno
import json
import math
import os
import pickle
import pickletools
import re
import shutil
import warnings
import zipfile
from dataclasses import asdict, fields, replace
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from checkpoint_parts import CONFIG_BYTES, NEEDED, PARTS, is_weights, odd_part
from models import SIZES, EqM, EqMConfig, model_config, position_table
from runtime.atomic import sync, whole_file
from runtime.distributed import UserError
from runtime.untrusted import ARCHIVE_ERRORS, check_archive, check_regular, plain_name, read_json

VERSION = 1
FLAGS = {  # what a user types for a field of EqMConfig
    "num_classes": "--num-classes",
    "num_frames": "--num-frames",
    "temporal_patch_size": "--temporal-patch-size",
    "rope_theta": "--rope-theta",
    "rope_split": "--rope-split",
    "qk_norm": "--qk-norm",
    "input_size": "--image-size",
    "in_channels": "--vae",
    "ebm": "--ebm",
}
EXPORT = ("model.safetensors", "config.json")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
GLOBALS = re.compile(  # what torch.save writes of tensors and plain values; torch.load would also take what allocates
    r"torch (BFloat16|Bool|Byte|Char|Double|Float|Half|Int|Long|Short)Storage|collections OrderedDict|"
    r"torch\._utils _rebuild_(tensor_v2|parameter)|argparse Namespace"  # the last as published files have it
)
MEMORY = {torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"), torch.optim.Muon: ("momentum_buffer",)}  # of a weight
LARGEST_TABLE = 2**22  # values of fixed positions that any file may ask for; more weights may ask for more
SHAPE = ("depth", "hidden_size", "num_heads", "patch_size")  # the fields of EqMConfig that --model decides
LOCAL_FLAGS = {"data_path", "results_dir", "ckpt"}  # mean nothing on another machine


def save(path, state):
    """Write a checkpoint: to a temporary file, flushed to the disk, then renamed over `path`.

    Whatever goes wrong, `path` holds either its old content or all of the new. Raises UserError if
    the disk is full or refuses.
    """
    try:
        with whole_file(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch wraps a full disk in a RuntimeError
        if "DataLoader" in str(error):  # a loader process that died says so anywhere
            raise
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        advice = "free some space: " if getattr(error, "errno", None) == errno.ENOSPC else ""
        raise UserError(f"{path} can't be written ({reason}); {advice}older checkpoints are intact") from error


def link(path, name):
    """Give a checkpoint a second name beside it (best.pt), replacing the old bearer of that name at once."""
    path = Path(path)
    if path.with_name(name).exists() and path.samefile(path.with_name(name)):  # renaming would leave both
        return
    temporary = path.with_name(name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, temporary)
        sync(temporary)
    os.replace(temporary, path.with_name(name))
    sync(path.parent)


def load(path, **asked):
    """The dict of a checkpoint, on the CPU; asked are the fields of EqMConfig that --model and --ebm give.

    Raises UserError if it is not whole or none of ours, or a published file that does not have what was asked.
    """
    state = read_export(path) if os.path.isdir(path) else read_file(path)
    if (parts := published_parts(state)) is not None:
        return load_published(path, *parts, asked)
    wanted = {"version", "config", "model", "ema", "optimizer", "step", "phase", "best_loss"}
    if not isinstance(state, dict) or not wanted <= state.keys():
        names = ", ".join(sorted(wanted))
        raise UserError(f"--ckpt {path}: not a checkpoint of this project; wanted a dict with {names}")
    check_version(path, state["version"])
    if odd := odd_part(state):
        raise UserError(f"--ckpt {path}: damaged: its {odd} is not what train.py writes; use another checkpoint")
    return state


def check_version(path, version):
    if not isinstance(version, int) or version != VERSION:
        found = str(version)[:20] if isinstance(version, (int, str)) else type(version).__name__
        raise UserError(f"--ckpt {path}: has format version {found}, this code reads version {VERSION}")


def read_file(path):
    """What a file of torch.save holds. Raises UserError.

    torch.load maps the file into memory, so that nothing in it can claim more than it has; the copy is of what it has.
    """
    flag = f"--ckpt {path}"
    try:
        check_regular(path)
        with open(path, "rb") as file:
            if file.read(4) != b"PK\3\4":  # an archive; before torch 1.6 all was one pickle
                raise pickle.UnpicklingError("no archive")
            check_pickles(file, check_archive(file))
            with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
                warnings.simplefilter("ignore")  # torch's hints on foreign pickles; the refusal says enough
                with plain_name(path) as name:
                    return copy.deepcopy(torch.load(name, map_location="cpu", weights_only=True, mmap=True))
    except FileNotFoundError:
        raise UserError(f"{flag}: no such file; wanted a checkpoint, for example RUN/checkpoints/best.pt") from None
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{flag}: not a checkpoint, or one that holds code (only tensors and plain values are loaded)"
        ) from error
    except OSError as error:
        raise UserError(f"{flag}: can't be read ({error.strerror or error}); wanted a checkpoint file") from error
    except (*ARCHIVE_ERRORS, TypeError, AttributeError, AssertionError) as error:
        # What torch.load raises on damaged files depends on where the damage is.
        raise UserError(f"{flag}: damaged or cut short; use another checkpoint, or copy it again") from error


def check_pickles(file, names):
    """Raise UnpicklingError if an archive of torch.save names anything but tensors and plain values."""
    with zipfile.ZipFile(file) as archive:
        for name in names:
            if name.endswith(".pkl"):
                for opcode, value, _ in pickletools.genops(archive.read(name)):
                    if opcode.name == "GLOBAL" and not GLOBALS.fullmatch(value):
                        raise pickle.UnpicklingError(f"holds {value}")


# ----------------------------------------------------------------------------------------------------------------------
# Exported folders: the averaged weights and what they are, to share


def write_export(folder, state, dtype="fp32"):
    """Write model.safetensors (the EMA) and config.json into a new or empty folder, all or nothing. Raises OSError."""
    folder, parts = Path(os.path.abspath(folder)), dict(state["config"])
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a crash
    parts["training"] = {name: value for name, value in parts["training"].items() if name not in LOCAL_FLAGS}
    about = {"version": VERSION, "step": state["step"], "dtype": dtype, **parts}
    weights = {name: value.to(DTYPES[dtype]).contiguous() for name, value in state["ema"].items()}
    temporary.mkdir(parents=True)
    try:
        (temporary / EXPORT[0]).write_bytes(safetensors.torch.save(weights, metadata={"format": "pt"}))
        (temporary / EXPORT[1]).write_text(json.dumps(about, indent=2) + "\n")
        os.replace(temporary, folder)
    except OSError:
        shutil.rmtree(temporary)
        raise


def read_export(folder):
    """The dict of a checkpoint whose weights and average are those of an exported folder. Raises UserError."""
    flag, (weights, about) = f"--ckpt {folder}", (Path(folder, name) for name in EXPORT)
    if missing := [path.name for path in (weights, about) if not path.is_file()]:
        wanted = "a checkpoint file or what scripts/export.py wrote"
        raise UserError(f"{flag}: a folder without {missing[0]}; wanted {wanted}")
    try:
        about = read_json(about, CONFIG_BYTES)
        check_version(folder, about["version"])
        for part, needed in NEEDED.items():
            if missing := needed - about[part].keys():
                raise KeyError(f"no {part}.{min(missing)}")
        with plain_name(weights) as name:
            weights = {name: value.float() for name, value in safetensors.torch.load_file(name).items()}
        return foreign({part: about[part] for part in PARTS}, weights, weights, about["step"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = (str(error) or type(error).__name__)[:200]
        raise UserError(f"{flag}: damaged ({reason}); copy or export it again") from error


def foreign(config, model, ema, step):
    """The dict of a checkpoint that train.py has not written: no optimizer, no phase."""
    phase = {"first_step": step, "position": 0, "pretrained": True}
    return {
        "version": VERSION, "config": config, "model": model, "ema": ema, "optimizer": None, "step": step,
        "phase": phase, "best_loss": math.inf,
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Files of the published image models: a state dict, or a dict with "model", "ema", "opt" and "args"


def published_parts(state):
    """(weights, averaged weights, args as a dict) of a published file; None if it is something else."""

    def is_network(part):
        ranks = {"x_embedder.proj.weight": 4, "y_embedder.embedding_table.weight": 2}
        return is_weights(part) and all(name in part and part[name].dim() == rank for name, rank in ranks.items())

    if is_network(state):
        return state, state, {}
    if not isinstance(state, dict) or {"version", "config"} & state.keys():
        return None
    found = [state[name] for name in ("model", "ema") if is_network(state.get(name))]
    args = state.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    return (found[0], found[-1], args if isinstance(args, dict) else {}) if found else None


def load_published(path, model, ema, args, asked):
    """A published file as a checkpoint of ours, at step 0. Raises UserError."""
    flag = f"--ckpt {path}"
    asked = {name: value for name, value in asked.items() if value is not None}
    if not set(SHAPE) <= asked.keys():
        raise UserError(f"{flag}: a published file does not say which model it holds: give --model, such as EqM-XL/2")
    try:
        config = published_config(model, asked, args.get("ebm"))
        weights = convert_published(model, config)
        average = weights if ema is model else convert_published(ema, config)
    except ValueError as error:
        raise UserError(f"{flag}: {error}") from error
    data = {
        "vae": str(args.get("vae", "ema")) if config.in_channels == 4 else "none",
        "image_size": None,  # whatever the VAE makes of input_size
        "fps": 25.0,
        "frame_interval": [1],
        "classes": [str(label) for label in range(config.num_classes)],
    }
    training = {"model": model_name(**asdict(config)), "num_frames": 1, "video": False}
    return foreign({"model": asdict(config), "data": data, "training": training}, weights, average, step=0)


def published_config(state, asked, ebm=None):
    """The EqMConfig of published weights; asked has what they can't tell, and what they must have: SHAPE.

    Raises ValueError that names the first thing that is not as asked.
    """
    if "pos_embed" not in state or state["pos_embed"].dim() != 3:
        raise ValueError("not a published image model: it has no pos_embed")
    width, channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    depth = num_blocks(state)
    for name, found in (("depth", depth), ("hidden_size", width), ("patch_size", patch_size)):
        if found != asked[name]:
            words = name.replace("_", " ")
            other = model_name(**asked)
            raise ValueError(f"has {words} {found}, {other} has {words} {asked[name]}: give another --model")
    if ebm is not None and ebm != asked.get("ebm", ebm):
        raise ValueError(f"was trained with --ebm {ebm}, found --ebm {asked['ebm']}: leave the flag out")
    return EqMConfig(
        input_size=math.isqrt(state["pos_embed"].shape[1]) * patch_size,
        temporal_patch_size=1,
        in_channels=channels,
        num_classes=len(state["y_embedder.embedding_table.weight"]) - 1,
        **{name: asked[name] for name in SHAPE},
        ebm=ebm or asked.get("ebm", "none"),
    )


def convert_published(state, config):
    """Published image names and shapes to ours: a new state dict; raises ValueError if it does not fit the config.

    Their pos_embed must be our table, which is not saved. Their output has a second half, sigma, that is not used.
    """
    state = dict(state)
    if "pos_embed" not in state:
        raise ValueError("not a published image model: it has no pos_embed")
    found = state.pop("pos_embed")
    fits = found.shape == (1, math.prod(config.grid(1)), config.hidden_size)
    if fits:
        rounded = position_table(config).to(found.dtype).float()  # as theirs, if their file is in half precision
        fits = torch.allclose(found.float(), rounded, atol=1e-5)
    if not fits:
        raise ValueError(
            f"its pos_embed is not our table for {config.input_size} x {config.input_size} in patches of "
            f"{config.patch_size}: it was trained with other positions and can't be used"
        )
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"].unsqueeze(2)  # (D, C, 1, p, p)
    values, C = config.values_per_token, config.in_channels
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        if name in state and len(state[name]) == 2 * values:
            state[name] = state[name].unflatten(0, (-1, 2 * C))[:, :C].flatten(0, 1)
    return state


# ----------------------------------------------------------------------------------------------------------------------
# What a checkpoint holds, and whether it is what was asked for


def config_of(path, state):
    """The EqMConfig that a loaded checkpoint was made with and that its weights fit. Raises UserError."""
    saved = state["config"]["model"]
    known = {field.name for field in fields(EqMConfig)}
    if set(saved) != known:
        raise UserError(f"--ckpt {path}: its model has other settings ({', '.join(sorted(set(saved) ^ known))})")
    try:
        for field in fields(EqMConfig):
            if not isinstance(saved[field.name], (int, float) if field.type is float else field.type):
                raise ValueError(f"{field.name} is no {field.type.__name__}")
        config = EqMConfig(**saved)
        if len(state["config"]["data"]["classes"]) > config.num_classes:
            raise ValueError(f"num_classes is {config.num_classes} and more are named")
    except (ValueError, TypeError) as error:
        raise UserError(f"--ckpt {path}: damaged: the settings of its model make none ({error})") from error
    check_weights(path, config, state["model"], state["ema"])
    return config


def num_blocks(weights):
    return len({name.split(".")[1] for name in weights if name.startswith("blocks.")})


def check_weights(path, config, *parts):
    """Raise UserError, naming the first mismatch, unless each of the parts (state dicts) is one of EqM(config).

    That is not made for it: only once a file is known to hold as much, one block of it is, which stands for all.
    """
    mismatch = next(filter(None, (too_few(config, weights) for weights in parts)), None)
    if mismatch is None:
        shapes = weight_shapes(config)
        mismatch = next(filter(None, (first_mismatch(weights, shapes) for weights in parts)), None)
    if mismatch:
        raise UserError(f"--ckpt {path}: its weights are not those of its config: {mismatch}")


def too_few(config, weights):
    """What says that weights are fewer than EqM(config) has; None if they may be as many."""
    total, depth, D = sum(value.numel() for value in weights.values()), config.depth, config.hidden_size
    sizes = {
        "x_embedder.proj.weight": D * config.values_per_token,
        "y_embedder.embedding_table.weight": (config.num_classes + 1) * D,
    }
    for name, size in sizes.items():
        if (found := weights[name].numel() if name in weights else 0) < size:
            return f"{name} has {found} numbers, wanted {size}"
    if num_blocks(weights) != depth or total < 18 * depth * D**2:  # the matrices of the blocks
        return f"{num_blocks(weights)} blocks and {total} numbers, wanted {depth} blocks of {18 * D**2} and more"
    if config.num_positions * D > LARGEST_TABLE + 16 * total:  # a table that is in no file
        return f"{total} numbers are too few for {config.num_positions} fixed positions"
    return None


def weight_shapes(config):
    """name -> shape of the weights of EqM(config)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of narrow models: the whole one is going to say it
        small = EqM(replace(config, depth=1)).state_dict()
    shapes = {name: tuple(value.shape) for name, value in small.items()}
    blocks = {name.removeprefix("blocks.0."): shapes.pop(name) for name in small if name.startswith("blocks.0.")}
    return shapes | {f"blocks.{n}.{name}": shape for n in range(config.depth) for name, shape in blocks.items()}


def first_mismatch(weights, shapes):
    """What is wrong with the first tensor that is missing, one too many or of another shape; None if all are right."""
    for name in sorted(weights.keys() | shapes.keys()):
        found = tuple(weights[name].shape) if name in weights else "missing"
        if found != shapes.get(name):
            return f"{name} is {found}, wanted {shapes.get(name, 'no such')}"
    return None


def shape_of(name):
    """What --model NAME says of the configuration: nothing if there is no name."""
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


def check_name(path, state, name):
    """Raise UserError unless a checkpoint holds what was trained as --model NAME; None is not checked."""
    if name and name != (trained := state["config"]["training"]["model"]):
        raise UserError(f"--model {name}: --ckpt {path} has {trained}: leave the flag out")


def check_kind(path, state, video):
    """Raise UserError unless a checkpoint is of videos, or of images, as --video says."""
    if state["config"]["training"]["video"] != video:
        raise UserError(
            f"--ckpt {path}: holds an image model, --video asks for videos: leave it out"
            if video
            else f"--ckpt {path}: holds a video model: add --video"
        )


def load_model(path, use_ema=True, model=None, video=None, **checks):
    """Rebuild the network of a checkpoint: (model in eval mode on the CPU, config of the file, step).

    checks are fields of EqMConfig that must agree, such as use_rope=True, and video says whether it is to be a model
    of videos; None is not checked. Only published files need `model`, the --model they hold. Raises UserError.
    """
    state = load(path, **shape_of(model), ebm=checks.get("ebm"))
    config = config_of(path, state)
    check_name(path, state, model)
    if not use_ema and state["model"] is state["ema"]:
        raise UserError(f"--no-ema: --ckpt {path} holds the averaged weights only: leave the flag out")
    if video is not None:
        check_kind(path, state, video)
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


def load_optimizers(path, optimizers, saved):
    """What the optimizers remember of each weight, from the list of their state dicts; their settings are the flags'.

    Raises UserError if it is not of these weights.
    """
    wanted = f"--ckpt {path}: damaged: its optimizer is not of these weights; use another checkpoint"
    if len(saved) != len(optimizers):
        raise UserError(wanted)
    for optimizer, state in zip(optimizers, saved, strict=True):
        groups, memory = optimizer.state_dict()["param_groups"], state.get("state")
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        if not isinstance(memory, dict) or not memory.keys() <= set(range(len(weights))):
            raise UserError(wanted)
        for number, values in memory.items():
            shapes = {name: weights[number].shape for name in MEMORY[type(optimizer)]}
            shapes |= {"step": torch.Size([])} if "step" in shapes else {}
            if not is_weights(values) or {name: value.shape for name, value in values.items()} != shapes:
                raise UserError(wanted)
        optimizer.load_state_dict({"state": memory, "param_groups": groups})
