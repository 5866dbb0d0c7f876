"""Fully connected layer, and the reshape in front of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt

import numpy as np

from hpctrain.backends.base import Array
from hpctrain.errors import PlanError
from hpctrain.layers.base import Dims, Layer, Place, Weight, spatial_axes
from hpctrain.layers.conv import own_part
from hpctrain.partition import Along, AxisNames, Interval, Shape, extent


@dataclass(frozen=True)
class Dense(Layer):
    """y (N, units) = x (N, C) weight (C, units) + bias (units,).

    Work (N, units, C): axis "channel" cuts units, "contraction" cuts C, whose partial sums are reduce-scattered.
    """

    units: int
    bias: bool = True

    def output_shape(self, *x: Shape) -> Shape:
        if self.units < 1:
            raise PlanError(f"units = {self.units}; give 1 or more")
        if len(x[0]) != 2:
            raise PlanError(f"dense: the input {x[0]} has {len(x[0])} dims, not (N, C); put a Flatten before it")
        return (x[0][0], self.units)

    def work_shape(self, *x: Shape) -> Shape:
        return (*self.output_shape(*x), x[0][1])

    def work_axes(self, *x: Shape) -> tuple[AxisNames, ...]:
        return ("batch", "channel", "contraction")

    def output_axes(self, *x: Shape) -> tuple[AxisNames, ...]:
        return ("batch", ("channel", "contraction"))

    def needs(self, *x: Shape) -> tuple[Dims, ...]:
        return ((Along(0), Along(2)),)

    def weights(self, *x: Shape) -> dict[str, Weight]:
        inputs = x[0][1]
        found = {
            "weight": Weight(
                (inputs, self.units), ("contraction", "channel"), ("normal", sqrt(2.0 / inputs)), decay=True
            )
        }
        if self.bias:
            found["bias"] = Weight((self.units,), (("channel", "contraction"),), ("constant", 0.0))
        return found

    def flops(self, *x: Shape) -> int:
        return 2 * prod(self.work_shape(*x))

    def bind(self, place: Place) -> DenseOp:
        return DenseOp(place)


class DenseOp:
    """Three matrix products."""

    def __init__(self, place: Place) -> None:
        self.backend = place.backend
        self.own_bias = own_part(place)

    def forward(self, x: Sequence[Array], w: Mapping[str, Array], y: Array, training: bool) -> None:
        self.x = x[0]
        self.backend.gemm(self.x, w["weight"], y)
        if self.own_bias is not None:
            self.backend.bias_add(y[:, self.own_bias], w["bias"])

    def backward(self, dy: Array, w: Mapping[str, Array], dx: Sequence[Array | None], dw: Mapping[str, Array]) -> None:
        self.backend.gemm(self.x, dy, dw["weight"], transpose_a=True)
        if self.own_bias is not None:
            self.backend.bias_grad(dy[:, self.own_bias], dw["bias"])
        if dx[0] is not None:
            self.backend.gemm(dy, w["weight"], dx[0], transpose_b=True)


@dataclass(frozen=True)
class Flatten(Layer):
    """(N, [D,] H, W, C) to (N, D*H*W*C), in C order; the one output dim is cut along all that cut the input's dims."""

    def output_shape(self, *x: Shape) -> Shape:
        return (x[0][0], prod(x[0][1:]))

    def work_axes(self, *x: Shape) -> tuple[AxisNames, ...]:
        return ("batch", (*spatial_axes(len(x[0])), "channel"))

    def needs(self, *x: Shape) -> tuple[Dims, ...]:
        dims = x[0][1:]
        return ((Along(0), *(Along(1, FlatRun(dims, d)) for d in range(len(dims)))),)

    def bind(self, place: Place) -> FlattenOp:
        return FlattenOp(place)


@dataclass(frozen=True)
class FlatRun:
    """The interval along `dim` of the smallest box of a tensor of `shape` that holds flat indices [start, stop)."""

    shape: Shape
    dim: int

    def __call__(self, start: int, stop: int) -> Interval:
        n, inner = self.shape[self.dim], prod(self.shape[self.dim + 1 :])
        first, last = start // inner, (stop - 1) // inner
        if first // n != last // n:  # the run passes from one row of this dim to the next: all of it is needed
            return 0, n
        return first % n, last % n + 1


class FlattenOp:
    """Copies the run of flat indices out of the box that holds it."""

    def __init__(self, place: Place) -> None:
        box, shape = place.inputs[0], place.shapes[0]
        corner = np.ravel_multi_index([s.start for s in box[1:]], shape[1:]) if prod(extent(box)) else 0
        # within the box the run is contiguous: every dim after the first that is cut is taken whole
        start = place.work[1].start - int(corner)
        self.run = slice(start, start + place.work[1].stop - place.work[1].start)

    def forward(self, x: Sequence[Array], w: Mapping[str, Array], y: Array, training: bool) -> None:
        np.copyto(y, x[0].reshape(len(x[0]), -1)[:, self.run])

    def backward(self, dy: Array, w: Mapping[str, Array], dx: Sequence[Array | None], dw: Mapping[str, Array]) -> None:
        if dx[0] is not None:
            flat = np.zeros((len(dy), prod(dx[0].shape[1:])), dx[0].dtype)
            flat[:, self.run] = dy
            np.copyto(dx[0], flat.reshape(dx[0].shape))
