"""What all optimizers have in common: the blocks of parameters that they update, and the state they keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from hpctrain.backends.base import Floats


class Block(NamedTuple):
    """Parameters that lie side by side, and the sums of their gradients: 1D, of one length."""

    weights: Floats
    gradients: Floats


class Shard(NamedTuple):
    """What this rank updates of one parameter: all that it has of it, a piece, or nothing."""

    parameter: int
    """Its number; the same on all ranks."""
    block: int
    """Which block it lies in."""
    where: slice
    """Its stretch of that block."""
    decay: bool
    """Whether weight decay applies."""
    counted: bool = True
    """Whether it counts in sums over ranks: of those that update the same, that of the first one does."""

    @property
    def size(self) -> int:
        """Elements."""
        return int(self.where.stop - self.where.start)


class Run(NamedTuple):
    """Neighbouring shards that share one decay flag: what one call of a backend can update."""

    block: int
    where: slice
    decay: bool
    at: slice
    """Its stretch of the optimizer's state, which is as long as all shards together."""


class Optimizer(Protocol):
    """Updates weights in place from gradients, both of which the executor owns.

    Made by `__init__(blocks, shards, backend, config, comm=None)`: `shards` has at least one entry per parameter of
    the network. Without `comm` there is this rank alone.
    """

    arrays: ClassVar[int]
    """How many numbers it has per weight: its state, and what it computes in."""
    state: dict[str, Floats]
    """1D arrays that a checkpoint must keep, by name: the elements of all shards, one after the other."""
    updates: int
    """How many there have been; a checkpoint keeps this too."""

    def step(self, lr: float) -> None:
        """One update with learning rate `lr`. Collective where the optimizer needs sums over ranks."""


def runs(shards: Sequence[Shard]) -> list[Run]:
    """The shards, neighbours taken together, in order."""
    found: list[Run] = []
    for shard, at in zip(shards, places(shards), strict=True):
        last = found[-1] if found else None
        if last and (last.block, last.where.stop, last.decay) == (shard.block, shard.where.start, shard.decay):
            where = slice(last.where.start, shard.where.stop)
            found[-1] = Run(shard.block, where, shard.decay, slice(last.at.start, at.stop))
        elif shard.size:
            found.append(Run(shard.block, shard.where, shard.decay, at))
    return found


def places(shards: Sequence[Shard]) -> list[slice]:
    """The stretch of the optimizer's state that belongs to each shard."""
    found, at = [], 0
    for shard in shards:
        found.append(slice(at, at + shard.size))
        at += shard.size
    return found


def state_like(blocks: Sequence[Block], shards: Sequence[Shard]) -> Floats:
    """Zeros for every element of the shards, of the type of the weights."""
    dtype = blocks[0].weights.dtype if blocks else np.dtype(np.float32)
    return np.zeros(sum(shard.size for shard in shards), dtype)
