"""Convolution (cross-correlation), cut along batch, positions, filters and input channels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import ClassVar, NamedTuple

from hpctrain.backends.base import Array, Backend
from hpctrain.errors import PlanError
from hpctrain.layers.base import Dims, Layer, Phase, Place, Weight, tensor_axes
from hpctrain.layers.window import Number, Padding, Window, windows
from hpctrain.partition import AxisNames, Interval, Shape
from hpctrain.regions import FILL, REFLECT, WRAP, Along

BORDERS = {"zero": FILL, "periodic": WRAP, "reflect": REFLECT}
"""What padding holds: zeros, the other end of the input, or the input mirrored at its edge (which is not repeated)."""


class Grouped(Layer):
    """What convolutions of both directions share: their work is the output's dims, then the channels of a group."""

    keeps_output: ClassVar[bool] = False
    groups: int

    def work_shape(self, *x: Shape) -> Shape:
        return (*self.output_shape(*x), x[0][-1] // self.groups)

    def work_axes(self, *x: Shape) -> tuple[AxisNames, ...]:
        return (*tensor_axes(len(x[0])), "contraction")

    def output_axes(self, *x: Shape) -> tuple[AxisNames, ...]:
        return (*tensor_axes(len(x[0]))[:-1], ("channel", "contraction"))


@dataclass(frozen=True)
class Conv(Grouped):
    """y (N, [D,] H, W, filters) from x (N, [D,] H, W, C); weight ([kd,] kh, kw, C / groups, filters), bias (filters,).

    `padding` is a number or (before, after) for each position dim; `border` says what it holds, see BORDERS. With
    `groups`, channels and filters fall into as many equal runs, and each run of filters reads its own run of channels.
    Work: the output's dims, then input channels. Axis "channel" cuts filters, "contraction" the channels of a group.
    """

    takes_tail: ClassVar[bool] = True
    filters: int
    kernel: Number
    stride: Number = 1
    padding: Padding = 0
    dilation: Number = 1
    groups: int = 1
    bias: bool = True
    border: str = "zero"

    def windows(self, x: Shape) -> tuple[Window, ...]:
        """One window per position dim."""
        return windows(x, self.kernel, self.stride, self.padding, self.dilation)

    def output_shape(self, *x: Shape) -> Shape:
        (x0,) = x
        found = self.windows(x0)
        check_channels(self.filters, self.groups, x0[-1])
        if self.border not in BORDERS:
            raise PlanError(f"border = {self.border!r}; give one of {', '.join(BORDERS)}")
        for window, n in zip(found, x0[1:-1], strict=True):
            if self.border == "reflect" and max(window.before, window.after) >= n:
                raise PlanError(
                    f"border = 'reflect': padding {window.before} and {window.after} of an input of {n}, which has "
                    f"only {n - 1} elements behind its edge; pad less, or with border = 'zero' or 'periodic'"
                )
        return (x0[0], *(w.output(n) for w, n in zip(found, x0[1:-1], strict=True)), self.filters)

    def needs(self, *x: Shape) -> tuple[Dims, ...]:
        border = BORDERS[self.border]
        positions = (Along(d, window, border) for d, window in enumerate(self.windows(x[0]), start=1))
        return ((Along(0), *positions, channels_of(self.filters, self.groups, x[0])),)

    def weights(self, *x: Shape) -> dict[str, Weight]:
        return kernel_weights(tuple(w.kernel for w in self.windows(x[0])), self.filters, self.groups, self.bias, x[0])

    def flops(self, *x: Shape) -> int:
        return 2 * prod(self.work_shape(*x)) * prod(w.kernel for w in self.windows(x[0]))

    def bind(self, place: Place) -> ConvOp:
        return ConvOp(self, place)


class ConvOp:
    """A valid convolution of the assembled input box, one call per run of groups, with its bias and activation."""

    def __init__(self, layer: Conv, place: Place) -> None:
        found = layer.windows(place.shapes[0])
        self.backend = place.backend
        self.stride = tuple(w.stride for w in found)
        self.dilation = tuple(w.dilation for w in found)
        self.own_bias, self.slope = own_part(place), place.tail.slope
        self.runs = list(group_runs(layer.filters, layer.groups, place))
        self.reads_all = covers(self.runs, place)

    def forward(self, x: Sequence[Array], w: Mapping[str, Array], y: Array, phase: Phase) -> None:
        self.x, self.y = x[0], y
        inside = covers_all(self.own_bias, y)
        for run in self.runs:
            into, kernel = y[..., run.filters], w["weight"][..., run.filters]
            bias = w["bias"][run.filters] if inside else None
            channels = self.x[..., run.channels]
            self.backend.conv(channels, kernel, into, self.stride, self.dilation, run.groups, bias, self.slope)
        if self.own_bias is not None and not inside:
            self.backend.bias_add(y[..., self.own_bias], w["bias"])

    def backward(self, dy: Array, w: Mapping[str, Array], dx: Sequence[Array | None], dw: Mapping[str, Array]) -> None:
        through_tail(self.backend, dy, self.y, self.own_bias, self.slope, dw)
        for run in self.runs:
            x, into = self.x[..., run.channels], dw["weight"][..., run.filters]
            self.backend.conv_dw(x, dy[..., run.filters], into, self.stride, self.dilation, run.groups)
        if dx[0] is None:
            return
        if not self.reads_all:
            dx[0].fill(0)
        for run in self.runs:
            kernel, into = w["weight"][..., run.filters], dx[0][..., run.channels]
            self.backend.conv_dx(dy[..., run.filters], kernel, into, self.stride, self.dilation, run.groups)


# --- what convolutions of both directions share ----------------------------------------------------------------------


def check_channels(filters: int, groups: int, channels: int) -> None:
    """Raises PlanError unless `groups` divides both filters and channels."""
    if filters < 1 or groups < 1:
        raise PlanError(f"filters = {filters}, groups = {groups}; give 1 or more of each")
    if filters % groups or channels % groups:
        raise PlanError(f"groups = {groups} must divide both the {channels} channels and the {filters} filters")


@dataclass(frozen=True)
class GroupChannels:
    """The smallest interval with channels [first, last) of every group that filters [start, stop) belong to."""

    filters: int
    channels: int

    def __call__(self, start: int, stop: int, first: int, last: int) -> Interval:
        return start // self.filters * self.channels + first, (stop - 1) // self.filters * self.channels + last


def channels_of(filters: int, groups: int, x: Shape) -> Along:
    """The input channels that filters read, of a work whose last dims are filters and the channels of a group."""
    contraction = len(x)
    if groups == 1:
        return Along(contraction)
    return Along((contraction - 1, contraction), GroupChannels(filters // groups, x[-1] // groups))


def kernel_weights(kernel: Shape, filters: int, groups: int, bias: bool, x: Shape) -> dict[str, Weight]:
    """Weight (*kernel, C / groups, filters) and bias (filters,)."""
    channels = x[-1] // groups
    # He et al. 2015, equation 10: keeps the variance of activations through ReLU
    std = sqrt(2.0 / (prod(kernel) * channels))
    axes = (*(None for _ in kernel), "contraction", "channel")
    found = {"weight": Weight((*kernel, channels, filters), axes, ("normal", std), decay=True)}
    if bias:
        # cut like the owned output, so that each partial sum carries each bias once
        found["bias"] = Weight((filters,), (("channel", "contraction"),), ("constant", 0.0))
    return found


class GroupRun(NamedTuple):
    """Neighbouring groups that one call can do: where their channels and filters lie in this rank's blocks."""

    channels: slice
    filters: slice
    groups: int


def group_runs(filters: int, groups: int, place: Place) -> Iterator[GroupRun]:
    """This rank's filters by group: whole groups in one run, unless their channels are cut; parts of groups alone."""
    mine, part, origin = place.work[-2], place.work[-1], place.inputs[0][-1].start
    per_group, channels = filters // groups, place.shapes[0][-1] // groups
    uncut = part.stop - part.start == channels
    at = mine.start
    while at < mine.stop:
        group, inside = divmod(at, per_group)
        whole = (mine.stop - at) // per_group if uncut and inside == 0 else 0
        stop = at + whole * per_group if whole else min(mine.stop, (group + 1) * per_group)
        first = group * channels + part.start - origin
        last = (group + max(1, whole) - 1) * channels + part.stop - origin
        yield GroupRun(slice(first, last), slice(at - mine.start, stop - mine.start), max(1, whole))
        at = stop


def covers(runs: Sequence[GroupRun], place: Place) -> bool:
    """Whether the runs read all channels of this rank's input box."""
    box = place.inputs[0][-1]
    return sum(run.channels.stop - run.channels.start for run in runs) == max(0, box.stop - box.start)


def own_part(place: Place) -> slice | None:
    """Where this rank's bias lies in the channels of its partial output; None without a bias."""
    if "bias" not in place.weights:
        return None
    (bias,), channels = place.weights["bias"], place.output[-1]
    return slice(bias.start - channels.start, bias.stop - channels.start)


def covers_all(own_bias: slice | None, y: Array) -> bool:
    """Whether this rank's bias is that of all its outputs, as it is unless these are partial sums."""
    return own_bias is not None and own_bias == slice(0, y.shape[-1])


def through_tail(
    backend: Backend, dy: Array, y: Array, own_bias: slice | None, slope: float, dw: Mapping[str, Array]
) -> None:
    """Turn `dy`, the gradient behind the activation, in place into that before it, and sum it into that of the bias."""
    if own_bias is not None and slope == 1:
        backend.bias_grad(dy[..., own_bias], dw["bias"])
    elif own_bias is not None:
        backend.bias_grad(dy, dw["bias"], y, slope)
    elif slope != 1:
        backend.activation_grad(dy, y, slope)
