"""Random numbers as a function of what they are for: Philox(seed, purpose) at a global index, on any partition."""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np
import xxhash

from hpctrain.partition import Box, Shape, extent

WORDS_PER_COUNTER = 4


def words(seed: int, purpose: str, shape: Shape, box: Box) -> np.ndarray:
    """Raw 64-bit Philox words (uint64, the box's extents) of a tensor of `shape`: one word per global flat index.

    The key is (seed, xxh3-64 of `purpose`), the counter the flat index over 4, so that any box can be drawn alone.
    """
    key = np.array([seed, xxhash.xxh3_64_intdigest(purpose.encode())], np.uint64)
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
        counter, skip = divmod(sum(start) + first, WORDS_PER_COUNTER)
        row[:] = np.random.Philox(key=key, counter=[counter, 0, 0, 0]).random_raw(skip + run)[skip:]
    return out


def uniform(seed: int, purpose: str, shape: Shape, box: Box) -> np.ndarray:
    """float64 in [0, 1) with 53 random bits."""
    return (words(seed, purpose, shape, box) >> np.uint64(11)) * 2.0**-53


def normal(seed: int, purpose: str, shape: Shape, box: Box) -> np.ndarray:
    """float64 standard normal by Box and Muller (1958), from the two halves of each word."""
    drawn = words(seed, purpose, shape, box)
    radius = ((drawn >> np.uint64(32)) + 1.0) * 2.0**-32
    angle = (drawn & np.uint64(0xFFFFFFFF)) * 2.0**-32
    return np.sqrt(-2.0 * np.log(radius)) * np.cos(2.0 * np.pi * angle)
