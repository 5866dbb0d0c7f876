"""Losses. Each gives one row per sample: the summed loss, its weight (how much it counts in the mean), and a score.

The trainer divides the sum of losses once by the global sum of weights, before backward; ops never take means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hpctrain.backends.base import Array
from hpctrain.errors import PlanError
from hpctrain.layers.base import Dims, Layer, Place
from hpctrain.partition import Along, AxisNames, Shape

LOSS, WEIGHT, SCORE = range(3)
"""Columns of a loss layer's output (N, 3)."""


class Loss(Layer):
    """Inputs: predictions (N, K) and targets. Output (N, 3): columns LOSS, WEIGHT and SCORE."""

    inputs: ClassVar[range] = range(2, 3)
    score: ClassVar[str]
    """What column SCORE, divided by the weight, is called in the metrics."""

    def output_shape(self, *x: Shape) -> Shape:
        return (x[0][0], 3)

    def work_shape(self, *x: Shape) -> Shape:
        return (x[0][0],)

    def work_axes(self, *x: Shape) -> tuple[AxisNames, ...]:
        return ("batch",)

    def output_axes(self, *x: Shape) -> tuple[AxisNames, ...]:
        return ("batch", None)

    def produces(self, *x: Shape) -> Dims:
        return (Along(0), None)

    def needs(self, *x: Shape) -> tuple[Dims, ...]:
        return tuple((Along(0), *(None for _ in shape[1:])) for shape in x)

    def invalid(self, target: Array, classes: int) -> Array:
        """Which rows (bool) of `target` do not go with `classes` predictions a sample; none, unless a loss says so."""
        return np.zeros(len(target), bool)


@dataclass(frozen=True)
class SoftmaxCrossEntropy(Loss):
    """-log softmax(logits)[label] for logits (N, K) and integer labels (N,); the score counts correct predictions."""

    score: ClassVar[str] = "accuracy"

    def output_shape(self, *x: Shape) -> Shape:
        logits, labels = x
        if len(logits) != 2 or labels != logits[:1]:
            raise PlanError(f"softmax cross-entropy: logits {logits} and labels {labels}; it takes (N, K) and (N,)")
        return super().output_shape(*x)

    def invalid(self, target: Array, classes: int) -> Array:
        wrong: Array = np.logical_or(target < 0, target >= classes)
        return wrong

    def bind(self, place: Place) -> SoftmaxCrossEntropyOp:
        return SoftmaxCrossEntropyOp(place)


class SoftmaxCrossEntropyOp:
    """Remembers the probabilities."""

    def __init__(self, place: Place) -> None:
        self.backend = place.backend

    def forward(self, x: Sequence[Array], w: Mapping[str, Array], y: Array, training: bool) -> None:
        logits, labels = x
        # labels out of range end the run after this step, on all ranks; until then they must not fault
        self.labels = np.clip(labels, 0, logits.shape[1] - 1)
        self.probability = np.empty_like(logits)
        self.backend.softmax_cross_entropy(logits, self.labels, y[:, LOSS], self.probability)
        y[:, WEIGHT] = 1
        y[:, SCORE] = logits.argmax(axis=1) == labels

    def backward(self, dy: Array, w: Mapping[str, Array], dx: Sequence[Array | None], dw: Mapping[str, Array]) -> None:
        if dx[0] is not None:
            self.backend.softmax_cross_entropy_dx(self.probability, self.labels, dy[:, LOSS], dx[0])


@dataclass(frozen=True)
class MSE(Loss):
    """Mean squared error of predictions (N, K) and targets (N, K); the score is the mean absolute error."""

    score: ClassVar[str] = "mae"

    def output_shape(self, *x: Shape) -> Shape:
        if len(x[0]) != 2 or x[0] != x[1]:
            raise PlanError(f"mse: predictions {x[0]} and targets {x[1]}; it takes (N, K) twice")
        return super().output_shape(*x)

    def bind(self, place: Place) -> MSEOp:
        return MSEOp(place)


class MSEOp:
    """Sums over the K values of a sample, which weigh K."""

    def __init__(self, place: Place) -> None:
        self.backend = place.backend

    def forward(self, x: Sequence[Array], w: Mapping[str, Array], y: Array, training: bool) -> None:
        self.x, self.target = x
        self.backend.squared_error(self.x, self.target, y[:, LOSS])
        y[:, WEIGHT] = self.x.shape[1]
        y[:, SCORE] = np.abs(self.x - self.target).sum(axis=1)

    def backward(self, dy: Array, w: Mapping[str, Array], dx: Sequence[Array | None], dw: Mapping[str, Array]) -> None:
        if dx[0] is not None:
            self.backend.squared_error_dx(self.x, self.target, dy[:, LOSS], dx[0])
        if dx[1] is not None:
            self.backend.squared_error_dx(self.target, self.x, dy[:, LOSS], dx[1])
