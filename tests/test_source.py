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
from process import fork
from tiny_data import make_latents
from tiny_videos import clips_of, scribble, write_images, write_mixed_videos, write_video
from training import Training, error_of, no_space, record_calls, refused
from video import source
from video.source import CachedFiles, open_source

SIZE = 32


def fill_cache(files, folder):
    cache = CachedFiles(files, folder)
    cache.fill()
    return cache


def assert_same_clips(files, cache, num_frames=5):
    """Returns the number of corrupt videos that the clips replace."""
    expected_clips = clips_of(files, num_frames, frame_interval=(1, 3))
    clips = clips_of(cache, num_frames, frame_interval=(1, 3))
    num_corrupt = 0
    for index in range(20):
        expected = expected_clips[index]
        sample = clips[index]
        assert torch.equal(sample.pop("clip"), expected.pop("clip"))
        assert sample == expected
        num_corrupt += len(sample["corrupt"])
    return num_corrupt


@pytest.fixture
def decoded(monkeypatch):
    """The paths of the videos that are decoded into a cache from here on."""
    return record_calls(
        monkeypatch, source, "read_all_frames", lambda root, video, chunk_size: video.path
    )


def test_clips_of_images_are_the_same_bit_for_bit_with_a_cache(tmp_path):
    files = open_source(write_images(tmp_path / "data"), SIZE, images=True)
    assert assert_same_clips(files, fill_cache(files, tmp_path), num_frames=1) == 0


def test_clips_are_the_same_bit_for_bit_also_if_a_video_is_corrupt(tmp_path):
    files = open_source(write_mixed_videos(tmp_path / "data"), SIZE)
    assert assert_same_clips(files, fill_cache(files, tmp_path)) == 0
    scribble(tmp_path / "data/Run/a.avi")
    cache = fill_cache(files, tmp_path)
    assert assert_same_clips(files, cache) > 0
    missing = [video.path for video in files.videos() if not cache.cache_path(video).exists()]
    assert missing == ["Run/a.avi"]


def test_a_later_run_decodes_only_videos_that_have_changed(tmp_path, decoded):
    root = write_mixed_videos(tmp_path / "data")
    files = open_source(root, SIZE)
    fill_cache(files, tmp_path)
    assert sorted(decoded) == [video.path for video in files.videos()]
    write_video(root / "Run/b.mp4", 50, codec="libx264", size=(48, 48))
    os.utime(root / "Run/c.mkv", ns=(1, 1))  # its content may have changed
    decoded.clear()
    files = open_source(root, SIZE)
    cache = fill_cache(files, tmp_path)
    assert sorted(decoded) == ["Run/b.mp4", "Run/c.mkv"]
    assert_same_clips(files, cache)
    shutil.rmtree(cache.folder)
    assert_same_clips(files, cache)
    assert fill_cache(open_source(root, 16), tmp_path).folder != cache.folder


def start_filling(files, folder, is_killed):
    """Fill a cache in a fork of this process, which is killed when the first file is written. It
    writes the names of the videos into the file `decoded`.
    """

    def fill():
        write = source.write_pixels

        def counted(path, files, video, metadata):
            with open(folder / "decoded", "a") as names:
                print(video.path, file=names)
            write(path, files, video, metadata)
            if is_killed:
                os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

        source.THREADS = 1
        source.write_pixels = counted
        fill_cache(files, folder)

    return fork(fill)


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
            assert video == count
            count += 1
            assert len(started) <= count + 4
    assert count == 9
    assert len(started) <= 14


def test_a_folder_without_locks_is_one_line(tmp_path, monkeypatch):
    no_locks = Mock(side_effect=OSError(38, "Function not implemented"))
    monkeypatch.setattr(source.fcntl, "flock", no_locks)
    files = open_source(write_mixed_videos(tmp_path / "data"), SIZE)
    line = error_of(fill_cache, files, tmp_path)
    assert line.startswith("--cache-frames: ")
    assert "can't be locked (Function not implemented): move --results-dir" in line


def test_runs_at_once_fill_the_cache_of_a_killed_run_and_decode_each_video_once(tmp_path, decoded):
    files = open_source(write_mixed_videos(tmp_path / "data"), SIZE)
    killed = start_filling(files, tmp_path, is_killed=True)
    killed.join(600)
    assert killed.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".pixels*/*.tmp"))) == 1
    processes = [start_filling(files, tmp_path, is_killed=False) for _ in range(2)]
    for process in processes:
        process.join(600)
        assert process.exitcode == 0
    assert not list(tmp_path.glob(".pixels*/*.tmp"))
    first, second, *others = [video.path for video in files.videos()]
    paths = (tmp_path / "decoded").read_text().split()
    assert paths[:2] == [first, second]  # by the killed run
    assert sorted(paths[2:]) == [second, *others]
    assert_same_clips(files, fill_cache(files, tmp_path))
    assert not decoded


def test_too_much_is_refused_before_anything_is_made(shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(source, "LARGEST", 400_000)
    training = Training(shapes, tmp_path / "runs", steps=5)
    line = refused(capsys, train, *training.command_flags("--cache-frames"))
    assert "--cache-frames: 24 videos take 0.5 MB" in line
    assert "use a smaller --image-size, or train on a cache of cache_latents.py" in line
    assert not (tmp_path / "runs").exists()


def test_a_disk_that_fills_up_leaves_only_complete_files(tmp_path, monkeypatch):
    files = open_source(write_mixed_videos(tmp_path / "data"), SIZE)
    monkeypatch.setattr(source, "THREADS", 1)
    # two calls per file
    calls = record_calls(monkeypatch, os, "fsync", lambda _: len(calls) >= 4 and no_space())
    with pytest.raises(OSError, match="No space left"):
        fill_cache(files, tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))
    assert len(list(tmp_path.glob(".pixels*/*.safetensors"))) == 2


def test_a_cache_needs_no_other_cache(tmp_path):
    make_latents(tmp_path)
    error = error_of(CachedFiles, open_source(tmp_path, 16), tmp_path)
    assert error.startswith("--cache-frames: --data-path is a cache")
