"""Random draws that depend only on (seed, purpose, stream, index of the sample).

They do not change with the number of workers or ranks, nor with interruptions of a run.
"""

import hashlib
import math

import torch


def generator(seed, purpose, *key, device="cpu"):
    """A torch.Generator that depends only on the arguments.

    `purpose` is a word ("noise", "flip"), `key` says which draw: the stream (first step of the
    phase) and the index of the sample in it. torch's CPU generator keeps 32 bits of the seed: two
    of 65,000 samples may share their noise.
    """
    words = " ".join(str(part) for part in (seed, purpose, *key))
    digest = hashlib.blake2b(words.encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def uniform(seed, purpose, stream, indices):
    """A number in [0, 1) for each sample of a stream, (len(indices),) float32 on the CPU."""
    return torch.stack(
        [torch.rand((), generator=generator(seed, purpose, stream, index)) for index in indices]
    )


def normal(seed, purpose, stream, indices, shape, device="cpu"):
    """Standard normal noise for each sample of a stream, (len(indices), *shape) float32."""
    noise = torch.empty(len(indices), *shape, device=device)
    for row, index in zip(noise, indices, strict=True):
        row.normal_(generator=generator(seed, purpose, stream, index, device=device))
    return noise


def noise_of_samples(seed, indices, shape, window=0):
    """The noise that sample_gd.py makes a window of the samples `indices` from, (n, *shape) float32
    on the CPU.
    """
    return normal(seed, "sample", window, indices, shape)


def noise_of_sample(seed, index, window, shape):
    """The noise (C, T, h, w) that sample_gd.py makes a whole sample from, in windows of so many
    frames.
    """
    C, T, height, width = shape
    shape = (C, window, height, width)
    numbers = range(math.ceil(T / window))
    parts = [noise_of_samples(seed, [index], shape, number) for number in numbers]
    return torch.cat(parts, dim=2)[0, :, :T]
