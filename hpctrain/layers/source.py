"""Where tensors enter a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hpctrain.errors import PlanError
from hpctrain.layers.base import Layer, Op, Place, spatial_axes, tensor_axes
from hpctrain.partition import AxisNames, Shape


@dataclass(frozen=True)
class Input(Layer):
    """A tensor of `shape` that the loader fills: of the run's float type, channels last; or int64 where `integer`.

    Integers are labels without a channel dim: (N,) one per sample, (N, H, W) or (N, D, H, W) one per position.
    """

    inputs: ClassVar[range] = range(1)
    shape: Shape
    integer: bool = False

    def output_shape(self, *x: Shape) -> Shape:
        if not 1 <= len(self.shape) <= (4 if self.integer else 5):
            most = "labels (N, D, H, W)" if self.integer else "(N, D, H, W, C)"
            raise PlanError(f"{len(self.shape)} dims; give at most {most}")
        return self.shape

    def work_axes(self, *x: Shape) -> tuple[AxisNames, ...]:
        if self.integer:
            return ("batch", *spatial_axes(len(self.shape) + 1))
        return tensor_axes(len(self.shape))

    def flops(self, *x: Shape) -> int:
        return 0

    def bind(self, place: Place) -> Op:
        raise PlanError("an input has no op: the loader fills it")
