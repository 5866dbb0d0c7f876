"""QSGD (Alistarh et al. 2017): numbers rounded at random to few levels, so that their mean is right."""

from __future__ import annotations

import numpy as np
import xxhash

from hpctrain.comm.codecs.base import Gathering, Part, Reader, joined
from hpctrain.comm.codecs.bits import pack, packed_bytes, unpack
from hpctrain.randomness import random_words

BUCKET = 512
"""Numbers that share a scale, as in the paper; blocks of a part are a multiple of it."""


class QSGD(Gathering):
    """A payload is, per part, the scales of its buckets and the levels of its numbers, from -s to s.

    A number x is sent as sign(x) * level * scale / s, where level is s * abs(x) / scale rounded up with the probability
    of its fractional part, and down otherwise. The scale is the bucket's largest number, which the paper offers beside
    its 2-norm: levels have a fixed number of bits here, and with the 2-norm nearly all would be 0 or 1.
    """

    @property
    def bits(self) -> int:
        """Of a level on the wire, its sign included."""
        return self.settings.bits

    def bucket(self, part: Part) -> int:
        """How many numbers share a scale."""
        return BUCKET

    def payload_bytes(self, epoch: float) -> int:
        """As in Gathering."""
        scales = sum(-(-part.size // self.bucket(part)) for part in self.parts)
        return scales * self.dtype.itemsize + sum(packed_bytes(part.size, self.bits) for part in self.parts)

    def encode(self, gradient: np.ndarray, step: int, epoch: float, ranks: int) -> np.ndarray:
        """As in Gathering."""
        pieces = []
        for part in self.parts:
            scales = self._scales(part, gradient[part.where])
            pieces.append(scales)
            for start, block in part.blocks():
                numbers = gradient[block]
                random = uniform(self.seed, step, self.rank, part.name, start, numbers.size)
                divisors = self._spread(part, np.where(scales == 0, scales.dtype.type(1), scales), start, numbers.size)
                pieces.append(pack(levels(numbers, divisors, self._steps, random), self.bits))
        return joined(pieces)

    def add(self, payload: np.ndarray, into: np.ndarray, epoch: float) -> None:
        """As in Gathering."""
        reader = Reader(payload)
        for part in self.parts:
            scales = reader.take(-(-part.size // self.bucket(part)), self.dtype) / self.dtype.type(self._steps)
            for start, block in part.blocks():
                n = block.stop - block.start
                codes = unpack(reader.take(packed_bytes(n, self.bits), np.uint8), n, self.bits)
                decoded = codes.astype(self.dtype)
                decoded -= self._steps
                decoded *= self._spread(part, scales, start, n)
                into[block] += decoded

    @property
    def _steps(self) -> int:
        """s: levels above zero."""
        return int(2 ** (self.bits - 1) - 1)

    def _scales(self, part: Part, numbers: np.ndarray) -> np.ndarray:
        """The largest abs of each bucket; NaN where there is one."""
        starts = range(0, part.size, self.bucket(part))
        return np.maximum(np.maximum.reduceat(numbers, starts), -np.minimum.reduceat(numbers, starts))

    def _spread(self, part: Part, scales: np.ndarray, start: int, n: int) -> np.ndarray:
        """The scales of `n` numbers from `start` on, one for each, or one for all."""
        if scales.size == 1:
            return scales
        first = start // self.bucket(part)
        return np.repeat(scales[first : -(-(start + n) // self.bucket(part))], self.bucket(part))[:n]


def levels(numbers: np.ndarray, scales: np.ndarray, steps: int, random: np.ndarray) -> np.ndarray:
    """Level of each number, plus `steps`: uint8. `random` (n,) is uniform in [0, 1]."""
    signed = numbers / scales
    signed *= steps
    size = np.abs(signed)
    level = np.floor(size)
    size -= level  # exact, so that no mean is off
    level += random < size
    level = np.copysign(level, signed, out=level)
    level += steps
    return level.astype(np.uint8)


def uniform(seed: int, step: int, rank: int, name: str, start: int, n: int) -> np.ndarray:
    """float32 (n,), uniform in [0, 1] in steps of 2**-32: numbers from `start` (even) on for a parameter and a step."""
    stream = xxhash.xxh3_64_intdigest(f"{name}/{rank}/{step}".encode())
    words = random_words("codec", seed, stream, -(-n // 2), start // 2)
    random = words.astype("<u8", copy=False).view("<u4")[:n].astype(np.float32)
    random *= np.float32(2.0**-32)
    return random
