"""The shell scripts of whole runs, in real processes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from tiny_data import make_vae
from training import ROOT


def test_the_progressive_script_encodes_the_videos_once_and_trains_three_phases_from_that(shapes, tmp_path):
    for folder in ("EqM", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    make_vae(tmp_path / "vae")
    settings = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DATA": shapes, "LATENTS": "latents", "VAE": "vae", "IMAGE_SIZE": 16, "GPUS": 1, "MODEL": "EqM-Ti/4",
        "EXP": "E", "STEPS_1": 1, "STEPS_2": 2, "STEPS_3": 3, "BATCH_1": 4, "BATCH_2": 4, "BATCH_3": 4,
    }  # fmt: skip
    environment = os.environ | {name: str(value) for name, value in settings.items()} | {"OMP_NUM_THREADS": "1"}
    flags = ["--num-workers", "0", "--log-every", "1", "--val-clips", "4", "--sample-every", "0", "--depth", "1"]

    def run(*more, status=0):
        command = ["bash", str(tmp_path / "scripts/train_progressive.sh"), *flags, *more]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
        assert done.returncode == status, done.stdout + done.stderr
        return done

    run()
    for frames, step in ((4, 1), (8, 2), (16, 3)):
        (path,) = tmp_path.glob(f"results/E/*-f{frames}-rope/checkpoints/{step:07d}.pt")
        training = torch.load(path, weights_only=True)["config"]["training"]
        assert training["data_path"] == "latents"
        assert training["no_flip"] is False  # the cache has mirrored latents
    printed = run().stdout
    assert (printed.count("is complete"), printed.count("is finished")) == (1, 3)
    assert "CACHE=0" in run("--vae", "none", status=2).stderr
