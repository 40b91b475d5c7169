"""Latent caches of a tiny VAE; faults/test_cache_kills.py kills their makers and has two ranks make them."""

import json
import os
import resource
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cache_latents
from runtime.cli import UserError
from test_vae import add_to_weights, save_tiny
from test_video_clips import check_replacements
from tiny_videos import scribble, write_ucf_list, write_video
from vae import load_vae
from video import files, index
from video.clips import Clips, collate
from video.files import UnreadableError, Video, read_frames, read_latents, resize_and_crop
from video.index import BadVideos, check_data_path, latents_path, latents_settings, scan_videos, split_videos

SIZE = 16
NAMES = {"Run/a.avi": 40, "Run/b.c.mp4": 21, "Run/b.mkv": 30, "Jump/d.avi": 20, "Jump/e.avi": 16}  # frames


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
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(monkeypatch, root, vae, out, "--with-flips")
    return out


@pytest.fixture
def own(root, tmp_path):
    """A copy of `root` to change, alone in its folder."""
    return Path(shutil.copytree(root, tmp_path / "videos"))


def flags(root, vae, out, *more):
    return [str(part) for part in ("--data-path", root, "--vae", vae, "--image-size", SIZE, "--out", out, *more)]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["cache_latents.py", *flags(*arguments)])
    cache_latents.main()


def refused(monkeypatch, capsys, *arguments, status=2):
    """Runs it with wrong input and returns the error line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert ended.value.code == status and len(lines) == 1, lines
    return lines[0]


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("[!.]*") if path.is_file()}


def clips_of(folder, num_frames=4, **kwargs):
    scan = scan_videos(folder)
    return Clips(folder, scan.videos, scan.classes, num_frames, SIZE, **kwargs)


def split_keys(folder, fraction=0.05):
    parts = split_videos(folder, scan_videos(folder).videos, fraction)
    return tuple([video.key for video in part] for part in parts)


# Content.


def test_a_file_holds_the_posterior_of_every_frame_of_its_video(root, vae, cache):
    model = load_vae(vae)
    for video in scan_videos(root).videos:
        frames = read_frames(root, video, range(video.num_frames))
        clip = resize_and_crop(torch.from_numpy(frames).permute(0, 3, 1, 2), SIZE).transpose(0, 1)[None]
        found = load_file(cache / latents_path(video))
        assert found.keys() == {"mean", "std", "mean_flipped", "std_flipped"}
        for suffix, view in (("", clip), ("_flipped", clip.flip(-1))):
            for name, latents in zip(("mean", "std"), model.posterior(view), strict=True):
                tensor = found[name + suffix]
                assert tensor.dtype == torch.float16 and tensor.shape == (video.num_frames, 4, SIZE // 2, SIZE // 2)
                torch.testing.assert_close(tensor.float(), latents[0].transpose(0, 1), rtol=1e-3, atol=1e-4)


def test_latents_json_has_the_settings_and_the_videos(root, vae, cache):
    settings = latents_settings(cache)
    videos = settings.pop("videos")
    assert settings.pop("vae_sha256") == load_vae(vae).sha256
    assert settings == {
        "format": 1, "vae": vae, "image_size": SIZE, "channels": 4, "downsample": 2, "scale": 0.7, "shift": 0.0,
        "flips": True, "num_videos": 5, "num_frames": sum(NAMES.values()), "classes": ["Jump", "Run"],
        "unreadable": [],
    }  # fmt: skip
    names = ["Jump/d", "Jump/e", "Run/a", "Run/b.c", "Run/b"]  # in the order of the videos
    assert [video["path"] for video in videos] == [f"{name}.safetensors" for name in names]
    assert videos[3] == {
        "path": "Run/b.c.safetensors", "class_name": "Run", "num_frames": 21, "fps": 30.0, "height": 48, "width": 64
    }  # fmt: skip
    assert {path.name for path in cache.glob("[!.]*")} == {"latents.json", "Jump", "Run"}
    assert latents_settings(root) is None and latents_settings(root / "missing") is None


def test_a_scan_of_a_cache_equals_that_of_its_videos_and_opens_no_file(root, cache, monkeypatch):
    monkeypatch.setattr(files, "safe_open", lambda *_: pytest.fail("opened a file"))
    videos, cached = scan_videos(root), scan_videos(cache)
    assert [video.key for video in cached.videos] == [video.key for video in videos.videos]
    for name in ("class_name", "num_frames", "fps", "height", "width"):
        assert [getattr(video, name) for video in cached.videos] == [getattr(video, name) for video in videos.videos]
    assert (cached.classes, cached.unreadable, cached.is_saved) == (videos.classes, [], True)
    check_data_path(cache)


@pytest.mark.parametrize(("interval", "flip"), [((1, 1), False), ((1, 4), True)])
def test_clips_from_a_cache_are_those_from_its_videos(root, vae, cache, interval, flip):
    model = load_vae(vae)
    videos, cached = (clips_of(place, frame_interval=interval, flip=flip, seed=3) for place in (root, cache))
    for k in range(12):
        sample, other = videos[k], cached[k]
        assert other["clip"].dtype == torch.float16 and other["clip"].shape == (2, 4, 4, SIZE // 2, SIZE // 2)
        assert other["clip"].is_contiguous()
        expected = torch.cat(model.posterior(sample["clip"][None]))
        torch.testing.assert_close(other["clip"].float(), expected, rtol=1e-3, atol=1e-4)
        assert Path(other.pop("video")).stem == Path(sample.pop("video")).stem
        del sample["clip"], other["clip"]
        assert sample == other
    batch = collate([cached[0], cached[1]])
    assert batch["clips"].shape == (2, 2, 4, 4, SIZE // 2, SIZE // 2) and batch["clips"].dtype == torch.float16


def test_a_cache_without_flips_in_a_folder_with_hidden_files_only_refuses_to_flip(root, vae, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".nfs01").write_text("")
    run(monkeypatch, root, vae, tmp_path / "out")
    assert clips_of(tmp_path / "out", flip=False)[0]["clip"].shape == (2, 4, 4, SIZE // 2, SIZE // 2)
    with pytest.raises(ValueError, match="flip=False"):
        clips_of(tmp_path / "out", flip=True)


@pytest.mark.parametrize("place", ["in the videos' folder", "beside it"])
def test_a_cache_is_split_by_the_ucf_lists_of_its_videos(own, vae, tmp_path, monkeypatch, place):
    out = tmp_path / "elsewhere" / "deep"
    write_ucf_list(own if place == "in the videos' folder" else own.parent, ["Jump/d", "Run/a", "Run/b.c"])
    run(monkeypatch, own, vae, out)
    assert split_keys(out) == split_keys(own) == (["Jump/d", "Run/a", "Run/b.c"], ["Jump/e", "Run/b"])


def test_a_cache_is_split_by_the_hash_as_its_videos_are(root, cache):
    for fraction in (0.0, 0.2, 0.5, 1.0):
        assert split_keys(cache, fraction) == split_keys(root, fraction)
    assert not list(cache.rglob("ucf*"))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux shows what a process has mapped")
@pytest.mark.parametrize("frame_indices", [list(range(10_000, 10_016)), list(range(0, 32_000, 2000))])
def test_of_a_long_video_only_the_part_around_the_frames_of_the_clip_is_read(tmp_path, monkeypatch, frame_indices):
    place, shape, frame_bytes = tmp_path / "v.safetensors", (32_768, 4, 32, 32), 8192
    parts = {name: [k * 2**28, (k + 1) * 2**28] for k, name in enumerate(("mean", "std"))}
    header = {name: {"dtype": "F16", "shape": shape, "data_offsets": offsets} for name, offsets in parts.items()}
    header = json.dumps(header).encode()
    with open(place, "wb") as file:  # a sparse file of 512 MB
        file.write(len(header).to_bytes(8, "little") + header)
        for k, frame_index in enumerate(frame_indices):
            for name, (start, _) in parts.items():
                file.seek(8 + len(header) + start + frame_bytes * frame_index)
                file.write(torch.full(shape[1:], k if name == "mean" else k + 0.5).half().numpy().tobytes())
        file.truncate(8 + len(header) + 2**29)
    resident = []

    class Watched:
        def __init__(self, *args):
            self.file = safe_open(*args)

        def __enter__(self):
            return self.file

        def __exit__(self, *_):  # the clip is read and the file still mapped
            maps = Path("/proc/self/smaps").read_text().split("VmFlags")
            (lines,) = [part.splitlines() for part in maps if str(place) in part]
            resident.extend(int(line.split()[1]) for line in lines if line.startswith("Rss:"))

    monkeypatch.setattr(files, "safe_open", Watched)
    clip = read_latents(tmp_path, Video(place.name, "all", shape[0], 25.0, 48, 64), frame_indices)
    expected = torch.arange(16.0).half().view(16, 1, 1).expand(4, 16, 32, 32)
    assert torch.equal(clip, torch.stack([expected, expected + 0.5]))
    assert 0 < resident[0] < 2**19 / 8, "KB, including the read-ahead of the kernel"


# Ranks and changes.


def spy_on_encode(monkeypatch):
    """The paths of the videos that are encoded from here on."""
    encoded, encode_video = [], cache_latents.encode_video

    def spy(*args):
        encoded.append(args[-1].path)
        return encode_video(*args)

    monkeypatch.setattr(cache_latents, "encode_video", spy)
    return encoded


def test_ranks_get_about_the_same_number_of_frames(monkeypatch):
    monkeypatch.setattr(cache_latents, "world_size", lambda: 4)
    frames = np.random.default_rng(0).integers(29, 400, 64)
    videos = [Video(f"{k}.avi", "all", int(num_frames), 25.0, 48, 64) for k, num_frames in enumerate(frames)]
    parts = cache_latents.split_evenly(videos)
    assert sorted((video for part in parts for video in part), key=videos.index) == videos
    sums = [sum(video.num_frames for video in part) for part in parts]
    assert max(sums) - min(sums) <= 30


def test_a_complete_cache_says_so_and_is_not_changed(root, vae, cache, monkeypatch, capsys):
    encoded, before = spy_on_encode(monkeypatch), content(cache)
    times = {path: path.stat().st_mtime_ns for path in cache.rglob("*.*")}
    run(monkeypatch, root, vae, cache, "--with-flips")
    assert "is complete: 5 videos, 127 frames" in capsys.readouterr().out
    assert encoded == [] and content(cache) == before
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.*")} == times


def test_run_again_it_adds_new_changed_damaged_and_lost_videos_and_drops_removed_ones(
    own, vae, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    run(monkeypatch, own, vae, out)
    write_video(own / "Swim" / "f.avi", 18)
    write_video(own / "Jump" / "d.avi", 25)
    (own / "Jump" / "e.avi").unlink()
    (out / "Run" / "a.safetensors").unlink()
    truncate(out / "Run" / "b.safetensors")
    encoded = spy_on_encode(monkeypatch)
    run(monkeypatch, own, vae, out)
    assert encoded == ["Run/a.avi", "Run/b.mkv", "Jump/d.avi", "Swim/f.avi"]  # the longest of a round first
    assert "1 videos are gone from --data-path, the first is Jump/e.safetensors" in capsys.readouterr().out
    run(monkeypatch, own, vae, tmp_path / "fresh")
    (out / "Jump" / "e.safetensors").unlink()
    assert content(out) == content(tmp_path / "fresh")
    assert latents_settings(out)["classes"] == ["Jump", "Run", "Swim"]


def test_a_complete_cache_can_be_used_while_it_is_updated(own, vae, tmp_path, monkeypatch):
    run(monkeypatch, own, vae, tmp_path / "out")
    write_video(own / "Run" / "new.avi")
    monkeypatch.setattr(cache_latents, "encode_video", lambda *_: check_data_path(tmp_path / "out") or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(monkeypatch, own, vae, tmp_path / "out")
    assert len(scan_videos(tmp_path / "out").videos) == 5


def test_the_index_is_in_the_cache_and_not_in_the_folder_of_the_videos(own, vae, tmp_path, monkeypatch):
    before = sorted(own.rglob("*"))
    run(monkeypatch, own, vae, tmp_path / "out")
    assert sorted(own.rglob("*")) == before
    monkeypatch.setattr(index, "probe", lambda *_: pytest.fail("opened a video again"))
    run(monkeypatch, own, vae, tmp_path / "out")


# Bad videos and bad files.


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_video_that_cannot_be_decoded_is_named_once_listed_and_left_out(own, vae, tmp_path, monkeypatch, capsys):
    scribble(own / "Run" / "a.avi")
    run(monkeypatch, own, vae, tmp_path / "out")
    assert capsys.readouterr().out.count("Run/a.avi can't be decoded") == 1
    settings = latents_settings(tmp_path / "out")
    assert settings["unreadable"] == ["Run/a.avi"] and settings["num_videos"] == 4
    assert not list((tmp_path / "out").rglob("a.*"))
    scan = scan_videos(tmp_path / "out")
    assert scan.unreadable == ["Run/a.avi"] and len(scan.videos) == 4
    write_video(own / "Run" / "a.avi", 40)  # repaired
    run(monkeypatch, own, vae, tmp_path / "out")
    assert latents_settings(tmp_path / "out")["unreadable"] == []
    assert latents_settings(tmp_path / "out")["num_videos"] == 5


def test_too_many_bad_videos_are_an_error_unless_they_are_allowed(own, vae, tmp_path, monkeypatch, capsys):
    scribble(own / "Run" / "a.avi")
    (own / "Run" / "text.avi").write_text("not a video")
    line = refused(monkeypatch, capsys, own, vae, tmp_path / "out", status=1)
    assert "2 of 6 files are bad (newest: Run/a.avi)" in line and "--max-bad-fraction" in line
    assert not (tmp_path / "out" / "latents.json").exists()
    run(monkeypatch, own, vae, tmp_path / "out", "--max-bad-fraction", 0.4)
    assert latents_settings(tmp_path / "out")["unreadable"] == ["Run/a.avi", "Run/text.avi"]
    (own / "Run" / "more.avi").write_text("not a video")
    assert "2 of 7" in refused(monkeypatch, capsys, own, vae, tmp_path / "new")  # found before anything is decoded
    assert not (tmp_path / "new").exists()


def holding(num_frames, side=8, value=0.0, parts=("mean", "std"), dtype=torch.float16):
    """Writes a latents file with these values."""
    latents = torch.full((num_frames, 4, side, side), value, dtype=dtype)
    return lambda path: save_file({part: latents.clone() for part in parts}, path)


DAMAGES = {
    "truncated": truncate,
    "vanished": Path.unlink,
    "text": lambda path: path.write_text("hello" * 1000),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "of another video": holding(2),
    "of NaNs": holding(40, value=float("nan")),
    "of another size": holding(40, side=16),
    "of another type": holding(40, dtype=torch.float32),
    "without std": holding(40, parts=["mean"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_latents_file_is_named_replaced_and_counted_like_a_bad_video(cache, tmp_path, damage):
    folder = Path(shutil.copytree(cache, tmp_path / "cache"))
    clips = clips_of(folder, num_frames=16)
    DAMAGES[damage](folder / "Run" / "a.safetensors")
    samples = [clips[k] for k in range(10)]
    check_replacements(clips, samples, "Run/a.safetensors")
    bad_videos = BadVideos(len(clips), 0.0)
    assert bad_videos.add([path for sample in samples for path in sample["bad"]]) == ["Run/a.safetensors"]
    with pytest.raises(UnreadableError, match="a.safetensors"):
        read_latents(folder, clips.videos[2], [20, 21], shape=clips.latent_shape)


def test_an_unusable_cache_is_one_line_that_says_what_to_do(cache, tmp_path):
    folder = Path(shutil.copytree(cache, tmp_path / "cache"))

    def message(function, *args, **kwargs):
        with pytest.raises(UserError) as error:
            function(*args, **kwargs)
        assert str(error.value).startswith(f"--data-path {folder}: ") and "\n" not in str(error.value)
        return str(error.value)

    assert "leave out --video" not in message(scan_videos, folder, images=True)
    assert "add --video" in message(check_data_path, folder, images=True)
    (folder / "Jump" / "e.safetensors").unlink()
    (folder / "Run" / "a.safetensors").unlink()
    missing = message(scan_videos, folder)
    assert "Jump/e.safetensors" in missing and "run cache_latents.py again" in missing
    settings = json.loads((folder / "latents.json").read_text())
    for text, words in (
        (json.dumps(settings | {"format": 2}), "format 2, this code reads 1"),
        (json.dumps(settings | {"scale": "1"}), "damaged (scale is 1"),
        (json.dumps(settings | {"unreadable": None}), "damaged (unreadable is None"),
        (json.dumps(settings | {"classes": ["Run"]}), "damaged (no class Jump"),
        (json.dumps(settings | {"videos": [{}]}), "damaged (path is None"),
        ("[", "damaged"),
        ("[]", "damaged"),
    ):
        (folder / "latents.json").write_text(text)
        assert words in message(check_data_path, folder) and words in message(latents_settings, folder)
    (folder / "latents.json").rename(folder / "latents.partial.json")
    for function in (check_data_path, scan_videos, latents_settings):
        assert "not complete: run cache_latents.py again" in message(function, folder)


# User errors.


def test_a_cache_with_other_settings_is_refused_complete_or_not(root, vae, cache, tmp_path, monkeypatch, capsys):
    folder = Path(shutil.copytree(cache, tmp_path / "cache"))
    for name in ("latents.json", "latents.partial.json"):
        (folder / "latents.json").rename(folder / name)
        before = content(folder)
        assert "flips True, not False" in refused(monkeypatch, capsys, root, vae, folder)
        other = refused(monkeypatch, capsys, root, vae, folder, "--with-flips", "--image-size", 32)
        assert "image_size 16, not 32" in other and "name another folder" in other
        moved = shutil.copytree(vae, tmp_path / "vae", dirs_exist_ok=True)
        assert f"vae {vae}, not {moved}" in refused(monkeypatch, capsys, root, moved, folder, "--with-flips")
        assert content(folder) == before


def test_a_cache_of_other_weights_in_the_same_place_is_refused_and_one_that_does_not_say_is_kept(
    own, vae, tmp_path, monkeypatch, capsys
):
    place, out = shutil.copytree(vae, tmp_path / "vae"), tmp_path / "cache"
    run(monkeypatch, own, place, out)
    add_to_weights(place, 0.1)
    assert "a latent cache with vae_sha256" in refused(monkeypatch, capsys, own, place, out)
    settings = json.loads((out / "latents.json").read_text())
    del settings["vae_sha256"]  # as in earlier versions
    (out / "latents.json").write_text(json.dumps(settings))
    run(monkeypatch, own, place, out)


@pytest.mark.parametrize("call", [1, 3, 7])  # latents.partial.json, the second video, latents.json
def test_a_full_disk_is_one_line_and_status_1_and_leaves_no_partial_file(
    root, vae, cache, tmp_path, monkeypatch, capsys, call
):
    out, fsync, calls = tmp_path / "out", os.fsync, []

    def full(descriptor):
        if not os.path.isdir(f"/proc/self/fd/{descriptor}"):
            calls.append(descriptor)
        if len(calls) >= call:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        line = refused(patch, capsys, root, vae, out, "--with-flips", status=1)
    assert "can't be written (No space left on device)" in line and "run the same command again to continue" in line
    files = content(out)
    assert len(files) == call - 1 and files.items() <= (content(cache) | files).items()
    run(monkeypatch, root, vae, out, "--with-flips")
    assert content(out) == content(cache)


def test_a_write_that_is_cut_short_is_one_line_and_status_1_and_leaves_no_temporary_file(
    root, vae, tmp_path, monkeypatch, capsys
):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))  # Run/a takes more
    try:
        line = refused(monkeypatch, capsys, root, vae, tmp_path / "out", status=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "a.safetensors can't be written (File too large)" in line
    assert content(tmp_path / "out").keys() == {"latents.partial.json"}
