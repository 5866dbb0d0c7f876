"""Stochastic gradient descent with momentum, Nesterov's form of it, and weight decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from hpctrain.backends.base import Backend
from hpctrain.config import Optim
from hpctrain.optim.base import Block, Shard, runs, state_like

if TYPE_CHECKING:
    from mpi4py import MPI


class SGD:
    """PyTorch's: weight decay is added to the gradient, and the learning rate multiplies the velocity."""

    arrays: ClassVar[int] = 1

    def __init__(
        self,
        blocks: Sequence[Block],
        shards: Sequence[Shard],
        backend: Backend,
        config: Optim,
        comm: MPI.Intracomm | None = None,
    ) -> None:
        self.blocks, self.runs = blocks, runs(shards)
        self.backend, self.config = backend, config
        self.state = {"velocity": state_like(blocks, shards)}
        self.updates = 0

    def step(self, lr: float) -> None:
        """One update with learning rate `lr`."""
        self.updates += 1
        for block, where, decay, at in self.runs:
            weights, gradients = self.blocks[block]
            self.backend.sgd_update(
                weights[where],
                gradients[where],
                self.state["velocity"][at],
                lr,
                self.config.momentum,
                self.config.weight_decay if decay else 0.0,
                self.config.nesterov,
            )
