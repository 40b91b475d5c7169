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

import generation
from models import model_name
from runtime.cli import UserError
from samplers import DESCENTS
from vae import REPOSITORIES

refuse_to_run(__name__, "scripts/export.py --html")

TEMPLATE, NETWORK, KERNEL = (
    Path(__file__).with_suffix(suffix) for suffix in (".html", ".js", ".wasm")
)
MOST_WEIGHTS = 20_000_000  # a file of 55 MB
MOST_FLOPS = 20e9  # of one evaluation without guidance: about 2 s of one core
LARGEST = 65_504  # in fp16
FRAMES = 4, 32  # fewest and most of a clip
EVALUATIONS = 40  # at most, for the path of the checkpoint's sampler
REST = 0.2  # root mean square of the field at which a clip rests


def check_runnable(flag, state, config):
    """Raise UserError if the page can't run a model, whose checkpoint is `state` and whose
    EqMConfig is `config`.
    """
    vae = state["config"]["data"]["vae"]
    size = sum(value.numel() for value in state["ema"].values())
    highest = max(value.abs().max().item() for value in state["ema"].values())
    flops = config.flops(frames(config, state["config"]["training"])["usual"])
    why = {
        (
            f"needs the VAE {vae if vae in REPOSITORIES else 'in its folder'}, "
            "which has no JavaScript"
        ): vae != "none",
        f"has {config.in_channels} channels; expected 1 or 3 (pixels)": config.in_channels
        not in (1, 3),
        f"has an energy (ebm {config.ebm}), whose gradient has no JavaScript": config.ebm != "none",
        (
            f"learned objective {config.objective}, whose field has no equilibria"
        ): not config.learns.has_equilibria,
        f"has {size / 1e6:.1f} M weights; expected at most {MOST_WEIGHTS / 1e6:g} M": size
        > MOST_WEIGHTS,
        (
            f"needs {flops / 1e9:.0f} GFLOP per evaluation; expected at most {MOST_FLOPS / 1e9:g}"
        ): flops > MOST_FLOPS,
        f"has weights up to {highest:.3g}; expected at most {LARGEST} (fp16)": not highest
        <= LARGEST,
    }
    if reasons := [text for text, is_so in why.items() if is_so]:
        raise UserError(f"--html: {flag} {reasons[0]}; remove the flag to export a folder")


def make_page(name, state, config):
    """Return the HTML of a model that `check_runnable` allows. Weights become float16."""
    data = state["config"]["data"]
    training = state["config"]["training"]
    tensors = state["ema"]
    weights = base64.b64encode(
        b"".join(value.half().contiguous().numpy().tobytes() for value in tensors.values())
    )
    facts = {
        "model": asdict(config),
        "classes": data["classes"],
        "timeScale": data["time_scale"],
        "sampler": sampler(training),
        "frames": frames(config, training),
        "healsRegions": bool(training.get("forcing_regions")),
        "shapes": [[name, list(value.shape)] for name, value in tensors.items()],
        "letters": len(weights),
        "kernel": base64.b64encode(KERNEL.read_bytes()).decode(),
    }
    size = sum(value.numel() for value in tensors.values()) / 1e6
    about = (
        f"{model_name(**asdict(config))}, {size:.1f} M parameters, step {state['step']}, "
        f"{config.input_size} px"
    )
    what = (
        f"{about}. Sampling is descent on a field without a clock: disturb any state, and it goes "
        "on from there."
    )
    parts = {
        "title": escape(name),
        "what": escape(what),
        "engine": NETWORK.read_text(),
        "weights": weights.decode(),
        "facts": json.dumps(facts).replace("<", r"\u003c"),
    }
    return re.sub(
        r"\{\{(\w+)\}\}", lambda match: parts[match[1]], TEMPLATE.read_text(encoding="utf-8")
    )


def frames(config, training):
    """Return the least, the most and the usual number of frames of a clip."""
    usual = training["num_frames"]
    if not (config.use_rope and training["video"]):
        return {"least": usual, "most": usual, "usual": usual}
    least = max(FRAMES[0], config.temporal_patch_size)
    most = max(FRAMES[1], config.temporal_patch_size)
    while most > least and config.flops(most) > MOST_FLOPS:
        most -= 1
    return {"least": least, "most": most, "usual": min(most, max(least, usual))}


def sampler(training):
    """Return the first values of the sliders: the checkpoint's sampler with few evaluations."""
    kept = generation.SAMPLER | {
        key: training[key] for key in generation.SAMPLER if key in training
    }
    if kept["sampler"] not in DESCENTS:
        kept |= generation.SAMPLER
    length = (kept["num_sampling_steps"] - 1) * kept["stepsize"]
    return {
        "stepSize": max(kept["stepsize"], length / EVALUATIONS),
        "guidance": kept["cfg_scale"],
        "momentum": kept["mu"] if kept["sampler"] == "ngd" else 0,
        "stopBelow": kept["stop_below"] or REST,
    }
