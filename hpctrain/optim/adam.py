"""Adam (Kingma & Ba 2015), and with decoupled weight decay AdamW (Loshchilov & Hutter 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hpctrain.backends.base import Backend, Floats
from hpctrain.config import Optim
from hpctrain.optim.base import Shard, runs

if TYPE_CHECKING:
    from mpi4py import MPI


class Adam:
    """Steps by the running mean of the gradient over the root of that of its square, both corrected for their start.

    Weight decay is added to the gradient, or with `decoupled_decay` taken off the weights, multiplied by the learning
    rate.
    """

    def __init__(
        self,
        weights: Floats,
        gradients: Floats,
        shards: Sequence[Shard],
        backend: Backend,
        config: Optim,
        comm: MPI.Intracomm | None = None,
    ) -> None:
        self.weights, self.gradients, self.runs = weights, gradients, runs(shards)
        self.backend, self.config = backend, config
        self.state = {"mean": np.zeros_like(weights), "square": np.zeros_like(weights)}
        self.updates = 0

    def step(self, lr: float) -> None:
        """One update with learning rate `lr`."""
        self.updates += 1
        optim = self.config
        for run, decay in self.runs:
            self.backend.adam_update(
                self.weights[run],
                self.gradients[run],
                self.state["mean"][run],
                self.state["square"][run],
                lr,
                optim.beta1,
                optim.beta2,
                optim.eps,
                optim.weight_decay if decay else 0.0,
                optim.decoupled_decay,
                self.updates,
            )
