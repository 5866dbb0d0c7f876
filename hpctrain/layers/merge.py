"""Layers that join several tensors into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import ClassVar

import numpy as np

from hpctrain.backends.base import Array
from hpctrain.errors import PlanError
from hpctrain.layers.base import Dims, Layer, Phase, Place
from hpctrain.layers.shape import dim_of
from hpctrain.partition import Interval, Shape
from hpctrain.regions import Along

SEVERAL = range(2, 100)


@dataclass(frozen=True)
class Add(Layer):
    """The sum of two or more tensors of one shape (a residual connection)."""

    keeps_inputs: ClassVar[bool] = False
    keeps_output: ClassVar[bool] = False
    inputs: ClassVar[range] = SEVERAL

    def output_shape(self, *x: Shape) -> Shape:
        return one_shape("add", x)

    def flops(self, *x: Shape) -> int:
        return (len(x) - 1) * prod(x[0])

    def bind(self, place: Place) -> AddOp:
        return AddOp(place)


class AddOp:
    """Adds in the order of the inputs."""

    def __init__(self, place: Place) -> None:
        self.backend = place.backend

    def forward(self, x: Sequence[Array], w: Mapping[str, Array], y: Array, phase: Phase) -> None:
        self.backend.add(x[0], x[1], y)
        for more in x[2:]:
            self.backend.add(y, more, y)

    def backward(self, dy: Array, w: Mapping[str, Array], dx: Sequence[Array | None], dw: Mapping[str, Array]) -> None:
        for into in dx:
            if into is not None:
                np.copyto(into, dy)


@dataclass(frozen=True)
class Multiply(Layer):
    """The product, element by element, of two or more tensors of one shape (a gate)."""

    keeps_output: ClassVar[bool] = False
    inputs: ClassVar[range] = SEVERAL

    def output_shape(self, *x: Shape) -> Shape:
        return one_shape("multiply", x)

    def flops(self, *x: Shape) -> int:
        return (len(x) - 1) * prod(x[0])

    def bind(self, place: Place) -> MultiplyOp:
        return MultiplyOp(place)


class MultiplyOp:
    """Multiplies in the order of the inputs. A gradient is the product of the others: the quotient y / x has zeros."""

    def __init__(self, place: Place) -> None:
        self.backend = place.backend

    def forward(self, x: Sequence[Array], w: Mapping[str, Array], y: Array, phase: Phase) -> None:
        self.x = x
        self.backend.multiply(x[0], x[1], y)
        for more in x[2:]:
            self.backend.multiply(y, more, y)

    def backward(self, dy: Array, w: Mapping[str, Array], dx: Sequence[Array | None], dw: Mapping[str, Array]) -> None:
        for i, into in enumerate(dx):
            if into is None:
                continue
            first, *more = (x for j, x in enumerate(self.x) if j != i)
            self.backend.multiply(dy, first, into)
            for other in more:
                self.backend.multiply(into, other, into)


def one_shape(layer: str, x: tuple[Shape, ...]) -> Shape:
    """The shape that all inputs have. Raises PlanError where they differ."""
    if len(set(x)) > 1:
        raise PlanError(f"{layer}: inputs {', '.join(map(str, x))}; give two or more of the same shape")
    return x[0]


# --- concatenation ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Concat(Layer):
    """Two or more tensors one after the other along `dim` (-1: channels); their other extents are the same.

    `dim` may be any but the batch, and may be cut: a block of the output needs nothing of an input outside it.
    """

    keeps_inputs: ClassVar[bool] = False
    keeps_output: ClassVar[bool] = False
    inputs: ClassVar[range] = SEVERAL
    dim: int = -1

    def output_shape(self, *x: Shape) -> Shape:
        dim = dim_of(self.dim, x[0], "concat")
        if len({(*shape[:dim], *shape[dim + 1 :]) for shape in x}) > 1 or len({len(shape) for shape in x}) > 1:
            raise PlanError(
                f"concat: inputs {', '.join(map(str, x))} along dim {dim}; give tensors that differ there alone"
            )
        return (*x[0][:dim], sum(shape[dim] for shape in x), *x[0][dim + 1 :])

    def needs(self, *x: Shape) -> tuple[Dims, ...]:
        dim = dim_of(self.dim, x[0], "concat")
        return tuple(
            tuple(Along(d, Part(start, shape[dim])) if d == dim else Along(d) for d in range(len(shape)))
            for start, shape in zip(starts(x, dim), x, strict=True)
        )

    def bind(self, place: Place) -> ConcatOp:
        return ConcatOp(self, place)


@dataclass(frozen=True)
class Part:
    """What an interval of a concatenation needs of the input of extent `n` that begins at `start`; maybe nothing."""

    start: int
    n: int

    def __call__(self, start: int, stop: int) -> Interval:
        return min(max(start - self.start, 0), self.n), min(max(stop - self.start, 0), self.n)


class ConcatOp:
    """Copies each input's part to its place in the output's box."""

    def __init__(self, layer: Concat, place: Place) -> None:
        dim = dim_of(layer.dim, place.shapes[0], "concat")
        self.places = []
        for begin, box in zip(starts(place.shapes, dim), place.inputs, strict=True):
            at = begin + box[dim].start - place.output[dim].start
            self.places.append((slice(None),) * dim + (slice(at, at + box[dim].stop - box[dim].start),))

    def forward(self, x: Sequence[Array], w: Mapping[str, Array], y: Array, phase: Phase) -> None:
        for part, place in zip(x, self.places, strict=True):
            if part.size:  # what lies outside the box has no place in it
                np.copyto(y[place], part)

    def backward(self, dy: Array, w: Mapping[str, Array], dx: Sequence[Array | None], dw: Mapping[str, Array]) -> None:
        for into, place in zip(dx, self.places, strict=True):
            if into is not None and into.size:
                np.copyto(into, dy[place])


def starts(x: tuple[Shape, ...], dim: int) -> list[int]:
    """Where each input begins along the concatenated dim."""
    return [0, *accumulate(shape[dim] for shape in x)][: len(x)]
