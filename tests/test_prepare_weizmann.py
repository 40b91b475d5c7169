"""Strips of frames side by side become videos, pixel for pixel, split by people."""

import shutil

import numpy as np
import pytest
from PIL import Image

import prepare_weizmann
from strips import MOVES, draw, write_strips
from tiny_videos import decode
from training import refused, run_main
from video.index import scan_videos, split_videos


@pytest.fixture(scope="module")
def strips(tmp_path_factory):
    return write_strips(tmp_path_factory.mktemp("strips"))


def prepare(source, out, *held_out):
    run_main(prepare_weizmann, "--source", source, "--out", out, "--hold-out", *(held_out or [3]))


def snapshot(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*.*")}


def test_every_frame_is_kept_without_loss_and_held_out_people_never_train(strips, tmp_path):
    out = tmp_path / "out"
    for held_out in ((3,), (1, 2)):
        prepare(strips, out, *held_out)
        scan = scan_videos(str(out))
        train, val = split_videos(str(out), scan.videos, 0.5)
        people = [{video.path[-5] for video in videos} for videos in (train, val)]
        assert people == [set("123") - set(map(str, held_out)), set(map(str, held_out))]
    assert scan.classes == ["Bend", "JumpingJack", "OneHandWave", "TwoHandWave"] and len(scan.videos) == 12
    assert set(MOVES) == set(prepare_weizmann.CLASSES)
    for number, name in prepare_weizmann.CLASSES.items():
        for person in range(3):
            frames, fps = decode(out / f"{name}/person{person + 1}.mkv")
            assert fps == 25 and np.array_equal(frames, draw(person, number, 20))


def test_again_it_does_only_what_is_missing(strips, tmp_path):
    out = tmp_path / "out"
    prepare(strips, out)
    before = snapshot(out / "Bend")
    (out / "JumpingJack/person2.mkv").unlink()
    (out / "JumpingJack/person2.mkv.tmp").write_bytes(b"half")  # of a process that was killed
    prepare(strips, out)
    assert snapshot(out / "Bend") == before
    assert len(scan_videos(str(out)).videos) == 12 and not list(out.rglob("*.tmp"))


def wrong_width(actions, out):
    with open(actions / "3/00000012.jpg", "wb") as file:
        Image.new("RGB", (64 * 20 + 1, 64)).save(file, format="PNG")


def not_an_image(actions, out):
    (actions / "0/00000000.jpg").write_text("version https://git-lfs.github.com/spec/v1")


def foreign_video(actions, out):
    (out / "Dive").mkdir(parents=True)
    (out / "Dive/me.avi").write_bytes(b"")


@pytest.mark.parametrize(("damage", "line"), [
    (wrong_width, "00000012.jpg: not a strip of 64 x 64 px frames; clone the repository again"),
    (not_an_image, "00000000.jpg: not a strip"),
    (foreign_video, "holds Dive/me.avi, which does not belong to this data set; name another folder"),
    (lambda actions, out: shutil.rmtree(actions / "4"), "person 1 has no clip of Bend"),
    (lambda actions, out: (actions / "1/00000010.jpg").unlink(), "person 2 has no clip of TwoHandWave"),
    (lambda actions, out: shutil.rmtree(actions), "expected a complete clone of MoCoGAN's repository"),
])  # fmt: skip
def test_what_is_wrong_is_one_line_and_nothing_is_written(strips, tmp_path, capsys, damage, line):
    own, out = shutil.copytree(strips, tmp_path / "strips"), tmp_path / "out"
    damage(own / "data/actions", out)
    before = snapshot(out)
    assert line in refused(capsys, prepare_weizmann, "--source", own, "--out", out, "--hold-out", 3)
    assert snapshot(out) == before


@pytest.mark.parametrize("held_out", [[4], [1, 2, 3]])
def test_someone_trains_and_someone_validates(strips, tmp_path, capsys, held_out):
    line = refused(capsys, prepare_weizmann, "--source", strips, "--out", tmp_path / "out", "--hold-out", *held_out)
    assert f"--hold-out {held_out}: expected some of people 1 to 3, but not all" in line
