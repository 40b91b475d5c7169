"""Caches of latents of a tiny VAE, and of pixels. faults/test_cache_kills.py kills
cache_latents.py.
"""

import json
import os
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
from test_vae import add_to_weights, save_tiny
from test_video_clips import check_replacements
from tiny_videos import clips_of, scribble, write_ucf_list, write_video
from training import content, no_space, record_calls, run_main
from vae import VAE, load_vae
from video import index, source
from video.files import UnreadableError
from video.index import split_videos
from video.source import cached_path, check_data_path, latents_settings, open_source

SIZE = 16
NAMES = {
    "Run/a.avi": 40,
    "Run/b.c.mp4": 21,
    "Run/b.mkv": 30,
    "Jump/d.avi": 20,
    "Jump/e.avi": 16,
}  # frames


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two classes, five videos, two rates; tests only read it."""
    root = tmp_path_factory.mktemp("data") / "videos"
    for k, (name, num_frames) in enumerate(NAMES.items()):
        codec = "libx264" if name.endswith("mp4") else "mpeg4"
        write_video(root / name, num_frames, rate=25 + 5 * (k % 2), codec=codec)
    return root


@pytest.fixture(scope="module")
def cache(root, vae, tmp_path_factory):
    """A cache of `root` with flips; tests only read it."""
    out = tmp_path_factory.mktemp("cache") / "latents"
    run(root, vae, out, "--with-flips")
    return out


@pytest.fixture
def own(root, tmp_path):
    """A copy of `root` to change, alone in its folder."""
    return Path(shutil.copytree(root, tmp_path / "videos"))


@pytest.fixture
def own_cache(cache, tmp_path):
    return Path(shutil.copytree(cache, tmp_path / "cache"))


def flags(root, vae, out, *more):
    return [
        str(part)
        for part in ("--data-path", root, "--vae", vae, "--image-size", SIZE, "--out", out, *more)
    ]


def run(*arguments, status=0):
    run_main(cache_latents, *flags(*arguments), status=status)


@pytest.fixture
def refused(capsys):
    """A function that runs cache_latents.py with wrong input and returns the error line."""
    return lambda *arguments, **how: training.refused(
        capsys, cache_latents, *flags(*arguments), **how
    )


# Content ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flipped", [False, True])
def test_a_cache_holds_the_posterior_of_every_frame(root, vae, cache, flipped):
    files = open_source(root, SIZE)
    cached = open_source(cache, SIZE)
    model = load_vae(vae)
    for video in files.videos():
        every = range(video.num_frames)
        found = cached.read(replace(video, path=cached_path(video)), every, flipped)
        assert found.dtype == torch.float16 and found.shape == (
            2,
            4,
            video.num_frames,
            SIZE // 2,
            SIZE // 2,
        )
        expected = torch.cat(
            model.posterior(files.read(video, every, flipped)[None])
        )  # mean and std
        torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-4)


def test_latents_json_has_the_settings_and_the_videos(root, vae, cache, monkeypatch):
    settings = json.loads((cache / "latents.json").read_text())
    videos = settings.pop("videos")
    sha256 = load_vae(vae).sha256
    assert settings == {
        "format": 1,
        "vae": vae,
        "vae_sha256": sha256,
        "image_size": SIZE,
        "channels": 4,
        "downsample": 2,
        "scale": 0.7,
        "shift": 0.0,
        "flips": True,
        "num_videos": 5,
        "num_frames": sum(NAMES.values()),
        "classes": ["Jump", "Run"],
        "unreadable": [],
    }
    fields = {"path": "Run/b.c.safetensors", "class_name": "Run", "num_frames": 21, "fps": 30.0}
    assert videos[3] == fields | {"height": 48, "width": 64}
    assert {path.name for path in cache.glob("[!.]*")} == {"latents.json", "Jump", "Run"}
    assert latents_settings(root) is None and latents_settings(root / "missing") is None

    monkeypatch.setattr(source, "safe_open", lambda *_: pytest.fail("opened a file"))
    files = open_source(root, SIZE)
    cached = open_source(cache, SIZE)
    assert cached.videos() == [
        replace(video, path=cached_path(video)) for video in files.videos()
    ]  # in their order
    assert (cached.scan.classes, cached.scan.unreadable) == (files.scan.classes, [])
    check_data_path(cache)


def test_a_pixel_cache_has_exact_clips_and_skips_a_corrupt_video_until_it_is_repaired(
    own, tmp_path, capsys
):
    out = tmp_path / "out"
    scribble(own / "Run" / "a.avi")
    run(own, "none", out)
    printed = capsys.readouterr().out
    settings = latents_settings(out)
    assert (
        "4 videos, 87 frames of 0.75 KB" in printed
        and printed.count("Run/a.avi can't be decoded") == 1
    )
    assert (settings["vae"], settings["downsample"], settings["flips"]) == ("none", 1, True)
    assert settings["unreadable"] == ["Run/a.avi"] and not list(out.rglob("a.*"))
    (own / "Run" / "a.avi").unlink()
    videos, cached = (
        clips_of(open_source(place, SIZE), 4, frame_interval=(1, 4)) for place in (own, out)
    )
    assert (cached.source.scan.unreadable, len(cached.source.scan.videos)) == ([], 4)
    for k in range(12):
        sample = videos[k]
        other = cached[k]
        assert torch.equal(sample["clip"], other["clip"]) and other["clip"].is_contiguous()
    write_video(own / "Run" / "a.avi", 40)
    run(own, "none", out)
    assert (latents_settings(out)["unreadable"], len(open_source(out, SIZE).scan.videos)) == ([], 5)


@pytest.mark.parametrize("place", [".", ".."])
def test_a_cache_copies_the_ucf_split_lists_as_writable_files(own, vae, tmp_path, place):
    write_ucf_list(own / place, ["Jump/d", "Run/a", "Run/b.c"])
    (own / place / "ucfTrainTestlist" / "trainlist01.txt").chmod(0o444)
    (own / place / "ucfTrainTestlist").chmod(0o555)
    out = tmp_path / "elsewhere" / "deep"
    run(own, vae, out)
    assert all(
        path.stat().st_mode & 0o200 for path in out.rglob("*")
    )  # read-only modes are not copied
    for folder in (own, out):
        train, val = split_videos(folder, open_source(folder, SIZE).videos(), 0.05)
        assert [video.key for video in train] == ["Jump/d", "Run/a", "Run/b.c"]
        assert [video.key for video in val] == ["Jump/e", "Run/b"]


@pytest.mark.skipif(
    not Path("/proc/self/smaps").exists(), reason="only Linux shows what a process has mapped"
)
@pytest.mark.parametrize(
    "frame_indices", [list(range(10_000, 10_016)), list(range(0, 32_000, 2000))]
)
def test_reading_a_clip_of_a_long_video_loads_only_its_part_of_the_file(
    tmp_path, monkeypatch, frame_indices
):
    place = tmp_path / "v.safetensors"
    shape = (131_072, 4, 32, 32)
    resident = []
    header = json.dumps(
        {"pixels": {"dtype": "U8", "shape": shape, "data_offsets": [0, 2**29]}}
    ).encode()
    with open(place, "wb") as file:  # a sparse file of 512 MB
        file.write(len(header).to_bytes(8, "little") + header)
        for k, frame_index in enumerate(frame_indices):
            file.seek(8 + len(header) + 4096 * frame_index)
            file.write(bytes([k]) * 4096)
        file.truncate(8 + len(header) + 2**29)

    @contextmanager
    def watched(*args):
        with safe_open(*args) as file:
            yield file
            maps = (
                Path("/proc/self/smaps").read_text().split("VmFlags")
            )  # the clip is read and the file still mapped
            (lines,) = [part.splitlines() for part in maps if str(place) in part]
            resident.extend(int(line.split()[1]) for line in lines if line.startswith("Rss:"))

    monkeypatch.setattr(source, "safe_open", watched)
    (clip,) = source.read_cache_file(place, ["pixels"], shape[1:], frame_indices)
    assert torch.equal(clip, torch.arange(16).byte().view(16, 1, 1).expand(4, 16, 32, 32))
    assert 0 < resident[0] < 2**19 / 8, "KB, including the read-ahead of the kernel"


# Ranks and changes --------------------------------------------------------------------------------


@pytest.fixture
def encoded(monkeypatch):
    """A list of the videos that are encoded during the test."""
    return record_calls(monkeypatch, cache_latents, "encode_video", lambda video, **_: video.path)


def test_a_complete_cache_is_reported_and_opens_no_video(
    root, vae, cache, encoded, monkeypatch, capsys
):
    before = content(cache)
    monkeypatch.setattr(index, "probe", lambda *_: pytest.fail("opened a video again"))
    assert sorted(root.rglob("*.*")) == sorted(
        root / name for name in NAMES
    )  # the index is in the cache
    run(root, vae, cache, "--with-flips")
    assert "is complete: 5 videos, 127 frames of 2 KB" in capsys.readouterr().out
    assert encoded == [] and content(cache) == before


def test_a_second_run_updates_new_changed_and_lost_videos_and_removes_others(
    own, vae, tmp_path, encoded
):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".nfs01").write_text("")  # of the file system
    run(own, vae, out)
    write_video(own / "Swim" / "f.avi", 18)
    write_video(own / "Jump" / "d.avi", 25)
    (own / "Jump" / "e.avi").unlink()
    (out / "Run" / "a.safetensors").unlink()
    truncate(out / "Run" / "b.safetensors")
    encoded.clear()
    run(own, vae, out)
    assert sorted(encoded) == ["Jump/d.avi", "Run/a.avi", "Run/b.mkv", "Swim/f.avi"]
    run(own, vae, tmp_path / "fresh")
    (out / "Jump" / "e.safetensors").unlink()
    assert content(out) == content(tmp_path / "fresh")
    settings = latents_settings(out)
    assert settings["classes"] == ["Jump", "Run", "Swim"] and not settings["flips"]
    assert clips_of(open_source(out, SIZE), 4, flip=False)[0]["clip"].shape == (
        2,
        4,
        4,
        SIZE // 2,
        SIZE // 2,
    )


def test_the_next_run_caches_a_video_that_changed_after_the_scan(
    own, vae, tmp_path, monkeypatch, encoded
):
    with monkeypatch.context() as patch:
        record_calls(
            patch, cache_latents, "begin_cache", lambda *_: write_video(own / "Jump" / "d.avi", 30)
        )
        run(own, vae, tmp_path / "out")
    encoded.clear()
    run(own, vae, tmp_path / "out")
    assert encoded == ["Jump/d.avi"]
    assert load_file(tmp_path / "out" / "Jump" / "d.safetensors")["mean"].shape[0] == 30


def replace_by_equal_size(path, other, mtime_ns=None):
    """Replace a video by another one, padded with zeros to the same size in bytes."""
    size = path.stat().st_size
    data = other.read_bytes()
    assert len(data) < size
    path.write_bytes(data.ljust(size, b"\0"))
    if mtime_ns is not None:
        os.utime(path, ns=(mtime_ns, mtime_ns))


def test_a_video_that_another_one_of_equal_size_replaces_is_encoded_again(
    own, vae, tmp_path, encoded
):
    out = tmp_path / "out"
    run(own, vae, out)
    before = load_file(out / "Run" / "a.safetensors")["mean"]
    earlier = (own / "Run" / "a.avi").stat().st_mtime_ns - 10**9
    replace_by_equal_size(
        own / "Run" / "a.avi", own / "Jump" / "d.avi", earlier
    )  # a copy that kept its time
    encoded.clear()
    run(own, vae, out)
    assert encoded == ["Run/a.avi"]
    found = load_file(out / "Run" / "a.safetensors")["mean"]
    assert len(before) == 40 and torch.equal(
        found, load_file(out / "Jump" / "d.safetensors")["mean"]
    )
    encoded.clear()
    run(own, vae, out)
    assert encoded == []


def without_times(cache):
    """Turn a cache into one of an earlier version, whose files record no time of change of their
    videos.
    """
    for path in cache.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            size = file.metadata()["source_stamp"].split()[0]
        save_file(load_file(path), path, {"source_bytes": size})


def test_a_cache_without_times_stays_valid_but_a_newer_video_is_encoded_again(
    own, vae, tmp_path, encoded, capsys
):
    out = tmp_path / "out"
    run(own, vae, out)
    without_times(out)
    check_data_path(out)
    assert len(open_source(out, SIZE).videos()) == 5
    for is_complete in (True, False):
        if not is_complete:  # as after an interruption
            (out / "latents.json").rename(out / "latents.partial.json")
            (out / "Run" / "b.safetensors").unlink()
        encoded.clear()
        capsys.readouterr()
        run(own, vae, out)
        assert encoded == ([] if is_complete else ["Run/b.mkv"])
        kept = "5 files" if is_complete else "4 files"
        assert (
            capsys.readouterr().out.count(f"keeps {kept} of an earlier version, without the times")
            == 1
        )
    later = (out / "Run" / "a.safetensors").stat().st_mtime_ns + 1
    replace_by_equal_size(own / "Run" / "a.avi", own / "Jump" / "d.avi", later)
    encoded.clear()
    run(own, vae, out)
    assert encoded == ["Run/a.avi"]


# Corrupt videos and files, other settings, a full disk --------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_video_whose_latents_are_not_finite_is_skipped(root, vae, tmp_path, monkeypatch, capsys):
    posterior = VAE.posterior

    def too_large(self, clips):
        mean, std = posterior(self, clips)
        return mean + 1e5 * (len(mean[0, 0]) == 14), std  # the last chunk of Run/b.mkv

    monkeypatch.setattr(VAE, "posterior", too_large)
    run(root, vae, tmp_path / "out")
    assert (
        "Run/b.mkv can't be decoded, or its latents exceed float16; it is skipped"
        in capsys.readouterr().out
    )
    assert latents_settings(tmp_path / "out")["unreadable"] == ["Run/b.mkv"]


def test_a_cache_without_readable_videos_is_an_error(tmp_path, refused):
    write_video(tmp_path / "videos" / "a.avi", 40)
    scribble(tmp_path / "videos" / "a.avi")
    line = refused(tmp_path / "videos", "none", tmp_path / "out", late=True)
    assert f"--data-path {tmp_path / 'videos'}: can't decode any of its videos" in line
    assert (
        latents_settings(tmp_path / "videos") is None
        and not (tmp_path / "out" / "latents.json").exists()
    )


def test_too_many_corrupt_videos_are_an_error_unless_a_flag_allows_them(
    own, vae, tmp_path, refused
):
    scribble(own / "Run" / "a.avi")
    (own / "Run" / "text.avi").write_text("not a video")
    line = refused(own, vae, tmp_path / "out", late=True)
    assert (
        "--max-bad-fraction 0.1: 2 of 6 files are corrupt, expected at most 1: Run/a.avi; " in line
    )
    assert "move or delete them, or raise this limit" in line
    assert not (tmp_path / "out" / "latents.json").exists()
    run(own, vae, tmp_path / "out", "--max-bad-fraction", 0.4)
    assert latents_settings(tmp_path / "out")["unreadable"] == ["Run/a.avi", "Run/text.avi"]
    (own / "Run" / "more.avi").write_text("not a video")
    assert "2 of 7" in refused(own, vae, tmp_path / "new")  # found before anything is decoded
    assert not (tmp_path / "new").exists()


def holding(num_frames, side=8, parts=("mean", "std")):
    """A function that writes a latents file with these shapes and parts."""
    return lambda path: save_file(
        {part: torch.zeros(num_frames, 4, side, side).half() for part in parts}, path
    )


DAMAGES = {
    "truncated": truncate,
    "vanished": Path.unlink,
    "text": lambda path: path.write_text("hello" * 1000),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "of another video": holding(2),
    "of another size": holding(40, side=16),
    "without std": holding(40, parts=["mean"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_corrupt_latents_file_is_handled_like_a_corrupt_video(own_cache, damage):
    clips = clips_of(open_source(own_cache, SIZE), 16)
    DAMAGES[damage](own_cache / "Run" / "a.safetensors")
    check_replacements(clips, 10, "Run/a.safetensors")
    with pytest.raises(UnreadableError, match="a.safetensors"):
        clips.source.read(clips.videos[2], [20, 21])


def test_a_cache_with_other_settings_is_refused(root, vae, own_cache, tmp_path, refused):
    moved = shutil.copytree(vae, tmp_path / "vae")
    for name in ("latents.json", "latents.partial.json"):
        (own_cache / "latents.json").rename(own_cache / name)
        before = content(own_cache)
        assert "flips True, not False" in refused(root, vae, own_cache)
        other = refused(root, vae, own_cache, "--with-flips", "--image-size", 32)
        assert "image_size 16, not 32" in other and "name another folder" in other
        assert f"vae {vae}, not {moved}" in refused(root, moved, own_cache, "--with-flips")
        assert content(own_cache) == before
    settings = json.loads((own_cache / name).read_text()) | {"vae": str(moved)}
    (own_cache / name).write_text(json.dumps(settings))
    add_to_weights(moved, 0.1)
    assert "a latent cache with vae_sha256" in refused(root, moved, own_cache, "--with-flips")


@pytest.mark.parametrize(
    "complete", [0, 2, 6]
)  # before latents.partial.json, a video, latents.json
def test_a_full_disk_is_one_line_and_leaves_no_partial_file(
    root, vae, cache, tmp_path, monkeypatch, refused, complete
):
    out = tmp_path / "out"
    with (
        monkeypatch.context() as patch
    ):  # a file takes two calls of fsync, the second one for its folder
        calls = record_calls(
            patch, os, "fsync", lambda _: len(calls) == 2 * complete and no_space()
        )
        line = refused(root, vae, out, "--with-flips", status=1)
    assert "can't be written (No space left on device; the disk" in line
    assert len(content(out)) == complete
    run(root, vae, out, "--with-flips")
    assert content(out) == content(cache)
