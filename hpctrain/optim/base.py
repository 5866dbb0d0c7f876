"""What all optimizers have in common: the blocks of the flat buffers that they update, and the state they keep."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from hpctrain.backends.base import Floats


class Shard(NamedTuple):
    """This rank's block of one parameter."""

    where: slice
    """Its stretch of the flat buffers."""
    decay: bool
    """Whether weight decay applies."""
    counted: bool = True
    """Whether it counts in sums over ranks: of those that hold the same block, that of the first one does."""


class Optimizer(Protocol):
    """Updates flat `weights` (n,) in place from `gradients` (n,), both of which the executor owns.

    Made by `__init__(weights, gradients, shards, backend, config, comm=None)`: `shards` has one entry per parameter, in
    an order that all ranks share, and covers the buffers from start to end. Without `comm` there is this rank alone.
    """

    state: dict[str, Floats]
    """Arrays like `weights` that a checkpoint must keep, by name."""
    updates: int
    """How many there have been; a checkpoint keeps this too."""

    def step(self, lr: float) -> None:
        """One update with learning rate `lr`. Collective where the optimizer needs sums over ranks."""


def runs(shards: Iterable[Shard]) -> list[tuple[slice, bool]]:
    """Stretches of the flat buffers that share one decay flag, in order: what one call of a backend can update."""
    found: list[tuple[slice, bool]] = []
    for where, decay, _ in shards:
        if found and found[-1][1] == decay:
            found[-1] = (slice(found[-1][0].start, where.stop), decay)
        else:
            found.append((where, decay))
    return found
