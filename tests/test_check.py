"""datasets/check.py: what it prints about a folder of videos, and its exit status."""

import re

import pytest
from PIL import Image

import check
from tiny_videos import scribble, write_video
from training import run_main

FLAGS = ["--num-frames", 8, "--image-size", 16, "--vae", "none", "--model", "EqM-Ti/4", "--global-batch-size", 2]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Ten videos in two classes, one of them corrupt and one short, in a folder of the current one."""
    for number in range(8):
        write_video(tmp_path / "data" / "Run" / f"{number}.m4v", 20 + number, codec="libx264", sound=number == 0)
    write_video(tmp_path / "data/Jump/brief.avi", 5)
    write_video(tmp_path / "data/Jump/torn.mov", 20, codec="libx264")
    scribble(tmp_path / "data/Jump/torn.mov")  # it can be opened
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data"


def test_it_names_the_files_that_train_validate_and_are_skipped(data, capsys):
    write_video(data / "Jump" / "deep" / "x.avi")
    (data / "Jump" / "old.3gp").write_text("no video")
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    run_main(check, data, *FLAGS, "--frame-interval", 3, "--max-steps", 1000)
    text = capsys.readouterr().out
    for words in (
        "10 videos in 2 classes; 0 files that can't be opened", "  Run: 8 videos, 7.5 s", "  Jump: 2 videos, 1.0 s",
        "frames: 5 to 27", "frames per second: 25 to 25", "10 of 64 x 48",
        "skipped: Jump/torn.mov: can't be decoded to its end", "skipped: Jump/deep/x.avi: too deep",
        "skipped: Jump/brief.avi: 5 frames, fewer than --num-frames 8", "skipped: Jump/old.3gp: another kind of video",
        "training: 6 videos in 2 classes; validation: 2 videos, Run/2.m4v, Run/3.m4v\n",
        "note: class Jump: no training video for clips of 8 frames",
        "note: --frame-interval 3: clips of 8 frames don't fit into 2 of 6 training videos; these use",
        "6 training clips as the model sees them, from the top: Run/0.m4v, Run/1.m4v, Run/4.m4v",
        "EqM-Ti/4: 4.", "32 tokens per clip",
    ):  # fmt: skip
        assert words in text, (words, text)
    assert re.search(r"memory, fp32: 0\.0\d+ GB for the model, \d\S* MB for each clip .* GB for 2 clips\n", text)
    seconds, hours = re.search(r"fp32 on this cpu: about (\S+) s per step x 1000 steps = (\S+) hours", text).groups()
    assert float(hours) == pytest.approx(float(seconds) / 3.6, rel=0.06)
    assert "--model" not in text
    with Image.open("check-data.png") as sheet:
        assert sheet.height >= 6 * 128  # a row per clip, enlarged
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before


def test_a_hopeless_training_gets_a_smaller_model_and_the_default_is_1400_epochs(data, capsys, monkeypatch):
    monkeypatch.setattr(check, "MOST_HOURS", 0.0)
    run_main(check, data, *FLAGS, "--model", "EqM-Ti/2", "--global-batch-size", 8, "--quick")
    assert "x 1050 steps = " in (text := capsys.readouterr().out)  # 6 videos
    assert "note: more than 0.0 hours are too long for most machines; --model EqM-Ti/4 takes about " in text
    run_main(check, data, *FLAGS, "--max-steps", 1)  # nothing is smaller but EqM-Ti/8, whose tokens hold too much
    assert "are too long for most machines; a GPU, or a lower --max-steps" in capsys.readouterr().out


def test_a_class_that_the_font_lacks_gets_one_note_and_its_rows_keep_the_names_of_files(data, capsys, monkeypatch):
    (data / "Run").rename(data / "跳舞")
    monkeypatch.setattr(check, "write_sheet", lambda out, videos, names: print(names))
    run_main(check, data, *FLAGS, "--quick", "--max-steps", 1)
    text = capsys.readouterr().out
    assert text.count("note: the font") == 1 and "'class 1/0.m4v', 'class 1/1.m4v'" in text


@pytest.mark.parametrize(("flags", "words"), [
    (["--num-frames", 500], "--num-frames 500: the longest training video has 27 frames"),
    (["--num-frames", 24], "--num-frames 24: the longest validation video has 23 frames"),
    (["--max-bad-fraction", 0.1], "--max-bad-fraction 0.1: 2 of 11 files are corrupt, expected at most 1: Jump/t"),
])  # fmt: skip
def test_it_refuses_the_videos_that_train_refuses_in_the_same_words(data, capsys, flags, words):
    (data / "Jump/text.mp4").write_text("no video")
    run_main(check, data, *FLAGS, "--max-bad-fraction", 0.2, *flags, status=1)
    assert f"check.py: error: train.py would refuse these videos: {words}" in capsys.readouterr().err
