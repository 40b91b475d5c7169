"""The study of given frames: its commands, what it leaves out when it goes on, its tables."""

import json
import sys
from pathlib import Path

import pytest

import evaluate
import given_frames
import train
from training import run_main

RIGHT = {"0": 0.8, "0.5": 0.75}  # direction accuracy by share


@pytest.fixture
def commands(monkeypatch):
    """The commands that would run; each is parsed by its own script and leaves what that would leave."""
    seen = []

    def run_script(words, log=None):
        script, flags = words[0], [str(word) for word in words[1:]]
        seen.append((script, flags))
        monkeypatch.setattr(sys, "argv", [script, *flags])
        if script == "EqM/train.py":
            folder = Path(train.parse_args().results_dir, "000-x/checkpoints")
            folder.mkdir(parents=True)
            (folder / "latest.pt").touch()
        elif script == "EqM/evaluate.py":
            args, _ = evaluate.parse_args()
            seed = args.seed / 100
            values = {"direction_accuracy": RIGHT[Path(args.out).parent.name.split("-")[0][7:]] + seed, "psnr_gain": 9}
            Path(args.out).write_text(json.dumps({"values": values}))
        return ""

    monkeypatch.setattr(given_frames, "run_script", run_script)
    return seen


def test_it_trains_and_scores_each_model_once_and_writes_the_means_over_the_seeds(commands, tmp_path, capsys):
    flags = ["--miniature", "--out", tmp_path, "--seeds", 0, 1, 2]
    run_main(given_frames, *flags)
    trained = [flags for script, flags in commands if script == "EqM/train.py"]
    assert [(flags[flags.index("--forcing") + 1], flags[flags.index("--global-seed") + 1]) for flags in trained] == [
        ("0.0", "0"), ("0.5", "0"), ("0.0", "1"), ("0.5", "1"), ("0.0", "2"), ("0.5", "2")
    ]  # fmt: skip
    assert sum(script == "EqM/evaluate.py" for script, _ in commands) == 6 * len(given_frames.TASKS)
    text = (tmp_path / "given_frames.md").read_text()
    assert "| 8 of 16 given | 81.0 (80.0 to 82.0) | 9.0 (9.0 to 9.0) |  |  |" in text
    assert "nothing given, 24 frames, --forcing 0.5 minus 0: -5.0 points (-5.0 to -5.0)" in text
    commands.clear()
    (tmp_path / "given-frames/forcing0-seed1/1-of-16-given.json").unlink()
    (tmp_path / "given-frames/forcing0-seed1/000-x/checkpoints/latest.pt").unlink()
    (tmp_path / "given-frames/forcing0-seed1/000-x/checkpoints").rmdir()
    run_main(given_frames, *flags)
    assert [script for script, _ in commands if script.startswith("EqM")] == ["EqM/train.py", "EqM/evaluate.py"]


def test_the_interval_of_a_mean_is_students():
    assert given_frames.half_width([1.0, 2.0, 3.0]) == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert given_frames.half_width([7.0]) is None
