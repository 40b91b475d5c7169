"""The scripts that train the recommended arm: their commands, what they leave out when they go on, their tables."""

import json
import sys
from pathlib import Path

import pytest

import evaluate
import given_frames
import long_videos
import sample_gd
import train
import trained
from training import run_main

RIGHT = {"0": 0.8, "0.75": 0.75}  # direction accuracy by share


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
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "latest.pt").touch()
        elif script == "EqM/evaluate.py":
            args, _ = evaluate.parse_args()
            seed, folder = args.seed / 100, Path(args.out).parent.name
            right = RIGHT.get(folder.split("-")[0][7:], 0) + seed
            values = {"direction_accuracy": right, "psnr_gain": 9, "window_seam_score": 1.1}
            if args.metric == "motion":
                values["one_object"] = 0.9 if "overlap-8" in args.out else 0.5
            Path(args.out).write_text(json.dumps({"values": values}))
        elif script == "EqM/sample_gd.py":
            folder = Path(sample_gd.parse_args().folder)
            folder.mkdir()
            (folder / "samples.json").touch()
        return ""

    monkeypatch.setattr(trained, "run_script", run_script)
    return seen


def test_it_trains_and_scores_each_model_once_and_writes_the_means_over_the_seeds(commands, tmp_path, capsys):
    flags = ["--miniature", "--out", tmp_path, "--seeds", 0, 1, 2]
    run_main(given_frames, *flags)
    runs = [flags for script, flags in commands if script == "EqM/train.py"]
    assert [(flags[flags.index("--forcing") + 1], flags[flags.index("--global-seed") + 1]) for flags in runs] == [
        ("0.0", "0"), ("0.75", "0"), ("0.0", "1"), ("0.75", "1"), ("0.0", "2"), ("0.75", "2")
    ]  # fmt: skip
    assert sum(script == "EqM/evaluate.py" for script, _ in commands) == 6 * len(given_frames.TASKS)
    text = (tmp_path / "given_frames.md").read_text()
    assert "| 8 of 16 given | 81.0 (80.0 to 82.0) | 9.0 (9.0 to 9.0) |  |  |" in text
    assert "nothing given, 24 frames at once, --forcing 0.75 minus 0: -5.0 points (-5.0 to -5.0)" in text
    commands.clear()
    (tmp_path / "given-frames/forcing0-seed1/1-of-16-given.json").unlink()
    run_main(given_frames, *flags)
    assert [script for script, _ in commands if script.startswith("EqM")] == ["EqM/train.py", "EqM/evaluate.py"]


def test_long_videos_are_made_once_for_each_way_of_sampling_and_scored_in_two_ways(commands, tmp_path, monkeypatch):
    monkeypatch.setattr(long_videos, "peak_memory", lambda *words: 400.0 if long_videos.SHORT in words else 420.0)
    flags = ["--miniature", "--out", tmp_path, "--overlaps", 4, 8, "--seeds", 0]
    run_main(long_videos, *flags, 1)
    scripts = [script for script, _ in commands if script.startswith("EqM")]
    per_seed = ["EqM/train.py", *(2 * ["EqM/sample_gd.py", "EqM/evaluate.py", "EqM/evaluate.py"])]
    assert scripts == 2 * per_seed
    text = (tmp_path / "long_videos.md").read_text()
    assert "| overlap 8, guidance 1.5 | 90 (90 to 90) |" in text
    assert "| overlap 4, guidance 1.5 | 50 (50 to 50) |" in text
    assert "256 frames against 32: 1.05 (1.05 to 1.05) times" in text
    commands.clear()
    run_main(long_videos, *flags, 1)
    assert not commands
    run_main(long_videos, *flags, "--clips", 24)  # other clips are sampled anew
    assert [script for script, _ in commands].count("EqM/sample_gd.py") == 2


def test_the_interval_of_a_mean_is_students():
    assert given_frames.half_width([1.0, 2.0, 3.0]) == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert given_frames.half_width([7.0]) is None
