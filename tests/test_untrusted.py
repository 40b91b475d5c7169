"""What a user sees of a file that is damaged, was edited or holds code: one line, status 2, and no code has run."""

import json
import os
import re
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import cache_latents
import evaluate
import published
import sample_gd
import train
from runtime import untrusted
from runtime.cli import UserError
from tiny_data import make_latents, make_samples, make_state, make_vae, save_checkpoint
from tiny_videos import write_equal_videos, write_video
from video import files
from video.files import UnreadableError, Video, read_frames, read_latents
from video.index import index_place, latents_settings, scan_videos

ROOT = Path(train.__file__).resolve().parents[1]
NOT_UTF8 = os.fsdecode(b"\xff")


class Code:
    """A pickle of it makes a folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def no_zip(path):
    path.write_bytes(b"PK\3\4" + bytes(1000))


def code_in_samples(folder):
    make_samples(folder)
    np.savez(folder / "samples.npz", arr_0=np.array([Code(), Code()]), labels=np.zeros(2, np.int64))


def code_in_a_vae(folder):
    make_vae(folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"decoder.conv_out.bias": Code()}, folder / "diffusion_pytorch_model.bin")


def cut_weights(folder):
    path = make_vae(folder) / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def no_config(folder):
    (make_vae(folder) / "config.json").unlink()


def fps_in_words(path):
    state = make_state(depth=1)
    state["config"]["data"]["fps"] = "many"
    torch.save(state, path)


SAMPLE = [sample_gd, "--video", "--folder=new", "--ckpt"]
CACHE = [cache_latents, "--data-path=videos", "--image-size=16", "--out=new", "--vae"]
EVALUATE = [evaluate, "--metric=motion", "--data-path=videos", "--out=new.json", "--samples"]
REFUSED = {  # the last word of the command is the name of what the function writes
    "a zip that is none": (SAMPLE, "a.pt", no_zip, "damaged or cut short"),
    "a zip that is none, as samples": (EVALUATE, "s", lambda at: (make_samples(at), no_zip(at / "samples.npz")), "zip"),
    "a frame rate in words": (SAMPLE, "a.pt", fps_in_words, "its data settings: fps is many"),
    "a checkpoint whose name is not UTF-8": (SAMPLE, f"{NOT_UTF8}.pt", save_checkpoint, "is not UTF-8: rename it"),
    "an export whose name is not UTF-8": (
        SAMPLE, NOT_UTF8, lambda at: published.write_export(at, make_state(depth=1)), "is not UTF-8: rename it"
    ),
    "samples whose name is not UTF-8": (EVALUATE, NOT_UTF8, make_samples, "is not UTF-8: rename it"),
    "samples that hold code": (EVALUATE, "s", code_in_samples, "not a plain array"),
    "a VAE that holds code": (CACHE, "vae", code_in_a_vae, "diffusion_pytorch_model.safetensors"),
    "a VAE that is cut short": (CACHE, "vae", cut_weights, "--vae vae"),
    "a VAE without its config": (CACHE, "vae", no_config, "config.json"),
}  # fmt: skip


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
    lines = [line.split("\r")[-1] for line in capsys.readouterr().err.splitlines()]
    lines = [line for line in lines if "opening videos" not in line]
    assert ended.value.code == 2
    assert len(lines) == 1 and words in lines[0], lines
    assert sorted(os.listdir()) == sorted(["videos", place])


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"channels": "4"}, "channels is 4"), ({"downsample": 0}, "a size below 1"), ({"classes": ["B"]}, "no class A"),
     ({"videos": [{"path": 3}]}, "path is 3"), ({"vae": None}, "vae is None")],
)  # fmt: skip
def test_a_latents_json_that_someone_edited_is_one_line(tmp_path, changes, words):
    make_latents(tmp_path)
    content = json.loads((tmp_path / "latents.json").read_text()) | changes
    (tmp_path / "latents.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        latents_settings(tmp_path)
    assert str(error.value).startswith(f"--data-path {tmp_path}: its latents.json is damaged (") and words in str(error)


@pytest.mark.parametrize("change", [{"num_frames": 0}, {"num_frames": 10**30}, {"fps": 0}, {"height": "x"}])
def test_an_index_that_someone_edited_is_built_again_and_a_line_says_so(videos, tmp_path, capsys, change):
    before, place = scan_videos(videos, tmp_path), index_place(videos, tmp_path)
    index = json.loads(place.read_text())
    index["videos"][0][1] |= change
    place.write_text(json.dumps(index))
    assert scan_videos(videos, tmp_path).videos == before.videos
    assert capsys.readouterr().out.count("building it again") == 1


def test_a_video_or_latents_whose_name_is_not_utf8_are_named_and_left_out(tmp_path):
    root = write_equal_videos(tmp_path / "data")
    write_video(root / "A" / f"{NOT_UTF8}.avi", 3)
    assert scan_videos(root).unreadable == [f"A/{NOT_UTF8}.avi"]
    make_latents(tmp_path)
    (tmp_path / "A/a.safetensors").rename(tmp_path / f"A/{NOT_UTF8}.safetensors")
    with pytest.raises(UnreadableError, match="not UTF-8"):
        read_latents(tmp_path, Video(f"A/{NOT_UTF8}.safetensors", "A", 6, 25.0, 16, 16), [0])


def test_a_video_of_too_many_pixels_is_bad(tmp_path, monkeypatch):
    write_video(tmp_path / "a.avi", codec="rawvideo")
    data = bytearray((tmp_path / "a.avi").read_bytes())
    struct.pack_into("<II", data, data.index(b"avih") + 40, 13_000, 13_000)
    struct.pack_into("<ii", data, data.index(b"strf") + 12, 13_000, 13_000)
    (tmp_path / "b.avi").write_bytes(data)
    assert scan_videos(tmp_path).unreadable == ["b.avi"]
    monkeypatch.setattr(files, "MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(UnreadableError, match="64 x 48 pixels"):
        read_frames(tmp_path, Video("a.avi", "all", 20, 25.0, 48, 64), [0])


def test_json_of_gigabytes_or_a_hundred_thousand_levels_is_not_read(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "long.json").touch()
    os.truncate(tmp_path / "long.json", 2**40)  # a hole
    for name, words in (("deep.json", "nested too deeply"), ("long.json", "more than")):
        with pytest.raises(ValueError, match=words):
            untrusted.read_json(tmp_path / name)


def test_the_tensors_of_a_file_that_repeats_its_parts_without_end_are_found_once(tmp_path):
    tensor, value = torch.zeros(3), []
    value.append({"tensor": tensor, "itself": value})
    for _ in range(20):
        value = [value, value]
    torch.save(value, tmp_path / "a.pt")
    (found,) = untrusted.tensors_in(untrusted.read_torch(tmp_path / "a.pt"))
    assert torch.equal(found, tensor)


def test_the_source_has_no_calls_that_could_run_code_from_a_file():
    forbidden = r"allow_pickle=True|weights_only=False|pickle\.loads?\(|yaml|\beval\(|\bexec\(|os\.system|shell=True"
    for path in (path for part in ("EqM", "scripts", "datasets") for path in (ROOT / part).rglob("*.py")):
        text = re.sub(r"\.eval\(\)", "", path.read_text())  # of a network
        assert not re.search(forbidden, text), path
        assert all("weights_only=True" in load for load in re.findall(r"torch\.load\([^\n]*", text)), path
        assert all("use_safetensors=True" in load for load in re.findall(r"from_pretrained\([^)]*", text)), path
