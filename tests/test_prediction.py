"""Scores of predicted frames against naive versions, and evaluate.py --metric prediction end to end."""

import json
import math

import numpy as np
import pytest
from PIL import Image
from skimage.metrics import structural_similarity

import evaluate
from make_moving_shapes import draw_clip
from scoring import prediction
from test_evaluate import ckpt, make_checkpoint, read_clips  # noqa: F401 (a fixture)
from training import run_main
from video.given import frame_ranges

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
    scores, repeated = prediction.score_clip(real, samples, given=(0, 1, 5))
    assert scores.shape == (2, 3, 3) and repeated.shape == (2, 3)
    expected = [[naive_psnr(sample[t], real[t]) for t in (2, 3, 4)] for sample in samples]
    assert np.allclose(scores[0], expected)
    assert np.allclose(repeated[0], [naive_psnr(real[1], real[t]) for t in (2, 3, 4)])  # the last one before
    (psnr, ssim), _ = prediction.score_clip(real, real[None], given=(0,))
    assert (psnr == prediction.MOST_PSNR).all() and (ssim == 1).all()


def test_the_repeated_frame_is_the_last_given_before_or_else_the_first_after():
    real = gradient()
    _, repeated = prediction.score_clip(real, real[None], given=(2, 4))
    expected = [naive_psnr(real[shown], real[t]) for t, shown in ((0, 2), (1, 2), (3, 2), (5, 4))]
    assert np.allclose(repeated[0], expected)


def test_ssim_has_gaussian_windows_per_color_channel():
    real, other = noisy(gradient()[0], 30), noisy(gradient()[0], 30, seed=1)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    channels = [structural_similarity(real[..., c], other[..., c], **settings) for c in range(3)]
    assert prediction.frame_scores(other, real)[1] == pytest.approx(np.mean(channels))


def test_the_best_sample_is_chosen_for_each_metric_on_its_own_and_gains_have_an_interval_over_clips():
    scores = np.zeros((4, 2, 3, 2))  # clips, metrics, samples, frames
    scores[:, 0] = [[10, 20], [30, 10], [12, 12]]  # means 15, 20, 12
    scores[:, 1] = [[0.1, 0.2], [0.3, 0.4], [0.8, 0.7]]
    scores[:, 0] += np.arange(4)[:, None, None]
    repeated = np.full((4, 2, 2), 10.0)
    result = prediction.compare(scores, repeated)
    assert result["psnr"] == pytest.approx((15 + 20 + 12) / 3 + 1.5)
    assert result["psnr_best_by_frame"] == pytest.approx([31.5, 11.5])
    assert result["ssim_best"] == pytest.approx(0.75)
    assert result["psnr_gain"] == pytest.approx(result["psnr"] - 10)
    low, high = result["psnr_gain_interval95"]
    assert low < result["psnr_gain"] < high and high - low == pytest.approx(2.2, abs=0.5)  # 3.92 x 1.118 / 2
    assert prediction.bootstrap([3.0]) is None


def test_a_clip_that_keeps_color_and_shape_is_told_from_one_that_does_not():
    def clip(shape="Circle", rgb=(240, 70, 60)):
        video = {"shape": shape, "direction": "Right", "start": [5, 8], "speed": 12, "radius": 3, "rgb": rgb}
        return draw_clip(video | {"background_rgb": (0, 0, 0)}, 16, 8)

    truth = prediction.read_truth.__globals__["Truth"]("Right", "Circle", 12 / 25, 28.0)
    kept = [prediction.score_motion(sample, clip(), truth)[2] for sample in (
        clip(), clip("Square"), clip(rgb=(80, 130, 250)), np.zeros_like(clip()))]  # fmt: skip
    assert kept == [True, False, False, False]


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
    for (real, samples, given), clip in zip(seen, clips, strict=True):
        assert tuple(given) == frame_ranges("0-1,6")
        assert np.array_equal(real, clip)
        assert samples.shape == (2, 8, 16, 16, 3)
        assert np.array_equal(samples[:, [0, 1, 6]], np.stack([clip[[0, 1, 6]]] * 2))
        assert not np.array_equal(samples[0], samples[1])
    assert made["protocol"] == "prediction3_best2_3of8f"
    assert made["result"]["predicted_frames"] == [2, 3, 4, 5, 7]
    assert made["values"]["psnr_best"] >= made["values"]["psnr"]
    assert made["values"]["direction_accuracy"] == 0
    assert Image.open(tmp_path / "p.sheet.png").size[1] > 6 * 128 and (tmp_path / "p.png").stat().st_size > 1000
    again = tmp_path / "again.json"
    run_main(evaluate, "--manifest", tmp_path / "p.json", "--out", again)
    assert json.loads(again.read_text())["repeats"]["agrees"]


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


def test_every_mistake_is_one_line(shapes, ckpt, tmp_path, capsys):  # noqa: F811
    base = ["--data-path", shapes]
    for words, *flags in (
        ("--given-frames 0-7: of the 8 frames", "--ckpt", ckpt, "--given-frames", "0-7"),
        ("--given-frames 9: of the 8 frames", "--ckpt", ckpt, "--given-frames", "9"),
        ("samples itself: give --ckpt", "--samples", tmp_path),
        ("has --num-real and --samples-per-clip", "--ckpt", ckpt, "--num-samples", 3),
        ("takes the class of each real clip, or none", "--ckpt", ckpt, "--classes", "CircleUp"),
    ):
        run(tmp_path, *base, *flags, status=2)
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert words in line, line
    run_main(evaluate, "--metric", "motion", "--given-frames", "0", "--ckpt", ckpt, *base, "--out", tmp_path / "x.json",
             status=2)  # fmt: skip
    assert "--given-frames is for --metric prediction" in capsys.readouterr().err
