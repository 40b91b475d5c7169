"""Strips of frames side by side become videos, pixel for pixel, split by people."""

import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from strips import MOVES, draw, write_strips
from training import ROOT, run_main
from video.files import read_frames
from video.index import scan_videos, split_videos

sys.path.insert(0, str(ROOT / "datasets"))
import prepare_weizmann


@pytest.fixture(scope="module")
def strips(tmp_path_factory):
    return write_strips(tmp_path_factory.mktemp("strips"))


@pytest.fixture
def own(strips, tmp_path):
    """A copy of the strips that a test may damage."""
    return shutil.copytree(strips, tmp_path / "strips")


def prepare(source, out, *flags, status=0):
    run_main(prepare_weizmann, "--source", source, "--out", out, "--hold-out", 3, *flags, status=status)


def snapshot(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*.*")}


def test_every_frame_of_every_clip_is_kept_without_loss_at_25_fps(strips, tmp_path):
    prepare(strips, tmp_path / "out")
    scan = scan_videos(str(tmp_path / "out"))
    assert scan.classes == ["Bend", "JumpingJack", "OneHandWave", "TwoHandWave"] and len(scan.videos) == 12
    for number, name in prepare_weizmann.CLASSES.items():
        for person in range(3):
            (video,) = (video for video in scan.videos if video.path == f"{name}/person{person + 1}.mkv")
            assert (video.num_frames, video.fps, video.height, video.width) == (20, 25.0, 64, 64)
            assert np.array_equal(read_frames(tmp_path / "out", video, range(20)), draw(person, number, 20))


def test_the_people_who_are_held_out_never_train(strips, tmp_path):
    out = tmp_path / "out"
    for held_out in ((3,), (1, 2)):
        prepare(strips, out, "--hold-out", *held_out)
        train, val = split_videos(str(out), scan_videos(str(out)).videos, 0.5)
        people = [{video.path[-5] for video in videos} for videos in (train, val)]
        assert people == [set("123") - set(map(str, held_out)), set(map(str, held_out))]


def test_again_it_does_only_what_is_missing(strips, tmp_path):
    out = tmp_path / "out"
    prepare(strips, out)
    before = snapshot(out / "Bend")
    (out / "JumpingJack/person2.mkv").unlink()
    (out / "JumpingJack/person2.mkv.tmp").write_bytes(b"half")  # of a process that was killed
    prepare(strips, out)
    assert snapshot(out / "Bend") == before
    assert len(scan_videos(str(out)).videos) == 12 and not list(out.rglob("*.tmp"))


def wrong_width(strips, out):
    strip = strips / "data/actions/3/00000012.jpg"
    with open(strip, "wb") as file:
        Image.new("RGB", (64 * 20 + 1, 64)).save(file, format="PNG")
    return "a strip of 1281 x 64 px; wanted 64 px high, a multiple of 64 px wide"


def not_an_image(strips, out):
    (strips / "data/actions/0/00000000.jpg").write_text("version https://git-lfs.github.com/spec/v1")
    return "00000000.jpg: can't be read as an image: clone the repository again"


def missing_class(strips, out):
    shutil.rmtree(strips / "data/actions/4")
    return "no strips in"


def missing_clip(strips, out):
    (strips / "data/actions/1/00000010.jpg").unlink()
    return "person 2 has no clip of TwoHandWave"


def second_clip(strips, out):
    shutil.copy(strips / "data/actions/0/00000000.jpg", strips / "data/actions/0/00000004.jpg")
    return "a second clip of person 1"


def no_number(strips, out):
    shutil.copy(strips / "data/actions/0/00000000.jpg", strips / "data/actions/0/copy.jpg")
    return "copy.jpg: wanted a number as its name"


def other_folder(strips, out):
    shutil.rmtree(strips / "data")
    return "wanted a clone of the repository mocogan"


def foreign_file(strips, out):
    (out / "Dive").mkdir(parents=True)
    (out / "Dive/me.avi").write_bytes(b"")
    return "holds Dive/me.avi, which is not of this data set: name another folder"


@pytest.mark.parametrize("damage", [
    wrong_width, not_an_image, missing_class, missing_clip, second_clip, no_number, other_folder, foreign_file,
])  # fmt: skip
def test_what_is_wrong_is_one_line_and_nothing_is_written(own, tmp_path, capsys, damage):
    line, out = damage(own, tmp_path / "out"), tmp_path / "out"
    before = snapshot(out)
    prepare(own, out, status=2)
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1
    assert snapshot(out) == before


@pytest.mark.parametrize(("held_out", "line"), [
    ((4,), "--hold-out 4: the people are 1 to 3"), ((1, 2, 3), "--hold-out: names everybody"),
])  # fmt: skip
def test_someone_trains_and_someone_validates(strips, tmp_path, capsys, held_out, line):
    prepare(strips, tmp_path / "out", "--hold-out", *held_out, status=2)
    assert line in capsys.readouterr().err


def test_the_strips_of_the_tests_move_as_their_classes():
    assert set(MOVES) == set(prepare_weizmann.CLASSES)
