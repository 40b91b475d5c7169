"""Real processes, as a user starts them: torchrun with two ranks on the CPU, the guide's three phases and its globs."""

import csv
import json
import os
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from tiny_data import make_images, make_vae

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
TINY = ["--model", "EqM-Ti/4", "--use-rope", "--vae", "none", "--image-size", "16"]
FAST = ["--num-workers", "0", "--log-every", "1", "--val-clips", "4", "--sample-every", "0", "--global-batch-size", "4"]


def launch(*command, status=0, environment=None):
    """Run a command that is to end with `status`; returns its (stdout, stderr)."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout, done.stderr


def one(pattern):
    """What CKPT=$(ls PATTERN) is meant to find: exactly one file."""
    found = glob(str(pattern))
    assert len(found) == 1, (pattern, found)
    return found[0]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "moving-shapes"
    launch(sys.executable, ROOT / "datasets/make_moving_shapes.py", "--out", out, "--videos-per-class", 2)
    return out


@pytest.fixture(scope="module")
def phases(shapes, tmp_path_factory):
    """The folder of an experiment of three phases: 4, 8 and 16 frames on two ranks."""
    results = tmp_path_factory.mktemp("results") / "EXP"
    shared = [*TINY, *FAST, "--video", "--no-flip", "--data-path", shapes, "--results-dir", results]
    ckpt = []
    for frames, steps in ((4, 2), (8, 4), (16, 6)):
        launch(*TORCHRUN, ROOT / "EqM/train.py", *shared, "--num-frames", frames, "--max-steps", steps, *ckpt)
        ckpt = ["--ckpt", one(results / f"*/checkpoints/{steps:07d}.pt")]
    return results


def test_three_phases_chain_by_the_globs_of_the_guide(phases):
    names = sorted(path.name for path in phases.iterdir())
    assert names == ["000-EqM-Ti-4-f4-rope", "001-EqM-Ti-4-f8-rope", "002-EqM-Ti-4-f16-rope"]
    for folder, step in zip(sorted(phases.iterdir()), (2, 4, 6), strict=True):
        files = {path.name for path in (folder / "checkpoints").iterdir()}
        assert files == {f"{step:07d}.pt", "latest.pt", "best.pt"}
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [step - 1, step]  # steps are global
        assert np.isfinite([row["train_loss"] for row in rows]).all()
        assert rows[-1]["val_loss"] > 0
        state = torch.load(folder / "checkpoints/best.pt", weights_only=True)
        assert state["step"] == step
        expected = {"first_step": step - 2, "position": 2 * 4, "best_step": step, "skipped": 0, "pretrained": False}
        assert state["phase"].items() >= expected.items()
        assert (folder / "config.json").exists()
        assert (folder / "log.txt").exists()


def test_one_checkpoint_samples_16_and_7_and_24_frames_alike_on_any_number_of_ranks(phases, tmp_path):
    best = tmp_path / "random.pt"
    state = torch.load(one(phases / "*f16*/checkpoints/best.pt"), weights_only=True)
    for weight in state["ema"].values():
        weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    torch.save(state, best)
    sampling = ["--video", "--ckpt", best, "--num-samples", 3, "--num-sampling-steps", 4, "--cfg-scale", 2]
    for frames in (16, 7, 24):
        folder = tmp_path / str(frames)
        launch(sys.executable, ROOT / "EqM/sample_gd.py", *sampling, "--num-frames", frames, "--folder", folder)
        samples = np.load(folder / "samples.npz")
        assert samples["arr_0"].shape == (3, frames, 16, 16, 3)
        assert samples["arr_0"].dtype == np.uint8
        assert samples["labels"].tolist() == [0, 1, 2]
        with av.open(str(folder / "000002.mp4")) as file:
            assert sum(1 for _ in file.decode(video=0)) == frames
        assert (folder / "sheet.png").exists()
    guide = ["--model", "EqM-Ti/4", "--use-rope", "--num-frames", 7, "--batch-size", 1, "--folder", tmp_path / "ranks"]
    launch(*TORCHRUN, ROOT / "EqM/sample_gd.py", *sampling, *guide)
    alone, shared = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("7", "ranks"))
    assert alone.std() > 30  # the field did something
    # Batches of another size may round otherwise: one grey level.
    assert abs(alone.astype(int) - shared.astype(int)).max() <= 1


def test_a_wrong_flag_is_one_line_from_one_rank_and_nothing_is_written(phases, shapes, tmp_path):
    best = one(phases / "*f16*/checkpoints/best.pt")
    fixed = [flag for flag in TINY if flag != "--use-rope"]
    _, stderr = launch(
        *TORCHRUN, ROOT / "EqM/train.py", "--video", *fixed, *FAST, "--num-frames", 16, "--data-path", shapes,
        "--ckpt", best, "--max-steps", 8, "--results-dir", tmp_path / "new", status=1,  # torchrun's own status
    )  # fmt: skip
    lines = [line for line in stderr.splitlines() if line.startswith("train.py: error:")]
    assert len(lines) == 1, stderr
    assert "--use-rope" in lines[0]
    assert "Traceback" not in stderr.split("ChildFailedError")[0].split("torch/distributed/elastic")[0]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_gives_the_same_weights_as_never_stopping(shapes, tmp_path, optimizer):
    shared = [
        sys.executable, ROOT / "EqM/train.py", "--video", *TINY, *FAST, "--num-frames", 4, "--data-path", shapes,
        "--optimizer", optimizer, "--val-every", 1, "--lr", 1e-2,
    ]  # fmt: skip
    launch(*shared, "--results-dir", tmp_path / "whole", "--max-steps", 4)
    launch(*shared, "--results-dir", tmp_path / "parts", "--max-steps", 2, "--resume")
    restarted = {"TORCHELASTIC_RESTART_COUNT": "1"}  # what torchrun --max-restarts sets
    launch(*shared, "--results-dir", tmp_path / "parts", "--max-steps", 4, environment=restarted)
    whole, parts = (
        torch.load(one(tmp_path / name / "*/checkpoints/0000004.pt"), weights_only=True) for name in ("whole", "parts")
    )
    for part in ("model", "ema"):
        assert all(torch.equal(whole[part][name], parts[part][name]) for name in whole[part])
    assert whole["best_loss"] == parts["best_loss"]
    rows = [json.loads(line) for line in Path(one(tmp_path / "parts/*/metrics.jsonl")).read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    stdout, _ = launch(*shared, "--results-dir", tmp_path / "parts", "--max-steps", 4, "--resume")
    assert "is finished" in stdout
    assert len(list((tmp_path / "parts").iterdir())) == 1


def test_a_vae_from_disk_trains_and_samples_on_two_ranks_of_which_one_has_nothing_to_sample(shapes, tmp_path):
    make_vae(tmp_path / "vae")
    launch(
        *TORCHRUN, ROOT / "EqM/train.py", "--video", *TINY, *FAST, "--vae", tmp_path / "vae", "--num-frames", 5,
        "--data-path", shapes, "--max-steps", 2, "--sample-every", 2, "--num-samples", 1, "--num-sampling-steps", 3,
        "--results-dir", tmp_path / "results",
    )  # fmt: skip
    assert Path(one(tmp_path / "results/*/samples/0000002.png")).stat().st_size > 0
    best = one(tmp_path / "results/*/checkpoints/best.pt")
    flags = ["--num-samples", 1, "--num-sampling-steps", 3, "--num-frames", 9, "--folder", tmp_path / "s"]
    launch(*TORCHRUN, ROOT / "EqM/sample_gd.py", "--video", "--ckpt", best, *flags)
    assert np.load(tmp_path / "s" / "samples.npz")["arr_0"].shape == (1, 9, 16, 16, 3)


def test_two_ranks_learn_what_one_learns(shapes, tmp_path):
    steps = ["--max-steps", 3, "--lr", 1e-2, "--num-workers", 1]
    shared = ["--video", *TINY, *FAST, "--num-frames", 5, "--data-path", shapes, *steps]
    launch(sys.executable, ROOT / "EqM/train.py", *shared, "--results-dir", tmp_path / "one", "--grad-accum", 2)
    launch(*TORCHRUN, ROOT / "EqM/train.py", *shared, "--results-dir", tmp_path / "two")
    one_rank, two_ranks = (
        [json.loads(line) for line in Path(one(tmp_path / name / "*/metrics.jsonl")).read_text().splitlines()]
        for name in ("one", "two")
    )
    for key in ("train_loss", "grad_norm"):
        assert [row[key] for row in one_rank] == pytest.approx([row[key] for row in two_ranks], rel=1e-4)
    assert one_rank[-1]["val_loss"] == pytest.approx(two_ranks[-1]["val_loss"], rel=1e-4)


def test_the_tracker_scores_a_sample_folder_beside_real_clips(phases, shapes, tmp_path):
    best = one(phases / "*f16*/checkpoints/best.pt")
    flags = ["--num-samples", 2, "--num-sampling-steps", 3, "--num-frames", 8, "--folder", tmp_path / "s"]
    launch(sys.executable, ROOT / "EqM/sample_gd.py", "--video", "--ckpt", best, *flags)
    launch(
        sys.executable, ROOT / "EqM/evaluate.py", "--metric", "motion", "--samples", tmp_path / "s",
        "--data-path", shapes, "--num-real", 12, "--out", tmp_path / "motion.json",
    )  # fmt: skip
    result = json.loads((tmp_path / "motion.json").read_text())["result"]
    assert result["real"]["direction_accuracy"] == 1
    assert result["generated"]["direction_accuracy"] == 0  # two training steps teach nothing


def test_a_broken_video_is_named_once_and_counted_and_too_many_end_the_run(shapes, tmp_path):
    data = shutil.copytree(shapes, tmp_path / "data")
    videos = sorted(data.glob("*/*.avi"))
    videos[0].write_bytes(b"no video at all")
    train = [
        sys.executable, ROOT / "EqM/train.py", "--video", *TINY, *FAST, "--num-frames", 4, "--data-path", data,
        "--max-steps", 3, "--results-dir",
    ]  # fmt: skip
    stdout, _ = launch(*train, tmp_path / "one")
    assert stdout.count(videos[0].name) == 1
    folder = Path(one(tmp_path / "one/*"))
    assert (folder / "log.txt").read_text().count(videos[0].name) == 1
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["bad_videos"] == 1

    videos[5].write_bytes(b"nor this one")
    _, stderr = launch(*train, tmp_path / "two", status=1)
    lines = [line for line in stderr.splitlines() if line.startswith("train.py: error:")]
    assert len(lines) == 1
    assert "--max-bad-fraction" in lines[0]
    assert "Traceback" not in stderr
    launch(*train, tmp_path / "three", "--max-bad-fraction", 0.2)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images") / "data", 12, ".webp")


def test_two_ranks_train_an_energy_with_dispersion_on_images_and_an_export_samples_as_its_checkpoint(images, tmp_path):
    launch(
        *TORCHRUN, ROOT / "EqM/train.py", *TINY, *FAST, "--ebm", "dot", "--disp", "--data-path", images,
        "--max-steps", 3, "--lr", 1e-2, "--results-dir", tmp_path / "results",
    )  # fmt: skip
    rows = [json.loads(line) for line in Path(one(tmp_path / "results/*/metrics.jsonl")).read_text().splitlines()]
    assert all(row["disp_loss"] <= 0 for row in rows)
    best = one(tmp_path / "results/*-EqM-Ti-4-f1-rope/checkpoints/best.pt")
    launch(sys.executable, ROOT / "scripts/export.py", best, tmp_path / "shared")
    sampling = ["--num-samples", 5, "--num-sampling-steps", 6, "--stepsize", 0.01, "--sampler", "ngd"]
    sampling += ["--report-energy"]
    for ckpt, folder in ((best, "a"), (tmp_path / "shared", "b")):
        launch(sys.executable, ROOT / "EqM/sample_gd.py", "--ckpt", ckpt, *sampling, "--folder", tmp_path / folder)
    for name in ("samples.npz", "energy.csv", *(f"{number:06d}.png" for number in range(5))):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert np.load(tmp_path / "a/samples.npz")["arr_0"].shape == (5, 16, 16, 3)
    with open(tmp_path / "a/energy.csv") as file:
        energies = {(int(row["sample"]), int(row["step"])): float(row["energy"]) for row in csv.DictReader(file)}
    assert set(energies) == {(sample, step) for sample in range(5) for step in range(6)}
    assert all(energies[sample, 5] < energies[sample, 0] for sample in range(5))
    assert (tmp_path / "a/energy.png").stat().st_size > 0
    launch(
        *TORCHRUN, ROOT / "EqM/sample_gd.py", "--ckpt", best, *sampling, "--folder", tmp_path / "c", "--batch-size", 2
    )
    with open(tmp_path / "c/energy.csv") as file:
        shared = [float(row["energy"]) for row in csv.DictReader(file)]
    assert shared == pytest.approx(list(energies.values()), rel=1e-4, abs=1e-3)


def test_adaptive_sampling_reports_what_each_sample_took_on_any_number_of_ranks(phases, tmp_path):
    random = tmp_path / "random.pt"
    state = torch.load(one(phases / "*f16*/checkpoints/best.pt"), weights_only=True)
    for weight in state["ema"].values():
        weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    torch.save(state, random)
    sampling = ["--video", "--ckpt", random, "--num-frames", 6, "--num-samples", 4, "--num-sampling-steps", 40]
    sampling += ["--stepsize", 0.05, "--cfg-scale", 1]
    reports = []
    for command, folder in (([sys.executable], "alone"), (TORCHRUN, "ranks")):
        stdout, _ = launch(
            *command, ROOT / "EqM/sample_gd.py", *sampling, "--stop-below", 1.96, "--folder", tmp_path / folder
        )
        with open(tmp_path / folder / "evaluations.csv") as file:
            rows = list(csv.DictReader(file))
        reports.append([int(row["evaluations"]) for row in rows])
        assert [row["sample"] for row in rows] == ["0", "1", "2", "3"]
        mean = sum(reports[-1]) / 4
        assert f"mean {mean:.1f} of 39" in stdout
        assert json.loads((tmp_path / folder / "samples.json").read_text())["mean_evaluations"] == mean
        assert (tmp_path / folder / "evaluations.png").stat().st_size > 0
    assert reports[0] == reports[1]
    assert len(set(reports[0])) > 1


def test_init_gamma_0_equals_no_init_and_init_gamma_1_keeps_the_clip(phases, shapes, tmp_path):
    best = one(phases / "*f16*/checkpoints/best.pt")
    launch(
        sys.executable, ROOT / "datasets/make_moving_shapes.py", "--out", tmp_path / "small", "--size", 16,
        "--videos-per-class", 2,
    )  # fmt: skip
    video = one(tmp_path / "small/CircleDown/*g01_c01.avi")
    sampling = [sys.executable, ROOT / "EqM/sample_gd.py", "--video", "--ckpt", best, "--num-samples", 2]
    sampling += ["--num-frames", 5, "--num-sampling-steps", 3, "--stepsize", 1e-9]
    starts = {"none": [], "noise": ["--init", video, "--init-gamma", 0], "kept": ["--init", video, "--init-gamma", 1]}
    made = {}
    for name, flags in starts.items():
        launch(*sampling, *flags, "--folder", tmp_path / name)
        made[name] = np.load(tmp_path / name / "samples.npz")["arr_0"]
    assert np.array_equal(made["none"], made["noise"])
    with av.open(video) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)][:5]
    assert np.abs(made["kept"] - np.stack(frames).astype(int)).max() <= 2  # decoders may round otherwise
    assert not np.array_equal(made["kept"], made["none"])
    large = one(shapes / "CircleDown/*g01_c01.avi")
    _, stderr = launch(*sampling, "--init", large, "--folder", tmp_path / "x", status=2)
    assert "64 x 64 px, wanted 16 x 16" in stderr
    assert not (tmp_path / "x").exists()


def test_the_progressive_script_encodes_the_videos_once_and_trains_three_phases_from_that(shapes, tmp_path):
    for folder in ("EqM", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    make_vae(tmp_path / "vae")
    settings = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DATA": shapes, "LATENTS": "latents", "VAE": "vae", "IMAGE_SIZE": 16, "GPUS": 1, "MODEL": "EqM-Ti/4",
        "EXP": "E", "STEPS_1": 1, "STEPS_2": 2, "STEPS_3": 3, "BATCH_1": 4, "BATCH_2": 4, "BATCH_3": 4,
    }  # fmt: skip
    environment = {name: str(value) for name, value in settings.items()}
    command = ["bash", tmp_path / "scripts/train_progressive.sh", *FAST[:-2], "--depth", 1]
    launch(*command, environment=environment)
    for frames, step in ((4, 1), (8, 2), (16, 3)):
        state = torch.load(one(tmp_path / f"results/E/*-f{frames}-rope/checkpoints/{step:07d}.pt"), weights_only=True)
        assert state["config"]["training"]["data_path"] == "latents"
        assert state["config"]["training"]["no_flip"] is False  # the cache has mirrored latents
    stdout, _ = launch(*command, environment=environment)
    assert (stdout.count("is complete"), stdout.count("is finished")) == (1, 3)
    _, stderr = launch(*command, "--vae", "none", environment=environment, status=2)
    assert "CACHE=0" in stderr
