"""Scores of predicted frames against naive versions, and evaluate.py --metric prediction end to end."""

import json
import math
import shutil

import numpy as np
import pytest
from PIL import Image
from skimage.metrics import structural_similarity

import checkpoint
import evaluate
from given import frame_ranges
from make_moving_shapes import draw_clip
from scoring import prediction
from scoring.motion import Truth, track
from test_evaluate import ckpt, make_checkpoint, read_clips  # noqa: F401 (a fixture)
from tiny_data import make_state, make_vae
from training import run_main
from vae import VAE
from video.index import scan_videos

FEW = ["--num-workers", 0, "--num-sampling-steps", 4, "--stepsize", 0.05, "--num-frames", 8]


def noisy(clip, scale, seed=0):
    noise = np.random.default_rng(seed).normal(0, scale, clip.shape)
    return np.clip(np.rint(clip + noise), 0, 255).astype(np.uint8)


def gradient(num_frames=6, size=16):
    """A clip whose frame t has the level 10 t plus a slope."""
    levels = 10 * np.arange(num_frames)[:, None, None, None] + 4 * np.arange(size)[:, None]
    return np.broadcast_to(levels, (num_frames, size, size, 3)).astype(np.uint8)


def naive_psnr(a, b):
    return 10 * math.log10(255**2 / ((a.astype(float) - b) ** 2).mean())


def test_psnr_is_that_of_its_definition_and_equal_frames_have_the_most():
    real = gradient()
    samples = np.stack([noisy(real, 8, seed) for seed in range(3)])
    scores, baselines = prediction.score_clip(real, samples, given=(0, 1, 5))
    repeated = baselines["repeated"]
    assert scores.shape == (3, 3, 3) and repeated.shape == (3, 3)
    expected = [[naive_psnr(sample[t], real[t]) for t in (2, 3, 4)] for sample in samples]
    assert np.allclose(scores[0], expected)
    assert np.allclose(repeated[0], [naive_psnr(real[1], real[t]) for t in (2, 3, 4)])  # the last one before
    (psnr, ssim, moving), _ = prediction.score_clip(real, real[None], given=(0,))
    assert (psnr == prediction.MOST_PSNR).all() and (ssim == 1).all() and (moving == prediction.MOST_PSNR).all()


def test_the_repeated_frame_is_the_last_given_before_or_else_the_first_after():
    real = gradient()
    _, baselines = prediction.score_clip(real, real[None], given=(2, 4))
    expected = [naive_psnr(real[shown], real[t]) for t, shown in ((0, 2), (1, 2), (3, 2), (5, 4))]
    assert np.allclose(baselines["repeated"][0], expected)
    assert baselines.keys() == {"repeated"}  # where the true motion is not known


def moving(direction="Right", shape="Circle", rgb=(240, 70, 60), speed=12):
    """A clip of 8 frames as the data set draws them; speed in px per second at 25 fps."""
    video = {"shape": shape, "direction": direction, "start": [8, 8], "speed": speed, "radius": 3, "rgb": rgb}
    return draw_clip(video | {"background_rgb": (0, 0, 0)}, 16, 8)


@pytest.mark.parametrize("direction", ["Left", "Right", "Up", "Down"])
def test_a_given_frame_moved_by_the_true_motion_is_the_later_frame(direction):
    clip, truth = moving(direction, speed=25), Truth(direction, "Circle", 1.0, 28.0)
    _, baselines = prediction.score_clip(clip, clip[None], (0, 1, 6, 7), truth)
    assert (baselines["moved"][0] == prediction.MOST_PSNR).all()  # by whole pixels
    assert (baselines["repeated"][0] < 21).all()
    half = moving(direction, speed=12.5)
    later = prediction.moved(half[0], 5, Truth(direction, "Circle", 0.5, 28.0))
    assert prediction.psnr(later, half[5]) > prediction.psnr(half[0], half[5]) + 6
    first = prediction.score_clip(clip, clip[None], (4, 5, 6, 7), truth)[1]
    assert (first["moved"][0] == prediction.MOST_PSNR).all()  # backwards in time, too


def test_ssim_has_gaussian_windows_per_color_channel():
    real, other = noisy(gradient()[0], 30), noisy(gradient()[0], 30, seed=1)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    channels = [structural_similarity(real[..., c], other[..., c], **settings) for c in range(3)]
    moving = np.ones((16, 16), dtype=bool)
    assert prediction.frame_scores(other, real, moving)[1] == pytest.approx(np.mean(channels))


def test_the_best_sample_is_chosen_for_each_metric_on_its_own_and_gains_have_an_interval_over_clips():
    scores = np.zeros((4, 3, 3, 2))  # clips, metrics, samples, frames
    scores[:, 0] = [[10, 20], [30, 10], [12, 12]]  # means 15, 20, 12
    scores[:, 1] = [[0.1, 0.2], [0.3, 0.4], [0.8, 0.7]]
    scores[:, 0] += np.arange(4)[:, None, None]
    result = prediction.compare(scores, {"repeated": np.full((4, 3, 2), 10.0)})
    assert result["psnr"] == pytest.approx((15 + 20 + 12) / 3 + 1.5)
    assert result["psnr_best_by_frame"]["mean"] == pytest.approx([31.5, 11.5])
    assert result["psnr_best_by_frame"]["half95"] == pytest.approx([1.96 * 1.118 / 2] * 2, rel=1e-3)
    assert result["ssim_best"] == pytest.approx(0.75)
    assert result["psnr_gain"] == pytest.approx(result["psnr"] - 10)
    low, high = result["psnr_gain_interval95"]
    assert low < result["psnr_gain"] < high and high - low == pytest.approx(2.2, abs=0.5)  # 3.92 x 1.118 / 2
    assert prediction.bootstrap([3.0]) is None


def test_the_average_of_samples_with_errors_of_their_own_has_less_of_them():
    real = np.broadcast_to(np.arange(40, 200, 10, dtype=np.uint8)[:, None], (6, 16, 16, 3))
    samples = np.stack([noisy(real, 8, seed) for seed in range(4)])
    scores, baselines = prediction.score_clip(real, samples, given=(0, 1))
    assert baselines["average"][0] == pytest.approx(scores[0].mean(axis=0) + 10 * math.log10(4), abs=0.5)  # a quarter
    result = prediction.compare(scores[None], {kind: values[None] for kind, values in baselines.items()})
    assert result["psnr_average_gain"] == pytest.approx(result["psnr_average"] - result["psnr_repeated"])
    assert result["psnr_gain"] == pytest.approx(result["psnr"] - result["psnr_repeated"])
    opposite = np.stack([real + 5, real - 5]).astype(np.uint8)
    assert (prediction.score_clip(real, opposite, given=(0,))[1]["average"][0] == prediction.MOST_PSNR).all()
    assert "average" not in prediction.score_clip(real, opposite[:1], given=(0,))[1]


def test_psnr_of_moving_pixels_is_of_those_that_differ_from_the_given_frame_by_more_than_8_levels_in_a_channel():
    real = np.full((4, 16, 16, 3), 100, np.uint8)
    real[1:, :4, :, 1] = 108  # not more than 8: it stands still
    real[2:, 8:12, :, 2] = 109  # 64 pixels move
    sample = real.copy()
    sample[:, :8] += 50  # of no interest
    sample[:, 8:12, :, 0] += 6  # the mean of the channels' squared errors is 12
    scores, baselines = prediction.score_clip(real, sample[None], given=(0,))
    assert np.isnan(scores[2, 0, 0]) and np.isnan(baselines["repeated"][2, 0])
    assert scores[2, 0, 1:] == pytest.approx([10 * math.log10(255**2 / 12)] * 2)
    assert baselines["repeated"][2, 1:] == pytest.approx([10 * math.log10(255**2 / 27)] * 2)
    assert scores[0, 0, 1:] == pytest.approx([naive_psnr(sample[t], real[t]) for t in (2, 3)])


def test_the_mean_over_moving_pixels_is_one_of_clips_and_frames_in_which_something_moves():
    scores, repeated = np.full((4, 3, 2, 3), 20.0), np.full((4, 3, 3), 20.0)
    scores[:, 2] = np.array([30, 26, 27, np.nan])[:, None, None]  # in the last clip nothing moves
    scores[0, 2, :, 0] = repeated[0, 2, 0] = scores[:, 2, :, 2] = repeated[:, 2, 2] = repeated[3, 2] = np.nan
    result = prediction.compare(scores, {"repeated": repeated})
    assert result["clips"] == 4 and result["clips_that_move"] == 3
    assert result["psnr_moving"] == result["psnr_moving_best"] == pytest.approx(83 / 3)
    assert result["psnr_moving_repeated"] == 20 and result["psnr_moving_gain"] == pytest.approx(23 / 3)
    low, high = result["psnr_moving_gain_interval95"]
    assert 6 <= low < 23 / 3 < high <= 10
    assert result["psnr_moving_by_frame"]["mean"] == [26.5, pytest.approx(83 / 3), None]
    scores[:, 2] = repeated[:, 2] = np.nan  # nothing moves at all
    result = json.loads(json.dumps(prediction.compare(scores, {"repeated": repeated}), allow_nan=False))
    assert result["psnr_moving"] is result["psnr_moving_gain"] is result["psnr_moving_gain_interval95"] is None
    assert result["psnr"] == 20 and result["psnr_gain_interval95"] == [0, 0]
    assert prediction.result_lines(result | {"given_frames": "0"})[1].endswith(" -")


def test_a_clip_that_keeps_color_and_shape_is_told_from_one_that_does_not():
    real = track(moving())
    others = moving(), moving(shape="Square"), moving(rgb=(80, 130, 250)), np.zeros_like(moving())
    assert [prediction.keeps_appearance(track(clip), real) for clip in others] == [True, False, False, False]


def run(tmp_path, *flags, status=0):
    run_main(evaluate, "--metric", "prediction", "--out", tmp_path / "p.json", *FEW, *flags, status=status)
    return json.loads((tmp_path / "p.json").read_text()) if status == 0 else None


def test_predictions_continue_the_very_clips_they_are_compared_with(shapes, ckpt, tmp_path, monkeypatch):  # noqa: F811
    seen = []
    score_clip = prediction.score_clip
    monkeypatch.setattr(prediction, "score_clip", lambda *args: seen.append(args) or score_clip(*args))
    flags = ["--ckpt", ckpt, "--data-path", shapes, "--num-real", 3, "--samples-per-clip", 2, "--batch-size", 2]
    made = run(tmp_path, *flags, "--given-frames", "0-1,6")
    clips, _, _ = read_clips(shapes, "val", 3)
    for (real, samples, given, _), clip in zip(seen, clips, strict=True):
        assert tuple(given) == frame_ranges("0-1,6")
        assert np.array_equal(real, clip)
        assert samples.shape == (2, 8, 16, 16, 3)
        assert np.array_equal(samples[:, [0, 1, 6]], np.stack([clip[[0, 1, 6]]] * 2))
        assert not np.array_equal(samples[0], samples[1])
    assert made["protocol"] == "prediction3_best2_3of8f"
    assert made["result"]["predicted_frames"] == [2, 3, 4, 5, 7]
    assert made["values"]["psnr_best"] >= made["values"]["psnr"]
    assert made["values"]["psnr_average"] == made["result"]["psnr_average"] > made["values"]["psnr"]
    assert made["values"]["direction_accuracy"] == 0
    assert made["result"]["motion_real"]["direction_accuracy"] == 1
    assert Image.open(tmp_path / "p.sheet.png").size[1] > 6 * 128 and (tmp_path / "p.png").stat().st_size > 1000
    again = tmp_path / "again.json"
    older = made | {"values": {name: x for name, x in made["values"].items() if not name.startswith("psnr_moving")}}
    for old in (made, older):  # that of code without the moving pixels
        (tmp_path / "p.json").write_text(json.dumps(old))
        run_main(evaluate, "--manifest", tmp_path / "p.json", "--out", again)
        assert json.loads(again.read_text())["repeats"]["bit_equal"]
    assert json.loads(again.read_text())["values"] == made["values"] and made["values"]["psnr_moving_repeated"] > 0


@pytest.mark.parametrize(("flags", "pasted"), [([], False), (["--keep-background"], True)])
def test_predictions_are_scored_as_the_vae_decodes_them_unless_told_otherwise(
    shapes, tmp_path, monkeypatch, flags, pasted
):  # noqa: F811
    scored, decoded = [], []
    score_clip, decode = prediction.score_clip, VAE.decode
    monkeypatch.setattr(prediction, "score_clip", lambda *args: scored.append(args[1][0]) or score_clip(*args))
    monkeypatch.setattr(VAE, "decode", lambda *args: decoded.append(decode(*args)) or decoded[-1])
    state = make_state(input_size=8, in_channels=4, depth=1, num_classes=12, num_frames=8, use_rope=True)
    state["config"]["data"] |= {"vae": str(make_vae(tmp_path / "vae")), "classes": scan_videos(shapes).classes}
    checkpoint.save(tmp_path / "a.pt", state)
    made = run(tmp_path, "--ckpt", tmp_path / "a.pt", "--data-path", shapes, "--num-real", 2, *flags)
    assert made["generated"]["keep_background"] == pasted
    for sample, frames in zip(scored, decoded[0].numpy(), strict=True):
        assert np.array_equal(sample[4:], frames[4:]) != pasted


def test_without_a_label_and_with_all_videos(shapes, ckpt, tmp_path, monkeypatch):  # noqa: F811
    labels, generate = [], evaluate.generation.generate_batch
    watched = lambda network, x, y, *args, **rest: labels.extend(y.tolist()) or generate(network, x, y, *args, **rest)  # noqa: E731
    monkeypatch.setattr(evaluate.generation, "generate_batch", watched)
    flags = ["--ckpt", ckpt, "--data-path", shapes, "--num-real", 24, "--split", "all"]
    made = run(tmp_path, *flags)
    assert made["protocol"] == "prediction24_all_4of8f"
    assert sorted(labels) == sorted(list(range(12)) * 2)  # each video once
    labels.clear()
    run(tmp_path, *flags[:4], "--num-real", 2, "--classes", "none")
    assert labels == [12, 12]


def test_the_time_between_frames_is_that_of_the_clip(shapes, ckpt, tmp_path, monkeypatch):  # noqa: F811
    seen, generate = [], evaluate.generation.generate_batch

    def watched(*args, **rest):
        seen.append(args[3])
        return generate(*args, **rest)

    monkeypatch.setattr(evaluate.generation, "generate_batch", watched)
    run(tmp_path, "--ckpt", ckpt, "--data-path", shapes, "--num-real", 2, "--fps", 12)
    assert seen[0].tolist() == pytest.approx([0.08, 0.08])  # the data have 25: the closest


def test_a_truth_that_lacks_a_class_is_found_before_anything_is_sampled(shapes, ckpt, tmp_path, capsys):  # noqa: F811
    data = shutil.copytree(shapes, tmp_path / "data")
    about = json.loads((data / "shapes.json").read_text())
    about["videos"] = {key: video for key, video in about["videos"].items() if video["class"] != "SquareUp"}
    (data / "shapes.json").write_text(json.dumps(about))
    run(tmp_path, "--ckpt", ckpt, "--data-path", data, "--num-real", 2, status=2)
    assert "no class SquareUp" in capsys.readouterr().err


def test_every_mistake_is_one_line(shapes, ckpt, tmp_path, capsys):  # noqa: F811
    base = ["--data-path", shapes]
    for words, *flags in (
        ("--given-frames 0-7: are all frames of the samples", "--ckpt", ckpt, "--given-frames", "0-7"),
        ("--given-frames 9: the samples have the frames 0 to 7", "--ckpt", ckpt, "--given-frames", "9"),
        ("samples itself: give --ckpt", "--samples", tmp_path),
        ("has --num-real and --samples-per-clip", "--ckpt", ckpt, "--num-samples", 3),
        ("takes the class of each real clip, or none", "--ckpt", ckpt, "--classes", "CircleUp"),
        ("wanted at most 16777216 samples in all", "--ckpt", ckpt, "--samples-per-clip", 10**8),
    ):
        run(tmp_path, *base, *flags, status=2)
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line, line
    run_main(evaluate, "--metric", "motion", "--given-frames", "0", "--ckpt", ckpt, *base, "--out", tmp_path / "x.json",
             status=2)  # fmt: skip
    assert "--given-frames is for --metric prediction" in capsys.readouterr().err
