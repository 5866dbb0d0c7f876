"""Max, average and global average pooling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import ClassVar

import numpy as np

from hpctrain.backends.base import Array
from hpctrain.errors import PlanError
from hpctrain.layers.base import Dims, Layer, Phase, Place, spatial_axes, tensor_axes
from hpctrain.layers.window import Number, Padding, Window, windows
from hpctrain.partition import AxisNames, Shape
from hpctrain.precision import exact
from hpctrain.regions import Along


@dataclass(frozen=True)
class MaxPool(Layer):
    """The largest element of each window: (N, [D,] H, W, C) to (N, [D',] H', W', C). `stride` is `kernel` unless given.

    Ties go to the first global index, as a window is never divided. With `ceil`, a last window may reach past the
    padding.
    """

    keeps_inputs: ClassVar[bool] = False
    keeps_output: ClassVar[bool] = False
    kernel: Number
    stride: Number | None = None
    padding: Padding = 0
    dilation: Number = 1
    ceil: bool = False
    fill: ClassVar[float] = -inf

    def windows(self, x: Shape) -> tuple[Window, ...]:
        """One window per position dim."""
        return pool_windows(x, self.kernel, self.stride, self.padding, self.dilation, self.ceil)

    def output_shape(self, *x: Shape) -> Shape:
        return pooled_shape(self.windows(x[0]), x[0])

    def needs(self, *x: Shape) -> tuple[Dims, ...]:
        return (pool_needs(self.windows(x[0])),)

    def flops(self, *x: Shape) -> int:
        return prod(self.output_shape(*x)) * prod(w.kernel for w in self.windows(x[0]))

    def kept_bytes(self, itemsize: int, output: Shape, *x: Shape) -> int:
        return 4 * prod(output)

    def bind(self, place: Place) -> MaxPoolOp:
        return MaxPoolOp(self, place)


class MaxPoolOp:
    """Remembers the winner's place in each window."""

    def __init__(self, layer: MaxPool, place: Place) -> None:
        self.backend = place.backend
        found = layer.windows(place.shapes[0])
        self.kernel, self.stride = tuple(w.kernel for w in found), tuple(w.stride for w in found)
        self.dilation = tuple(w.dilation for w in found)
        self.index = place.backend.empty(tuple(s.stop - s.start for s in place.output), np.dtype(np.int32))

    def forward(self, x: Sequence[Array], w: Mapping[str, Array], y: Array, phase: Phase) -> None:
        self.backend.max_pool(x[0], y, self.index, self.kernel, self.stride, self.dilation)

    def backward(self, dy: Array, w: Mapping[str, Array], dx: Sequence[Array | None], dw: Mapping[str, Array]) -> None:
        if dx[0] is not None:
            self.backend.max_pool_dx(dy, self.index, dx[0], self.kernel, self.stride, self.dilation)


@dataclass(frozen=True)
class AvgPool(Layer):
    """The mean of each window: (N, [D,] H, W, C) to (N, [D',] H', W', C). `stride` is `kernel` unless given.

    `count_padding` says whether padding counts as zeros (as PyTorch's default does). With `ceil`, a last window may
    reach past the padding; what lies there never counts.
    """

    keeps_inputs: ClassVar[bool] = False
    keeps_output: ClassVar[bool] = False
    kernel: Number
    stride: Number | None = None
    padding: Padding = 0
    ceil: bool = False
    count_padding: bool = True

    def windows(self, x: Shape) -> tuple[Window, ...]:
        """One window per position dim."""
        return pool_windows(x, self.kernel, self.stride, self.padding, 1, self.ceil)

    def output_shape(self, *x: Shape) -> Shape:
        return pooled_shape(self.windows(x[0]), x[0])

    def needs(self, *x: Shape) -> tuple[Dims, ...]:
        return (pool_needs(self.windows(x[0])),)

    def flops(self, *x: Shape) -> int:
        return prod(self.output_shape(*x)) * prod(w.kernel for w in self.windows(x[0]))

    def bind(self, place: Place) -> AvgPoolOp:
        return AvgPoolOp(self, place)


class AvgPoolOp:
    """Divisors follow from global positions: a window at the edge of a block is not one at the edge of the image."""

    def __init__(self, layer: AvgPool, place: Place) -> None:
        self.backend = place.backend
        found = layer.windows(place.shapes[0])
        self.kernel, self.stride = tuple(w.kernel for w in found), tuple(w.stride for w in found)
        ndim = len(place.output)
        self.divisor = np.ones((1,) * ndim, exact(place.dtype))
        for dim, (window, n) in enumerate(zip(found, place.shapes[0][1:-1], strict=True), start=1):
            at = range(place.output[dim].start, place.output[dim].stop)
            counts = [_counted(window, i, n, layer.count_padding) for i in at]
            along = tuple(-1 if d == dim else 1 for d in range(ndim))
            self.divisor = self.divisor * np.array(counts, exact(place.dtype)).reshape(along)

    def forward(self, x: Sequence[Array], w: Mapping[str, Array], y: Array, phase: Phase) -> None:
        self.backend.avg_pool(x[0], y, self.divisor, self.kernel, self.stride)

    def backward(self, dy: Array, w: Mapping[str, Array], dx: Sequence[Array | None], dw: Mapping[str, Array]) -> None:
        if dx[0] is not None:
            self.backend.avg_pool_dx(dy, dx[0], self.divisor, self.kernel, self.stride)


@dataclass(frozen=True)
class GlobalAvgPool(Layer):
    """(N, [D,] H, W, C) to (N, C): the mean over all positions. Positions are summed dims: they may be cut."""

    keeps_inputs: ClassVar[bool] = False
    keeps_output: ClassVar[bool] = False

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

    def forward(self, x: Sequence[Array], w: Mapping[str, Array], y: Array, phase: Phase) -> None:
        self.backend.sum_positions(x[0], y, self.scale)

    def backward(self, dy: Array, w: Mapping[str, Array], dx: Sequence[Array | None], dw: Mapping[str, Array]) -> None:
        if dx[0] is not None:
            self.backend.spread_positions(dy, dx[0], self.scale)


# --- what pools share ------------------------------------------------------------------------------------------------


def pool_windows(
    x: Shape, kernel: Number, stride: Number | None, padding: Padding, dilation: Number, ceil: bool
) -> tuple[Window, ...]:
    """One window per position dim. Raises PlanError where one could lie in the padding alone."""
    found = windows(x, kernel, kernel if stride is None else stride, padding, dilation, ceil)
    for window in found:
        if 2 * max(window.before, window.after) > window.reach:
            raise PlanError(
                f"pooling: padding {window.before} and {window.after}; give at most half of the window, "
                f"{window.reach // 2}"
            )
    return found


def pooled_shape(found: Sequence[Window], x: Shape) -> Shape:
    """The output shape for an input of shape `x`."""
    return (x[0], *(w.output(n) for w, n in zip(found, x[1:-1], strict=True)), x[-1])


def pool_needs(found: Sequence[Window]) -> Dims:
    """The input of a pool, dim by dim."""
    return (Along(0), *(Along(d, window) for d, window in enumerate(found, start=1)), Along(len(found) + 1))


def _counted(window: Window, output: int, n: int, padding: bool) -> int:
    """How many elements of an input of `n`, with or without its padding, the window of `output` covers."""
    start, stop = window(output, output + 1)
    return min(stop, n + window.after) - start if padding else min(stop, n) - max(start, 0)
