"""Moving Shapes: what is written, and that it is exact. And the script that arranges UCF-101."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import decord
import numpy as np
import pytest

import make_moving_shapes as shapes
from runtime.cli import UserError

SCRIPTS = Path(shapes.__file__).parent


def make(out, *flags):
    shapes.main(["--out", str(out), *map(str, flags)])
    return json.loads((out / "shapes.json").read_text())


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def decode(path):
    reader = decord.VideoReader(str(path))
    return reader.get_batch(range(len(reader))).asnumpy(), reader.get_avg_fps()


def centroid(frame):
    """(x, y) of a bright shape on black, px."""
    weight = frame.astype(float).sum(-1)
    ys, xs = np.mgrid[: weight.shape[0], : weight.shape[1]] + 0.5
    return np.array([(weight * xs).sum(), (weight * ys).sum()]) / weight.sum()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "moving-shapes"
    return out, make(out, "--videos-per-class", 9)


def test_the_same_flags_give_the_same_bytes_and_another_seed_gives_others(tmp_path):
    for name, flags in (("set", ()), ("again", ()), ("other", ("--seed", 1))):
        make(tmp_path / name, "--videos-per-class", 2, "--size", 16, *flags)
    same, other = files_of(tmp_path / "again"), files_of(tmp_path / "other")
    assert same == files_of(tmp_path / "set")
    assert same.keys() == other.keys() and all(same[name] != other[name] for name in same if name.endswith(".avi"))


def test_no_file_names_the_encoder_that_wrote_it(made):
    assert not [name for name, data in files_of(made[0]).items() if b"Lav" in data]


def test_a_video_does_not_depend_on_how_many_others_there_are(tmp_path, made):
    out, _ = made
    make(tmp_path / "few", "--videos-per-class", 2)
    name = "SquareUp/v_SquareUp_g01_c01.avi"
    assert (tmp_path / "few" / name).read_bytes() == (out / name).read_bytes()


def test_the_layout_and_the_lists_are_those_of_ucf101(made):
    out, side = made
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == sorted([*shapes.CLASSES, "ucfTrainTestlist"])
    splits = out / "ucfTrainTestlist"
    class_ids = dict(reversed(line.split()) for line in (splits / "classInd.txt").read_text().splitlines())
    assert list(class_ids) == sorted(shapes.CLASSES) and list(class_ids.values()) == [str(i + 1) for i in range(12)]
    train = dict(line.split() for line in (splits / "trainlist01.txt").read_text().splitlines())
    test = (splits / "testlist01.txt").read_text().splitlines()
    assert all(class_id == class_ids[name.split("/")[0]] for name, class_id in train.items())
    listed = [*train, *test]
    assert sorted(listed) == sorted(str(p.relative_to(out)) for p in out.rglob("*.avi"))
    assert sorted(listed) == sorted(f"{key}.avi" for key in side["videos"])
    group = {name: name.split("_")[2] for name in listed}
    assert not {group[name] for name in train} & {group[name] for name in test}
    assert set(Counter(name.split("/")[0] for name in test).values()) == {2}  # of 9: group 1 holds clips 1 and 2


def test_by_default_10_to_20_percent_of_the_videos_are_for_testing(tmp_path):
    args = shapes.parse_args(["--out", str(tmp_path)])
    shapes.check_flags(args)
    videos, test = shapes.plan_videos(args)
    assert 0.1 <= len(test) / len(videos) <= 0.2
    assert {args.colors[i] for i in range(3)} == {video["color"] for video in videos.values()}


@pytest.mark.parametrize("name", shapes.CLASSES)
def test_decoded_motion_is_that_of_the_class_and_of_shapes_json(made, name):
    out, side = made
    key = f"{name}/v_{name}_g03_c01"
    video = side["videos"][key]
    frames, fps = decode(out / f"{key}.avi")
    assert frames.shape == (25, 64, 64, 3) and fps == 25
    centers = np.array([centroid(frame) for frame in frames])
    assert video["speed"] == 36 and video["class"] == name == video["shape"] + video["direction"]
    sign = {"Left": (-1, 0), "Right": (1, 0), "Up": (0, -1), "Down": (0, 1)}[video["direction"]]
    wanted = np.array(video["start"]) + np.arange(25)[:, None] * 36 / 25 * np.array(sign)
    assert np.abs(centers - wanted).max() < 0.2


def test_decoded_colors_are_the_palette_and_all_frames_are_as_drawn(made):
    out, side = made
    seen = set()
    for key in list(side["videos"])[::4]:
        video = side["videos"][key]
        frames, _ = decode(out / f"{key}.avi")
        seen.add(video["color"])
        for frame, drawn in zip(frames[::8], shapes.draw_clip(video, 64, 25)[::8], strict=True):
            x, y = centroid(drawn).astype(int)
            assert np.abs(frame[y - 2 : y + 3, x - 2 : x + 3].mean((0, 1)) - shapes.COLORS[video["color"]]).max() < 5
            assert np.abs(frame.astype(int) - drawn).mean() < 1.5
    assert seen == {"red", "green", "blue"}


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_coverage_adds_up_to_the_area_for_any_center(shape):
    for center in ((32, 32), (31.37, 30.61), (20.123, 40.5)):
        share = shapes.coverage(shape, center, 11.52, 64)
        assert share.min() >= 0 and share.max() <= 1 + 1e-12
        assert share.sum() == pytest.approx(shapes.AREAS[shape] * 11.52**2, rel=2e-3)
        assert centroid(share[..., None]) == pytest.approx(center, abs=0.01)


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_coverage_equals_the_count_of_points_inside(shape):
    center, radius, size, sub = (8.3, 7.9), 4.2, 16, 32
    ys, xs = (np.mgrid[: size * sub, : size * sub] + 0.5) / sub
    x, y = (xs - center[0]) / radius, (ys - center[1]) / radius
    naive = {
        "Circle": x**2 + y**2 < 1,
        "Square": np.maximum(abs(x), abs(y)) < np.sqrt(np.pi) / 2,
        "Triangle": (y < 2.3 / 3) & (y > -2 * 2.3 / 3 + 2 * abs(x)),
    }[shape]
    naive = naive.reshape(size, sub, size, sub).mean((1, 3))
    assert np.abs(shapes.coverage(shape, center, radius, size) - naive).max() < 0.03


@pytest.mark.parametrize("flags", [(), ("--seconds", 3, "--size", 32), ("--radius", 0.05, 0.19)])
def test_shapes_are_never_cut_off_and_cross_the_frame(tmp_path, flags):
    args = shapes.parse_args(["--out", str(tmp_path), "--videos-per-class", "4", *map(str, flags)])
    shapes.check_flags(args)
    for video in shapes.plan_videos(args)[0].values():
        distance = video["speed"] * (args.frames - 1) / 25
        assert video["speed"] * args.frames / 25 == pytest.approx(args.size * 9 / 16)
        for moved in (0, distance):
            center = np.array(video["start"]) + moved * np.array(shapes.DIRECTIONS[video["direction"]])
            share = shapes.coverage(video["shape"], center, video["radius"], args.size)
            assert share.sum() == pytest.approx(video["area"], rel=0.02)


def test_radii_colors_and_backgrounds_are_chosen_from_the_given_ones(tmp_path):
    flags = ("--radius", 0.1, 0.18, "--colors", "yellow", "cyan", "--backgrounds", "navy", "gray")
    side = make(tmp_path / "set", "--videos-per-class", 4, *flags)
    videos = side["videos"].values()
    radii = [video["radius"] / 64 for video in videos]
    assert 0.1 <= min(radii) < 0.12 and 0.16 < max(radii) <= 0.18
    assert {video["color"] for video in videos} == {"yellow", "cyan"}
    assert {video["background"] for video in videos} == {"navy", "gray"}
    key, video = next(iter(side["videos"].items()))
    frames, _ = decode(tmp_path / "set" / f"{key}.avi")
    assert np.abs(np.median(frames, axis=(0, 1, 2)) - video["background_rgb"]).max() <= 3


def test_shapes_json_describes_the_data_set(made):
    _, side = made
    assert {k: side[k] for k in ("version", "size", "fps", "seconds", "frames", "seed")} == {
        "version": shapes.VERSION, "size": 64, "fps": 25, "seconds": 1.0, "frames": 25, "seed": 0,
    }  # fmt: skip
    video = side["videos"]["CircleLeft/v_CircleLeft_g01_c01"]
    assert video["radius"] == pytest.approx(0.18 * 64) and video["area"] == pytest.approx(np.pi * (0.18 * 64) ** 2)
    assert video["rgb"] == list(shapes.COLORS[video["color"]]) and video["background_rgb"] == [0, 0, 0]


def test_a_second_run_with_the_same_flags_changes_nothing(made, capsys):
    out, _ = made
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    make(out, "--videos-per-class", 9)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert "already exists" in capsys.readouterr().out


def test_other_flags_or_other_contents_are_refused_and_not_changed(tmp_path, made):
    out, _ = made
    with pytest.raises(UserError, match="other flags"):
        make(out, "--videos-per-class", 10)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not Moving Shapes"):
        make(tmp_path)
    assert files_of(tmp_path) == {"notes.txt": b"mine"}
    with pytest.raises(UserError, match="not Moving Shapes"):
        shapes.already_made(tmp_path / "notes.txt", {})


def test_a_data_set_that_lost_a_video_is_refused(tmp_path):
    make(tmp_path / "set", "--videos-per-class", 2, "--size", 16)
    (tmp_path / "set/CircleUp/v_CircleUp_g02_c01.avi").unlink()
    with pytest.raises(UserError, match="lacks 1 of its 24"):
        make(tmp_path / "set", "--videos-per-class", 2, "--size", 16)


def test_an_interrupted_run_leaves_no_files(tmp_path, monkeypatch):
    write, written = shapes.write_video, []

    def interrupt(path, frames):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(path)
        write(path, frames)

    monkeypatch.setattr(shapes, "write_video", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "set")
    assert len(written) == 5 and list(tmp_path.iterdir()) == []


def test_as_a_script_it_exits_with_2_and_one_line_and_needs_no_pythonpath(tmp_path):
    command = [sys.executable, str(SCRIPTS / "make_moving_shapes.py"), "--out", str(tmp_path / "set"), "--size", "7"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "--size 7" in done.stderr


# prepare_ucf101.sh, with 3 videos in 2 classes and fake unpackers, which copy a folder instead of the archive.


@pytest.fixture
def ucf(tmp_path):
    """A function that runs the script on tmp_path/data/ucf-101 with the contents of two fake archives."""
    contents = tmp_path / "contents"
    for name in ("Archery/v_a_g01_c01", "Archery/v_a_g01_c02", "YoYo/v_y_g01_c01"):
        path = contents / "unrar" / "UCF-101" / f"{name}.avi"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (contents / "unzip/ucfTrainTestlist").mkdir(parents=True)
    (contents / "unzip/ucfTrainTestlist/trainlist01.txt").write_text("Archery/v_a_g01_c01.avi 1\n")
    tools, data = tmp_path / "bin", tmp_path / "data"
    tools.mkdir(), data.mkdir()
    for tool in ("unrar", "unzip"):
        last = '"${@: -1}"'
        (tools / tool).write_text(f'#!/usr/bin/env bash\nset -e\ncp -r "{contents}/{tool}/." {last}\n')
        (tools / tool).chmod(0o755)

    def run(**environment):
        variables = {"PATH": f"{tools}:{os.environ['PATH']}", "EXPECT_VIDEOS": "3", "EXPECT_CLASSES": "2"}
        command = ["bash", str(SCRIPTS / "prepare_ucf101.sh"), str(data / "ucf-101")]
        return subprocess.run(command, env={**os.environ, **variables, **environment}, capture_output=True, text=True)

    run.data = data
    return run


def add_archives(folder):
    folder.mkdir(exist_ok=True)
    for name in ("UCF101.rar", "UCF101TrainTestSplits-RecognitionTask.zip"):
        (folder / name).write_text("archive")


def test_ucf101_without_its_archives_names_the_downloads(ucf):
    done = ucf()
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "UCF101.rar" in done.stderr and "https://www.crcv.ucf.edu/data/UCF101.php" in done.stderr
    assert "UCF101TrainTestSplits-RecognitionTask.zip" in done.stderr and "holds 0 videos in 0 classes" in done.stderr
    (ucf.data / "UCF101.rar").write_text("archive")
    done = ucf()
    assert done.returncode == 2 and "UCF101TrainTestSplits-RecognitionTask.zip" in done.stderr


@pytest.mark.parametrize("where", [".", "ucf-101"])
def test_ucf101_is_arranged_and_a_second_run_changes_nothing(ucf, where):
    add_archives(ucf.data / where)
    done = ucf()
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (ucf.data / "ucf-101").rglob("*.avi")) == [
        "v_a_g01_c01.avi", "v_a_g01_c02.avi", "v_y_g01_c01.avi",
    ]  # fmt: skip
    assert (ucf.data / "ucfTrainTestlist/trainlist01.txt").is_file()
    assert not (ucf.data / "ucf-101.unpacking").exists()
    before = files_of(ucf.data)
    again = ucf(PATH="/usr/bin:/bin")
    assert again.returncode == 0 and "unpacking" not in again.stdout and files_of(ucf.data) == before


def test_ucf101_continues_after_an_interruption(ucf):
    add_archives(ucf.data)
    assert ucf().returncode == 0
    before = files_of(ucf.data)
    (ucf.data / "ucf-101/YoYo/v_y_g01_c01.avi").unlink()
    (ucf.data / "ucf-101/YoYo").rmdir()
    (ucf.data / "ucf-101.unpacking/UCF-101/Half").mkdir(parents=True)
    assert ucf().returncode == 0 and files_of(ucf.data) == before


def test_ucf101_with_missing_videos_or_foreign_files_is_refused(ucf):
    add_archives(ucf.data)
    done = ucf(EXPECT_VIDEOS="4")
    assert done.returncode == 2 and "3 videos in 2 classes" in done.stderr and "expected 4 videos" in done.stderr
    mine = ucf.data / "ucf-101/YoYo/mine.avi"
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("mine")
    done = ucf()
    assert done.returncode == 2 and "YoYo" in done.stderr and mine.read_text() == "mine"
