"""Gossip by telling: now and then a replica adds its weights to what lies before any other one, which averages them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hpctrain.comm.onesided import Vectors
from hpctrain.comm.replicas import Replicas
from hpctrain.config import Sync
from hpctrain.sync.base import Held, Stateless, pack, unpack
from hpctrain.sync.rules import due, partner, push


class GossipPush(Stateless):
    """What lies before a replica is a sum of weights, its version how many. A stop forgets it: senders have it."""

    lockstep = False

    def __init__(self, replicas: Replicas, held: Held, config: Sync, seed: int) -> None:
        self.replicas, self.weights, self.period, self.seed = replicas, held.weights, config.period, seed
        self._x = pack(held.weights)
        self._total = np.zeros_like(self._x)
        self._inbox = Vectors(replicas, self._x.size, self._x.dtype)

    def update(self, step: int, move: Callable[[], None]) -> int:
        """Step, tell, take what there is, average."""
        move()
        if due(step, self.period):
            own = self.replicas.index
            other = partner(self.seed, step, own, self.replicas.count)
            pack(self.weights, self._x)
            if other != own:
                self._tell(other)
            with self._inbox.locked(own):
                received = self._inbox.version(own)
                if received:
                    self._inbox.get(own, self._total)
                    self._inbox.put(own, self._total[:0], 0)
            if received:
                push(self._x, self._total, received, other == own)
                unpack(self._x, self.weights)
        return step + 1

    def _tell(self, other: int) -> None:
        with self._inbox.locked(other):
            received = self._inbox.version(other)
            if received:
                self._inbox.get(other, self._total)
                self._total += self._x
            self._inbox.put(other, self._total if received else self._x, received + 1)

    def free(self) -> None:
        """Release the window."""
        self._inbox.free()
