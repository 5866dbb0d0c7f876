"""Which ranks bounds are taken over, and who lies beside them on their host."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from hpctrain.planner.wire import Wire

ALL = 16
"""Up to so many ranks every one is looked at; the compiled kernel takes no more at a time."""

PAIRS = 256
"""Of many ranks, and neighbours of each, so many pairs are looked at."""


GOLDEN = (5**0.5 - 1) / 2
"""Its multiples are spread evenly, however many there are."""


class Sample(NamedTuple):
    """The ranks to look at among `ranks` on hosts of `per_host`.

    `summed`: the ranks of each host are a block of coordinates, so that what they have together is a product, too.
    `runs`: it matters in how many runs they copy.
    """

    ranks: int
    per_host: int
    summed: bool
    runs: bool

    @classmethod
    def of(cls, ranks: int, wire: Wire, *partitions: np.ndarray) -> Sample:
        """That for the price of edges between `partitions` (any, 6)."""
        several = ranks > wire.per_host
        summed = several and all(_aligned(blocks, wire.per_host) for blocks in partitions)
        return cls(ranks, wire.per_host, summed, wire.copies and wire.run > 0)

    @property
    def several(self) -> bool:
        """Whether there are several hosts."""
        return self.ranks > self.per_host

    @property
    def looked_at(self) -> np.ndarray:
        """The ranks: all, or of many the first and last, two amid all axes, those a power of two from the ends, and
        others spread over all of them.

        Those amid have neighbours on both sides along each axis of four blocks or more, where these are powers of two.
        """
        return _looked_at(self)

    @property
    def beside(self) -> np.ndarray:
        """(any, looked at): the ranks of the host of each, or the first of them where these are summed."""
        first = self.looked_at // self.per_host * self.per_host
        count = 0 if not self.several else 1 if self.summed else self.per_host
        return first + np.arange(count)[:, None]


@lru_cache(maxsize=64)
def _looked_at(sample: Sample) -> np.ndarray:
    n = sample.ranks
    if n <= ALL:
        return np.arange(n)
    most = ALL if sample.summed or not sample.several else max(4, PAIRS // sample.per_host)
    found = [0, n // 3, n - 1, 2 * n // 3]
    for power in (1 << k for k in range((n - 1).bit_length() - 1, -1, -1)):
        found += [power, n - 1 - power]
    found += [int(n * (GOLDEN * k % 1)) for k in range(1, 2 * ALL)]
    return np.array(sorted(list(dict.fromkeys(found))[: min(ALL, most)]))


def _aligned(blocks: np.ndarray, per_host: int) -> bool:
    """Whether every run of `per_host` ranks is a block of coordinates of each partition (any, 6)."""
    strides = np.ones_like(blocks)
    strides[:, :-1] = blocks[:, :0:-1].cumprod(1)[:, ::-1]
    whole = per_host % (strides * blocks) == 0
    none = strides % per_host == 0
    some = (per_host % strides == 0) & (blocks % np.maximum(1, per_host // strides) == 0)
    return bool(((blocks == 1) | whole | none | some).all())
