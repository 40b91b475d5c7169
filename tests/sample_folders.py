"""Sample folders of real clips, as sample_gd.py would write them, and evaluate.py in this
process.
"""

import json
from pathlib import Path

import torch

import evaluate
import training
from runtime.untrusted import read_json
from tiny_data import write_npz
from training import run_main
from video.clips import Clips
from video.index import split_videos
from video.source import open_source

SIZE = 16
FRAMES = 8
SOURCE = {
    "temporal_patch_size": 4,
    "guidance": 1.0,
    "guidance_chosen": True,
    "keep_background": False,
    "weights_sha256": "a",
}
FEW = ["--num-workers", 0, "--resamples", 4]


def read_clips(root, split, count, frames=FRAMES, stream="real", interval=1):
    """(clips uint8 (N, T, H, W, 3), labels, classes) of a data set, read without sources.py."""
    source = open_source(root, SIZE)
    videos = source.videos()
    if split != "all":
        videos = split_videos(root, videos, 0.05)[split == "val"]
    clips = Clips(source, videos, frames, (interval, interval), flip=False, stream=stream)
    items = [clips[index] for index in range(count)]
    pixels = torch.stack([item["clip"].permute(1, 2, 3, 0) for item in items]).numpy()
    return pixels, [item["y"] for item in items], source.scan.classes


def write_samples(folder, clips, labels, classes, time_scale=1 / 25, **about):
    """A folder with the samples.npz and samples.json of these clips. Returns the folder."""
    folder.mkdir(parents=True)
    write_npz(folder / "samples.npz", clips, labels)
    about = {"classes": classes, "time_scale": time_scale, "source": SOURCE, "flags": {}} | about
    (folder / "samples.json").write_text(json.dumps(about))
    return folder


def run(out, *flags, status=0):
    """The manifest that evaluate.py writes for these flags."""
    run_main(evaluate, *FEW, "--out", out, *flags, status=status)
    return read_json(out) if Path(out).is_file() else None


def refused(capsys, out, *flags, words=(), status=2):
    """evaluate.py ends with one line that holds the words."""
    line = training.refused(capsys, evaluate, *FEW, "--out", out, *flags, status=status)
    assert all(word in line for word in words), line
