"""Which samples make up which step: a function of (seed, epoch, step) alone, the same on any grid and NumPy version."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from hpctrain.errors import DataError
from hpctrain.randomness import random_words


def permutation(seed: int, epoch: int, n: int, purpose: str = "order") -> np.ndarray:
    """A permutation of range(n), int64 (n,): the stable argsort of n words of Philox(purpose, seed, epoch).

    Equal words keep their order. (NumPy's own `Generator.permutation` may change from version to version.)
    """
    return np.argsort(random_words(purpose, seed, epoch, n), kind="stable").astype(np.int64)


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    return permutation(seed, epoch, n)


@dataclass(frozen=True)
class Batches:
    """The batches of every epoch, or of each the stripe `stripe` of `stripes` equal ones.

    Raises DataError where not even one step can be made.
    """

    samples: int
    batch: int
    seed: int
    shuffle: bool = True
    drop_last: bool = True
    stripe: int = 0
    stripes: int = 1

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise DataError(f"batch = {self.batch}; give 1 or more")
        if self.steps < 1:
            raise DataError(f"batch = {self.batch} is more than the {self.samples} samples; give a smaller batch")

        if self.batch % self.stripes:
            raise DataError(f"batch = {self.batch} has no {self.stripes} equal parts; give a multiple of these")

    @property
    def size(self) -> int:
        """Samples of one step in this stripe."""
        return self.batch // self.stripes

    @property
    def steps(self) -> int:
        """Steps per epoch: whole batches only, or with drop_last=False one more for the rest."""
        return self.samples // self.batch if self.drop_last else -(-self.samples // self.batch)

    def ids(self, epoch: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Global sample indices, int64 (size,), and weights, float64 (size,), of one step.

        A last partial batch is filled from the start of the epoch's order with weight 0. Raises DataError beyond the
        last step.
        """
        if not 0 <= step < self.steps:
            raise DataError(f"step {step} of epoch {epoch}; an epoch has steps 0 to {self.steps - 1}")
        at = step * self.batch + self.stripe * self.size + np.arange(self.size)
        inside = at % self.samples
        ids = _epoch_order(self.seed, epoch, self.samples)[inside] if self.shuffle else inside
        return ids, (at < self.samples).astype(np.float64)
