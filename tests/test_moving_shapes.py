"""The files of Moving Shapes, their exact content, and the script that arranges UCF-101."""

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
from runtime.untrusted import read_json
from tiny_videos import decode
from training import content, record_calls, refused, snapshot

SCRIPTS = Path(shapes.__file__).parent


def make(out, *flags):
    shapes.main(["--out", str(out), *map(str, flags)])
    return read_json(out / "shapes.json")


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
    make(tmp_path / "few", "--videos-per-class", 2)
    make(tmp_path / "other", "--videos-per-class", 2, "--seed", 1)
    few = content(tmp_path / "few")
    other = content(tmp_path / "other")
    assert few.keys() == other.keys()
    assert all(few[name] != other[name] for name in few if name.endswith(".avi"))
    every = content(made[0])
    assert all(few[name] == every[name] for name in few if "_g01_c01" in name)
    assert not any(b"Lav" in data for data in every.values())  # the name of the encoder


def test_moving_shapes_has_the_layout_and_split_lists_of_ucf101(made):
    out, side = made
    folders = {path.name for path in out.iterdir() if path.is_dir()}
    assert folders == {*shapes.CLASSES, "ucfTrainTestlist"}
    index, train, test = (
        (out / f"ucfTrainTestlist/{name}.txt").read_text().splitlines()
        for name in ("classInd", "trainlist01", "testlist01")
    )
    assert index == [f"{number} {name}" for number, name in enumerate(sorted(shapes.CLASSES), 1)]
    train = dict(line.split() for line in train)
    assert all(f"{class_id} {name.split('/')[0]}" in index for name, class_id in train.items())
    listed = sorted([*train, *test])
    assert listed == sorted(str(path.relative_to(out)) for path in out.rglob("*.avi"))
    assert listed == sorted(f"{key}.avi" for key in side["videos"])
    assert all("_g01_" in name for name in test) and not any("_g01_" in name for name in train)
    # of 9: group 1 holds clips 1 and 2
    assert set(Counter(name.split("/")[0] for name in test).values()) == {2}
    _, videos = plan()
    assert 0.1 <= sum("_g01_" in key for key in videos) / len(videos) <= 0.2
    assert {video["color"] for video in videos.values()} == {"red", "green", "blue"}


def test_decoded_videos_show_what_shapes_json_says(made):
    out, side = made
    about = {"version": 1, "size": 64, "fps": 25, "seconds": 1.0, "frames": 25, "seed": 0}
    assert side.items() >= about.items()
    for name in shapes.CLASSES[::3]:  # each shape and direction
        key = f"{name}/v_{name}_g03_c01"
        video = side["videos"][key]
        frames, fps = decode(out / f"{key}.avi")
        assert fps == 25
        assert video["class"] == name == video["shape"] + video["direction"]
        sign = {"Left": (-1, 0), "Right": (1, 0), "Up": (0, -1), "Down": (0, 1)}[video["direction"]]
        centers = np.array(video["start"]) + np.arange(25)[:, None] * 36 / 25 * np.array(sign)
        drawn = shapes.draw_clip(video, 64, 25)
        for frame, exact, center in zip(frames, drawn, centers, strict=True):
            assert np.abs(centroid(frame) - center).max() < 0.2
            assert np.abs(frame.astype(int) - exact).mean() < 1.5
            x, y = centroid(exact).astype(int)
            color = frame[y - 2 : y + 3, x - 2 : x + 3].mean((0, 1))
            assert np.abs(color - shapes.COLORS[video["color"]]).max() < 5
        assert video["rgb"] == list(shapes.COLORS[video["color"]])
        assert video["background_rgb"] == [0, 0, 0]


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_coverage_equals_a_count_of_points_and_sums_to_the_area(shape):
    for center in ((32, 32), (31.37, 30.61), (20.123, 40.5)):
        share = shapes.coverage(shape, center, 11.52, 64)
        assert share.min() >= 0 and share.max() <= 1 + 1e-12
        assert share.sum() == pytest.approx(shapes.AREAS[shape] * 11.52**2, rel=2e-3)
        assert centroid(share[..., None]) == pytest.approx(center, abs=0.01)
    ys, xs = (np.mgrid[: 16 * 32, : 16 * 32] + 0.5) / 32
    x = (xs - 8.3) / 4.2
    y = (ys - 7.9) / 4.2
    inside = {
        "Circle": x**2 + y**2 < 1,
        "Square": np.maximum(abs(x), abs(y)) < np.sqrt(np.pi) / 2,
        "Triangle": (y < 2.3 / 3) & (y > -2 * 2.3 / 3 + 2 * abs(x)),
    }[shape]
    naive = inside.reshape(16, 32, 16, 32).mean((1, 3))
    assert np.abs(shapes.coverage(shape, (8.3, 7.9), 4.2, 16) - naive).max() < 0.03


@pytest.mark.parametrize("flags", ["", "--seconds 3 --size 32", "--radius 0.05 0.19"])
def test_shapes_are_never_cut_off_and_cross_the_frame(flags):
    args, videos = plan("--videos-per-class", 4, *flags.split())
    for video in videos.values():
        distance = video["speed"] * (args.frames - 1) / 25
        assert video["speed"] * args.frames / 25 == pytest.approx(args.size * 9 / 16)
        for moved in (0, distance):
            direction = np.array(shapes.DIRECTIONS[video["direction"]])
            center = np.array(video["start"]) + moved * direction
            share = shapes.coverage(video["shape"], center, video["radius"], args.size)
            assert share.sum() == pytest.approx(video["area"], rel=0.02)


def test_radii_colors_and_backgrounds_come_from_the_flags():
    flags = "--radius 0.1 0.18 --colors yellow cyan --backgrounds navy gray --videos-per-class 4"
    videos = plan(*flags.split())[1].values()
    radii = [video["radius"] / 64 for video in videos]
    assert 0.1 <= min(radii) < 0.12 and 0.16 < max(radii) <= 0.18
    assert {video["color"] for video in videos} == {"yellow", "cyan"}
    for video in videos:
        assert video["background"] in ("navy", "gray")
        background = np.median(shapes.draw_clip(video, 64, 25), axis=(0, 1, 2))
        assert tuple(background) == shapes.BACKGROUNDS[video["background"]]


def test_a_link_to_an_empty_folder_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "link"
    link.symlink_to("disk")
    make(link, "--videos-per-class", 2)
    assert link.is_symlink()
    assert (tmp_path / "disk/shapes.json").exists()


def test_a_folder_with_other_content_is_refused_and_not_changed(tmp_path, made, capsys):
    out = shutil.copytree(made[0], tmp_path / "set")
    before = snapshot(out)
    make(out, "--videos-per-class", 9)
    assert "already exists" in capsys.readouterr().out
    assert "other flags" in refused(capsys, shapes, "--out", out, "--videos-per-class", 10)
    assert snapshot(out) == before


@pytest.mark.parametrize(
    "error, status, words",
    [
        (KeyboardInterrupt(), 130, ""),
        (OSError(28, "No space left"), 1, "set can't be written (No space left; the disk"),
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

VIDEOS = "Archery/v_a_g01_c01.avi", "Archery/v_a_g01_c02.avi", "YoYo/v_y.avi"


@pytest.fixture
def ucf(tmp_path):
    """A function that runs the script on tmp_path/data/ucf-101 with the contents of two fake
    archives.
    """
    contents = tmp_path / "contents"
    tools = tmp_path / "bin"
    data = tmp_path / "data"
    files = [f"unrar/UCF-101/{name}" for name in VIDEOS]
    for name in [*files, "unzip/ucfTrainTestlist/trainlist01.txt"]:
        (contents / name).parent.mkdir(parents=True, exist_ok=True)
        (contents / name).write_text(name)
    tools.mkdir()
    data.mkdir()
    commands = {tool: f'cp -r "{contents}/{tool}/." "${{@: -1}}"' for tool in ("unrar", "unzip")}
    write_commands(tools, commands)

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
        environment = os.environ | variables | environment
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        assert len(done.stderr.splitlines()) == int(status == 2), done.stderr
        return done.stderr, content(data)

    run.data = data
    return run


@pytest.mark.parametrize("where", [".", "ucf-101"])
def test_ucf101_is_arranged_and_resumes_after_an_interruption(ucf, where):
    _, files = ucf(archives=where)
    assert files.keys() >= {f"ucf-101/{name}" for name in VIDEOS}
    assert "ucfTrainTestlist/trainlist01.txt" in files
    assert ucf(PATH="/usr/bin:/bin")[1] == files  # nothing is unpacked again
    shutil.rmtree(ucf.data / "ucf-101/YoYo")
    (ucf.data / "ucf-101.unpacking/UCF-101/Half").mkdir(parents=True)
    assert ucf()[1] == files and not (ucf.data / "ucf-101.unpacking").exists()


def test_ucf101_may_be_a_link(ucf):
    ucf(archives=".")
    folder = ucf.data / "ucf-101"
    folder.rename(ucf.data / "disk")
    folder.symlink_to("disk")
    for name in ("UCF101.rar", "UCF101TrainTestSplits-RecognitionTask.zip"):
        (ucf.data / name).unlink()
    ucf()


def test_ucf101_without_archives_with_missing_videos_or_foreign_files_is_refused(ucf):
    error, _ = ucf(status=2)
    assert "UCF101.rar" in error and "https://www.crcv.ucf.edu/data/UCF101.php" in error
    (ucf.data / "UCF101.rar").write_text("archive")
    assert "UCF101TrainTestSplits-RecognitionTask.zip" in ucf(status=2)[0]
    error, _ = ucf(status=2, archives=".", EXPECT_VIDEOS="4")
    assert "3 videos in 2 classes" in error and "expected 4 videos" in error
    mine = ucf.data / "ucf-101/YoYo/mine.avi"
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("mine")
    assert "YoYo" in ucf(status=2)[0] and mine.read_text() == "mine"
