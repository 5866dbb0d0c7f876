"""Layers that move elements and compute nothing: flatten, reshape, slice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np

from hpctrain.backends.base import Array
from hpctrain.errors import PlanError
from hpctrain.layers.base import Dims, Layer, Phase, Place, spatial_axes, tensor_axes
from hpctrain.partition import AxisNames, Interval, Shape, extent, volume
from hpctrain.regions import Along

# --- flatten and reshape ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flatten(Layer):
    """(N, [[D,] H,] W, C) to (N, D*H*W*C), in C order; the one output dim is cut along all that cut the input's."""

    keeps_inputs: ClassVar[bool] = False
    keeps_output: ClassVar[bool] = False

    def output_shape(self, *x: Shape) -> Shape:
        return (x[0][0], prod(x[0][1:]))

    def work_axes(self, *x: Shape) -> tuple[AxisNames, ...]:
        return ("batch", (*spatial_axes(len(x[0])), "channel"))

    def needs(self, *x: Shape) -> tuple[Dims, ...]:
        return (reshape_needs(x[0], self.output_shape(*x)),)

    def bind(self, place: Place) -> ReshapeOp:
        return ReshapeOp(place, self.output_shape(*place.shapes))


@dataclass(frozen=True)
class Reshape(Layer):
    """(N, ...) to (N, *shape), in C order; one entry of `shape` may be -1, which takes what the others leave.

    Dims that the new shape keeps keep their cuts; only those that it splits or joins are moved between ranks.
    """

    keeps_inputs: ClassVar[bool] = False
    keeps_output: ClassVar[bool] = False
    shape: Shape

    def output_shape(self, *x: Shape) -> Shape:
        elements, given = prod(x[0][1:]), prod(n for n in self.shape if n != -1)
        if any(n < 1 and n != -1 for n in self.shape) or self.shape.count(-1) > 1:
            raise PlanError(f"reshape: shape = {self.shape}; give extents of 1 or more, at most one of them -1")
        left, rest = divmod(elements, given)
        if rest or (left != 1 and -1 not in self.shape):
            raise PlanError(
                f"reshape: shape = {self.shape} holds {given} numbers{' or a multiple' if -1 in self.shape else ''}, "
                f"a sample of {x[0]} has {elements}; give extents, without the batch's, whose product is {elements}"
            )
        found = (x[0][0], *(left if n == -1 else n for n in self.shape))
        tensor_axes(len(found))  # refuses more dims than there are axes
        return found

    def needs(self, *x: Shape) -> tuple[Dims, ...]:
        return (reshape_needs(x[0], self.output_shape(*x)),)

    def bind(self, place: Place) -> ReshapeOp:
        return ReshapeOp(place, self.output_shape(*place.shapes))


Group = tuple[tuple[int, ...], tuple[int, ...]]
"""Dims of the input and dims of the output that hold the same numbers, in the same order."""


def groups(x: Shape, y: Shape) -> list[Group]:
    """The finest runs of dims of `x` and of `y`, batch apart, that have equal products: what is reshaped together."""
    found: list[Group] = []
    i, j = 1, 1
    while i < len(x) or j < len(y):
        first = (i, j)
        i, j = min(i + 1, len(x)), min(j + 1, len(y))
        while (a := prod(x[first[0] : i])) != (b := prod(y[first[1] : j])):
            i, j = (i + 1, j) if a < b else (i, j + 1)
        found.append((tuple(range(first[0], i)), tuple(range(first[1], j))))
    return found


def reshape_needs(x: Shape, y: Shape) -> Dims:
    """Per dim of `x`, what a box of `y` reads: in each group the smallest box around its first to its last number."""
    needs: list[Along | None] = [Along(0)]
    for ins, outs in groups(x, y):
        inner, outer = tuple(x[d] for d in ins), tuple(y[d] for d in outs)
        # a dim of 1 may have no counterpart: it is taken whole
        needs += [Along(outs, FlatHull(outer, inner, d)) if outs else None for d in range(len(ins))]
    return tuple(needs)


@dataclass(frozen=True)
class FlatHull:
    """The interval along dim `dim` of `inner` that holds all flat indices between a box's first and last in `outer`.

    `outer` and `inner` are shapes of the same numbers; called with start, stop of the box along each dim of `outer`.
    """

    outer: Shape
    inner: Shape
    dim: int

    def __call__(self, *bounds: int) -> Interval:
        n, below = self.inner[self.dim], prod(self.inner[self.dim + 1 :])
        first = flat_index(bounds[::2], self.outer) // below
        last = flat_index([stop - 1 for stop in bounds[1::2]], self.outer) // below
        if first // n != last // n:  # they pass from one row of this dim to the next: all of it is needed
            return 0, n
        return first % n, last % n + 1


def flat_index(at: Sequence[int], shape: Shape) -> int:
    """The position of `at` in an array of `shape` in C order."""
    index = 0
    for i, n in zip(at, shape, strict=True):
        index = index * n + i
    return index


class ReshapeOp:
    """Within the box that a group needs, the numbers from its first to its last are contiguous: `FlatHull` takes all of
    the dims after the first that it cuts. So the output's box is a strided view of the input's.
    """

    def __init__(self, place: Place, shape: Shape) -> None:
        x, self.extents = place.shapes[0], extent(place.output)
        self.packed: Array | None = None
        self.joined: list[int] = []
        """Per group, how many numbers its box of the input holds."""
        self.starts: list[int] = []
        """Per group, where the output's first number lies among them."""
        self.steps: list[list[int]] = []
        """Per group and dim of the output, the distance between neighbours."""
        box = place.inputs[0]
        for ins, outs in groups(x, shape) if volume(place.output) else []:
            self.joined.append(prod(extent(tuple(box[d] for d in ins))))
            outer = tuple(shape[d] for d in outs)
            first = flat_index([place.output[d].start for d in outs], outer)
            self.starts.append(first - flat_index([box[d].start for d in ins], tuple(x[d] for d in ins)))
            self.steps.append([prod(outer[d + 1 :]) for d in range(len(outer))])

    def _view(self, x: Array) -> Array:
        """The output's box in `x`, which is contiguous: a view."""
        if 0 in self.extents:
            return x.reshape(-1)[:0].reshape(self.extents)
        flat = x.reshape(len(x), *self.joined)[(slice(None), *(slice(start, None) for start in self.starts))]
        strides = [s * step for s, steps in zip(flat.strides[1:], self.steps, strict=True) for step in steps]
        return np.lib.stride_tricks.as_strided(flat, self.extents, (flat.strides[0], *strides))

    def _contiguous(self, x: Array) -> Array:
        """`x`, or where that is not contiguous, a contiguous array of its shape, made once."""
        if x.flags.c_contiguous:
            return x
        if self.packed is None:
            self.packed = np.empty(x.shape, x.dtype)
        return self.packed

    def forward(self, x: Sequence[Array], w: Mapping[str, Array], y: Array, phase: Phase) -> None:
        source = self._contiguous(x[0])
        if source is not x[0]:
            np.copyto(source, x[0])
        np.copyto(y, self._view(source))

    def backward(self, dy: Array, w: Mapping[str, Array], dx: Sequence[Array | None], dw: Mapping[str, Array]) -> None:
        if dx[0] is None:
            return
        into = self._contiguous(dx[0])
        into.fill(0)  # the box may hold more than the numbers between the first and the last
        np.copyto(self._view(into), dy)
        if into is not dx[0]:
            np.copyto(dx[0], into)


# --- slice --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slice(Layer):
    """x[..., start:stop:step, ...] along `dim`, 1 or more, or counted from the end if negative (-1: channels).

    `start` and `stop` are as in Python, None or negative too, but may not lie outside the tensor.
    """

    keeps_inputs: ClassVar[bool] = False
    keeps_output: ClassVar[bool] = False
    dim: int
    start: int | None
    stop: int | None
    step: int = 1

    def chosen(self, x: Shape) -> range:
        """The indices along `dim` that are kept. Raises PlanError where there are none or a bound lies outside."""
        n = x[dim_of(self.dim, x, "slice")]
        if self.step == 0:
            raise PlanError("slice: step = 0; give 1 or more, or less than 0 to go backwards")
        for name, bound in (("start", self.start), ("stop", self.stop)):
            if bound is not None and not -n <= bound <= n:
                raise PlanError(f"slice: {name} = {bound} lies outside dim {self.dim} of {n}; give {-n} to {n}")
        found = range(n)[self.start : self.stop : self.step]
        if not found:
            raise PlanError(
                f"slice: {self.start}:{self.stop}:{self.step} takes nothing of dim {self.dim} of {n}; "
                "give a stop beyond the start, in the direction of the step"
            )
        return found

    def output_shape(self, *x: Shape) -> Shape:
        count, dim = len(self.chosen(x[0])), dim_of(self.dim, x[0], "slice")
        return (*x[0][:dim], count, *x[0][dim + 1 :])

    def needs(self, *x: Shape) -> tuple[Dims, ...]:
        dim = dim_of(self.dim, x[0], "slice")
        return (tuple(Along(d, Picked(self.chosen(x[0]))) if d == dim else Along(d) for d in range(len(x[0]))),)

    def bind(self, place: Place) -> SliceOp:
        return SliceOp(self, place)


@dataclass(frozen=True)
class Picked:
    """The smallest interval around the indices that an interval of a slice's output picks."""

    chosen: range

    def __call__(self, start: int, stop: int) -> Interval:
        ends = self.chosen[start], self.chosen[stop - 1]
        return min(ends), max(ends) + 1


class SliceOp:
    """Its input's box begins and ends at picked indices, so that every step-th of it is the output."""

    def __init__(self, layer: Slice, place: Place) -> None:
        dim = dim_of(layer.dim, place.shapes[0], "slice")
        self.picked = (slice(None),) * dim + (slice(None, None, layer.step),)
        self.all_picked = abs(layer.step) == 1

    def forward(self, x: Sequence[Array], w: Mapping[str, Array], y: Array, phase: Phase) -> None:
        np.copyto(y, x[0][self.picked])

    def backward(self, dy: Array, w: Mapping[str, Array], dx: Sequence[Array | None], dw: Mapping[str, Array]) -> None:
        if dx[0] is None:
            return
        if not self.all_picked:
            dx[0].fill(0)
        np.copyto(dx[0][self.picked], dy)


def dim_of(dim: int, x: Shape, layer: str) -> int:
    """`dim`, which may be negative, as an index into `x`. Raises PlanError on the batch dim and on one that is not."""
    if not -len(x) <= dim < len(x):
        raise PlanError(f"{layer}: dim = {dim}, but {x} has {len(x)} dims; give 1 to {len(x) - 1}, or -1 for channels")
    if dim % len(x) == 0:
        raise PlanError(
            f"{layer}: dim = {dim} is the batch: samples are weighed and counted as they were read, so their number "
            f"cannot change within a network; give 1 to {len(x) - 1}, or choose samples in the data"
        )
    return dim % len(x)
