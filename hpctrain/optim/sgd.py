"""Stochastic gradient descent with momentum, Nesterov's form of it, and weight decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hpctrain.backends.base import Backend, Floats
from hpctrain.config import Optim
from hpctrain.optim.base import Shard, runs

if TYPE_CHECKING:
    from mpi4py import MPI


class SGD:
    """PyTorch's: weight decay is added to the gradient, and the learning rate multiplies the velocity."""

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
        self.state = {"velocity": np.zeros_like(weights)}
        self.updates = 0

    def step(self, lr: float) -> None:
        """One update with learning rate `lr`."""
        self.updates += 1
        for run, decay in self.runs:
            self.backend.sgd_update(
                self.weights[run],
                self.gradients[run],
                self.state["velocity"][run],
                lr,
                self.config.momentum,
                self.config.weight_decay if decay else 0.0,
                self.config.nesterov,
            )
