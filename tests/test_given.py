"""Clips that a user names: which files, which frames of them, their class, and what becomes of them in the samples."""

import json
import subprocess
from argparse import ArgumentTypeError

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import sample_gd
from given import Details, as_ranges, frame_ranges, nearest_given
from runtime.cli import UserError
from tiny_data import make_samples, make_state, make_vae, write_npz
from tiny_videos import halves, picture, save, write_video
from training import ROOT, TORCHRUN, run_main
from vae import VAE, load_vae
from video.files import resize_and_crop
from video.inputs import find_clips

BOTH = ("video", "image")


def only(path):
    (clip,) = find_clips("--given", path, BOTH)
    return clip


def error_of(function, *arguments):
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert str(error.value).startswith("--given ") and "\n" not in str(error.value)
    return str(error.value)


# Files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "seconds", "shown"),
    [
        (25, 1 / 25, [0, 1, 2, 3]),
        (25, 2 / 25, [0, 2, 4, 6]),
        (30, 1 / 10, [0, 3, 6, 9]),
        (30, 1 / 25, [0, 1, 2, 4]),  # the nearest in time: 0, 1.2, 2.4, 3.6
        (10, 1 / 25, [0, 0, 1, 1]),  # a slower one stands still between its frames: 0, 0.4, 0.8, 1.2
    ],
)
def test_frames_are_those_at_the_times_of_the_model(tmp_path, rate, seconds, shown):
    write_video(tmp_path / "v.mp4", 20, rate=rate, codec="libx264", size=(48, 48))
    frames = only(tmp_path / "v.mp4").read(range(4), seconds, 48)
    assert frames.dtype == torch.uint8 and frames.shape == (3, 4, 48, 48)
    assert (halves(frames[0])[0] / 4).round().int().tolist() == shown
    assert torch.equal(only(tmp_path / "v.mp4").read((1, 3), seconds, 48), frames[:, 1::2])


def test_frames_are_scaled_and_cropped_as_those_of_training_are(tmp_path):
    save(tmp_path / "a.png", picture(48, 56))
    frames = only(tmp_path / "a.png").read([0], 0.04, 16)
    pixels = torch.from_numpy(np.array(Image.open(tmp_path / "a.png")))
    assert torch.equal(frames[:, 0], resize_and_crop(pixels.permute(2, 0, 1)[None], 16)[0])


def test_a_clip_has_as_many_frames_as_fit_into_it_and_more_are_refused(tmp_path):
    write_video(tmp_path / "v.avi", 10, size=(48, 48))
    save(tmp_path / "a.png", picture(48, 48))
    clip = only(tmp_path / "v.avi")
    assert [clip.count(seconds / 25) for seconds in (1, 2, 3, 9, 10)] == [10, 5, 4, 2, 1]
    assert clip.read(range(4), 3 / 25, 48).shape[1] == 4
    assert "has 4 frames of 0.12 s, wanted 5" in error_of(clip.read, range(5), 3 / 25, 48)
    assert only(tmp_path / "a.png").count(0.04) == 1
    assert "has 1 frame of 0.04 s, wanted 2" in error_of(only(tmp_path / "a.png").read, range(2), 0.04, 48)


def test_a_folder_stands_for_its_files_sorted_by_name_then_for_those_of_its_class_folders(tmp_path):
    for name in ("2.png", "10.JPG", ".hidden.png", "v.mp4", "notes.txt", "inner/3.png", "inner/deep/4.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")

    def names(*kinds):
        clips = find_clips("--given", tmp_path, kinds)
        return [clip.path.removeprefix(f"{tmp_path}/") for clip in clips], [clip.class_name for clip in clips]

    own = tmp_path.name
    assert names("image") == (["10.JPG", "2.png", "inner/3.png"], [own, own, "inner"])
    assert names(*BOTH) == (["10.JPG", "2.png", "v.mp4", "inner/3.png"], [own, own, own, "inner"])


def test_the_samples_of_an_earlier_run_are_read_at_their_own_frame_rate_with_their_classes(tmp_path):
    clips = np.arange(3 * 8, dtype=np.uint8).reshape(3, 8, 1, 1, 1) * np.ones((16, 16, 3), np.uint8)
    write_npz(tmp_path / "samples.npz", clips, [1, -1, 0])
    (tmp_path / "samples.json").write_text(json.dumps({"classes": ["A", "B"], "time_scale": 0.04}))
    for place in (tmp_path, tmp_path / "samples.npz"):
        found = find_clips("--given", place, BOTH)
        assert [clip.class_name for clip in found] == ["B", None, "A"]
        assert found[1].count(0.08) == 4
        assert found[1].read(range(4), 0.08, 16)[0, :, 0, 0].tolist() == [8, 10, 12, 14]


def test_every_mistake_in_a_file_is_one_line(tmp_path):
    write_video(tmp_path / "v.avi", 10)
    for name in ("text.avi", "text.png", "notes.txt", "empty/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("hello")
    find = lambda name, *kinds: find_clips("--given", tmp_path / name, kinds)  # noqa: E731
    for words, name, *kinds in (
        ("no such file or folder", "b.png", "image"),
        ("no video or image, wanted one of .avi", "notes.txt", *BOTH),
        ("no image, wanted one of .jpeg", "v.avi", "image"),
        ("no video or image", "empty", *BOTH),
    ):
        assert words in error_of(find, name, *kinds)
    for name in ("text.avi", "text.png"):
        assert "can't be decoded" in error_of(only(tmp_path / name).read, [0], 0.04, 16)
    make_samples(tmp_path)
    (tmp_path / "samples.json").unlink()
    assert "no samples.json in it" in error_of(find, "samples.npz", "video")


@pytest.mark.parametrize("shape", [(0, 3, 8, 8, 3), (2, 0, 8, 8, 3), (2, 3, 0, 8, 3), (2, 3, 8, 8, 1), (2, 3, 8, 8, 4)])
def test_a_sample_folder_without_pixels_is_one_line(tmp_path, shape):
    make_samples(tmp_path)
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros(shape, np.uint8), labels=np.zeros(shape[0], np.int64))
    assert "samples" in error_of(find_clips, "--given", tmp_path, ("video",))


def test_ranges_are_numbers_of_frames():
    assert frame_ranges("0-3,12-13") == (0, 1, 2, 3, 12, 13)
    assert frame_ranges(" 7, 2-2") == (2, 7)
    for text in ("0-3,12-13", "5", "0,2,4-6"):
        assert as_ranges(frame_ranges(text)) == text
    for text in ("", "3-1", "a", "1-", "-1", "1-2-3", "1;2"):
        with pytest.raises(ArgumentTypeError, match="wanted numbers of frames"):
            frame_ranges(text)


# Samples ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Checkpoints of models of 10 frames with random weights, of pixels and of latents, and clips."""
    root = tmp_path_factory.mktemp("given")
    for name, vae in (("pixels", "none"), ("latents", str(make_vae(root / "vae")))):
        sizes = {"input_size": 16, "in_channels": 3} if vae == "none" else {"input_size": 8, "in_channels": 4}
        state = make_state(**sizes, depth=1, hidden_size=48, num_heads=2, num_frames=10, use_rope=True,
                           temporal_patch_size=4)  # fmt: skip
        for weight in state["ema"].values():
            weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        state["config"]["data"]["vae"] = vae
        state["config"]["training"] |= {"forcing": 0.5}
        checkpoint.save(root / f"{name}.pt", state)
    write_video(root / "B" / "b.mp4", 12, codec="libx264", crf="0")
    write_video(root / "B" / "c.mp4", 3, codec="libx264", crf="0")
    write_video(root / "other" / "d.mp4", 12, codec="libx264", crf="0")
    save(root / "A" / "a.png", picture(20, 20))
    return root


def run(places, folder, *flags, model="pixels", **kwargs):
    shared = ["--video", "--num-samples", 2, "--num-sampling-steps", 4, "--stepsize", 0.05]
    run_main(sample_gd, "--ckpt", places / f"{model}.pt", *shared, "--folder", folder, *flags, **kwargs)
    if kwargs:
        return None
    return np.load(folder / "samples.npz")["arr_0"], json.loads((folder / "samples.json").read_text())


@pytest.mark.parametrize("sampler", ["gd", "ngd", "euler", "heun"])
@pytest.mark.parametrize("model", ["pixels", "latents"])
def test_given_frames_come_back_as_they_were_read_and_the_others_are_sampled(places, tmp_path, model, sampler):
    clips, about = run(places, tmp_path / "s", "--given", places / "B", "--sampler", sampler, model=model)
    plain, _ = run(places, tmp_path / "t", "--sampler", sampler, "--classes", "B", model=model)
    for number, (name, count) in enumerate((("b", 5), ("c", 3))):  # of 10 frames at most a half
        read = only(places / f"B/{name}.mp4").read(range(count), 0.04, 16)
        assert np.array_equal(clips[number, :count], read.permute(1, 2, 3, 0))
        assert not np.array_equal(clips[number, count:], plain[number, count:])
        assert about["given"][number] == {
            "source": str(places / f"B/{name}.mp4"), "frames": f"0-{count - 1}", "class": "B"
        }  # fmt: skip


def test_without_the_background_only_given_frames_are_not_what_the_vae_decodes(places, tmp_path, monkeypatch):
    decoded, decode = [], VAE.decode
    monkeypatch.setattr(VAE, "decode", lambda *args: decoded.append(decode(*args)) or decoded[-1])
    flags = ["--given", places / "B/b.mp4", "--given-frames", "0-4", "--num-frames", 16, "--window", 10, "--overlap", 4]
    clips, about = run(places, tmp_path / "s", *flags, "--no-keep-background", model="latents")
    assert np.array_equal(clips[:, 5:], torch.cat(decoded, dim=1)[:, 5:])
    read = only(places / "B/b.mp4").read(range(5), 0.04, 16)
    assert all(np.array_equal(clip[:5], read.permute(1, 2, 3, 0)) for clip in clips)
    assert about["source"]["keep_background"] is False
    decoded.clear()
    kept, about = run(places, tmp_path / "t", *flags, model="latents")
    assert not np.array_equal(kept, clips) and about["source"]["keep_background"] is True


def test_given_latents_are_kept_bit_for_bit_and_are_those_of_the_vae(places, tmp_path, monkeypatch):
    seen, generate_batch = [], sample_gd.generation.generate_batch

    def watched(*args, **kwargs):
        seen.append((generate_batch(*args, **kwargs), kwargs["given"]))
        return seen[-1][0]

    monkeypatch.setattr(sample_gd.generation, "generate_batch", watched)
    run(places, tmp_path / "s", "--given", places / "B/b.mp4", "--given-frames", "0,6-7", model="latents")
    (((latents, *_), given),) = seen
    read = only(places / "B/b.mp4").read([0, 6, 7], 0.04, 16)
    assert torch.equal(latents[:, :, [0, 6, 7]], given[:, :, [0, 6, 7]])
    torch.testing.assert_close(given[0][:, [0, 6, 7]], load_vae(str(places / "vae")).encode(read[None])[0])


def test_the_size_of_a_batch_matters_by_rounding_only(places, tmp_path):
    together, _ = run(places, tmp_path / "s", "--given", places / "B")
    apart, _ = run(places, tmp_path / "t", "--given", places / "B", "--batch-size", 1)
    np.testing.assert_allclose(together.astype(int), apart, atol=1)


def test_ranks_share_the_work_and_make_the_same_bytes(places, tmp_path):
    flags = ["--given", places / "B", "--batch-size", 1]
    alone, about = run(places, tmp_path / "s", *flags)
    command = [*TORCHRUN, ROOT / "EqM/sample_gd.py", "--ckpt", places / "pixels.pt", "--video", "--num-samples", 2]
    command += ["--num-sampling-steps", 4, "--stepsize", 0.05, "--folder", tmp_path / "t", *flags]
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    assert np.array_equal(np.load(tmp_path / "t/samples.npz")["arr_0"], alone)
    assert json.loads((tmp_path / "t/samples.json").read_text())["given"] == about["given"]


@pytest.mark.parametrize("kind", ["energy", "fixed"])
def test_energies_and_fixed_positions_complete_clips_too(places, tmp_path, kind):
    changes = {"energy": {"ebm": "dot", "use_rope": True}, "fixed": {"use_rope": False}}[kind]
    state = make_state(depth=1, hidden_size=48, num_heads=2, num_frames=10, temporal_patch_size=4, **changes)
    state["config"]["training"] |= {"forcing": 0.5}
    checkpoint.save(places / f"{kind}.pt", state)
    flags = ["--given", places / "B/b.mp4", "--stop-below", 1e9, *(["--report-energy"] if kind == "energy" else [])]
    clips, _ = run(places, tmp_path / "s", *flags, model=kind)
    read = only(places / "B/b.mp4").read(range(5), 0.04, 16)
    assert np.array_equal(clips[0, :5], read.permute(1, 2, 3, 0))
    rows = (tmp_path / "s/evaluations.csv").read_text().splitlines()
    assert [row.split(",")[-1] for row in rows[1:]] == ["1", "1"]  # the field of what is free is below the threshold


def test_samples_with_and_without_a_label_share_a_batch(places, tmp_path):
    _, about = run(places, tmp_path / "s", "--given", places, "--num-samples", 4)
    assert classes_of(about) == ["A", "B", "B", "none"]
    labels = np.load(tmp_path / "s/samples.npz")["labels"].tolist()
    assert labels == [0, 1, 1, -1]


def test_samples_never_replace_the_clips_that_they_continue(places, tmp_path, capsys):
    run(places, tmp_path / "s")
    before = (tmp_path / "s/samples.npz").read_bytes()
    for flag in ("--given", "--init"):
        run(places, tmp_path / "s", flag, tmp_path / "s", status=2)
        assert "lies in --folder" in capsys.readouterr().err
    assert (tmp_path / "s/samples.npz").read_bytes() == before


def classes_of(about):
    return [entry["class"] for entry in about["given"]]


def test_the_class_is_that_of_the_folder_else_that_of_the_flag_else_none(places, tmp_path, capsys):
    _, about = run(places, tmp_path / "a", "--given", places / "other")
    assert classes_of(about) == ["none", "none"] and "no class other" in capsys.readouterr().out
    assert np.load(tmp_path / "a/samples.npz")["labels"].tolist() == [-1, -1]
    _, about = run(places, tmp_path / "b", "--given", places / "other", "--classes", "A", "B")
    assert classes_of(about) == ["A", "B"] and "note" not in capsys.readouterr().out
    _, about = run(places, tmp_path / "c", "--given", places / "B", "--classes", "A")
    assert classes_of(about) == ["B", "B"] and "those keep it" in capsys.readouterr().out
    _, about = run(places, tmp_path / "d", "--given", places / "B", "--classes", "none")
    assert classes_of(about) == ["none", "none"] and "note" not in capsys.readouterr().out
    _, about = run(places, tmp_path / "e", "--given", tmp_path / "b")
    assert classes_of(about) == ["A", "B"]


def test_no_label_means_no_guidance(places, tmp_path):
    flags = "--given", places / "B", "--classes", "none"
    one, _ = run(places, tmp_path / "a", *flags, "--cfg-scale", 1)
    other, _ = run(places, tmp_path / "b", *flags, "--cfg-scale", 9)
    assert np.array_equal(one, other)
    alone, _ = run(places, tmp_path / "c", "--classes", "none", "--cfg-scale", 9)
    assert not np.array_equal(alone, run(places, tmp_path / "d", "--classes", "A", "--cfg-scale", 1)[0])


def test_a_picture_is_frame_0_and_a_start_is_cropped_too(places, tmp_path):
    clips, about = run(places, tmp_path / "a", "--given", places / "A/a.png")
    assert np.array_equal(clips[0, 0], only(places / "A/a.png").read([0], 0.04, 16)[:, 0].permute(1, 2, 0))
    assert [(entry["frames"], entry["class"]) for entry in about["given"]] == [("0", "A")] * 2
    start = ["--init", places / "B/b.mp4", "--init-gamma", 1, "--stepsize", 1e-9]
    clips, _ = run(places, tmp_path / "b", *start)
    assert np.array_equal(clips[0], only(places / "B/b.mp4").read(range(10), 0.04, 16).permute(1, 2, 3, 0))


def test_a_model_trained_without_forcing_gets_a_note_and_given_frames_are_marked_on_the_sheet(places, tmp_path, capsys):
    state = checkpoint.load(places / "pixels.pt")
    state["config"]["training"].pop("forcing")
    checkpoint.save(places / "plain.pt", state)
    run(places, tmp_path / "a", "--given", places / "B", model="plain")
    assert "trained without --forcing" in capsys.readouterr().out
    sheet = np.array(Image.open(tmp_path / "a/sheet.png")).reshape(-1, 3)
    assert (sheet == (255, 127, 14)).all(axis=1).any()
    run(places, tmp_path / "b", model="plain")
    sheet = np.array(Image.open(tmp_path / "b/sheet.png")).reshape(-1, 3)
    assert not (sheet == (255, 127, 14)).all(axis=1).any()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--given", "B", "--given-frames", "20"], "--given-frames 20: the samples have the frames 0 to 9"),
        (["--given", "B", "--given-frames", "0-9"], "--given-frames 0-9: are all frames of the samples"),
        (["--given", "B", "--given-frames", ""], "wanted numbers of frames such as"),
        (["--given", "B", "--given-frames", "0-3"], "c.mp4 has 3 frames of 0.04 s, wanted 4"),
        (["--given", "A/a.png", "--given-frames", "0-1"], "a.png has 1 frame of"),
        (["--given-frames", "0-3"], "--given-frames 0-3 are frames of --given"),
        (["--given", "B", "--init", "B"], "--given and --init"),
        (["--given", "no/such"], "no such file or folder"),
    ],
)
def test_every_mistake_in_the_flags_is_one_line(places, tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(places)
    run(places, tmp_path / "s", *flags, status=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sample_gd.py: error: ") and words in line
    assert not (tmp_path / "s").exists()


# What the VAE loses of given frames ----------------------------------------------------------------------------------


def random_video(frames, seed=0):
    """One sample, as read uint8 (1, 3, T, 4, 4) and decoded by a VAE that loses 10 levels, uint8 (1, T, 4, 4, 3)."""
    pixels = torch.randint(50, 200, (1, 1, 4, 4, 3), generator=torch.Generator().manual_seed(seed))
    pixels = pixels.expand(1, frames, 4, 4, 3)
    return pixels.permute(0, 4, 1, 2, 3).byte(), (pixels - 10).byte()


def test_where_nothing_moves_a_sample_goes_on_with_the_very_pixels_of_the_given_frames():
    real, decoded = random_video(6)
    found = Details(real, torch.arange(6)[None] < 2).add(decoded, 0)
    assert torch.equal(found, real.permute(0, 2, 3, 4, 1))


def test_what_moves_is_shown_as_it_was_decoded_and_given_frames_as_they_were_read():
    real, decoded = random_video(4)
    decoded[0, 2:, 1, 1] += 50  # something else is there
    found = Details(real, torch.arange(4)[None] < 2).add(decoded, 0)
    assert torch.equal(found[0, 2:, 1, 1], decoded[0, 2:, 1, 1])
    assert torch.equal(found[0, :2], real.permute(0, 2, 3, 4, 1)[0, :2])


def test_a_vae_that_loses_nothing_and_a_sample_that_is_given_nothing_are_shown_as_decoded():
    noise = torch.randint(256, (2, 5, 4, 4, 3), generator=torch.Generator().manual_seed(1)).byte()
    mask = torch.tensor([[False] * 5, [False, True, False, False, True]])
    real = noise.permute(0, 4, 1, 2, 3).clone()
    real[0] = 0  # read, but not given
    assert torch.equal(Details(real, mask).add(noise, 0), noise)


@pytest.mark.parametrize("given", [(0, 1), (3,), (0, 7), (5, 6), ()])
def test_window_by_window_a_sample_is_shown_as_it_is_at_once_if_what_is_given_comes_first(given):
    random = torch.Generator().manual_seed(2)
    decoded = torch.randint(100, 120, (2, 8, 4, 4, 3), generator=random).byte()
    real = torch.randint(100, 120, (2, 3, 8, 4, 4), generator=random).byte()
    mask = torch.tensor([[frame in given for frame in range(8)], [frame == 0 for frame in range(8)]])
    whole, parts = Details(real, mask).add(decoded, 0), Details(real, mask)
    windows = torch.cat([parts.add(decoded[:, first : first + 2], first) for first in (0, 2, 4, 6)], dim=1)
    known = min(given, default=0)
    assert torch.equal(windows[0, known:], whole[0, known:]) and torch.equal(windows[1], whole[1])


def test_the_nearest_given_frame_is_the_last_one_up_to_a_frame_or_else_the_first():
    mask = torch.rand(50, 9, generator=torch.Generator().manual_seed(3)) < 0.3
    for row, found in zip(mask.tolist(), nearest_given(mask).tolist(), strict=True):
        for frame, source in enumerate(found):
            given = [number for number, known in enumerate(row) if known]
            if given:
                assert source == max((number for number in given if number <= frame), default=given[0])
