"""--cache-frames changes no batch: each video is decoded once, into memory that ranks and loader processes share."""

import gc
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import preflight
import train
from runtime import memory
from tiny_videos import scribble, write_images, write_mixed_videos
from training import Training, compare, run_here, run_main
from video import frame_cache
from video.clips import Clips
from video.frame_cache import FrameCache
from video.index import scan_videos

STEPS = 5


def stream_of(root, videos, **changes):
    settings = {"root": root, "classes": ["A", "B", "Jump", "Run"], "image_size": 32}
    return Clips(videos=videos, **settings, **changes)


@pytest.mark.parametrize("kind", ["videos", "images", "a damaged one"])
def test_clips_are_the_same_bit_for_bit_whatever_the_size_or_state_of_the_files(tmp_path, kind):
    if kind == "images":
        videos = scan_videos(write_images(tmp_path), images=True).videos
    else:
        videos = scan_videos(write_mixed_videos(tmp_path)).videos
    if kind == "a damaged one":
        scribble(tmp_path / "Run/a.avi")
    num_frames = 1 if kind == "images" else 5
    frames = FrameCache(videos, 32)
    settings = {"num_frames": num_frames, "frame_interval": (1, 3)}
    plain, cached = (stream_of(tmp_path, videos, **settings, frames=own) for own in (None, frames))
    for index in range(30):
        expected, found = plain[index], cached[index]
        assert torch.equal(expected.pop("clip"), found.pop("clip")) and expected == found
    damaged = [path for path, (number, *_) in frames.places.items() if frames.states[number] == frame_cache.REFUSED]
    assert damaged == (["Run/a.avi"] if kind == "a damaged one" else [])


def read_and_count(frames, root, videos, counts):
    """In a process of its own: read a frame of each video; counts those that it decoded."""
    fill = FrameCache._fill

    def counted(*arguments):
        counts.put(arguments[2].path)
        return fill(*arguments)

    FrameCache._fill = counted
    for video in videos:
        frames.read(root, video, [0])


def test_each_video_is_decoded_once_by_all_processes_together(tmp_path):
    videos = scan_videos(write_mixed_videos(tmp_path)).videos
    frames, spawn = FrameCache(videos, 32), multiprocessing.get_context("spawn")
    counts = spawn.Queue()
    processes = [spawn.Process(target=read_and_count, args=(frames, tmp_path, videos, counts)) for _ in range(3)]
    for process in processes:
        process.start()
    decoded = [counts.get(timeout=60) for _ in videos]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(decoded) == sorted(video.path for video in videos) and counts.empty()
    assert (frames.states == frame_cache.FILLED).all()
    other = FrameCache(videos, 32, frames.place)  # as another rank opens it
    assert (other.frames == frames.frames).all() and other.frames.max() > 0


def test_one_rank_with_a_cache_trains_as_one_without_and_goes_on_after_a_stop(shapes, tmp_path):
    plain = Training(shapes, tmp_path / "plain", STEPS, flags=["--image-size", 8, "--model", "EqM-Ti/2"])
    run_here(plain)
    cached = replace(plain, results=tmp_path / "cached")
    run_here(cached, "--cache-frames", "--num-workers", 1, stop_after=2)
    run_here(cached, "--cache-frames", "--resume")
    assert compare(plain, cached) == []


def test_frames_that_do_not_fit_are_refused_with_the_numbers_before_anything_is_made(
    shapes, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(preflight, "free_bytes", lambda: 400_000)
    run_main(train, *Training(shapes, tmp_path / "runs", STEPS).command_flags("--cache-frames"), status=2)
    line = capsys.readouterr().err.splitlines()[-1]  # after the bar of the scan
    assert "--cache-frames: 600 frames of 16 x 16 px take 0.5 MB, 0.4 MB are free" in line
    monkeypatch.setattr(preflight.sys, "platform", "darwin")
    run_main(train, *Training(shapes, tmp_path / "runs", STEPS).command_flags("--cache-frames"), status=2)
    assert "--cache-frames: needs Linux" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_free_memory_is_that_of_the_machine_or_of_the_limit_of_its_container(tmp_path, monkeypatch):
    of_machine = memory.free_bytes()
    assert 2**20 < of_machine < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    (tmp_path / "memory.stat").write_text("anon 9\ninactive_file 250000\n")
    for limit, free in (("5000000\n", 4_250_000), ("max\n", None)):
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text("1000000\n")
        assert memory.free_bytes() == free if free else memory.free_bytes() > 2**20


def test_a_cache_that_nobody_has_leaves_no_memory_behind(tmp_path):
    videos = scan_videos(write_mixed_videos(tmp_path)).videos

    def links():
        return sum("memfd:frames" in os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())

    gc.collect()
    before, frames = links(), FrameCache(videos, 32)
    frames.read(tmp_path, videos[0], [0])
    assert links() > before
    del frames
    gc.collect()
    assert links() == before
