"""Fully connected layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import ClassVar

from hpctrain.backends.base import Array
from hpctrain.errors import PlanError
from hpctrain.layers.base import Dims, Layer, Phase, Place, Weight
from hpctrain.layers.conv import covers_all, own_part, through_tail
from hpctrain.partition import AxisNames, Shape
from hpctrain.regions import Along


@dataclass(frozen=True)
class Dense(Layer):
    """y (N, units) = x (N, C) weight (C, units) + bias (units,).

    Work (N, units, C): axis "channel" cuts units, "contraction" cuts C, whose partial sums are reduce-scattered.
    """

    keeps_output: ClassVar[bool] = False
    takes_tail: ClassVar[bool] = True
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
    """Three matrix products, the first with bias and activation."""

    def __init__(self, place: Place) -> None:
        self.backend = place.backend
        self.own_bias, self.slope = own_part(place), place.tail.slope

    def forward(self, x: Sequence[Array], w: Mapping[str, Array], y: Array, phase: Phase) -> None:
        self.x, self.y = x[0], y
        inside = covers_all(self.own_bias, y)
        self.backend.gemm(self.x, w["weight"], y, bias=w["bias"] if inside else None, slope=self.slope)
        if self.own_bias is not None and not inside:
            self.backend.bias_add(y[:, self.own_bias], w["bias"])

    def backward(self, dy: Array, w: Mapping[str, Array], dx: Sequence[Array | None], dw: Mapping[str, Array]) -> None:
        through_tail(self.backend, dy, self.y, self.own_bias, self.slope, dw)
        self.backend.gemm(self.x, dy, dw["weight"], transpose_a=True)
        if dx[0] is not None:
            self.backend.gemm(dy, w["weight"], dx[0], transpose_b=True)
