"""Functions of each element of one tensor, and softmax, a function of each position's channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, prod
from typing import ClassVar

from hpctrain.backends.base import Array
from hpctrain.errors import PlanError
from hpctrain.layers.base import Dims, Layer, Phase, Place
from hpctrain.partition import Shape, extent, within
from hpctrain.regions import Along

TRANSCENDENTAL = 10
"""Operations that an exponential, logarithm or error function is counted as."""


@dataclass(frozen=True)
class ReLU(Layer):
    """y = max(x, 0) for each element; any shape."""

    keeps_inputs: ClassVar[bool] = False

    def output_shape(self, *x: Shape) -> Shape:
        return x[0]

    def bind(self, place: Place) -> ReLUOp:
        return ReLUOp(place)


class ReLUOp:
    """Remembers its output, which says where the gradient passes."""

    def __init__(self, place: Place) -> None:
        self.backend = place.backend

    def forward(self, x: Sequence[Array], w: Mapping[str, Array], y: Array, phase: Phase) -> None:
        self.y = y
        self.backend.relu(x[0], y)

    def backward(self, dy: Array, w: Mapping[str, Array], dx: Sequence[Array | None], dw: Mapping[str, Array]) -> None:
        if dx[0] is not None:
            self.backend.relu_dx(dy, self.y, dx[0])


# --- other functions of each element ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Activation(Layer):
    """y = f(x) for each element, f being the backend's function `kind`; any shape."""

    keeps_output: ClassVar[bool] = False
    kind: ClassVar[str]

    def output_shape(self, *x: Shape) -> Shape:
        return x[0]

    def flops(self, *x: Shape) -> int:
        return TRANSCENDENTAL * prod(x[0])

    def bind(self, place: Place) -> ActivationOp:
        return ActivationOp(place, self.kind)


@dataclass(frozen=True)
class LeakyReLU(Activation):
    """y = x where x > 0, else slope * x; any shape."""

    kind: ClassVar[str] = "leaky_relu"
    slope: float = 0.01

    def output_shape(self, *x: Shape) -> Shape:
        if not isfinite(self.slope):
            raise PlanError(f"leaky ReLU: slope = {self.slope}; give a finite number, 0.01 by default")
        return x[0]

    def flops(self, *x: Shape) -> int:
        return prod(x[0])

    def bind(self, place: Place) -> ActivationOp:
        return ActivationOp(place, self.kind, self.slope)


@dataclass(frozen=True)
class GELU(Activation):
    """y = x * Phi(x), Phi being the normal distribution function (Hendrycks & Gimpel 2016); any shape."""

    kind: ClassVar[str] = "gelu"


@dataclass(frozen=True)
class SiLU(Activation):
    """y = x / (1 + exp(-x)), also called swish; any shape."""

    kind: ClassVar[str] = "silu"


@dataclass(frozen=True)
class Sigmoid(Activation):
    """y = 1 / (1 + exp(-x)); any shape."""

    kind: ClassVar[str] = "sigmoid"


@dataclass(frozen=True)
class Tanh(Activation):
    """y = tanh(x); any shape."""

    kind: ClassVar[str] = "tanh"


@dataclass(frozen=True)
class Softplus(Activation):
    """y = log(1 + exp(x)); any shape."""

    kind: ClassVar[str] = "softplus"


class ActivationOp:
    """Remembers its input, at which the derivative is taken."""

    def __init__(self, place: Place, kind: str, slope: float = 0.0) -> None:
        self.backend, self.kind, self.slope = place.backend, kind, slope

    def forward(self, x: Sequence[Array], w: Mapping[str, Array], y: Array, phase: Phase) -> None:
        self.x = x[0]
        self.backend.activate(self.kind, self.x, y, self.slope)

    def backward(self, dy: Array, w: Mapping[str, Array], dx: Sequence[Array | None], dw: Mapping[str, Array]) -> None:
        if dx[0] is not None:
            self.backend.activate_dx(self.kind, dy, self.x, dx[0], self.slope)


# --- softmax ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Softmax(Layer):
    """y[..., c] = exp(x[..., c]) / sum over k of exp(x[..., k]); (N, C) or more dims.

    Where channels are cut, each rank fetches all channels of its positions and keeps its own of the result.
    """

    keeps_inputs: ClassVar[bool] = False

    def output_shape(self, *x: Shape) -> Shape:
        if len(x[0]) < 2:
            raise PlanError(f"softmax: the input {x[0]} has no channels; give (N, C), or positions between the two")
        return x[0]

    def needs(self, *x: Shape) -> tuple[Dims, ...]:
        return ((*(Along(d) for d in range(len(x[0]) - 1)), None),)

    def flops(self, *x: Shape) -> int:
        return (TRANSCENDENTAL + 3) * prod(x[0])

    def kept_bytes(self, itemsize: int, output: Shape, *x: Shape) -> int:
        return 0 if output == x[0] else 2 * itemsize * prod(x[0])

    def bind(self, place: Place) -> SoftmaxOp:
        return SoftmaxOp(place)


class SoftmaxOp:
    """The softmax of whole rows. Where channels are cut, dx is what this rank's add to it; the ranks' are summed."""

    def __init__(self, place: Place) -> None:
        self.backend, self.own = place.backend, within(place.output, place.inputs[0])
        self.cut = extent(place.output) != extent(place.inputs[0])
        if self.cut:
            self.whole = place.backend.empty(extent(place.inputs[0]), place.dtype)
            self.dwhole = place.backend.empty(extent(place.inputs[0]), place.dtype)

    def forward(self, x: Sequence[Array], w: Mapping[str, Array], y: Array, phase: Phase) -> None:
        self.y = self.whole if self.cut else y
        self.backend.softmax(x[0], self.y)
        if self.cut:
            y[...] = self.whole[self.own]

    def backward(self, dy: Array, w: Mapping[str, Array], dx: Sequence[Array | None], dw: Mapping[str, Array]) -> None:
        if dx[0] is None:
            return
        if self.cut:
            self.dwhole.fill(0)
            self.dwhole[self.own] = dy
            dy = self.dwhole
        self.backend.softmax_dx(dy, self.y, dx[0])
