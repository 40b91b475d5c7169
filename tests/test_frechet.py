"""Fréchet distances compared with closed forms, their errors, and calls of detectors."""

from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import torch

import test_transport
from runtime.atomic import atomic_write
from runtime.cli import UserError
from scoring import frechet
from scoring.frechet import frechet_distance

FVD = Namespace(metric="fvd", batch_size=2, detector="x")


normal = partial(test_transport.normal, dtype=torch.float64)


def test_the_frechet_distance_equals_its_closed_forms():
    factor = normal(6, 9)
    mean_a = normal(6)
    mean_b = normal(6, seed=1)
    cov = factor @ factor.T / 9
    means = (mean_a - mean_b).square().sum().item()
    assert frechet_distance(mean_a, cov, mean_b, cov) == pytest.approx(means, rel=1e-12)
    assert frechet_distance(mean_a, cov, mean_a, cov) == pytest.approx(0, abs=1e-12)
    a = normal(6).square()
    b = normal(6, seed=1).square()
    a[2] = 0  # a dimension in which nothing varies
    deviations = (a.sqrt() - b.sqrt()).square().sum().item()
    assert frechet_distance(mean_a, a.diag(), mean_b, b.diag()) == pytest.approx(
        means + deviations, rel=1e-12
    )
    # no overlap
    a = torch.tensor([2.0, 3, 0, 0, 0, 0]).double()
    b = torch.tensor([0, 0, 5.0, 7, 0, 0]).double()
    assert frechet_distance(mean_a, a.diag(), mean_a, b.diag()) == pytest.approx(17, rel=1e-12)


def test_moments_cover_all_frames():
    features = 1000 + normal(25, 2, 4)  # far from zero, where sums of squares would lose digits
    found = frechet.moments_of(features)
    every = features.numpy().reshape(50, 4)
    assert found["count"] == 50
    assert found["mean"].numpy() == pytest.approx(every.mean(axis=0), rel=1e-14)
    assert found["cov"].numpy() == pytest.approx(np.cov(every.T), rel=1e-9)


def test_the_bootstrap_error_equals_the_deviation_over_repeated_sets():
    mean = torch.zeros(1).double()
    cov = torch.ones(1, 1).double()
    sets = [2 + normal(200, 1, seed=seed) for seed in range(400)]
    distances = []
    for part in sets:
        cov_of_part = torch.cov(part.T).view(1, 1)
        distances.append(frechet_distance(mean, cov, part.mean(dim=0), cov_of_part))
    error = frechet.bootstrap_error(mean, cov, sets[0][:, None], 400, seed=0)
    assert error == pytest.approx(np.std(distances), rel=0.15)
    # of (mean - 0)^2 at 2, to first order
    assert error == pytest.approx(2 * 2 / 200**0.5, rel=0.15)


def test_the_bootstrap_resamples_whole_clips():
    def error_of(clips):
        mean = torch.zeros(3).double()
        return frechet.bootstrap_error(mean, torch.eye(3).double(), clips, 100, seed=0)

    clips = 1 + normal(60, 1, 3, seed=1)
    alone = error_of(clips)
    assert error_of(clips.repeat(1, 8, 1)) == pytest.approx(alone, rel=0.02)  # static clips
    assert error_of(clips.repeat(8, 1, 1)) < 0.5 * alone  # more clips


def test_clips_reach_the_detector_from_0_to_255_as_c_t_h_w():
    def detector(x, **flags):
        assert all(flags.values()) and len(flags) == 3 and x.is_contiguous()
        return torch.cat([x[:, :, 0].mean((2, 3)), x[:, :, -1].mean((2, 3))], dim=1)

    clips = torch.zeros(5, 4, 6, 8, 3, dtype=torch.uint8)
    clips[:, 0, ..., 0] = 255
    clips[3, -1, ..., 2] = 20
    features = frechet.extract(detector, clips, FVD)
    assert features.tolist() == [[[255, 0, 0, 0, 0, 20 * (clip == 3)]] for clip in range(5)]


def test_image_detectors_get_frames_in_order():
    def detector(x, return_features):
        return x[:, :, 0].mean(2)

    clips = (100 * normal(3, 4, 6, 8, 3)).byte()
    features = frechet.extract(detector, clips, Namespace(metric="fid", batch_size=5))
    of_first_row = clips[:, :, 0].float().mean(dim=2)  # (B, T, C)
    torch.testing.assert_close(features, of_first_row)


def test_processes_may_write_the_same_moments_at_once(tmp_path):
    path = tmp_path / "moments"
    with atomic_write(path, shared=True) as first, atomic_write(path, shared=True) as second:
        first.write(b"the same")
        second.write(b"the same")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"the same"]


@pytest.mark.parametrize(
    "detector, reason",
    [
        (lambda x, **_: x, r"returned \[2, 3, 4, 8, 8\], expected features \[2, D\]"),
        (lambda x, **_: x.mean(), r"returned \[\], expected features \[2, D\]"),
        (lambda x, **_: x.flatten(1) / 0, "not finite"),
    ],
)
def test_a_detector_that_does_not_return_finite_features_is_refused(detector, reason):
    message = f"--detector x: fails when called for --metric fvd: .*{reason}"
    with pytest.raises(UserError, match=message):
        frechet.check_detector(FVD, detector, Namespace(num_frames=4, image_size=8))
