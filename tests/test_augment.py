"""Copies of training videos that look different: which there are, and what is changed in them."""

import sys

import numpy as np
import pytest

from tiny_videos import write_video
from training import ROOT, run_main
from video.files import read_frames
from video.index import scan_videos, split_videos
from video.writers import write_lossless

sys.path.insert(0, str(ROOT / "datasets"))
import augment

FRAMES = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two classes of two videos each."""
    root = tmp_path_factory.mktemp("few") / "videos"
    for name in ("Run/a.avi", "Run/b.mkv", "Jump/c.avi", "Jump/d.avi"):
        write_video(root / name, FRAMES)
    return root


@pytest.fixture(scope="module")
def larger(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("more") / "out"
    run_main(augment, "--data-path", data, "--out", out, "--copies", 2)
    return out


def frames_of(root, video):
    return read_frames(root, video, range(video.num_frames))


def test_training_videos_have_copies_and_those_that_validate_do_not(data, larger):
    before = split_videos(str(data), scan_videos(str(data)).videos, 0.05)
    train, val = split_videos(str(larger), scan_videos(str(larger)).videos, 0.5)  # the lists decide
    assert [video.key for video in val] == [video.key for video in before[1]]
    keys = [video.key + suffix for video in before[0] for suffix in ("", "-copy1", "-copy2")]
    assert sorted(video.key for video in train) == sorted(keys)
    for video in scan_videos(str(data)).videos:
        assert (larger / video.path).read_bytes() == (data / video.path).read_bytes()


def test_all_frames_of_a_copy_are_changed_alike_and_each_copy_is_another(larger):
    videos = {video.key: video for video in scan_videos(str(larger)).videos}
    copy = next(key for key in videos if key.endswith("-copy1"))
    own, one, other = (frames_of(larger, videos[copy[:-6] + suffix]) for suffix in ("", "-copy1", "-copy2"))
    assert own.shape == one.shape and videos[copy].fps == videos[copy[:-6]].fps
    assert not np.array_equal(one, own) and not np.array_equal(one, other)
    for frames in (one, other):  # the right half of all frames is white, and stays the same color
        assert np.ptp(frames[:, 10:-10, -10:].astype(int), axis=0).max() <= 4


def test_again_it_does_only_what_is_missing_and_makes_the_same_bytes(data, larger):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in larger.rglob("*.*")}
    copy = next(path for path in before if path.stem.endswith("-copy2"))
    copy.unlink()
    run_main(augment, "--data-path", data, "--out", larger, "--copies", 2)
    for path, (changed, content) in before.items():
        assert path.read_bytes() == content
        assert path.stat().st_mtime_ns == changed or path == copy or "ucf" in str(path)


def test_what_is_wrong_is_one_line(data, larger, tmp_path, capsys):
    for flags, line in (
        (["--data-path", "nowhere", "--out", tmp_path], "--data-path nowhere: no such folder"),
        (["--data-path", data, "--out", data], "the same as --data-path"),
        (["--data-path", data, "--out", larger, "--copies", 1], "copy2.mkv, which is not of these copies"),
    ):
        run_main(augment, *flags, status=2)
        error = capsys.readouterr().err
        assert line in error and error.count("\n") == 1


@pytest.mark.parametrize("size", [(16, 16), (33, 47)])
def test_a_lossless_video_decodes_to_the_very_same_pixels(tmp_path, size):
    frames = np.random.default_rng(0).integers(0, 256, (5, *size, 3), dtype=np.uint8)
    (tmp_path / "A").mkdir()
    write_lossless(tmp_path / "A/a.mkv", frames, 12.5)
    (video,) = scan_videos(str(tmp_path)).videos
    assert (video.num_frames, video.fps) == (5, 12.5)
    assert np.array_equal(frames_of(tmp_path, video), frames)
    assert [path.name for path in (tmp_path / "A").iterdir()] == ["a.mkv"]
