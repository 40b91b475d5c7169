"""Manifests: the JSON file of evaluate.py with its values and all that they depend on, from which it can be repeated.

format     of the file
metric, protocol, values {name: number or None}, result (intervals, tables)
generated, real, detector, code, packages, machine: what the values depend on
flags      of the command; --manifest takes them from here
repeats    None, or which manifest was repeated and how the values compare
"""

import json
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from runtime import distributed
from runtime.atomic import atomic_write
from runtime.cli import UserError, say
from runtime.untrusted import read_json

FORMAT = 1
KEYS = (
    "format", "metric", "protocol", "values", "result", "generated", "real", "detector", "code", "packages", "machine",
    "flags", "repeats",
)  # fmt: skip
PACKAGES = "torch", "numpy", "decord2", "safetensors", "diffusers", "pillow", "scikit-image"
PINNED = (  # (flag, part, key): hashes that must be the same in a repeated run
    ("--ckpt", "generated", "weights_sha256"),
    ("--samples", "generated", "samples_sha256"),
    ("--detector", "detector", "sha256"),
    ("--data-path", "real", "videos_sha256"),
    ("--data-path", "real", "training_sha256"),  # of --metric nearest
)


def write_manifest(path, manifest):
    """Write the file whole or not at all. Raises OSError."""
    text = json.dumps({key: manifest[key] for key in KEYS}, indent=2, allow_nan=False)
    with atomic_write(path) as file:
        file.write(text.encode() + b"\n")


def read_manifest(path):
    """A manifest as a dict. Raises UserError."""
    flag = f"--manifest {path}"
    try:
        manifest = read_json(path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{flag}: can't be read ({reason}); wanted what --out of evaluate.py wrote") from error
    except ValueError as error:  # not JSON or not UTF-8
        raise UserError(f"{flag}: damaged or not JSON ({error}); wanted what --out of evaluate.py wrote") from error
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise UserError(f"{flag}: not a manifest; wanted what --out of evaluate.py wrote")
    if manifest["format"] != FORMAT:
        found = manifest["format"]
        raise UserError(f"{flag}: has format {found}, this code reads {FORMAT}: repeat it with the code that wrote it")
    if missing := set(KEYS) - manifest.keys():
        raise UserError(f"{flag}: damaged: has no {', '.join(sorted(missing))}; name another")
    return manifest


def is_of_samples(path, folder):
    """Whether a file is a manifest of the samples that are in a folder, as far as this code knows."""
    try:
        generated = read_manifest(path)["generated"] or {}
    except UserError:
        return False
    return "samples" in generated and Path(generated["samples"]).name == Path(folder).resolve().name


def check_same(old, new):
    """Raise UserError, naming the flag, unless a new manifest depends on the same files as an old one."""
    if "checkpoint_sha256" in (old["generated"] or {}):  # of the whole file, as earlier versions had it
        say("note: --manifest is of an earlier version and has no hash of the weights, so --ckpt is not checked")
        old["generated"]["weights_sha256"] = new["generated"].get("weights_sha256")
    for flag, part, key in PINNED:
        wanted, found = ((manifest[part] or {}).get(key) for manifest in (old, new))
        if wanted != found:
            raise UserError(f"{flag}: sha256 is {found}, in --manifest it is {wanted}: give the place of that one")


def compare_values(path, old, values, tolerance):
    """How new values compare to those of the old manifest at `path`: `repeats` of the new one.

    Two numbers a and b agree if |a - b| <= tolerance * max(1, |a|, |b|). Values that the old code did not compute are
    left out.
    """
    values = {name: value for name, value in values.items() if name in old["values"]}
    differences, agrees = {}, values.keys() == old["values"].keys()
    for name, value in values.items():
        before = old["values"].get(name)
        if value is None or before is None:
            agrees &= value is before
            continue
        differences[name] = value - before
        agrees &= abs(value - before) <= tolerance * max(1.0, abs(value), abs(before))
    return {
        "manifest": str(path),
        "agrees": agrees,
        "bit_equal": values == old["values"],
        "tolerance": tolerance,
        "differences": differences,
        "before": old["values"],
    }


def agreement_line(repeats, old, new):
    """One line: whether the values of a repeated run agree, and what else differs."""
    largest = max(repeats["differences"].items(), key=lambda item: abs(item[1]), default=None)
    others = [part for part in ("code", "packages", "machine") if old[part] != new[part]]
    changed = f"; changed since: {', '.join(others)}" if others else ""
    if repeats["bit_equal"]:
        return f"the values equal those of {repeats['manifest']} bit for bit{changed}"
    by = f"{largest[0]} differs most, by {largest[1]:.3g}" if largest else "a value is missing"
    found = "agree with" if repeats["agrees"] else "do not agree with"
    return f"the values {found} those of {repeats['manifest']}: {by}, tolerance {repeats['tolerance']:g}{changed}"


def code_commit():
    """The git commit of this code, with a "+" if files differ from it; None outside of git."""
    here = Path(__file__).resolve().parent

    def git(*words):
        ended = subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, check=True)
        return ended.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # the folder may lie in another repository
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", here) else "")
    except (OSError, subprocess.CalledProcessError):  # no git, no repository
        return None


def packages():
    """{name: installed version, None if there is none}."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def machine(device):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "ranks": distributed.world_size(), "threads": torch.get_num_threads()}
