"""Losses. Each gives one row per sample: the summed loss, its weight in the mean, a summed score, and its count.

The trainer divides the sum of losses once by the global sum of weights, before backward; ops never take means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import ClassVar

import numpy as np

from hpctrain.backends.base import Array
from hpctrain.errors import PlanError
from hpctrain.layers.base import Dims, Layer, Phase, Place, spatial_axes, tensor_axes
from hpctrain.partition import AxisNames, Shape, extent, names
from hpctrain.regions import Along

LOSS, WEIGHT, SCORE, COUNT = range(4)
"""Columns of a loss layer's output (N, 4). Mean loss: sum of LOSS / sum of WEIGHT; score: sum of SCORE / of COUNT."""
COLUMNS = 4


class Loss(Layer):
    """Inputs: predictions (N, ..., K) and targets. Output (N, 4): columns LOSS, WEIGHT, SCORE and COUNT.

    The work is one element per sample and position; positions are summed dims, and may be cut. The rows of the samples
    are dealt out among the ranks that share them.
    """

    keeps_output: ClassVar[bool] = False
    inputs: ClassVar[range] = range(2, 3)
    score: ClassVar[str]
    """What column SCORE, divided by COUNT, is called in the metrics."""
    scale: float
    """The share of the mean loss in the total that is minimised."""
    ignore: int | None = None
    """The label that counts for nothing, where there is one."""

    def output_shape(self, *x: Shape) -> Shape:
        return (x[0][0], COLUMNS)

    def work_shape(self, *x: Shape) -> Shape:
        return x[0][:-1]

    def work_axes(self, *x: Shape) -> tuple[AxisNames, ...]:
        return ("batch", *spatial_axes(len(x[0])))

    def output_axes(self, *x: Shape) -> tuple[AxisNames, ...]:
        return (tuple(chain.from_iterable(map(names, self.work_axes(*x)))), None)

    def produces(self, *x: Shape) -> Dims:
        return (Along(0), None)

    def needs(self, *x: Shape) -> tuple[Dims, ...]:
        cut = len(self.work_shape(*x))
        return tuple(tuple(Along(d) if d < cut else None for d in range(len(shape))) for shape in x)

    def flops(self, *x: Shape) -> int:
        return 8 * prod(x[0])

    def invalid(self, target: Array, classes: int) -> Array:
        """Which elements (bool) of `target` do not go with `classes` predictions; none, unless a loss says so."""
        return np.zeros(target.shape, bool)


# --- one label among classes -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SoftmaxCrossEntropy(Loss):
    """-log softmax(logits)[label] for logits (N, ..., K) and integer labels (N, ...); the score counts correct ones.

    `class_weights`, one per class, weigh each element by its label, in the mean too. Label `ignore` counts for nothing.
    `smoothing` moves that share of every label to all classes alike (Szegedy et al. 2016).
    """

    score: ClassVar[str] = "accuracy"
    smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None
    ignore: int | None = None
    scale: float = 1.0

    def output_shape(self, *x: Shape) -> Shape:
        logits, labels = x
        if len(logits) < 2 or labels != logits[:-1]:
            raise PlanError(
                f"softmax cross-entropy: logits {logits} and labels {labels}; it takes (N, ..., K) and (N, ...)"
            )
        if not 0 <= self.smoothing <= 1:
            raise PlanError(f"smoothing = {self.smoothing}; give 0 to 1")
        if self.class_weights is not None and (len(self.class_weights) != logits[-1] or min(self.class_weights) < 0):
            raise PlanError(f"class_weights = {self.class_weights}; give {logits[-1]} numbers of 0 or more")
        return super().output_shape(*x)

    def labels(self, *x: Shape) -> tuple[bool, ...]:
        return (False, True)

    def invalid(self, target: Array, classes: int) -> Array:
        wrong: Array = np.logical_or(target < 0, target >= classes)
        return wrong if self.ignore is None else wrong & (target != self.ignore)

    def kept_bytes(self, itemsize: int, output: Shape, *x: Shape) -> int:
        return itemsize * prod(x[0]) + (0 if self.ignore is None else 9 * prod(x[1]))

    def bind(self, place: Place) -> SoftmaxCrossEntropyOp:
        return SoftmaxCrossEntropyOp(self, place)


class SoftmaxCrossEntropyOp:
    """Remembers the probabilities, and the labels without those to be ignored."""

    def __init__(self, layer: SoftmaxCrossEntropy, place: Place) -> None:
        self.layer, self.backend = layer, place.backend
        classes = place.shapes[0][-1]
        self.class_weights = np.array(layer.class_weights or [1.0] * classes, place.dtype)
        self.probability = place.backend.empty(extent(place.inputs[0]), place.dtype)
        if layer.ignore is not None:
            self.counted = place.backend.empty(extent(place.inputs[1]), np.dtype(np.int64))
            self.ignored = place.backend.empty(extent(place.inputs[1]), np.dtype(bool))

    def forward(self, x: Sequence[Array], w: Mapping[str, Array], y: Array, phase: Phase) -> None:
        logits, self.labels = x
        if logits.size == 0:
            y.fill(0)
            return
        # labels out of range end the run after this step, on all ranks; until then they count for nothing
        if self.layer.ignore is not None:
            np.equal(self.labels, self.layer.ignore, out=self.ignored)
            np.copyto(self.counted, self.labels)
            np.copyto(self.counted, -1, where=self.ignored)
            self.labels = self.counted
        self.backend.cross_entropy(
            logits, self.labels, self.class_weights, self.layer.smoothing, y[:, LOSS], self.probability
        )
        self.backend.label_scores(logits, self.labels, self.class_weights, y[:, WEIGHT], y[:, SCORE], y[:, COUNT])

    def backward(self, dy: Array, w: Mapping[str, Array], dx: Sequence[Array | None], dw: Mapping[str, Array]) -> None:
        if (into := dx[0]) is not None and into.size:
            self.backend.cross_entropy_dx(
                self.probability, self.labels, self.class_weights, self.layer.smoothing, dy[:, LOSS], into
            )


# --- numbers ----------------------------------------------------------------------------------------------------------


class Elementwise(Loss):
    """Predictions and targets of one shape (N, ..., K), each element a term: all dims may be cut."""

    kind: ClassVar[str]
    """What the backend calls it."""
    score: ClassVar[str] = "mae"
    delta: float = 1.0

    def output_shape(self, *x: Shape) -> Shape:
        if len(x[0]) < 2 or x[0] != x[1]:
            raise PlanError(f"predictions {x[0]} and targets {x[1]}; it takes (N, ..., K) twice")
        return super().output_shape(*x)

    def work_shape(self, *x: Shape) -> Shape:
        return x[0]

    def work_axes(self, *x: Shape) -> tuple[AxisNames, ...]:
        return tensor_axes(len(x[0]))

    def bind(self, place: Place) -> ElementwiseOp:
        return ElementwiseOp(self, place)


@dataclass(frozen=True)
class MSE(Elementwise):
    """Mean squared error; the score is the mean absolute error."""

    kind: ClassVar[str] = "squared"
    scale: float = 1.0


@dataclass(frozen=True)
class MAE(Elementwise):
    """Mean absolute error, which is the score too."""

    kind: ClassVar[str] = "absolute"
    scale: float = 1.0


@dataclass(frozen=True)
class Huber(Elementwise):
    """d^2 / 2 of the distance d up to `delta`, and delta * (d - delta / 2) beyond; the score is the mean of d."""

    kind: ClassVar[str] = "huber"
    delta: float = 1.0
    scale: float = 1.0

    def output_shape(self, *x: Shape) -> Shape:
        if not self.delta > 0:
            raise PlanError(f"huber: delta = {self.delta}; give more than 0")
        return super().output_shape(*x)


@dataclass(frozen=True)
class BCEWithLogits(Elementwise):
    """Binary cross-entropy log(1 + exp(x)) - t * x of logits x and targets t from 0 to 1.

    The score is the share of elements where x > 0 goes with t > 0.5.
    """

    kind: ClassVar[str] = "logistic"
    score: ClassVar[str] = "accuracy"
    scale: float = 1.0


class ElementwiseOp:
    """Sums over the elements of a sample, each of weight 1."""

    def __init__(self, layer: Elementwise, place: Place) -> None:
        self.kind, self.delta, self.backend = layer.kind, layer.delta, place.backend

    def forward(self, x: Sequence[Array], w: Mapping[str, Array], y: Array, phase: Phase) -> None:
        self.x, self.target = x
        if self.x.size == 0:
            y.fill(0)
            return
        self.backend.pointwise_loss(self.kind, self.x, self.target, y[:, LOSS], self.delta)
        y[:, WEIGHT] = y[:, COUNT] = prod(self.x.shape[1:])
        if self.kind == "logistic":
            self.backend.agreement(self.x, self.target, y[:, SCORE])
        else:
            self.backend.pointwise_loss("absolute", self.x, self.target, y[:, SCORE])

    def backward(self, dy: Array, w: Mapping[str, Array], dx: Sequence[Array | None], dw: Mapping[str, Array]) -> None:
        by_x, by_target = dx
        scale = dy[:, LOSS]
        if by_x is not None and by_x.size:
            self.backend.pointwise_loss_dx(self.kind, self.x, self.target, scale, by_x, self.delta)
        if by_target is None or not by_target.size:
            return
        if self.kind == "logistic":  # linear in the target
            np.multiply(self.x, -scale.reshape(-1, *(1,) * (self.x.ndim - 1)), out=by_target)
        else:  # a function of the distance
            self.backend.pointwise_loss_dx(self.kind, self.target, self.x, scale, by_target, self.delta)
