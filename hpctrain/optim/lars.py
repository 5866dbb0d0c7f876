"""Layer-wise adaptive rate scaling (You, Gitman & Ginsburg 2017, algorithm 1): momentum with a rate per parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from hpctrain.backends.base import Backend
from hpctrain.config import Optim
from hpctrain.optim.base import Block, Shard, places, state_like
from hpctrain.optim.norms import Norms

if TYPE_CHECKING:
    from mpi4py import MPI


class LARS:
    """The rate of a parameter w with gradient g is lr * trust_coefficient * |w| / (|g| + weight_decay * |w|).

    The norms are those of the global tensors, however they are cut and replicated. What does not decay (biases, scales
    and offsets of norms) is updated with lr itself, as everybody does: it starts at 0, where this rate would keep it.
    So is a parameter whose weights or gradients are all 0. The velocity holds the rate, as in the paper: other than
    with SGD, a rate that falls does not shorten the steps of gradients past.
    """

    arrays: ClassVar[int] = 1

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
        self.state = {"velocity": state_like(blocks, shards)}
        self.updates = 0
        self._norms = Norms(shards, backend, comm)

    def step(self, lr: float) -> None:
        """One update with learning rate `lr`. Collective."""
        self.updates += 1
        optim, ratios = self.config, self._trust_ratios()
        for shard, at in zip(self.shards, places(self.shards), strict=True):
            weights, gradients = self.blocks[shard.block]
            self.backend.lars_update(
                weights[shard.where],
                gradients[shard.where],
                self.state["velocity"][at],
                lr * ratios[shard.parameter] if shard.decay else lr,
                optim.momentum,
                optim.weight_decay if shard.decay else 0.0,
            )

    def _trust_ratios(self) -> dict[int, float]:
        """By parameter that decays."""
        cut = [(self.blocks[shard.block], shard.where) for shard in self.shards]
        norms = self._norms.of((block.weights[where], block.gradients[where]) for block, where in cut)
        trust, decay = self.config.trust_coefficient, self.config.weight_decay
        return {of: trust * w / (g + decay * w) if w > 0 and g > 0 else 1.0 for of, (w, g) in norms.items()}
