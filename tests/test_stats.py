"""Intervals against their definitions, and rows of several ranks in the order of their clips."""

import operator

import numpy as np
import pytest
import scipy.stats
import torch

from runtime import distributed
from scoring import stats
from test_moving_shapes import plan

UNITS = [  # what is of one unit
    [
        "Bend/person7.mkv",
        "JumpingJack/person7.mkv",
        "Bend/person7-copy3.mkv",  # of datasets/augment.py
    ],
    ["Bend/person8.mkv"],
    ["WalkLeft/character0123.mkv", "SlashFront/character0123.mkv, clip 2663"],
    ["Makeup/v_Makeup_g08_c01.avi", "Makeup/v_Makeup_g08_c05.avi"],  # of UCF-101
    ["Makeup/v_Makeup_g09_c01.avi"],
    ["s/samples.npz, sample 3"],
    ["s/samples.npz, sample 4"],
    [0],  # samples that continue no video
    [7, 7],
]


def test_a_unit_is_a_video_or_what_videos_share():
    units = [{stats.unit_of(video) for video in videos} for videos in UNITS]
    assert [len(unit) for unit in units] == [1] * len(UNITS)
    assert len(set().union(*units)) == len(UNITS)


@pytest.mark.parametrize("flags", [[], ["--bounce"]])
def test_each_video_of_moving_shapes_is_a_unit(flags):
    _, videos = plan("--videos-per-class", 17, *flags)
    assert len({stats.unit_of(f"{key}.avi, clip 3") for key in videos}) == len(videos)


def test_clips_count_once_per_unit_and_one_unit_has_no_interval():
    values = np.random.default_rng(0).normal(size=12)
    copies = np.tile(values, 8)
    people = [f"{name}/person{number}.mkv" for name in "ABCDEFGH" for number in range(12)]
    once = stats.mean_interval(values)
    assert stats.mean_interval(copies, people) == pytest.approx(once)  # copies tell nothing new
    assert stats.mean_interval(copies) == stats.mean_interval(copies, [*range(96)])
    assert np.diff(stats.mean_interval(copies)) < 0.5 * np.diff(once)
    assert stats.mean_interval(copies, ["v"] * 96) is None  # 0.0 would claim certainty
    for few in ([3.0], [3.0, np.nan], []):
        assert stats.mean_interval(few) is None
    assert stats.mean_interval([*values, np.nan]) == once
    copies[:12] = np.nan
    units = stats.by_unit(copies, people).numpy()
    assert units == pytest.approx(values)  # NaNs do not count


def test_intervals_of_means_are_students():
    values = np.random.default_rng(0).normal(size=(9, 4))
    values[4:, 1] = values[1:, 2] = values[:, 3] = np.nan  # 9, 4, 1 and 0 values
    half = stats.half95(values)
    for column, count in enumerate((9, 4)):
        own = values[:count, column]
        low, high = scipy.stats.t.interval(0.95, count - 1, own.mean(), scipy.stats.sem(own))
        assert half[column] == pytest.approx((high - low) / 2)
        assert stats.mean_interval(values[:, column]) == pytest.approx([low, high])
    assert np.isnan(half[2:]).all()


def test_shares_have_wilson_intervals_but_none_over_few_units():
    hits = np.arange(80) % 4 > 0
    for count in (10, 20):
        videos = [f"{clip % 4}/{clip % count}.mkv" for clip in range(80)]
        assert stats.share(hits, videos) == (0.75, pytest.approx(stats.wilson(0.75 * count, count)))
    assert stats.share(hits, [clip % 9 for clip in range(80)]) == (0.75, None)
    independent = 0.75, pytest.approx(stats.wilson(3, 4))
    assert stats.share(hits[:4], range(4)) == stats.share(hits[:4]) == independent
    both = stats.shares({"a": hits, "b": []}, [0] * 80)
    assert both == {"a": 0.75, "a_interval95": None, "b": None, "b_interval95": None}


def test_ratios_have_intervals_over_at_least_ten_units():
    values = np.random.default_rng(0).normal(2, 0.1, (2, 20))
    every = [*range(20)]
    low, high = stats.ratio_interval(operator.truediv, values, (every, every))
    width = 2 * 1.96 * 0.05 * 2**0.5 / 20**0.5
    assert low < 1 < high and high - low == pytest.approx(width, rel=0.3)
    twice = np.tile(values, 2)
    interval = stats.ratio_interval(operator.truediv, twice, (every * 2, every * 2))
    assert interval == pytest.approx([low, high])
    nine = [clip % 9 for clip in every]
    assert stats.ratio_interval(operator.truediv, values, (nine, every)) is None
    assert stats.ratio_interval(operator.truediv, values, (every, nine)) is None


SPRITES = [f"{name}/character{number:04}.mkv" for name in ("Walk", "Slash") for number in range(12)]


@pytest.mark.parametrize(
    "lacking, videos, over, missing",
    [
        ("ratios", range(9), "9 clips", "; no interval of ratios: fewer than 10 clips"),
        ("shares", [f"a/{clip % 12}.mkv" for clip in range(96)], "12 videos", ""),
        (
            "shares",
            ["a/1.mkv", "a/1.mkv", "b/2.mkv"],
            "2 videos",
            "; no interval of shares: fewer than 10 videos",
        ),
        ("", ["a/1.mkv", "a/1.mkv", "b/2.mkv"], "2 videos", ""),
        ("", [f"s/samples.npz, sample {clip % 2}" for clip in range(4)], "2 videos", ""),
        ("", ["a/1.mkv"] * 3, "3 clips", "; no interval: fewer than 2 videos"),
        ("shares", SPRITES, "12 groups of videos", ""),
        ("shares", ["a/1.mkv"], "1 clips", "; no interval of means: fewer than 2 clips"),
    ],
)
def test_units_are_named_and_so_is_why_there_is_no_interval(lacking, videos, over, missing):
    units, line = stats.interval_units(lacking, real=videos)
    assert units == {"real": over + missing}
    assert line == f"  95% intervals over {over} (real{missing})"


def test_an_error_needs_two_values_and_quantiles_ignore_values_that_are_not_finite():
    assert stats.mean_and_error([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, (7 / 9) ** 0.5))
    assert stats.mean_and_error([2.0]) == (2, None) and stats.mean_and_error([]) == (None, None)
    assert stats.interval95(torch.tensor([1.0, torch.nan, 1.0, torch.inf])) == [1, 1]


def test_rows_of_all_ranks_come_in_the_order_of_their_clips(monkeypatch):
    stream = [(1, np.array([1]), "a", 0.1, "v"), (4, np.array([4]), "c", 0.3, "x")]
    others = [(index, 10 * index, "z", "y") for index in (0, 2, 3)]
    monkeypatch.setattr(distributed, "gather", lambda rows: [rows, others])
    columns = stats.gather(stream, lambda clip, name, *_: (10 * clip.item(), name))
    assert columns == [(0, 10, 20, 30, 40), tuple("zazzc"), tuple("yvyyx")]


def test_tables_show_values_with_their_intervals():
    result = {"a": 1.0, "a_interval95": [0.5, 1.5], "bb": None}
    values, lines = stats.report(result, {"a": "one", "bb": "the other", "missing": ""})
    assert values == {"a": 1.0, "bb": None}
    assert lines == ["  one       1.000 (0.500 to 1.500)", "  the other                      -"]


def test_an_interval_is_around_the_value_that_is_printed_beside_it():
    # 10 units of unequal size
    videos = ["A/a.mp4"] * 91 + [f"A/{name}.mp4" for name in "bcdefghij"]
    hits = torch.arange(100) < 91
    mean, (low, high) = stats.share(hits, videos)
    assert low < mean < high and mean == pytest.approx(0.91)
    low, high = stats.mean_interval(hits.double().numpy(), videos)
    assert (low + high) / 2 == pytest.approx(0.91)
    errors = torch.where(hits, 0.5, 1.0)
    low, high = stats.ratio_interval(operator.truediv, (errors, hits + 1.0), (videos, videos))
    assert low < errors.mean() / (hits + 1.0).mean() < high
