"""Causal attention over temporal patches: a mask for training, a cache for sampling.

In training, the tokens of a clip are [clean | noisy], with the same positions. Clean patch t sees
the clean patches up to t. Noisy patch t sees the clean patches before t, and itself. So each noisy
patch is a case of what sampling does: continue clean frames by one patch. The context bounds how
many earlier patches a patch sees.

In sampling, the keys and values of the clean patches are kept instead, and each new patch is
evaluated alone. Rotary positions depend only on distances, so time may be counted from the oldest
kept patch. As that one changes, keys are kept unrotated.
"""

from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


def visible_patches(num_patches, context, device=None):
    """(clean, noisy): which clean patch each clean and each noisy patch sees, both bool
    (num_patches, num_patches), a row per patch that sees.

    context: the number of earlier patches that a patch sees.
    """
    patch = torch.arange(num_patches, device=device)
    age = patch[:, None] - patch  # of the seen patch
    return (age >= 0) & (age <= context), (age > 0) & (age <= context)


class Masks(NamedTuple):
    """Which tokens of [clean | noisy] see each other; N in each half."""

    clean: torch.Tensor  # (N, N) bool: of the clean half, which sees no noisy token
    noisy: torch.Tensor  # (N, 2 N) bool: of the noisy half
    blocks: BlockMask | None  # both, (2 N, 2 N), for FlexAttention


def attention_masks(num_patches, tokens, context, device=None, for_flex=False):
    """The Masks of a clip. tokens: of a patch; for_flex: also for FlexAttention."""
    clean, noisy = visible_patches(num_patches, context, device)
    itself = torch.eye(num_patches, dtype=torch.bool, device=device)
    clean, noisy = (
        mask.repeat_interleave(tokens, dim=0).repeat_interleave(tokens, dim=1)
        for mask in (clean, torch.cat([noisy, itself], dim=1))
    )
    blocks = None
    if for_flex:
        blocks = create_block_mask(
            mask_function(num_patches, tokens, context),
            B=None,
            H=None,
            Q_LEN=2 * len(clean),
            KV_LEN=2 * len(clean),
            device=device,
        )
    return Masks(clean, noisy, blocks)


def mask_function(num_patches, tokens, context):
    """The mask_mod of FlexAttention for [clean | noisy]: whether a token sees another, by their
    numbers.
    """
    N = num_patches * tokens

    def sees(batch, head, token, seen):
        age = token % N // tokens - seen % N // tokens  # in patches
        sees_earlier = (seen < N) & (age > 0) & (age <= context)
        sees_itself = (age == 0) & ((token < N) == (seen < N))
        return sees_earlier | sees_itself

    return sees


def count_pairs(num_patches, context):
    """The number of pairs of patches that see each other in [clean | noisy]."""
    clean, noisy = visible_patches(num_patches, context)
    return int(clean.sum() + noisy.sum()) + num_patches


class Cache:
    """Keys and values of the newest clean patches of a batch, of all blocks.

    A network that is called with a cache sees these patches. While `fills` is true, it also adds
    the patch of the call.
    """

    def __init__(self, depth, context, tokens):
        """context: number of patches to keep; tokens: of a patch."""
        self.most_tokens = context * tokens
        self.tokens = tokens
        self.blocks = [BlockCache(self) for _ in range(depth)]
        self.fills = False
        self.rows = slice(None)  # of the samples that still run

    @property
    def num_patches(self):
        """The number of kept patches."""
        keys = self.blocks[0].keys
        return 0 if keys is None else keys.shape[2] // self.tokens


class BlockCache:
    """The part of a Cache that belongs to one block."""

    def __init__(self, cache):
        self.cache = cache
        self.keys = None  # (B, h, n, d), before the rotation
        self.values = None

    def extend(self, keys, values):
        """Return the kept keys and values, with those of the new patch (B, h, tokens, d) at the
        end. Keeps them, if the cache fills.
        """
        if self.keys is not None:
            keys = torch.cat([self.keys[self.cache.rows].to(keys), keys], dim=2)
            values = torch.cat([self.values[self.cache.rows].to(values), values], dim=2)
        if self.cache.fills:
            self.keys = keys[:, :, -self.cache.most_tokens :]
            self.values = values[:, :, -self.cache.most_tokens :]
        return keys, values
