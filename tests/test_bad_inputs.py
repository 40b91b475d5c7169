"""All that a user can get wrong, in one table: one line that says what, exit status 2, and nothing was touched.

Most commands run in this process, for speed; two of them, and the shell scripts, as a user runs them.
"""

import contextlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import cache_latents
import checkpoint
import evaluate
import export
import make_moving_shapes
import published
import sample_gd
import train
from runtime import cli, distributed
from tiny_data import make_images, make_latents, make_samples, make_vae, save_checkpoint
from tiny_videos import write_video

ROOT = Path(train.__file__).resolve().parents[1]
SCRIPTS = {
    "train": train,
    "sample_gd": sample_gd,
    "cache_latents": cache_latents,
    "evaluate": evaluate,
    "export": export,
    "make_moving_shapes": make_moving_shapes,
}
VIDEOS = ["--video", "--model", "EqM-Ti/4", "--vae", "none", "--image-size", "16", "--num-frames", "8", "--use-rope"]
STEPS = ["--results-dir", "new", "--global-batch-size", "4", "--max-steps", "20"]
COMMANDS = {  # what is right; a case adds to it what is wrong
    "train": ["train", *VIDEOS, *STEPS, "--data-path", "videos"],
    "train without a model": ["train", *VIDEOS[:1], *VIDEOS[3:], *STEPS, "--data-path", "videos"],
    "train fixed": ["train", *VIDEOS[:-1], *STEPS, "--data-path", "videos"],
    "train images": ["train", *VIDEOS[1:7], *STEPS, "--data-path", "images"],
    "schedule": ["train", *VIDEOS[:7], "--use-rope", "--global-batch-size", "4", "--data-path", "videos"],
    "schedule fixed": ["train", *VIDEOS[:7], "--data-path", "videos"],
    "train latents": ["train", *VIDEOS[:3], *VIDEOS[7:], *STEPS, "--data-path", "cache", "--no-flip"],
    "sample": ["sample_gd", "--video", "--ckpt", "rope.pt", "--folder", "new"],
    "sample fixed": ["sample_gd", "--video", "--ckpt", "fixed.pt", "--folder", "new"],
    "sample images": ["sample_gd", "--ckpt", "image.pt", "--folder", "new"],
    "cache": ["cache_latents", "--data-path", "videos", "--vae", "vae", "--image-size", "16", "--out", "new"],
    "evaluate": ["evaluate", "--metric=motion", "--samples=samples", "--data-path", "videos", "--out", "new.json"],
    "export": ["export"],
    "shapes": ["make_moving_shapes", "--out", "new"],
}
LONG = "x" * 300


@dataclass
class Case:
    command: str  # of COMMANDS
    flags: list
    words: list  # that the line must have
    environment: dict = field(default_factory=dict)
    patch: tuple = ()  # arguments of monkeypatch.setattr or setitem


def case(command, flags, *words, **kwargs):
    """flags is a line of them, separated by spaces, or a list where one of them has a space or is empty."""
    return Case(command, flags if isinstance(flags, list) else flags.split(), words, **kwargs)


CASES = {
    # Flags of train.py that are no numbers, or none that can be.
    "frames below the temporal patch": case("train", "--num-frames 3", "--num-frames 3", "4"),
    "a word for a number": case("train", "--num-frames many", "--num-frames", "many"),
    "a trillion frames": case("train", "--num-frames 1000000000000", "--num-frames", "at most"),
    "a billion frames": case("train", "--num-frames 1000000000", "--num-frames 1000000000"),
    "an empty number": case("train", ["--num-frames", ""], "--num-frames"),
    "a number of 5,000 digits": case("train", "--num-frames " + "9" * 5000, "--num-frames"),
    "a rate beyond all numbers": case("train", "--lr 1e400", "--lr", "1e400"),
    "a rate of zero": case("train", "--lr 0", "--lr", "above 0"),
    "an EMA decay above 1": case("train", "--ema-decay 1.5", "--ema-decay", "at most 1"),
    "a share below zero": case("train", "--val-fraction=-0.1", "--val-fraction", "at least 0"),
    "a split of two": case("train", "--rope-split 8,8", "--rope-split 8,8, model", "three even numbers"),
    "a split beyond the head": case("train", "--rope-split 64,64,2", "--rope-split 64,64,2", "130 channels"),
    "a split of fixed positions": case("train fixed", "--rope-split 8,8,8", "--rope-split 8,8,8", "add --use-rope"),
    "a table beside fixed positions": case(
        "train fixed", "--position-table space", "--position-table space needs rotary positions: add --use-rope"
    ),
    "a speed of fixed positions": case("train fixed", "--rope-speed 0.5", "--rope-speed 0.5", "add --use-rope"),
    "a speed below zero": case("train", "--rope-speed=-1", "--rope-speed", "at least 0"),
    "a speed of light": case("train", "--rope-speed 1e9", "--rope-speed 1000000000.0", "[0, 1000]"),
    "a speed that the heads have no room for": case(
        "train", "--rope-speed 0.5 --num-heads 16", "--rope-speed 0.5", "6 channels of a head"
    ),
    "a table of time": case("train", "--position-table time", "--position-table", "invalid choice: 'time'"),
    "a base of fixed positions": case("train fixed", "--rope-theta 100", "--rope-theta 100.0", "add --use-rope"),
    "no steps": case("train", "--max-steps 0", "--max-steps", "at least 1"),
    "a seed below zero": case("train", "--global-seed=-1", "--global-seed", "at least 0"),
    "a seed beyond 64 bits": case("train", "--global-seed 1" + "0" * 30, "--global-seed", "at most"),
    "a million loader processes": case("train", "--num-workers 1000000", "--num-workers 1000000", "at most"),
    "pixels by the billion": case("train", "--image-size 1000000000", "input_size", "1000000000"),
    "an image size that the patches do not divide": case("train", "--image-size 18", "--image-size 18", "4"),
    "a million blocks": case("train", "--depth 1000000", "depth", "1000000"),
    "a width beyond all memory": case("train", "--hidden-size 600000 --depth 500", "hidden_size 600000", "weights"),
    "heads that do not divide the width": case("train", "--num-heads 7", "7 heads"),
    "a batch that the parts do not divide": case(
        "train", "--global-batch-size 6 --grad-accum 4", "--global-batch-size 6", "--grad-accum 4"
    ),
    "intervals in the wrong order": case("train", "--frame-interval 4 2", "--frame-interval 4 2"),
    "validation of fewer frames than a patch": case("train", "--val-frames 4 2", "--val-frames 2", "4"),
    "validation of too many frames": case("train", "--val-frames 4 400", "--val-frames 400", "10"),
    "validation of other frames with fixed positions": case("train fixed", "--val-frames 4", "--val-frames 4", "tied"),
    "a schedule that goes back": case("schedule", "--frames-schedule 4:10,8:5", "--frames-schedule", "8:5", "increase"),
    "a schedule of words": case("schedule", "--frames-schedule four", "--frames-schedule", "'four'"),
    "a schedule below the patch": case("schedule", "--frames-schedule 2:10,8:20", "--frames-schedule 2", "4"),
    "a schedule of frames that no video has": case(
        "schedule", "--frames-schedule 4:10,400:20:4", "--frames-schedule 400", "10"
    ),
    "a schedule whose batches do not divide": case(
        "schedule", "--frames-schedule 4:10,12:20 --global-batch-size 4", "12 frames", "--global-batch-size"
    ),
    "a schedule beside frames": case(
        "schedule", "--frames-schedule 4:10 --num-frames 4", "--num-frames 4 contradicts --frames-schedule"
    ),
    "a schedule with fixed positions": case("schedule fixed", "--frames-schedule 4:10,8:20", "tied to 4"),
    "forcing images": case("train images", "--forcing 0.5", "--forcing 0.5: clips of one frame", "add --video"),
    "forcing more than all clips": case("train", "--forcing 1.5", "--forcing", "at most 1"),
    "a mix without a schedule": case("train", "--mix 0.2", "--mix 0.2", "--frames-schedule"),
    "a loader timeout that is NaN": case("train", "--loader-timeout nan", "--loader-timeout", "nan"),
    "a mistyped flag": case("train", "--num-frame 3", "--num-frame: no such flag; did you mean --num-frames?"),
    "an unknown flag": case("train", "--colour=red", "--colour: no such flag; see --help"),
    "a word too many": case("train", "--qk-norm please", "please: a word too many"),
    "a glob that matches several files": case(
        "train", "--ckpt a.pt b.pt c.pt --qk-norm", "--ckpt takes one file, found 3: a.pt, b.pt, c.pt"
    ),
    "a glob after an equals sign": case("sample", "--folder=a b --video", "--folder takes one folder, found 2: a, b"),
    "a flag without its value": case("train", "--ckpt", "--ckpt"),
    "a value that looks like a flag": case("train", "--data-path -videos", "--data-path"),
    "a decay that ends too early": case("train", "--lr-decay-end 9", "--lr-decay-end 9: ends before", "20"),
    "a decay of no steps": case("schedule", "--num-frames 8 --lr-decay-end 9", "--lr-decay-end 9: needs --max-steps"),
    "no such model": case("train", "--model EqM-Q/4", "--model", "EqM-Q/4"),
    "an unknown energy": case("train", "--ebm l3", "--ebm", "l3"),
    # Flags that contradict each other or the machine.
    "minutes below zero": case("train", "--save-minutes -1", "--save-minutes", "-1", "at least 0"),
    "half precision without a GPU": case("train", "--precision fp16", "--precision fp16", "GPU", "bf16"),
    "a compiled energy": case("train", "--compile --ebm dot", "--compile", "--ebm dot"),
    "compiling without a compiler": case(
        "train", "--compile", "--compile", "g++", environment={"PATH": "empty", "CXX": None}
    ),
    "dispersion of single clips": case("train", "--disp --grad-accum 4", "--disp", "--global-batch-size 4"),
    "a threshold for a solver": case("train", "--stop-below 0.5 --sampler euler", "--stop-below 0.5", "euler"),
    "Weights & Biases that is not installed": case(
        "train", "--wandb", "--wandb", "pip install wandb", patch=(sys.modules, "wandb", None)
    ),
    "frames without videos": case("train images", "--num-frames 8", "--num-frames 8 without --video"),
    "a temporal patch without videos": case(
        "train images", "--temporal-patch-size 4", "--temporal-patch-size 4 without --video"
    ),
    # Data.
    "no such folder": case("train", "--data-path no/such", "--data-path no/such"),
    "data of no name": case("train", ["--data-path", ""], "--data-path"),
    "data in a file": case("train", "--data-path file", "--data-path file", "a file"),
    "data in a pipe": case("train", "--data-path pipe", "--data-path pipe"),
    "an empty folder": case("train", "--data-path empty", "--data-path empty", "no video found"),
    "one video": case("train", "--data-path one", "--data-path one", "at least 2"),
    "videos that can't be opened": case("train", "--data-path broken", "--data-path broken", "none of its 2 videos"),
    "images for videos": case("train", "--data-path images", "--video"),
    "videos for images": case("train images", "--data-path videos", "--video"),
    "videos that are too short": case("train", "--num-frames 400", "--num-frames 400", "10"),
    "fewer classes than folders": case("train", "--num-classes 1", "--num-classes 1", "2"),
    "a VAE that is not there": case("train", "--vae no/such/vae", "--vae no/such/vae"),
    "a VAE in an empty folder": case("train", "--vae empty", "--vae empty", "config.json"),
    # Results.
    "results in a file": case("train", "--results-dir file", "--results-dir file", "not a writable folder"),
    "results of no name": case("train", ["--results-dir", ""], "--results-dir", "empty"),
    "results in a link to nowhere": case("train", "--results-dir nowhere", "--results-dir nowhere"),
    "results in what is no text": case("train", ["--results-dir", "x\udcff"], "--results-dir", "UTF-8"),
    "results of 300 letters": case("train", f"--results-dir {LONG}", "--results-dir", "255 bytes"),
    # Checkpoints.
    "no such checkpoint": case("train", "--ckpt no/such.pt", "--ckpt no/such.pt", "no such file"),
    "a checkpoint of no name": case("train", ["--ckpt", ""], "--ckpt", "empty"),
    "an empty file": case("train", "--ckpt file", "--ckpt file", "not a checkpoint"),
    "a pipe": case("train", "--ckpt pipe", "--ckpt pipe", "a pipe or a device"),
    "an endless device": case("train", "--ckpt /dev/zero", "--ckpt /dev/zero", "a pipe or a device"),
    "a link to itself": case("train", "--ckpt loop", "--ckpt loop", "symbolic links"),
    "a folder that is no export": case("train", "--ckpt empty", "--ckpt empty", "a folder without"),
    "a checkpoint that is cut short": case("train", "--ckpt cut.pt", "--ckpt cut.pt", "cut short"),
    "a checkpoint with a flipped bit": case("train", "--ckpt flipped.pt", "--ckpt flipped.pt", "damaged"),
    "a pickle": case("train", "--ckpt pickle.pt", "--ckpt pickle.pt", "holds code"),
    "a checkpoint that runs code": case("train", "--ckpt code.pt", "--ckpt code.pt", "holds code"),
    "a checkpoint of another project": case("train", "--ckpt other.pt", "--ckpt other.pt", "not a checkpoint of this"),
    "fixed positions for rotary ones": case("train", "--ckpt fixed.pt", "cannot be converted: retrain with --use-rope"),
    "rotary positions for fixed ones": case("train fixed", "--ckpt rope.pt", "trained with --use-rope"),
    "a table for a checkpoint without one": case(
        "train", "--position-table space --ckpt rope.pt", "--position-table none, found space", "cannot be converted"
    ),
    "a checkpoint of another speed": case("train", "--rope-speed 1 --ckpt rope.pt", "--rope-speed gives 1.0"),
    "no table for a checkpoint with one": case(
        "train", "--position-table none --ckpt table.pt", "--position-table space, found none", "cannot be converted"
    ),
    "other frames for fixed positions": case("train fixed", "--num-frames 4 --ckpt fixed.pt", "--num-frames"),
    "a checkpoint of another model": case("train", "--model EqM-S/4 --ckpt rope.pt", "EqM-S/4"),
    "a checkpoint of another depth": case("train", "--ckpt odd.pt", "depth 2"),
    "a checkpoint of other classes": case("train", "--num-classes 7 --ckpt rope.pt", "--num-classes"),
    "a checkpoint of other class names": case(
        "train", "--data-path long --ckpt rope.pt", "long: has the classes A (1), --ckpt rope.pt has A, B (2)",
        "--new-classes",
    ),
    "new classes of no checkpoint": case("train", "--new-classes", "--new-classes is for a checkpoint", "--ckpt"),
    "a checkpoint of another size": case("train", "--image-size 32 --ckpt rope.pt", "--image-size"),
    "a checkpoint of another temporal patch": case(
        "train", "--temporal-patch-size 2 --ckpt rope.pt", "--temporal-patch-size"
    ),
    "a checkpoint of another energy": case("train", "--ebm dot --ckpt rope.pt", "has ebm none, --ebm gives dot"),
    "a checkpoint of another optimizer": case("train", "--optimizer muon --ckpt rope.pt", "--optimizer adamw"),
    "a checkpoint that has its steps": case("train", "--max-steps 10 --ckpt rope.pt", "--max-steps 10"),
    "an odd checkpoint that has its steps": case(
        "train without a model", "--max-steps 9 --ckpt odd.pt", "--max-steps 9"
    ),
    "a checkpoint of images": case("train", "--ckpt image.pt", "holds an image model, --video asks"),
    "a checkpoint of videos": case("train images", "--use-rope --ckpt rope.pt", "holds a video model: add --video"),
    "resuming elsewhere than anything ran": case("train", "--resume --ckpt no/such.pt", "--ckpt no/such.pt"),
    "resuming from what is no run": case("train", "--resume --results-dir file", "--results-dir file"),
    # Latent caches.
    "another size than the cache": case("train latents", "--image-size 32", "--image-size 32"),
    "another VAE than the cache": case("train latents", "--vae mse", "--vae mse"),
    "pixels from a cache": case("train latents", "--vae none", "--vae none"),
    "images from a cache": case("train images", "--data-path cache", "add --video"),
    "a cache that is not complete": case("train latents", "--data-path partial", "not complete"),
    "a cache that lost a file": case("train latents", "--data-path lost --vae vae", "run cache_latents.py again"),
    # sample_gd.py.
    "a scale of fixed positions": case("sample fixed", "--rope-scale linear", "--rope-scale linear", "fixed positions"),
    "a scale of an earlier version": case("sample", "--rope-scale ntk", "--rope-scale: ntk: removed, because"),
    "an unknown scale": case("sample", "--rope-scale yarn", "--rope-scale", "yarn"),
    "samples by the billion": case("sample", "--num-samples 2000000000", "--num-samples", "at most"),
    "sampling a billion frames": case("sample", "--num-frames 1000000000", "--num-frames", "at most"),
    "a frame rate beyond all players": case("sample", "--fps 1e300", "--fps", "at most"),
    "sampling frames below the temporal patch": case("sample", "--num-frames 3", "--num-frames 3", "4"),
    "sampling another model": case("sample", "--model EqM-S/4", "EqM-S/4", "EqM-Ti/4"),
    "sampling another number of classes": case("sample", "--num-classes 101", "--num-classes", "101", "2"),
    "sampling another image size": case("sample", "--image-size 32", "--image-size 32", "16"),
    "an unknown class": case("sample", "--classes A Kayaking", "--classes Kayaking", "A, B"),
    "a class number that is too large": case("sample", "--classes 2", "--classes 2"),
    "two frame rates": case("sample", "--fps 25 --time-scale 0.04", "--fps", "--time-scale"),
    "a frame rate that is no number": case("sample", "--fps nan", "--fps", "nan"),
    "sampling with a VAE that is not there": case("sample", "--vae no/such/vae", "--vae no/such/vae"),
    "a folder in a file": case("sample", "--folder file/x", "--folder file"),
    "one point, so no step": case("sample", "--num-sampling-steps 1", "--num-sampling-steps", "at least 2"),
    "sampling from a pipe": case("sample", "--ckpt pipe", "--ckpt pipe", "a pipe or a device"),
    "sampling from code": case("sample", "--ckpt code.pt", "holds code"),
    "sampling from an export that is damaged": case("sample", "--ckpt cut-export", "--ckpt cut-export", "damaged"),
    "the energy of a model that has none": case("sample", "--report-energy", "--report-energy", "without an energy"),
    "no start": case("sample", "--init no/such.mp4", "--init no/such.mp4"),
    "no clip to complete": case("sample", "--given no/such.mp4", "--given no/such.mp4"),
    "frames of no clip": case("sample", "--given-frames 0-3", "--given-frames 0-3 are frames of --given"),
    "frames that are no numbers": case("sample", "--given-frames 3-1", "--given-frames", "such as 0-3,12-15"),
    "a clip for images": case("sample images", "--given videos", "--given videos without --video"),
    "a clip of no name": case("sample", ["--given", ""], "--given ''"),
    "a clip that would be removed": case("sample", "--given x --folder x", "--given x"),
    "a share of nothing": case("sample", "--init-gamma 0.5", "--init-gamma 0.5", "--init"),
    "a share above one": case("sample", "--init x.mp4 --init-gamma 1.5", "--init-gamma", "at most 1"),
    "no way to go": case("sample", "--init x --init-gamma 1 --sampler heun", "--init-gamma 1", "heun"),
    "rotary positions that are not there": case("sample fixed", "--use-rope", "cannot be converted"),
    "sampling other frames than fixed ones": case("sample fixed", "--num-frames 16", "tied to 8 frames"),
    "images from a model of videos": case("sample images", "--ckpt rope.pt", "holds a video model: add --video"),
    "videos from a model of images": case("sample", "--ckpt image.pt", "holds an image model"),
    "frames of images": case("sample images", "--num-frames 4", "--num-frames 4 without --video"),
    "a frame rate of images": case("sample images", "--fps 1", "--fps 1.0 without --video"),
    # cache_latents.py.
    "latents of pixels": case("cache", "--vae none", "pixels need no cache"),
    "latents of a VAE of no such name": case("cache", "--vae emma", "--vae emma"),
    "latents of a size that does not divide": case("cache", "--image-size 33", "--image-size 33 is not a multiple"),
    "latents of nothing": case("cache", "--data-path no/such", "no such folder"),
    "latents of latents": case("cache", "--data-path cache", "a latent cache; name the folder of its videos"),
    "latents among videos": case("cache", "--out videos", "holds A but no latent cache"),
    "latents in a file": case("cache", "--out file", "not a writable folder"),
    "latents beside others": case("cache", "--out cache", "--out cache: a latent cache with vae"),
    "latents of videos with long names": case("cache", "--data-path long", "--data-path long", "too long a name"),
    "latents where the cache is a pipe": case("cache", "--out piped", "--out piped", "latents.json is damaged"),
    # evaluate.py.
    "scores of nothing": case("evaluate", "--samples empty", "--samples empty"),
    "scores against nothing": case("evaluate", "--data-path no/such", "--data-path no/such"),
    "scores against latents": case("evaluate", "--data-path cache", "--data-path cache"),
    "scores in a file": case("evaluate", "--out file/x.json", "--out"),
    "an unknown metric": case("evaluate", "--metric beauty", "--metric", "beauty"),
    # export.py.
    "an export of nothing": case("export", "no/such.pt new", "no/such.pt", "no such file"),
    "an export without a place": case("export", "rope.pt", "DIR"),
    "an export of no name": case("export", ["rope.pt", ""], "DIR", "empty"),
    "an export among videos": case("export", "rope.pt videos", "DIR videos", "not empty"),
    "an export of code": case("export", "code.pt new", "holds code"),
    "an export of another model": case("export", "rope.pt new --model EqM-XL/2", "--model EqM-XL/2"),
    "an export as int8": case("export", "rope.pt new --dtype int8", "--dtype"),
    # make_moving_shapes.py.
    "shapes in a file": case("shapes", "--out file", "--out file"),
    "shapes among videos": case("shapes", "--out videos", "--out videos", "not Moving Shapes"),
    "shapes that last for ever": case("shapes", "--seconds inf", "--seconds inf"),
    "shapes by the trillion": case("shapes", "--videos-per-class 1000000000000", "--videos-per-class 1000000000000"),
    "shapes of no size": case("shapes", "--radius nan nan", "--radius nan nan"),
    "shapes that are too small": case("shapes", "--size 8", "--size 8"),
    "shapes of an odd size": case("shapes", "--size 63", "--size 63"),
    "shapes of a size in words": case("shapes", "--size big", "--size", "big"),
    "shapes that last no time": case("shapes", "--seconds 0", "--seconds 0"),
    "one shape of each class": case("shapes", "--videos-per-class 1", "--videos-per-class 1"),
    "radii in the wrong order": case("shapes", "--radius 0.2 0.1", "--radius 0.2 0.1"),
    "radii that leave the picture": case("shapes", "--radius 0.1 0.3", "--radius 0.1 0.3"),
    "shapes by an unknown flag": case("shapes", "--sizes 64", "--sizes"),
    "shapes of a color that is none": case("shapes", "--colors mauve", "--colors", "mauve"),
}


class Code:
    """A pickle of it makes a folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with all that the cases name; every test leaves it as it is."""
    root = tmp_path_factory.mktemp("world")
    for name in ("A/a.avi", "A/b.avi", "B/c.avi", "B/d.avi"):
        write_video(root / "videos" / name, 10, size=(16, 16))
    write_video(root / "one/A/a.avi", 10, size=(16, 16))
    for name in ("a", "b"):
        write_video(root / f"long/A/{name * 245}.avi", 10, size=(16, 16))
    (root / "broken").mkdir()
    for name in ("a.avi", "b.mp4"):
        (root / "broken" / name).write_bytes(b"RIFF and no more")
    make_images(root / "images", 4)
    make_vae(root / "vae")
    for folder in ("cache", "partial", "lost", "piped", "empty", "samples"):
        (root / folder).mkdir()
    for folder in ("cache", "partial", "lost"):
        make_latents(root / folder)
    make_samples(root / "samples")
    (root / "partial/latents.json").rename(root / "partial/latents.partial.json")
    text = (root / "lost/latents.json").read_text()
    (root / "lost/latents.json").write_text(text.replace('"ema"', '"vae"'))
    (root / "lost/A/a.safetensors").unlink()
    os.mkfifo(root / "piped/latents.json")
    make_checkpoints(root)
    (root / "file").write_text("")
    os.mkfifo(root / "pipe")
    (root / "loop").symlink_to("loop")
    (root / "nowhere").symlink_to("no/such")
    return root


def make_checkpoints(root):
    rope = save_checkpoint(root / "rope.pt", use_rope=True, num_frames=4)
    save_checkpoint(root / "table.pt", use_rope=True, num_frames=4, position_table="space")
    save_checkpoint(root / "fixed.pt", num_frames=8)
    save_checkpoint(root / "odd.pt", use_rope=True, num_frames=4, depth=2)
    save_checkpoint(root / "image.pt", use_rope=True, num_frames=1, temporal_patch_size=1)
    content = bytearray(rope.read_bytes())
    (root / "cut.pt").write_bytes(content[: len(content) // 2])
    content[len(content) // 2] ^= 1
    (root / "flipped.pt").write_bytes(content)
    (root / "pickle.pt").write_bytes(pickle.dumps(Code()))
    torch.save({"model": Code()}, root / "code.pt")
    torch.save({"state_dict": {}}, root / "other.pt")
    published.write_export(root / "cut-export", checkpoint.load(rope))
    os.truncate(root / "cut-export/model.safetensors", 1000)


def snapshot(folder):
    """What lies in a folder: for each path its kind, size and time of change."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            status = os.lstat(os.path.join(place, name))
            times = () if name in folders else (status.st_size, status.st_mtime_ns)
            found[os.path.join(place, name)] = status.st_mode, *times
    return found


@contextlib.contextmanager
def limited(seconds):
    """End what hangs."""

    def stop(*_):
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(script, flags):
    """What `python script.py flags` does."""
    sys.argv = [script.__file__, *flags]
    try:
        script.main()
    except cli.UserError as error:  # make_moving_shapes.py catches it outside
        cli.fail(error)


def the_line(stderr, script):
    """The only line of stderr but for progress bars, which stands on its own."""
    lines = [line.split("\r")[-1] for line in stderr.splitlines()]
    lines = [line for line in lines if line and "opening videos" not in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"{script}.py: error: ")
    return lines[0]


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_status_2_and_nothing_is_touched(name, world, monkeypatch, capsys):
    bad = CASES[name]
    script, *flags = COMMANDS[bad.command]
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(distributed, "start", lambda: pytest.fail("a device was touched"))
    for variable, value in bad.environment.items():
        monkeypatch.setenv(variable, value) if value else monkeypatch.delenv(variable, raising=False)
    if bad.patch:
        monkeypatch.setitem(*bad.patch)
    before = snapshot(world)
    with limited(30), pytest.raises(SystemExit) as ended:
        run(SCRIPTS[script], [*flags, *bad.flags])
    assert ended.value.code == 2
    line = the_line(capsys.readouterr().err, script)
    assert all(word in line for word in bad.words), line
    assert snapshot(world) == before


@pytest.mark.parametrize("name", ["a checkpoint that runs code", "shapes by the trillion"])
def test_bad_input_is_one_line_in_a_real_process_too(name, world):
    before, (script, *flags) = snapshot(world), COMMANDS[CASES[name].command]
    command = [sys.executable, SCRIPTS[script].__file__, *flags, *CASES[name].flags]
    ended = subprocess.run(command, cwd=world, capture_output=True, text=True, timeout=100)
    line = the_line(ended.stderr, script)
    assert all(word in line for word in CASES[name].words), line
    assert (ended.returncode, ended.stdout) == (2, "")
    assert snapshot(world) == before


SHELL = {  # script -> (environment, arguments, words)
    "nothing to sample": ("sample.sh", {"EXP": "no\nsuch"}, [], ["no results/", "set EXP or CKPT"]),
    "a cache and another VAE": ("train_progressive.sh", {}, ["--vae=none"], ["CACHE=0"]),
    "a cache and another size": ("train_progressive.sh", {}, ["--image-size", "64"], ["CACHE=0"]),
    "a recipe that is none": ("train_progressive.sh", {"RECIPE": "big"}, [], ["RECIPE=big", "expected ours"]),
    "a Python that is none": ("setup.sh", {"PYTHON": "no-such-python"}, [], ["no-such-python"]),
    "an old Python": ("setup.sh", {"PYTHON": "false"}, [], ["older than 3.11"]),
}


@pytest.mark.parametrize("name", SHELL)
def test_a_shell_script_says_what_is_wrong_in_one_line(name, tmp_path):
    script, environment, arguments, words = SHELL[name]
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for file in ("requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / file, tmp_path / file)
    command = ["bash", f"scripts/{script}", *arguments]
    result = subprocess.run(
        command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    assert all(word in lines[-1] for word in words), lines
    assert len(lines) == 1 or "no-such-python" in lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["requirements-dev.txt", "requirements.txt", "scripts"]
