"""3D rotary position embedding: time, height and width, by default with a third of each attention head.

RoFormer (arXiv 2104.09864, section 3.4.2) rotates pairs of channels of q and k by angles proportional to the position,
so attention scores depend on relative positions only. Here a position has three coordinates, and each rotates its own
channels. No grid size is fixed: the same weights work for any number of frames.
"""

import re

import torch
from torch import nn

REFERENCE_FPS = 25  # temporal positions of adjacent patches of a 25 fps clip differ by 1


class RotaryEmbedding3D(nn.Module):
    """Rotation angles of the tokens of a (time, height, width) grid; has no parameters and no buffers.

    The channels of a head are, in this order, those of time, height and width as in `split_head`, then the rest, which
    is not rotated (head_dim 64: 20 + 20 + 20 + 4). Pair j of an axis with n channels has frequency theta ** (-2j / n).
    """

    def __init__(self, head_dim, theta=10_000.0, split=""):
        """Raises ValueError as `split_head` does."""
        super().__init__()
        self.split = split_head(head_dim, split)
        self.head_dim = head_dim
        self.theta = theta
        # Divides the positions in time: position interpolation (arXiv 2306.15595), which squeezes longer clips into the
        # trained span. Set for sampling only.
        self.stretch = 1.0

    def forward(self, grid, time_scale):
        """Returns cos and sin of the angles, both (B, 1, N, head_dim / 2) float32.

        grid: number of patches in (time, height, width), (T, H, W); N = T * H * W, width fastest.
        time_scale: (B,) seconds per frame. The position in time is patch index * 25 * time_scale; positions in height
        and width are patch indices.
        """
        device = time_scale.device
        # Recomputed in float32 in each call (a few hundred values): a buffer would follow model.to(bfloat16), which
        # can't represent all integers above 256.
        exponents = [torch.arange(n // 2, device=device, dtype=torch.float32) / (n // 2) for n in self.split]
        frequencies = [self.theta**-part for part in exponents]  # of time, height and width
        frequencies[0] = frequencies[0] / self.stretch
        positions = [torch.arange(n, device=device, dtype=torch.float32)[:, None] for n in grid]
        time, height, width = (position * part for position, part in zip(positions, frequencies, strict=True))
        time = time * (REFERENCE_FPS * time_scale.float())[:, None, None]  # (B, T, n/2)

        B, (T, H, W) = len(time_scale), grid
        rest = torch.zeros(self.head_dim // 2 - sum(self.split) // 2, device=device)
        axes = time[:, :, None, None], height[None, None, :, None], width[None, None, None], rest
        angles = torch.cat([axis.expand(B, T, H, W, -1) for axis in axes], dim=-1)
        angles = angles.flatten(1, 3)[:, None]  # (B, 1, N, d/2)
        return angles.cos(), angles.sin()


def split_head(head_dim, split=""):
    """The number of channels of a head for (time, height, width), from a split such as "16,8,8".

    "" = 2 * floor(head_dim / 6) each. Raises ValueError if head_dim is odd or below 6, or if the split is not three
    even numbers above 0 whose sum is at most head_dim.
    """
    if head_dim < 6 or head_dim % 2:
        raise ValueError(f"use_rope needs an even head_dim of at least 6, found {head_dim}")
    if not split:
        return (2 * (head_dim // 6),) * 3
    channels = tuple(int(word) for word in split.split(",") if re.fullmatch("[0-9]{1,6}", word))
    if len(channels) != 3 or split.count(",") != 2 or not all(channels) or any(n % 2 for n in channels):
        raise ValueError(f"rope_split must be three even numbers above 0, such as 16,8,8, found {split!r}")
    if sum(channels) > head_dim:
        raise ValueError(f"rope_split {split} has {sum(channels)} channels, but head_dim is {head_dim}")
    return channels


def apply_rotary(x, cos, sin):
    """Rotate the adjacent channel pairs (2j, 2j + 1) of queries or keys by their angles.

    x: (B, h, N, d); cos, sin: (B, 1, N, d/2) float32. Computed in float32 or better, returned in the dtype of x. One
    complex multiplication is a single pass over memory, forward and backward.
    """
    precise = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))  # (B, h, N, d/2, 2)
    if torch.compiler.is_compiling():  # does not support complex numbers, but fuses these operations
        a, b = precise.unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)
    pairs = torch.view_as_complex(precise)  # (B, h, N, d/2)
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)
