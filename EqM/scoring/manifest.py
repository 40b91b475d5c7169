"""What evaluate.py writes: a JSON file with the numbers and all that they depend on, from which they can be repeated.

format     of the file
metric, protocol, values {name: number or None}, result (intervals, tables: what a person may want to know)
generated, real, detector, code, packages, machine: what the numbers depend on
flags      of the command; --manifest takes them from here
repeats    None, or the manifest that was repeated and how the values compare
"""

import json
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from runtime import distributed
from runtime.atomic import atomic_write
from runtime.cli import UserError
from runtime.untrusted import read_json

FORMAT = 1
KEYS = (
    "format", "metric", "protocol", "values", "result", "generated", "real", "detector", "code", "packages", "machine",
    "flags", "repeats",
)  # fmt: skip
PACKAGES = "torch", "numpy", "decord2", "safetensors", "diffusers", "pillow"
PINNED = (  # (flag, part, key): what must be the same for the values to be
    ("--ckpt", "generated", "checkpoint_sha256"),
    ("--samples", "generated", "samples_sha256"),
    ("--detector", "detector", "sha256"),
    ("--data-path", "real", "videos_sha256"),
)


def write(path, manifest):
    """All or nothing. Raises OSError."""
    text = json.dumps({key: manifest[key] for key in KEYS}, indent=2, allow_nan=False)
    with atomic_write(path) as file:
        file.write(text.encode() + b"\n")


def read(path):
    """A manifest as a dict; raises UserError."""
    flag = f"--manifest {path}"
    try:
        manifest = read_json(path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{flag}: can't be read ({reason}); wanted what --out of evaluate.py wrote") from error
    except ValueError as error:  # no JSON, no UTF-8
        raise UserError(f"{flag}: damaged or no JSON ({error}); wanted what --out of evaluate.py wrote") from error
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise UserError(f"{flag}: not a manifest; wanted what --out of evaluate.py wrote")
    if manifest["format"] != FORMAT:
        found = manifest["format"]
        raise UserError(f"{flag}: has format {found}, this code reads {FORMAT}: repeat it with the code that wrote it")
    if missing := set(KEYS) - manifest.keys():
        raise UserError(f"{flag}: damaged: has no {', '.join(sorted(missing))}")
    return manifest


def check_same(old, new):
    """Raise UserError, naming the flag, unless the parts of a new manifest are about the files of an old one."""
    for flag, part, key in PINNED:
        was, found = ((manifest[part] or {}).get(key) for manifest in (old, new))
        if was != found:
            raise UserError(f"{flag}: sha256 is {found}, the manifest was made with {was}: name the place of that one")


def compare(path, old, values, tolerance):
    """How new values compare to those of an old manifest: `repeats` of the new one.

    Two numbers agree if they differ by at most tolerance x max(1, the larger of their sizes).
    """
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


def report(repeats, old, new):
    """One line: whether the values of a repetition agree, and what was not as before."""
    largest = max(repeats["differences"].items(), key=lambda item: abs(item[1]), default=None)
    others = [part for part in ("code", "packages", "machine") if old[part] != new[part]]
    changed = f"; not as before: {', '.join(others)}" if others else ""
    if repeats["bit_equal"]:
        return f"the values are those of {repeats['manifest']}, bit for bit{changed}"
    by = f"{largest[0]} differs most, by {largest[1]:.3g}" if largest else "a value is missing"
    found = "agree with" if repeats["agrees"] else "do not agree with"
    return f"the values {found} those of {repeats['manifest']}: {by}, tolerance {repeats['tolerance']:g}{changed}"


def code_commit():
    """The commit of this code in git, "+" behind it if files differ from it; None outside of git."""
    here = Path(__file__).resolve().parent

    def git(*words):
        done = subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # the folder may lie in somebody else's repository
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", here) else "")
    except (OSError, subprocess.CalledProcessError):  # no git, no repository
        return None


def packages():
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def machine(device):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "ranks": distributed.world_size(), "threads": torch.get_num_threads()}
