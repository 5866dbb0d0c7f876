"""Adam (Kingma & Ba 2015), and with decoupled weight decay AdamW (Loshchilov & Hutter 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from hpctrain.backends.base import Backend
from hpctrain.config import Optim
from hpctrain.optim.base import Block, Shard, runs, state_like

if TYPE_CHECKING:
    from mpi4py import MPI


class Adam:
    """Steps by the running mean of the gradient over the root of that of its square, both corrected for their start.

    Weight decay is added to the gradient, or with `decoupled_decay` taken off the weights, multiplied by the learning
    rate.
    """

    arrays: ClassVar[int] = 2

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
        self.state = {"mean": state_like(blocks, shards), "square": state_like(blocks, shards)}
        self.updates = 0

    def step(self, lr: float) -> None:
        """One update with learning rate `lr`."""
        self.updates += 1
        optim = self.config
        for block, where, decay, at in self.runs:
            weights, gradients = self.blocks[block]
            self.backend.adam_update(
                weights[where],
                gradients[where],
                self.state["mean"][at],
                self.state["square"][at],
                lr,
                optim.beta1,
                optim.beta2,
                optim.eps,
                optim.weight_decay if decay else 0.0,
                optim.decoupled_decay,
                self.updates,
            )
