"""Causal attention over temporal patches: masks for training, a cache for sampling.

In training, the tokens of a clip are [clean | noisy], with the same positions. Clean patch t sees
the clean patches up to t. Noisy patch t sees the clean patches before t, and itself. So each noisy
patch is a case of what sampling does: continue clean frames by one patch. Nothing would see the
last patch if it was clean, so it is only among the noisy ones. The context bounds how many earlier
patches a patch sees.

In sampling, the keys and values of the clean patches are kept instead, and each new patch is
evaluated alone. Rotary positions depend only on distances, so time may be counted from the oldest
kept patch. As that one changes, keys are also kept unrotated, and rotated again for each new patch.
"""

import math
from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from rope import apply_rotary

# of a Part, if patches are smaller: fewer at a time are slower, more compute more hidden pairs
LEAST_TOKENS = 128


class Part(NamedTuple):
    """Neighboring patches in one half of [clean | noisy], and what they see together."""

    tokens: slice
    seen: list  # slices of tokens
    mask: torch.Tensor | None  # bool (tokens, seen tokens); None: all see all

    def seen_of(self, tokens):
        """The seen ones of tokens (B, h, N, d)."""
        parts = [tokens[:, :, seen] for seen in self.seen]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class Masks(NamedTuple):
    """Which tokens of [clean | noisy] see each other."""

    parts: list  # Parts, which leave out most pairs of tokens that do not see each other
    blocks: BlockMask | None  # for FlexAttention


def attention_masks(num_patches, tokens, context, device=None, for_flex=False):
    """The Masks of a clip. tokens: of a patch; for_flex: also for FlexAttention."""
    sees = mask_function(num_patches, tokens, context)
    N = num_patches * tokens
    clean = clean_patches_of(num_patches) * tokens
    both = clean + N
    number = torch.arange(both, device=device)
    step = tokens * math.ceil(LEAST_TOKENS / tokens)
    parts = []
    for is_noisy, length in enumerate((clean, N)):
        for first in range(0, length, step):
            last = min(first + step, length)
            here = slice(is_noisy * clean + first, is_noisy * clean + last)
            oldest = max(0, first - context * tokens)
            seen = [slice(oldest, last)]
            if is_noisy:  # a noisy patch does not see itself among the clean ones
                seen = [slice(oldest, last - tokens), here]
            seen = [part for part in seen if part.start < part.stop]
            mask = None
            if last - first > tokens:
                mask = sees(0, 0, number[here, None], torch.cat([number[part] for part in seen]))
            parts.append(Part(here, seen, mask))
    blocks = None
    if for_flex:
        blocks = create_block_mask(sees, B=None, H=None, Q_LEN=both, KV_LEN=both, device=device)
    return Masks(parts, blocks)


def clean_patches_of(num_patches):
    """The number of clean patches beside so many noisy ones: all that a noisy one may see."""
    return num_patches - 1


def mask_function(num_patches, tokens, context):
    """Whether a token of [clean | noisy] sees another, by their numbers: a mask_mod of
    FlexAttention.
    """
    clean = clean_patches_of(num_patches) * tokens

    def patch_of(token):
        return (token - clean * (token >= clean)) // tokens

    def sees(batch, head, token, seen):
        age = patch_of(token) - patch_of(seen)
        sees_earlier = (seen < clean) & (age > 0) & (age <= context)
        sees_itself = (age == 0) & ((token < clean) == (seen < clean))
        return sees_earlier | sees_itself

    return sees


def count_pairs(num_patches, context):
    """The number of pairs of patches that see each other in [clean | noisy]."""
    seen = [min(patch, context) + 1 for patch in range(num_patches)]  # with the patch itself
    return sum(seen) + sum(seen[: clean_patches_of(num_patches)])


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

    def rotate(self, angles):
        """Rotate the kept keys by the (cos, sin) of their positions."""
        for block in self.blocks:
            block.rotated = apply_rotary(block.keys, *angles)


class BlockCache:
    """The part of a Cache that belongs to one block."""

    def __init__(self, cache):
        self.cache = cache
        self.keys = None  # (B, h, n, d), before the rotation
        self.rotated = None
        self.values = None

    def extend(self, keys, values, unrotated):
        """Return the kept rotated keys and values, with those of the new patch (B, h, tokens, d) at
        the end. Keeps those of the new patch, too, if the cache fills.
        """
        if self.keys is not None:
            rows = self.cache.rows
            keys = torch.cat([self.rotated[rows].to(keys), keys], dim=2)
            values = torch.cat([self.values[rows].to(values), values], dim=2)
        if self.cache.fills:
            if self.keys is not None:
                unrotated = torch.cat([self.keys, unrotated], dim=2)
            self.keys = unrotated[:, :, -self.cache.most_tokens :]
            self.values = values[:, :, -self.cache.most_tokens :]
        return keys, values
