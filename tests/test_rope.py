"""Rotary positions compared with complex numbers, their invariances, and clips beyond the trained
length.
"""

import cmath
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import plans
from rope import RotaryEmbedding3D, apply_rotary
from test_models import TINY


def naive_rotation(x, grid, time_scale, channels, theta, speed=0.0):
    """Rotate x (B, h, N, d) pair by pair with complex numbers; channels are the numbers for (time,
    height, width).
    """
    z = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))  # (B, h, N, d / 2)
    positions = list(itertools.product(*map(range, grid)))
    for b, n in np.ndindex(len(x), len(positions)):
        t, h, w = positions[n]
        seconds = time_scale[b].item()
        time = t * seconds * 25
        for axis, position in enumerate((time, h, w)):
            pairs = channels[axis] // 2
            for j in range(pairs):
                exponent = j
                place = position
                if axis > 0 and speed and j < pairs - pairs % 3:  # three pairs share a frequency
                    exponent = j // 3
                    place = position + (0, speed, -speed)[j % 3] * time
                elif axis > 0 and speed:  # pairs without a triple do not move
                    exponent = pairs // 3 + j - (pairs - pairs % 3)
                turn = cmath.exp(1j * place * theta ** (-2 * exponent / channels[axis]))
                z[b, :, n, sum(channels[:axis]) // 2 + j] *= turn
    return torch.view_as_real(z).flatten(-2)


@pytest.mark.parametrize("stretch, speed", [(1.0, 0.0), (1.0, 0.5), (2.5, 2.0)])
@pytest.mark.parametrize(
    "head_dim, split, channels",
    [
        (64, "", (20, 20, 20)),
        (10, "", (2, 2, 2)),
        (32, "16,8,8", (16, 8, 8)),
        (32, "10,0,0", (10, 0, 0)),
    ],
)
def test_rotary_pairs_turn_like_complex_numbers_and_other_channels_stay(
    head_dim, split, channels, stretch, speed
):
    time_scale = torch.tensor([1 / 25, 0.1])
    grid = (3, 2, 3)
    x = torch.randn(2, 1, 18, head_dim)
    settings = {"theta": 100.0} if split else {}  # by default 10,000
    theta = settings.get("theta", 10_000)
    speed = speed if min(channels[1:]) >= 6 else 0.0
    rope = RotaryEmbedding3D(head_dim, split=split, speed=speed, **settings)
    rope.stretch = stretch  # divides the positions in time, and only those
    rotated = apply_rotary(x, *rope(grid, time_scale))
    naive = naive_rotation(x, grid, time_scale / stretch, channels, theta, speed)
    assert_close(rotated.double(), naive, atol=1e-5, rtol=0)
    assert torch.equal(rotated[:, :, 0], x[:, :, 0])  # the first patch
    assert torch.equal(rotated[..., sum(channels) :], x[..., sum(channels) :])


def test_low_precision_rounds_rotated_values_once_and_never_the_angles():
    rope = RotaryEmbedding3D(64)
    grid = (1000, 1, 1)
    time_scale = torch.tensor([0.033])
    x = torch.randn(1, 1, 1000, 64)
    expected = torch.stack(rope(grid, time_scale))
    exact = (25 * 0.033 * torch.arange(1000, dtype=torch.float64)).cos()  # of frequency 1
    assert_close(expected[0, 0, 0, :, 0].double(), exact, atol=2e-4, rtol=0)
    rotated = apply_rotary(x, *expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.stack(rope(grid, time_scale)), expected)
        assert torch.equal(apply_rotary(x, *expected), rotated)
    low = torch.stack(rope.to(torch.bfloat16)(grid, time_scale))
    assert torch.equal(low, expected)
    for dtype in (torch.bfloat16, torch.float16):
        q = x.to(dtype)  # the result has its dtype and is rounded once
        rotated = apply_rotary(q.float(), *expected)
        assert torch.equal(apply_rotary(q, *expected), rotated.to(dtype))


@pytest.mark.parametrize(
    "method, num_frames, time_scale, stretch",
    [
        ("linear", 16, 1 / 25, 2),  # twice the trained length
        ("linear", 8, 2 / 25, 2),  # the same in seconds
        ("linear", 12, 1 / 50, 1),  # shorter than in training: nothing to squeeze
        ("none", 16, 1 / 25, 1),
    ],
)
def test_linear_rope_scaling_squeezes_longer_clips_into_the_trained_span(
    method, num_frames, time_scale, stretch
):
    args = SimpleNamespace(rope_scale=method, ckpt="a.pt")
    sampled = (num_frames, time_scale)
    assert plans.rope_stretch(args, TINY, trained=(8, 1 / 25), sampled=sampled) == stretch
