"""Intervals against their definitions, and rows of several ranks in the order of their clips."""

import numpy as np
import pytest
import torch

from runtime import distributed
from scoring import stats


def test_clips_of_one_video_count_as_one_unless_there_is_no_other_video():
    values = np.random.default_rng(0).normal(size=12)
    copies = np.tile(values, 8)
    own, shared, one = [*range(96)], [*range(12)] * 8, ["v"] * 96
    for videos, units in ((own, "96 clips"), (shared, "12 videos"), (one, "96 clips of one video")):
        assert stats.interval_units(real=videos) == ({"real": units}, f"  95% intervals over {units} (real)")
    assert stats.mean_interval(copies, shared) == pytest.approx(stats.mean_interval(values))  # copies tell nothing new
    low, high = stats.mean_interval(copies, one)
    assert stats.mean_interval(copies) == stats.mean_interval(copies, own) == [low, high]
    assert high - low < 0.5 * np.subtract(*stats.mean_interval(values)[::-1])
    both = np.stack([copies, np.where(np.arange(96) < 12, np.nan, copies)])
    assert stats.by_video(both.T, shared).T.numpy() == pytest.approx(np.stack([values, values]))  # NaNs do not count
    hits = copies > 0
    assert stats.share(hits, shared) == (hits.mean(), pytest.approx(stats.wilson(hits.sum() / 8, 12)))


def test_an_error_needs_two_values_and_an_interval_ignores_values_that_are_not_finite():
    assert stats.mean_and_error([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, (7 / 9) ** 0.5))
    assert stats.mean_and_error([2.0]) == (2, None) and stats.mean_and_error([]) == (None, None)
    assert stats.interval95(torch.tensor([1.0, torch.nan, 1.0, torch.inf])) == [1, 1]
    values = np.random.default_rng(0).normal(size=50)
    assert stats.mean_interval([*values, np.nan]) == stats.mean_interval(values)
    assert stats.mean_interval([3.0, np.nan]) is None


def test_rows_of_all_ranks_come_in_the_order_of_their_clips(monkeypatch):
    own = [(1, "a", 0.1, "v"), (2, "b", 0.2, "w"), (4, "c", 0.3, "x")]
    stream = ((index, np.full((1, 1, 1, 1), index), *about) for index, *about in own)
    other = [(index, 10 * index, "z", "y") for index in (0, 3)]
    monkeypatch.setattr(distributed, "gather", lambda rows: [rows, other])
    columns = stats.gather(stream, lambda clip, name, scale, _: (10 * clip.item(), name))
    assert columns == [(0, 10, 20, 30, 40), ("z", "a", "b", "z", "c"), ("y", "v", "w", "y", "x")]


def test_tables_show_values_with_their_intervals():
    result = {"a": 1.0, "a_interval95": [0.5, 1.5], "bb": None, "c": 2.0, "x": [1, 2]}
    assert stats.cell(result, "a", 1) == "1.0 (0.5 to 1.5)" and stats.cell(result, "c") == "2.000"
    assert stats.cell(result, "c", 2, "x") == "2.00 (1.00 to 2.00)"
    values, lines = stats.report(result, {"a": "one", "bb": "the other", "missing": ""})
    assert values == {"a": 1.0, "bb": None}
    assert lines == ["  one       1.000 (0.500 to 1.500)", "  the other                      -"]
