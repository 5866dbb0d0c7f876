"""Local SGD: every replica goes on alone, and every `period` steps all take the mean of their weights."""

from __future__ import annotations

from collections.abc import Callable

from hpctrain.comm.replicas import Replicas
from hpctrain.config import Sync
from hpctrain.sync.base import Held, Stateless, average, pack, unpack
from hpctrain.sync.rules import due


class Local(Stateless):
    """Weights are averaged after the update; the optimizer's state stays each replica's own."""

    lockstep = True

    def __init__(self, replicas: Replicas, held: Held, config: Sync, seed: int) -> None:
        self.replicas, self.weights, self.period = replicas, held.weights, config.period

    def update(self, step: int, move: Callable[[], None]) -> int:
        """As the protocol says."""
        move()
        if due(step, self.period):
            unpack(average(self.replicas, pack(self.weights)), self.weights)
        return step + 1
