"""The meaning of every operation, in NumPy: any float type, any geometry, no compiled code of our own."""

from __future__ import annotations

from math import prod

import numpy as np

from hpctrain.backends import losses, pointwise, windows
from hpctrain.backends.base import Array, Floats, Ints, Sizes
from hpctrain.backends.rounding import in_float32, to_bfloat16


@in_float32("describe", "empty", "use_threads", "widen", "narrow")
class Reference:
    """NumPy, one thread of Python; what the other backends are compared with."""

    name = "reference"
    dtypes: tuple[str, ...] = ("float32", "float64", "bfloat16")

    def describe(self) -> str:
        return f"reference: NumPy {np.__version__} for everything"

    def use_threads(self, count: int) -> None:
        """NumPy's matrix products have threads that only the environment can set."""

    def empty(self, shape: Sizes, dtype: np.dtype) -> Array:
        return np.empty(shape, dtype)

    # --- convolution and matrix multiplication -------------------------------------------------------------------

    def conv(
        self,
        x: Floats,
        w: Floats,
        out: Floats,
        stride: Sizes,
        dilation: Sizes,
        groups: int = 1,
        bias: Floats | None = None,
        slope: float = 1.0,
    ) -> None:
        windows.conv(x, w, out, stride, dilation, groups)
        _finish(out, bias, slope)

    def conv_dx(self, dy: Floats, w: Floats, out: Floats, stride: Sizes, dilation: Sizes, groups: int = 1) -> None:
        windows.conv_dx(dy, w, out, stride, dilation, groups)

    def conv_dw(self, x: Floats, dy: Floats, out: Floats, stride: Sizes, dilation: Sizes, groups: int = 1) -> None:
        windows.conv_dw(x, dy, out, stride, dilation, groups)

    def gemm(
        self,
        a: Floats,
        b: Floats,
        out: Floats,
        transpose_a: bool = False,
        transpose_b: bool = False,
        bias: Floats | None = None,
        slope: float = 1.0,
    ) -> None:
        np.matmul(a.T if transpose_a else a, b.T if transpose_b else b, out=out)
        _finish(out, bias, slope)

    def bias_add(self, y: Floats, b: Floats) -> None:
        y += b

    def bias_grad(self, dy: Floats, out: Floats, y: Floats | None = None, slope: float = 1.0) -> None:
        if y is not None:
            self.activation_grad(dy, y, slope)
        out[...] = _sum_to(dy, out)

    def widen(self, x: Floats, out: Floats) -> None:
        out[...] = x

    def narrow(self, x: Floats, out: Floats) -> None:
        out[...] = to_bfloat16(x)

    # --- pooling ---------------------------------------------------------------------------------------------------

    def max_pool(
        self, x: Floats, out: Floats, index: Ints, kernel: Sizes, stride: Sizes, dilation: Sizes | None = None
    ) -> None:
        first, *others = windows.taps(windows.windows(x, kernel, stride, dilation), kernel)
        out[...] = first
        index.fill(0)
        for place, candidate in enumerate(others, start=1):
            better = (candidate > out) | (np.isnan(candidate) & ~np.isnan(out))
            np.copyto(out, candidate, where=better)
            np.copyto(index, place, where=better)

    def max_pool_dx(
        self, dy: Floats, index: Ints, out: Floats, kernel: Sizes, stride: Sizes, dilation: Sizes | None = None
    ) -> None:
        out.fill(0)
        for place, into in enumerate(windows.taps(windows.windows(out, kernel, stride, dilation), kernel)):
            into += np.where(index == place, dy, 0)

    def avg_pool(self, x: Floats, out: Floats, divisor: Floats, kernel: Sizes, stride: Sizes) -> None:
        out.fill(0)
        for values in windows.taps(windows.windows(x, kernel, stride), kernel):
            out += values
        out /= divisor

    def avg_pool_dx(self, dy: Floats, out: Floats, divisor: Floats, kernel: Sizes, stride: Sizes) -> None:
        share = dy / divisor
        out.fill(0)
        for into in windows.taps(windows.windows(out, kernel, stride), kernel):
            into += share

    def sum_positions(self, x: Floats, out: Floats, scale: float) -> None:
        out[...] = x.sum(axis=tuple(range(1, x.ndim - 1)), dtype=np.float64) * scale

    def spread_positions(self, dy: Floats, out: Floats, scale: float) -> None:
        out[...] = (dy * dy.dtype.type(scale)).reshape(dy.shape[0], *(1,) * (out.ndim - 2), dy.shape[-1])

    def resample(self, x: Floats, out: Floats, dim: int, index: Ints, weight: Floats) -> None:
        out.fill(0)
        if out.size == 0:
            return
        factors = np.expand_dims(weight.astype(x.dtype).T, tuple(range(2, x.ndim - dim + 1)))
        for read, factor in zip(index.T, factors, strict=True):
            out += np.take(x, read, axis=dim) * factor

    def resample_dx(self, dy: Floats, out: Floats, dim: int, index: Ints, weight: Floats) -> None:
        out.fill(0)
        if dy.size == 0 or out.size == 0:
            return
        into, factors = np.moveaxis(out, dim, 0), weight.astype(dy.dtype).ravel()
        for pairs in _without_duplicates(index.ravel()):
            factor = np.expand_dims(factors[pairs], tuple(range(1, dy.ndim - dim)))
            share = np.take(dy, pairs // index.shape[1], axis=dim) * factor
            into[index.ravel()[pairs]] += np.moveaxis(share, dim, 0)

    # --- normalization ---------------------------------------------------------------------------------------------

    def moments(self, x: Floats, mean: Floats, m2: Floats) -> None:
        count = prod(x.shape) // max(1, prod(mean.shape))
        mean[...] = _sum_to(x, mean) / max(1, count)
        m2[...] = _sum_to(np.square(x - mean), m2)

    def normalize(
        self,
        x: Floats,
        mean: Floats,
        rstd: Floats,
        gamma: Floats,
        beta: Floats,
        out: Floats,
        add: Floats | None = None,
        slope: float = 1.0,
    ) -> None:
        _require_slope(slope)
        value = (x - mean) * rstd * gamma + beta
        if add is not None:
            value = value + add
        out[...] = (
            value if slope == 1 else np.maximum(value, 0) if slope == 0 else np.where(value > 0, value, slope * value)
        )

    def normalize_grad(
        self,
        dy: Floats,
        x: Floats,
        mean: Floats,
        rstd: Floats,
        sum_dy: Floats,
        sum_dy_xhat: Floats,
        y: Floats | None = None,
        slope: float = 1.0,
    ) -> None:
        if y is not None:
            self.activation_grad(dy, y, slope)
        sum_dy[...] = _sum_to(dy, sum_dy)
        sum_dy_xhat[...] = _sum_to((x - mean) * rstd * dy, sum_dy_xhat)

    def normalize_dx(
        self,
        dy: Floats,
        x: Floats,
        mean: Floats,
        rstd: Floats,
        gamma: Floats,
        mean_g: Floats,
        mean_g_xhat: Floats,
        out: Floats,
    ) -> None:
        xhat = (x - mean) * rstd
        out[...] = rstd * (gamma * dy - mean_g - xhat * mean_g_xhat)

    # --- elementwise -----------------------------------------------------------------------------------------------

    def add(self, a: Floats, b: Floats, out: Floats) -> None:
        np.add(a, b, out=out)

    def relu(self, x: Floats, out: Floats) -> None:
        np.maximum(x, 0, out=out)

    def relu_dx(self, dy: Floats, y: Floats, out: Floats) -> None:
        np.copyto(out, np.where(y > 0, dy, 0))

    def activation_grad(self, dy: Floats, y: Floats, slope: float) -> None:
        _require_slope(slope)
        np.copyto(dy, slope * dy if slope else np.zeros_like(dy), where=~(y > 0))

    def multiply(self, a: Floats, b: Floats, out: Floats) -> None:
        np.multiply(a, b, out=out)

    def activate(self, kind: str, x: Floats, out: Floats, slope: float = 0.0) -> None:
        out[...] = pointwise.activation(kind, x, slope)

    def activate_dx(self, kind: str, dy: Floats, x: Floats, out: Floats, slope: float = 0.0) -> None:
        np.multiply(dy, pointwise.activation_slope(kind, x, slope), out=out)

    def softmax(self, x: Floats, out: Floats) -> None:
        if x.size == 0:
            return
        exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
        np.divide(exponentials, exponentials.sum(axis=-1, keepdims=True), out=out)

    def softmax_dx(self, dy: Floats, y: Floats, out: Floats) -> None:
        np.multiply(y, dy - (dy * y).sum(axis=-1, keepdims=True), out=out)

    # --- losses ------------------------------------------------------------------------------------------------------

    def cross_entropy(
        self, logits: Floats, labels: Ints, weight: Floats, smoothing: float, loss: Floats, probability: Floats
    ) -> None:
        losses.cross_entropy(logits, labels, weight, smoothing, loss, probability)

    def cross_entropy_dx(
        self, probability: Floats, labels: Ints, weight: Floats, smoothing: float, scale: Floats, out: Floats
    ) -> None:
        losses.cross_entropy_dx(probability, labels, weight, smoothing, scale, out)

    def label_scores(
        self, logits: Floats, labels: Ints, weight: Floats, total: Floats, correct: Floats, count: Floats
    ) -> None:
        losses.label_scores(logits, labels, weight, total, correct, count)

    def pointwise_loss(self, kind: str, x: Floats, target: Floats, loss: Floats, delta: float = 1.0) -> None:
        loss[...] = losses.per_sample(pointwise.loss(kind, x, target, delta))

    def pointwise_loss_dx(
        self, kind: str, x: Floats, target: Floats, scale: Floats, out: Floats, delta: float = 1.0
    ) -> None:
        np.multiply(pointwise.loss_slope(kind, x, target, delta), losses.rows(scale, x), out=out)

    def agreement(self, x: Floats, target: Floats, out: Floats) -> None:
        out[...] = losses.per_sample((x > 0) == (target > 0.5))

    # --- optimizer ---------------------------------------------------------------------------------------------------

    def sgd_update(
        self, w: Floats, g: Floats, velocity: Floats, lr: float, momentum: float, weight_decay: float, nesterov: bool
    ) -> None:
        step = g + weight_decay * w
        velocity *= momentum
        velocity += step
        w -= lr * (step + momentum * velocity if nesterov else velocity)

    def adam_update(
        self,
        w: Floats,
        g: Floats,
        mean: Floats,
        square: Floats,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        decoupled: bool,
        update: int,
    ) -> None:
        if decoupled:
            w *= 1.0 - lr * weight_decay
        else:
            g = g + weight_decay * w
        mean *= beta1
        mean += (1.0 - beta1) * g
        square *= beta2
        square += (1.0 - beta2) * (g * g)
        root = np.sqrt(square) * (1.0 - beta2**update) ** -0.5
        w -= lr / (1.0 - beta1**update) * (mean / (root + eps))

    def lars_update(
        self, w: Floats, g: Floats, velocity: Floats, rate: float, momentum: float, weight_decay: float
    ) -> None:
        velocity *= momentum
        velocity += rate * (g + weight_decay * w)
        w -= velocity

    def sum_squares(self, x: Floats) -> float:
        return float(np.square(x, dtype=np.float64).sum())


def _finish(out: Array, bias: Array | None, slope: float) -> None:
    """Adds the bias and applies the activation of `conv` and `gemm`, in place."""
    if bias is not None:
        out += bias
    if slope == 0:
        np.maximum(out, 0, out=out)
    elif slope != 1:
        out[...] = pointwise.activation("leaky_relu", out, slope)


def _require_slope(slope: float) -> None:
    if not slope >= 0:
        raise ValueError(f"slope {slope}; a fused activation's is 0 or more")


def _sum_to(x: Array, like: Array) -> Array:
    """x summed in float64 over the dims that `like`, which broadcasts against it, has not or has as 1."""
    shape = (1,) * (x.ndim - like.ndim) + like.shape
    axes = tuple(d for d, n in enumerate(shape) if n == 1)
    return x.sum(axis=axes, dtype=np.float64).reshape(like.shape)


def _without_duplicates(values: Ints) -> list[Ints]:
    """The positions of a vector, in as few sets as there can be without a value twice in one of them."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    earlier = np.arange(len(order)) - np.searchsorted(ordered, ordered)  # how often the value came before
    return [order[earlier == times] for times in range(earlier.max(initial=-1) + 1)]
