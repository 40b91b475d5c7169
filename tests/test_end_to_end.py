"""Real processes, as a user starts them: torchrun with two ranks on the CPU, the guide's three phases and its globs.

What does not need a second rank runs in this process.
"""

import csv
import json
import os
import shutil
import subprocess
from glob import glob
from pathlib import Path

import av
import numpy as np
import pytest
import torch

import evaluate
import sample_gd
import train
from test_vae import add_to_weights
from tiny_data import make_images, make_vae
from training import ROOT, TORCHRUN, run_main

TINY = ["--model", "EqM-Ti/4", "--depth", 1, "--use-rope", "--vae", "none", "--image-size", 16, "--lr", 1e-2]
FAST = ["--num-workers", 0, "--log-every", 1, "--val-clips", 4, "--sample-every", 0, "--global-batch-size", 4]


def on_two_ranks(script, *flags, status=0):
    """Start a script by torchrun; it has to end with this status. Returns its (stdout, stderr)."""
    return on_ranks(2, script, *flags, status=status)


def on_ranks(count, script, *flags, status=0):
    torchrun = [*TORCHRUN[:-1], f"--nproc_per_node={count}"]
    command = [str(part) for part in (*torchrun, ROOT / "EqM" / script, *flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout, done.stderr


def one(pattern):
    """What CKPT=$(ls PATTERN) is meant to find: exactly one file."""
    found = glob(str(pattern))
    assert len(found) == 1, (pattern, found)
    return found[0]


def rows_of(pattern):
    return [json.loads(line) for line in Path(one(pattern)).read_text().splitlines()]


def read_csv(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def energies_of(folder):
    rows = read_csv(folder / "energy.csv")
    return {(int(row["sample"]), int(row["step"])): float(row["energy"]) for row in rows}


@pytest.fixture(scope="module")
def phases(shapes, tmp_path_factory):
    """The folder of an experiment of three phases: 4, 8 and 16 frames on two ranks."""
    results = tmp_path_factory.mktemp("results") / "EXP"
    shared = [*TINY, *FAST, "--video", "--no-flip", "--data-path", shapes, "--results-dir", results]
    ckpt = []
    for frames, steps in ((4, 3), (8, 5), (16, 7)):
        on_two_ranks("train.py", *shared, "--num-frames", frames, "--max-steps", steps, *ckpt)
        ckpt = ["--ckpt", one(results / f"*/checkpoints/{steps:07d}.pt")]
    return results


@pytest.fixture(scope="module")
def random(phases):
    """The last checkpoint of the phases as an energy with random EMA weights, so that the field does something."""
    state = torch.load(one(phases / "*f16*/checkpoints/best.pt"), weights_only=True)
    state["config"]["model"]["ebm"] = "dot"
    for weight in state["ema"].values():
        weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    torch.save(state, phases.parent / "random.pt")
    return phases.parent / "random.pt"


def test_three_phases_chain_by_the_globs_of_the_guide(phases):
    names = sorted(path.name for path in phases.glob("[0-9]*"))
    assert names == ["000-EqM-Ti-4-f4-rope", "001-EqM-Ti-4-f8-rope", "002-EqM-Ti-4-f16-rope"]
    for name, first, last in zip(names, (0, 3, 5), (3, 5, 7), strict=True):
        folder = phases / name
        assert {path.name for path in folder.glob("checkpoints/*")} == {f"{last:07d}.pt", "latest.pt", "best.pt"}
        rows = rows_of(folder / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(first + 1, last + 1))  # steps are global
        assert np.isfinite([row["train_loss"] for row in rows]).all()
        assert rows[-1]["val_loss"] > 0
        state = torch.load(folder / "checkpoints/best.pt", weights_only=True)
        assert state["step"] == last
        expected = {"first_step": first, "best_step": last, "skipped": 0, "ema_start": 0}
        assert state["phase"].items() >= (expected | {"position": 4 * (last - first)}).items()
        assert (folder / "config.json").exists() and (folder / "log.txt").exists()


def test_two_ranks_learn_what_one_learns(phases, shapes, tmp_path):
    flags = ["--video", "--no-flip", "--num-frames", 4, "--max-steps", 3, "--grad-accum", 2, "--data-path", shapes]
    run_main(train, *TINY, *FAST, *flags, "--results-dir", tmp_path)
    one_rank, two_ranks = rows_of(tmp_path / "*/metrics.jsonl"), rows_of(phases / "000*/metrics.jsonl")
    for key in ("train_loss", "grad_norm"):
        assert [row[key] for row in one_rank] == pytest.approx([row[key] for row in two_ranks], rel=1e-4)
    assert one_rank[-1]["val_loss"] == pytest.approx(two_ranks[-1]["val_loss"], rel=1e-4)


def test_one_checkpoint_samples_16_and_24_frames_and_reports_their_energies(random, tmp_path):
    sampling = ["--video", "--ckpt", random, "--num-samples", 3, "--num-sampling-steps", 6, "--stepsize", 0.01]
    run_main(sample_gd, *sampling, "--report-energy", "--num-frames", 16, 24, "--folder", tmp_path / "both")
    run_main(sample_gd, *sampling, "--report-energy", "--num-frames", 24, "--folder", tmp_path / "alone")
    assert (tmp_path / "alone/samples.npz").read_bytes() == (tmp_path / "both-f24/samples.npz").read_bytes()
    for frames in (16, 24):
        folder = tmp_path / f"both-f{frames}"
        samples = np.load(folder / "samples.npz")
        assert samples["arr_0"].shape == (3, frames, 16, 16, 3) and samples["arr_0"].dtype == np.uint8
        assert samples["labels"].tolist() == [0, 1, 2]
        with av.open(str(folder / "000002.mp4")) as file:
            assert sum(1 for _ in file.decode(video=0)) == frames
        assert (folder / "sheet.png").exists() and (folder / "energy.png").stat().st_size > 0
        energies = energies_of(folder)
        assert set(energies) == {(sample, step) for sample in range(3) for step in range(6)}
        assert all(energies[sample, 5] < energies[sample, 0] for sample in range(3))


def test_a_sample_folder_with_energies_and_evaluations_has_the_same_bytes_on_any_number_of_ranks(random, tmp_path):
    sampling = ["--video", "--ckpt", random, "--num-samples", 5, "--num-sampling-steps", 40, "--stepsize", 0.01]
    sampling += ["--cfg-scale", 2, "--stop-below", 2.9, "--report-energy", "--batch-size", 2, "--num-frames", 7]
    sampling += ["--model", "EqM-Ti/4", "--use-rope", "--folder"]
    on_ranks(1, "sample_gd.py", *sampling, tmp_path / "1")
    files = {path.name: path.read_bytes() for path in (tmp_path / "1").iterdir()}
    about = json.loads(files.pop("samples.json"))
    assert np.load(tmp_path / "1/samples.npz")["arr_0"].std() > 30  # the field did something
    assert {"000004.mp4", "000004.gif", "samples.npz", "energy.png", "evaluations.png"} <= files.keys()
    for ranks in (2, 3):
        on_ranks(ranks, "sample_gd.py", *sampling, tmp_path / str(ranks))
        found = {path.name: path.read_bytes() for path in (tmp_path / str(ranks)).iterdir()}
        about_found = json.loads(found.pop("samples.json"))
        assert about_found.pop("flags") == about["flags"] | {"folder": str(tmp_path / str(ranks))}
        assert about_found == {name: value for name, value in about.items() if name != "flags"}
        assert found.keys() == files.keys()
        assert [name for name in files if found[name] != files[name]] == []


def test_energies_and_what_each_sample_took_are_alike_in_batches_of_any_size(random, tmp_path, capsys):
    sampling = ["--video", "--ckpt", random, "--num-samples", 3, "--num-sampling-steps", 12, "--stepsize", 0.01]
    sampling += ["--cfg-scale", 2, "--stop-below", 2.9, "--report-energy", "--num-frames", 7]
    reports = []  # of few steps: a field of random weights soon makes a difference in rounding a large one
    for size in (1, 16):
        folder = tmp_path / str(size)
        run_main(sample_gd, *sampling, "--batch-size", size, "--folder", folder)
        rows = read_csv(folder / "evaluations.csv")
        reports.append([int(row["evaluations"]) for row in rows])
        assert [row["sample"] for row in rows] == ["0", "1", "2"]
        mean = sum(reports[-1]) / 3
        assert f"mean {mean:.1f} of 11" in capsys.readouterr().out
        assert json.loads((folder / "samples.json").read_text())["mean_evaluations"] == mean
    assert reports[0] == reports[1]
    assert len(set(reports[0])) > 1
    one, all_at_once = (np.load(tmp_path / size / "samples.npz")["arr_0"].astype(int) for size in ("1", "16"))
    assert one.shape == (3, 7, 16, 16, 3)
    assert abs(one - all_at_once).max() <= 1  # batches of another size may round otherwise: one grey level
    assert energies_of(tmp_path / "1") == pytest.approx(energies_of(tmp_path / "16"), rel=1e-4, abs=1e-3)


def test_a_wrong_flag_is_one_line_from_one_rank_and_nothing_is_written(phases, shapes, tmp_path):
    best = one(phases / "*f16*/checkpoints/best.pt")
    fixed = [flag for flag in TINY if flag != "--use-rope"]
    _, stderr = on_two_ranks(
        "train.py", "--video", *fixed, *FAST, "--num-frames", 16, "--data-path", shapes, "--ckpt", best,
        "--max-steps", 8, "--results-dir", tmp_path / "new", status=1,  # torchrun's own status
    )  # fmt: skip
    (line,) = [line for line in stderr.splitlines() if line.startswith("train.py: error:")]
    assert "--use-rope" in line
    assert "Traceback" not in stderr.split("ChildFailedError")[0].split("torch/distributed/elastic")[0]
    assert not (tmp_path / "new").exists()


def test_two_ranks_train_an_energy_with_dispersion_and_a_vae_from_disk_on_images_and_one_samples_nothing(tmp_path):
    data, vae = make_images(tmp_path / "images", 12, ".webp"), make_vae(tmp_path / "vae")
    on_two_ranks(
        "train.py", *TINY, *FAST, "--ebm", "dot", "--disp", "--data-path", data, "--vae", vae, "--max-steps", 3,
        "--sample-every", 3, "--num-samples", 1, "--num-sampling-steps", 3, "--results-dir", tmp_path / "results",
    )  # fmt: skip
    folder = Path(one(tmp_path / "results/*-EqM-Ti-4-f1-rope"))
    assert all(row["disp_loss"] <= 0 for row in rows_of(folder / "metrics.jsonl"))
    assert (folder / "samples/0000003.png").stat().st_size > 0
    flags = ["--num-samples", 2, "--num-sampling-steps", 3, "--folder", tmp_path / "s"]
    run_main(sample_gd, "--ckpt", folder / "checkpoints/best.pt", *flags)
    assert np.load(tmp_path / "s/samples.npz")["arr_0"].shape == (2, 16, 16, 3)
    assert {"000000.png", "000001.png"} <= {path.name for path in (tmp_path / "s").iterdir()}


def test_a_vae_from_disk_trains_on_5_frames_and_samples_9_and_no_other_takes_its_place(shapes, tmp_path, capsys):
    flags = ["--video", "--vae", make_vae(tmp_path / "vae"), "--num-frames", 5, "--max-steps", 1, "--sample-every", 1]
    flags += ["--num-samples", 1, "--num-sampling-steps", 3, "--data-path", shapes, "--results-dir", tmp_path / "r"]
    run_main(train, *TINY, *FAST, *flags)
    assert Path(one(tmp_path / "r/*/samples/0000001.png")).stat().st_size > 0
    flags = ["--num-samples", 1, "--num-sampling-steps", 3, "--num-frames", 9, "--folder", tmp_path / "s"]
    best = one(tmp_path / "r/*/checkpoints/best.pt")
    run_main(sample_gd, "--video", "--ckpt", best, *flags)
    assert np.load(tmp_path / "s/samples.npz")["arr_0"].shape == (1, 9, 16, 16, 3)

    add_to_weights(tmp_path / "vae", 0.1)  # another VAE in its place
    capsys.readouterr()
    run_main(sample_gd, "--video", "--ckpt", best, *flags, status=2)
    assert "another VAE: its weights have SHA-256" in capsys.readouterr().err
    again = ["--data-path", shapes, "--ckpt", best, "--vae", tmp_path / "vae", "--max-steps", 2, "--num-frames", 5]
    run_main(train, *TINY, *FAST, "--video", *again, status=2)
    assert "another VAE" in capsys.readouterr().err


def test_the_tracker_scores_a_sample_folder_beside_real_clips(phases, shapes, tmp_path):
    best = one(phases / "*f16*/checkpoints/best.pt")
    flags = ["--num-samples", 2, "--num-sampling-steps", 3, "--num-frames", 8, "--folder", tmp_path / "s"]
    run_main(sample_gd, "--video", "--ckpt", best, *flags)
    flags = ["--metric", "motion", "--samples", tmp_path / "s", "--data-path", shapes, "--num-real", 12]
    run_main(evaluate, *flags, "--num-workers", 0, "--out", tmp_path / "motion.json")
    result = json.loads((tmp_path / "motion.json").read_text())["result"]
    assert result["real"]["direction_accuracy"] == 1
    assert result["generated"]["direction_accuracy"] == 0  # a few training steps teach nothing


def test_a_broken_video_is_named_once_and_counted_and_too_many_end_the_run(shapes, tmp_path, capsys):
    data = shutil.copytree(shapes, tmp_path / "data")
    videos = sorted(data.glob("*/*.avi"))
    videos[0].write_bytes(b"no video at all")
    flags = [*TINY, *FAST, "--video", "--num-frames", 4, "--data-path", data, "--max-steps", 3, "--results-dir"]
    run_main(train, *flags, tmp_path / "one")
    assert capsys.readouterr().out.count(videos[0].name) == 1
    assert Path(one(tmp_path / "one/*/log.txt")).read_text().count(videos[0].name) == 1
    assert rows_of(tmp_path / "one/*/metrics.jsonl")[-1]["bad_videos"] == 1

    videos[5].write_bytes(b"nor this one")
    run_main(train, *flags, tmp_path / "two", "--max-bad-fraction", 0.05, status=1)
    stderr = capsys.readouterr().err
    (line,) = [line for line in stderr.splitlines() if line.startswith("train.py: error:")]
    assert "--max-bad-fraction" in line
    assert "Traceback" not in stderr
    run_main(train, *flags, tmp_path / "three", "--max-bad-fraction", 0.2)


def test_init_gamma_0_equals_no_init_and_init_gamma_1_keeps_the_clip(phases, shapes, tmp_path, capsys):
    video = one(shapes / "CircleDown/*g01_c01.avi")
    sampling = ["--video", "--ckpt", one(phases / "*f16*/checkpoints/best.pt"), "--num-samples", 2]
    sampling += ["--num-frames", 5, "--num-sampling-steps", 3, "--stepsize", 1e-9]
    starts = {"none": [], "noise": ["--init", video, "--init-gamma", 0], "kept": ["--init", video, "--init-gamma", 1]}
    made = {}
    for name, flags in starts.items():
        run_main(sample_gd, *sampling, *flags, "--folder", tmp_path / name)
        made[name] = np.load(tmp_path / name / "samples.npz")["arr_0"]
    assert np.array_equal(made["none"], made["noise"])
    with av.open(video) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)][:5]
    assert np.abs(made["kept"] - np.stack(frames).astype(int)).max() <= 2  # decoders may round otherwise
    assert not np.array_equal(made["kept"], made["none"])
