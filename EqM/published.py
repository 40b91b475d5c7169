"""Models from elsewhere: exported folders and published image models, for checkpoint.py."""

import argparse
import json
import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from models import EqMConfig, model_name, model_shape, position_table
from runtime.cli import UserError
from runtime.untrusted import read_json
from video.samples import model_of

# of an exported folder
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
CARD = "README.md"
VAE_FOLDER = "vae"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
# mean nothing on another machine
LOCAL_FLAGS = {"recipe", "data_path", "real_data", "results_dir", "ckpt", "inflate", "vae"}

# Exported folders: the EMA weights and their configuration, to share ------------------------------


def write_export(folder, state, dtype, card, vae=None):
    """Write the EMA weights, config.json, a card and a copy of the model's own `vae` to a folder,
    all or nothing.
    """
    folder = Path(folder).resolve()  # if it is a link, what it leads to
    config = state["config"]
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a crash
    flags = config["training"].items()
    training = {name: value for name, value in flags if name not in LOCAL_FLAGS}
    if teacher := training.get("teacher"):
        training["teacher"] = teacher | {"checkpoint": model_of(teacher["checkpoint"]).name}
    about = {
        "version": state["version"],
        "step": state["step"],
        "dtype": dtype,
        **config,
        "training": training,
    }
    if vae:
        about["data"] = config["data"] | {"vae": VAE_FOLDER, "vae_sha256": vae.sha256}
    weights = {name: value.to(DTYPES[dtype]).contiguous() for name, value in state["ema"].items()}
    temporary.mkdir(parents=True)
    try:
        content = safetensors.torch.save(weights, metadata={"format": "pt"})
        (temporary / WEIGHTS).write_bytes(content)
        (temporary / CONFIG).write_text(json.dumps(about, indent=2) + "\n")
        (temporary / CARD).write_text(card, encoding="utf-8")
        if vae:
            (temporary / VAE_FOLDER).mkdir()
            for file in Path(vae.name).iterdir():
                if file.suffix in (".json", ".safetensors"):
                    shutil.copyfile(file, temporary / VAE_FOLDER / file.name)
        os.replace(temporary, folder)
    except OSError:
        shutil.rmtree(temporary)
        raise


def read_export(folder):
    """(config, float32 weights, the same weights, step, format version) of an exported folder.

    Raises UserError.
    """
    flag = f"--ckpt {folder}"
    folder = Path(folder)
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            files = [*folder.glob("checkpoints/best.pt"), *folder.glob("*/checkpoints/best.pt")]
            best = max(files, key=os.path.getmtime, default=None)
            example = f"such as {best}" if best else "or what scripts/export.py wrote"
            raise UserError(
                f"{flag}: a folder without {name}; expected a checkpoint file {example}"
            )
    try:
        about = read_json(folder / CONFIG)
        config = {part: about[part] for part in ("model", "data", "training")}
        if config["data"].get("vae") == VAE_FOLDER:
            config["data"]["vae"] = os.path.abspath(folder / VAE_FOLDER)
        stored = safetensors.torch.load_file(folder / WEIGHTS)
        weights = {name: value.float() for name, value in stored.items()}
        return config, weights, weights, about["step"], about["version"]
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise UserError(f"{flag}: damaged ({str(error)[:200]}); copy or export it again") from error


# Published image models: a state dict, or a dict with "model", "ema", "opt" and "args" ------------


def published_parts(state):
    """(weights, EMA weights, args as a dict) of a published file; None if it is something else."""

    def is_network(part):
        names = ("x_embedder.proj.weight", "y_embedder.embedding_table.weight")
        return isinstance(part, dict) and all(torch.is_tensor(part.get(name)) for name in names)

    if is_network(state):
        return state, state, {}
    if not isinstance(state, dict) or {"version", "config"} & state.keys():
        return None
    networks = [state[name] for name in ("model", "ema") if is_network(state.get(name))]
    if not networks:
        return None
    args = state.get("args") or {}
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    return networks[0], networks[-1], args


def load_published(path, model, ema, args, name, ebm):
    """(config, weights, EMA weights, step 0) of a published file, in our format. Raises UserError.

    name, ebm: the --model and the --ebm of the command line, or None.
    """
    flag = f"--ckpt {path}"
    if name is None:
        raise UserError(
            f"{flag}: a published file does not say which model it holds; pass --model, such as "
            "EqM-XL/2"
        )
    try:
        config = published_config(model, name, args.get("ebm") or ebm or "none")
        weights = convert_published(model, config)
        ema_weights = weights if ema is model else convert_published(ema, config)
    except ValueError as error:
        raise UserError(f"{flag}: {error}") from error
    data = {
        "vae": str(args.get("vae", "ema")) if config.in_channels == 4 else "none",
        "image_size": None,  # follows from the VAE and input_size
        "fps": 25.0,
        "frame_interval": [1],
        "time_scale": 1 / 25,
        "longest_time_scale": 1 / 25,
        "classes": [str(label) for label in range(config.num_classes)],
    }
    training = {"model": name, "num_frames": 1, "video": False}
    return {"model": asdict(config), "data": data, "training": training}, weights, ema_weights, 0


def is_published(config):
    """Whether the config of a checkpoint is of a published file or its export.

    They do not say how they were trained; train.py always records its optimizer.
    """
    return "optimizer" not in config["training"]


def published_config(state, name, ebm):
    """The EqMConfig of published weights of the model `name`.

    Raises ValueError if they are of another model.
    """
    if "pos_embed" not in state:
        raise ValueError("not a published image model: it has no pos_embed")
    width, channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    shape = {
        "depth": len({weight.split(".")[1] for weight in state if weight.startswith("blocks.")}),
        "hidden_size": width,
        "num_heads": model_shape(name)["num_heads"],  # not visible in weights
        "patch_size": patch_size,
    }
    if model_name(**shape) != name:
        raise ValueError(f"holds {model_name(**shape)}, expected {name}; pass another --model")
    return EqMConfig(
        input_size=math.isqrt(state["pos_embed"].shape[1]) * patch_size,
        temporal_patch_size=1,
        in_channels=channels,
        num_classes=len(state["y_embedder.embedding_table.weight"]) - 1,
        **shape,
        ebm=ebm,
    )


def convert_published(state, config):
    """A new state dict with our names and shapes, from published weights.

    Raises ValueError if they don't fit.
    """
    state = dict(state)
    table = position_table(config)
    published_table = state.pop("pos_embed")
    table = table.to(published_table.dtype).float()  # their file may be in half precision
    is_equal = published_table.shape == table.shape and torch.allclose(
        published_table.float(), table, atol=1e-5
    )
    if not is_equal:
        raise ValueError(
            f"its pos_embed is not our table for {config.input_size} x {config.input_size} in "
            f"patches of {config.patch_size}; a model with other positions can't be used"
        )
    kernel = state["x_embedder.proj.weight"]
    state["x_embedder.proj.weight"] = kernel.unsqueeze(2)  # (D, C, 1, p, p)
    C = config.in_channels
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        if name in state and len(state[name]) == 2 * config.values_per_token:
            field_and_sigma = state[name].unflatten(0, (-1, 2 * C))
            state[name] = field_and_sigma[:, :C].flatten(0, 1)  # sigma is not used
    return state
