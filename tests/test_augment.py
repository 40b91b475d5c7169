"""Copies of training videos that look different: which there are, and what is changed in them."""

import json
import shutil

import numpy as np
import pytest

import augment
from test_prepare import check_second_run
from tiny_videos import decode, write_equal_videos
from training import content, no_space, refused, run_main
from video.actions import open_actions
from video.index import scan_videos, split_videos


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two classes of two videos each."""
    return write_equal_videos(tmp_path_factory.mktemp("few") / "videos", 6)


@pytest.fixture(scope="module")
def larger(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("more") / "out"
    run_main(augment, "--data-path", data, "--out", out, "--copies", 2)
    return out


def test_only_training_videos_have_copies_and_no_two_are_equal(data, larger):
    train, val = split_videos(str(data), scan_videos(str(data)).videos, 0.05)
    more, same = split_videos(str(larger), scan_videos(str(larger)).videos, 0.5)  # the lists decide
    assert [video.key for video in same] == [video.key for video in val]
    suffixes = "", "-copy1", "-copy2"
    copies = [video.key + suffix for video in train for suffix in suffixes]
    assert sorted(video.key for video in more) == sorted(copies)
    for video in (*train, *val):
        assert (larger / video.path).read_bytes() == (data / video.path).read_bytes()
    paths = {video.key: larger / video.path for video in more}
    for video in train:
        (own, fps), *others = (decode(paths[video.key + suffix]) for suffix in suffixes)
        assert all(frames.shape == own.shape and rate == fps for frames, rate in others)
        assert not np.array_equal(own, others[0][0])
        assert not np.array_equal(others[0][0], others[1][0])
        for frames, _ in others:  # the right half of all frames is white, and stays the same color
            assert np.ptp(frames[:, 10:-10, -10:].astype(int), axis=0).max() <= 4
            # the left half of the first one is black
            assert np.ptp(frames[0].astype(int), axis=1).max() > 10


def test_again_it_does_only_what_is_missing_and_makes_the_same_bytes(data, larger):
    copy = next(larger.rglob("*-copy2.mkv"))
    check_second_run(copy, augment, "--data-path", data, "--out", larger, "--copies", 2)


def test_copies_have_actions_and_corrupt_videos_are_named(data, tmp_path, capsys):
    root = shutil.copytree(data, tmp_path / "data")
    (root / "A/torn.avi").write_bytes(b"RIFF")
    (root / "actions.json").write_text(json.dumps({"names": ["stay"]}))
    for number, video in enumerate(scan_videos(str(root)).videos):
        np.save(root / f"{video.key}.actions.npy", np.full(6, -(number % 2)))
    flags = ["--data-path", root, "--out", tmp_path / "out", "--copies", 1]
    run_main(augment, *flags)
    assert "A/torn.avi can't be opened; it is skipped" in capsys.readouterr().out
    videos = scan_videos(str(tmp_path / "out")).videos
    actions = open_actions(tmp_path / "out", videos)
    originals = {video.key: actions.of_video(video) for video in videos}
    assert len(videos) > 4
    for key, of_video in originals.items():
        assert np.array_equal(of_video, originals[key.removesuffix("-copy1")])
    assert "has copies of seed 0" in refused(capsys, augment, *flags, "--seed", 1)
    flags = ["--data-path", tmp_path / "out", "--out", tmp_path / "again", "--copies", 1]
    assert "-copy1, the name of a copy" in refused(capsys, augment, *flags)


@pytest.mark.parametrize("is_there", [False, True])
def test_a_full_disk_leaves_no_data_set_and_the_next_run_completes_it(
    is_there, data, larger, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    if is_there:  # an empty folder
        out.mkdir()
    flags = ["--data-path", data, "--out", out, "--copies", 2]
    with monkeypatch.context() as patch:
        patch.setattr(augment, "write_lossless", no_space)
        run_main(augment, *flags, status=1)
    error = capsys.readouterr().err
    assert "copy1.mkv can't be written (No space left on device; the disk" in error
    assert not out.exists() or not any(out.iterdir())
    run_main(augment, *flags)
    assert content(out).keys() == content(larger).keys()
    assert [*tmp_path.iterdir()] == [out]
