"""Noise levels of training clips: shares, kinds of masks, what a draw depends on."""

from collections import Counter

import pytest
import torch

from forcing import clean_frames, draw_gammas, half_given, label_dropout
from runtime.rng import uniform
from transport import shift_gamma

MANY = range(2000)


def draw(share, num_frames=16, patch=4, indices=MANY, shift=3.0, seed=0):
    return draw_gammas(seed, 0, list(indices), num_frames, patch, shift, share)


def test_clips_that_are_not_forced_have_the_gamma_that_they_have_without_forcing():
    plain = draw(0.0)
    assert torch.equal(plain, shift_gamma(uniform(0, "gamma", 0, list(MANY)), 3.0))
    levels = draw(0.25)
    is_common = (levels == plain[:, None]).all(dim=1)
    assert is_common.float().mean().item() == pytest.approx(0.75, abs=0.04)  # 4 standard errors
    assert draw(1.0)[(draw(1.0) == plain[:, None]).all(dim=1)].numel() == 0
    assert torch.equal(draw(0.5, num_frames=1), plain)  # a clip of one frame has nothing to complete


def test_half_of_the_forced_clips_have_given_frames_and_the_rest_of_them_one_common_gamma():
    plain, levels = draw(0.0), draw(1.0)
    is_given = levels == 1
    some = is_given.any(dim=1)
    assert some.float().mean().item() == pytest.approx(0.5, abs=0.045)
    assert torch.equal(levels[some][~is_given[some]], plain[some].repeat_interleave((~is_given[some]).sum(dim=1)))


@pytest.mark.parametrize("num_frames", [2, 4])
def test_a_clip_of_one_temporal_patch_has_no_given_frames_and_keeps_its_label(num_frames):
    assert torch.equal(draw(1.0, num_frames), draw(0.0))
    assert torch.equal(label_dropout(draw(0.75, num_frames), 0.1), torch.full((len(MANY),), 0.1))


@pytest.mark.parametrize(("num_frames", "expected"), [(4, 0.10), (8, 0.30), (16, 0.29)])
def test_the_share_of_clips_without_a_label_is_what_the_docs_say(num_frames, expected):
    assert label_dropout(draw(0.75, num_frames), 0.1).mean().item() == pytest.approx(expected, abs=0.025)


@pytest.mark.parametrize("num_frames", [5, 10, 16])
def test_the_other_half_has_a_level_per_temporal_patch_drawn_as_the_gamma_of_a_clip_is(num_frames):
    levels = draw(1.0, num_frames)
    own = levels[~(levels == 1).any(dim=1)]
    parts = own.split(4, dim=1)
    assert all((part == part[:, :1]).all() for part in parts)
    first, last = parts[0][:, 0], parts[-1][:, 0]
    u = shift_gamma(torch.cat([first, last]), 1 / 3)  # the inverse of the shift: uniform
    assert u.mean().item() == pytest.approx(0.5, abs=0.04) and u.var().item() == pytest.approx(1 / 12, abs=0.009)
    assert abs(torch.corrcoef(torch.stack([first, last]))[0, 1].item()) < 0.13


@pytest.mark.parametrize("num_frames", [2, 3, 4, 16])
def test_every_border_occurs_and_neither_all_nor_none_of_the_frames_are_given(num_frames):
    draws = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0)).tolist()
    masks = Counter(tuple(sorted(clean_frames(*row, num_frames))) for row in draws)
    assert all(0 < len(mask) < num_frames for mask in masks)
    every = range(1, num_frames)
    assert masks.keys() >= {tuple(range(k)) for k in every}
    assert masks.keys() >= {tuple(range(k, num_frames)) for k in every}
    assert masks.keys() >= {(frame,) for frame in range(num_frames)}
    if num_frames > 2:
        assert (0, num_frames - 1) in masks
    first = sum(count for mask, count in masks.items() if mask == tuple(range(len(mask))))
    assert first / 4000 > 0.45


def test_a_few_first_frames_are_given_more_often_than_many():
    draws = torch.rand(8000, 3, generator=torch.Generator().manual_seed(1)).tolist()
    counts = Counter(len(clean_frames(*row, 16)) for row in draws if row[0] < 1 / 2)
    total = sum(counts.values())
    for most in (1, 4, 8):
        share = sum(count for length, count in counts.items() if length <= most) / total
        assert share == pytest.approx((most / 15) ** 0.5, abs=0.04)


def test_the_more_frames_are_clean_the_more_often_a_clip_has_no_label():
    levels = torch.full((4, 16), 0.3)
    for row, count in enumerate((0, 1, 4, 15)):
        levels[row, :count] = 1
    assert label_dropout(levels, 0.1).tolist() == pytest.approx([0.1, 0.25, 0.5, (15 / 16) ** 0.5])
    assert label_dropout(levels, 0.3).tolist() == pytest.approx([0.3, 0.3, 0.5, (15 / 16) ** 0.5])
    assert label_dropout(levels[:, -1], 0.1).tolist() == pytest.approx([0.1] * 4)


def test_the_ends_of_the_draws_are_in_range():
    almost = 1 - 2**-24
    for num_frames in (2, 3, 16):
        for kind in (0.0, 0.6, 0.8, 0.9):
            for first in (0.0, almost):
                for last in (0.0, almost):
                    frames = clean_frames(kind, first, last, num_frames)
                    assert frames <= set(range(num_frames)) and 0 < len(frames) < num_frames


def test_the_levels_of_a_sample_depend_on_its_index_in_the_stream_and_the_seed_alone():
    together = draw(0.5, indices=range(20))
    assert torch.equal(torch.cat([draw(0.5, indices=[index]) for index in range(20)]), together)
    assert not torch.equal(draw(0.5, indices=range(20), seed=1), together)


def test_the_first_half_can_be_made_clean():
    levels = half_given(torch.tensor([0.25, 0.5]), 5)
    assert levels.tolist() == [[1, 1, 0.25, 0.25, 0.25], [1, 1, 0.5, 0.5, 0.5]]
