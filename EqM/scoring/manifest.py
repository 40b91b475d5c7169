"""Manifests: JSON files of evaluate.py with values and all that they depend on, to repeat them.

values: {name: number or None}; result: intervals and tables; generated: the sample folder, the
SHA-256 of samples.npz, and how the samples were made; flags: those of the command; repeats: which
manifest was repeated, with what result.
"""

import json
import math
import subprocess
from importlib.metadata import version
from pathlib import Path

from runtime.atomic import write_file
from runtime.cli import UserError
from runtime.untrusted import read_json

FORMAT = 2
PACKAGES = "torch", "numpy", "decord2", "safetensors", "diffusers", "pillow", "scikit-image"
# flags of sample_gd.py that don't change samples
OUTPUT = {"folder", "overwrite", "no_previews", "report_energy"}
# default of --split; of others: val
SPLITS = {"fvd": "train", "fid": "train", "classifier": "all", "census": "all"}


def protocol(metric, samples, split, num_real):
    """A name such as fvd2048_16f_cfg1: metric, number of clips, frames and other choices.

    fvd and fid name the guidance.
    """
    N = len(samples)
    kind = f"_{samples.num_frames}f"
    if metric == "classifier":
        return f"classifier{N}{kind}{'_val' * (split == 'val')}"
    split = "" if split == SPLITS.get(metric, "val") else f"_{split}"
    if metric == "prediction":
        best = "" if num_real == N else f"_best{N // num_real}"
        given = f"_{len(samples.given[0])}of{samples.num_frames}f"
        return (
            f"prediction{num_real}{best}{split}{given}"
            f"{'_background' * bool(samples.source.get('keep_background'))}"
        )
    real = "" if num_real == N else f"_real{num_real}"
    guidance = (
        f"_{'auto' if samples.weak else 'cfg'}{samples.guidance:g}"
        if metric in ("fvd", "fid")
        else ""
    )
    return f"{metric}{N}{real}{split}{kind}{guidance}"


def start(args, samples, split, num_real, real, detector):
    """A manifest without its values: all that they depend on. real, detector: their records."""
    return {
        "format": FORMAT,
        "metric": args.metric,
        "protocol": protocol(args.metric, samples, split, num_real),
        "values": None,
        "result": None,
        "generated": samples.provenance(),
        "real": real | {"num_clips": num_real},
        "detector": detector,
        "code": code_commit(),
        "packages": {name: version(name) for name in PACKAGES},
        "machine": None,
        "flags": vars(args) | {"samples": str(samples.folder)},
        "repeats": None,
    }


def write_manifest(path, manifest):
    """Write the file, all or nothing. Raises OSError."""
    write_file(path, json.dumps(manifest, indent=2, allow_nan=False).encode() + b"\n")


def read_manifest(path):
    """A manifest as a dict. Raises UserError."""
    try:
        manifest = read_json(path)
        got = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        # no such file; not JSON; not a manifest
        raise UserError(
            f"--manifest {path}: can't be read ({error!r}); expected a file of evaluate.py"
        ) from error
    if got != FORMAT:
        advice = "repeat it with the code that wrote it (format 1: commit f311e33)"
        raise UserError(f"--manifest {path}: has format {got}, expected {FORMAT}; {advice}")
    return manifest


def is_of_samples(path, folder):
    """Whether a file is a manifest of the samples in a folder, judging by the folder's name."""
    try:
        return Path(read_json(path)["generated"]["samples"]).name == Path(folder).resolve().name
    except (OSError, ValueError, KeyError, TypeError):
        return False


def as_words(flags):
    """Flags {name: value} as words of a command line, without those that are None or False."""
    words = []
    for name, value in flags.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, list):
            words += [flag, *map(str, value)]
        elif value is not None and value is not False:
            # with =, as a value may begin with a dash
            words.append(flag if value is True else f"{flag}={value}")
    return words


def sampling_words(path):
    """The flags of sample_gd.py that make the samples of a manifest again, as words.

    Raises UserError.
    """
    if not (flags := read_manifest(path).get("generated", {}).get("flags")):
        raise UserError(
            f"--manifest {path}: lacks the flags of its samples; expected a file of this code: "
            "score again"
        )
    # older files lack some
    for name in *OUTPUT, "guidance_chosen", *([] if flags.get("init") else ["init_gamma"]):
        flags.pop(name, None)
    flags["no_keep_background"] = not flags.pop("keep_background", True)
    # 0: off; not given, it is the checkpoint's
    return as_words(flags | {"stop_below": flags.get("stop_below") or 0})


def check_same(old, new):
    """Raise UserError, naming the flag, unless two manifests depend on the same files."""
    expected, got = (
        {
            "--samples: weights_sha256": manifest["generated"]["source"].get("weights_sha256"),
            "--samples: weak_sha256": manifest["generated"]["source"].get("weak_sha256"),
            "--detector: sha256": (manifest["detector"] or {}).get("sha256"),
            "--data-path: videos_sha256": manifest["real"]["videos_sha256"],
            # of nearest, census
            "--data-path: training_sha256": manifest["real"].get("training_sha256"),
            "--vae: sha256": manifest["real"].get("vae_sha256"),
        }
        for manifest in (old, new)
    )
    for name, value in expected.items():
        if got[name] != value:
            raise UserError(
                f"{name} is {got[name]}, expected {value} as in --manifest; pass the path of that "
                "one"
            )


def compare(path, old, new, tolerance):
    """(how the values of a new manifest compare with the old one's at `path`, the same as a line).

    Numbers a and b agree if |a - b| <= tolerance * max(1, |a|, |b|). Values that the old code
    lacked don't count.
    """
    pairs = {name: (new["values"].get(name), value) for name, value in old["values"].items()}
    differences = {name: a - b for name, (a, b) in pairs.items() if None not in (a, b)}
    unequal = [(a, b) for a, b in pairs.values() if a != b]
    agrees = all(
        None not in pair and math.isclose(*pair, rel_tol=tolerance, abs_tol=tolerance)
        for pair in unequal
    )
    others = [part for part in ("code", "packages", "machine") if old[part] != new[part]]
    others += ["samples"] * (
        old["generated"]["samples_sha256"] != new["generated"]["samples_sha256"]
    )
    largest = max(differences, key=lambda name: abs(differences[name]), default=None)
    by = (
        f"{largest} differs most, by {differences[largest]:.3g}"
        if largest
        else "a value is missing"
    )
    line = (
        f"the values {'agree' if agrees else 'do not agree'} with those of {path}: {by}, "
        f"tolerance {tolerance:g}"
    )
    line = line if unequal else f"the values equal those of {path} bit for bit"
    repeats = {
        "manifest": str(path),
        "agrees": agrees,
        "bit_equal": not unequal,
        "tolerance": tolerance,
    }
    changed = f"; changed since: {', '.join(others)}" if others else ""
    return repeats | {"differences": differences}, line + changed


def code_commit():
    """The git commit of this code, with a "+" if files of the code have changed since.

    None outside git.
    """
    here = Path(__file__).resolve().parent
    code = here, ":/EqM", ":/datasets", ":/scripts"

    def git(*words):
        return subprocess.run(
            ["git", "-C", here, *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # fails if the repository is not ours
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", *code) else "")
    except (OSError, subprocess.CalledProcessError):  # no git, no repository
        return None
