"""Seams and drifts of clips with known seams and drifts."""

import json

import pytest
import scipy.stats
import torch

from scoring import consistency
from scoring.consistency import STATISTICS


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flat(levels):
    """Clips uint8 (N, T, 4, 4, 3) whose frames are all of one gray level (N, T)."""
    return torch.as_tensor(levels).byte()[:, :, None, None, None].expand(-1, -1, 4, 4, 3)


def measure_all(clips):
    """(statistics (N, T, 7), change (N, T - 1), no names of videos) of clips."""
    return *(torch.stack(parts) for parts in zip(*map(consistency.measure, clips), strict=True)), ()


def walk(steps):
    """Gray levels (N, T) that change by `steps` (N, T - 1), always towards the middle gray."""
    levels = [torch.full((len(steps),), 100.0)]
    for step in steps.unbind(dim=1):
        levels.append(levels[-1] + torch.where(levels[-1] < 128, step, -step))
    return torch.stack(levels, dim=1)


@pytest.mark.parametrize(
    "clip, patches, windows",
    [
        ((12, 4), [4, 8], []),
        ((24, 4, 16, 8), [4, 8, 12, 16, 20], [16]),
        ((30, 4, 16, 6), [4, 8, 12, 18, 22, 28], [16, 26]),  # windows begin at 0, 10, 20
        # windows begin at 0, 3, 6: new patches at 19 and 22 only
        ((20, 4, 16, 13), [4, 8, 12], [16, 19]),
    ],
)
def test_borders_are_the_first_frames_of_patches_and_of_new_frames_of_windows(
    clip, patches, windows
):
    assert consistency.borders(*clip) == (patches, windows)


def test_window_seams_and_fading_clips_are_measured():
    place = torch.arange(31) + 1
    steps = torch.where((place == 16) | (place == 24), 12.0, 2.0)
    even = measure_all(flat(walk(torch.full((5, 31), 2.0))))
    seams = measure_all(flat(walk(steps.expand(5, -1))))
    found = consistency.summarize(seams, even, 4, window=16, overlap=8)
    assert found["window_seam_score"] == pytest.approx(6)
    assert "window_seam_score" not in consistency.summarize(seams, even, 4)
    noise = random(4, 32, 6, 6, 3)
    fading = noise * torch.linspace(1, 0.2, 32, dtype=torch.float64)[:, None, None, None]
    fading = measure_all((255 * fading).byte())
    found = consistency.summarize(fading, measure_all((255 * noise).byte()), 4)
    low, high = found["drift"]["sharpness"]["interval95"]
    assert found["largest_drift"] == min(own["drift"] for own in found["drift"].values()) < -2
    assert low < found["drift"]["sharpness"]["drift"] < high < 0


def test_the_statistics_of_a_frame_are_mean_contrast_and_sharpness():
    clip = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    clip[0, :, ::2, 0] = 100  # red stripes
    clip[1] = 7
    statistics, change = consistency.measure(clip)
    sharpness = (100**2 / 3 / 2) ** 0.5  # red, across only
    assert statistics[0].tolist() == pytest.approx([50, 0, 0, 50, 0, 0, sharpness])
    assert statistics[1].tolist() == pytest.approx([7, 7, 7, 0, 0, 0, 0])
    assert change.tolist() == pytest.approx([((93**2 + 7**2) / 2 / 3 + 7**2 * 2 / 3) ** 0.5])


def test_frames_with_the_same_pixels_in_other_places_have_no_deviation():
    pixels = (255 * random(8 * 8, 3)).byte()
    orders = [torch.randperm(64, generator=torch.Generator().manual_seed(n)) for n in range(90)]
    real = torch.stack([pixels[order].reshape(8, 8, 3) for order in orders]).reshape(10, 9, 8, 8, 3)
    found = consistency.summarize(measure_all(real // 2), measure_all(real), 4)
    assert found["drift"]["contrast red"]["drift"] is None


@pytest.mark.parametrize("patch", [2, 3])
def test_jumps_at_borders_set_the_seam_score_and_other_jumps_do_not(patch):
    place = (torch.arange(23) + 1) % patch
    borders = consistency.borders(24, patch)[0]

    def changes(steps):
        return measure_all(flat(walk(steps.expand(10, -1))))[1]

    even = changes(torch.full((23,), 2.0))
    seams = changes(torch.where(place == 0, 12.0, 2.0))
    others = changes(torch.where(place == 1, 12.0, 2.0))
    score, interval = consistency.seam_score(seams, even, borders)
    assert score == pytest.approx(6) and interval == pytest.approx([6, 6])
    assert consistency.seam_score(even, seams, borders)[0] == pytest.approx(1 / 6)
    assert consistency.seam_score(others, even, borders)[0] < 0.5
    assert consistency.seam_score(seams[:9], even, borders) == (score, None)
    uneven = seams * (1 + 9 * random(10, 1))  # clips with little and with much motion
    uneven = uneven * (0.5 + random(10, 23, seed=1))
    score, (low, high) = consistency.seam_score(uneven, even, borders)
    assert low < score < high and high - low > 0.3


def test_real_clips_against_real_clips_have_no_seam_and_no_drift():
    sets = [measure_all((random(200, 12, 6, 6, 3, seed=seed) * 255).byte()) for seed in (0, 1)]
    found = consistency.summarize(*sets, temporal_patch_size=4)
    assert found["seam_score"] == pytest.approx(1, abs=0.01)
    assert found["seam_score_interval95"][0] < 1 < found["seam_score_interval95"][1]
    assert found["change_ratio"] == pytest.approx(1, abs=0.01)
    assert abs(found["largest_drift"]) < 0.4
    intervals = [entry["interval95"] for entry in found["drift"].values()]
    assert sum(low <= 0 <= high for low, high in intervals) >= 5
    assert json.loads(json.dumps(found)) == found


def test_intervals_are_as_wide_if_each_video_gives_several_clips():
    sets = [measure_all((random(10, 12, 6, 6, 3, seed=seed) * 255).byte()) for seed in (0, 1)]
    copies = []
    for statistics, change, _ in sets:
        copies.append((statistics.repeat(3, 1, 1), change.repeat(3, 1), [*range(10)] * 3))
    once = consistency.summarize(*sets, 4)
    found = consistency.summarize(*copies, 4)
    assert found["seam_score_interval95"] == pytest.approx(once["seam_score_interval95"])
    for name, drift in once["drift"].items():
        assert found["drift"][name]["interval95"] == pytest.approx(drift["interval95"], rel=0.02)
    one_video = (*copies[1][:2], ["v"] * 30)
    found = consistency.summarize(copies[0], one_video, 4)
    assert found["seam_score"] == pytest.approx(once["seam_score"])
    assert found["seam_score_interval95"] is None
    assert {drift["interval95"] for drift in found["drift"].values()} == {None}


def test_drifts_have_the_intervals_of_a_difference_of_two_means():
    sets = [(random(count, 12, 7, seed=count) * 255) for count in (200, 6)]
    found = consistency.drifts(*sets)
    rises = [consistency.rises(own)[:, 0].numpy() for own in sets]
    unit = sets[1][..., 0].flatten().std().item()
    middle = (rises[0].mean() - rises[1].mean()) / unit
    low, high = found["mean red"]["interval95"]
    assert (low + high) / 2 == pytest.approx(middle)
    welch = scipy.stats.ttest_ind(*rises, equal_var=False).confidence_interval(0.95)
    assert high - low == pytest.approx((welch.high - welch.low) / unit, rel=0.05)


def test_without_borders_or_motion_there_is_no_seam_score():
    moves = random(3, 7)
    stands = torch.zeros(3, 7)
    hardly = torch.eye(7)[:3]  # not at frame 4
    for generated, real, borders in (
        (moves, moves, []),
        (moves, moves, [*range(1, 8)]),
        (stands, moves, [4]),
        (moves, hardly, [4]),
    ):
        assert consistency.seam_score(generated, real, borders) == (None, None)


def test_rising_brightness_is_a_drift_in_deviations_of_real_frames():
    real = torch.tensor([[90.0] * 9, [110.0] * 9])
    rising = torch.arange(9.0) * 5 + torch.tensor([[100.0], [108], [116]])
    levels = (real, rising, rising.flip(1), rising + 20)
    real, up, down, brighter = (measure_all(flat(own))[0] for own in levels)
    unit = torch.tensor([90.0, 110] * 9).std().item()
    found = consistency.drifts(up, real)
    for name in STATISTICS[:3]:
        assert found[name]["drift"] == pytest.approx(40 / unit)  # up by 40 from first to last
        assert found[name]["interval95"] == pytest.approx([40 / unit] * 2)
    assert found["sharpness"] == {"drift": None, "interval95": None}  # flat frames all have 0
    assert consistency.drifts(down, real)["mean red"]["drift"] == pytest.approx(-40 / unit)
    drift = consistency.drifts(brighter, up)["mean green"]["drift"]
    assert drift == pytest.approx(0, abs=1e-9)  # real ones rise, too
