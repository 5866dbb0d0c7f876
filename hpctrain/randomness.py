"""Random numbers as a function of what they are for: the same on any partition, with any version of NumPy."""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np
import xxhash

from hpctrain.errors import ConfigError
from hpctrain.partition import Box, Shape, extent

WORDS_PER_COUNTER = 4


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
    # dims that the box takes whole join the dim before them in one run of consecutive indices
    last = len(shape) - 1
    while last > 0 and out.shape[last] == shape[last]:
        last -= 1
    run = prod(out.shape[last:])
    flat = out.reshape(-1, run)
    strides = [prod(shape[d + 1 :]) for d in range(len(shape))]
    starts = product(*(range(s.start * n, s.stop * n, n) for s, n in zip(box[:last], strides[:last], strict=True)))
    first = box[last].start * strides[last] if shape else 0
    for row, start in zip(flat, starts, strict=True):
        row[:] = random_words("tensor", seed, index, run, sum(start) + first)
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
