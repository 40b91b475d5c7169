"""A run that the tree before (commit f311e33) has started resumes as that tree itself continues it.

data/before.pt is of a run of 6 steps (FLAGS) on four videos, stopped after step 4.
data/before-end.pt holds what the tree before made of it: weights and moments after step 6, the last
metrics, and the machine that computed them."""

import shutil
from pathlib import Path
from shlex import split

import av
import numpy as np
import pytest
import torch

import checkpoint
import sample_gd
import train
from runtime.metrics import read_metrics
from training import error_of, run_main
from video.writers import encode

BEFORE = Path(__file__).parent / "data/before.pt"
END = BEFORE.with_name("before-end.pt")
FLAGS = split("""
    --video
    --model EqM-Ti/2
    --depth 1
    --hidden-size 6
    --num-heads 1
    --use-rope
    --temporal-patch-size 1
    --num-frames 4
    --vae none
    --image-size 8
    --global-batch-size 4
    --num-workers 0
    --lr 1e-3
    --forcing 0.5
    --log-every 3
    --sample-every 0
""")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Four videos of 10 gray frames, 16 x 16 px, which become lighter."""
    root = tmp_path_factory.mktemp("videos")
    frames = [np.full((16, 16, 3), gray, np.uint8) for gray in range(0, 200, 20)]
    for name in ("A/a.avi", "A/b.avi", "B/c.avi", "B/d.avi"):
        (root / name).parent.mkdir(exist_ok=True)
        with av.open(str(root / name), "w") as file:
            encode(file, frames, 25, codec="mpeg4", pixel_format="yuv420p")
    return root


def machine():
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line for line in lines if "model name" in line), "")
    return (
        f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {av.__version__}, {cpu}"
    )


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def weights_and_moments(state):
    """All weights, averaged weights and moments of a checkpoint, each kind as one vector."""
    moments = state["optimizer"]["states"][0]["state"].values()
    return {
        "model": flat(state["model"].values()),
        "ema": flat(state["ema"].values()),
        "exp_avg": flat(moment["exp_avg"] for moment in moments),
        "exp_avg_sq": flat(moment["exp_avg_sq"] for moment in moments),
    }


def test_it_resumes_bit_for_bit_as_the_tree_before_continues_it(videos, tmp_path):
    folder = tmp_path / "000-EqM-Ti-2-f4-rope"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "samples").mkdir()
    shutil.copy(BEFORE, folder / "checkpoints/latest.pt")
    places = ["--data-path", videos, "--results-dir", tmp_path]
    run_main(train, *FLAGS, *places, "--max-steps", 6, "--resume")
    end = torch.load(END, weights_only=True)
    is_exact = end["machine"] == machine()  # others round otherwise
    weights = weights_and_moments(checkpoint.load(folder / "checkpoints/0000006.pt"))
    rtol = 0 if is_exact else 1e-3
    torch.testing.assert_close(weights, end["weights"], rtol=rtol, atol=rtol / 10)
    note, row = read_metrics(folder / "metrics.jsonl", notes=True)[0]
    assert note["note"] == f"resumed with other flags: data_path videos -> {videos}"
    # Means of steps 4 to 6, of which the file has the first
    expected = pytest.approx(end["row"], rel=rtol, abs=0)
    assert {name: row[name] for name in end["row"]} == expected


def test_it_starts_a_new_phase_and_samples(videos, tmp_path):
    places = ["--data-path", videos, "--results-dir", tmp_path, "--ckpt", BEFORE]
    run_main(train, *FLAGS, *places, "--num-frames", 6, "--max-steps", 5)
    state = checkpoint.load(tmp_path / "000-EqM-Ti-2-f6-rope/checkpoints/0000005.pt")
    assert state["step"] == 5
    assert state["phase"]["first_step"] == 4
    assert state["optimizer"]["states"][0]["state"][0]["step"] == 5  # AdamW's state was loaded
    sampling = split("--video --num-frames 7 --num-samples 2 --num-sampling-steps 3")
    run_main(sample_gd, *sampling, "--ckpt", BEFORE, "--folder", tmp_path)
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (2, 7, 8, 8, 3)


def without(folder, part, name):
    """A copy of the checkpoint that lacks a setting."""
    state = torch.load(BEFORE, weights_only=True)
    del state["config"][part][name]
    torch.save(state, folder / "older.pt")
    return folder / "older.pt"


def test_a_setting_that_an_older_file_lacks_has_its_default(tmp_path):
    model, _, _ = checkpoint.load_model(without(tmp_path, "model", "rope_speed"))
    assert model.config.rope_speed == 0


def test_a_file_that_is_too_old_is_one_line_that_names_the_commit_that_reads_it(tmp_path):
    path = without(tmp_path, "data", "longest_time_scale")
    line = error_of(checkpoint.load, path)
    assert line == f"--ckpt {path}: lacks settings; commit f311e33 reads older files"
