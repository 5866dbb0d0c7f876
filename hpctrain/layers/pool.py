"""Max, average and global average pooling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import ClassVar

import numpy as np

from hpctrain.backends.base import Array
from hpctrain.errors import PlanError
from hpctrain.layers.base import Dims, Layer, Place, Window, spatial_axes, tensor_axes, windows
from hpctrain.partition import Along, AxisNames, Shape


@dataclass(frozen=True)
class Pool(Layer):
    """A sliding window per channel: (N, [D,] H, W, C) to (N, [D',] H', W', C). `stride` is `kernel` unless given."""

    kernel: int | tuple[int, ...]
    stride: int | tuple[int, ...] | None = None
    padding: int | tuple[int, ...] = 0

    def windows(self, x: Shape) -> tuple[Window, ...]:
        """One window per position dim. Raises PlanError where one could lie in the padding alone."""
        found = windows(x, self.kernel, self.kernel if self.stride is None else self.stride, self.padding)
        for window in found:
            if 2 * window.padding > window.kernel:
                raise PlanError(f"pooling: padding {window.padding} is more than half of kernel {window.kernel}")
        return found

    def output_shape(self, *x: Shape) -> Shape:
        positions = (w.output(n) for w, n in zip(self.windows(x[0]), x[0][1:-1], strict=True))
        return (x[0][0], *positions, x[0][-1])

    def needs(self, *x: Shape) -> tuple[Dims, ...]:
        positions = (Along(d, window) for d, window in enumerate(self.windows(x[0]), start=1))
        return ((Along(0), *positions, Along(len(x[0]) - 1)),)

    def flops(self, *x: Shape) -> int:
        return prod(self.output_shape(*x)) * prod(w.kernel for w in self.windows(x[0]))


@dataclass(frozen=True)
class MaxPool(Pool):
    """The largest element of each window; ties go to the first global index, as a window is never divided."""

    fill: ClassVar[float] = -inf

    def bind(self, place: Place) -> MaxPoolOp:
        return MaxPoolOp(self, place)


class MaxPoolOp:
    """Remembers the winner's place in each window."""

    def __init__(self, layer: MaxPool, place: Place) -> None:
        self.backend = place.backend
        found = layer.windows(place.shapes[0])
        self.kernel, self.stride = tuple(w.kernel for w in found), tuple(w.stride for w in found)
        self.index = place.backend.empty(tuple(s.stop - s.start for s in place.output), np.dtype(np.int32))

    def forward(self, x: Sequence[Array], w: Mapping[str, Array], y: Array, training: bool) -> None:
        self.backend.max_pool(x[0], y, self.index, self.kernel, self.stride)

    def backward(self, dy: Array, w: Mapping[str, Array], dx: Sequence[Array | None], dw: Mapping[str, Array]) -> None:
        if dx[0] is not None:
            self.backend.max_pool_dx(dy, self.index, dx[0], self.kernel, self.stride)


@dataclass(frozen=True)
class AvgPool(Pool):
    """The mean of each window; `count_padding` says whether padding counts as zeros (as PyTorch's default does)."""

    count_padding: bool = True

    def bind(self, place: Place) -> AvgPoolOp:
        return AvgPoolOp(self, place)


class AvgPoolOp:
    """Divisors follow from global positions: a window at the edge of a block is not one at the edge of the image."""

    def __init__(self, layer: AvgPool, place: Place) -> None:
        self.backend = place.backend
        found = layer.windows(place.shapes[0])
        self.kernel, self.stride = tuple(w.kernel for w in found), tuple(w.stride for w in found)
        self.divisor = np.ones((1,) * len(place.output), place.dtype)
        for dim, (window, n) in enumerate(zip(found, place.shapes[0][1:-1], strict=True), start=1):
            at = range(place.output[dim].start, place.output[dim].stop)
            counts = [window.kernel if layer.count_padding else _inside(window, i, n) for i in at]
            self.divisor = self.divisor * np.array(counts, place.dtype).reshape(_along(dim, len(place.output)))

    def forward(self, x: Sequence[Array], w: Mapping[str, Array], y: Array, training: bool) -> None:
        self.backend.avg_pool(x[0], y, self.divisor, self.kernel, self.stride)

    def backward(self, dy: Array, w: Mapping[str, Array], dx: Sequence[Array | None], dw: Mapping[str, Array]) -> None:
        if dx[0] is not None:
            self.backend.avg_pool_dx(dy, dx[0], self.divisor, self.kernel, self.stride)


@dataclass(frozen=True)
class GlobalAvgPool(Layer):
    """(N, [D,] H, W, C) to (N, C): the mean over all positions. Positions are summed dims: they may be cut."""

    def output_shape(self, *x: Shape) -> Shape:
        return (x[0][0], x[0][-1])

    def work_shape(self, *x: Shape) -> Shape:
        return x[0]

    def output_axes(self, *x: Shape) -> tuple[AxisNames, ...]:
        return ("batch", ("channel", *spatial_axes(len(x[0]))))

    def work_axes(self, *x: Shape) -> tuple[AxisNames, ...]:
        return tensor_axes(len(x[0]))

    def produces(self, *x: Shape) -> Dims:
        return (Along(0), Along(len(x[0]) - 1))

    def bind(self, place: Place) -> GlobalAvgPoolOp:
        return GlobalAvgPoolOp(place)


class GlobalAvgPoolOp:
    """Sums this rank's positions, divided by the count of all positions."""

    def __init__(self, place: Place) -> None:
        self.backend = place.backend
        self.scale = 1.0 / prod(place.shapes[0][1:-1])

    def forward(self, x: Sequence[Array], w: Mapping[str, Array], y: Array, training: bool) -> None:
        self.backend.sum_positions(x[0], y, self.scale)

    def backward(self, dy: Array, w: Mapping[str, Array], dx: Sequence[Array | None], dw: Mapping[str, Array]) -> None:
        if dx[0] is not None:
            self.backend.spread_positions(dy, dx[0], self.scale)


def _inside(window: Window, output: int, n: int) -> int:
    """How many input positions the window of `output` covers without its padding."""
    start, stop = window(output, output + 1)
    return min(stop, n) - max(start, 0)


def _along(dim: int, ndim: int) -> tuple[int, ...]:
    return tuple(-1 if d == dim else 1 for d in range(ndim))
