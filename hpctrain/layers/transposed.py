"""Transposed convolution: the adjoint of a convolution, with a kernel larger than its stride if need be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from hpctrain.backends.base import Array
from hpctrain.errors import PlanError
from hpctrain.layers.base import Dims, Phase, Place, Weight, each, spatial_axes
from hpctrain.layers.conv import (
    Grouped,
    GroupRun,
    channels_of,
    check_channels,
    covers,
    group_runs,
    kernel_weights,
    own_part,
)
from hpctrain.layers.window import Number, Padding, paddings
from hpctrain.partition import Interval, Shape, extent
from hpctrain.precision import exact
from hpctrain.regions import Along


@dataclass(frozen=True)
class Spread:
    """The input interval that reaches an interval of output, where each input is spread under a kernel."""

    kernel: int
    stride: int
    before: int
    after: int
    dilation: int
    extra: int

    @property
    def reach(self) -> int:
        """Extent of the output that one input reaches."""
        return self.dilation * (self.kernel - 1) + 1

    def __call__(self, start: int, stop: int) -> Interval:
        first = -(-(start + self.before - self.reach + 1) // self.stride)
        # none between two inputs that are too far apart
        return first, max(first, (stop - 1 + self.before) // self.stride + 1)

    def output(self, n: int) -> int:
        """Output extent for an input extent of `n`."""
        return (n - 1) * self.stride - self.before - self.after + self.reach + self.extra


@dataclass(frozen=True)
class ConvTranspose(Grouped):
    """y (N, [D,] H, W, filters) from x (N, [D,] H, W, C): x[i] weight[t] adds to y[i stride + t dilation - padding].

    weight ([kd,] kh, kw, C / groups, filters), bias (filters,). Output extent: (n - 1) stride - before - after
    + dilation (kernel - 1) + output_padding + 1. Work and cuts are those of Conv.
    """

    filters: int
    kernel: Number
    stride: Number = 1
    padding: Padding = 0
    output_padding: Number = 0
    dilation: Number = 1
    groups: int = 1
    bias: bool = True

    def spreads(self, x: Shape) -> tuple[Spread, ...]:
        """One Spread per position dim. Raises PlanError on numbers that do not fit."""
        dims = len(x) - 2
        if dims < 1:
            raise PlanError(f"a transposed convolution needs positions, but {x} has none; give (N, W, C) or more")
        sizes = zip(
            each(self.kernel, dims, "kernel"),
            each(self.stride, dims, "stride"),
            paddings(self.padding, dims),
            each(self.dilation, dims, "dilation"),
            each(self.output_padding, dims, "output_padding"),
            strict=True,
        )
        found = tuple(Spread(k, s, before, after, d, extra) for k, s, (before, after), d, extra in sizes)
        for axis, n, spread in zip(spatial_axes(len(x)), x[1:-1], found, strict=True):
            if min(spread.kernel, spread.stride, spread.dilation) < 1 or min(spread.before, spread.after) < 0:
                raise PlanError(f"{spread}: kernel, stride and dilation are at least 1, padding at least 0")
            if not 0 <= spread.extra < max(spread.stride, spread.dilation):
                raise PlanError(
                    f"{axis}: output_padding = {spread.extra}; give 0 or more, but less than stride {spread.stride} or "
                    f"dilation {spread.dilation}"
                )
            if spread.output(n) < 1:
                raise PlanError(
                    f"{axis}: padding {spread.before} and {spread.after} leaves nothing of an output of "
                    f"{spread.output(n) + spread.before + spread.after}; pad less"
                )
        return found

    def output_shape(self, *x: Shape) -> Shape:
        (x0,) = x
        found = self.spreads(x0)
        check_channels(self.filters, self.groups, x0[-1])
        return (x0[0], *(s.output(n) for s, n in zip(found, x0[1:-1], strict=True)), self.filters)

    def needs(self, *x: Shape) -> tuple[Dims, ...]:
        positions = (Along(d, spread) for d, spread in enumerate(self.spreads(x[0]), start=1))
        return ((Along(0), *positions, channels_of(self.filters, self.groups, x[0])),)

    def weights(self, *x: Shape) -> dict[str, Weight]:
        return kernel_weights(tuple(s.kernel for s in self.spreads(x[0])), self.filters, self.groups, self.bias, x[0])

    def flops(self, *x: Shape) -> int:
        return 2 * prod(x[0]) * (self.filters // self.groups) * prod(s.kernel for s in self.spreads(x[0]))

    def kept_bytes(self, itemsize: int, output: Shape, *x: Shape) -> int:
        kernel = each(self.kernel, len(output) - 2, "kernel")
        spaces = zip(
            kernel,
            each(self.stride, len(kernel), "stride"),
            each(self.dilation, len(kernel), "dilation"),
            x[0][1:-1],
            strict=True,
        )
        reached = prod((n - 1) * s + d * (k - 1) + 1 if n else 0 for k, s, d, n in spaces)
        weights = output[-1] * prod(kernel) * x[0][-1] // self.groups
        gradients = 4 * weights if itemsize == 2 else 0  # those of bf16 weights are float32
        return itemsize * (output[-1] * x[0][0] * reached + weights) + gradients

    def bind(self, place: Place) -> ConvTransposeOp:
        return ConvTransposeOp(self, place)


class ConvTransposeOp:
    """Spreads the input box over all the outputs that it reaches, of which this rank keeps its own.

    There may be no input: outputs between two inputs that are too far apart have none.
    """

    def __init__(self, layer: ConvTranspose, place: Place) -> None:
        found, inputs = layer.spreads(place.shapes[0]), place.inputs[0]
        self.backend, self.dtype = place.backend, place.dtype
        self.stride = tuple(s.stride for s in found)
        self.dilation = tuple(s.dilation for s in found)
        self.own_bias = own_part(place)
        self.runs = list(group_runs(layer.filters, layer.groups, place))
        self.reads_all = covers(self.runs, place)
        counts = extent(inputs)
        # what the inputs reach, from its first output on
        reached = [(n - 1) * s.stride + s.reach for s, n in zip(found, counts[1:-1], strict=True)]
        self.any = all(counts)
        self.reached = (counts[0], *reached)
        inside, outside = [], []
        for spread, at, out, length in zip(found, inputs[1:-1], place.output[1:-1], reached, strict=True):
            origin = at.start * spread.stride - spread.before
            start, stop = max(out.start, origin), min(out.stop, origin + length)
            inside.append(slice(start - origin, max(start, stop) - origin))
            outside.append(slice(start - out.start, max(start, stop) - out.start))
        self.inside, self.outside = (slice(None), *inside), (slice(None), *outside)

        filters = [run.filters.stop - run.filters.start for run in self.runs]
        self.room = place.backend.empty((prod(self.reached) * max(filters, default=0) if self.any else 0,), self.dtype)
        """What the inputs reach, of one run's filters at a time."""
        *kernel, channels, _ = extent(place.weights["weight"])
        self.kernels = [
            place.backend.empty((*kernel, n // run.groups, run.groups * channels), self.dtype)
            for n, run in zip(filters, self.runs, strict=True)
        ]
        """Per run its weight, as a convolution has it."""
        full = exact(self.dtype)
        self.gradients = [k if full == self.dtype else place.backend.empty(k.shape, full) for k in self.kernels]
        """The same of its gradient, which comes last."""

    def _full(self, run: GroupRun) -> Array:
        shape = (*self.reached, run.filters.stop - run.filters.start)
        return self.room[: prod(shape)].reshape(shape)

    def forward(self, x: Sequence[Array], w: Mapping[str, Array], y: Array, phase: Phase) -> None:
        self.x = x[0]
        y.fill(0)
        for run, kernel in zip(self.runs, self.kernels, strict=True) if self.any else ():
            full = self._full(run)
            adjoint(w["weight"][..., run.filters], run.groups, kernel)
            self.backend.conv_dx(self.x[..., run.channels], kernel, full, self.stride, self.dilation, run.groups)
            y[..., run.filters][self.outside] = full[self.inside]
        if self.own_bias is not None:
            self.backend.bias_add(y[..., self.own_bias], w["bias"])

    def backward(self, dy: Array, w: Mapping[str, Array], dx: Sequence[Array | None], dw: Mapping[str, Array]) -> None:
        if self.own_bias is not None:
            self.backend.bias_grad(dy[..., self.own_bias], dw["bias"])
        if dx[0] is not None and not (self.reads_all and self.any):
            dx[0].fill(0)
        if not self.any:
            dw["weight"].fill(0)
            return
        for run, kernel, gradient in zip(self.runs, self.kernels, self.gradients, strict=True):
            full = self._full(run)
            full.fill(0)
            full[self.inside] = dy[..., run.filters][self.outside]
            if dx[0] is not None:
                into = dx[0][..., run.channels]
                adjoint(w["weight"][..., run.filters], run.groups, kernel)
                self.backend.conv(full, kernel, into, self.stride, self.dilation, run.groups)
            self.backend.conv_dw(full, self.x[..., run.channels], gradient, self.stride, self.dilation, run.groups)
            adjoint(gradient, run.groups, dw["weight"][..., run.filters])


def adjoint(w: Array, groups: int, out: Array) -> None:
    """The weight (*kernel, a, groups * b) of one direction as that of the other, (*kernel, b, groups * a)."""
    *kernel, a, filters = w.shape
    b = filters // groups
    turned = np.moveaxis(w.reshape(*kernel, a, groups, b), (-1, -2, -3), (-3, -2, -1))
    np.copyto(out.reshape(*kernel, b, groups, a), turned)
