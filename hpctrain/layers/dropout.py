"""Dropout whose mask depends on seed, step, layer and global position alone: the same on every plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np

from hpctrain import randomness
from hpctrain.backends.base import Array
from hpctrain.errors import PlanError
from hpctrain.layers.base import Layer, Phase, Place
from hpctrain.partition import Box, Shape, extent, volume, within

SLAB = 2**15
"""Random words, of 8 bytes, drawn at a time: few, as they and the stream that they come from are temporary."""


@dataclass(frozen=True)
class Dropout(Layer):
    """Sets each element to 0 with probability `rate` and divides the others by 1 - rate; any shape (N, ...).

    With `whole_channels`, all positions of a sample's channel are dropped together (Tompson et al. 2015). In evaluation
    y = x.
    """

    keeps_inputs: ClassVar[bool] = False
    keeps_output: ClassVar[bool] = False
    rate: float = 0.5
    whole_channels: bool = False

    def output_shape(self, *x: Shape) -> Shape:
        if not 0 <= self.rate < 1:
            raise PlanError(f"dropout: rate = {self.rate}; give the share to drop, from 0 up to but without 1")
        if self.whole_channels and len(x[0]) < 3:
            raise PlanError(f"dropout: the input {x[0]} has no positions; leave out whole_channels")
        return x[0]

    def kept_bytes(self, itemsize: int, output: Shape, *x: Shape) -> int:
        return output[0] * output[-1] if self.whole_channels else prod(output)

    def bind(self, place: Place) -> DropoutOp:
        return DropoutOp(self, place)


class DropoutOp:
    """Holds the mask of the last training pass, a byte per element, for its gradient."""

    def __init__(self, layer: Dropout, place: Place) -> None:
        self.name, self.seed, self.rate = place.name, place.seed, layer.rate
        self.shape, self.box = place.shapes[0], place.output
        if layer.whole_channels:
            self.shape = (self.shape[0], *(1 for _ in self.shape[1:-1]), self.shape[-1])
            self.box = (self.box[0], *(slice(0, 1) for _ in self.box[1:-1]), self.box[-1])
        self.kept = np.empty(extent(self.box), bool)
        self.dropping = False

    def _draw(self, step: int) -> None:
        """A word of 64 random bits decides on each element of the mask."""
        least = np.uint64(int(self.rate * 2.0**64))
        for slab in slabs(self.box):
            drawn = randomness.words(self.seed, f"{self.name}.dropout.{step}", self.shape, slab)
            np.greater_equal(drawn, least, out=self.kept[within(slab, self.box)])

    def forward(self, x: Sequence[Array], w: Mapping[str, Array], y: Array, phase: Phase) -> None:
        self.dropping = phase.training and self.rate > 0
        if self.dropping:
            self._draw(phase.step)
        self._scale(x[0], y)

    def backward(self, dy: Array, w: Mapping[str, Array], dx: Sequence[Array | None], dw: Mapping[str, Array]) -> None:
        if dx[0] is not None:
            self._scale(dy, dx[0])

    def _scale(self, x: Array, y: Array) -> None:
        if self.dropping:
            np.multiply(x, self.kept, out=y)
            y *= y.dtype.type(1.0 / (1.0 - self.rate))
        else:
            np.copyto(y, x)


def slabs(box: Box) -> Iterator[Box]:
    """`box` in parts of at most SLAB elements, halved along its first dims."""
    dim = next((d for d, n in enumerate(extent(box)) if n > 1), None)
    if dim is None or volume(box) <= SLAB:
        yield box
        return
    middle = (box[dim].start + box[dim].stop) // 2
    for half in (slice(box[dim].start, middle), slice(middle, box[dim].stop)):
        yield from slabs((*box[:dim], half, *box[dim + 1 :]))
