"""Stochastic gradient descent with momentum, Nesterov's form of it, and weight decay."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hpctrain.backends.base import Backend, Floats
from hpctrain.config import Optim


class SGD:
    """Updates flat `weights` (n,) from `gradients` (n,); decays only the runs (stretch, True).

    `state` holds what a checkpoint must keep, by name, shaped like `weights`.
    """

    def __init__(
        self,
        weights: Floats,
        gradients: Floats,
        runs: Sequence[tuple[slice, bool]],
        backend: Backend,
        config: Optim,
    ) -> None:
        self.weights, self.gradients, self.runs = weights, gradients, runs
        self.backend, self.config = backend, config
        self.state = {"velocity": np.zeros_like(weights)}

    def step(self, lr: float) -> None:
        """One update with learning rate `lr`."""
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
