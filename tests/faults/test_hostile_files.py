"""Damaged files of every kind are read or refused in one line, without a traceback, a crash, a hang
or running code.

FILES=2000 SEED=7 pytest tests/faults/test_hostile_files.py -k videos: tries more files of some
kinds. Each kind of file is read in its own process, so that crashes and hangs of a decoder are
caught."""

import contextlib
import json
import os
import random
import shutil
import signal
import struct
import sys
import traceback
from shlex import split

import pytest
import torch

import cache_latents
import checkpoint
import models
import published
import tiny_data
from process import fork
from runtime import metrics
from runtime.cli import UserError
from scoring import manifest
from test_published import STATE, write_file
from tiny_videos import make_video, write_images, write_ucf_list, write_video
from training import differences, run_main
from vae import load_vae
from video.clips import Clips, collate
from video.files import UnreadableError, read_all_frames
from video.index import index_path, long_enough, scan_videos, split_videos
from video.inputs import find_clips
from video.samples import read_samples
from video.source import check_data_path, open_source

COUNT = int(os.environ.get("FILES", 25))  # files of each kind
SEED = os.environ.get("SEED", 0)  # of the damage
SECONDS = 20  # limit for one file; most take a millisecond
PUBLISHED = "EqM-Tiny/2"  # the name of the published model
VIDEOS = {  # and their codecs
    "a.avi": "mpeg4",
    "b.mp4": "libx264",
    "c.mkv": "mpeg4",
    "d.webm": "libvpx",
}


def make_state():
    """A checkpoint with the memory of an optimizer."""
    torch.manual_seed(0)
    state = tiny_data.make_state(hidden_size=24, num_heads=2, depth=2, num_frames=4, use_rope=True)
    memory = {number: {"exp_avg": torch.rand(24, 24)} for number in range(20)}
    states = [{"state": memory, "param_groups": [{"lr": 1e-4}]}]
    return state | {"optimizer": {"kind": "adamw", "states": states}}


def write_checkpoint(folder):
    torch.save(make_state(), folder / "best.pt")


def make_published(folder):
    models.SIZES["Tiny"] = (2, 48, 2)
    write_file(folder / "a.pt", STATE, "whole")


def make_videos(folder):
    for name, codec in VIDEOS.items():
        write_video(folder / "A" / name, 12, codec=codec, size=(48, 48))


def make_pixels(folder):
    """A cache of the pixels of videos, which are gone afterwards."""
    make_videos(folder / "videos")
    flags = ["--data-path", folder / "videos", "--out", folder / "cache"]
    run_main(cache_latents, *flags, *split("--vae none --image-size 16"))
    shutil.rmtree(folder / "videos")


def make_metrics(folder):
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, 9):
            print(json.dumps({"step": step, "train_loss": 1 / step, "val_loss": None}), file=file)


def read_checkpoint(folder):
    """All that a checkpoint holds, for comparison."""
    checkpoint.load_model(folder / "best.pt", video=True)
    return checkpoint.load(folder / "best.pt")


def read_clips(folder, num_frames, images=False, index_folder=None):
    """The videos of a folder, after training and validation clips were read from them."""
    check_data_path(folder, images)
    source = open_source(folder, 16, images, index_folder)
    videos = long_enough(source.videos(), num_frames, "training", "--num-frames")
    videos = [video for part in split_videos(folder, videos, 0.3) for video in part]
    clips = Clips(source, videos, num_frames, frame_interval=(1, 2))
    collate([clips[index] for index in range(len(videos))])
    return videos


def read_videos(folder, images=False):
    kind = "image" if images else "video"
    num_frames = 1 if images else 3
    for video in read_clips(folder, num_frames, images):
        with contextlib.suppress(UserError):
            for clip in find_clips("--init", folder / video.path, (kind,)):
                clip.read(range(num_frames), 0.04, 48)
        if not images:
            with contextlib.suppress(UnreadableError):
                list(read_all_frames(folder, video, 5))


def read_index(folder):
    (index,) = folder.glob(".video_index-*.json")
    other = shutil.move(index, index_path(folder, folder))  # of another path
    read_clips(folder, 3, index_folder=other.parent)


def read_metrics(folder):
    rows, _ = metrics.read_metrics(folder / "metrics.jsonl")
    assert all(isinstance(row["step"], int) for row in rows)
    json.dumps([row for row in rows if row["step"] <= 5])  # as a resumed run writes them


def read_sample_folder(folder):
    _, clips, labels = read_samples("--samples", folder)
    assert len(clips) == len(labels) and clips.sum() >= 0
    for clip in find_clips("--given", folder, ("video",)):
        clip.read([0], 0.04, 16)


HUGE = [
    struct.pack("<I", 2**32 - 1),
    struct.pack("<i", -1),
    struct.pack(">i", 2**31 - 1),
    struct.pack("<Q", 2**63),
    struct.pack("<q", 2**40),
    struct.pack("<H", 65535),
    struct.pack("<Q", 0),
]


def flip_bits(data, rng):
    for _ in range(rng.choice([1, 1, 8, 64])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def truncate(data, rng):
    del data[rng.choice([0, rng.randrange(len(data)), -rng.randrange(1, 40)]) :]


def zero(data, rng):
    first = rng.randrange(len(data))
    data[first : first + rng.choice([1, 8, 100, 5000])] = bytes(len(data[first : first + 5000]))


def blow_up(data, rng):
    """Overwrite some bytes, often near the beginning, where headers are, by a number that is out of
    all bounds.
    """
    value = rng.choice(HUGE)
    first = rng.randrange(rng.choice([len(data), min(len(data), 300)]))
    data[first : first + len(value)] = value


def splice(data, rng):
    """Continue at another place: a part is missing or comes twice."""
    data[rng.randrange(len(data)) :] = data[rng.randrange(len(data)) :]


def damage(folder, rng, pattern):
    """Damage a random file of a folder. Returns a description."""
    path = rng.choice(sorted(path for path in folder.rglob(pattern) if path.is_file()))
    data = bytearray(path.read_bytes())
    way = rng.choice([flip_bits, truncate, zero, blow_up, splice])
    way(data, rng)
    path.write_bytes(data)
    return f"{way.__name__} {path.name}"


# Kinds of files: what writes valid ones to a folder, and what reads them as the scripts do.

FILES = {
    "checkpoint": (write_checkpoint, read_checkpoint),
    "checkpoint to sample": (
        write_checkpoint,
        lambda at: checkpoint.load_model(at / "best.pt")[0].state_dict(),
    ),
    "published model": (
        make_published,
        lambda at: checkpoint.load_model(at / "a.pt", model=PUBLISHED)[0].state_dict(),
    ),
    "export": (
        lambda at: published.write_export(at / "shared", make_state(), "fp32", "a card"),
        lambda at: checkpoint.load_model(at / "shared", video=True),
    ),
    "latents": (tiny_data.make_latents, lambda at: read_clips(at, 2)),
    "unfinished latents": (
        lambda at: (at / "latents.partial.json").write_text(json.dumps(tiny_data.LATENTS_SETTINGS)),
        lambda at: cache_latents.check_out(at, tiny_data.LATENTS_SETTINGS),
    ),
    "pixels": (make_pixels, lambda at: read_clips(at / "cache", 2)),
    "videos": (make_videos, read_videos),
    "images": (write_images, lambda at: read_videos(at, images=True)),
    "index": (lambda at: make_videos(at) or scan_videos(at, at), read_index),
    "split lists": (
        lambda at: write_ucf_list(at, ["A/a", "A/b"]),
        lambda at: split_videos(at, [make_video(f"A/{name}") for name in "abc"], 0.3),
    ),
    "metrics": (make_metrics, read_metrics),
    "samples": (tiny_data.make_samples, read_sample_folder),
    "manifest": (
        lambda at: manifest.write_manifest(at / "a.json", {"a": 1.5, "format": manifest.FORMAT}),
        lambda at: manifest.read_manifest(at / "a.json"),
    ),
    "VAE": (lambda at: tiny_data.make_vae(at / "vae"), lambda at: load_vae(str(at / "vae"))),
}
PATTERNS = {"index": ".video_index-*.json", "pixels": "cache/**/*"}  # of the files to damage
# What is read of a damaged file of these kinds equals what was saved
SAME = "checkpoint", "checkpoint to sample", "published model"
FORBIDDEN = split("""
    os.system
    os.exec
    os.posix_spawn
    subprocess.Popen
    socket.connect
    pickle.find_class
""")


def watch(event, _):
    """An audit hook that ends the process on events which no file may cause."""
    if event in FORBIDDEN:
        os._exit(9)


def read_damaged(name, place):
    """Read damaged files of a kind. Writes what went wrong to failures.txt."""
    make, read = FILES[name]
    valid = place / "valid"
    folder = place / "damaged"
    make(valid)
    expected = read(shutil.copytree(valid, place / "copy"))
    sys.addaudithook(watch)
    for index in range(COUNT):
        rng = random.Random(f"{name} {SEED} {index}")
        problem = None
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(valid, folder)
        what = damage(folder, rng, PATTERNS.get(name, "*"))
        signal.setitimer(signal.ITIMER_REAL, SECONDS)  # ends the process
        try:
            found = read(folder)
            if name in SAME and differences(found, expected):
                problem = "loaded, but differs from what was saved"
        except (UserError, UnreadableError):
            pass
        except BaseException:
            problem = traceback.format_exc()
        signal.setitimer(signal.ITIMER_REAL, 0)
        if problem:
            with open(place / "failures.txt", "a", errors="backslashreplace") as file:
                print(f"file {index}, {what}: {problem}", file=file)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_read_or_refused(name, tmp_path):
    (tmp_path / "valid").mkdir()
    child = fork(read_damaged, name, tmp_path)
    child.join()
    failures = tmp_path / "failures.txt"
    assert not failures.exists(), failures.read_text()
    # 9: a forbidden call; -14: a hang
    assert child.exitcode == 0, f"it read {tmp_path / 'damaged'}"
