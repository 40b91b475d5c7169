"""The shell scripts of whole runs, in real processes: what they run, and how they handle
signals.
"""

import os
import re
import shutil
import signal
from shlex import split

import pytest
import torch

from process import PATH, descendants, end, free_port, spawn, wait_gone, wait_until, write_commands
from tiny_data import make_vae
from training import ROOT, Training


def start_script(name, tree, settings, *flags):
    environment = {key: str(value) for key, value in settings.items()}
    return spawn("bash", tree / "scripts" / name, *flags, environment=environment)


@pytest.fixture
def tree(tmp_path):
    """A copy of the scripts and the code that they run; results stay in it."""
    for folder in ("EqM", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    return tmp_path


PHASES = {"PATH": PATH, "EXP": "E"}
FLAGS = split("""
    --model EqM-Ti/4
    --depth 1
    --vae none
    --image-size 16
    --num-workers 0
    --log-every 1
    --val-clips 4
""")


def test_train_progressive_saves_on_a_signal_and_continues(shapes, tree):
    settings = PHASES | {
        "DATA": shapes,
        "GPUS": 2,
        "CACHE": 0,
        "SCHEDULE": "4:4:4 8:2000:4 16:2001:4",
    }
    process = start_script("train_progressive.sh", tree, settings, *FLAGS)
    runs = Training(shapes, tree / "results/E", None)
    wait_until(lambda: runs.last_step() > 4, process)
    left = descendants(process.pid)
    process.send_signal(signal.SIGUSR1)
    output = end(process, 143)
    assert "and saved at step" in output
    assert output.rstrip().endswith("to continue, run the same command again")
    wait_gone(left)
    step = runs.last_step()
    settings["SCHEDULE"] = f"4:4:4 8:{step + 1}:4 16:{step + 2}:4"
    end(start_script("train_progressive.sh", tree, settings, *FLAGS), timeout=240)
    names = ["000-EqM-Ti-4-f4-rope", "001-EqM-Ti-4-f8-rope", "002-EqM-Ti-4-f16-rope"]
    assert sorted(path.name for path in (tree / "results/E").glob("[0-9]*")) == names


def test_train_slurm_saves_before_the_time_is_up_and_queues_the_job_again(shapes, tree):
    """With stand-ins: srun runs its command here, scancel signals that command, scontrol prints its
    arguments.
    """
    tools = {
        "srun": 'while [[ $1 == --* ]]; do shift; done; echo $$ >srun.pid; exec "$@"',
        "scancel": '[[ $* == "--signal=TERM 7" ]] && kill -TERM "$(cat srun.pid)"',
        "scontrol": 'if [[ $1 == show ]]; then echo 127.0.0.1; else echo "scontrol: $*"; fi',
    }
    write_commands(tree, tools)
    settings = {
        "PATH": f"{tree}{os.pathsep}{PATH}",
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_NNODES": 1,
        "SLURM_JOB_ID": 7,
        "SLURM_SUBMIT_DIR": tree,
        "GPUS": 2,
        "PORT": free_port(),
        "DATA": shapes,
        "EXP": "E",
        "CACHE": 0,
        "SCHEDULE": "4:2:4 8:10000:4",
    }
    flags = [*FLAGS, "--sample-every", 0]
    training = Training(shapes, tree / "results/E", None)
    process = start_script("train_slurm.sh", tree, settings, *flags)
    wait_until(lambda: training.last_step() > 4, process)
    process.send_signal(signal.SIGUSR1)
    output = end(process)
    assert "stopped by SIGTERM and saved" in output
    assert "scontrol: requeue 7" in output
    saved = int(re.search(r"saved at step (\d+)", output)[1])
    settings["SCHEDULE"] = f"4:2:4 8:{saved + 2}:4"
    process = start_script("train_slurm.sh", tree, settings, *flags)
    output = end(process, timeout=240)
    assert f"steps {saved} to {saved + 2}" in output
    assert training.last_step() == saved + 2


def test_train_progressive_encodes_the_videos_once_and_trains_three_phases(shapes, tree):
    make_vae(tree / "vae")
    settings = PHASES | {
        "DATA": shapes,
        "CACHE": "latents",
        "GPUS": 1,
        "SCHEDULE": "4:1:4 8:2:4 16:3:4",
    }
    flags = [*FLAGS, "--vae", "vae", "--sample-every", 0]

    def run(status=0):
        process = start_script("train_progressive.sh", tree, settings, *flags)
        return end(process, status, timeout=480)

    run()
    for frames, step in ((4, 1), (8, 2), (16, 3)):
        (path,) = tree.glob(f"results/E/*-f{frames}-rope/checkpoints/{step:07d}.pt")
        training = torch.load(path, weights_only=True)["config"]["training"]
        assert training["data_path"] == "latents"
        assert training["no_flip"] is False  # the cache has mirrored latents
    shutil.rmtree(tree / "results/E/000-EqM-Ti-4-f4-rope")  # the other phases don't need it
    printed = run()
    assert printed.count("is complete") == printed.count("is finished") == 1
    assert not list(tree.glob("results/E/*-f4-rope"))
    settings |= {"EXP": "F", "SCHEDULE": "4:1:4 8:2:4 2:3:4"}
    # A mistake in the last phase ends the script before the first one
    assert "got 2" in run(status=2)
    assert not (tree / "results/F").exists()
