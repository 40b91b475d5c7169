"""torchrun with two ranks on the CPU; what needs no second rank runs in this process.

faults/test_readme.py runs the commands of the README.
"""

import json
from dataclasses import replace
from shlex import split

import numpy as np
import pytest
from PIL import Image

import sample_gd
import train
from training import TORCHRUN, Training, content, on_two_ranks, run_main

VIDEO = split("""
    --model EqM-Ti/4
    --depth 1
    --video
    --use-rope
    --no-flip
    --num-frames 4
    --vae none
    --image-size 16
    --lr 1e-2
    --num-workers 0
    --log-every 1
    --val-clips 4
    --global-batch-size 4
    --sample-every 3
    --num-samples 3
    --num-sampling-steps 3
""")  # the samples are two of a rank and one of the other
SAMPLE = split("--video --window 24 --num-samples 3 --num-sampling-steps 6 --stepsize 0.01")


def previews_of(run):
    """The sheet of the samples after step 3, a row per sample, as integers (H, W, 3)."""
    return np.asarray(Image.open(run.folder / "samples/0000003.png").convert("RGB")).astype(int)


def test_two_ranks_sharded_or_not_learn_and_sample_what_one_does(shapes, tmp_path):
    alone = Training(shapes, tmp_path / "alone", 3, base=VIDEO)
    two = replace(alone, results=tmp_path / "two", launcher=TORCHRUN)
    sharded = replace(alone, results=tmp_path / "sharded")
    run_main(train, *alone.command_flags("--grad-accum", 2))
    two.run()
    on_two_ranks(train, *sharded.command_flags("--shard"))
    samples = previews_of(alone)
    for run in (two, sharded):
        for row, row_alone in zip(run.rows(), alone.rows(), strict=True):
            for key in ("train_loss", "grad_norm", "val_loss"):
                assert row.get(key, 0) == pytest.approx(row_alone.get(key, 0), rel=1e-4)
        assert previews_of(run).shape == samples.shape  # each sample once
        assert abs(previews_of(run) - samples).max() <= 1
    first = samples[:128, -128:]
    second = samples[130:258, -128:]
    assert abs(first - second).max() > 100  # so another order would be noticed


def test_one_checkpoint_samples_16_and_24_frames_and_their_energies(places, tmp_path):
    sampling = [*SAMPLE, "--ckpt", places / "energy.pt", "--report-energy"]
    run_main(sample_gd, *sampling, "--num-frames", 16, 24, "--folder", tmp_path / "both")
    # all of it noise, as without
    start = ["--init", places / "B/b.mp4", "--init-gamma", 0]
    run_main(sample_gd, *sampling, "--num-frames", 16, *start, "--folder", tmp_path / "alone")
    samples = (tmp_path / "alone/samples.npz").read_bytes()
    assert samples == (tmp_path / "both-f16/samples.npz").read_bytes()
    for frames in (16, 24):
        folder = tmp_path / f"both-f{frames}"
        samples = np.load(folder / "samples.npz")
        assert samples["arr_0"].shape == (3, frames, 16, 16, 3)
        assert (folder / "energy.png").stat().st_size > 0
        sample, step, energy = np.loadtxt(folder / "energy.csv", delimiter=",", skiprows=1).T
        assert sample.tolist() == np.repeat(range(3), 6).tolist()
        assert step.tolist() == 3 * list(range(6))
        assert (energy[5::6] < energy[::6]).all()


WINDOWS = """
    --video
    --num-samples 5
    --num-frames 18
    --window 8
    --batch-size 2
    --num-sampling-steps 8
    --stepsize 0.03
    --cfg-scale 2
    --stop-below 0.98
"""


def test_a_sample_folder_has_the_same_bytes_on_any_number_of_ranks(places, tmp_path, capsys):
    given = ["--given", places / "B/b.mp4", "--given-frames", "0-2,9,14-15"]
    sampling = [*split(WINDOWS), *given, "--ckpt", places / "energy.pt"]
    run_main(sample_gd, *sampling, "--folder", tmp_path / "1")
    on_two_ranks(sample_gd, *sampling, "--folder", tmp_path / "2")  # two batches and one
    files = content(tmp_path / "1")
    about = json.loads(files.pop("samples.json"))
    files_of_two = content(tmp_path / "2")
    about_two = json.loads(files_of_two.pop("samples.json"))
    for own in (about, about_two):
        del own["flags"]["folder"]
    assert about_two == about
    assert files_of_two == files
    assert {"000004.mp4", "000004.gif", "evaluations.png"} <= files.keys()
    assert np.load(tmp_path / "1/samples.npz")["arr_0"].std() > 30  # the field did something
    table = tmp_path / "1/evaluations.csv"
    evaluations = np.loadtxt(table, delimiter=",", skiprows=1, usecols=2)
    assert len(evaluations) == 5
    assert len(set(evaluations)) > 1
    assert about["mean_evaluations"] == evaluations.mean()
    assert f"mean {evaluations.mean():.1f} of 28" in capsys.readouterr().out  # in 4 windows
