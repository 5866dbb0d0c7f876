"""Elastic averaging (EASGD, Zhang et al. 2015): replicas are tied to a centre, which is tied to them, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from hpctrain.comm.onesided import Vectors
from hpctrain.comm.replicas import Replicas
from hpctrain.config import Sync
from hpctrain.partition import split
from hpctrain.sync.base import Held, pack, size_of, views
from hpctrain.sync.rules import due, elastic_pull, elastic_rate


class Elastic:
    """The centre lies in windows, a share of it in every replica; at first it is the weights that all start from."""

    lockstep = False

    def __init__(self, replicas: Replicas, held: Held, config: Sync, seed: int) -> None:
        self.replicas, self.weights, self.period = replicas, held.weights, config.period
        self.rate = elastic_rate(replicas.count) if config.rate is None else config.rate
        size = size_of(held.weights)
        self._shares = [slice(*split(size, replicas.count, r)) for r in range(replicas.count)]
        self._x = pack(held.weights)
        self._centre = Vectors(replicas, max(s.stop - s.start for s in self._shares), self._x.dtype)
        self._place(self._x)

    def update(self, step: int, move: Callable[[], None]) -> int:
        """The optimizer's part is by the weights before the exchange; both moves are added to these."""
        if not due(step, self.period):
            move()
            return step + 1
        taken = self._exchange()
        move()
        for array, moved in zip(self.weights, views(taken, self.weights), strict=True):
            array -= moved
        return step + 1

    def _exchange(self) -> np.ndarray:
        """Move the centre towards this replica's weights; what these are still to be moved by."""
        x = pack(self.weights, self._x)
        for i in range(self.replicas.count):
            owner = (self.replicas.index + i) % self.replicas.count  # so that not all begin at the same one
            share = self._shares[owner]
            centre = np.empty(share.stop - share.start, x.dtype)
            with self._centre.locked(owner):
                count = self._centre.get(owner, centre)
                taken = elastic_pull(x[share], centre, self.rate)
                centre += taken
                self._centre.put(owner, centre, count + 1)
            x[share] = taken
        return x

    def state(self) -> Mapping[str, np.ndarray]:
        """The centre."""
        self.replicas.across.Barrier()  # all exchanges have been made
        whole = np.empty_like(self._x)
        for owner, share in enumerate(self._shares):
            with self._centre.locked(owner, shared=True):
                self._centre.get(owner, whole[share])
        return {"centre": whole}

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Take the centre of a checkpoint, or where it has none the weights, which then are the same everywhere."""
        self._place(state["centre"] if "centre" in state else pack(self.weights))

    def _place(self, centre: np.ndarray) -> None:
        own = self.replicas.index
        with self._centre.locked(own):
            self._centre.put(own, centre[self._shares[own]], 0)
        self.replicas.across.Barrier()

    def free(self) -> None:
        """Release the window."""
        self._centre.free()
