"""Convolution (cross-correlation), cut along batch, positions, filters and input channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt

from hpctrain.backends.base import Array
from hpctrain.errors import PlanError
from hpctrain.layers.base import Dims, Layer, Place, Weight, Window, tensor_axes, windows
from hpctrain.partition import Along, AxisNames, Shape


@dataclass(frozen=True)
class Conv(Layer):
    """y (N, [D,] H, W, filters) from x (N, [D,] H, W, C); weight ([kd,] kh, kw, C, filters), bias (filters,).

    Work: the output's dims, then input channels. Axis "channel" cuts filters, "contraction" cuts input channels.
    """

    filters: int
    kernel: int | tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1
    bias: bool = True

    def windows(self, x: Shape) -> tuple[Window, ...]:
        """One window per position dim."""
        return windows(x, self.kernel, self.stride, self.padding, self.dilation)

    def output_shape(self, *x: Shape) -> Shape:
        if self.filters < 1:
            raise PlanError(f"filters = {self.filters}; give 1 or more")
        (x0,) = x
        return (x0[0], *(w.output(n) for w, n in zip(self.windows(x0), x0[1:-1], strict=True)), self.filters)

    def work_shape(self, *x: Shape) -> Shape:
        return (*self.output_shape(*x), x[0][-1])

    def work_axes(self, *x: Shape) -> tuple[AxisNames, ...]:
        return (*tensor_axes(len(x[0])), "contraction")

    def output_axes(self, *x: Shape) -> tuple[AxisNames, ...]:
        return (*tensor_axes(len(x[0]))[:-1], ("channel", "contraction"))

    def needs(self, *x: Shape) -> tuple[Dims, ...]:
        positions = (Along(d, window) for d, window in enumerate(self.windows(x[0]), start=1))
        return ((Along(0), *positions, Along(len(x[0]))),)

    def weights(self, *x: Shape) -> dict[str, Weight]:
        kernel = tuple(w.kernel for w in self.windows(x[0]))
        channels = x[0][-1]
        # He et al. 2015, equation 10: keeps the variance of activations through ReLU
        std = sqrt(2.0 / (prod(kernel) * channels))
        found = {
            "weight": Weight(
                (*kernel, channels, self.filters),
                (*(None for _ in kernel), "contraction", "channel"),
                ("normal", std),
                decay=True,
            )
        }
        if self.bias:
            # cut like the owned output, so that each partial sum carries each bias once
            found["bias"] = Weight((self.filters,), (("channel", "contraction"),), ("constant", 0.0))
        return found

    def flops(self, *x: Shape) -> int:
        return 2 * prod(self.work_shape(*x)) * prod(w.kernel for w in self.windows(x[0]))

    def bind(self, place: Place) -> ConvOp:
        return ConvOp(self, place)


class ConvOp:
    """A valid convolution of the assembled input box."""

    def __init__(self, layer: Conv, place: Place) -> None:
        found = layer.windows(place.shapes[0])
        self.backend = place.backend
        self.stride = tuple(w.stride for w in found)
        self.dilation = tuple(w.dilation for w in found)
        self.own_bias = own_part(place)

    def forward(self, x: Sequence[Array], w: Mapping[str, Array], y: Array, training: bool) -> None:
        self.x = x[0]
        self.backend.conv(self.x, w["weight"], y, self.stride, self.dilation)
        if self.own_bias is not None:
            self.backend.bias_add(y[..., self.own_bias], w["bias"])

    def backward(self, dy: Array, w: Mapping[str, Array], dx: Sequence[Array | None], dw: Mapping[str, Array]) -> None:
        self.backend.conv_dw(self.x, dy, dw["weight"], self.stride, self.dilation)
        if self.own_bias is not None:
            self.backend.bias_grad(dy[..., self.own_bias], dw["bias"])
        if dx[0] is not None:
            self.backend.conv_dx(dy, w["weight"], dx[0], self.stride, self.dilation)


def own_part(place: Place) -> slice | None:
    """Where this rank's bias lies in the channels of its partial output; None without a bias."""
    if "bias" not in place.weights:
        return None
    (bias,), channels = place.weights["bias"], place.output[-1]
    return slice(bias.start - channels.start, bias.stop - channels.start)
