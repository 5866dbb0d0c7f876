"""Elementwise functions of one tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpctrain.backends.base import Array
from hpctrain.layers.base import Layer, Place
from hpctrain.partition import Shape


@dataclass(frozen=True)
class ReLU(Layer):
    """y = max(x, 0)."""

    def output_shape(self, *x: Shape) -> Shape:
        return x[0]

    def bind(self, place: Place) -> ReLUOp:
        return ReLUOp(place)


class ReLUOp:
    """Remembers its output, which says where the gradient passes."""

    def __init__(self, place: Place) -> None:
        self.backend = place.backend

    def forward(self, x: Sequence[Array], w: Mapping[str, Array], y: Array, training: bool) -> None:
        self.y = y
        self.backend.relu(x[0], y)

    def backward(self, dy: Array, w: Mapping[str, Array], dx: Sequence[Array | None], dw: Mapping[str, Array]) -> None:
        if dx[0] is not None:
            self.backend.relu_dx(dy, self.y, dx[0])
