"""Make one HTML file that runs a model in a browser. It needs no other file and no network.

export.py --html calls `make_page`. In the page of descent.html, the field rolls clips downhill. In
that of world.html, a causal model draws frames as the visitor steers. Both share page.css, page.js,
the network descent.js and its kernel descent.wasm, translated from descent.wat.
"""

import base64
import json
import re
from engine import refuse_to_run
from dataclasses import asdict
from html import escape
from pathlib import Path

import plans
from runtime.cli import UserError, plural
from samplers import DESCENTS
from vae import REPOSITORIES

refuse_to_run(__name__, "scripts/export.py --html")

HERE = Path(__file__).parent
NETWORK = HERE / "descent.js"
KERNEL = HERE / "descent.wasm"
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
    if config.actions and not config.causal:
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


def make_page(name, state, config, starts=()):
    """Return the HTML of a model that `check_runnable` allows. Weights become float16.

    starts: of a causal model, see `world_parts`.
    """
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
        "shapes": shapes,
        "letters": len(letters),
        "kernel": base64.b64encode(KERNEL.read_bytes()).decode(),
    }
    parts = {
        "parameters": f"{size / 1e6:.1f} million" if size >= 1e5 else f"{size:,}",
        "about": escape(f"{name}: {config.name}, step {state['step']}, {config.input_size} px."),
        "style": (HERE / "page.css").read_text(),
        "script": (HERE / "page.js").read_text(),
        "weights": letters,
    }
    if config.causal:
        template = "world.html"
        parts |= world_parts(facts, training, config, starts)
    else:
        template = "descent.html"
        parts |= descent_parts(facts, training, config)
    parts["facts"] = json.dumps(facts).replace("<", r"\u003c")
    text = (HERE / template).read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], text)


def descent_parts(facts, training, config):
    """Return the parts of descent.html, {name: text}, and add its own facts."""
    frames = clip_lengths(config, training)
    facts["sampler"] = slider_values(training)
    facts["frames"] = frames
    facts["healsRegions"] = bool(training.get("forcing_regions"))
    is_video = frames["most"] > 1
    what = "a video generator" if is_video else "an image generator"
    headline = f"{what.capitalize()} in one file"
    if facts["healsRegions"]:
        headline = f"Break this {'video' if is_video else 'image'}. It heals."
    return {"headline": headline, "what": what, "engine": NETWORK.read_text()}


def world_parts(facts, training, config, starts):
    """Return the parts of world.html, {name: text}, and add its own facts.

    starts: what the worlds begin with, in turn: {"pixels": uint8 (C, pt, H, W), "label": of the
    class or None}. Without any, they begin with noise.
    """
    facts["actions"] = config.action_names
    shift = config.learns.solver_shift(training.get("gamma_shift", 1.0))
    facts["shift"] = training.get("solver_shift") or shift  # as sample_gd.py --sampler euler
    facts["guidance"] = 1.0 if config.actions else sampler_settings(training)["cfg_scale"]
    facts["starts"] = []
    for start in starts:
        pixels = base64.b64encode(start["pixels"].numpy().tobytes()).decode()
        facts["starts"].append(start | {"pixels": pixels})
    facts["controls"] = "the arrow keys or a gamepad" if config.actions else "the number keys"
    return {
        "headline": "A world in one file" if config.actions else "A film that you steer",
        "context": plural(config.context_patches * config.temporal_patch_size, "frame"),
        "keys": "w a s d walk, numbers act, " if config.actions else "numbers choose a class, ",
        "engine": NETWORK.read_text() + (HERE / "world.js").read_text(),
    }


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
    """Return the GFLOP of one evaluation with guidance: the field with a class and without.

    That of a causal model has one temporal patch, which sees the whole context.
    """
    if config.causal:
        return 2 * config.pass_flops(1, config.context_patches + 1, clean=0) / 1e9
    return 2 * config.flops(num_frames) / 1e9


def slider_values(training):
    """Return the first values of the sliders: the checkpoint's sampler with few evaluations."""
    settings = sampler_settings(training)
    if settings["sampler"] not in DESCENTS:
        settings = plans.SAMPLER | {"cfg_scale": settings["cfg_scale"]}
    length = (settings["num_sampling_steps"] - 1) * settings["stepsize"]
    return {
        "stepSize": max(settings["stepsize"], length / EVALUATIONS),
        "guidance": settings["cfg_scale"],
        "momentum": settings["mu"] if settings["sampler"] == "ngd" else 0,
        "stopBelow": settings["stop_below"] or REST,
    }


def sampler_settings(training):
    """Return {flag: value} of a checkpoint's sampler, from the flags of its training."""
    return {name: training.get(name, value) for name, value in plans.SAMPLER.items()}
