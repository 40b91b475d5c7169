"""Files of others can neither run code nor fill the memory. Commands on such files: test_bad_inputs.py."""

import os
import re

import pytest

from runtime import memory
from tiny_videos import write_video
from training import ROOT
from video import files
from video.files import UnreadableError, Video, read_frames
from video.index import scan_videos


def test_a_video_of_too_many_pixels_is_unreadable(tmp_path, monkeypatch):
    for name, size in (("a.avi", (16, 16)), ("b.avi", (64, 48))):
        write_video(tmp_path / name, size=size)
    monkeypatch.setattr(files, "MAX_PIXELS", 64 * 48 - 1)
    assert scan_videos(tmp_path).unreadable == ["b.avi"]
    with pytest.raises(UnreadableError, match="64 x 48 pixels"):
        read_frames(tmp_path, Video("b.avi", "all", 20, 25.0, 48, 64), [0])


def test_the_source_has_no_calls_that_could_run_code_from_a_file():
    forbidden = r"allow_pickle=True|weights_only=False|pickle\.loads?\(|yaml|\beval\(|\bexec\(|os\.system|shell=True"
    for path in (path for part in ("EqM", "scripts", "datasets") for path in (ROOT / part).rglob("*.py")):
        text = re.sub(r"\.eval\(\)", "", path.read_text())  # of a network
        assert not re.search(forbidden, text), path
        assert all("weights_only=True" in load for load in re.findall(r"torch\.load\([^\n]*", text)), path
        assert all("use_safetensors=True" in load for load in re.findall(r"from_pretrained\([^)]*", text)), path


def test_free_memory_is_limited_by_the_machine_and_by_its_container(tmp_path, monkeypatch):
    of_machine = memory.free_bytes()
    assert 2**20 < of_machine < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    (tmp_path / "memory.stat").write_text("anon 9\ninactive_file 250000\n")
    for limit, free in (("5000000\n", 4_250_000), ("max\n", None)):
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text("1000000\n")
        assert memory.free_bytes() == free if free else memory.free_bytes() > 2**20
