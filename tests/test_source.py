"""Clips of files, and --cache-frames: a cache of their pixels that changes no clip, however it came
about.
"""

import os
import shutil
import signal
from unittest.mock import Mock

import pytest
import torch

import train
from process import end, python
from tiny_data import make_latents
from tiny_videos import clips_of, scribble, write_images, write_mixed_videos, write_video
from training import Training, error_of, no_space, record_calls, refused
from video import source
from video.source import CachedFiles, check_data_path, open_source

SIZE, STEPS = 32, 5


def cached(files, folder):
    found = CachedFiles(files, folder)
    found.fill()
    return found


@pytest.fixture
def decoded(monkeypatch):
    """The paths of the videos that are decoded into a cache from here on."""
    return record_calls(monkeypatch, source, "read_all_frames", lambda root, video: video.path)


@pytest.mark.parametrize("kind", ["videos", "images", "corrupt"])
def test_clips_are_the_same_bit_for_bit_with_and_without_a_cache(tmp_path, kind):
    write = write_images if kind == "images" else write_mixed_videos
    files = open_source(write(tmp_path / "data"), SIZE, images=kind == "images")
    if kind == "corrupt":
        scribble(tmp_path / "data/Run/a.avi")
    bad = 0
    frames = 1 if kind == "images" else 5
    plain, found = (
        clips_of(one, frames, frame_interval=(1, 3)) for one in (files, cached(files, tmp_path))
    )
    for index in range(30):
        expected = plain[index]
        sample = found[index]
        assert torch.equal(expected.pop("clip"), sample.pop("clip")) and expected == sample
        bad += len(sample["corrupt"])
    assert (bad > 0) == (kind == "corrupt")
    missing = [video.path for video in files.videos() if not found.source.place(video).exists()]
    assert missing == (["Run/a.avi"] if kind == "corrupt" else [])


def test_a_later_run_decodes_only_videos_that_have_changed(tmp_path, decoded):
    root = write_mixed_videos(tmp_path / "data")
    files = open_source(root, SIZE)
    cached(files, tmp_path)
    assert sorted(decoded) == [video.path for video in files.videos()]
    write_video(root / "Run/b.mp4", 50, codec="libx264", size=(48, 48))
    os.utime(root / "Run/c.mkv", ns=(1, 1))  # its content may have changed
    scribble(root / "Run/a.avi")
    decoded.clear()
    files = open_source(root, SIZE)
    again = cached(files, tmp_path)
    assert sorted(decoded) == ["Run/a.avi", "Run/b.mp4", "Run/c.mkv"]
    assert not again.place(
        files.videos()[2]
    ).exists()  # its frames from before are not taken for those of now
    plain, found = (clips_of(one, 5, frame_interval=(1, 3)) for one in (files, again))
    for index in range(10):
        assert torch.equal(plain[index]["clip"], found[index]["clip"])
    shutil.rmtree(again.folder)
    assert torch.equal(plain[0]["clip"], found[0]["clip"])
    assert cached(open_source(root, 16), tmp_path).folder != again.folder


FILL = """
import os, sys
from video import source
def counted(path, files, video, metadata, write=source.write_pixels):
    with open({1!r} + "/decoded", "a") as file:
        print(video.path, file=file)
    write(path, files, video, metadata)
    {2}
source.THREADS, source.write_pixels = 1, counted
source.CachedFiles(source.open_source({0!r}, 32), {1!r}).fill()
"""


def test_videos_are_written_a_few_at_a_time_and_no_more_after_an_error():
    started = []

    def write(video):
        started.append(video)
        if video == 9:
            raise OSError("full")

    done = source.write_each(range(100), write, threads=2)
    count = 0
    with pytest.raises(OSError, match="full"):
        for video, _ in done:
            count += 1
            assert video == count - 1 and len(started) <= count + 4
    assert count == 9 and len(started) <= 14


def test_a_folder_without_locks_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(
        source.fcntl, "flock", Mock(side_effect=OSError(38, "Function not implemented"))
    )
    line = error_of(cached, open_source(write_mixed_videos(tmp_path / "data"), SIZE), tmp_path)
    words = "can't be locked (Function not implemented): move --results-dir"
    assert line.startswith("--cache-frames: ") and words in line


def test_runs_at_once_fill_the_cache_of_a_killed_run_and_decode_each_video_once(tmp_path, decoded):
    root = str(write_mixed_videos(tmp_path / "data"))
    kill = "os.replace = lambda *_: os.kill(os.getpid(), 9)"  # of the next file, once it is written
    for ends, status, left in (([kill], -signal.SIGKILL, 1), (["", ""], 0, 0)):
        for process in [python(FILL.format(root, str(tmp_path), last)) for last in ends]:
            end(process, status, timeout=120)
        assert len(list(tmp_path.glob(".pixels*/*.tmp"))) == left
    files = open_source(root, SIZE)
    paths = (tmp_path / "decoded").read_text().split()
    first, *others = (video.path for video in files.videos())
    assert paths[:2] == [first, others[0]] and sorted(paths[2:]) == others
    plain, found = (
        clips_of(one, 5, frame_interval=(1, 3)) for one in (files, cached(files, tmp_path))
    )
    assert (
        all(torch.equal(plain[index]["clip"], found[index]["clip"]) for index in range(10))
        and not decoded
    )


def test_too_much_is_refused_before_anything_is_made_unless_it_is_forced(
    shapes, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(source, "LARGEST", 400_000)
    line = refused(
        capsys, train, *Training(shapes, tmp_path / "runs", STEPS).command_flags("--cache-frames")
    )
    assert "--cache-frames: 24 videos take 0.5 MB" in line and "add --cache-frames-force" in line
    assert not (tmp_path / "runs").exists()
    CachedFiles(open_source(shapes, 16), tmp_path / "runs", force=True)


def test_a_disk_that_fills_up_is_one_line_and_a_cache_needs_no_other(tmp_path, monkeypatch):
    files = open_source(write_mixed_videos(tmp_path / "data"), SIZE)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(source, "THREADS", 1)
        calls = record_calls(
            patch, os, "fsync", lambda _: len(calls) >= 4 and no_space()
        )  # two calls per file
        cached(files, tmp_path)
    assert (
        not list(tmp_path.rglob("*.tmp"))
        and len(list(tmp_path.glob(".pixels*/*.safetensors"))) == 2
    )
    make_latents(tmp_path / "latents")
    error = error_of(CachedFiles, open_source(tmp_path / "latents", 16), tmp_path)
    assert error.startswith("--cache-frames: --data-path is a cache")
    check_data_path(tmp_path / "latents")
    error = error_of(check_data_path, tmp_path / "latents", cached=False)
    assert "a latent cache; name the folder of its videos" in error
