"""Where tensors enter a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hpctrain.errors import PlanError
from hpctrain.layers.base import Layer, Op, Place
from hpctrain.partition import Shape


@dataclass(frozen=True)
class Input(Layer):
    """A tensor of `shape` that the loader fills: int64 where `integer` (labels), else of the run's float type."""

    inputs: ClassVar[range] = range(1)
    shape: Shape
    integer: bool = False

    def output_shape(self, *x: Shape) -> Shape:
        return self.shape

    def flops(self, *x: Shape) -> int:
        return 0

    def bind(self, place: Place) -> Op:
        raise PlanError("an input has no op: the loader fills it")
