"""Manifests: JSON files of evaluate.py with values and all that they depend on.

values: {name: number or None}; result: intervals and tables; generated: the sample folder, the
SHA-256 of samples.npz, and how the samples were made; flags: those of the command.
"""

import json
import subprocess
from importlib.metadata import version
from pathlib import Path

from runtime.atomic import write_file
from runtime.cli import UserError
from runtime.untrusted import read_json

FORMAT = 2
PACKAGES = "torch", "numpy", "decord2", "safetensors", "diffusers", "pillow", "scikit-image"
# default of --split; of others: val
SPLITS = {
    "fvd": "train",
    "fid": "train",
    "classifier": "all",
    "census": "all",
}


def protocol(args, samples, real):
    """A name such as fvd2048_16f_cfg1: metric, number of clips, frames and other choices.

    fvd and fid name the guidance. real: the record of the real clips.
    """
    metric = args.metric
    split = real["split"]
    num_real = real["num_clips"]
    N = len(samples)
    kind = f"_{samples.num_frames}f"
    if metric == "classifier":
        test = "_val" if args.classifier_test == "val" else ""
        return f"classifier{N}{kind}{test}"
    split = "" if split == SPLITS.get(metric, "val") else f"_{split}"
    if metric in ("prediction", "world"):
        kind = "best" if metric == "prediction" else "each"
        several = "" if num_real == N else f"_{kind}{N // num_real}"
        given = f"_{len(samples.given[0])}of{samples.num_frames}f"
        background = "_background" if samples.source.get("keep_background") else ""
        return f"{metric}{num_real}{several}{split}{given}{background}"
    real = "" if num_real == N else f"_real{num_real}"
    guidance = ""
    if metric in ("fvd", "fid"):
        guide = "auto" if samples.weak else "cfg"
        guidance = f"_{guide}{samples.guidance:g}"
    return f"{metric}{N}{real}{split}{kind}{guidance}"


def start(args, samples, real):
    """A manifest without values and detector: all that they depend on.

    real: the record of the real clips.
    """
    return {
        "format": FORMAT,
        "metric": args.metric,
        "protocol": protocol(args, samples, real),
        "values": None,
        "result": None,
        "generated": samples.provenance(),
        "real": real,
        "detector": None,
        "code": code_commit(),
        "packages": {name: version(name) for name in PACKAGES},
        "machine": None,
        "flags": vars(args) | {"samples": str(samples.folder)},
    }


def write_manifest(path, manifest):
    """Write the file, all or nothing. Raises OSError."""
    write_file(path, json.dumps(manifest, indent=2, allow_nan=False).encode() + b"\n")


def read_manifest(path):
    """The manifest that scripts/export.py --scores names, a dict. Raises UserError."""
    try:
        manifest = read_json(path)
        got = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        # no such file; not JSON; not a manifest
        raise UserError(
            f"--scores {path}: can't be read ({error!r}); expected a file of evaluate.py"
        ) from error
    if got != FORMAT:
        raise UserError(f"--scores {path}: has format {got}, expected {FORMAT}; score again")
    return manifest


def is_of_samples(path, folder):
    """Whether a file is a manifest of the samples in a folder, judging by the folder's name."""
    try:
        return Path(read_json(path)["generated"]["samples"]).name == Path(folder).resolve().name
    except (OSError, ValueError, KeyError, TypeError):
        return False


def code_commit():
    """The git commit of this code, with a "+" if files of the code have changed since.

    None outside git.
    """
    here = Path(__file__).resolve().parent

    def git(*words):
        command = ["git", "-C", here, *words]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    try:
        # fails if the repository is not ours
        git("ls-files", "--error-unmatch", Path(__file__).name)
        changes = git("status", "--porcelain", "--", here, ":/EqM", ":/datasets", ":/scripts")
        return git("rev-parse", "HEAD") + ("+" if changes else "")
    except (OSError, subprocess.CalledProcessError):  # no git, no repository
        return None
