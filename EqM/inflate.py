"""Start a video model from an image model.

On a clip of one temporal patch with equal frames, the inflated model gives the image model's field
in each frame, at any frame rate. Noise differs between frames, so on noisy clips this is an
approximation.

- The kernel of the patch embedding is spread over the frames of a temporal patch, and its sum stays
  the same, as in I3D (arXiv 1705.07750).
- The output layer is repeated for each frame.
- The first temporal patch is at time 0, where rotary positions turn nothing. Height and width keep
  the image model's positions, rotary or a fixed table.
- The embedding of the frame rate starts as the image model's, for all frame rates. Training
  can change that.
"""

from dataclasses import replace

import torch

from models import number_features
from rope import REFERENCE_FPS, split_head


def inflate(
    weights,
    config,
    num_frames,
    temporal_patch_size=None,
    rope_theta=None,
    time_scale=1 / REFERENCE_FPS,
):
    """Return state dict and EqMConfig of a video model for num_frames, from an image model's.

    temporal_patch_size: frames per patch, default: the spatial size. rope_theta: base of the
    frequencies of time for a model with fixed positions; others keep their own. time_scale: seconds
    per frame in the image model's training. Raises ValueError if the model or num_frames don't fit
    rotary time or the temporal patch.
    """
    pt = temporal_patch_size or config.patch_size
    positions = {}
    if not config.use_rope:
        time_channels, _, _ = split_head(config.head_dim)
        positions = {
            "use_rope": True,
            "rope_theta": rope_theta or config.rope_theta,
            "rope_split": f"{time_channels},0,0",
            "position_table": "space",
        }
    config = replace(config, num_frames=num_frames, temporal_patch_size=pt, **positions)
    config.check_num_frames(num_frames)

    kernel = weights["x_embedder.proj.weight"].float()
    of_rate = weights["t_embedder.mlp.0.weight"].float()
    bias = weights["t_embedder.mlp.0.bias"].float()
    # of the image model's frame rate
    features = number_features(torch.log2(torch.tensor(REFERENCE_FPS * time_scale)))
    inflated = weights | {
        "x_embedder.proj.weight": kernel.expand(-1, -1, pt, -1, -1) / pt,  # (D, C, pt, p, p)
        "t_embedder.mlp.0.weight": torch.zeros_like(of_rate),
        "t_embedder.mlp.0.bias": bias + of_rate @ features,
    }
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        inflated[name] = torch.cat([weights[name]] * pt)  # (pt p q c, ...)
    return inflated, config
