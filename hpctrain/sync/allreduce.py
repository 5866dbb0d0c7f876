"""One replica on all ranks: gradients are summed within its backward pass, so there is nothing left to do."""

from __future__ import annotations

from collections.abc import Callable

from hpctrain.sync.base import Stateless


class Allreduce(Stateless):
    """Synchronous SGD."""

    lockstep = True

    def update(self, step: int, move: Callable[[], None]) -> int:
        """The optimizer's part alone."""
        move()
        return step + 1
