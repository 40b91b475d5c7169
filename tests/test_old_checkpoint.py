"""A checkpoint of format 1, written by earlier code, loads, resumes and samples.

data/format1.pt is of a run of 6 steps (FLAGS) on four videos, stopped after step 4. What the earlier code logged at
step 6, when it was not stopped, is in EXPECTED.
"""

import copy
import shutil
from pathlib import Path

import av
import numpy as np
import pytest

import checkpoint
import sample_gd
import train
from runtime.metrics import read_metrics
from training import differences, run_main

OLD = Path(__file__).parent / "data/format1.pt"
FLAGS = ["--video", "--model", "EqM-Ti/2", "--depth", 1, "--hidden-size", 12, "--num-heads", 1, "--use-rope"]
FLAGS += ["--temporal-patch-size", 1, "--num-frames", 4, "--vae", "none", "--image-size", 8, "--global-batch-size", 4]
FLAGS += ["--num-workers", 0, "--lr", 1e-3, "--log-every", 3, "--sample-every", 0, "--num-samples", 1]
EXPECTED = {"train_loss": 15.455625216166178, "grad_norm": 1.9651103019714355, "val_loss": 14.827279806137085,
            "val_loss_raw": 14.814871072769165, "flops": 33364224.0}  # fmt: skip


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Four videos of 10 grey frames, 16 x 16 px, which become lighter."""
    root = tmp_path_factory.mktemp("videos")
    for name in ("A/a.avi", "A/b.avi", "B/c.avi", "B/d.avi"):
        (root / name).parent.mkdir(exist_ok=True)
        with av.open(str(root / name), "w") as file:
            stream = file.add_stream("mpeg4", rate=25)
            stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
            for grey in range(0, 200, 20):
                pixels = np.full((16, 16, 3), grey, np.uint8)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            file.mux(stream.encode())
    return root


def test_it_loads():
    model, config, step = checkpoint.load_model(OLD, use_rope=True, num_classes=2)
    assert (step, model.config.hidden_size, config["training"]["num_frames"]) == (4, 12, 4)
    assert (model.config.position_table, model.config.rope_speed) == ("none", 0)  # the file has no word of them


def test_it_resumes_as_the_code_that_wrote_it_did(videos, tmp_path):
    folder = tmp_path / "000-EqM-Ti-2-f4-rope"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "samples").mkdir()
    shutil.copy(OLD, folder / "checkpoints/latest.pt")
    run_main(train, *FLAGS, "--data-path", videos, "--results-dir", tmp_path, "--max-steps", 6, "--resume")
    ((row,), _) = read_metrics(folder / "metrics.jsonl")
    assert row["step"] == 6
    assert row["train_loss_rel"] == pytest.approx(1, abs=0.1)
    # Means of steps 4 to 6, of which the file has the first
    assert {name: row[name] for name in EXPECTED} == pytest.approx(EXPECTED, rel=1e-3)


def test_the_mean_square_of_its_clips_becomes_the_expected_loss_of_zero(tmp_path):
    state = checkpoint.load(OLD)
    (loss, mean_square, norm), before = state["run"]["window"]["rows"][0].tolist(), copy.deepcopy(state["run"])
    start = checkpoint.Start(None, tmp_path / "checkpoints/latest.pt", state=state, folder=tmp_path)
    assert start.unlogged["names"] == ["train_loss", "target_square", "grad_norm"]
    assert start.unlogged["rows"][0].tolist() == pytest.approx([loss, 13.867 * (1 + mean_square), norm], rel=1e-4)
    assert differences(state["run"], before) == []


def test_it_starts_a_new_phase(videos, tmp_path):
    shared = ["--data-path", videos, "--results-dir", tmp_path]
    run_main(train, *FLAGS, *shared, "--num-frames", 6, "--max-steps", 5, "--ckpt", OLD)
    state = checkpoint.load(tmp_path / "000-EqM-Ti-2-f6-rope/checkpoints/0000005.pt")
    assert (state["step"], state["phase"]["first_step"]) == (5, 4)
    assert state["optimizer"]["states"][0]["state"][0]["step"] == 5  # AdamW's state was loaded


def test_it_samples(tmp_path):
    flags = ["--video", "--ckpt", OLD, "--num-frames", 7, "--num-samples", 2, "--num-sampling-steps", 3]
    run_main(sample_gd, *flags, "--folder", tmp_path)
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (2, 7, 8, 8, 3)
