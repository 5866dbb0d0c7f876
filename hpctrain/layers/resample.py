"""Layers that change the number of positions: adaptive average pooling, and nearest or linear upsampling.

Both are sums over a few inputs per output with fixed weights, along one position dim after another. Which inputs, and
with what weights, follows from global positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Protocol

import numpy as np

from hpctrain.backends.base import Array
from hpctrain.errors import PlanError
from hpctrain.layers.base import Dims, Layer, Phase, Place, each
from hpctrain.layers.window import Number
from hpctrain.partition import Interval, Shape, extent
from hpctrain.precision import exact
from hpctrain.regions import Along

Taps = list[tuple[int, float]]
"""(index, weight) of the inputs that make up an output, indices ascending, no weight 0."""


class Rule(Protocol):
    """Which inputs along a dim make up an output; both ends of their indices grow with the output's."""

    def taps(self, output: int) -> Taps:
        """Those of `output`."""


@dataclass(frozen=True)
class Means:
    """Each output is the mean of the inputs that its share of the extent touches, n inputs to m outputs."""

    n: int
    m: int

    def taps(self, output: int) -> Taps:
        """Inputs floor(output n / m) up to ceil((output + 1) n / m), weighted alike: PyTorch's rule."""
        start, stop = output * self.n // self.m, -(-(output + 1) * self.n // self.m)
        return [(i, 1.0 / (stop - start)) for i in range(start, stop)]


@dataclass(frozen=True)
class Nearest:
    """Each input is repeated `scale` times."""

    scale: int

    def taps(self, output: int) -> Taps:
        """The one input whose copy it is."""
        return [(output // self.scale, 1.0)]


@dataclass(frozen=True)
class Linear:
    """Linear between neighbours; output o lies at (o * step + offset) / unit among `n` inputs, in whole numbers.

    Before the first input it is the first, after the last the last.
    """

    n: int
    step: int
    offset: int
    unit: int

    def taps(self, output: int) -> Taps:
        """The input where the output lies, or those on both sides of it."""
        i, part = divmod(max(0, output * self.step + self.offset), self.unit)
        if part == 0 or i >= self.n - 1:
            return [(min(i, self.n - 1), 1.0)]
        return [(i, 1.0 - part / self.unit), (i + 1, part / self.unit)]


@dataclass(frozen=True)
class Read:
    """The interval that an interval of outputs reads."""

    rule: Rule

    def __call__(self, start: int, stop: int) -> Interval:
        return self.rule.taps(start)[0][0], self.rule.taps(stop - 1)[-1][0] + 1


@dataclass(frozen=True)
class Resample(Layer):
    """A rule for each position dim; channels and samples are independent. (N, [D,] H, W, C) to (N, [D',] H', W', C)."""

    keeps_inputs: ClassVar[bool] = False
    keeps_output: ClassVar[bool] = False

    def rules(self, x: Shape) -> tuple[Rule, ...]:
        """One per position dim."""
        raise NotImplementedError

    def needs(self, *x: Shape) -> tuple[Dims, ...]:
        positions = (Along(d, Read(rule)) for d, rule in enumerate(self.rules(x[0]), start=1))
        return ((Along(0), *positions, Along(len(x[0]) - 1)),)

    def flops(self, *x: Shape) -> int:
        y, rules, shape, total = self.output_shape(*x), self.rules(x[0]), list(x[0]), 0
        for dim in order(x[0], y):
            shape[dim] = y[dim]
            total += 2 * prod(shape) // y[dim] * sum(len(rules[dim - 1].taps(o)) for o in range(y[dim]))
        return total

    def kept_bytes(self, itemsize: int, output: Shape, *x: Shape) -> int:
        total, shape = 0, list(x[0])
        for dim in order(x[0], output)[:-1] if prod(shape) else ():
            shape[dim] = output[dim]
            total += itemsize * prod(shape)
        return total

    def bind(self, place: Place) -> ResampleOp:
        return ResampleOp(self, place)


def order(x: Shape, y: Shape) -> list[int]:
    """The dims that change, those that shrink most first: so arrays between them stay small."""
    return sorted((d for d in range(len(x)) if x[d] != y[d]), key=lambda d: y[d] / x[d])


@dataclass(frozen=True)
class Along1D:
    """One dim's step of a rank: `index` (local) and `weight` are (outputs, taps), padded with weight 0."""

    dim: int
    index: Array
    weight: Array


class ResampleOp:
    """Resamples one dim after another. The arrays between, made at bind, serve both directions."""

    def __init__(self, layer: Resample, place: Place) -> None:
        self.backend = place.backend
        x, box, y = place.shapes[0], place.inputs[0], place.output
        rules, shape = layer.rules(x), list(extent(box))
        self.steps = [
            Along1D(d, *table(rules[d - 1], y[d], box[d].start, exact(place.dtype)))
            for d in order(x, layer.output_shape(x))
        ]
        self.between: list[Array] = []
        for step in self.steps[:-1]:
            shape[step.dim] = len(step.index)
            self.between.append(place.backend.empty(tuple(shape), place.dtype))

    def forward(self, x: Sequence[Array], w: Mapping[str, Array], y: Array, phase: Phase) -> None:
        if not self.steps:
            np.copyto(y, x[0])
        arrays = [x[0], *self.between, y]
        for step, source, target in zip(self.steps, arrays, arrays[1:], strict=False):
            self.backend.resample(source, target, step.dim, step.index, step.weight)

    def backward(self, dy: Array, w: Mapping[str, Array], dx: Sequence[Array | None], dw: Mapping[str, Array]) -> None:
        if dx[0] is None:
            return
        if not self.steps:
            np.copyto(dx[0], dy)
        arrays = [dy, *reversed(self.between), dx[0]]
        for step, source, target in zip(reversed(self.steps), arrays, arrays[1:], strict=False):
            self.backend.resample_dx(source, target, step.dim, step.index, step.weight)


def table(rule: Rule, outputs: slice, origin: int, dtype: np.dtype) -> tuple[Array, Array]:
    """Index, counted from `origin`, and weight of each tap of each output."""
    taps = [rule.taps(o) for o in range(outputs.start, outputs.stop)]
    most = max(map(len, taps), default=1)
    # padding reads the output's own first input, so that no value from elsewhere, perhaps NaN, is multiplied by 0
    padded = [t + [(t[0][0], 0.0)] * (most - len(t)) for t in taps]
    both = np.array(padded, np.float64).reshape(len(taps), most, 2)
    return both[..., 0].astype(np.int64) - origin, both[..., 1].astype(dtype)


def positions(x: Shape, layer: str) -> Shape:
    """The extents of the position dims. Raises PlanError where there are none."""
    if len(x) < 3:
        raise PlanError(f"{layer}: the input {x} has no positions; give (N, W, C), (N, H, W, C) or (N, D, H, W, C)")
    return x[1:-1]


@dataclass(frozen=True)
class AdaptiveAvgPool(Resample):
    """(N, [D,] H, W, C) to (N, *size, C): the means of windows that cover the input, whatever its extents.

    Output i of m along a dim of n is the mean of inputs floor(i n / m) up to ceil((i + 1) n / m), as in PyTorch.
    """

    size: Number

    def output_shape(self, *x: Shape) -> Shape:
        size = each(self.size, len(positions(x[0], "adaptive pooling")), "size")
        if min(size) < 1:
            raise PlanError(f"adaptive pooling: size = {self.size}; give 1 or more for each position dim")
        return (x[0][0], *size, x[0][-1])

    def rules(self, x: Shape) -> tuple[Rule, ...]:
        return tuple(Means(n, m) for n, m in zip(x[1:-1], self.output_shape(x)[1:-1], strict=True))


@dataclass(frozen=True)
class Upsample(Resample):
    """(N, [D,] H, W, C) to (N, [D*s,] H*s, W*s, C): each position repeated s times, or interpolated linearly.

    `mode` is "nearest" or "linear" (along each dim: PyTorch's bilinear and trilinear). Linear upsampling aligns the
    outer edges of the first and the last positions of both tensors, or their centres with `align_corners`.
    """

    scale: Number = 2
    mode: str = "nearest"
    align_corners: bool = False

    def output_shape(self, *x: Shape) -> Shape:
        extents = positions(x[0], "upsampling")
        scale = each(self.scale, len(extents), "scale")
        if min(scale) < 1:
            raise PlanError(f"upsampling: scale = {self.scale}; give whole numbers, 1 or more")
        if self.mode not in ("nearest", "linear"):
            raise PlanError(f"upsampling: mode = {self.mode!r}; give 'nearest' or 'linear'")
        if self.align_corners and self.mode == "nearest":
            raise PlanError("upsampling: align_corners has a meaning for mode = 'linear' alone; leave it out")
        return (x[0][0], *(n * s for n, s in zip(extents, scale, strict=True)), x[0][-1])

    def rules(self, x: Shape) -> tuple[Rule, ...]:
        pairs = zip(x[1:-1], each(self.scale, len(x) - 2, "scale"), strict=True)
        return tuple(self._rule(n, scale) for n, scale in pairs)

    def _rule(self, n: int, scale: int) -> Rule:
        if self.mode == "nearest":
            return Nearest(scale)
        if self.align_corners:  # output o at o (n - 1) / (n scale - 1)
            return Linear(n, n - 1, 0, max(1, n * scale - 1))
        return Linear(n, 2, 1 - scale, 2 * scale)  # at (o + 1/2) / scale - 1/2
