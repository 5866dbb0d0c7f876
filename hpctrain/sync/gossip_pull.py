"""Gossip by asking: now and then a replica reads the weights of any other one, and moves halfway to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from hpctrain.comm.onesided import Vectors
from hpctrain.comm.replicas import Replicas
from hpctrain.config import Sync
from hpctrain.sync.base import Held, Stateless, pack, unpack
from hpctrain.sync.rules import due, partner, pull


class GossipPull(Stateless):
    """A replica shows its weights as they were before it averaged them; whoever is asked notices nothing."""

    lockstep = False

    def __init__(self, replicas: Replicas, held: Held, config: Sync, seed: int) -> None:
        self.replicas, self.weights, self.period, self.seed = replicas, held.weights, config.period, seed
        self._x = pack(held.weights)
        self._other = self._x.copy()
        self._shown = Vectors(replicas, self._x.size, self._x.dtype)
        self.load({})

    def update(self, step: int, move: Callable[[], None]) -> int:
        """Step, show, ask, average."""
        move()
        if due(step, self.period):
            pack(self.weights, self._x)
            self._show(step + 1)
            other = partner(self.seed, step, self.replicas.index, self.replicas.count)
            if other != self.replicas.index:
                with self._shown.locked(other, shared=True):
                    self._shown.get(other, self._other)
                pull(self._x, self._other)
                unpack(self._x, self.weights)
        return step + 1

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Show the weights."""
        pack(self.weights, self._x)
        self._show(0)
        self.replicas.across.Barrier()

    def _show(self, version: int) -> None:
        with self._shown.locked(self.replicas.index):
            self._shown.put(self.replicas.index, self._x, version)

    def free(self) -> None:
        """Release the window."""
        self._shown.free()
