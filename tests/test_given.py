"""Clips that the user gives: their files, frames and classes, and how samples show them."""

from argparse import ArgumentTypeError
from shlex import split
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from given import ClipReader, Details, as_ranges, frame_ranges, nearest_given
from sample_folders import write_samples
from tiny_videos import halves, picture, save, write_video
from training import error_of, record_calls, sample_here
from vae import VAE, load_vae
from video.files import UnreadableError, resize_and_crop
from video.index import scan_videos, split_videos
from video.inputs import find_clips
from video.source import Files

BOTH = ("video", "image")


def only(path):
    (clip,) = find_clips("--given", path, BOTH)
    return clip


@pytest.mark.parametrize(
    "rate, seconds, shown",
    [
        (25, 2 / 25, [0, 2, 4, 6]),
        (30, 1 / 25, [0, 1, 2, 4]),  # the nearest in time: 0, 1.2, 2.4, 3.6
        (12.5, 1 / 25, [0, 1, 1, 2]),  # of two equally close, the later one: 0, 0.5, 1, 1.5
        (10, 1 / 25, [0, 0, 1, 1]),  # a slower video repeats frames: 0, 0.4, 0.8, 1.2
    ],
)
def test_clips_are_read_at_the_frame_rate_of_the_model(tmp_path, rate, seconds, shown):
    write_video(tmp_path / "v.mp4", 20, rate=rate, codec="libx264", size=(48, 48))
    clip = only(tmp_path / "v.mp4")
    frames = clip.read(range(4), seconds, 48)
    assert (halves(frames[0])[0] / 4).round().int().tolist() == shown
    assert torch.equal(clip.read((1, 3), seconds, 48), frames[:, 1::2])


def test_the_frame_count_of_a_clip_follows_the_time_scale_and_frames_are_cropped(tmp_path):
    write_video(tmp_path / "v.avi", 10, size=(48, 48))
    save(tmp_path / "a.png", picture(48, 56))
    video = only(tmp_path / "v.avi")
    image = only(tmp_path / "a.png")
    counts = [video.count(frames / 25) for frames in (1, 2, 3, 9, 10)]
    assert counts == [10, 5, 4, 2, 1]
    assert image.count(0.04) == 1
    assert video.read(range(4), 3 / 25, 48).shape[1] == 4
    assert "has 4 frames of 0.12 s" in error_of(video.read, range(5), 3 / 25, 48)
    assert "has 1 frame of 0.04 s" in error_of(image.read, range(2), 0.04, 48)
    pixels = torch.from_numpy(np.array(Image.open(tmp_path / "a.png"))).permute(2, 0, 1)
    assert torch.equal(image.read([0], 0.04, 16)[:, 0], resize_and_crop(pixels[None], 16)[0])


def test_a_folder_gives_its_files_then_the_files_of_its_class_folders(tmp_path):
    (tmp_path / "inner/deep").mkdir(parents=True)
    used = ["10.JPG", "2.png", "v.mp4", "inner/3.png"]
    for name in [*used, ".hidden.png", "notes.txt", "inner/deep/4.png"]:
        (tmp_path / name).touch()
    clips = find_clips("", tmp_path, BOTH)
    assert [clip.path for clip in clips] == [str(tmp_path / name) for name in used]
    assert [clip.class_name for clip in clips] == [tmp_path.name] * 3 + ["inner"]
    assert len(find_clips("--given", tmp_path, ("image",))) == 3


def test_earlier_samples_keep_their_frame_rate_and_classes(tmp_path):
    numbers = np.arange(3 * 8, dtype=np.uint8).reshape(3, 8, 1, 1, 1)
    videos = np.broadcast_to(numbers, (3, 8, 16, 16, 3))
    folder = write_samples(tmp_path / "s", videos, [1, -1, 0], ["A", "B"])
    for path in (folder, folder / "samples.npz"):
        clips = find_clips("--given", path, BOTH)
        assert [clip.class_name for clip in clips] == ["B", None, "A"]
        assert str(clips[2]).endswith("sample 2")
        assert clips[1].count(0.08) == 4
        assert clips[1].read(range(4), 0.08, 16)[0, :, 0, 0].tolist() == [8, 10, 12, 14]


def test_frame_ranges_are_parsed_and_printed():
    assert frame_ranges("0-3,12-13") == (0, 1, 2, 3, 12, 13)
    assert frame_ranges(" 7, 2-2") == (2, 7)
    for text in ("0-3,12-13", "5", "0,2,4-6"):
        assert as_ranges(frame_ranges(text)) == text
    for text in ("", "3-1", "a", "1-", "-1", "1-2-3", "1;2"):
        with pytest.raises(ArgumentTypeError, match="numbers of frames"):
            frame_ranges(text)


@pytest.fixture
def sample(places, tmp_path):
    """A function that returns (samples, content of samples.json) of a checkpoint and flags."""

    def sample(model, *flags, status=0):
        ckpt = places / f"{model}.pt"
        return sample_here(ckpt, tmp_path / "s", "--no-previews", *flags, status=status)

    return sample


def frames_of(path, frames):
    """Read frames of a clip as a sample shows them, (n, 16, 16, 3)."""
    return only(path).read(list(frames), 0.04, 16).permute(1, 2, 3, 0).numpy()


@pytest.mark.parametrize("model", ["pixels", "latents", "energy", "fixed"])
def test_samples_show_given_frames_exactly_as_read(places, sample, model):
    flags = {"latents": ["--sampler", "heun"], "energy": ["--report-energy"]}.get(model, [])
    clips, about = sample(model, "--given", places / "B", *flags)
    plain, _ = sample(model, "--classes", "B", *flags)
    counts = {"b": 4, "c": 3}  # of 8 frames at most a half
    for number, (name, count) in enumerate(counts.items()):
        path = places / f"B/{name}.mp4"
        assert np.array_equal(clips[number, :count], frames_of(path, range(count)))
        # the others are sampled
        assert not np.array_equal(clips[number, count:], plain[number, count:])
        assert about["given"][number] == {
            "source": str(path),
            "frames": f"0-{count - 1}",
            "class": "B",
            "time_scale": 0.04,
        }


def test_given_latents_stay_bit_for_bit_and_only_background_is_added(places, sample, monkeypatch):
    windows = record_calls(monkeypatch, VAE, "decode", lambda vae, latents: latents)
    path = places / "B/b.mp4"
    flags = split("--given-frames 0-3,5 --num-frames 16 --window 10 --overlap 4")
    flags += ["--given", path]
    clips, about = sample("latents", *flags, "--no-keep-background")
    known = [0, 1, 2, 3, 5]
    others = [4, *range(6, 16)]
    vae = load_vae(str(places / "vae"))
    (encoded,) = vae.encode(only(path).read(known, 0.04, 16)[None])
    first, second = windows[0][:, :, known]
    torch.testing.assert_close(first, encoded)
    assert torch.equal(first, second)
    decoded = torch.cat([vae.decode(latents) for latents in tuple(windows)], dim=1)
    assert np.array_equal(clips[:, others], decoded[:, others])
    for clip in clips:
        assert np.array_equal(clip[known], frames_of(path, known))
    assert about["source"]["keep_background"] is False
    kept, about = sample("latents", *flags)
    assert not np.array_equal(kept, clips)
    assert np.array_equal(kept[:, known], clips[:, known])
    assert about["source"]["keep_background"] is True


@pytest.mark.parametrize(
    "folder, flags, classes",
    [
        ("other", [], ["none", "none"]),
        ("other", split("--classes A B"), ["A", "B"]),
        ("B", ["--classes", "A"], ["B", "B"]),
        ("B", ["--classes", "none"], ["none", "none"]),
    ],
)
def test_the_class_is_the_folder_of_the_clip_else_the_flag_else_none(
    places, sample, capsys, folder, flags, classes
):
    _, about = sample("pixels", "--given", places / folder, *flags)
    assert [entry["class"] for entry in about["given"]] == classes
    is_unknown = folder == "other" and not flags
    assert ("note: the model has no class other" in capsys.readouterr().out) == is_unknown


def test_several_samples_continue_the_same_clip(places, sample, tmp_path):
    clips, about = sample("pixels", "--given", places, "--num-samples", 8, "--samples-per-clip", 2)
    entries = about["given"][::2]
    names = [entry["source"][-5:] for entry in entries]
    assert names == ["a.png", "b.mp4", "c.mp4", "d.mp4"]  # not z.mp4
    assert [entry["class"] for entry in entries] == ["A", "B", "B", "none"]  # in one batch
    assert np.load(tmp_path / "s/samples.npz")["labels"].tolist() == [0, 0, 1, 1, 1, 1, -1, -1]
    assert np.array_equal(clips[2, :4], clips[3, :4])
    assert not np.array_equal(clips[2, 4:], clips[3, 4:])


def test_clips_of_a_split_keep_their_own_frame_rate(sample, tmp_path, monkeypatch, capsys):
    data = tmp_path / "data"
    frames = [0, 1, 2, 7]
    for name, rate in (("A/a", 25), ("A/b", 20), ("B/c", 12.5)):
        write_video(data / f"{name}.avi", 20, rate, size=(16, 16))
    _, val = split_videos(data, scan_videos(data).videos, 0.6)
    flags = split("--given-split val --val-fraction 0.6 --given-frames 0-2,7")
    flags += ["--given", data, "--samples-per-clip", 2, "--num-samples"]
    clips, about = sample("pixels", *flags, 4)
    for clip, entry in zip(clips, about["given"], strict=True):
        (video,) = (video for video in val if entry["source"].startswith(f"{video.path}, clip "))
        assert entry["frames"] == "0-2,7"
        assert entry["class"] == video.class_name
        assert entry["time_scale"] == pytest.approx(1 / video.fps)
        grays = clip[frames, :, :6].mean(axis=(1, 2, 3))
        assert np.diff(grays) == pytest.approx([4, 4, 20], abs=2)
    again = find_clips("--given", tmp_path / "s", BOTH)
    for number, entry in enumerate(about["given"]):
        movie = only(tmp_path / f"s/{number:06d}.mp4")
        for one in (movie, again[number]):
            _, seconds, _ = one.open()
            assert seconds == pytest.approx(entry["time_scale"], rel=1e-4)
    assert np.array_equal(clips[::2, frames], clips[1::2, frames])
    assert len({entry["source"] for entry in about["given"]}) == 2  # one for two samples
    real = {"split": "val", "val_fraction": 0.6, "num_clips": 2, "samples_per_clip": 2}
    assert about["real"].items() >= real.items()
    assert "note: --num-samples" not in capsys.readouterr().out

    def read(files, video, *settings):
        if video == val[0]:
            raise UnreadableError(video.path)

    record_calls(monkeypatch, Files, "read", read)
    sample("pixels", *flags, 3, status=2)
    output = capsys.readouterr()
    assert "note: --num-samples 3: the last clip has fewer samples" in output.out
    assert f"{val[0].path} can't be decoded" in output.err


def test_a_given_picture_is_frame_0_and_init_clips_are_cropped_too(places, tmp_path, capsys):

    def has_mark():
        sheet = np.array(Image.open(tmp_path / "s/sheet.png"))
        return (sheet == (255, 127, 14)).all(axis=-1).any()

    path = places / "A/a.png"
    clips, about = sample_here(places / "plain.pt", tmp_path / "s", "--given", path)
    assert np.array_equal(clips[0, :1], frames_of(path, [0]))
    assert [entry["frames"] for entry in about["given"]] == ["0", "0"]
    assert "trained without --forcing" in capsys.readouterr().out
    assert has_mark()
    path = places / "B/b.mp4"
    flags = ["--init", path, "--init-gamma", 1, "--stepsize", 1e-9]
    clips, about = sample_here(places / "plain.pt", tmp_path / "s", *flags)
    assert np.array_equal(clips[0], frames_of(path, range(8)))
    assert "given" not in about
    assert "trained without --forcing" not in capsys.readouterr().out
    assert not has_mark()


def test_clips_are_read_up_to_the_last_given_frame_however_long_the_video(places, sample):
    plan = SimpleNamespace(conditions=[0] * 3, num_frames=24, image_size=16, time_scale=0.04)
    path = places / "B/b.mp4"
    reader = ClipReader(plan, [only(path)] * 2, frames=[(0, 1), (2, 5)], indices=[0])
    clips, masks = reader(range(3))
    assert clips.shape == (3, 3, 6, 16, 16)
    assert masks[1].nonzero()[:, 0].tolist() == [2, 5]
    flags = split("--num-frames 24 --window 8 --given-frames 0-2,5 --no-keep-background")
    clips, _ = sample("pixels", "--given", path, *flags)
    known = [0, 1, 2, 5]
    assert np.array_equal(clips[0, known], frames_of(path, known))


def random_video(frames, low=50, high=200):
    """Random frames of two samples, uint8 (2, T, 4, 4, 3)."""
    return torch.randint(low, high, (2, frames, 4, 4, 3)).byte()


def details(real, mask, **settings):
    return Details(real.permute(0, 4, 1, 2, 3), mask, **settings)


def test_static_parts_keep_the_exact_pixels_of_given_frames():
    real = random_video(1).expand(2, 6, 4, 4, 3)
    mask = torch.arange(6).expand(2, 6) < 2
    decoded = real - 10  # the loss of a VAE
    assert torch.equal(details(real, mask).add(decoded, 0), real)
    decoded[0, 2:, 1, 1, 0] += 50  # another object, shown as decoded
    expected = real.clone()
    expected[0, 2:, 1, 1] = decoded[0, 2:, 1, 1]
    assert torch.equal(details(real, mask).add(decoded, 0), expected)
    plain = details(real, mask, keep_background=False).add(decoded[:, 1:], 1)
    assert torch.equal(plain, torch.cat([real[:, 1:2], decoded[:, 2:]], dim=1))


def test_without_given_frames_or_loss_clips_are_shown_as_decoded():
    noise = random_video(5, 0, 256)
    mask = torch.tensor([[False] * 5, [False, True, False, False, True]])
    real = noise.clone()
    real[0] = 0  # read, but not given
    assert torch.equal(details(real, mask).add(noise, 0), noise)


@pytest.mark.parametrize("given", [(0, 1), (3,), (0, 7), ()])
def test_details_do_not_depend_on_windows(given):
    decoded = random_video(8, 100, 120)
    real = random_video(8, 100, 120)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0, list(given)] = True
    mask[1, 0] = True
    whole = details(real, mask).add(decoded, 0)
    parts = details(real, mask)
    windows = [parts.add(decoded[:, first : first + 2], first) for first in (0, 2, 4, 6)]
    windows = torch.cat(windows, dim=1)
    known = min(given, default=0)
    assert torch.equal(windows[0, known:], whole[0, known:])
    assert torch.equal(windows[1], whole[1])


def test_the_nearest_given_frame_is_the_previous_one_or_else_the_first():
    mask = torch.rand(50, 9) < 0.3
    for row, nearest in zip(mask, nearest_given(mask).tolist(), strict=True):
        given = row.nonzero().flatten().tolist()
        for frame in range(9 if given else 0):
            before = [number for number in given if number <= frame]
            assert nearest[frame] == max(before, default=given[0])
