"""Damaged and forged files of every kind are read or refused in one line, without a traceback, a crash, a hang, much
memory or running code from them.

    python tests/faults/test_hostile_files.py --count 2000 --seed 7 [--kinds videos checkpoint]

tries more files than the tests do. Each kind of file is read in its own process, so that crashes and hangs of a decoder
are caught and the file is kept.
"""

import argparse
import contextlib
import copy
import io
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

sys.path += [str(Path(__file__).resolve().parents[2] / part) for part in ("EqM", "tests")]
import cache_latents
import checkpoint
import models
import published
from checkpoint import Progress
from models import EqM, EqMConfig
from runtime import metrics, untrusted
from runtime.cli import UserError
from tiny_data import LATENTS_SETTINGS, make_latents, make_vae
from vae import load_vae
from video.clips import Clips, collate, read_init
from video.files import UnreadableError, Video, read_all_frames
from video.index import check_data_path, long_enough, scan_videos, split_videos

TESTS = Path(__file__).resolve().parents[1]
COUNT = 25  # files of each kind in the tests
SECONDS = 20  # limit for one file; most take a millisecond
MEGABYTES = 400  # limit for the growth of the process when it reads all files of a kind
CONFIG = EqMConfig(
    input_size=4, patch_size=2, temporal_patch_size=2, in_channels=3, hidden_size=24, depth=2, num_heads=2,
    num_classes=5, num_frames=4, use_rope=True,
)  # fmt: skip
TINY = "EqM-Tiny/2"  # the name of the published model


# ----------------------------------------------------------------------------------------------------------------------
# Valid files


def make_state():
    torch.manual_seed(0)
    model, ema = EqM(CONFIG), EqM(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters())
    sum(weight.sum() for weight in model.parameters()).backward()
    optimizer.step()
    data = {"vae": "none", "image_size": 4, "fps": 25.0, "frame_interval": [1], "classes": ["A", "B"]}
    return {
        "version": checkpoint.VERSION,
        "config": {
            "model": asdict(CONFIG), "data": data, "training": {"model": TINY, "num_frames": 4, "video": True},
        },
        "model": model.state_dict(),
        "ema": ema.state_dict(),
        "optimizer": {"kind": "adamw", "states": [optimizer.state_dict()], "scaler": {}},
        "step": 70,
        "phase": {"first_step": 50, "position": 640, "pretrained": False},
        "best_loss": 1.5,
    }  # fmt: skip


def make_checkpoint(folder):
    torch.save(make_state(), folder / "best.pt")


def make_published(folder):
    weights = load_file(TESTS / "eqm_image_tiny.safetensors")
    state = {name.removeprefix("state."): value for name, value in weights.items() if name.startswith("state.")}
    torch.save({"model": state, "ema": state, "opt": {}, "args": argparse.Namespace(vae="ema")}, folder / "a.pt")


def make_export(folder):
    published.write_export(folder / "shared", make_state())


def make_partial(folder):
    (folder / "latents.partial.json").write_text(json.dumps(LATENTS_SETTINGS, indent=1))


def write_video(path, codec, pix_fmt="yuv420p", side=48):
    path.parent.mkdir(exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=25)
        stream.width = stream.height = side
        stream.pix_fmt, stream.gop_size = pix_fmt, 5
        for index in range(12):
            pixels = np.full((side, side, 3), 20 * index, np.uint8)
            pixels[:, side // 2 :] = np.random.default_rng(index).integers(0, 256, (side, side // 2, 3))
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())


def make_videos(folder):
    for name, codec in (("a.avi", "mpeg4"), ("b.mp4", "libx264"), ("c.mkv", "mpeg4"), ("d.webm", "libvpx")):
        write_video(folder / "A" / name, codec)


def make_images(folder):
    (folder / "A").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x112] = 6
    for name in ("a.png", "b.jpg", "c.webp"):
        Image.fromarray(pixels).save(folder / "A" / name, exif=exif)
    Image.fromarray(pixels).quantize(16).save(folder / "A/d.png")


def make_index(folder):
    make_videos(folder)
    (folder / "A/b.mp4").unlink()
    (folder / "A/d.webm").unlink()
    scan_videos(folder)


def make_lists(folder):
    (folder / "ucfTrainTestlist").mkdir()
    (folder / "ucfTrainTestlist/trainlist01.txt").write_text("A/a.avi 1\nA/b.avi 1\n")


def make_metrics(folder):
    rows = [json.dumps({"step": step, "train_loss": 1 / step, "val_loss": None}) + "\n" for step in range(1, 9)]
    (folder / "metrics.jsonl").write_text("".join(rows))


def make_samples(folder):
    np.savez(folder / "samples.npz", arr_0=np.zeros((2, 3, 8, 8, 3), np.uint8), labels=np.zeros(2, np.int64))
    (folder / "samples.json").write_text(json.dumps({"classes": ["A"], "time_scale": 0.04, "flags": {"video": True}}))


def make_tiny_vae(folder):
    make_vae(folder / "vae")


# ----------------------------------------------------------------------------------------------------------------------
# Reads them as the scripts do


def read_checkpoint(folder):
    """All tensors of the weights in a checkpoint, for comparison."""
    path = folder / "best.pt"
    state = checkpoint.load(path)
    config = checkpoint.config_of(path, state)
    checkpoint.check(path, config, num_classes=None)
    model = EqM(config)
    checkpoint.load_weights(path, model, state["model"])
    if state["optimizer"]:
        optimizers = [torch.optim.AdamW(model.parameters(), fused=True)]
        checkpoint.load_optimizers(path, optimizers, state["optimizer"]["states"])
        sum(weight.sum() for weight in model.parameters()).backward()
        optimizers[0].step()
    Progress(state["step"], **state["phase"], best_loss=state["best_loss"])
    checkpoint.load_model(path, use_ema=False, video=True)
    json.dumps(state["config"])
    return [value.clone() for part in ("model", "ema") for value in state[part].values()]


def read_published(folder):
    model, _, _ = checkpoint.load_model(folder / "a.pt", model=TINY)
    return list(model.state_dict().values())


def read_export(folder):
    model, config, _ = checkpoint.load_model(folder / "shared")
    checkpoint.check_kind("shared", {"config": config}, True) if config["training"]["video"] else None
    json.dumps(config)


def read_latents(folder):
    check_data_path(folder)
    scan = scan_videos(folder)
    videos, _ = long_enough(scan.videos, 2)
    train, val = split_videos(folder, videos, 0.3)
    clips = Clips(folder, train + val, scan.classes, 2, 16, frame_interval=(1, 2))
    collate([clips[index] for index in range(6)])


def read_partial(folder):
    cache_latents.check_out(folder, LATENTS_SETTINGS)


def read_videos(folder, images=False):
    check_data_path(folder, images)
    scan = scan_videos(folder, images=images)
    num_frames = 1 if images else 3
    videos, _ = long_enough(scan.videos, num_frames)
    clips = Clips(folder, videos, scan.classes, num_frames, 16, frame_interval=(1, 2))
    collate([clips[index] for index in range(len(videos))])
    for video in videos:
        with contextlib.suppress(UserError):
            read_init(folder / video.path, num_frames, 0.04, 48, images)
        if not images:
            with contextlib.suppress(UnreadableError):
                list(read_all_frames(folder, video, 5))


def read_images(folder):
    read_videos(folder, images=True)


def read_lists(folder):
    videos = [Video(f"A/{name}.avi", "A", 9, 25.0, 8, 8) for name in "abc"]
    split_videos(folder, videos, 0.3)


def read_metrics(folder):
    rows, _ = metrics.read_metrics(folder / "metrics.jsonl")
    assert all(isinstance(row["step"], int) for row in rows)
    metrics._drop_after(5, folder / "metrics.jsonl")


def read_samples(folder):
    try:
        untrusted.read_npz(folder / "samples.npz")
        untrusted.read_json(folder / "samples.json", 2**20)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error


def read_vae(folder):
    vae = load_vae(str(folder / "vae"))
    return vae.channels, vae.downsample, vae.scale


# ----------------------------------------------------------------------------------------------------------------------
# Damage


BLOWN_UP = [struct.pack(f, value) for f, value in (
    ("<I", 2**32 - 1), ("<i", -1), (">i", 2**31 - 1), ("<Q", 2**63), ("<q", 2**40), (">Q", 2**64 - 1), ("<H", 65535),
    ("<I", 0), ("<Q", 0), ("<i", 2**30), (">I", 100_000),
)]  # fmt: skip
NUMBERS = [b"-1", b"0", b"1e999", b"NaN", b"9" * 18, b"9" * 400, b"null", b"true", b'"x"', b"[]", b"{}", b"1.5"]
TEXTS = [b"..", b"../../x", b"/etc/passwd", b"\\u0000", b"\\ud800", b"\\n", b"A" * 5000, b"\xff\xfe", b'"', b"["]


def flip_bits(data, rng, other):
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def truncate(data, rng, other):
    return data[: rng.choice([0, 1, rng.randrange(len(data) + 1), max(0, len(data) - rng.randrange(1, 40))])]


def zero(data, rng, other):
    first = rng.randrange(len(data) + 1)
    length = min(rng.choice([1, 8, 100, 5000]), len(data) - first)
    data[first : first + length] = bytes(length)
    return data


def duplicate(data, rng, other):
    first = rng.randrange(len(data) + 1)
    part = data[first : first + rng.choice([1, 16, 500, 5000])]
    where = rng.randrange(len(data) + 1)
    return data[:where] + part + data[where:]


def swap(data, rng, other):
    size = rng.choice([1, 4, 64, 1000])
    a, b = (rng.randrange(max(1, len(data) - size)) for _ in range(2))
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]
    return data


def remove(data, rng, other):
    first = rng.randrange(len(data) + 1)
    del data[first : first + rng.choice([1, 3, 16, 500])]
    return data


def blow_up(data, rng, other):
    for _ in range(rng.choice([1, 1, 3])):
        value = rng.choice(BLOWN_UP)
        near = rng.choice([len(data), min(len(data), 300)])  # headers come first
        first = rng.randrange(near + 1)
        data[first : first + len(value)] = value
    return data


def splice(data, rng, other):
    cut = rng.randrange(len(data) + 1)
    return data[:cut] + other[rng.randrange(len(other) + 1) if rng.random() < 0.5 else cut :]


def noise(data, rng, other):
    return bytearray(rng.randbytes(rng.choice([0, 1, 100, 3000])))


def rewrite(data, rng, other):
    """Replace a number or a word by another, so that text stays well-formed for longer."""
    pattern, values = rng.choice([(rb"\d+", NUMBERS), (rb"[A-Za-z_]+", TEXTS)])
    places = list(re.finditer(pattern, data))
    if places:
        place = rng.choice(places)
        data[place.start() : place.end()] = rng.choice(values)
    return data


def nest(data, rng, other):
    opening = rng.choice([b"[", b'{"a":', b"("])
    where = rng.randrange(len(data) + 1)
    return data[:where] + opening * 100_000 + data[where:]


WAYS = [flip_bits, flip_bits, truncate, zero, duplicate, swap, remove, blow_up, blow_up, splice, noise, rewrite,
        rewrite, rewrite, nest]  # fmt: skip


def damage_bytes(folder, valid, rng):
    """Damage a random file of a folder. Returns a description."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path, way = rng.choice(files), rng.choice(WAYS)
    other = rng.choice(files).read_bytes()
    path.write_bytes(way(bytearray(path.read_bytes()), rng, other))
    return f"{way.__name__} {path.relative_to(folder)}"


def damage_only(*names):
    """damage_bytes for these files of a folder only."""

    def damage(folder, valid, rng):
        path, way = folder / rng.choice(names), rng.choice(WAYS)
        path.write_bytes(way(bytearray(path.read_bytes()), rng, path.read_bytes()))
        return f"{way.__name__} {path.name}"

    return damage


def damage_members(folder, valid, rng):
    """Damage a member of an archive, with checksums that match the damage."""
    (path,) = (path for path in folder.rglob("*") if zipfile.is_zipfile(path))
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    headed = [name for name in members if name.endswith(("data.pkl", ".npy"))]
    name, way = rng.choice(headed if rng.random() < 0.8 else list(members)), rng.choice(WAYS)
    members[name] = bytes(way(bytearray(members[name]), rng, members[rng.choice(list(members))]))
    kind = zipfile.ZIP_DEFLATED if rng.random() < 0.05 else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return f"{way.__name__} {name}"


VALUES = [None, "", "x", "../x", "\udcff\n", -1, 0, 1, 3, 10**9, 10**12, 10**30, 1e-300, math.inf, math.nan, True, [],
          {}, [[]], ["x"] * 9, [1, 2, 3], {"a": 1}]  # fmt: skip


def replace_leaf(value, rng, more=()):
    """A copy of nested dicts and lists in which one part is replaced, is missing or occurs twice."""
    value = copy.copy(value)
    keys = list(value if isinstance(value, dict) else range(len(value)))
    if not keys:
        return value
    key = rng.choice(keys)
    if isinstance(value[key], (dict, list)) and rng.random() < 0.8:
        value[key] = replace_leaf(value[key], rng, more)
    elif rng.random() < 0.1:
        del value[key]
    elif rng.random() < 0.1 and isinstance(value, dict):
        value["new"] = value[key]
    else:
        value[key] = rng.choice([*VALUES, *more])
    return value


TENSORS = [
    torch.zeros(()), torch.zeros(3), torch.zeros(24, 24), torch.zeros(1).expand(10**6, 10**6), torch.ones(2).long(),
    torch.zeros(1).expand(24, 24), torch.zeros(0, 10**9), torch.zeros(5, dtype=torch.complex64),
]  # fmt: skip


def damage_values(folder, valid, rng):
    """Save a checkpoint in which some values are replaced."""
    state = make_state()
    for _ in range(rng.choice([1, 1, 2])):
        part = rng.choice([None, None, "config", "config", "optimizer", "phase"])
        if part is None:
            state = replace_leaf(state, rng, TENSORS)
        elif part in state and isinstance(state[part], dict):
            state[part] = replace_leaf(state[part], rng, TENSORS)
    torch.save(state, folder / "best.pt")
    return "values"


def damage_json(folder, valid, rng):
    """Write a JSON file in which some values are replaced."""
    path = rng.choice(sorted(path for path in folder.rglob("*.json") if path.is_file()))
    value = json.loads(path.read_text())
    for _ in range(rng.choice([1, 1, 3])):
        value = replace_leaf(value, rng)
    path.write_text(json.dumps(value))
    return f"values of {path.name}"


@dataclass
class Kind:
    make: callable  # writes valid files to a folder
    read: callable  # reads them as the scripts do
    damage: callable = damage_bytes
    is_checked: bool = False  # a damaged file that is not refused must give the same result


KINDS = {
    "checkpoint": Kind(make_checkpoint, read_checkpoint, is_checked=True),
    "checkpoint, valid archive": Kind(make_checkpoint, read_checkpoint, damage_members),
    "checkpoint, other values": Kind(make_checkpoint, read_checkpoint, damage_values),
    "published model": Kind(make_published, read_published, is_checked=True),
    "published model, valid archive": Kind(make_published, read_published, damage_members),
    "export": Kind(make_export, read_export),
    "export, other values": Kind(make_export, read_export, damage_json),
    "latents": Kind(make_latents, read_latents),
    "latents, other values": Kind(make_latents, read_latents, damage_json),
    "unfinished latents": Kind(make_partial, read_partial),
    "videos": Kind(make_videos, read_videos),
    "images": Kind(make_images, read_images),
    "index": Kind(make_index, read_videos, damage_only(".video_index.json")),
    "index, other values": Kind(make_index, read_videos, damage_json),
    "split lists": Kind(make_lists, read_lists),
    "metrics": Kind(make_metrics, read_metrics),
    "samples": Kind(make_samples, read_samples),
    "samples, valid archive": Kind(make_samples, read_samples, damage_members),
    "VAE": Kind(make_tiny_vae, read_vae, damage_only("vae/config.json", "vae/diffusion_pytorch_model.safetensors")),
    "VAE, other values": Kind(make_tiny_vae, read_vae, damage_json),
}


# ----------------------------------------------------------------------------------------------------------------------
# Small files that claim large contents. Each function writes a folder, to be read as one of the kinds above.


class Storage:
    """A reference in a pickle to the values in a member of the archive."""

    def __init__(self, kind, key, numel):
        self.reference = ("storage", kind, key, "cpu", numel)


class Tensor:
    """A tensor in a pickle with any size and stride."""

    def __init__(self, numel, size, stride, key="0"):
        self.args = Storage(torch.FloatStorage, key, numel), 0, size, stride, False, OrderedDict()

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.args


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.reference if isinstance(value, Storage) else None


def forge(folder, compression=zipfile.ZIP_STORED, member=bytes(12), **changes):
    """Write a checkpoint with the given parts and placeholder tensors; `member` holds all their values."""
    rope = asdict(CONFIG)
    weights = {"x_embedder.proj.weight": Tensor(3, (3,), (1,))}
    state = make_state() | {"model": weights, "ema": weights, "optimizer": None} | changes
    state["config"]["model"] = changes.pop("settings", rope)
    state.pop("settings", None)
    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(state)
    with zipfile.ZipFile(folder / "best.pt", "w", compression) as archive:
        for name, content in (("data.pkl", buffer.getvalue()), ("version", b"3"), ("data/0", member)):
            archive.writestr(f"best/{name}", content)


def forge_weights(folder, *args):
    tensor = Tensor(*args)
    forge(folder, model={"x_embedder.proj.weight": tensor}, ema={"x_embedder.proj.weight": tensor})


def forge_settings(folder, **settings):
    """Write a checkpoint that is valid except for the settings of its model."""
    state = make_state()
    state["config"]["model"] |= settings
    torch.save(state, folder / "best.pt")


def forge_text(folder):
    state = make_state()
    state["config"]["training"]["note"] = ["x" * 10**6] * 10**5
    torch.save(state, folder / "best.pt")


def forge_member_size(folder):
    """Write an archive whose directory claims a member of 4 GB."""
    forge(folder)
    data = bytearray((folder / "best.pt").read_bytes())
    struct.pack_into("<II", data, data.rindex(b"PK\1\2") + 20, 2**32 - 2, 2**32 - 2)
    (folder / "best.pt").write_bytes(data)


def forge_export(folder, header, **settings):
    make_export(folder)
    if header is not None:
        (folder / "shared/model.safetensors").write_bytes(header + bytes(100))
    path = folder / "shared/config.json"
    config = json.loads(path.read_text())
    config["model"] |= settings
    path.write_text(json.dumps(config))


def header(**tensors):
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


def forge_hole(folder, name, make):
    """Write a sparse file of a terabyte."""
    make(folder)
    os.truncate(folder / name, 2**40)


def forge_latents(folder, header=None, **settings):
    make_latents(folder)
    if header is not None:
        for name in "abc":
            (folder / f"A/{name}.safetensors").write_bytes(header + bytes(100))
    path = folder / "latents.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def forge_latent_video(folder, **fields):
    make_latents(folder)
    settings = json.loads((folder / "latents.json").read_text())
    settings["videos"][0] |= fields
    (folder / "latents.json").write_text(json.dumps(settings))


def forge_npz(folder):
    make_samples(folder)
    text = "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000,), }".ljust(117) + "\n"
    with zipfile.ZipFile(folder / "samples.npz", "w") as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text.encode() + bytes(8))


def deflate_npz(folder):
    make_samples(folder)
    np.savez_compressed(folder / "samples.npz", arr_0=np.zeros(300 * 2**20, np.uint8), labels=np.zeros(2, np.int64))


def chunk(kind, data):
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def forge_png(folder, side):
    (folder / "A").mkdir()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")
    for name in "ab":
        (folder / f"A/{name}.png").write_bytes(data)


def forge_jpeg(folder):
    (folder / "A").mkdir()
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    data = bytearray(buffer.getvalue())
    struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, 60_000, 60_000)
    (folder / "A/a.jpg").write_bytes(data)


def forge_webp(folder):
    (folder / "A").mkdir()
    buffer = io.BytesIO()
    Image.new("RGBA", (16, 16), (1, 2, 3, 4)).save(buffer, "WEBP", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0")
    data = bytearray(buffer.getvalue())
    at = data.index(b"VP8X") + 12
    data[at : at + 6] = (39_999).to_bytes(3, "little") * 2
    (folder / "A/a.webp").write_bytes(data)


def forge_video(folder, codec, side, pix_fmt="yuv420p"):
    write_video(folder / "A/a.avi", codec, pix_fmt)
    data = bytearray((folder / "A/a.avi").read_bytes())
    struct.pack_into("<II", data, data.index(b"avih") + 40, side, side)
    struct.pack_into("<ii", data, data.index(b"strf") + 12, side, side)
    (folder / "A/a.avi").write_bytes(data)


def forge_vae(folder, **settings):
    make_tiny_vae(folder)
    path = folder / "vae/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


HUGE = 2**40
FORGED = {  # what the file claims -> (function that writes it, function that reads it)
    "a storage of terabytes": (lambda at: forge_weights(at, HUGE, (HUGE,), (1,)), read_checkpoint),
    "a tensor beyond its storage": (lambda at: forge_weights(at, 3, (HUGE,), (1,)), read_checkpoint),
    "a storage beyond its member": (lambda at: forge_weights(at, 100, (100,), (1,)), read_checkpoint),
    "one number a trillion times": (lambda at: forge_weights(at, 1, (HUGE,), (0,)), read_checkpoint),
    "a missing member": (lambda at: forge_weights(at, 3, (3,), (1,), "7"), read_checkpoint),
    "an archive that inflates": (lambda at: forge(at, zipfile.ZIP_DEFLATED, bytes(300 * 2**20)), read_checkpoint),
    "a member of 4 GB": (forge_member_size, read_checkpoint),
    "an array by its constructor": (lambda at: forge(at, best_loss=Call(bytearray, 2**36)), read_checkpoint),
    "a tensor by its constructor": (lambda at: forge(at, best_loss=Call(torch.FloatTensor, 2**34)), read_checkpoint),
    "a string a hundred thousand times": (forge_text, read_checkpoint),
    "a billion blocks": (lambda at: forge_settings(at, depth=10**9), read_checkpoint),
    "a thousand blocks": (lambda at: forge_settings(at, depth=1000), read_checkpoint),
    "a billion channels": (lambda at: forge_settings(at, hidden_size=10**9, num_heads=1), read_checkpoint),
    "a million channels": (lambda at: forge_settings(at, hidden_size=2**20), read_checkpoint),
    "a trillion classes": (lambda at: forge_settings(at, num_classes=10**12), read_checkpoint),
    "a million classes": (lambda at: forge_settings(at, num_classes=10**6), read_checkpoint),
    "a patch of a million pixels": (lambda at: forge_settings(at, patch_size=1024, input_size=1024), read_checkpoint),
    "positions by the billion": (lambda at: forge_settings(at, use_rope=False, input_size=2**16), read_checkpoint),
    "an hour of positions": (lambda at: forge_settings(at, use_rope=False, num_frames=10**7), read_checkpoint),
    "a checkpoint of a terabyte": (lambda at: forge_hole(at, "best.pt", make_checkpoint), read_checkpoint),
    "a header of exabytes": (lambda at: forge_export(at, (2**62).to_bytes(8, "little")), read_export),
    "an exported tensor of terabytes": (
        lambda at: forge_export(at, header(x={"dtype": "F32", "shape": [HUGE], "data_offsets": [0, 4 * HUGE]})),
        read_export,
    ),
    "an exported tensor beyond its bytes": (
        lambda at: forge_export(at, header(x={"dtype": "F32", "shape": [HUGE], "data_offsets": [0, 100]})), read_export
    ),
    "an exported model of a billion blocks": (lambda at: forge_export(at, None, depth=10**9), read_export),
    "an exported model of a million classes": (lambda at: forge_export(at, None, num_classes=10**6), read_export),
    "a config of a terabyte": (lambda at: forge_hole(at, "shared/config.json", make_export), read_export),
    "latents of terabytes": (
        lambda at: forge_latents(at, header(mean={"dtype": "F16", "shape": [HUGE], "data_offsets": [0, 2 * HUGE]})),
        read_latents,
    ),
    "latents of another shape": (
        lambda at: forge_latents(at, header(mean={"dtype": "F16", "shape": [1, 1, 10, 5], "data_offsets": [0, 100]})),
        read_latents,
    ),
    "a cache of a terabyte": (lambda at: forge_hole(at, "latents.json", make_latents), read_latents),
    "a cache of a billion channels": (lambda at: forge_latents(at, channels=10**9), read_latents),
    "a cache of gigapixels": (lambda at: forge_latents(at, image_size=10**9), read_latents),
    "latents of 10^30 frames": (lambda at: forge_latent_video(at, num_frames=10**30), read_latents),
    "latents that lie elsewhere": (lambda at: forge_latent_video(at, path="../../x.safetensors"), read_latents),
    "latents that lie anywhere": (lambda at: forge_latent_video(at, path="/etc/x.safetensors"), read_latents),
    "latents of an unknown class": (lambda at: forge_latent_video(at, class_name=".."), read_latents),
    "an array of petabytes": (forge_npz, read_samples),
    "an array that inflates": (deflate_npz, read_samples),
    "a PNG of 100,000 x 100,000": (lambda at: forge_png(at, 100_000), read_images),
    "a PNG of 13,000 x 13,000": (lambda at: forge_png(at, 13_000), read_images),
    "a JPEG of 60,000 x 60,000": (forge_jpeg, read_images),
    "a WebP of 40,000 x 40,000": (forge_webp, read_images),
    "a video of 100,000 x 100,000": (lambda at: forge_video(at, "rawvideo", 100_000), read_videos),
    "a video of 13,000 x 13,000": (lambda at: forge_video(at, "rawvideo", 13_000), read_videos),
    "a coded video of 100,000 x 100,000": (lambda at: forge_video(at, "ffv1", 100_000), read_videos),
    "a VAE of a billion channels": (lambda at: forge_vae(at, block_out_channels=[10**9, 10**9]), read_vae),
    "a VAE of a billion layers": (lambda at: forge_vae(at, layers_per_block=10**9), read_vae),
    "a VAE of a million latents": (lambda at: forge_vae(at, latent_channels=10**6), read_vae),
}  # fmt: skip


def read_forged(name, place):
    """Read a forged file. The log says whether it was refused, and how much the process grew."""
    make, read = FORGED[name]
    make(place / "valid")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sys.addaudithook(watch)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        read(place / "valid")
        result = "FAILURE: was accepted\n"
    except (UserError, UnreadableError) as error:
        result = f"0 {str(error)!r}\n"
    except BaseException:
        result = "FAILURE " + traceback.format_exc()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    (place / "log").write_text(f"{result}END 1 refused of 1, {grown} MB more\n")


# ----------------------------------------------------------------------------------------------------------------------
# A process per kind


FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "pickle.find_class")


def watch(event, _):
    """An audit hook that ends the process on events which no file may cause."""
    if event in FORBIDDEN:
        print(f"FORBIDDEN {event}", flush=True)
        os._exit(9)


def same(a, b):
    if isinstance(a, list):
        return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def read_damaged(name, kind, place, count, seed):
    """Read `count` damaged files of a kind. Logs each step to a file, which is there after a crash."""
    valid, folder = place / "valid", place / "damaged"
    expected = kind.read(shutil.copytree(valid, place / "copy"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    sys.addaudithook(watch)
    with open(place / "log", "w", encoding="utf-8", errors="backslashreplace") as log:
        for index in range(count):
            rng = random.Random(f"{name} {seed} {index}")
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(valid, folder)
            damage = kind.damage(folder, valid, rng)
            log.write(f"{index} {damage}\n")
            log.flush()
            signal.setitimer(signal.ITIMER_REAL, SECONDS)  # ends the process
            failure = None
            try:
                found = kind.read(folder)
                if kind.is_checked and not same(found, expected):
                    failure = "loaded, but differs from what was saved\n"
            except (UserError, UnreadableError):
                refused += 1
            except BaseException:
                failure = traceback.format_exc()
            signal.setitimer(signal.ITIMER_REAL, 0)
            if failure:
                log.write(f"FAILURE with {index} ({damage}), seed {seed}: {failure}")
                keep(place, folder, index)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
        log.write(f"END {refused} refused of {count}, {grown} MB more\n")


def keep(place, folder, index):
    """Keep a copy of a folder that caused a failure, for debugging."""
    shutil.copytree(folder, place / f"failure-{index}", dirs_exist_ok=True)


def run_kind(name, place, count, seed):
    """A dict "refused", "megabytes", "failures" of one kind, which is read in a process forked from this one."""
    (place / "valid").mkdir(parents=True)
    if name in KINDS:
        KINDS[name].make(place / "valid")
    child = os.fork()
    if child == 0:
        try:
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, 1)
            os.dup2(sink, 2)  # decoders write there
            read_damaged(name, KINDS[name], place, count, seed) if name in KINDS else read_forged(name, place)
        except BaseException:
            (place / "log").open("a").write("FAILURE " + traceback.format_exc())
        os._exit(0)
    _, status = os.waitpid(child, 0)
    log = (place / "log").read_text(encoding="utf-8") if (place / "log").exists() else ""
    failures = re.split(r"(?m)^(?=FAILURE)", log)[1:]
    failures = [re.split(r"(?m)^(?:END|\d+ )", failure)[0] for failure in failures]
    if status:
        last = [line for line in log.splitlines() if line[:1].isdigit()][-1:]
        cause = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {os.WEXITSTATUS(status)}"
        failures.append(f"the process died of {cause} at {last}, seed {seed}; see {place / 'damaged'}")
    end = re.search(r"END (\d+) refused of \d+, (\d+) MB more", log)
    refused, megabytes = map(int, end.groups()) if end else (0, 0)
    return {"refused": refused, "megabytes": megabytes, "failures": failures}


def main():
    parser = argparse.ArgumentParser(description="Read damaged files of every kind and report failures.")
    parser.add_argument("--count", type=int, default=COUNT, help="files of each kind")
    parser.add_argument("--seed", default="0", help="seed of the damage")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=[*KINDS, *FORGED], metavar="KIND")
    parser.add_argument("--forged", action="store_true", help="read the forged files, too")
    parser.add_argument(
        "--folder", type=Path, help="folder for the files; default: a temporary one, kept after failures"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    models.SIZES["Tiny"] = (2, 48, 2)
    torch.set_num_threads(1)
    folder, results = args.folder or Path(tempfile.mkdtemp(prefix="hostile-")), {}
    for index, name in enumerate([*args.kinds, *FORGED] if args.forged else args.kinds):
        results[name] = run_kind(name, folder / str(index), args.count, args.seed)
        found = results[name]
        failures = found["failures"]
        print(f"{name}: {found['refused']} refused, {found['megabytes']} MB, {len(failures)} failures", *failures[:5],
              sep="\n", flush=True)  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(results))
    if not args.folder and not any(found["failures"] for found in results.values()):
        shutil.rmtree(folder)


# ----------------------------------------------------------------------------------------------------------------------
# Tests


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    command = [sys.executable, __file__, "--forged", "--folder", folder / "files", "--out", folder / "results.json"]
    subprocess.run([*map(str, command)], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=600)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_or_refused(kind, results):
    found = results[kind]
    assert not found["failures"], "\n".join(found["failures"])
    assert found["megabytes"] < MEGABYTES


@pytest.mark.parametrize("claim", FORGED)
def test_a_file_that_claims_more_than_it_has_is_refused_before_memory_is_taken(claim, results):
    found = results[claim]
    assert not found["failures"], "\n".join(found["failures"])
    assert found["refused"] == 1
    assert found["megabytes"] < 100


def test_the_source_has_no_calls_that_could_run_code_from_a_file():
    forbidden = r"allow_pickle=True|weights_only=False|pickle\.loads?\(|yaml|\beval\(|\bexec\(|os\.system|shell=True"
    for path in (path for part in ("EqM", "scripts", "datasets") for path in (TESTS.parent / part).rglob("*.py")):
        text = re.sub(r"\.eval\(\)", "", path.read_text())  # of a network
        assert not re.search(forbidden, text), path
        assert all("weights_only=True" in load for load in re.findall(r"torch\.load\([^\n]*", text)), path
        assert all("use_safetensors=True" in load for load in re.findall(r"from_pretrained\([^)]*", text)), path


if __name__ == "__main__":
    main()
