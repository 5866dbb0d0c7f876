"""Random numbers as a function of what they are for: the same on any partition, with any version of NumPy."""

from __future__ import annotations

from math import prod

import numpy as np
import xxhash

from hpctrain.errors import ConfigError
from hpctrain.partition import Box, Shape, extent

WORDS_PER_COUNTER = 4
NEW_STREAM = 4096
"""Words that can be drawn in the time that it takes to begin a stream (15 us, at 4 ns a word)."""
LONGEST_STREAM = 2**20
"""Words drawn at a time, where dims allow."""


def random_words(purpose: str, seed: int, index: int, n: int, start: int = 0) -> np.ndarray:
    """Words `start` to `start + n` of a random stream, uint64 (n,): raw output of Philox4x64-10 (Salmon et al. 2011).

    Its key is (seed, index); its 256-bit counter has `purpose` (at most 8 ASCII letters, little-endian) in the last
    word, so that different uses never share words, and counts from 1 in the first. Raises ConfigError on a seed beyond
    64 bits.
    """
    if not 0 <= seed < 2**64:
        raise ConfigError(f"seed = {seed}; give a whole number from 0 to 2**64 - 1")
    count, skip = divmod(start, WORDS_PER_COUNTER)
    counter = np.array([count, 0, 0, int.from_bytes(purpose.encode(), "little")], np.uint64)
    stream = np.random.Philox(counter=counter, key=np.array([seed, index], np.uint64))
    return stream.random_raw(skip + n)[skip:]


def words(seed: int, name: str, shape: Shape, box: Box) -> np.ndarray:
    """One random word per global flat index of the tensor `name` of `shape`: uint64, the extents of `box`.

    Word i of the stream ("tensor", seed, xxh3-64 of `name`) stands at flat index i, so that any box is drawn alone.
    """
    index = xxhash.xxh3_64_intdigest(name.encode())
    out = np.empty(extent(box), np.uint64)
    if out.size == 0:
        return out
    if not shape:
        return words(seed, name, (1,), (slice(0, 1),)).reshape(())
    strides = [prod(shape[d + 1 :]) for d in range(len(shape))]
    first = sum(s.start * n for s, n in zip(box, strides, strict=True))
    spans = [
        1 + sum((n - 1) * step for n, step in zip(out.shape[d:], strides[d:], strict=True)) for d in range(out.ndim)
    ]
    # a stream draws all from dim `dim` on, and what lies between in vain, as long as that costs less than more streams
    costs = [prod(out.shape[:d]) * (span + NEW_STREAM) for d, span in enumerate(spans)]
    able = [d for d, span in enumerate(spans) if span <= LONGEST_STREAM or d == out.ndim - 1]
    dim = min(able, key=costs.__getitem__)
    apart = [n * out.itemsize for n in strides[dim:]]
    for at in np.ndindex(out.shape[:dim]):
        start = first + sum(i * n for i, n in zip(at, strides[:dim], strict=True))
        drawn = random_words("tensor", seed, index, spans[dim], start)
        out[at] = np.lib.stride_tricks.as_strided(drawn, out.shape[dim:], apart)
    return out


def uniform(seed: int, name: str, shape: Shape, box: Box) -> np.ndarray:
    """float64 in [0, 1) with 53 random bits."""
    return (words(seed, name, shape, box) >> np.uint64(11)) * 2.0**-53


def normal(seed: int, name: str, shape: Shape, box: Box) -> np.ndarray:
    """float64 standard normal by Box and Muller (1958), from the two halves of each word."""
    drawn = words(seed, name, shape, box)
    radius = ((drawn >> np.uint64(32)) + 1.0) * 2.0**-32
    angle = (drawn & np.uint64(0xFFFFFFFF)) * 2.0**-32
    return np.sqrt(-2.0 * np.log(radius)) * np.cos(2.0 * np.pi * angle)
