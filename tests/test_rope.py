import cmath
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from rope import ROPE_SCALES, RotaryEmbedding3D, apply_rotary, scale_frequencies

FPS_25 = torch.tensor([1 / 25])
GRID = (3, 4, 5)
NUM_TOKENS = 3 * 4 * 5


def naive_rotation(x, grid, time_scale, channels, theta):
    """Rotate x (B, h, N, d) pair by pair with complex numbers; channels: the same for each axis, or a tuple."""
    split = channels if isinstance(channels, tuple) else (channels,) * 3
    out = x.double().clone()
    T, H, W = grid
    for b, seconds in enumerate(time_scale.tolist()):
        for n, (t, h, w) in enumerate((t, h, w) for t in range(T) for h in range(H) for w in range(W)):
            for axis, position in enumerate((t * seconds * 25, h, w)):
                for j in range(split[axis] // 2):
                    turn = cmath.exp(1j * position * theta ** (-2 * j / split[axis]))
                    first = sum(split[:axis]) + 2 * j
                    for head in range(x.shape[1]):
                        z = complex(*out[b, head, n, first : first + 2].tolist()) * turn
                        out[b, head, n, first], out[b, head, n, first + 1] = z.real, z.imag
    return out


def random_qk(head_dim, batch=1, heads=2, seed=0, **kwargs):
    return torch.randn(2, batch, heads, NUM_TOKENS, head_dim, generator=torch.Generator().manual_seed(seed), **kwargs)


def scores(q, k, cos, sin):
    return apply_rotary(q, cos, sin) @ apply_rotary(k, cos, sin).mT


@pytest.mark.parametrize(("head_dim", "channels"), [(64, 20), (72, 24), (6, 2), (16, 4)])
@pytest.mark.parametrize("theta", [10_000.0, 100.0])
def test_every_pair_rotates_as_a_complex_number(head_dim, channels, theta):
    time_scale = torch.tensor([1 / 25, 0.1])
    grid = (2, 2, 3)
    x = torch.randn(2, 1, 12, head_dim)
    rotated = apply_rotary(x, *RotaryEmbedding3D(head_dim, theta)(grid, time_scale))
    torch.testing.assert_close(
        rotated.double(), naive_rotation(x, grid, time_scale, channels, theta), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(("split", "channels"), [("16,8,8", (16, 8, 8)), ("2,14,4", (2, 14, 4)), ("", (10, 10, 10))])
def test_a_split_of_the_head_gives_each_axis_its_channels(split, channels):
    time_scale = torch.tensor([1 / 25, 0.1])
    x = torch.randn(2, 1, 12, 32)
    rotated = apply_rotary(x, *RotaryEmbedding3D(32, 100.0, split)((2, 2, 3), time_scale))
    wanted = naive_rotation(x, (2, 2, 3), time_scale, channels, 100)
    torch.testing.assert_close(rotated.double(), wanted, atol=1e-5, rtol=0)
    assert torch.equal(rotated[..., sum(channels) :], x[..., sum(channels) :])


@pytest.mark.parametrize("split", ["16,8", "8,8,8,2", "16,8,7", "16,16,0", "-2,8,8", "16;8;8", "8,8,8,", "x", "9,9,9"])
def test_a_split_that_does_not_fit_the_head_is_refused(split):
    with pytest.raises(ValueError, match=f"rope_split .*{split}"):
        RotaryEmbedding3D(32, 100.0, split)


@pytest.mark.parametrize(("head_dim", "untouched"), [(64, 4), (72, 0), (48, 0), (10, 4)])
def test_all_channels_rotate_except_the_rest(head_dim, untouched):
    x, _ = random_qk(head_dim)
    rotated = apply_rotary(x, *RotaryEmbedding3D(head_dim)(GRID, FPS_25))
    last = -1  # token whose three coordinates are all above zero
    changed = (rotated != x)[0, 0, last]
    assert changed[: head_dim - untouched].all()
    assert not changed[head_dim - untouched :].any()


def test_each_axis_rotates_its_own_channels_only():
    rope = RotaryEmbedding3D(64)
    for axis in range(3):
        grid = [1, 1, 1]
        grid[axis] = 4
        _, sin = rope(grid, FPS_25)
        turning = (sin[0, 0, -1] != 0).nonzero().flatten().tolist()
        assert turning == list(range(10 * axis, 10 * axis + 10))


@pytest.mark.parametrize("head_dim", [64, 72])
def test_scores_depend_on_relative_positions_only(head_dim):
    cos, sin = RotaryEmbedding3D(head_dim)((6, 6, 6), FPS_25)
    q, k = torch.randn(2, 1, 1, 1, head_dim).expand(-1, -1, -1, 216, -1)  # the same content at every position
    table = scores(q, k, cos, sin).reshape(6, 6, 6, 6, 6, 6)  # of query (t, h, w) and key (t, h, w)
    near, far = table[:4, :4, :4, :4, :4, :4], table[2:, 1:5, 2:, 2:, 1:5, 2:]
    torch.testing.assert_close(near, far, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(near, table[:4, :4, :4, 1:5, :4, :4], atol=1e-2)  # other relative positions


def test_scores_distinguish_before_from_after():
    cos, sin = RotaryEmbedding3D(64)((5, 1, 1), FPS_25)
    q, k = torch.randn(2, 1, 1, 1, 64).expand(-1, -1, -1, 5, -1)
    table = scores(q, k, cos, sin)[0, 0]
    assert (table[1, 3] - table[3, 1]).abs() > 0.01


def test_norms_are_preserved():
    q, _ = random_qk(72)
    rotated = apply_rotary(q, *RotaryEmbedding3D(72)(GRID, torch.tensor([0.3])))
    torch.testing.assert_close(rotated.norm(dim=-1), q.norm(dim=-1))


def test_the_first_patch_is_not_rotated():
    q, _ = random_qk(64)
    rotated = apply_rotary(q, *RotaryEmbedding3D(64)(GRID, FPS_25))
    assert torch.equal(rotated[:, :, 0], q[:, :, 0])


def test_twice_the_time_scale_is_twice_the_time_position():
    rope = RotaryEmbedding3D(64)
    cos, sin = (part.unflatten(2, (9, 2, 2)) for part in rope((9, 2, 2), FPS_25))
    cos2, sin2 = (part.unflatten(2, (5, 2, 2)) for part in rope((5, 2, 2), 2 * FPS_25))
    assert torch.equal(cos2, cos[:, :, ::2])
    assert torch.equal(sin2, sin[:, :, ::2])


def test_adjacent_patches_at_25_fps_are_one_radian_apart_in_the_fastest_pair():
    cos, sin = RotaryEmbedding3D(64)((4, 1, 1), FPS_25)
    torch.testing.assert_close(torch.atan2(sin, cos)[0, 0, :, 0], torch.tensor([0.0, 1.0, 2.0, 3.0]))


def test_each_sample_has_its_own_time_scale():
    rope = RotaryEmbedding3D(64)
    time_scale = torch.tensor([0.04, 0.08, 0.1])
    together = torch.stack(rope(GRID, time_scale))
    alone = torch.cat([torch.stack(rope(GRID, scale[None])) for scale in time_scale], dim=1)
    assert together.shape == (2, 3, 1, NUM_TOKENS, 32)
    assert torch.equal(together, alone)
    assert not torch.equal(together[:, 0], together[:, 1])


def test_a_longer_clip_begins_with_the_angles_of_a_shorter_one():
    rope = RotaryEmbedding3D(64)
    for short, long in zip(rope((2, 3, 3), FPS_25), rope((8, 3, 3), FPS_25), strict=True):
        assert torch.equal(short, long[:, :, : short.shape[2]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_angles_stay_float32_in_a_module_of_low_precision(dtype):
    rope = RotaryEmbedding3D(64)
    grid, time_scale = (1000, 1, 1), torch.tensor([0.033])
    expected = rope(grid, time_scale)
    rope.to(dtype)
    for found, wanted in zip(rope(grid, time_scale), expected, strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted)


def test_angles_stay_float32_under_autocast():
    rope = RotaryEmbedding3D(64)
    q, _ = random_qk(64)
    expected = rope(GRID, FPS_25)
    with torch.autocast("cpu", torch.bfloat16):
        found = rope(GRID, FPS_25)
        rotated = apply_rotary(q, *found)
        rotated_low = apply_rotary(q.bfloat16(), *found)
    assert torch.equal(torch.stack(found), torch.stack(expected))
    assert torch.equal(rotated, apply_rotary(q, *expected))
    assert rotated_low.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_result_has_the_dtype_of_the_queries_and_is_rounded_once(dtype):
    q = random_qk(64)[0].to(dtype)
    rotary = RotaryEmbedding3D(64)(GRID, FPS_25)
    rotated = apply_rotary(q, *rotary)
    assert rotated.dtype == dtype
    assert torch.equal(rotated, apply_rotary(q.float(), *rotary).to(dtype))


@pytest.mark.parametrize("head_dim", [0, 2, 4, 5, 7, 65])
def test_a_head_that_is_too_small_or_odd_is_refused(head_dim):
    with pytest.raises(ValueError, match=f"head_dim of at least 6, found {head_dim}"):
        RotaryEmbedding3D(head_dim)


def test_there_are_no_parameters_and_no_buffers():
    rope = RotaryEmbedding3D(64)
    rope(GRID, FPS_25)
    assert not list(rope.parameters())
    assert not list(rope.buffers())


def test_the_gradient_is_rotated_back():
    x, upstream = random_qk(64)
    x.requires_grad_()
    cos, sin = RotaryEmbedding3D(64)(GRID, FPS_25)
    apply_rotary(x, cos, sin).backward(upstream)
    torch.testing.assert_close(x.grad, apply_rotary(upstream, cos, -sin))


def test_first_and_second_derivatives_agree_with_finite_differences():
    rotary = RotaryEmbedding3D(8)((2, 1, 1), torch.tensor([0.1]))
    x = torch.randn(1, 1, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def cubed(x):  # the rotation alone is linear: its second derivative is zero
        return apply_rotary(x, *rotary).pow(3)

    # The product is float32, so the step has to be large and the tolerance with it.
    assert gradcheck(cubed, x, eps=1e-2, atol=5e-3, rtol=5e-3)
    assert gradgradcheck(cubed, x, eps=1e-2, atol=5e-3, rtol=5e-3)


# Beyond the trained length ------------------------------------------------------------------------------------------

FREQUENCIES = 10_000.0 ** -(torch.arange(10) / 10)


@pytest.mark.parametrize("method", ROPE_SCALES)
def test_shorter_clips_keep_their_frequencies(method):
    for wanted in (1.0, 4.0):
        assert torch.equal(scale_frequencies(FREQUENCIES, method, 4.0, wanted), FREQUENCIES)


def test_linear_scaling_maps_longer_clips_to_the_trained_positions():
    rope, time_scale = RotaryEmbedding3D(64), torch.tensor([0.04])
    cos, _ = rope((4, 1, 1), time_scale)
    rope.scale = "linear", 4.0, 8.0
    longer, _ = rope((8, 1, 1), time_scale)
    torch.testing.assert_close(longer[:, :, ::2], cos)


def test_ntk_scaling_is_a_larger_theta_whose_lowest_frequency_is_that_of_linear_scaling():
    s, n = 3.0, 20
    theta = 10_000.0 * s ** (n / (n - 2))
    expected = theta ** -(torch.arange(10) / 10)
    scaled = scale_frequencies(FREQUENCIES, "ntk", 4.0, 12.0)
    torch.testing.assert_close(scaled, expected)
    assert scaled[0] == 1
    torch.testing.assert_close(scaled[-1], FREQUENCIES[-1] / s)


def test_riflex_lowers_only_the_frequency_with_a_period_closest_to_the_trained_length():
    trained, wanted = 16.0, 40.0  # periods: 6.3, 15.8, 39.6, ...
    scaled = scale_frequencies(FREQUENCIES, "riflex", trained, wanted)
    assert scaled[1] == pytest.approx(2 * math.pi / wanted)
    assert torch.equal(scaled[[0, 2, 3, 4, 5, 6, 7, 8, 9]], FREQUENCIES[[0, 2, 3, 4, 5, 6, 7, 8, 9]])
    slow = 2 * math.pi / torch.tensor([1.0, 100.0])  # already less than a period in the wanted length
    assert torch.equal(scale_frequencies(slow, "riflex", 60.0, 80.0), slow)


def test_only_the_time_axis_is_scaled():
    rope, time_scale = RotaryEmbedding3D(64), torch.tensor([0.04])
    before, _ = rope((1, 5, 5), time_scale)
    rope.scale = "linear", 1.0, 4.0
    assert torch.equal(rope((1, 5, 5), time_scale)[0], before)
