"""The network: a DiT (arXiv 2212.09748) with 3D patches, which predicts the field f of noisy clips.

It trains on clips of 4 frames, continues on 8 and on 16, and samples any number. With `use_rope`,
attention rotates queries and keys by angles that it computes from the clip's grid (rope.py), so one
checkpoint fits all lengths; the default, a fixed sinusoidal table, fits one. The network is not
told the noise level gamma, unless its objective says so. With `ebm`, the field is minus the
gradient of a scalar energy (EqM-E). Parameters have the names of the published image models.
"""

import logging
import math
import re
import warnings
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from causal import attention_masks, clean_patches_of, count_pairs
from rope import REFERENCE_FPS, RotaryEmbedding3D, apply_rotary
from runtime.cli import COUNT, NON_NEGATIVE, POSITIVE, UserError, flag_text
from transport import OBJECTIVES

EBMS = ("none", "dot", "l2")
POSITION_TABLES = ("none", "space")
# recompute all of a block, or all but what `keep_expensive` keeps
GRAD_CHECKPOINTS = "full", "selective"
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
PLAIN_TOKENS = 512  # see attend
# where compiled causal models use FlexAttention; it has no backward pass on CPUs
FLEX_DEVICES = ["cuda"]
FEATURES = 256  # sinusoidal features of a number, see NumberEmbedder
# a hundred times EqM-XL; more is a typing error
LARGEST_COUNT = 2**20
MOST_WEIGHTS = 2**36


@dataclass(frozen=True)
class EqMConfig:
    """Everything that determines the parameters of a network and their meaning.

    Raises ValueError if inconsistent.
    """

    input_size: int  # height and width of the latents, or without a VAE of the pixels
    patch_size: int
    temporal_patch_size: int
    in_channels: int
    hidden_size: int
    depth: int
    num_heads: int
    num_classes: int
    num_frames: int = 1  # of the fixed positions; with use_rope only a record of the training
    use_rope: bool = False
    rope_theta: float = 10_000.0
    # channels of a head for time, height and width, such as "16,8,8"; "" = a third each
    rope_split: str = ""
    # patches per unit of time by which positions of height and width move (rope.py)
    rope_speed: float = 0.0
    # with use_rope: "space" adds the fixed positions of height and width to the tokens
    position_table: str = "none"
    qk_norm: bool = False
    # "dot" or "l2": the field is the negative gradient of this energy (see EqM.energy)
    ebm: str = "none"
    # probability that training replaces a label by the null label, num_classes
    class_dropout_prob: float = 0.1
    objective: str = "eqm"  # what the field is: a name in transport.OBJECTIVES
    causal: bool = False  # a temporal patch sees only earlier ones, see causal.py
    context: int | None = None  # and so many frames of them, if causal
    # names of the actions of the frames, such as "stay,left,right"; "" = without actions
    actions: str = ""

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and not 1 <= value <= LARGEST_COUNT:
                raise ValueError(f"{field.name} must be from 1 to {LARGEST_COUNT}, got {value}")
        if self.input_size % self.patch_size:
            raise ValueError(
                f"input_size {self.input_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size must be a multiple of 2 x {self.num_heads} heads, got "
                f"{self.hidden_size}"
            )
        if 18 * self.depth * self.hidden_size**2 > MOST_WEIGHTS:
            raise ValueError(
                f"depth {self.depth}, hidden_size {self.hidden_size} need over {MOST_WEIGHTS} "
                "weights"
            )
        allowed = {"position_table": POSITION_TABLES, "ebm": EBMS, "objective": OBJECTIVES}
        for name, choices in allowed.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if self.ebm != "none" and not self.learns.has_equilibria:
            raise ValueError(f"ebm {self.ebm} needs objective eqm, got {self.objective}")
        if self.causal:
            if not self.use_rope or self.ebm != "none":
                raise ValueError("causal needs use_rope, and no ebm")
            if self.context is None or self.context < self.temporal_patch_size:
                raise ValueError(
                    f"context must be at least a temporal patch of {self.temporal_patch_size} "
                    f"frames, got {self.context}"
                )
        if self.actions and self.temporal_patch_size != 1:
            raise ValueError(
                f"actions belong to frames: temporal_patch_size must be 1, got "
                f"{self.temporal_patch_size}"
            )
        if self.use_rope:
            if not all(self.rotary_embedding().split) and not self.has_table:
                raise ValueError(
                    f"rope_split {self.rope_split} omits height or width; it needs position_table "
                    "space"
                )
            return
        self.check_num_frames(self.num_frames)
        for name in ("rope_theta", "rope_split", "rope_speed", "position_table"):
            value = getattr(self, name)
            if value != getattr(EqMConfig, name):
                raise ValueError(f"{name} {value} needs use_rope: without it positions are fixed")

    @property
    def learns(self):
        """The transport.Objective whose name is `objective`."""
        return OBJECTIVES[self.objective]

    @property
    def name(self):
        """The name of the model, see `model_name`."""
        return model_name(**asdict(self))

    @property
    def head_dim(self):
        return self.hidden_size // self.num_heads

    @property
    def action_names(self):
        return self.actions.split(",") if self.actions else []

    @property
    def has_table(self):
        """Whether a position table is added to the tokens."""
        return not self.use_rope or self.position_table == "space"

    @property
    def positions(self):
        """The kind of positions in words, for messages."""
        if not self.use_rope:
            return "fixed positions"
        speed = f" of speed {self.rope_speed:g}" if self.rope_speed else ""
        table = " and a table of space" if self.has_table else ""
        return f"rotary positions{speed}{table}"

    @property
    def level_frames(self):
        """The number of adjacent frames with the same noise level: a temporal patch if the model is
        told one level, or is causal.
        """
        return self.temporal_patch_size if self.learns.is_told or self.causal else 1

    @property
    def context_patches(self):
        """The number of earlier temporal patches that a patch sees, if causal."""
        return self.context // self.temporal_patch_size

    def whole_levels(self, num_frames):
        """Round a number of frames down to a multiple of `level_frames`, at least to one."""
        return max(num_frames // self.level_frames, 1) * self.level_frames

    @property
    def values_per_token(self):
        """The number of input values in the patch of a token."""
        return self.temporal_patch_size * self.patch_size**2 * self.in_channels

    def warn_if_narrow(self):
        """Warn if tokens hold more values than the width of the network."""
        if self.values_per_token > self.hidden_size:
            warnings.warn(
                f"a token holds {self.values_per_token} values and hidden_size is only "
                f"{self.hidden_size}, too small to predict them all; use smaller patches",
                stacklevel=2,
            )

    def rotary_embedding(self):
        return RotaryEmbedding3D(
            head_dim=self.head_dim,
            theta=self.rope_theta,
            split=self.rope_split,
            speed=self.rope_speed,
        )

    def check_num_frames(self, num_frames):
        """Raise ValueError unless a clip of num_frames fits temporal patch and fixed positions."""
        if num_frames < self.temporal_patch_size:
            raise ValueError(
                f"a temporal patch needs at least {self.temporal_patch_size} frames, got "
                f"{num_frames}"
            )
        if not self.use_rope and num_frames != self.num_frames:
            raise ValueError(
                f"fixed positions are tied to num_frames {self.num_frames}, got {num_frames}; use "
                f"{self.num_frames}, or train with --use-rope"
            )
        tokens = self.num_tokens(num_frames)
        if tokens > LARGEST_COUNT:
            raise ValueError(
                f"{tokens} tokens per clip, more than {LARGEST_COUNT}; use smaller or shorter clips"
            )

    def grid(self, num_frames):
        """Return the number of patches of a clip in (time, height, width).

        The last temporal patch may be padded.
        """
        time = math.ceil(num_frames / self.temporal_patch_size)
        side = self.input_size // self.patch_size
        return time, side, side

    def num_tokens(self, num_frames):
        """Return the number of tokens of a clip."""
        return math.prod(self.grid(num_frames))

    def flops(self, num_frames):
        """Count the FLOPs of a forward pass of one clip, 2 per multiply-add.

        Only matrix products and attention count. The blocks of a causal model also pass clean
        patches, and its attention counts the pairs of tokens that see each other.
        """
        time, _, _ = self.grid(num_frames)
        pairs = time**2
        if self.causal:
            pairs = count_pairs(time, self.context_patches)
        return self.pass_flops(time, pairs, clean=self.clean_patches(num_frames))

    def clean_patches(self, num_frames):
        """The number of clean temporal patches in training, beside the noisy ones of a clip."""
        time, _, _ = self.grid(num_frames)
        return clean_patches_of(time) if self.causal else 0

    def stream_flops(self, num_frames, evaluations):
        """Count the FLOPs of sampling a clip by a Stream, with so many evaluations per temporal
        patch. One more pass of each patch fills the cache.
        """
        time, _, _ = self.grid(num_frames)
        seen = [min(patch, self.context_patches) + 1 for patch in range(time)]
        return (evaluations + 1) * sum(self.pass_flops(1, pairs, clean=0) for pairs in seen)

    def pass_flops(self, time, pairs, clean):
        """Count the FLOPs of a pass of so many temporal patches, of which `pairs` see each other,
        after so many clean ones that give no output.
        """
        tokens = self.num_tokens(self.temporal_patch_size)  # of a patch
        N = time * tokens
        both = N + clean * tokens
        D = self.hidden_size
        number_embedder = 2 * (FEATURES * D + D * D)
        ends = 2 * (both + N) * D * self.values_per_token  # patches in and out
        linear_maps = 2 * both * D * (3 + 1 + 4 + 4) * D
        attention = 2 * pairs * tokens**2 * D * 2
        ada_ln = 2 * D * 6 * self.depth * D
        last_ada_ln = 2 * D * 2 * D
        flops = number_embedder + ends + self.depth * (linear_maps + attention)
        if self.learns.is_told:
            flops += (time + clean) * number_embedder
        if self.learns.is_told or self.actions:  # a condition for each temporal patch
            return flops + (time + clean) * ada_ln + time * last_ada_ln
        return flops + ada_ln + last_ada_ln

    def training_flops(self, num_frames, grad_checkpoint=None, own_context=0.0):
        """Count the FLOPs of a training step of one clip.

        Backward is twice forward, and an energy doubles both. An own context (--own-context) takes
        one more forward pass.
        """
        forward = self.flops(num_frames)
        if self.ebm != "none":
            return 6 * forward
        time, height, width = self.grid(num_frames)
        tokens = (time + self.clean_patches(num_frames)) * height * width
        fc1 = 8 * tokens * self.hidden_size**2
        recomputed = {None: 0, "full": forward, "selective": self.depth * fc1}
        return (3 + (own_context > 0)) * forward + recomputed[grad_checkpoint]


@dataclass(frozen=True)
class Condition:
    """The condition of a batch of samples: their classes and, if the model has them, actions.

    Only this module, the data and the flags look inside. y is the input of `EqM.forward`, which a
    ClassEmbedder embeds: classes (B,) int64, or (B, 1 + T) with the class and the actions of T
    frames. null_y, () or (1 + T,), is a row of y that means "no condition".
    """

    y: torch.Tensor
    null_y: torch.Tensor

    @classmethod
    def of(cls, y, config):
        """Return the condition of samples with these classes and actions, (B,) or (B, 1 + T) int64.

        Negative numbers mean no class, and unknown actions.
        """
        null_y = torch.full_like(y[0], len(config.action_names))
        null_y.view(-1)[0] = config.num_classes
        return cls(torch.where(y < 0, null_y, y), null_y)

    def to(self, device):
        y = self.y.to(device, non_blocking=True)
        return replace(self, y=y, null_y=self.null_y.to(device, non_blocking=True))

    def null(self, mask=True):
        """Return this condition, removed from the samples where mask (B,) is true."""
        mask = torch.as_tensor(mask, device=self.y.device)
        if self.y.dim() == 2:
            mask = mask.reshape(-1, 1)
        return replace(self, y=torch.where(mask, self.null_y, self.y))

    def randomized(self, config, generators):
        """Return this condition with random actions of all frames but the first, or None if the
        model has no actions. generators: a CPU generator per sample.
        """
        if not config.actions:
            return None
        count = len(config.action_names)
        y = self.y.clone()
        for row, generator in zip(y, generators, strict=True):
            actions = row[2:]  # after the class and the action of the first frame
            actions.copy_(torch.randint(count, actions.shape, generator=generator))
        return replace(self, y=y)

    def is_null(self):
        """Return whether no sample has a condition."""
        return bool((self.y == self.null_y).all())


class PatchEmbed(nn.Module):
    """Linear embedding of the non-overlapping patches of a clip."""

    def __init__(self, config):
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        # A convolution only for its parameters, as in published models: a matrix product is faster.
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel, stride=kernel)

    def forward(self, x):
        pt, p, _ = self.proj.kernel_size
        # (B, N, C*pt*p*p)
        x = rearrange(x, "b c (t pt) (h p) (w q) -> b (t h w) (c pt p q)", pt=pt, p=p, q=p)
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)  # (B, N, D)


def number_features(number):
    """Return the sinusoidal features (..., FEATURES) of numbers (...), cosines first."""
    half = FEATURES // 2
    exponents = torch.arange(half, device=number.device).float() / half
    angles = number[..., None] * 10_000.0**-exponents
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class NumberEmbedder(nn.Module):
    """Embed a number of each sample, as DiT embeds the noise level: (B, ...) -> (B, ..., D)."""

    def __init__(self, D):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FEATURES, D), nn.SiLU(), nn.Linear(D, D))

    def forward(self, number):
        features = number_features(number)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class SkipNormalInit(TorchFunctionMode):
    """Leaves tensors as they are that modules fill with normally distributed values."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return kwargs["tensor"] if function is nn.init.normal_ else function(*args, **kwargs)


def shapes_of(config):
    """Return {name: shape} of the weights of a network, without memory for it."""
    # to draw normal values for a meta tensor, torch 2.13 loads its compiler, which takes seconds
    with torch.device("meta"), SkipNormalInit():
        network = EqM(config)
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


class ClassEmbedder(nn.Module):
    """Embed the condition y of each sample.

    Classes (B,) int64 -> (B, 1, D). With the actions of T frames, (B, 1 + T) -> (B, T, D): the sum
    of the class and the action of each frame.
    """

    def __init__(self, config):
        super().__init__()
        # the last row of a table is for no class, and for unknown actions
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.hidden_size)
        self.action_table = None
        if config.actions:
            self.action_table = nn.Embedding(len(config.action_names) + 1, config.hidden_size)

    def forward(self, y):
        if self.action_table is None:
            return self.embedding_table(y)[:, None]
        return self.embedding_table(y[:, :1]) + self.action_table(y[:, 1:])


class HeadNorm(nn.RMSNorm):
    """RMSNorm in the dtype of its input.

    With weights of another dtype, as under autocast, torch is slow.
    """

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def attend(q, k, v, mask=None):
    """Scaled dot-product attention of (B, h, N, d) each.

    mask: bool (N of q, N of k), true where a query sees a key; None: everywhere.
    """
    if q.device.type != "cpu" or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, mask)
    # Training on a CPU avoids torch's slow bf16 kernel: for 16 clips of 128 tokens and 4 heads of
    # 32 channels, forward and backward take 15 ms there, 7 ms in float32, 4 ms with plain products,
    # which hold N^2 weights (Xeon with AMX, one thread, torch 2.13). The softmax computes in
    # float32 inside. Float32 weights would not make gradients more accurate, as the products round.
    is_short = q.shape[2] <= PLAIN_TOKENS and k.shape[2] <= 2 * PLAIN_TOKENS
    if q.dtype == torch.bfloat16 and is_short:
        scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, h, N, N)
        if mask is not None:
            # to add is faster than to fill, whose gradient is filled, too
            scores = scores + torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
        return scores.softmax(dim=-1) @ v
    with torch.autocast("cpu", enabled=False):
        precise = torch.promote_types(q.dtype, torch.float32)
        x = F.scaled_dot_product_attention(q.to(precise), k.to(precise), v.to(precise), mask)
        return x.to(v.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D)
        norm = partial(HeadNorm, config.head_dim, eps=1e-6) if config.qk_norm else nn.Identity
        self.q_norm = norm()
        self.k_norm = norm()

    def forward(self, x, rotary=None, masks=None, cache=None):
        """Attend from tokens x (B, N, D).

        masks: the Masks, if x is [clean | noisy]. cache: a BlockCache, whose tokens come
        before those of x.
        """
        q, k, v = rearrange(
            self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads
        )
        q = self.q_norm(q)
        k = self.k_norm(k)
        unrotated = k
        if rotary is not None:
            q = apply_rotary(q, *rotary)
            k = apply_rotary(k, *rotary)
        if cache is not None:
            k, v = cache.extend(k, v, unrotated)
        if masks is None:
            x = attend(q, k, v)  # (B, h, N, d)
        elif masks.blocks is not None and torch.compiler.is_compiling():
            x = flex_attention(q, k, v, block_mask=masks.blocks)
        else:
            parts = [
                attend(q[:, :, part.tokens], part.seen_of(k), part.seen_of(v), part.mask)
                for part in masks.parts
            ]
            x = torch.cat(parts, dim=2)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


def modulate(x, shift, scale):
    """Scale and shift tokens x (B, N, D) by (B, K, D): a row applies to N / K adjacent tokens."""
    x = x.unflatten(1, (shift.shape[1], -1))  # (B, K, N / K, D)
    return torch.addcmul(shift[:, :, None], x, 1 + scale[:, :, None]).flatten(1, 2)


def add_gated(x, gate, branch):
    """Add a branch (B, N, D) to tokens x, times a gate (B, K, D) as in `modulate`."""
    rows = (gate.shape[1], -1)
    x = x.unflatten(1, rows)  # (B, K, N / K, D)
    branch = branch.unflatten(1, rows)
    return torch.addcmul(x, gate[:, :, None], branch).flatten(1, 2)


def keep_expensive(context, operation, *args, **_):
    """Policy of selective checkpointing: keep fused attention, and products at most three times as
    wide as their input.

    fc1, whose output takes the most memory (4 N D values), and adaLN_modulation, which is cheap,
    are computed again. So are the scores of the plain attention of CPUs if they are wide, see
    `attend`.
    """
    if operation in PRODUCTS:
        inner, outer = args[-1].shape[-2:]
        keep = outer <= 3 * inner
    else:
        # each kind of device has its own kernels
        keep = re.search("scaled_dot_product|flex_attention", operation.name()) is not None
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


KEEP_EXPENSIVE = partial(create_selective_checkpoint_contexts, keep_expensive)


class Block(nn.Module):
    """Attention and MLP with adaLN-Zero: the condition sets shift, scale and gate of each branch.

    It is (B, 1, D), or (B, K, D) for K temporal patches that have their own noise levels or
    actions.
    """

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.norm1 = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        layers = {"fc1": nn.Linear(D, 4 * D), "gelu": nn.GELU("tanh"), "fc2": nn.Linear(4 * D, D)}
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))

    def forward(self, x, condition, rotary=None, masks=None, selective=False, cache=None):
        if selective:  # inside the block, so that torch.compile sees what to keep
            return checkpoint(
                self.forward,
                x,
                condition,
                rotary,
                masks,
                context_fn=KEEP_EXPENSIVE,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(
            6, dim=-1
        )
        branch = self.attn(modulate(self.norm1(x), shift1, scale1), rotary, masks, cache)
        x = add_gated(x, gate1, branch)
        return add_gated(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))


class FinalLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.norm_final = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(D, config.values_per_token)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))

    def forward(self, x, condition):
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class EqM(nn.Module):
    """The network, which predicts the field f(x) of clips x from their class and time scale.

    It is told their noise level only if its objective says so.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.is_compiled = False
        self.grad_checkpoint = None  # or one of GRAD_CHECKPOINTS
        self.masks = {}  # see masks_of
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = NumberEmbedder(config.hidden_size)
        self.y_embedder = ClassEmbedder(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.gamma_embedder = NumberEmbedder(config.hidden_size) if config.learns.is_told else None
        if config.use_rope:
            self.rope = config.rotary_embedding()
        if config.has_table:
            self.register_buffer("pos_embed", position_table(config), persistent=False)
        if not self.x_embedder.proj.weight.is_meta:
            self.initialize_weights()

    def initialize_weights(self):
        """Initialize as DiT: Xavier for linear layers, zero for adaLN and the output layer, so f is
        zero at first.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, HeadNorm):
                nn.init.ones_(module.weight)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for embedder in filter(None, (self.y_embedder, self.t_embedder, self.gamma_embedder)):
            for parameter in embedder.parameters():
                if parameter.dim() == 2:  # not a bias
                    nn.init.normal_(parameter, std=0.02)
        for layer in (*self.blocks, self.final_layer):
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        # The square of a zero output has a zero gradient, so the model would never learn.
        init_output = nn.init.xavier_uniform_ if self.config.ebm == "l2" else nn.init.zeros_
        init_output(self.final_layer.linear.weight)

    def forward(
        self, x, y, time_scale=None, return_features=False, gamma=None, clean=None, cache=None
    ):
        """Return the field f, and with return_features also the last block's activations (B, N, D).

        x, f: (B, C, T, H, W); images have T = 1. y: (B,) int64, num_classes = no label; with
        actions (B, 1 + T), see Condition. time_scale: (B,) float32 seconds per frame, default 1/25.
        gamma: (B,) or (B, T), the same within a temporal patch, the noise levels; only if the
        objective is told them. If T does not fill the last temporal patch, x is padded with its
        last frame and f is cropped. With `ebm`, f is minus the gradient of the energy in x, also
        under torch.no_grad. Raises ValueError as `EqMConfig.check_num_frames` does.

        A causal model needs the clip without noise, `clean` like x, or a causal.Cache of the
        patches before x, which is then one temporal patch.
        """
        if self.config.ebm == "none":
            f, features = self.predict(x, y, time_scale, gamma, clean, cache)
        else:
            training = torch.is_grad_enabled()
            # only torch's math attention has a second derivative
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH) if training else nullcontext():
                x = x if x.requires_grad else x.detach().requires_grad_()
                energy, features = self.energy(x, y, time_scale, return_features=True)
                (f,) = torch.autograd.grad(-energy.sum(), x, create_graph=training)
            features = features if training else features.detach()
        return (f, features) if return_features else f

    def energy(self, x, y, time_scale=None, return_features=False):
        """Return the energy E (B,) of the field f = -dE/dx; arguments as in `forward`.

        With the network's output g, "dot" is -sum(g * x) and "l2" is sum(g^2) / 2: EqM-E of arXiv
        2510.02300, with the sign of the published code. Raises ValueError if ebm is "none".
        """
        if self.config.ebm == "none":
            raise ValueError("the model has no energy: it was made with ebm='none'")
        g, features = self.predict(x, y, time_scale)
        g = g.to(x.dtype)  # sums over a whole clip need more than bf16
        terms = -g * x if self.config.ebm == "dot" else g.square() / 2
        energy = terms.flatten(1).sum(dim=1)
        return (energy, features) if return_features else energy

    def predict(self, x, y, time_scale, gamma=None, clean=None, cache=None):
        """Return the output (B, C, T, H, W) and the last block's activations (B, N, D)."""
        config = self.config
        T = x.shape[2]
        config.check_num_frames(T)
        assert (gamma is None) != config.learns.is_told, "an objective is told gamma, or it is not"
        if time_scale is None:
            time_scale = torch.full((len(x),), 1 / REFERENCE_FPS, device=x.device)
        assert ((clean is None) != (cache is None)) == config.causal, "for causal models only"
        grid = config.grid(T)
        (t, h, w) = grid
        pt = config.temporal_patch_size
        p = config.patch_size
        # Under autocast the embedding is bf16. The tokens are not, or each of their 2 x depth sums
        # would be rounded.
        tokens = self.x_embedder(fill_patches(x, pt)).to(x.dtype)  # (B, N, D)
        clean_patches = 0 if clean is None else config.clean_patches(T)
        if clean_patches:
            seen = self.x_embedder(clean[:, :, : clean_patches * pt]).to(x.dtype)
            tokens = torch.cat([seen, tokens], dim=1)
        condition = self.embed_condition(y, time_scale, gamma, clean_patches)
        kept = cache.num_patches if cache is not None else 0
        rotary = None
        if config.use_rope:
            rotary = self.rope(grid, time_scale, first=kept)
        masks = None
        if clean is not None:
            seen = slice(clean_patches * h * w)
            rotary = tuple(torch.cat([angles[:, :, seen], angles], dim=2) for angles in rotary)
            masks = self.masks_of(t, h * w, x.device)
        if config.has_table:  # a table of space alone serves every temporal patch
            tokens = (tokens.unflatten(1, (-1, self.pos_embed.shape[1])) + self.pos_embed).flatten(
                1, 2
            )
        if self.is_compiled:
            tokens = tokens.clone()  # a view would need a separate graph for the first block
        for index, block in enumerate(self.blocks):
            # batch size and number of tokens vary; each new size would be compiled again
            if self.is_compiled:
                mark = torch._dynamo.maybe_mark_dynamic
                mark(tokens, (0, 1))
                mark(condition, (0, 1) if condition.shape[1] > 1 else 0)
                for angles in rotary or ():
                    mark(angles, (0, 2))
            recompute = self.grad_checkpoint if torch.is_grad_enabled() else None
            if recompute == "full":
                # also when run again
                function = block if config.ebm == "none" else sdpa_kernel(SDPBackend.MATH)(block)
                tokens = checkpoint(function, tokens, condition, rotary, masks, use_reentrant=False)
            else:
                part = cache.blocks[index] if cache is not None else None
                selective = recompute == "selective"
                tokens = block(tokens, condition, rotary, masks, selective=selective, cache=part)
        if cache is not None and cache.fills:
            cache.rotate(self.rope((cache.num_patches, h, w), time_scale))
        tokens = tokens[:, -t * h * w :]
        f = self.final_layer(tokens, condition[:, -t:])
        f = rearrange(
            f, "b (t h w) (pt p q c) -> b c (t pt) (h p) (w q)", t=t, h=h, w=w, pt=pt, p=p, q=p
        )
        return f[:, :, :T], tokens

    def masks_of(self, num_patches, tokens, device):
        """Return the `attention_masks` of a clip. They are made once for each length."""
        key = (num_patches, device)
        if key not in self.masks:
            self.masks[key] = attention_masks(
                num_patches,
                tokens,
                context=self.config.context_patches,
                device=device,
                for_flex=self.is_compiled and device.type in FLEX_DEVICES,
            )
        return self.masks[key]

    def embed_condition(self, y, time_scale, gamma, clean_patches):
        """Return the condition of the blocks: (B, 1, D), or (B, K, D) for K temporal patches with
        levels or actions of their own, after that of so many clean patches.
        """
        s = torch.log2(REFERENCE_FPS * time_scale.float())  # 0 in published EqM
        condition = self.t_embedder(s)[:, None] + self.y_embedder(y)
        if clean_patches and self.config.actions:
            # a clean patch has the action of its noisy one
            condition = torch.cat([condition[:, :clean_patches], condition], dim=1)
        if gamma is None:
            return condition
        # (B, 1), or one per patch
        levels = gamma.float().reshape(len(y), -1)[:, :: self.config.temporal_patch_size]
        if clean_patches:  # their level is 1
            levels = levels.expand(-1, clean_patches + 1)  # of the noisy ones
            levels = torch.cat([torch.ones_like(levels[:, 1:]), levels], dim=1)
        return condition + self.gamma_embedder(1000 * levels)

    def compile_blocks(self):
        """Compile the blocks with torch.compile.

        One graph serves all blocks, batch sizes and numbers of tokens, unless the model is causal.
        """
        self.is_compiled = True
        if self.config.causal:  # a graph for each length of clips and caches, not only 8
            torch._dynamo.config.recompile_limit = 64
        # otherwise DDP splits the graphs of blocks at its buckets
        torch._dynamo.config.optimize_ddp = False
        # It warns that selective checkpointing must not have operations in place: a Block has none.
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
        for block in self.blocks:
            block.compile()

    def without_graphs(self):
        """A context in which compiled blocks run as if they were not compiled."""
        # loads the compiler, which takes seconds
        return torch.compiler.set_stance("force_eager") if self.is_compiled else nullcontext()


def fill_patches(x, frames):
    """Repeat the last frame of x (B, C, T, H, W) until T is a multiple of `frames`."""
    padding = -x.shape[2] % frames
    if not padding:
        return x
    return torch.cat([x, x[:, :, -1:].expand(-1, -1, padding, -1, -1)], dim=2)


def position_table(config):
    """Return the fixed positions, (1, N, D) float32: of the training grid, or of one patch in time.

    Those of one temporal patch are for use_rope. Videos have 2 * floor(D / 6) channels each for
    time, height and width, sines first, then zeros. Images, and videos with use_rope, have the 2D
    table of MAE and the published models: the first half of the channels is for the width.
    """
    sizes = config.grid(config.num_frames)
    D = config.hidden_size
    half = D // 6  # of the channels of an axis
    is_flat = config.use_rope or config.num_frames == config.temporal_patch_size == 1
    if is_flat:
        sizes = sizes[1:]
        half = D // 4
    count = partial(torch.arange, dtype=torch.float64, device="cpu")  # as `shapes_of` needs
    positions = torch.cartesian_prod(*map(count, sizes))  # (N, axes)
    if is_flat:
        positions = positions.flip(1)
    frequencies = 10_000.0 ** -(count(half) / half)
    angles = positions[:, :, None] * frequencies
    table = torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1)
    padding = D - table.shape[1]
    return F.pad(table, (0, padding)).float()[None]


SIZES = {  # depth, hidden_size, num_heads
    "Ti": (6, 192, 3),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
# the fields of EqMConfig that --model decides
SHAPE = "depth", "hidden_size", "num_heads", "patch_size"


def model_shape(name):
    """Return {field: value} of the SHAPE fields of a model named such as "EqM-S/4" (size S,
    patch_size 4); None: {}.
    """
    if name is None:
        return {}
    size, patch_size = name.removeprefix("EqM-").split("/")
    values = [*SIZES[size], int(patch_size)]
    return dict(zip(SHAPE, values, strict=True))


def model_config(name, **overrides):
    """Return the EqMConfig of a named model.

    Its temporal_patch_size is its patch_size unless overridden.
    """
    settings = {"input_size": 32, "in_channels": 4, "num_classes": 1000} | model_shape(name)
    settings["temporal_patch_size"] = settings["patch_size"]
    settings |= overrides
    settings.setdefault("num_frames", settings["temporal_patch_size"])
    return EqMConfig(**settings)


def build_model(name, **overrides):
    return EqM(model_config(name, **overrides))


NAMES = [f"EqM-{size}/{patch_size}" for size in SIZES for patch_size in (2, 4, 8)]
USUAL_NAME = "EqM-S/4"  # the default of --model
EqM_models = {name: partial(build_model, name) for name in NAMES}


def model_name(depth, hidden_size, num_heads, patch_size, **_):
    """Return the name of a model with these fields of EqMConfig, such as "EqM-S/4".

    Other fields are ignored.
    """
    for size, shape in SIZES.items():
        if shape == (depth, hidden_size, num_heads):
            return f"EqM-{size}/{patch_size}"
    return f"EqM-(depth {depth}, width {hidden_size}, heads {num_heads})/{patch_size}"


# Flags --------------------------------------------------------------------------------------------

# those that a checkpoint decides, besides --model
FLAGS = (
    "depth",
    "hidden_size",
    "num_heads",
    "temporal_patch_size",
    "rope_theta",
    "rope_split",
    "rope_speed",
    "position_table",
    "qk_norm",
    "ebm",
    "objective",
    "causal",
    "context",
)


def add_flags(parser):
    """Add the flags of a new network to the parser of train.py."""
    add = parser.add_argument_group("model (defaults come from --inflate, too)").add_argument
    add("--video", action="store_true", help="train on videos; without it on images")
    add(
        "--model",
        choices=NAMES,
        metavar="NAME",
        help="EqM-{Ti,S,B,L,XL}/{2,4,8}: size / patch; default: from --ckpt, else " + USUAL_NAME,
    )
    add("--depth", type=COUNT, help="number of blocks; default: from --ckpt, else from --model")
    add("--hidden-size", type=COUNT, help="width; default: from --ckpt, else from --model")
    add("--num-heads", type=COUNT, help="attention heads; default: from --ckpt, else from --model")
    add(
        "--temporal-patch-size",
        type=COUNT,
        help="frames per patch; default: from --ckpt, else the spatial size",
    )
    add(
        "--use-rope",
        action="store_true",
        help="3D rotary positions, for any number of frames; default: fixed ones",
    )
    add(
        "--rope-theta",
        type=POSITIVE,
        help="base of the frequencies; default: from --ckpt, else 10000",
    )
    add(
        "--rope-split",
        metavar="T,H,W",
        help=(
            "channels of a head for time, height and width, such as 16,8,8; default: from --ckpt, "
            "else a third each"
        ),
    )
    add(
        "--rope-speed",
        type=NON_NEGATIVE,
        help=(
            "patches by which spatial positions move per temporal patch at 25 fps; default: from "
            "--ckpt, else 0"
        ),
    )
    add(
        "--position-table",
        choices=POSITION_TABLES,
        help=(
            "space: add fixed positions of height and width to rotary ones; default: from --ckpt, "
            "else none"
        ),
    )
    add(
        "--qk-norm",
        action="store_true",
        default=None,
        help="RMSNorm of queries and keys; default: from --ckpt",
    )
    add(
        "--ebm",
        choices=EBMS,
        help="energy whose negative gradient is the field; default: from --ckpt, else none",
    )
    add(
        "--causal",
        action="store_true",
        default=None,
        help=(
            "a temporal patch sees only earlier ones, so videos are sampled patch by patch, at any "
            "length; default: from --ckpt"
        ),
    )
    add(
        "--context",
        type=COUNT,
        metavar="N",
        help=(
            "frames before its own that a temporal patch sees, if causal; default: all others of "
            "the longest clip"
        ),
    )
    add("--num-classes", type=COUNT, help="number of classes; default: number of class folders")


def check_flags(args):
    """Raise UserError for flags of a causal model that need others."""
    if args.causal and not (args.video and args.use_rope):
        raise UserError("--causal: needs videos with rotary positions; add --video and --use-rope")
    if args.context and not args.causal:
        raise UserError(f"{flag_text(args, 'context')}: needs --causal; add it")
