"""datasets/check.py: what it prints about a folder of videos, and its exit status."""

import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import check
import train
from runtime import cli
from tiny_videos import make_video, scribble, write_sound, write_video
from training import run_main

FLAGS = shlex.split(
    "--num-frames 8 --image-size 16 --vae none --model EqM-Ti/4 --global-batch-size 2"
)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Ten videos in two classes, one of them corrupt and one short, in a folder of the current
    one.
    """
    for number in range(8):
        write_video(
            tmp_path / "data" / "Run" / f"{number}.m4v",
            20 + number,
            codec="libx264",
            sound=number == 0,
        )
    write_video(tmp_path / "data/Jump/brief.avi", 5)
    write_video(tmp_path / "data/Jump/torn.mov", 20, codec="libx264")
    scribble(tmp_path / "data/Jump/torn.mov")  # it can be opened
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data"


@pytest.fixture
def check_data(data, capsys):
    """A function that checks the data with these flags. Returns what was printed: (out, err)."""

    def check_data(*flags, status=0):
        run_main(check, data, *FLAGS, *flags, status=status)
        return capsys.readouterr()

    return check_data


def test_it_names_the_files_that_train_validate_and_are_skipped(data, check_data):
    write_video(data / "Jump" / "deep" / "x.avi")
    (data / "Jump" / "old.3gp").write_text("no video")
    (data / "Jump" / "tape.mpg").mkdir()  # a folder
    (data / ".trash").mkdir()
    (data / ".trash/older.3gp").write_text("no video")
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    text, _ = check_data("--frame-interval", 3, "--max-steps", 1000)
    assert ".trash" not in text and "tape.mpg" not in text
    for words in (
        "10 videos in 2 classes; 0 files that can't be opened",
        "  Run: 8 videos, 7.5 s",
        "  Jump: 2 videos, 1.0 s",
        "frames: 5 to 27",
        "frames per second: 25 to 25",
        "10 of 64 x 48",
        "skipped: Jump/torn.mov: can't be decoded to its end",
        "skipped: Jump/deep/x.avi: in the wrong place; expected DIR/<class>/<video>",
        "skipped: Jump/brief.avi: 5 frames, fewer than --num-frames 8",
        "skipped: Jump/old.3gp: another kind of video",
        "training: 6 videos in 2 classes; validation: 2 videos, Run/2.m4v, Run/3.m4v\n",
        "note: class Jump: no training video for clips of 8 frames",
        "note: --frame-interval 3: clips of 8 frames don't fit into 2 of 6 training videos",
        "6 training clips as the model sees them, from the top: Run/0.m4v, Run/1.m4v, Run/4.m4v",
        "EqM-Ti/4: 4.",
        "32 tokens per clip",
    ):
        assert words in text, (words, text)
    assert re.search(
        r"memory, fp32: 0\.0\d+ GB for the model, \d\S* MB for each clip .* GB for 2 clips\n", text
    )
    seconds, hours = re.search(
        r"fp32 on this cpu: about (\S+) s per step x 1000 steps = (\S+) hours", text
    ).groups()
    assert float(hours) == pytest.approx(float(seconds) / 3.6, rel=0.06)
    assert "takes about" not in text  # no smaller model is needed
    with Image.open("check-data.png") as sheet:
        assert sheet.height >= 6 * 128  # a row per clip, enlarged
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before


def test_a_hopeless_training_gets_a_smaller_model_and_the_default_is_1400_epochs(
    check_data, monkeypatch
):
    monkeypatch.setattr(check, "MOST_HOURS", 0.0)
    text, _ = check_data("--model", "EqM-Ti/2", "--global-batch-size", 8, "--quick")
    assert "x 1050 steps = " in text  # 6 videos
    assert "0.0 hours are too long for most machines; --model EqM-Ti/4 takes about " in text
    # nothing is smaller but EqM-Ti/8, whose tokens hold too much
    text, _ = check_data("--max-steps", 1, "--quick")
    assert "are too long for most machines; a GPU, or a lower --max-steps" in text


def test_a_class_that_the_font_lacks_gets_one_note_and_its_rows_keep_the_names_of_files(
    data, check_data, monkeypatch
):
    (data / "Run").rename(data / "跳舞")
    monkeypatch.setattr(check, "write_sheet", lambda out, videos, names: print(names))
    text, _ = check_data("--quick", "--max-steps", 1)
    assert text.count("note: the font") == 1 and "'class 1/0.m4v', 'class 1/1.m4v'" in text


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            ["--num-frames", 24],
            "--num-frames 24: the longest validation video has 23 frames: Run/3.",
        ),
        (
            ["--max-bad-fraction", 0.1],
            "--max-bad-fraction 0.1: 2 of 11 files are corrupt, expected at most 1: Jump/t",
        ),
    ],
)
def test_it_refuses_the_videos_that_train_refuses_in_the_same_words(data, check_data, flags, words):
    (data / "Jump/text.mp4").write_text("no video")
    text, error = check_data("--max-bad-fraction", 0.2, "--max-steps", 1, *flags, status=2)
    assert f"check.py: error: train.py would refuse these videos: {words}" in error
    assert "paste this command" not in text  # it would not run
    if "--max-bad-fraction" in flags:  # it shows the other videos nevertheless
        assert "6 videos in 2 classes; validation: 2 videos, Run/2.m4v, Run/3.m4v\n" in text
        assert "6 training clips as the model sees them" in text and "time, fp32 on this" in text
        assert Path("check-data.png").stat().st_size > 0


def test_each_file_that_cannot_be_opened_has_its_own_reason(data, check_data):
    (data / "Jump/link.mp4").symlink_to("gone.mp4")
    (data / "Jump/nothing.mp4").touch()
    (data / "Jump/text.mp4").write_text("no video")
    write_sound(data / "Jump/sound.mp4")
    reasons = {
        "link.mp4": "a link to gone.mp4, which does not exist; restore that file or remove",
        "nothing.mp4": "an empty file; copy it again or remove it",
        "sound.mp4": "has no video stream, only sound or text; remove it",
        "text.mp4": "can't be opened; repair or remove it",
    }
    text, _ = check_data("--max-steps", 1, "--max-bad-fraction", 0.5, "--quick")
    for name, reason in reasons.items():
        assert f"skipped: Jump/{name}: {reason}" in text
    for path in data.rglob("*.m4v"):
        path.unlink()
    for name in ("brief.avi", "torn.mov"):
        (data / "Jump" / name).unlink()
    text, error = check_data(status=2)  # it can't go on
    for name, reason in reasons.items():
        assert f"skipped: Jump/{name}: {reason}" in text
    assert "can't open any of its videos (4 files), the first is" in error


def test_folders_of_samples_are_skipped_in_one_line(data, check_data):
    shutil.copytree(data / "Run", data / "Made")
    (data / "Made/samples.json").write_text("{}")
    shutil.copytree(data / "Made", data / "Jump/made")
    text, _ = check_data("--quick", "--max-steps", 1)
    assert "10 videos in 2 classes" in text and text.count("made") == text.count("Made/0") == 0
    assert text.count(f"skipped 1 folder with samples of sample_gd.py: {data / 'Made'}; move") == 1


def last_command(text):
    """The command in the last line that check.py printed."""
    *_, line, command = text.splitlines()
    assert line.startswith("to train on these videos on this machine, for about ")
    return command


def value_of(words, flag):
    return words[words.index(flag) + 1]


def test_the_last_line_is_a_command_that_trains_as_printed(tmp_path, monkeypatch, capsys):
    root = tmp_path / "it's mine"
    for name in ("turn_left/a", "turn_left/b", "TurnRight/c", "TurnRight/d"):
        write_video(root / f"{name}.avi", 10, size=(64, 48))
    (root / "turn_left/empty.avi").touch()
    monkeypatch.chdir(tmp_path)
    run_main(check, root.name, "--max-bad-fraction", 0.4, "--frame-interval", 2, status=2)
    text, error = capsys.readouterr()
    assert "would refuse these videos: --num-frames 16: the longest training video has 10" in error
    command = last_command(text)  # with fewer frames than that
    words = shlex.split(command)
    assert "torchrun" not in command and words.count("--no-flip") == words.count("--use-rope") == 1
    expected = {
        "--num-frames": "8",
        "--model": "EqM-Ti/4",
        "--vae": "none",
        "--image-size": "32",
        "--max-steps": "2000",
        "--global-batch-size": "8",
        "--max-bad-fraction": "0.4",
        "--frame-interval": "2",
        "--data-path": root.name,
    }
    assert {flag: value_of(words, flag) for flag in expected} == expected
    assert shutil.which(words[0]) and words[1] == str(check.TRAIN)
    run_main(train, *words[2:], "--max-steps", 1, "--num-workers", 0)
    (run,) = (tmp_path / "results" / root.name).glob("[0-9]*")
    assert run.name == "000-EqM-Ti-4-f8-rope" and (run / "checkpoints/0000001.pt").exists()


@pytest.mark.parametrize("num_gpus", [0, 3])
def test_a_command_keeps_the_flags_of_the_user_and_suits_the_machine(
    data, check_data, monkeypatch, capsys, num_gpus
):
    monkeypatch.setattr(check, "count_gpus", lambda: num_gpus)
    monkeypatch.setattr(check, "measure", lambda **_: (1e6, 0.1, 1e6))  # slow for a large model
    monkeypatch.setattr(shutil, "which", lambda name: f"{Path(sys.executable).parent}/{name}")
    few = shlex.split("--num-frames 12 --vae none --quick --max-steps 30000")
    run_main(check, data, *few)
    words = shlex.split(last_command(capsys.readouterr().out))
    launch = ["torchrun", "--nproc_per_node=3"] if num_gpus else ["python"]
    assert words[: len(launch) + 1] == [*launch, str(check.TRAIN)]
    names = "--num-frames", "--vae", "--max-steps", "--image-size", "--model", "--global-batch-size"
    suits = ["48", "EqM-S/4", "30"] if num_gpus else ["32", "EqM-Ti/4", "8"]
    assert [value_of(words, name) for name in names] == ["12", "none", "30000", *suits]
    assert "--no-flip" not in words and "--sample-every" not in words
    run_main(train, *words[len(launch) + 1 :], "--dry-run")
    text, _ = check_data("--quick", "--max-steps", 7, "--val-fraction", 0.3)
    words = shlex.split(last_command(text))
    kept = dict(zip(FLAGS[::2], FLAGS[1::2], strict=True))
    kept |= {"--max-steps": "7", "--val-fraction": "0.3"}
    assert {flag: value_of(words, flag) for flag in kept} == kept
    assert "--nproc_per_node=2" in words if num_gpus else words[0] == "python"


@pytest.mark.parametrize("size", [320, 64])
def test_many_videos_and_gpus_get_the_defaults_of_the_scripts(size):
    video = replace(make_video("A/a"), width=size + 9, height=size)
    videos = [video] * 1000
    args = cli.Flags({"model": "EqM-S/4", "vae": "ema"}, [])
    flags, vae = check.choose_flags(args, check.PUBLISHED_VAE, videos, num_gpus=8)
    assert flags.model == "EqM-S/4"
    assert flags.global_batch_size == 256
    assert flags.max_steps == 50_000
    expected = ("ema", 256, 8) if size == 320 else ("none", 64, 1)
    assert (flags.vae, flags.image_size, vae.downsample) == expected
