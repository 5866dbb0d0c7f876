"""1-bit SGD (Seide et al. 2014): of each number its sign; per parameter the mean of each sign; error feedback."""

from __future__ import annotations

from typing import Any

import numpy as np

from hpctrain.comm.codecs.base import BLOCK, Gathering, Part, Reader, joined

BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(bool)
"""(256, 8): the bits of each byte, highest first as `np.packbits` has them."""


class OneBit(Gathering):
    """A payload is, per part, the mean of what is negative, that of what is not, and the bits of the latter.

    The means are those that make the squared error least. The paper takes them per column of a weight matrix.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.state = {"residual": np.zeros(self.size, self.dtype)}

    def payload_bytes(self, epoch: float) -> int:
        """As in Gathering."""
        return sum(2 * self.dtype.itemsize + -(-part.size // 8) for part in self.parts)

    def encode(self, gradient: np.ndarray, step: int, epoch: float, ranks: int) -> np.ndarray:
        """As in Gathering; `gradient` becomes what has accumulated."""
        gradient += self.state["residual"]
        return joined([piece for part in self.parts for piece in self._encoded(part, gradient)])

    def add(self, payload: np.ndarray, into: np.ndarray, epoch: float) -> None:
        """As in Gathering."""
        self._add(payload, into)

    def keep(self, gradient: np.ndarray, payload: np.ndarray, epoch: float) -> None:
        """As in Gathering."""
        self._add(payload, gradient, -1)
        self.state["residual"][...] = gradient

    def _encoded(self, part: Part, gradient: np.ndarray) -> list[np.ndarray]:
        """Means (2,), then bits."""
        bits, sums, counts = [], np.zeros(2), np.zeros(2)
        for _, block in part.blocks():
            numbers = gradient[block]
            positive = numbers >= 0
            above = np.count_nonzero(positive)
            counts += numbers.size - above, above
            sums += np.minimum(numbers, 0).sum(), np.maximum(numbers, 0).sum()
            bits.append(np.packbits(positive))
        return [(sums / np.maximum(counts, 1)).astype(self.dtype), *bits]

    def _add(self, payload: np.ndarray, into: np.ndarray, sign: int = 1) -> None:
        reader = Reader(payload)
        for part in self.parts:
            below, above = reader.take(2, self.dtype)
            values = np.where(BITS, sign * above, sign * below)
            packed = reader.take(-(-part.size // 8), np.uint8)
            for start, block in part.blocks():
                decoded = np.take(values, packed[start // 8 : (start + BLOCK) // 8], axis=0)
                into[block] += decoded.reshape(-1)[: block.stop - block.start]
