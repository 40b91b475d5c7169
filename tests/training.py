"""Tiny training runs, as separate processes or in the process of the test, and a comparison of two
finished runs.
"""

import json
import os
import re
import signal
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from shlex import split
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import make_moving_shapes
import sample_gd
import train
import train_vae
from process import end, run_ranks, spawn, wait_until
from runtime import distributed, runs
from runtime.cli import UserError
from vae import VAE

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]
PYTHON = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
SMALL = split("--image-size 16 --global-batch-size 4 --num-workers 0")
IMAGES = [*SMALL, *split("--model EqM-Ti/4 --depth 1 --vae none")]
MOVING = """
    --video
    --use-rope
    --hidden-size 96
    --num-heads 2
    --no-flip
    --frame-interval 1 3
    --val-clips 4
    --lr 1e-3
"""
ANY_LENGTH = [*IMAGES, *split(MOVING)]
TINY = [*ANY_LENGTH, "--num-frames", 4]
TINY_VAE = split("""
    --image-size 16
    --global-batch-size 4
    --num-workers 0
    --downsample 4
    --widths 8 8 8
    --latent-channels 2
    --log-every 2
    --num-val-frames 20
    --val-every 5
""")
OFTEN = split("""
    --log-every 3
    --val-every 2
    --ckpt-every 4
    --keep-last 2
    --sample-every 5
    --num-samples 1
    --num-sampling-steps 3
""")
FEW_STEPS = split("--num-samples 2 --num-sampling-steps 4 --stepsize 0.05")
# depends on the clock
MEASURED = {"clips_per_s", "frames_per_s", "tflops_per_s", "wait_frac", "seconds", "val_seconds"}


def make_data(folder):
    """Moving Shapes, 12 classes of 2 small videos."""
    make_moving_shapes.main(["--out", str(folder), "--videos-per-class", "2", "--size", "16"])
    return folder


def batch_of(clips):
    """A batch of real clips (B, C, T, H, W) of two classes, as a loader makes it."""
    B = len(clips)
    return {
        "clips": clips,
        "y": torch.arange(B) % 2,
        "time_scales": torch.full((B,), 0.08),
        "indices": torch.arange(B),
        "is_sample": torch.zeros(B, dtype=torch.bool),
        "pairs": [None] * B,
    }


def losses_of(network, batch, config, device=CPU, **flags):
    """What train.training_losses returns for pixels, in stream 7, with the usual flags of train.py
    but --global-seed 5 and --gamma-shift 3.
    """
    usual = {"global_seed": 5, "gamma_shift": 3.0, "gamma_draw": "uniform", "precision": "fp32"}
    usual |= {"disp": False, "forcing": 0.0, "forcing_regions": 0.0, "pure_noise": 0.0}
    return train.training_losses(
        network,
        VAE("none"),
        batch,
        config=config,
        args=SimpleNamespace(**usual | flags),
        stream=7,
        device=device,
    )


@dataclass
class Training:
    """One training run, which may need several starts to finish."""

    data: Path
    results: Path
    steps: int
    launcher: list = field(default_factory=lambda: PYTHON)
    flags: list = field(default_factory=list)
    base: list = field(default_factory=lambda: TINY)
    script: str = "train.py"

    def command_flags(self, *flags):
        paths = ["--data-path", self.data, "--results-dir", self.results]
        # without, a schedule or --epochs sets the end
        end = ["--max-steps", self.steps] if self.steps else []
        return [*self.base, *paths, *end, *self.flags, *flags]

    def start(self, *flags, until=0):
        """Start the launcher and wait until it has logged the step `until`. Returns the process."""
        process = spawn(*self.launcher, ROOT / "EqM" / self.script, *self.command_flags(*flags))
        wait_until(lambda: self.last_step() >= until, process)
        return process

    def run(self, *flags, status=0, timeout=240):
        """Start the run and wait until it ends with this status. Returns its output."""
        return end(self.start(*flags), status, timeout)

    @property
    def folder(self):
        (folder,) = self.results.glob("[0-9]*")
        return folder

    def rows(self):
        """The metrics, without notes and measured times."""
        rows = []
        for line in (self.folder / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            if "note" not in row:
                rows.append({name: row[name] for name in row.keys() - MEASURED})
        return rows

    def last_step(self):
        """The last logged step; 0 before the first. The last line may be cut off, as after a
        kill.
        """
        text = "".join(file.read_text() for file in self.results.glob("*/metrics.jsonl"))
        steps = re.findall(r'^{"step": (\d+).*}$', text, re.M)
        return max(map(int, steps), default=0)

    def saved(self, name="latest.pt"):
        """The content of a checkpoint."""
        return torch.load(self.folder / "checkpoints" / name, weights_only=True)


def record_calls(monkeypatch, owner, name, note):
    """A list that gets note(*arguments), which may raise, before each call of a function `name` of
    `owner`.
    """
    notes = []
    function = getattr(owner, name)

    def recorder(*args, **kwargs):
        notes.append(note(*args, **kwargs))
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, recorder)
    return notes


@contextmanager
def counted_steps(script, stop_after=None, act=lambda: signal.raise_signal(signal.SIGTERM)):
    """A list that grows at each step of a training script. After stop_after steps, act() runs:
    SIGTERM by default.
    """
    with pytest.MonkeyPatch.context() as patch:  # update_ema ends a step
        steps = record_calls(
            patch, script, "update_ema", lambda *_: len(steps) + 1 == stop_after and act()
        )
        yield steps


def run_here(training, *flags, stop_after=None, stop_in=None):
    """Run the training in this process, for speed; train.py with OFTEN. Returns its number of
    steps.

    SIGTERM arrives after stop_after steps, or in the first call of `validate` or `sample_ema` of
    train.py, or ("latents_of") in the middle of the first validation."""

    def interrupt(*arguments, **_):
        if stop_in != "latents_of" or "validation" in arguments:
            signal.raise_signal(signal.SIGTERM)

    script = train if training.script == "train.py" else train_vae
    with pytest.MonkeyPatch.context() as patch, counted_steps(script, stop_after) as steps:
        if stop_in:
            record_calls(patch, VAE if stop_in == "latents_of" else script, stop_in, interrupt)
        run_main(script, *training.command_flags(*(OFTEN if script is train else ()), *flags))
    return len(steps)


def run_main(script, *flags, status=0):
    """Run main() of a script (a module) in this process with these flags. It must end with this
    status.
    """
    expected = pytest.raises(SystemExit) if status else nullcontext()
    with pytest.MonkeyPatch.context() as patch, expected as ended:
        patch.setattr(sys, "argv", [Path(script.__file__).name, *map(str, flags)])
        try:
            script.main()
        finally:
            while runs._locks:  # as at the end of a process
                runs._locks.pop().close()
    assert not status or ended.value.code == status


def sample_here(ckpt, folder, *flags, status=0):
    """Run sample_gd.py in this process. Returns (samples, content of samples.json), or None with a
    status above 0.
    """
    kind = [] if ckpt.stem == "image" else ["--video"]
    places = ["--ckpt", ckpt, "--folder", folder]
    run_main(sample_gd, *kind, *places, *FEW_STEPS, *flags, status=status)
    if status:
        return None
    clips = np.load(folder / "samples.npz")["arr_0"]
    return clips, json.loads((folder / "samples.json").read_text())


def refused(capsys, script, *flags, status=2, late=False):
    """Run main() of a script that must end with this status and one line on stderr. Returns the
    line.

    With status 2 it must not have touched a device, unless it is late.
    """
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        if status == 2 and not late:
            patch.setattr(distributed, "start", lambda *_: pytest.fail("a device was touched"))
        run_main(script, *flags, status=status)
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if line and "opening videos" not in line]
    assert "error: " in line
    return line


def mistakes(text):
    """[flags, what the error about them must say] of each line `FLAGS => WORDS` of a table."""
    return [line.split(" => ") for line in text.strip().splitlines()]


def error_of(function, *args, **kwargs):
    """The message of the UserError that a call must raise, one line."""
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def on_two_ranks(script, *flags, status=0):
    """Run main() of a script (a module) on two ranks. The first must end with this status. Returns
    what they printed.
    """
    _, printed = run_ranks(partial(run_main, script, *flags), status=status)
    return printed


def no_space(*_, **__):
    """Replaces a function that writes to a disk, which is full."""
    raise OSError(28, "No space left on device")


def content(folder):
    """{relative path: bytes} of all files in a folder, without hidden ones."""
    paths = sorted(path for path in folder.rglob("[!.]*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def names(folder):
    """The names of what is in a folder, in order."""
    return sorted(path.name for path in folder.iterdir())


def snapshot(folder):
    """What is in a folder: for each path its kind and, of a file, its size and time of change."""
    found = {}
    for path in folder.rglob("*"):
        stat = os.lstat(path)
        found[path] = (stat.st_mode,)
        if not path.is_dir():
            found[path] += (stat.st_size, stat.st_mtime_ns)
    return found


def differences(a, b, place="state"):
    """Return a list of the places where two states of plain values and tensors differ."""
    if type(a) is not type(b):
        return [place]
    if torch.is_tensor(a):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [place]
    if isinstance(a, (list, tuple)):
        a = dict(enumerate(a))
        b = dict(enumerate(b))
    if not isinstance(a, dict):
        return [] if a == b else [place]
    found = [f"{place}.{key}" for key in a.keys() ^ b.keys()]
    for key in a.keys() & b.keys():
        found += differences(a[key], b[key], f"{place}.{key}")
    return found


def compare(one, other):
    """Return where two finished runs differ: in the content and the names of checkpoints, and in
    metrics.
    """
    found = [] if one.rows() == other.rows() else ["metrics"]
    for run in (one, other):
        found += [f"left behind: {path}" for path in run.folder.rglob("*.tmp")]
    names, other_names = (set(os.listdir(run.folder / "checkpoints")) for run in (one, other))
    found += names ^ other_names
    for name in names & other_names:
        states = [run.saved(name) for run in (one, other)]
        for state in states:
            state.pop("config")  # holds the flags, --resume among them
            state["phase"].pop("seconds")
        found += differences(*states, name)
    return found
