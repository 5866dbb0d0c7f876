"""What every layer says (Layer, frozen, no arrays) and what every bound layer does (Op, purely local).

The work of a layer is a tensor of its own: its output's dims, then any dims that it sums over (input channels of a
convolution). A rank does one box of the work. From that box follow, dim by dim, the boxes of input it `needs` and the
box of output it `produces`; where summed dims are cut, that is a partial sum of a box that others also produce.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np

from hpctrain.backends.base import Array, Backend
from hpctrain.errors import PlanError
from hpctrain.partition import Along, AxisNames, Box, Distribution, Interval, Partition, Shape

if TYPE_CHECKING:
    from mpi4py import MPI

SPATIAL = ("depth", "height", "width")
Dims = tuple[Along | None, ...]


@dataclass(frozen=True)
class Weight:
    """A parameter or running statistic: its global shape, the axes that cut it, and how it starts.

    `init` is ("normal", std), ("uniform", bound) or ("constant", value); `decay` says whether weight decay applies.
    """

    shape: Shape
    axes: tuple[AxisNames, ...]
    init: tuple[str, float]
    decay: bool = False


class Layer:
    """What a layer computes: shapes, data needs, cost. Subclasses are frozen dataclasses; the planner's view."""

    inputs: ClassVar[range] = range(1, 2)
    """How many inputs it takes."""
    fill: ClassVar[float] = 0.0
    """What stands where a needed box leaves the input."""
    reduce_axes: ClassVar[tuple[str, ...]] = ()
    """Axes over which the op itself communicates small vectors (statistics)."""

    def output_shape(self, *x: Shape) -> Shape:
        """Global output shape for these global input shapes. Raises PlanError where they do not fit."""
        raise NotImplementedError

    def work_shape(self, *x: Shape) -> Shape:
        """Global shape of the work: the output's dims first, summed dims after them."""
        return self.output_shape(*x)

    def work_axes(self, *x: Shape) -> tuple[AxisNames, ...]:
        """The axes that cut each dim of the work."""
        return tensor_axes(len(self.work_shape(*x)))

    def output_axes(self, *x: Shape) -> tuple[AxisNames, ...]:
        """The axes that cut each dim of the output among its owners."""
        return self.work_axes(*x)

    def needs(self, *x: Shape) -> tuple[Dims, ...]:
        """Per input, how each of its dims follows from a dim of the work; None needs the whole dim."""
        return tuple(tuple(Along(d) for d in range(len(shape))) for shape in x)

    def produces(self, *x: Shape) -> Dims:
        """How each dim of the output follows from a dim of the work."""
        return tuple(Along(d) for d in range(len(self.output_shape(*x))))

    def weights(self, *x: Shape) -> dict[str, Weight]:
        """Trained parameters by name."""
        return {}

    def state(self, *x: Shape) -> dict[str, Weight]:
        """Running statistics by name: saved, not trained."""
        return {}

    def flops(self, *x: Shape) -> int:
        """Floating-point operations of one forward pass over the whole work; a backward pass costs about twice that."""
        return prod(self.work_shape(*x))

    def bind(self, place: Place) -> Op:
        """The op that does this rank's share."""
        raise NotImplementedError

    # --- derived -------------------------------------------------------------------------------------------------

    def work(self, partition: Partition, *x: Shape) -> Distribution:
        """The boxes of work of every rank."""
        return Distribution(self.work_shape(*x), self.work_axes(*x), partition)

    def output(self, partition: Partition, *x: Shape) -> Distribution:
        """The boxes of output that every rank owns."""
        return Distribution(self.output_shape(*x), self.output_axes(*x), partition)


@dataclass(frozen=True)
class Place:
    """Where an op runs: this rank's global boxes, the backend, and the communicator of the layer's `reduce_axes`."""

    backend: Backend
    dtype: np.dtype
    shapes: tuple[Shape, ...]
    inputs: tuple[Box, ...]
    work: Box
    output: Box
    weights: Mapping[str, Box]
    comm: MPI.Intracomm | None


class Op(Protocol):
    """A layer bound to a rank. Arrays are this rank's blocks; the executor has fetched what `needs` asks for."""

    def forward(self, x: Sequence[Array], w: Mapping[str, Array], y: Array, training: bool) -> None:
        """Fill `y` with this rank's share of the output (a partial sum where summed dims are cut)."""

    def backward(self, dy: Array, w: Mapping[str, Array], dx: Sequence[Array | None], dw: Mapping[str, Array]) -> None:
        """Fill the gradients of inputs (None: not wanted) and of weights from `dy`; sums, never means."""


def tensor_axes(ndim: int) -> tuple[AxisNames, ...]:
    """The axes that cut a channels-last tensor (N, [[D,] H,] W, C); a vector (N,) is cut along the batch."""
    return ("batch",) if ndim == 1 else ("batch", *spatial_axes(ndim), "channel")


def spatial_axes(ndim: int) -> tuple[str, ...]:
    """The axes of the position dims of a channels-last tensor of `ndim` dims."""
    if ndim > 5:
        raise PlanError(f"a tensor of {ndim} dims has no axes; at most (N, D, H, W, C)")
    return SPATIAL[5 - ndim :] if ndim > 2 else ()


def each(value: int | tuple[int, ...], dims: int, what: str) -> tuple[int, ...]:
    """One number per position dim: an int stands for all. Raises PlanError on a tuple of another length."""
    if isinstance(value, int):
        return (value,) * dims
    if len(value) != dims:
        raise PlanError(f"{what} = {value} has {len(value)} numbers, but the input has {dims} position dims")
    return tuple(value)


@dataclass(frozen=True)
class Window:
    """The input interval under a sliding window for an interval of its output."""

    kernel: int
    stride: int
    padding: int
    dilation: int = 1

    def __call__(self, start: int, stop: int) -> Interval:
        first = start * self.stride - self.padding
        return first, (stop - 1) * self.stride - self.padding + self.dilation * (self.kernel - 1) + 1

    def output(self, n: int) -> int:
        """Output extent for an input extent of `n`."""
        return (n + 2 * self.padding - self.dilation * (self.kernel - 1) - 1) // self.stride + 1


def windows(
    shape: Shape,
    kernel: int | tuple[int, ...],
    stride: int | tuple[int, ...],
    padding: int | tuple[int, ...],
    dilation: int | tuple[int, ...] = 1,
) -> tuple[Window, ...]:
    """One Window per position dim of a channels-last `shape`. Raises PlanError where the window does not fit."""
    dims = len(shape) - 2
    if dims < 1:
        raise PlanError(f"a sliding window needs positions, but {shape} has none; give (N, W, C), (N, H, W, C) or more")
    found = tuple(
        Window(*numbers)
        for numbers in zip(
            each(kernel, dims, "kernel"),
            each(stride, dims, "stride"),
            each(padding, dims, "padding"),
            each(dilation, dims, "dilation"),
            strict=True,
        )
    )
    for axis, n, window in zip(spatial_axes(len(shape)), shape[1:-1], found, strict=True):
        if min(window.kernel, window.stride, window.dilation) < 1 or window.padding < 0:
            raise PlanError(f"{window}: kernel, stride and dilation are at least 1, padding at least 0")
        if window.output(n) < 1:
            reach = window.dilation * (window.kernel - 1) + 1
            raise PlanError(
                f"{axis}: a window of {reach} does not fit an input of {n} with padding {window.padding}; "
                f"pad by at least {-(-(reach - n) // 2)} or use a larger input"
            )
    return found
