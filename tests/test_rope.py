"""Rotary positions against complex numbers, their invariances, and clips beyond the trained length."""

import cmath
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import generation
from models import EqM, model_config
from rope import RotaryEmbedding3D, apply_rotary
from runtime import cli

FPS_25 = torch.tensor([1 / 25])
GRID = (3, 4, 5)


def naive_rotation(x, grid, time_scale, channels, theta, speed=0.0):
    """Rotate x (B, h, N, d) pair by pair with complex numbers; channels: those of (time, height, width)."""
    out = x.double().clone()
    T, H, W = grid
    for b, seconds in enumerate(time_scale.tolist()):
        for n, (t, h, w) in enumerate((t, h, w) for t in range(T) for h in range(H) for w in range(W)):
            time = t * seconds * 25
            for axis, position in enumerate((time, h, w)):
                pairs = channels[axis] // 2
                for j in range(pairs):
                    exponent, place = j, position
                    if axis > 0 and speed and j < pairs - pairs % 3:  # three of one frequency
                        exponent, place = j // 3, position + (0, speed, -speed)[j % 3] * time
                    elif axis > 0 and speed:  # those that are left stand still
                        exponent = pairs // 3 + j - (pairs - pairs % 3)
                    turn = cmath.exp(1j * place * theta ** (-2 * exponent / channels[axis]))
                    first = sum(channels[:axis]) + 2 * j
                    for head in range(x.shape[1]):
                        z = complex(*out[b, head, n, first : first + 2].tolist()) * turn
                        out[b, head, n, first], out[b, head, n, first + 1] = z.real, z.imag
    return out


def random_qk(head_dim):
    return torch.randn(2, 1, 2, 3 * 4 * 5, head_dim, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("stretch", "speed"), [(1.0, 0.0), (2.5, 0.0), (1.0, 0.5), (2.5, 2.0)])
@pytest.mark.parametrize(
    ("head_dim", "split", "channels"),
    [
        (64, "", (20, 20, 20)), (72, "", (24, 24, 24)), (6, "", (2, 2, 2)), (10, "", (2, 2, 2)),
        (32, "16,8,8", (16, 8, 8)), (32, "2,14,4", (2, 14, 4)),
    ],
)  # fmt: skip
def test_pairs_rotate_as_complex_numbers_the_first_patch_and_the_rest_do_not(
    head_dim, split, channels, stretch, speed
):
    time_scale, grid, theta = torch.tensor([1 / 25, 0.1]), (2, 2, 3), 100.0
    x = torch.randn(2, 1, 12, head_dim)
    speed = speed if min(channels[1:]) >= 6 else 0.0
    rope = RotaryEmbedding3D(head_dim, theta, split, speed)
    rope.stretch = stretch  # divides the positions in time, and only those
    rotated = apply_rotary(x, *rope(grid, time_scale))
    wanted = naive_rotation(x, grid, time_scale / stretch, channels, theta, speed)
    torch.testing.assert_close(rotated.double(), wanted, atol=1e-5, rtol=0)
    assert torch.equal(rotated[:, :, 0], x[:, :, 0])
    assert torch.equal(rotated[..., sum(channels) :], x[..., sum(channels) :])


def test_theta_is_10000_unless_told_otherwise():
    x, _ = random_qk(10)
    rotated = apply_rotary(x, *RotaryEmbedding3D(10, split="4,4,2")(GRID, FPS_25))
    torch.testing.assert_close(rotated.double(), naive_rotation(x, GRID, FPS_25, (4, 4, 2), 1e4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("split", ["16,8", "8,8,8,2", "16,8,7", "16,16,0", "-2,8,8", "16;8;8", "8,8,8,", "x", "9,9,9"])
def test_a_split_that_does_not_fit_the_head_is_refused(split):
    with pytest.raises(ValueError, match=f"rope_split .*{split}"):
        RotaryEmbedding3D(32, 100.0, split)


@pytest.mark.parametrize(("speed", "split"), [(-0.1, ""), (float("nan"), ""), (0.5, "16,12,4"), (0.5, "20,4,8")])
def test_a_speed_that_is_none_or_that_has_too_few_channels_is_refused(speed, split):
    with pytest.raises(ValueError, match="^rope_speed"):
        RotaryEmbedding3D(32, 100.0, split, speed)


@pytest.mark.parametrize("head_dim", [0, 4, 5, 65])
def test_a_head_that_is_too_small_or_odd_is_refused(head_dim):
    with pytest.raises(ValueError, match=f"head_dim of at least 6, found {head_dim}"):
        RotaryEmbedding3D(head_dim)


@pytest.mark.parametrize("speed", [0.0, 0.5])
def test_scores_depend_on_relative_positions_only_and_distinguish_before_from_after(speed):
    rotary = RotaryEmbedding3D(64, speed=speed)((6, 6, 6), FPS_25)
    q, k = random_qk(64)[:, :, :1, :1].expand(-1, -1, -1, 216, -1)  # the same content at every position
    scores = apply_rotary(q, *rotary) @ apply_rotary(k, *rotary).mT
    table = scores.reshape(6, 6, 6, 6, 6, 6)  # of query (t, h, w) and key (t, h, w)
    near, far = table[:4, :4, :4, :4, :4, :4], table[2:, 1:5, 2:, 2:, 1:5, 2:]
    torch.testing.assert_close(near, far, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(near, table[:4, :4, :4, 1:5, :4, :4], atol=1e-2)  # other relative positions
    assert (table[1, 0, 0, 3, 0, 0] - table[3, 0, 0, 1, 0, 0]).abs() > 0.01


def favoured_steps(rope, query, key):
    """For each later patch in time: how many patches to the right the key is that a query at (0, 0, 4) favours."""
    cos, sin = rope((4, 1, 12), FPS_25)
    q, k = (apply_rotary(content.expand(1, 1, 48, -1), cos, sin) for content in (query, key))
    scores = (q @ k.mT).unflatten(3, (4, 12))[0, 0, 4]  # (T, W)
    return (scores.argmax(dim=1) - 4).tolist()


@pytest.mark.parametrize(("pair", "steps"), [(0, [0, 0, 0, 0]), (1, [0, -1, -2, -3]), (2, [0, 1, 2, 3])])
def test_with_a_speed_the_scores_of_one_layer_follow_what_moves(pair, steps):
    content = torch.zeros(24)
    content[16 + 2 * pair] = 1.0  # in that pair of the width
    assert favoured_steps(RotaryEmbedding3D(24, speed=1.0), content, content) == steps


def test_without_a_speed_the_scores_of_one_layer_favour_the_same_step_at_any_distance_in_time():
    found = set()
    for seed in range(20):
        contents = torch.randn(2, 24, generator=torch.Generator().manual_seed(seed))
        steps = favoured_steps(RotaryEmbedding3D(24), *contents)
        assert len(set(steps)) == 1  # a score is a sum over the axes
        found |= set(steps)
    assert len(found) > 3  # not always the token itself


@pytest.mark.parametrize("speed", [0.0, 0.5])
def test_twice_the_time_scale_is_twice_the_time_position(speed):
    rope = RotaryEmbedding3D(64, speed=speed)
    angles = torch.stack(rope((9, 2, 2), FPS_25)).unflatten(3, (9, 2, 2))
    assert torch.equal(torch.stack(rope((5, 2, 2), 2 * FPS_25)).unflatten(3, (5, 2, 2)), angles[:, :, :, ::2])


@pytest.mark.parametrize("speed", [0.0, 0.5])
def test_a_longer_clip_begins_with_the_angles_of_a_shorter_one(speed):
    rope = RotaryEmbedding3D(64, speed=speed)
    short, long = (torch.stack(rope((frames, 3, 3), FPS_25)) for frames in (2, 8))
    assert torch.equal(short, long[:, :, :, : short.shape[3]])


def test_angles_stay_float32_in_a_module_of_low_precision_and_under_autocast():
    rope, grid, time_scale = RotaryEmbedding3D(64), (1000, 1, 1), torch.tensor([0.033])
    x = torch.randn(1, 1, 1000, 64)
    expected = torch.stack(rope(grid, time_scale))
    exact = (25 * 0.033 * torch.arange(1000, dtype=torch.float64)).cos()  # of frequency 1
    torch.testing.assert_close(expected[0, 0, 0, :, 0].double(), exact, atol=2e-4, rtol=0)
    rotated = apply_rotary(x, *expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.stack(rope(grid, time_scale)), expected)
        assert torch.equal(apply_rotary(x, *expected), rotated)
    found = torch.stack(rope.to(torch.bfloat16)(grid, time_scale))
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_result_has_the_dtype_of_the_queries_and_is_rounded_once(dtype):
    q = random_qk(64)[0].to(dtype)
    rotary = RotaryEmbedding3D(64)(GRID, FPS_25)
    rotated = apply_rotary(q, *rotary)
    assert rotated.dtype == dtype
    assert torch.equal(rotated, apply_rotary(q.float(), *rotary).to(dtype))


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


@pytest.mark.parametrize(
    ("method", "num_frames", "time_scale", "positions"),
    [
        ("linear", 16, 1 / 25, [0, 0.5, 1, 1.5]),  # twice the trained length
        ("linear", 8, 2 / 25, [0, 1]),  # the same in seconds
        ("linear", 12, 1 / 50, [0, 0.5, 1]),  # shorter than in training: nothing to squeeze
        ("none", 16, 1 / 25, [0, 1, 2, 3]),
    ],
)
def test_linear_scaling_squeezes_longer_clips_into_the_trained_span(method, num_frames, time_scale, positions):
    config = model_config("EqM-Ti/4", input_size=8, in_channels=3, depth=1, use_rope=True, num_frames=8)
    model = EqM(config)  # trained on positions 0 and 1, of patches of 4 frames
    data, args = {"fps": 25.0, "frame_interval": [1]}, SimpleNamespace(rope_scale=method, ckpt="x.pt")
    generation.scale_rope(args, model, data, 8, num_frames, time_scale)
    cos, sin = model.rope(config.grid(num_frames), torch.tensor([time_scale]))
    angles = torch.atan2(sin, cos).unflatten(2, config.grid(num_frames))[0, 0, :, 0, 0]
    torch.testing.assert_close(angles[:, 0], torch.tensor(positions, dtype=torch.float32))  # of frequency 1


@pytest.mark.parametrize("method", ["ntk", "riflex"])
def test_a_scaling_of_earlier_versions_is_refused_and_says_why(method, capsys):
    parser = cli.ArgumentParser()
    generation.add_sample_flags(parser.add_argument, num_samples=1)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--rope-scale", method])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--rope-scale: {method}: removed, because" in line
