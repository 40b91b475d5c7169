"""The files of Moving Shapes, their exact content, and the script that arranges UCF-101."""

import json
import os
import shutil
import subprocess
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import center_of_mass

import make_moving_shapes as shapes
from process import write_commands
from tiny_videos import decode
from training import content, record_calls, refused

SCRIPTS = Path(shapes.__file__).parent
SMALL = "--videos-per-class", 2, "--size", 16


def make(out, *flags):
    shapes.main(["--out", str(out), *map(str, flags)])
    return json.loads((out / "shapes.json").read_text())


def plan(*flags):
    args = shapes.parse_args(["--out", "x", *map(str, flags)])
    args = Namespace(**vars(args), frames=round(args.seconds * 25))
    return args, shapes.plan_videos(args)


def centroid(frame):
    """(x, y) of a bright shape on black, px."""
    return np.array(center_of_mass(frame.astype(float).sum(-1))[::-1]) + 0.5


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "moving-shapes"
    return out, make(out, "--videos-per-class", 9)


def test_the_bytes_of_a_video_depend_only_on_the_flags(tmp_path, made):
    for name, seed in (("set", 0), ("again", 0), ("other", 1)):
        make(tmp_path / name, *SMALL, "--seed", seed)
    same, again, other = (content(tmp_path / name) for name in ("set", "again", "other"))
    assert same == again and same.keys() == other.keys()
    assert all(same[name] != other[name] for name in same if name.endswith(".avi"))
    make(tmp_path / "few", "--videos-per-class", 2)
    all_files = content(made[0])
    few = content(tmp_path / "few")
    assert all(few[name] == all_files[name] for name in few if "_g01_c01" in name)
    assert not [
        name for name, data in all_files.items() if b"Lav" in data
    ]  # the name of the encoder


def test_moving_shapes_has_the_layout_and_split_lists_of_ucf101(made):
    out, side = made
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == sorted(
        [*shapes.CLASSES, "ucfTrainTestlist"]
    )
    lists = (
        out / f"ucfTrainTestlist/{name}.txt" for name in ("classInd", "trainlist01", "testlist01")
    )
    index, train, test = (path.read_text().splitlines() for path in lists)
    assert index == [f"{number} {name}" for number, name in enumerate(sorted(shapes.CLASSES), 1)]
    train = dict(line.split() for line in train)
    assert all(f"{class_id} {name.split('/')[0]}" in index for name, class_id in train.items())
    listed = sorted([*train, *test])
    assert listed == sorted(str(p.relative_to(out)) for p in out.rglob("*.avi"))
    assert listed == sorted(f"{key}.avi" for key in side["videos"])
    assert {name.split("_")[2] for name in test} == {"g01"} and not any(
        "_g01_" in name for name in train
    )
    assert set(Counter(name.split("/")[0] for name in test).values()) == {
        2
    }  # of 9: group 1 holds clips 1 and 2
    _, videos = plan()
    assert 0.1 <= sum("_g01_" in key for key in videos) / len(videos) <= 0.2
    assert {video["color"] for video in videos.values()} == {"red", "green", "blue"}


def test_decoded_videos_show_what_shapes_json_says(made):
    out, side = made
    found = {name: side[name] for name in ("version", "size", "fps", "seconds", "frames", "seed")}
    assert found == {"version": 1, "size": 64, "fps": 25, "seconds": 1.0, "frames": 25, "seed": 0}
    for name in shapes.CLASSES[::3]:  # each shape and direction
        key = f"{name}/v_{name}_g03_c01"
        video = side["videos"][key]
        frames, fps = decode(out / f"{key}.avi")
        assert frames.shape == (25, 64, 64, 3) and fps == 25
        assert video["class"] == name == video["shape"] + video["direction"]
        sign = {"Left": (-1, 0), "Right": (1, 0), "Up": (0, -1), "Down": (0, 1)}[video["direction"]]
        centers = np.array(video["start"]) + np.arange(25)[:, None] * 36 / 25 * np.array(sign)
        drawn = shapes.draw_clip(video, 64, 25)
        for frame, exact, center in zip(frames, drawn, centers, strict=True):
            assert np.abs(centroid(frame) - center).max() < 0.2
            assert np.abs(frame.astype(int) - exact).mean() < 1.5
            x, y = centroid(exact).astype(int)
            assert (
                np.abs(
                    frame[y - 2 : y + 3, x - 2 : x + 3].mean((0, 1)) - shapes.COLORS[video["color"]]
                ).max()
                < 5
            )
        assert video["rgb"] == list(shapes.COLORS[video["color"]]) and video["background_rgb"] == [
            0,
            0,
            0,
        ]


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_coverage_equals_a_count_of_points_and_sums_to_the_area(shape):
    for center in ((32, 32), (31.37, 30.61), (20.123, 40.5)):
        share = shapes.coverage(shape, center, 11.52, 64)
        assert share.min() >= 0 and share.max() <= 1 + 1e-12
        assert share.sum() == pytest.approx(shapes.AREAS[shape] * 11.52**2, rel=2e-3)
        assert centroid(share[..., None]) == pytest.approx(center, abs=0.01)
    center = (8.3, 7.9)
    radius = 4.2
    size = 16
    sub = 32
    ys, xs = (np.mgrid[: size * sub, : size * sub] + 0.5) / sub
    x = (xs - center[0]) / radius
    y = (ys - center[1]) / radius
    inside = {
        "Circle": x**2 + y**2 < 1,
        "Square": np.maximum(abs(x), abs(y)) < np.sqrt(np.pi) / 2,
        "Triangle": (y < 2.3 / 3) & (y > -2 * 2.3 / 3 + 2 * abs(x)),
    }[shape]
    naive = inside.reshape(size, sub, size, sub).mean((1, 3))
    assert np.abs(shapes.coverage(shape, center, radius, size) - naive).max() < 0.03


@pytest.mark.parametrize("flags", [(), ("--seconds", 3, "--size", 32), ("--radius", 0.05, 0.19)])
def test_shapes_are_never_cut_off_and_cross_the_frame(flags):
    args, videos = plan("--videos-per-class", 4, *flags)
    for video in videos.values():
        distance = video["speed"] * (args.frames - 1) / 25
        assert video["speed"] * args.frames / 25 == pytest.approx(args.size * 9 / 16)
        for moved in (0, distance):
            center = np.array(video["start"]) + moved * np.array(
                shapes.DIRECTIONS[video["direction"]]
            )
            share = shapes.coverage(video["shape"], center, video["radius"], args.size)
            assert share.sum() == pytest.approx(video["area"], rel=0.02)


def test_radii_colors_and_backgrounds_come_from_the_flags():
    flags = "--radius", 0.1, 0.18, "--colors", "yellow", "cyan", "--backgrounds", "navy", "gray"
    videos = plan("--videos-per-class", 4, *flags)[1].values()
    radii = [video["radius"] / 64 for video in videos]
    assert 0.1 <= min(radii) < 0.12 and 0.16 < max(radii) <= 0.18
    assert {video["color"] for video in videos} == {"yellow", "cyan"}
    for video in videos:
        background = np.median(shapes.draw_clip(video, 64, 25), axis=(0, 1, 2))
        assert (
            tuple(background)
            == shapes.BACKGROUNDS[video["background"]]
            in ((10, 20, 50), (40, 40, 40))
        )


def test_a_folder_with_other_content_is_refused_and_not_changed(tmp_path, made, capsys):
    out = shutil.copytree(made[0], tmp_path / "set")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    make(out, "--videos-per-class", 9)
    assert "already exists" in capsys.readouterr().out
    assert "other flags" in refused(capsys, shapes, "--out", out, "--videos-per-class", 10)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (KeyboardInterrupt(), 130, ""),
        (
            OSError(28, "No space left on device"),
            1,
            "set can't be written (No space left on device; the disk",
        ),
    ],
)
def test_an_interrupted_run_or_a_full_disk_leaves_no_files(
    error, status, words, tmp_path, monkeypatch, capsys
):
    def fail_late(*_):
        if len(written) == 5:
            raise error

    written = record_calls(monkeypatch, shapes, "write_video", fail_late)
    with pytest.raises(SystemExit, match=f"^{status}$"):
        make(tmp_path / "set")
    assert words in capsys.readouterr().err and len(written) == 5 and not list(tmp_path.iterdir())


# prepare_ucf101.sh, with 3 videos in 2 classes and fake unpackers that copy a folder.


@pytest.fixture
def ucf(tmp_path):
    """A function that runs the script on tmp_path/data/ucf-101 with the contents of two fake
    archives.
    """
    contents, tools, data = (tmp_path / name for name in ("contents", "bin", "data"))
    files = {
        f"unrar/UCF-101/{name}.avi": name
        for name in ("Archery/v_a_g01_c01", "Archery/v_a_g01_c02", "YoYo/v_y")
    }
    files["unzip/ucfTrainTestlist/trainlist01.txt"] = "Archery/v_a_g01_c01.avi 1\n"
    for name, text in files.items():
        (contents / name).parent.mkdir(parents=True, exist_ok=True)
        (contents / name).write_text(text)
    tools.mkdir(), data.mkdir()
    write_commands(
        tools, {tool: f'cp -r "{contents}/{tool}/." "${{@: -1}}"' for tool in ("unrar", "unzip")}
    )

    def run(status=0, archives=None, **environment):
        """Returns (what is printed as an error, in one line; the files after it)."""
        if archives:
            (data / archives).mkdir(exist_ok=True)
            for name in ("UCF101.rar", "UCF101TrainTestSplits-RecognitionTask.zip"):
                (data / archives / name).write_text("archive")
        variables = {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "EXPECT_VIDEOS": "3",
            "EXPECT_CLASSES": "2",
        }
        command = ["bash", str(SCRIPTS / "prepare_ucf101.sh"), str(data / "ucf-101")]
        done = subprocess.run(
            command, env=os.environ | variables | environment, capture_output=True, text=True
        )
        assert (done.returncode, len(done.stderr.splitlines())) == (status, int(status == 2)), (
            done.stderr
        )
        return done.stderr, content(data)

    run.data = data
    return run


@pytest.mark.parametrize("where", [".", "ucf-101"])
def test_ucf101_is_arranged_and_resumes_after_an_interruption(ucf, where):
    _, files = ucf(archives=where)
    names = ["Archery/v_a_g01_c01.avi", "Archery/v_a_g01_c02.avi", "YoYo/v_y.avi"]
    assert [name for name in files if name.endswith(".avi")] == [
        f"ucf-101/{name}" for name in names
    ]
    assert "ucfTrainTestlist/trainlist01.txt" in files
    assert ucf(PATH="/usr/bin:/bin")[1] == files  # nothing is unpacked again
    shutil.rmtree(ucf.data / "ucf-101/YoYo")
    (ucf.data / "ucf-101.unpacking/UCF-101/Half").mkdir(parents=True)
    assert ucf()[1] == files and not (ucf.data / "ucf-101.unpacking").exists()


def test_ucf101_without_archives_with_missing_videos_or_foreign_files_is_refused(ucf):
    error, _ = ucf(status=2)
    for words in (
        "UCF101.rar",
        "https://www.crcv.ucf.edu/data/UCF101.php",
        "holds 0 videos in 0 classes",
    ):
        assert words in error
    (ucf.data / "UCF101.rar").write_text("archive")
    assert "UCF101TrainTestSplits-RecognitionTask.zip" in ucf(status=2)[0]
    error, _ = ucf(status=2, archives=".", EXPECT_VIDEOS="4")
    assert "3 videos in 2 classes" in error and "expected 4 videos" in error
    mine = ucf.data / "ucf-101/YoYo/mine.avi"
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("mine")
    assert "YoYo" in ucf(status=2)[0] and mine.read_text() == "mine"
