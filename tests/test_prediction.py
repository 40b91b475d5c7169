"""Scores of predicted frames compared with naive versions, and evaluate.py --metric prediction end
to end.
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.special import stdtrit
from skimage.metrics import structural_similarity

from sample_folders import FRAMES, SIZE, SOURCE, read_clips, refused, run, write_samples
from scoring import plots, prediction, sources
from scoring.stats import psnr
from test_shapes_tracker import noisy
from tiny_data import write_npz
from video.writers import write_mp4


def test_prediction_scores_equal_their_definitions():
    # frame t: 10 t plus a slope
    levels = 10 * np.arange(6)[:, None, None, None] + 4 * np.arange(16)[:, None]
    real = np.broadcast_to(levels, (6, 16, 16, 3)).astype(np.uint8)
    samples = np.stack([noisy(real, 8, seed) for seed in range(3)])
    scores, baselines = prediction.score_clip(real, samples, given=(1, 4))
    assert baselines.keys() == {"repeated", "average"}
    expected = [[psnr(sample[t], real[t]) for t in (0, 2, 3, 5)] for sample in samples]
    assert np.allclose(scores[0], expected)
    shown = {0: 1, 2: 1, 3: 1, 5: 4}  # the last given frame before, or else the first after
    expected = [psnr(real[frame], real[t]) for t, frame in shown.items()]
    assert np.allclose(baselines["repeated"][0], expected)
    expected = [psnr(samples[:, t].mean(axis=0).round(), real[t]) for t in (0, 2, 3, 5)]
    assert np.allclose(baselines["average"][0], expected)
    (whole, ssim, moving), baselines = prediction.score_clip(real, real[None], given=(0,))
    assert (whole == 60).all() and (ssim == 1).all() and (moving == 60).all()
    assert "average" not in baselines
    channels = []
    for c in range(3):
        ssim = structural_similarity(
            real[5, ..., c],
            samples[0, 5, ..., c],
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
        )
        channels.append(ssim)
    assert scores[1, 0, 3] == pytest.approx(np.mean(channels))


def test_the_best_sample_is_chosen_for_each_metric_on_its_own():
    scores = np.zeros((4, 3, 3, 2))  # clips, metrics, samples, frames
    scores[:, 0] = [[10, 20], [30, 10], [12, 12]]  # means 15, 20, 12
    scores[:, 1] = [[0.1, 0.2], [0.3, 0.4], [0.8, 0.7]]
    scores[:, 0] += np.arange(4)[:, None, None]
    result = prediction.compare(scores, {"repeated": np.full((4, 3, 2), 10.0)})
    assert result["psnr"] == pytest.approx((15 + 20 + 12) / 3 + 1.5)
    assert result["psnr_best_by_frame"]["mean"] == pytest.approx([31.5, 11.5])
    half = stdtrit(3, 0.975) * np.std([0, 1, 2, 3], ddof=1) / 2  # Student's t of four clips
    assert result["psnr_best_by_frame"]["half95"] == pytest.approx([half] * 2)
    assert result["ssim_best"] == pytest.approx(0.75)
    assert result["psnr_gain"] == pytest.approx(result["psnr"] - 10)
    gain = result["psnr_gain"]
    assert result["psnr_gain_interval95"] == pytest.approx([gain - half, gain + half])
    # each video gives three clips
    scores = np.tile(scores, (3, 1, 1, 1))
    repeated = np.full((12, 3, 2), 10.0)
    baselines = {"repeated": repeated, "average": repeated + 3}
    tripled = prediction.compare(scores, baselines, [*range(4)] * 3)
    assert tripled["psnr_gain_interval95"] == pytest.approx([gain - half, gain + half])
    assert tripled["psnr_best_by_frame"]["half95"] == pytest.approx([half] * 2)
    assert tripled["psnr_average"] == 13
    assert tripled["psnr_average_gain"] == 3


def test_moving_pixels_differ_from_the_given_frame_by_more_than_8_levels():
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
    assert scores[0, 0, 1:] == pytest.approx([psnr(sample[t], real[t]) for t in (2, 3)])


def test_means_over_moving_pixels_are_of_clips_in_which_something_moves():
    scores = np.full((4, 3, 2, 3), 20.0)
    repeated = np.full((4, 3, 3), 20.0)
    scores[:, 2] = np.array([30, 26, 27, np.nan])[:, None, None]  # in the last clip nothing moves
    for values in (scores[0, 2, :, 0], scores[:, 2, :, 2], repeated[:1, 2, 0], repeated[:, 2, 2]):
        values[:] = np.nan
    repeated[3, 2] = np.nan
    result = prediction.compare(scores, {"repeated": repeated})
    assert result["clips"] == 4 and result["clips_that_move"] == 3
    assert result["psnr_moving"] == result["psnr_moving_best"] == pytest.approx(83 / 3)
    assert result["psnr_moving_repeated"] == 20
    assert result["psnr_moving_gain"] == pytest.approx(23 / 3)
    half = stdtrit(2, 0.975) * np.std([10, 6, 7], ddof=1) / 3**0.5
    expected = [23 / 3 - half, 23 / 3 + half]
    assert result["psnr_moving_gain_interval95"] == pytest.approx(expected)
    assert result["psnr_moving_by_frame"]["mean"] == [26.5, pytest.approx(83 / 3), None]
    scores[:, 2] = repeated[:, 2] = np.nan  # nothing moves at all
    result = prediction.compare(scores, {"repeated": repeated})
    assert json.dumps(result, allow_nan=False)
    assert result["psnr_moving"] is result["psnr_moving_gain_interval95"] is None
    assert prediction.result_lines(result | {"given_frames": "0"})[1].endswith(" -")


def test_predictions_of_one_unit_have_no_interval_and_a_plot(tmp_path):
    scores = np.random.default_rng(0).uniform(10, 30, (4, 3, 1, 2))
    people = [f"{name}/person7.mkv" for name in "abcd"]
    for count, videos in ((4, people), (1, ["a.mkv"])):
        result = prediction.compare(scores[:count], {"repeated": scores[:count, :, 0]}, videos)
        intervals = {name: value for name, value in result.items() if name.endswith("_interval95")}
        assert len(intervals) == 12 and set(intervals.values()) == {None}
        assert result["psnr_by_frame"]["half95"] == [None, None]
        place = tmp_path / f"{count}.png"
        plots.plot_prediction(place, result | {"predicted_frames": [1, 2]}, 3, prediction.KINDS)
        assert place.stat().st_size > 1000


def test_bins_of_evaluations_are_equally_wide(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    plots.plot_evaluations(tmp_path / "e.png", np.arange(75), budget=74)
    (axes,) = figures[0].axes
    assert {(bar.get_width(), bar.get_height()) for bar in axes.patches[:-1]} == {(2, 2)}
    plots.plt.close(figures[0])


# Sample folders that continue real clips ----------------------------------------------------------

KEPT = {"source": SOURCE | {"keep_background": True}}


def write_predictions(
    folder, data, change, count=3, samples_per_clip=2, given="0-1,6", split="val", **changes
):
    """A folder of samples of the first real clips of a data set; change(clip, number) makes a
    sample of a clip.
    """
    clips, _, real = sources.find_real(data, split, 0.05, FRAMES, 1 / 25, SIZE)
    items = [clips[index] for index in range(count)]
    pixels = [item["clip"].permute(1, 2, 3, 0).numpy() for item in items]
    labels = [item["y"] for item in items]
    numbers = range(samples_per_clip)
    made = np.stack([change(clip.copy(), number) for clip in pixels for number in numbers])
    real |= {"num_clips": count, "samples_per_clip": samples_per_clip}
    about = {"real": real, "given": [{"source": "x", "frames": given}] * len(made)}
    labels = np.repeat(labels, samples_per_clip)
    return write_samples(folder, made, labels, clips.classes, **about | changes)


def stops(clip, number):
    """Sample 0 of a clip is the true one, sample 1 repeats the last given frame."""
    if number:
        clip[2:6] = clip[1]
        clip[7] = clip[6]
    return clip


def test_a_given_clip_has_its_own_time_between_frames(shapes, tmp_path):
    given = [{"source": "x", "frames": "0", "time_scale": seconds} for seconds in (0.04, 0.08)]
    folder = write_predictions(tmp_path / "s", shapes, stops, count=1, time_scale=0.05)
    about = json.loads((folder / "samples.json").read_text())
    (folder / "samples.json").write_text(json.dumps(about | {"given": given}))
    stream = sources.generated_stream(sources.Samples(folder))
    assert [seconds for *_, seconds, _ in stream] == [0.04, 0.08]


def test_a_note_says_where_real_frames_are_further_apart_or_closer(tmp_path, capsys):
    (tmp_path / "A").mkdir()
    for number, fps in enumerate((25, 25, 50)):
        write_mp4(tmp_path / f"A/{number}.mp4", np.zeros((8, 16, 16, 3), np.uint8), fps)
    sources.find_real(tmp_path, "all", 0.05, 4, 1 / 25, 16)
    text = "frames are 0.02 to 0.02 s apart in 1 of 3 real videos, generated frames 0.04 s"
    assert text in capsys.readouterr().out


def flags_of(folder, data):
    return ["--metric", "prediction", "--samples", folder, "--data-path", data]


def test_samples_are_scored_against_the_clips_that_they_continue(shapes, tmp_path):
    folder = write_predictions(tmp_path / "s", shapes, stops)
    made = run(tmp_path / "p.json", *flags_of(folder, shapes), "--batch-size", 2)
    assert made["protocol"] == "prediction3_best2_3of8f"
    assert made["result"]["given_frames"] == "0-1,6"
    assert made["result"]["predicted_frames"] == [2, 3, 4, 5, 7]
    values = made["values"]
    clips, _, _ = read_clips(shapes, "val", 3)
    shown = {2: 1, 3: 1, 4: 1, 5: 1, 7: 6}
    repeated = np.mean([psnr(clip[shown[t]], clip[t]) for clip in clips for t in shown])
    assert values["psnr_best"] == 60 and values["psnr_repeated"] == pytest.approx(repeated)
    assert values["psnr"] == pytest.approx((60 + repeated) / 2)
    assert values["psnr_gain"] == pytest.approx((60 - repeated) / 2)
    assert values["psnr_repeated"] < values["psnr_average"] < values["psnr"]
    assert values["direction_accuracy"] == values["appearance_kept"] == 1  # of the first samples
    assert made["result"]["motion_real"]["direction_accuracy"] == 1
    assert Image.open(tmp_path / "p.sheet.png").size[1] > 6 * 128
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_split_and_background_are_those_of_the_samples_which_may_have_no_class(shapes, tmp_path):
    one_each = {"count": 24, "samples_per_clip": 1}
    folder = write_predictions(tmp_path / "s", shapes, stops, **one_each, split="all")
    write_npz(folder / "samples.npz", np.load(folder / "samples.npz")["arr_0"], [-1] * 24)
    made = run(tmp_path / "p.json", *flags_of(folder, shapes))
    assert made["protocol"] == "prediction24_all_3of8f" and made["values"]["psnr"] == 60
    assert made["real"]["num_videos"] == made["real"]["num_clips"] == 24
    folder = write_predictions(tmp_path / "few", shapes, stops, **one_each, **KEPT)
    made = run(tmp_path / "few.json", *flags_of(folder, shapes), "--keep-background")
    assert made["protocol"] == "prediction24_3of8f_background"
    assert made["real"]["num_videos"] == 12
    assert made["result"]["interval_units"] == {"real": "12 videos"}


MISTAKES = {
    "no real clips": (
        {"real": None},
        [],
        ["does not continue the clips of a data set; sample again with --given"],
    ),
    "too few samples": (
        {"real": {"num_clips": 9, "samples_per_clip": 2}},
        [],
        ["2 samples for each of 9 clips", "--num-samples 18"],
    ),
    "kept background": (
        KEPT,
        [],
        ["was sampled with --keep-background", "--no-keep-background", "add the flag here"],
    ),
    "other videos": (
        {},
        ["--data-path", "other"],
        ["--data-path other: not the videos that --samples"],
    ),
    "no truth of a class": ({}, ["--data-path", "lacking"], ["no class SquareUp"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_samples_that_cannot_be_compared_are_refused(case, shapes, tmp_path, capsys, monkeypatch):
    about, flags, words = MISTAKES[case]
    monkeypatch.chdir(tmp_path)
    if case == "other videos":
        ignore = shutil.ignore_patterns("*CircleUp_g01*", "ucfTrainTestlist")
        shutil.copytree(shapes, "other", ignore=ignore)
    if case == "no truth of a class":
        shutil.copytree(shapes, "lacking")
        text = (shapes / "shapes.json").read_text().replace("SquareUp", "X")
        Path("lacking/shapes.json").write_text(text)
    folder = write_predictions(tmp_path / "s", shapes, stops, **about)
    refused(capsys, tmp_path / "p.json", *flags_of(folder, shapes), *flags, words=words)
