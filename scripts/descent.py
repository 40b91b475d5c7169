"""Make one HTML file in which a model's field rolls clips downhill. It needs no file or network.

export.py --html calls `make_page`. The template is descent.html, the network descent.js, and its
kernel descent.wasm, translated from descent.wat.
"""

import base64
import json
import re
from engine import refuse_to_run
from dataclasses import asdict
from html import escape
from pathlib import Path

import plans
from models import model_name
from runtime.cli import UserError
from samplers import DESCENTS
from vae import REPOSITORIES

refuse_to_run(__name__, "scripts/export.py --html")

TEMPLATE = Path(__file__).with_suffix(".html")
NETWORK = Path(__file__).with_suffix(".js")
KERNEL = Path(__file__).with_suffix(".wasm")
MOST_WEIGHTS = 20  # millions; a file of 55 MB
MOST_GFLOPS = 20  # of one guided evaluation: about 2 s of one core
LARGEST = 65_504  # in fp16
FRAMES = 4, 32  # fewest and most of a clip
EVALUATIONS = 40  # at most, for the path of the checkpoint's sampler
REST = 0.2  # root mean square of the field at which a clip rests


def check_runnable(flag, state, config):
    """Raise UserError if the page can't run a model, whose checkpoint is `state` and whose
    EqMConfig is `config`.
    """
    reason = next(obstacles(state, config), None)
    if reason:
        raise UserError(f"--html: {flag} {reason}; remove the flag to export a folder")


def obstacles(state, config):
    """Yield the reasons why the page can't run a model."""
    tensors = state["ema"].values()
    training = state["config"]["training"]
    vae = state["config"]["data"]["vae"]
    if vae != "none":
        name = vae if vae in REPOSITORIES else "in its folder"
        yield f"needs the VAE {name}, which has no JavaScript"
    if config.in_channels not in (1, 3):
        yield f"has {config.in_channels} channels; expected 1 or 3 (pixels)"
    if config.ebm != "none":
        yield f"has an energy (ebm {config.ebm}), whose gradient has no JavaScript"
    if config.causal:
        yield "is causal, and the page shows all frames of a clip at once"
    if config.actions:
        yield "has actions, one per frame, and the page shows all frames at once"
    if not config.learns.has_equilibria:
        yield f"learned objective {config.objective}, whose field has no equilibria"
    size = sum(value.numel() for value in tensors) / 1e6
    if size > MOST_WEIGHTS:
        yield f"has {size:.1f} M weights; expected at most {MOST_WEIGHTS} M"
    num_frames = clip_lengths(config, training)["usual"]
    gflops = guided_gflops(config, num_frames)
    if gflops > MOST_GFLOPS:
        yield f"needs {gflops:.0f} GFLOP per guided evaluation; expected at most {MOST_GFLOPS}"
    highest = max(value.abs().max().item() for value in tensors)
    if not highest <= LARGEST:  # NaN included
        yield f"has weights up to {highest:.3g}; expected at most {LARGEST} (fp16)"


def make_page(name, state, config):
    """Return the HTML of a model that `check_runnable` allows. Weights become float16."""
    data = state["config"]["data"]
    training = state["config"]["training"]
    tensors = state["ema"]
    weights = b""
    shapes = []
    size = 0
    for key, value in tensors.items():
        weights += value.half().contiguous().numpy().tobytes()
        shapes.append([key, list(value.shape)])
        size += value.numel()
    letters = base64.b64encode(weights).decode()
    facts = {
        "model": asdict(config),
        "classes": data["classes"],
        "timeScale": data["time_scale"],
        "sampler": slider_values(training),
        "frames": clip_lengths(config, training),
        "healsRegions": bool(training.get("forcing_regions")),
        "shapes": shapes,
        "letters": len(letters),
        "kernel": base64.b64encode(KERNEL.read_bytes()).decode(),
    }
    model = model_name(**facts["model"])
    is_video = facts["frames"]["most"] > 1
    what = "a video generator" if is_video else "an image generator"
    headline = f"{what.capitalize()} in one file"
    if facts["healsRegions"]:
        headline = f"Break this {'video' if is_video else 'image'}. It heals."
    parts = {
        "headline": headline,
        "what": what,
        "parameters": f"{size / 1e6:.1f} million" if size >= 1e5 else f"{size:,}",
        "about": escape(f"{name}: {model}, step {state['step']}, {config.input_size} px."),
        "engine": NETWORK.read_text(),
        "weights": letters,
        "facts": json.dumps(facts).replace("<", r"\u003c"),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def clip_lengths(config, training):
    """Return {"least", "most", "usual"}: the numbers of frames that a clip can have."""
    usual = training["num_frames"]
    if not (config.use_rope and training["video"]):
        return {"least": usual, "most": usual, "usual": usual}
    least = max(FRAMES[0], config.temporal_patch_size)
    most = max(FRAMES[1], config.temporal_patch_size)
    while most > least and guided_gflops(config, most) > MOST_GFLOPS:
        most -= 1
    usual = max(least, usual)
    return {"least": least, "most": most, "usual": min(most, usual)}


def guided_gflops(config, num_frames):
    """Return the GFLOP of one evaluation with guidance: the field with a class and without."""
    return 2 * config.flops(num_frames) / 1e9


def slider_values(training):
    """Return the first values of the sliders: the checkpoint's sampler with few evaluations."""
    settings = sampler_settings(training)
    if settings["sampler"] not in DESCENTS:
        settings = plans.SAMPLER
    length = (settings["num_sampling_steps"] - 1) * settings["stepsize"]
    return {
        "stepSize": max(settings["stepsize"], length / EVALUATIONS),
        "guidance": settings["cfg_scale"],
        "momentum": settings["mu"] if settings["sampler"] == "ngd" else 0,
        "stopBelow": settings["stop_below"] or REST,
    }


def sampler_settings(training):
    """Return {flag: value} of a checkpoint's sampler, from the flags of its training."""
    settings = dict(plans.SAMPLER)
    for name in settings:
        settings[name] = training.get(name, settings[name])
    return settings
