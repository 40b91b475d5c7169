"""Caches of latents of a tiny VAE, and of pixels. faults/test_cache_kills.py kills
cache_latents.py.
"""

import json
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cache_latents
import training
from runtime.untrusted import read_json
from test_vae import add_to_weights, save_tiny
from test_video_clips import check_replacements
from tiny_videos import clips_of, scribble, truncate, write_ucf_list, write_video
from training import content, error_of, names, no_space, record_calls, run_main
from vae import VAE, load_vae
from video import index, source
from video.files import UnreadableError
from video.index import split_videos
from video.source import cached_path, check_data_path, latents_settings, open_source

SIZE = 16
NUM_FRAMES = {
    "Run/a.avi": 40,
    "Run/b.c.mp4": 21,
    "Run/b.mkv": 30,
    "Jump/d.avi": 20,
    "Jump/e.avi": 16,
}


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two classes, five videos, two rates; tests only read it."""
    root = tmp_path_factory.mktemp("data") / "videos"
    for name, num_frames in NUM_FRAMES.items():
        write_video(root / name, num_frames, rate=30 if name.endswith("mp4") else 25)
    return root


@pytest.fixture(scope="module")
def cache(root, vae, tmp_path_factory):
    """A cache of `root` with flips; tests only read it."""
    out = tmp_path_factory.mktemp("cache") / "latents"
    run(root, vae, out, "--with-flips")
    return out


@pytest.fixture
def videos(root, tmp_path):
    """A copy of `root` to change, alone in its folder."""
    return Path(shutil.copytree(root, tmp_path / "videos"))


@pytest.fixture
def cache_copy(cache, tmp_path):
    return Path(shutil.copytree(cache, tmp_path / "cache"))


def flags(root, vae, out, *others):
    return ["--data-path", root, "--vae", vae, "--image-size", SIZE, "--out", out, *others]


def run(*arguments):
    run_main(cache_latents, *flags(*arguments))


@pytest.fixture
def refused(capsys):
    """A function that runs cache_latents.py with wrong input and returns the error line."""

    def refused(*arguments, **settings):
        return training.refused(capsys, cache_latents, *flags(*arguments), **settings)

    return refused


# Content ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flipped", [False, True])
def test_a_cache_holds_the_posterior_of_every_frame(root, vae, cache, flipped):
    files = open_source(root, SIZE)
    cached = open_source(cache, SIZE)
    model = load_vae(vae)
    for video, cached_video in zip(files.videos(), cached.videos(), strict=True):
        assert cached_video == replace(video, path=cached_path(video))
        indices = range(video.num_frames)
        latents = cached.read(cached_video, indices, flipped)
        assert latents.dtype == torch.float16
        clip = files.read(video, indices, flipped)
        mean, std = model.posterior(clip[None])
        torch.testing.assert_close(latents.float(), torch.cat([mean, std]), rtol=1e-3, atol=1e-4)


def test_latents_json_has_the_settings_and_the_videos(root, vae, cache, monkeypatch):
    settings = read_json(cache / "latents.json")
    videos = settings.pop("videos")
    assert settings == {
        "format": 1,
        "vae": vae,
        "vae_sha256": load_vae(vae).sha256,
        "image_size": SIZE,
        "channels": 4,
        "downsample": 2,
        "scale": 0.7,
        "shift": 0.0,
        "flips": True,
        "num_videos": 5,
        "num_frames": sum(NUM_FRAMES.values()),
        "classes": ["Jump", "Run"],
        "unreadable": [],
    }
    assert videos[3] == {
        "path": "Run/b.c.safetensors",
        "class_name": "Run",
        "num_frames": 21,
        "fps": 30.0,
        "height": 48,
        "width": 64,
    }
    assert {path.name for path in cache.glob("[!.]*")} == {"latents.json", "Jump", "Run"}
    assert latents_settings(root) is None
    monkeypatch.setattr(source, "safe_open", lambda *_: pytest.fail("opened a file"))
    open_source(cache, SIZE)
    check_data_path(cache)


def test_a_pixel_cache_has_exact_clips_and_skips_a_corrupt_video_until_it_is_repaired(
    videos, tmp_path, capsys
):
    out = tmp_path / "out"
    corrupt = videos / "Run/a.avi"
    scribble(corrupt)
    run(videos, "none", out)
    printed = capsys.readouterr().out
    assert "4 videos, 87 frames of 0.75 KB" in printed
    assert printed.count("Run/a.avi can't be decoded") == 1
    assert not list(out.rglob("a.*"))
    assert latents_settings(out)["unreadable"] == ["Run/a.avi"]
    corrupt.unlink()
    clips = clips_of(open_source(videos, SIZE), 4, frame_interval=(1, 4))
    cached = clips_of(open_source(out, SIZE), 4, frame_interval=(1, 4))
    assert len(cached) == 4
    for number in range(12):
        clip = cached[number]["clip"]
        assert torch.equal(clip, clips[number]["clip"])
        assert clip.is_contiguous()
    write_video(corrupt, 40)
    run(videos, "none", out)
    assert latents_settings(out)["unreadable"] == []
    assert len(open_source(out, SIZE).videos()) == 5


@pytest.mark.parametrize("parent", [".", ".."])
def test_a_cache_copies_the_ucf_split_lists_as_writable_files(videos, vae, tmp_path, parent):
    write_ucf_list(videos / parent, ["Jump/d", "Run/a", "Run/b.c"])
    lists = videos / parent / "ucfTrainTestlist"
    (lists / "trainlist01.txt").chmod(0o444)
    lists.chmod(0o555)
    out = tmp_path / "elsewhere/deep"
    run(videos, vae, out)
    for path in out.rglob("*"):
        assert path.stat().st_mode & 0o200, path
    train, val = split_videos(out, open_source(out, SIZE).videos(), 0.05)
    assert [video.key for video in train] == ["Jump/d", "Run/a", "Run/b.c"]
    assert [video.key for video in val] == ["Jump/e", "Run/b"]
    lists.chmod(0o755)
    shutil.rmtree(lists)
    run(videos, vae, out)
    assert names(out / "ucfTrainTestlist") == []


@pytest.mark.skipif(
    not Path("/proc/self/smaps").exists(), reason="only Linux shows what a process has mapped"
)
@pytest.mark.parametrize(
    "frame_indices", [list(range(10_000, 10_016)), list(range(0, 32_000, 2000))]
)
def test_reading_a_clip_of_a_long_video_loads_only_its_part_of_the_file(
    tmp_path, monkeypatch, frame_indices
):
    path = tmp_path / "v.safetensors"
    pixels = {"dtype": "U8", "shape": (131_072, 4, 32, 32), "data_offsets": [0, 2**29]}
    header = json.dumps({"pixels": pixels}).encode()
    with open(path, "wb") as file:  # a sparse file of 512 MB
        file.write(len(header).to_bytes(8, "little") + header)
        for number, frame_index in enumerate(frame_indices):
            file.seek(8 + len(header) + 4096 * frame_index)
            file.write(bytes([number]) * 4096)
        file.truncate(8 + len(header) + 2**29)
    resident = []  # KB

    @contextmanager
    def watched(*args):
        with safe_open(*args) as file:
            yield file
            # the clip is read and the file still mapped
            maps = Path("/proc/self/smaps").read_text().split("VmFlags")
            (part,) = [part for part in maps if str(path) in part]
            resident.append(int(re.search(r"Rss: +(\d+)", part)[1]))

    monkeypatch.setattr(source, "safe_open", watched)
    (clip,) = source.read_cache_file(
        path, ["pixels"], shape=(4, 32, 32), frame_indices=frame_indices
    )
    assert torch.equal(clip, torch.arange(16).byte().view(16, 1, 1).expand(4, 16, 32, 32))
    assert 0 < resident[0] < 2**19 / 8  # includes the read-ahead of the kernel


# Ranks and changes --------------------------------------------------------------------------------


@pytest.fixture
def encode(monkeypatch):
    """A function that runs cache_latents.py and returns the videos that it encodes."""
    encoded = record_calls(
        monkeypatch, cache_latents, "encode_video", lambda video, **_: video.path
    )

    def encode(*arguments):
        encoded.clear()
        run(*arguments)
        return encoded

    return encode


def test_a_complete_cache_is_reported_and_opens_no_video(
    root, vae, cache, encode, monkeypatch, capsys
):
    before = content(cache)
    monkeypatch.setattr(index, "probe", lambda *_: pytest.fail("opened a video again"))
    # the index is in the cache
    assert sorted(root.rglob("*.*")) == sorted(root / name for name in NUM_FRAMES)
    assert encode(root, vae, cache, "--with-flips") == []
    assert "is complete: 5 videos, 127 frames of 2 KB" in capsys.readouterr().out
    assert content(cache) == before


def test_a_second_run_updates_new_changed_and_lost_videos_and_removes_others(
    videos, vae, tmp_path, encode, monkeypatch
):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".nfs01").write_text("")  # of the file system
    run(videos, vae, out)
    write_video(videos / "Swim/f.avi", 18)
    write_video(videos / "Jump/d.avi", 25)
    (videos / "Jump/e.avi").unlink()
    (out / "Run/a.safetensors").unlink()
    truncate(out / "Run/b.safetensors")

    def refuse(args, *_):  # until then, nothing trains on it
        return error_of(latents_settings, args.out)

    unfinished = record_calls(monkeypatch, cache_latents, "finish_cache", refuse)
    again = encode(videos, vae, out)
    assert "a cache that is not complete" in unfinished[0]
    assert sorted(again) == ["Jump/d.avi", "Run/a.avi", "Run/b.mkv", "Swim/f.avi"]
    run(videos, vae, tmp_path / "fresh")
    (out / "Jump/e.safetensors").unlink()
    assert content(out) == content(tmp_path / "fresh")
    clip = clips_of(open_source(out, SIZE), 4, flip=False)[0]["clip"]
    assert clip.shape == (2, 4, 4, SIZE // 2, SIZE // 2)


def test_the_next_run_caches_a_video_that_changed_after_the_scan(
    videos, vae, tmp_path, monkeypatch, encode
):
    out = tmp_path / "out"
    changed = videos / "Jump/d.avi"
    with monkeypatch.context() as patch:
        record_calls(patch, cache_latents, "begin_cache", lambda *_: write_video(changed, 30))
        run(videos, vae, out)
    assert encode(videos, vae, out) == ["Jump/d.avi"]
    assert len(load_file(out / "Jump/d.safetensors")["mean"]) == 30


def replace_by_equal_size(path, other, mtime_ns):
    """Replace a video by another one, padded with zeros to the same size in bytes."""
    size = path.stat().st_size
    data = other.read_bytes()
    assert len(data) < size
    path.write_bytes(data.ljust(size, b"\0"))
    os.utime(path, ns=(mtime_ns, mtime_ns))


def test_a_video_that_another_one_of_equal_size_replaces_is_encoded_again(
    videos, vae, tmp_path, encode
):
    out = tmp_path / "out"
    run(videos, vae, out)
    path = videos / "Run/a.avi"
    earlier = path.stat().st_mtime_ns - 10**9  # a copy that kept its time
    replace_by_equal_size(path, videos / "Jump/d.avi", earlier)
    assert encode(videos, vae, out) == ["Run/a.avi"]
    latents = load_file(out / "Run/a.safetensors")["mean"]
    assert torch.equal(latents, load_file(out / "Jump/d.safetensors")["mean"])
    assert encode(videos, vae, out) == []


def test_a_cache_without_times_stays_valid_but_a_newer_video_is_encoded_again(
    videos, vae, tmp_path, encode, capsys
):
    out = tmp_path / "out"
    run(videos, vae, out)
    for path in out.rglob("*.safetensors"):  # as earlier versions wrote it
        with safe_open(path, "pt") as file:
            size = file.metadata()["source_stamp"].split()[0]
        save_file(load_file(path), path, {"source_bytes": size})
    assert len(open_source(out, SIZE).videos()) == 5
    # as after an interruption
    (out / "latents.json").rename(out / "latents.partial.json")
    (out / "Run/b.safetensors").unlink()
    later = (out / "Run/a.safetensors").stat().st_mtime_ns + 1
    replace_by_equal_size(videos / "Run/a.avi", videos / "Jump/d.avi", later)
    assert encode(videos, vae, out) == ["Run/b.mkv", "Run/a.avi"]
    printed = capsys.readouterr().out
    assert printed.count("keeps 3 files of an earlier version, without the times") == 1


# Corrupt videos and files, other settings, a full disk --------------------------------------------


def test_a_video_whose_latents_are_not_finite_is_skipped(root, vae, tmp_path, monkeypatch, capsys):
    posterior = VAE.posterior

    def too_large(self, clips):
        mean, std = posterior(self, clips)
        return mean + 1e5 * (len(mean[0, 0]) == 14), std  # the last chunk of Run/b.mkv

    monkeypatch.setattr(VAE, "posterior", too_large)
    run(root, vae, tmp_path / "out")
    printed = capsys.readouterr().out
    assert "Run/b.mkv can't be decoded, or its latents exceed float16; it is skipped" in printed
    assert latents_settings(tmp_path / "out")["unreadable"] == ["Run/b.mkv"]


def test_a_cache_without_readable_videos_is_an_error(tmp_path, refused):
    write_video(tmp_path / "videos/a.avi", 40)
    scribble(tmp_path / "videos/a.avi")
    line = refused(tmp_path / "videos", "none", tmp_path / "out", late=True)
    assert f"--data-path {tmp_path / 'videos'}: can't decode any of its videos" in line
    assert not (tmp_path / "out/latents.json").exists()


def test_too_many_corrupt_videos_are_an_error_unless_a_flag_allows_them(
    videos, vae, tmp_path, refused
):
    out = tmp_path / "out"
    scribble(videos / "Run/a.avi")
    (videos / "Run/text.avi").write_text("not a video")
    line = refused(videos, vae, out, late=True)
    reason = "2 of 6 files are corrupt, expected at most 1: Run/a.avi; repair, move or delete them"
    assert f"--max-bad-fraction 0.1: {reason}" in line
    assert not (out / "latents.json").exists()
    run(videos, vae, out, "--max-bad-fraction", 0.4)
    assert latents_settings(out)["unreadable"] == ["Run/a.avi", "Run/text.avi"]
    (videos / "Run/more.avi").write_text("not a video")
    assert "2 of 7" in refused(videos, vae, tmp_path / "new")  # before anything is decoded
    assert not (tmp_path / "new").exists()


def holding(num_frames, side=8, parts=("mean", "std")):
    """A function that writes a latents file with these shapes and parts."""
    latents = torch.zeros(num_frames, 4, side, side).half()
    return lambda path: save_file({part: latents.clone() for part in parts}, path)


@pytest.mark.parametrize(
    "damage",
    [truncate, Path.unlink, holding(2), holding(40, side=16), holding(40, parts=["mean"])],
    ids=["truncated", "vanished", "of another video", "of another size", "without std"],
)
def test_a_corrupt_latents_file_is_handled_like_a_corrupt_video(cache_copy, damage):
    clips = clips_of(open_source(cache_copy, SIZE), 16)
    damage(cache_copy / "Run/a.safetensors")
    check_replacements(clips, 10, "Run/a.safetensors")
    with pytest.raises(UnreadableError, match="a.safetensors"):
        clips.source.read(clips.videos[2], [20, 21], False)


@pytest.mark.parametrize("name", ["latents.json", "latents.partial.json"])
def test_a_cache_with_other_settings_is_refused(root, vae, cache_copy, tmp_path, refused, name):
    (cache_copy / "latents.json").rename(cache_copy / name)
    before = content(cache_copy)
    assert "flips True, not False" in refused(root, vae, cache_copy)
    line = refused(root, vae, cache_copy, "--with-flips", "--image-size", 32)
    assert "image_size 16, not 32; use the same flags or name another folder" in line
    moved = shutil.copytree(vae, tmp_path / "vae")
    assert f"vae {vae}, not {moved}" in refused(root, moved, cache_copy, "--with-flips")
    assert content(cache_copy) == before
    settings = read_json(cache_copy / name) | {"vae": str(moved)}
    (cache_copy / name).write_text(json.dumps(settings))
    add_to_weights(moved, 0.1)
    assert "a latent cache with vae_sha256" in refused(root, moved, cache_copy, "--with-flips")


# before latents.partial.json, a video, latents.json
@pytest.mark.parametrize("num_complete", [0, 3, 7])
def test_a_full_disk_is_one_line_and_leaves_no_partial_file(
    root, vae, cache, tmp_path, monkeypatch, refused, num_complete
):
    out = tmp_path / "out"
    last = 2 * num_complete  # a file takes two calls of fsync, the second one for its folder
    with monkeypatch.context() as patch:
        calls = record_calls(patch, os, "fsync", lambda _: len(calls) == last and no_space())
        line = refused(root, vae, out, "--with-flips", status=1)
    assert "can't be written (No space left on device; the disk" in line
    assert len([*out.rglob("*.*")]) == num_complete  # with the index
    run(root, vae, out, "--with-flips")
    assert content(out) == content(cache)
