"""Videos longer than a window: what each window is given, what a longer video has in common with a shorter one."""

import json
import subprocess
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

import checkpoint
import gallery
import picture
import sample_gd
import train
from checkpoint import longest_time_scale
from generation import Source, generate_clips, generate_parts, longest_window
from runtime.rng import normal
from test_models import tiny
from tiny_data import make_state, make_vae
from tiny_videos import write_video
from training import PYTHON, ROOT, TORCHRUN, Training, run_main
from vae import VAE
from video.index import scan_videos
from video.inputs import find_clips

SETTINGS = {"method": "gd", "num_steps": 4, "step_size": 0.1, "momentum": 0.3, "stop_below": None, "guidance": 1.5,
            "precision": "fp32"}  # fmt: skip


def make_source(num_frames, window=None, overlap=0, count=3, **changes):
    model = tiny(in_channels=3, **changes)
    windows = {"window": window, "overlap": overlap}
    return Source(model, VAE("none"), ["A", "B"], torch.arange(count) % 2, num_frames, 0.04, **windows)


def clips_of(source, **settings):
    indices = range(len(source.labels))
    batches = generate_clips(source, indices, 0, "cpu", SETTINGS, batch_size=2, show=False, **settings)
    return torch.cat([videos for videos, _, _ in batches])


@pytest.mark.parametrize(
    ("num_frames", "window", "overlap", "starts"),
    [(16, 16, 0, [0]), (12, 12, 0, [0]), (17, 16, 8, [0, 8]), (24, 16, 8, [0, 8]), (25, 16, 8, [0, 8, 16]),
     (32, 16, 12, [0, 4, 8, 12, 16]), (20, 16, 4, [0, 12]), (18, 16, 15, [0, 1, 2])],
)  # fmt: skip
def test_windows_begin_where_the_one_before_has_its_last_frames_and_reach_the_end(num_frames, window, overlap, starts):
    assert make_source(num_frames, window, overlap).window_starts == starts


def test_one_window_equals_plain_sampling_bit_for_bit():
    plain = make_source(8)
    assert torch.equal(clips_of(plain), clips_of(replace(plain, window=8, overlap=3)))


@pytest.mark.parametrize("overlap", [1, 3, 4, 7])
def test_a_longer_video_begins_with_the_shorter_one_bit_for_bit(overlap):
    long = make_source(23, 8, overlap)
    shown = clips_of(long)
    assert shown.shape[1] == 23
    for num_frames in (9, 15, 16, 22):
        assert torch.equal(clips_of(replace(long, num_frames=num_frames)), shown[:, :num_frames])


def test_each_window_is_given_the_last_frames_of_the_one_before_and_has_noise_of_its_own(monkeypatch):
    source, seen = make_source(14, 8, 5, count=2), []
    forward = source.model.forward

    def watched(x, y, scale):
        seen.append(x[: len(x) // 2])
        return forward(x, y, scale)

    monkeypatch.setattr(source.model, "forward", watched)
    clips = clips_of(source)
    points = SETTINGS["num_steps"] - 1
    windows = [seen[points * number : points * (number + 1)] for number in range(3)]
    for number, points in enumerate(windows):
        noise = normal(0, "sample", number, [0, 1], (3, 8, 4, 4))
        first = 5 if number else 0
        assert torch.equal(points[0][:, :, first:], noise[:, :, first:])
        if number:
            given = points[0][:, :, :5]
            assert all(torch.equal(point[:, :, :5], given) for point in points)
            shown = clips[:, 3 * number : 3 * number + 5].permute(0, 4, 1, 2, 3)
            assert torch.equal(shown, ((given + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))


@pytest.mark.parametrize("stop_below", [None, 1e-9])
def test_a_window_that_is_given_whole_costs_no_evaluation(stop_below):
    source = make_source(14, 6, 2, count=2)  # windows begin at 0, 4, 8
    clips = torch.randint(256, (2, 3, 14, *[source.image_size] * 2), generator=torch.Generator().manual_seed(0)).byte()
    mask = torch.arange(14).expand(2, 14) < 10
    settings = SETTINGS | {"stop_below": stop_below}
    ((videos, evaluations, _),) = generate_clips(
        source, range(2), 0, "cpu", settings, batch_size=2, show=False, given=lambda indices: (clips, mask)
    )
    assert evaluations.tolist() == [3, 3]  # of the last window alone
    assert torch.equal(videos[:, :10], clips[:, :, :10].permute(0, 2, 3, 4, 1))


def test_parts_come_window_by_window_and_hold_new_frames_only():
    source = make_source(14, 8, 5)
    parts = list(generate_parts(source, range(3), 0, "cpu", SETTINGS, batch_size=2, show=False))
    assert [(list(numbers), first, videos.shape[1]) for numbers, first, videos, _, _ in parts] == [
        ([0, 1], 0, 8), ([0, 1], 8, 3), ([0, 1], 11, 3), ([2], 0, 8), ([2], 8, 3), ([2], 11, 3)
    ]  # fmt: skip
    assert all((evaluations == 3).all() for *_, evaluations, _ in parts)


# sample_gd.py -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Checkpoints with random weights of models of 8 frames, of pixels and of latents, and a clip."""
    root = tmp_path_factory.mktemp("windows")
    for name, vae, changes in (
        ("pixels", "none", {}), ("latents", str(make_vae(root / "vae")), {}), ("fixed", "none", {"use_rope": False}),
        ("plain", "none", {}),
    ):  # fmt: skip
        sizes = {"input_size": 16, "in_channels": 3} if vae == "none" else {"input_size": 8, "in_channels": 4}
        shape = {"depth": 1, "hidden_size": 48, "num_heads": 2, "num_frames": 8, "temporal_patch_size": 4}
        state = make_state(**sizes, **shape, **({"use_rope": True} | changes))
        for weight in state["ema"].values():
            weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        state["config"]["data"]["vae"] = vae
        state["config"]["training"] |= {} if name == "plain" else {"forcing": 0.5}
        checkpoint.save(root / f"{name}.pt", state)
    write_video(root / "A" / "a.mp4", 20, codec="libx264", crf="0")
    return root


def run(places, folder, *flags, model="pixels", **kwargs):
    shared = ["--video", "--num-samples", 3, "--num-sampling-steps", 4, "--stepsize", 0.05, "--batch-size", 2]
    run_main(sample_gd, "--ckpt", places / f"{model}.pt", *shared, "--folder", folder, *flags, **kwargs)
    return None if kwargs else np.load(folder / "samples.npz")["arr_0"]


@pytest.mark.parametrize("model", ["pixels", "latents", "fixed"])
def test_more_frames_than_were_trained_come_window_by_window(places, tmp_path, model):
    clips = run(places, tmp_path / "long", "--num-frames", 20, model=model)
    assert clips.shape[:2] == (3, 20)
    assert np.array_equal(run(places, tmp_path / "short", "--num-frames", 8, model=model), clips[:, :8])
    about = json.loads((tmp_path / "long/samples.json").read_text())["source"]
    assert (about["window"], about["overlap"]) == (8, 4)
    names = {path.name for path in (tmp_path / "long").iterdir()}
    assert names == {f"00000{n}.{kind}" for n in range(3) for kind in ("mp4", "gif")} | {
        "grid.gif", "sheet.png", "samples.npz", "samples.json"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("trained", "intervals", "scale", "window"),
    [
        (16, [1], 0.04, 16),
        (16, [1, 2], 0.04, 32),
        (16, [1, 2], 0.08, 16),
        (16, [1, 2], 0.02, 64),
        (15, [1, 2], 0.04, 28),  # of 30, whole patches of 4
        (15, [1, 1], 0.04, 15),
        (8, [2, 3], 0.08, 12),
        (16, [1], 0.05, 16),  # a slower frame rate than training had: as many frames
    ],
)
def test_the_usual_window_lasts_as_long_as_the_longest_training_clip(trained, intervals, scale, window):
    config = tiny(in_channels=3, temporal_patch_size=4).config
    data = {"fps": 25.0, "frame_interval": intervals, "time_scale": 0.04 * intervals[0]}
    assert longest_window(config, trained, longest_time_scale(data) / scale) == window
    assert longest_window(replace(config, use_rope=False, num_frames=trained), trained, 9.0) == trained


def test_videos_too_short_for_the_largest_interval_shorten_the_usual_window(shapes, tmp_path):
    """8 frames of the 25 of a video are at most 3 apart, though --frame-interval allows 4."""
    training = Training(shapes, tmp_path / "r", 1, flags=["--frame-interval", 1, 4, "--forcing", 0.5])
    run_main(train, *training.command_flags("--num-frames", 8))
    ckpt = training.folder / "checkpoints/latest.pt"
    longest = checkpoint.load(ckpt)["config"]["data"]["longest_time_scale"]
    assert {video.num_frames for video in scan_videos(shapes).videos} == {25}
    assert longest == pytest.approx(0.04 * 3)
    run_main(sample_gd, "--video", "--ckpt", ckpt, "--num-samples", 1, "--num-frames", 40, "--num-sampling-steps", 2,
             "--folder", tmp_path / "s")  # fmt: skip
    window = json.loads((tmp_path / "s/samples.json").read_text())["source"]["window"]
    assert window == 24  # 8 frames that are 3 apart


@pytest.mark.parametrize("num_frames", [8, 20])  # in one window, in several
def test_without_previews_the_samples_are_the_same_and_previews_of_an_earlier_call_are_removed(
    places, tmp_path, num_frames
):
    folder = tmp_path / "s"
    run(places, folder, "--num-frames", num_frames)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    run(places, folder, "--num-frames", num_frames, "--no-previews")
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after.keys() == {"000000.mp4", "000001.mp4", "000002.mp4", "samples.npz", "samples.json"}
    assert all(after[name] == before[name] for name in after if name != "samples.json")
    run_main(gallery, folder)
    run_main(picture, folder, "--out", tmp_path / "picture.png")
    assert (folder / "gallery.html").exists() and (tmp_path / "picture.png").exists()


def test_without_forcing_all_frames_are_sampled_at_once_and_a_window_that_is_asked_for_gets_a_note(
    places, tmp_path, capsys
):
    run(places, tmp_path / "a", "--num-frames", 20, model="plain")
    assert json.loads((tmp_path / "a/samples.json").read_text())["source"]["window"] == 20
    assert "note" not in capsys.readouterr().out
    run(places, tmp_path / "b", "--num-frames", 20, "--window", 8, "--overlap", 2, model="plain")
    assert "trained without --forcing, or on clips of one temporal patch" in capsys.readouterr().out


def test_windows_go_on_from_a_given_clip(places, tmp_path):
    flags = ["--given", places / "A/a.mp4", "--given-frames", "0-2,9,14-15", "--window", 8]
    clips = run(places, tmp_path / "a", "--num-frames", 18, *flags)
    (clip,) = find_clips("--given", places / "A/a.mp4", ("video",))
    given = [0, 1, 2, 9, 14, 15]
    read = clip.read(given, 0.04, 16).permute(1, 2, 3, 0).numpy()
    assert all(np.array_equal(sample[given], read) for sample in clips)


def test_ranks_make_the_same_bytes(places, tmp_path):
    alone = run(places, tmp_path / "a", "--num-frames", 14, "--batch-size", 1, "--window", 8)
    command = [*TORCHRUN, ROOT / "EqM/sample_gd.py", "--ckpt", places / "pixels.pt", "--video", "--num-samples", 3]
    command += ["--num-sampling-steps", 4, "--stepsize", 0.05, "--batch-size", 1, "--num-frames", 14, "--window", 8]
    subprocess.run([str(word) for word in [*command, "--folder", tmp_path / "b"]], check=True, capture_output=True)
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab"]
    assert len(alone) == 3 and files[0].keys() == files[1].keys()
    assert all(files[0][name] == files[1][name] for name in files[0] if name != "samples.json")


def test_killed_in_between_it_leaves_no_half_file_and_the_next_call_tidies_up(places, tmp_path):
    flags = ["--ckpt", places / "pixels.pt", "--video", "--num-samples", 3, "--batch-size", 1, "--num-frames", 40]
    flags += ["--num-sampling-steps", 4, "--stepsize", 0.05, "--folder", tmp_path / "s"]
    endless = [*PYTHON, ROOT / "EqM/sample_gd.py", *flags, "--num-frames", 4000]
    process = subprocess.Popen([str(word) for word in endless], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and not any(tmp_path.glob("s/*.mp4.tmp")):
            time.sleep(0.05)
        assert process.poll() is None, "it ended before it began to write"
    finally:
        process.kill()
        process.wait()
    left = {path.name for path in (tmp_path / "s").iterdir()}
    assert "samples.unfinished" in left
    assert not [name for name in left if name.endswith((".mp4", ".gif", ".npz", ".json"))]
    run_main(sample_gd, *flags)
    names = {path.name for path in (tmp_path / "s").iterdir()}
    assert "samples.json" in names and not [name for name in names if name.endswith((".tmp", ".unfinished"))]
    assert np.load(tmp_path / "s/samples.npz")["arr_0"].shape[:2] == (3, 40)


def test_squeezed_positions_take_all_frames_at_once(places, tmp_path):
    run(places, tmp_path / "a", "--num-frames", 20, "--rope-scale", "linear")
    assert json.loads((tmp_path / "a/samples.json").read_text())["source"]["window"] == 20


@pytest.mark.parametrize(
    ("model", "flags", "words"),
    [
        ("pixels", ["--num-frames", 20, "--window", 8, "--overlap", 8], "--overlap 8: leaves no new frame"),
        ("pixels", ["--num-frames", 20, "--window", 8, "--overlap", 0], "--overlap"),
        ("pixels", ["--num-frames", 20, "--window", 3], "--window 3"),
        ("fixed", ["--num-frames", 20, "--window", 12], "--window 12"),
        ("fixed", ["--num-frames", 6], "--num-frames 6"),
        ("pixels", ["--num-frames", 20, "--window", 8, "--init", "A/a.mp4"], "--init: the 20 frames come in windows"),
    ],
)
def test_every_mistake_is_one_line(places, tmp_path, monkeypatch, capsys, model, flags, words):
    monkeypatch.chdir(places)
    run(places, tmp_path / "s", *flags, model=model, status=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sample_gd.py: error: ") and words in line
    assert not (tmp_path / "s").exists()
