"""Deep Gradient Compression (Lin et al. 2018): only the largest numbers are sent, the rest goes on accumulating."""

from __future__ import annotations

from typing import Any

import numpy as np

from hpctrain.comm.codecs.base import Gathering, Part, Reader, Wire, joined

STAGES = 4
"""Of the warm-up: a quarter of the numbers is sent in the first, and in each next a quarter of that."""


class TopK(Gathering):
    """Momentum u = m u + g and what it adds up to, v = v + u, are kept here, and the largest numbers of v are sent.

    Where a number is sent, v starts again from 0, and so does u: its momentum has been sent late, and would point where
    the gradient no longer does (momentum factor masking). A parameter of which all is sent is never late: its u goes
    on, which is SGD with momentum. So it is with biases and scales, as in the authors' program: they are few, and much
    hangs on them. A payload is, per part, its largest numbers and where they stand.
    """

    takes_momentum = True

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.state = {name: np.zeros(self.size, self.dtype) for name in ("momentum", "accumulated")}
        self._pending = np.empty(self.size, self.dtype)

    def alone(self, wire: Wire, gradient: np.ndarray, step: int, epoch: float) -> None:
        """SGD with momentum, as nothing needs sending."""
        velocity = self.state["momentum"] * self.momentum + gradient
        gradient[...] = velocity
        if np.isfinite(velocity).all():
            self.state["momentum"][...] = velocity

    def payload_bytes(self, epoch: float) -> int:
        """As in Gathering."""
        counts = [(part.size, self._sent(part, epoch)) for part in self.parts]
        return sum(k * self.dtype.itemsize + places_bytes(n, k) for n, k in counts)

    def encode(self, gradient: np.ndarray, step: int, epoch: float, ranks: int) -> np.ndarray:
        """As in Gathering; `gradient` becomes the new momentum, and `_pending` what has accumulated."""
        self._clip(gradient, ranks)
        pieces = []
        for part in self.parts:
            for _, block in part.blocks():
                gradient[block] += self.state["momentum"][block] * self.momentum
                np.add(self.state["accumulated"][block], gradient[block], out=self._pending[block])
            numbers = self._pending[part.where]
            chosen = largest(numbers, self._sent(part, epoch))
            pieces += [numbers[chosen], encode_places(chosen, part.size)]
        return joined(pieces)

    def add(self, payload: np.ndarray, into: np.ndarray, epoch: float) -> None:
        """As in Gathering."""
        reader = Reader(payload)
        for part in self.parts:
            k = self._sent(part, epoch)
            numbers = reader.take(k, self.dtype)
            into[part.where][decode_places(reader, part.size, k)] += numbers

    def keep(self, gradient: np.ndarray, payload: np.ndarray, epoch: float) -> None:
        """As in Gathering."""
        momentum, accumulated = self.state["momentum"], self.state["accumulated"]
        momentum[...], accumulated[...] = gradient, self._pending
        reader = Reader(payload)
        for part in self.parts:
            k = self._sent(part, epoch)
            reader.take(k, self.dtype)
            sent = decode_places(reader, part.size, k)
            accumulated[part.where][sent] = 0
            if k < part.size:
                momentum[part.where][sent] = 0

    def _sent(self, part: Part, epoch: float) -> int:
        """How many of its numbers are sent: at least one, so that no parameter stands still."""
        if len(part.shape) < 2:
            return part.size
        kept = sparsity(self.settings.sparsity, self.settings.warmup_epochs, epoch) * part.size
        return max(1, part.size - int(kept))

    def _clip(self, gradient: np.ndarray, ranks: int) -> None:
        """Shorten the gradient to this rank's part of `compress.clip`, for independent gradients of equal length."""
        if self.settings.clip:
            longest = self.settings.clip / ranks**0.5
            norm = float(np.sqrt(np.sum(np.square(gradient, dtype=np.float64))))
            if norm > longest:
                gradient *= longest / norm


def sparsity(final: float, warmup_epochs: float, epoch: float) -> float:
    """The share that is not sent: 0.75, 0.9375, 0.984, 0.996 in quarters of the warm-up, but never above `final`."""
    if epoch >= warmup_epochs:
        return final
    return min(final, 1 - 0.25 ** (1 + int(STAGES * epoch / warmup_epochs)))


def largest(numbers: np.ndarray, k: int) -> np.ndarray:
    """Where the k numbers of largest size stand, in order; of equal ones the first. NaN counts as larger than any."""
    if k == numbers.size:
        return np.arange(k)
    size = np.abs(numbers).view(f"u{numbers.itemsize}")  # ordered like the numbers, and in NaN too
    least = np.partition(size, numbers.size - k)[numbers.size - k]
    chosen = np.flatnonzero(size >= least)
    if chosen.size > k:
        tied = np.flatnonzero(size[chosen] == least)
        chosen = np.delete(chosen, tied[k - chosen.size :])
    return chosen


# --- where numbers stand: nothing where all are sent, or indices, or a bit for each number, whichever is shorter -----


def places_bytes(n: int, k: int) -> int:
    """Bytes that say which k of n numbers are sent."""
    return 0 if k == n else min(k * np.min_scalar_type(n - 1).itemsize, -(-n // 8))


def encode_places(chosen: np.ndarray, n: int) -> np.ndarray:
    """Ascending indices (k,) as uint8 (places_bytes,)."""
    k, index = chosen.size, np.min_scalar_type(n - 1)
    if k == n:
        return np.empty(0, np.uint8)
    if k * index.itemsize <= -(-n // 8):
        return chosen.astype(index).view(np.uint8)
    bits = np.zeros(n, bool)
    bits[chosen] = True
    return np.packbits(bits)


def decode_places(reader: Reader, n: int, k: int) -> np.ndarray | slice:
    """What `encode_places` was given, or as booleans (n,), or all."""
    index = np.min_scalar_type(n - 1)
    if k == n:
        return slice(None)
    if k * index.itemsize <= -(-n // 8):
        return reader.take(k, index).astype(np.intp)
    return np.unpackbits(reader.take(-(-n // 8), np.uint8), count=n).view(bool)
