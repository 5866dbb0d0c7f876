"""Layers that join several tensors into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hpctrain.backends.base import Array
from hpctrain.errors import PlanError
from hpctrain.layers.base import Layer, Place
from hpctrain.partition import Shape


@dataclass(frozen=True)
class Add(Layer):
    """The sum of two or more tensors of one shape (a residual connection)."""

    inputs: ClassVar[range] = range(2, 100)

    def output_shape(self, *x: Shape) -> Shape:
        if len(set(x)) > 1:
            raise PlanError(f"add: inputs {', '.join(map(str, x))}; give two or more of the same shape")
        return x[0]

    def bind(self, place: Place) -> AddOp:
        return AddOp(place)


class AddOp:
    """Adds in the order of the inputs."""

    def __init__(self, place: Place) -> None:
        self.backend = place.backend

    def forward(self, x: Sequence[Array], w: Mapping[str, Array], y: Array, training: bool) -> None:
        self.backend.add(x[0], x[1], y)
        for more in x[2:]:
            self.backend.add(y, more, y)

    def backward(self, dy: Array, w: Mapping[str, Array], dx: Sequence[Array | None], dw: Mapping[str, Array]) -> None:
        for into in dx:
            if into is not None:
                np.copyto(into, dy)
