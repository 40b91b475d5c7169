"""datasets/check.py: what it says of a folder of videos."""

import re

from PIL import Image

import check
from tiny_videos import scribble, write_video
from training import run_main


def test_it_names_what_is_there_and_what_would_be_left_out_and_why(tmp_path, monkeypatch, capsys):
    data = tmp_path / "data"
    for number in range(6):
        write_video(data / "Run" / f"{number}.mp4", 20 + number, codec="libx264", sound=number == 0)
    write_video(data / "Jump" / "brief.avi", 5)
    write_video(data / "Jump" / "torn.mov", 20, codec="libx264")
    scribble(data / "Jump/torn.mov")  # it opens
    write_video(data / "Jump" / "deep" / "x.avi")
    for name in ("text.mp4", "old.3gp"):
        (data / "Jump" / name).write_text("no video")
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    monkeypatch.chdir(tmp_path)
    flags = ["--num-frames", 8, "--frame-interval", 3, "--image-size", 16, "--vae", "none", "--model", "EqM-Ti/4"]
    run_main(check, data, *flags, "--global-batch-size", 2)
    text = capsys.readouterr().out
    for words in (
        "8 videos in 2 classes; 1 files can't be opened", "  Run: 6 videos, 5.4 s", "  Jump: 2 videos",
        "frames: 5 to 25", "frames per second: 25 to 25", "8 of 64 x 48",
        "skipped: Jump/text.mp4: can't be opened", "skipped: Jump/torn.mov: can't be decoded to its end",
        "skipped: Jump/brief.avi: 5 frames, a clip has --num-frames 8", "skipped: Jump/deep/x.avi: is too deep",
        "skipped: Jump/old.3gp: a video of another kind",
        "2 videos are too short for --frame-interval 3", "validate", "check-data.png: 6 clips as the model sees them",
        "EqM-Ti/4: 4.", "32 tokens a clip",
    ):  # fmt: skip
        assert words in text, (words, text)
    assert re.search(r"memory, fp32: 0\.0\d+ GB for the model, \d\S* MB for each clip .* GB for 2 clips\n", text)
    assert re.search(r"time, fp32 on this cpu: about \S+ s a step", text)
    with Image.open("check-data.png") as sheet:
        assert sheet.height >= 6 * 128  # a row per clip, enlarged
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before

    for wrong, words in ((["--image-size", 18], "--image-size 18: not a multiple of 4"), (["--num-frames", 3], "4")):
        run_main(check, data, *flags, *wrong, status=2)
        assert words in capsys.readouterr().err
    run_main(check, tmp_path / "none", status=2)
    assert f"check.py: error: DIR {tmp_path / 'none'}: no such folder" in capsys.readouterr().err
