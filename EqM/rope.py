"""3D rotary position embedding for the time, height and width of video tokens.

RoFormer (arXiv 2104.09864, section 3.4.2) rotates pairs of channels of q and k by angles
proportional to the position, so attention scores depend only on relative positions. Here a position
has three coordinates, and each coordinate rotates its own channels. No grid size is fixed: the same
weights work for any number of frames.

A score is then a sum of one term for each of the distances in time, height and width. Such a sum
cannot favor tokens whose distance in space grows with their distance in time, as for a moving
object. A `speed` lets positions in space move with time: of three channel pairs, one moves forwards
and one backwards.
"""

import re

import torch
from torch import nn

REFERENCE_FPS = 25  # adjacent temporal patches of a 25 fps clip are 1 apart


class RotaryEmbedding3D(nn.Module):
    """Rotation angles of the tokens of a (time, height, width) grid, without parameters or buffers.

    The channels of a head belong to time, height and width, in this order and as many as
    `split_head` returns. The remaining channels are not rotated (head_dim 64: 20 + 20 + 20 + 4).
    Pair j of an axis with n channels has frequency theta ** (-2j / n).

    With a speed, three pairs of height or width share a frequency, from the highest down. Their
    positions are index, index + speed * time and index - speed * time. Pairs that complete no
    triple do not move and take the next frequencies. A unit of time is one temporal patch at 25
    fps.

    Raises ValueError as `split_head` does, or if height and width have too few channels for a
    speed.
    """

    def __init__(self, head_dim, theta=10_000.0, split="", speed=0.0):
        super().__init__()
        self.head_dim = head_dim
        self.theta = theta
        self.speed = speed
        self.split = split_head(head_dim, split)
        if not 0 <= speed <= 1000:
            raise ValueError(f"rope_speed must be in [0, 1000], got {speed}")
        if speed and min(self.split[1:]) < 6:
            got = f"{self.split[1]} and {self.split[2]}"
            raise ValueError(
                f"rope_speed {speed} needs 6 channels of a head for height and for width, got {got}"
            )
        # Sampling divides times by this, to squeeze long clips into the trained span (arXiv
        # 2306.15595). What moves with time slows down as well.
        self.stretch = 1.0

    def forward(self, grid, time_scale, first=0):
        """Return cos and sin of the angles, both (B, 1, N, head_dim / 2) float32.

        grid: number of patches in (time, height, width), (T, H, W); N = T * H * W, width fastest.
        time_scale: (B,) seconds per frame. The position in time is patch index * 25 * time_scale;
        positions in height and width are patch indices. first: index of the first patch in time.
        """
        # Computed anew in each call: model.to(bfloat16) would convert a buffer, and bfloat16 lacks
        # integers above 256.
        B = len(time_scale)
        (T, H, W) = grid
        device = time_scale.device
        time, height, width = (torch.arange(n, device=device, dtype=torch.float32) for n in grid)
        per_patch = REFERENCE_FPS / self.stretch * time_scale.float()
        time = (first + time) * per_patch[:, None]  # (B, T)
        # (B, T, 1, 1, 1), beside height (H, 1, 1) and width (W, 1)
        time = time[:, :, None, None, None]
        angles = [time * self.pairs(0, device)[0]]  # (B, T, 1, 1, n/2)
        for axis, index in ((1, height[:, None, None]), (2, width[:, None])):
            frequencies, speeds = self.pairs(axis, device)
            angles.append((index + speeds * time) * frequencies)  # (B, T, H, 1 or W, n/2)
        angles.append(torch.zeros(self.head_dim // 2 - sum(self.split) // 2, device=device))
        angles = torch.cat([part.expand(B, T, H, W, -1) for part in angles], dim=-1)
        angles = angles.flatten(1, 3)[:, None]  # (B, 1, N, d/2)
        return angles.cos(), angles.sin()

    def pairs(self, axis, device):
        """Return the frequencies and the speeds of the channel pairs of an axis, (n/2,) each.

        Time (0) has no speed.
        """
        count = self.split[axis] // 2
        index = torch.arange(count, device=device)
        moving = count // 3 * 3 if axis and self.speed else 0
        exponents = torch.where(index < moving, index // 3, index - moving * 2 // 3)
        speeds = (
            self.speed * (index < moving) * ((index % 3 == 1).float() - (index % 3 == 2).float())
        )
        return self.theta ** -(exponents.float() / count), speeds


def split_head(head_dim, split=""):
    """Return a head's numbers of channels for (time, height, width), from a split like "16,8,8".

    "" means 2 * floor(head_dim / 6) each. Height and width may have none. Raises ValueError if
    head_dim is odd or below 6, or if the split is not three even numbers, the first above 0, whose
    sum is at most head_dim.
    """
    if head_dim < 6 or head_dim % 2:
        raise ValueError(f"use_rope needs an even head_dim of at least 6, got {head_dim}")
    if not split:
        return (2 * (head_dim // 6),) * 3
    match = re.fullmatch("([0-9]{1,6}),([0-9]{1,6}),([0-9]{1,6})", split)
    channels = tuple(map(int, match.groups())) if match else (0,)
    if not channels[0] or any(n % 2 for n in channels):
        raise ValueError(
            "rope_split must be three even numbers, the first above 0, such as 16,8,8, got "
            f"{split!r}"
        )
    if sum(channels) > head_dim:
        raise ValueError(
            f"rope_split {split} has {sum(channels)} channels, but head_dim is {head_dim}"
        )
    return channels


def apply_rotary(x, cos, sin):
    """Rotate the adjacent channel pairs (2j, 2j + 1) of queries or keys by their angles.

    x: (B, h, N, d); cos, sin: (B, 1, N, d/2) float32. Computed in float32 or better, returned in
    the dtype of x.
    """
    # (B, h, N, d/2, 2)
    precise = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    # no support for complex numbers, but these operations are fused
    if torch.compiler.is_compiling():
        a, b = precise.unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)
    # (B, h, N, d/2); one product is a single pass over memory
    pairs = torch.view_as_complex(precise)
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)
