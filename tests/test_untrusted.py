"""What a user sees of a file that is damaged, was edited or holds code: one line, status 2, and no code has run."""

import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import cache_latents
import evaluate
import sample_gd
import train
from runtime import memory
from tiny_data import make_samples, make_vae, save_checkpoint
from tiny_videos import write_equal_videos, write_video
from video import files
from video.files import UnreadableError, Video, read_frames
from video.index import scan_videos

ROOT = Path(train.__file__).resolve().parents[1]
NOT_UTF8 = os.fsdecode(b"\xff")


class Code:
    """A pickle of it makes a folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def code_in_samples(folder):
    make_samples(folder)
    np.savez(folder / "samples.npz", arr_0=np.array([Code(), Code()]), labels=np.zeros(2, np.int64))


def code_in_a_vae(folder):
    make_vae(folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"decoder.conv_out.bias": Code()}, folder / "diffusion_pytorch_model.bin")


def no_config(folder):
    (make_vae(folder) / "config.json").unlink()


SAMPLE = [sample_gd, "--video", "--folder=new", "--ckpt"]
CACHE = [cache_latents, "--data-path=videos", "--image-size=16", "--out=new", "--vae"]
EVALUATE = [evaluate, "--metric=motion", "--data-path=videos", "--out=new.json", "--samples"]
REFUSED = {  # the last word of the command is the name of what the function writes
    "a zip that is none": (SAMPLE, "a.pt", lambda at: at.write_bytes(b"PK\3\4" + bytes(1000)), "damaged or cut short"),
    "a checkpoint whose name is not UTF-8": (SAMPLE, f"{NOT_UTF8}.pt", save_checkpoint, "is not UTF-8: rename it"),
    "samples that hold code": (EVALUATE, "s", code_in_samples, "not a plain array"),
    "a VAE that holds code": (CACHE, "vae", code_in_a_vae, "diffusion_pytorch_model.safetensors"),
    "a VAE without its config": (CACHE, "vae", no_config, "config.json"),
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return write_equal_videos(tmp_path_factory.mktemp("data") / "videos")


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_file_is_one_line_and_status_2_and_no_code_has_run(name, videos, tmp_path, monkeypatch, capsys):
    (script, *flags), place, write, words = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(videos, "videos")
    Path(place).suffix or Path(place).mkdir()
    write(Path(place))
    monkeypatch.setattr(sys, "argv", [script.__file__, *flags, place])
    with pytest.raises(SystemExit) as ended:
        script.main()
    lines = [line for line in capsys.readouterr().err.splitlines() if "opening videos" not in line]
    assert ended.value.code == 2
    assert len(lines) == 1 and words in lines[0], lines
    assert sorted(os.listdir()) == sorted(["videos", place])


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
