"""LAMB (You et al. 2020, algorithm 2): Adam's step, made as long as each parameter is, times the rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from hpctrain.backends.base import Backend
from hpctrain.config import Optim
from hpctrain.optim.base import Block, Shard, places, state_like
from hpctrain.optim.norms import Norms

if TYPE_CHECKING:
    from mpi4py import MPI


class LAMB:
    """With Adam's direction r = mean / (sqrt(square) + eps), both corrected for their start, and u = r + decay * w:
    w -= lr * |w| / |u| * u.

    The norms are those of the global tensors, however they are cut and replicated. What does not decay (biases, scales
    and offsets of norms) takes Adam's step, as everybody does: it starts at 0, where this one would keep it. A
    parameter whose weights or u are all 0 has no such ratio, and is updated with 1 in its place.
    """

    arrays: ClassVar[int] = 3

    def __init__(
        self,
        blocks: Sequence[Block],
        shards: Sequence[Shard],
        backend: Backend,
        config: Optim,
        comm: MPI.Intracomm | None = None,
    ) -> None:
        self.blocks, self.shards = blocks, shards
        self.backend, self.config = backend, config
        self.state = {"mean": state_like(blocks, shards), "square": state_like(blocks, shards)}
        self.updates = 0
        self._steps = state_like(blocks, shards)
        self._norms = Norms(shards, backend, comm)

    def step(self, lr: float) -> None:
        """One update with learning rate `lr`. Collective."""
        self.updates += 1
        where = places(self.shards)
        for shard, at in zip(self.shards, where, strict=True):
            self._direction(shard, at)
        weights = [self.blocks[shard.block].weights[shard.where] for shard in self.shards]
        steps = [self._steps[at] for at in where]
        norms = self._norms.of(zip(weights, steps, strict=True))
        for shard, w, step in zip(self.shards, weights, steps, strict=True):
            size, length = norms[shard.parameter] if shard.decay else (0.0, 0.0)
            step *= lr * size / length if size > 0 and length > 0 else lr
            w -= step

    def _direction(self, shard: Shard, at: slice) -> None:
        """r + decay * w of a shard: what Adam, at the rate -1, makes of decay * w."""
        weights, gradients = self.blocks[shard.block]
        optim, step = self.config, self._steps[at]
        np.multiply(weights[shard.where], optim.weight_decay if shard.decay else 0.0, out=step)
        mean, square = self.state["mean"][at], self.state["square"][at]
        betas = optim.beta1, optim.beta2
        self.backend.adam_update(
            step, gradients[shard.where], mean, square, -1.0, *betas, optim.eps, 0.0, False, self.updates
        )
