"""The meaning of every operation, in NumPy: any float type, any geometry, no compiled code of our own."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod

import numpy as np

from hpctrain.backends.base import Array, Floats, Ints, Sizes

COLUMN_BYTES = 32 * 2**20
"""Limit of the unfolded input that a convolution holds at a time."""


class Reference:
    """NumPy, one thread of Python; what the other backends are compared with."""

    name = "reference"
    dtypes: tuple[str, ...] = ("float32", "float64")

    def describe(self) -> str:
        return f"reference: NumPy {np.__version__} for everything"

    def empty(self, shape: Sizes, dtype: np.dtype) -> Array:
        return np.empty(shape, dtype)

    # --- convolution and matrix multiplication -------------------------------------------------------------------

    def conv(self, x: Floats, w: Floats, out: Floats, stride: Sizes, dilation: Sizes) -> None:
        out.fill(0)
        if x.size == 0:  # no input channels on this rank
            return
        matrix = w.reshape(-1, w.shape[-1])
        windows = _windows(x, w.shape[:-2], stride, dilation)
        for part in _parts(windows):
            columns = windows[part].reshape(-1, matrix.shape[0])
            out[part] = (columns @ matrix).reshape(out[part].shape)

    def conv_dx(self, dy: Floats, w: Floats, out: Floats, stride: Sizes, dilation: Sizes) -> None:
        out.fill(0)
        if out.size == 0:
            return
        matrix = w.reshape(-1, w.shape[-1])
        windows = _windows(out, w.shape[:-2], stride, dilation)
        for part in _parts(windows):
            block = dy[part]
            columns = (block.reshape(-1, block.shape[-1]) @ matrix.T).reshape(windows[part].shape)
            into = windows[part]
            for tap in product(*map(range, w.shape[:-2])):
                # one tap at a time: within a tap no element of dx stands twice
                into[_tap(tap, w.ndim)] += columns[_tap(tap, w.ndim)]

    def conv_dw(self, x: Floats, dy: Floats, out: Floats, stride: Sizes, dilation: Sizes) -> None:
        if out.size == 0:
            return
        matrix = np.zeros((prod(out.shape[:-1]), out.shape[-1]), out.dtype)
        windows = _windows(x, out.shape[:-2], stride, dilation)
        for part in _parts(windows):
            columns = windows[part].reshape(-1, matrix.shape[0])
            matrix += columns.T @ dy[part].reshape(-1, dy.shape[-1])
        out[...] = matrix.reshape(out.shape)

    def gemm(self, a: Floats, b: Floats, out: Floats, transpose_a: bool = False, transpose_b: bool = False) -> None:
        np.matmul(a.T if transpose_a else a, b.T if transpose_b else b, out=out)

    def bias_add(self, y: Floats, b: Floats) -> None:
        y += b

    def bias_grad(self, dy: Floats, out: Floats) -> None:
        out[...] = dy.sum(axis=_all_but_last(dy), dtype=np.float64)

    # --- pooling ---------------------------------------------------------------------------------------------------

    def max_pool(self, x: Floats, out: Floats, index: Ints, kernel: Sizes, stride: Sizes) -> None:
        windows = _windows(x, kernel, stride, (1,) * len(kernel))
        taps = list(product(*map(range, kernel)))
        out[...] = windows[_tap(taps[0], len(kernel) + 2)]
        index.fill(0)
        for place, tap in enumerate(taps[1:], start=1):
            candidate = windows[_tap(tap, len(kernel) + 2)]
            better = (candidate > out) | (np.isnan(candidate) & ~np.isnan(out))
            np.copyto(out, candidate, where=better)
            np.copyto(index, place, where=better)

    def max_pool_dx(self, dy: Floats, index: Ints, out: Floats, kernel: Sizes, stride: Sizes) -> None:
        out.fill(0)
        windows = _windows(out, kernel, stride, (1,) * len(kernel))
        for place, tap in enumerate(product(*map(range, kernel))):
            windows[_tap(tap, len(kernel) + 2)] += np.where(index == place, dy, 0)

    def avg_pool(self, x: Floats, out: Floats, divisor: Floats, kernel: Sizes, stride: Sizes) -> None:
        windows = _windows(x, kernel, stride, (1,) * len(kernel))
        out.fill(0)
        for tap in product(*map(range, kernel)):
            out += windows[_tap(tap, len(kernel) + 2)]
        out /= divisor

    def avg_pool_dx(self, dy: Floats, out: Floats, divisor: Floats, kernel: Sizes, stride: Sizes) -> None:
        share = dy / divisor
        out.fill(0)
        windows = _windows(out, kernel, stride, (1,) * len(kernel))
        for tap in product(*map(range, kernel)):
            windows[_tap(tap, len(kernel) + 2)] += share

    def sum_positions(self, x: Floats, out: Floats, scale: float) -> None:
        out[...] = x.sum(axis=tuple(range(1, x.ndim - 1)), dtype=np.float64) * scale

    def spread_positions(self, dy: Floats, out: Floats, scale: float) -> None:
        out[...] = (dy * dy.dtype.type(scale)).reshape(dy.shape[0], *(1,) * (out.ndim - 2), dy.shape[-1])

    # --- normalization ---------------------------------------------------------------------------------------------

    def moments(self, x: Floats, mean: Floats, m2: Floats) -> None:
        count = max(1, prod(x.shape[:-1]))
        mean[...] = x.sum(axis=_all_but_last(x), dtype=np.float64) / count
        m2[...] = np.square(x - mean).sum(axis=_all_but_last(x))

    def normalize(self, x: Floats, mean: Floats, rstd: Floats, gamma: Floats, beta: Floats, out: Floats) -> None:
        out[...] = (x - mean) * (rstd * gamma) + beta

    def normalize_grad(
        self, dy: Floats, x: Floats, mean: Floats, rstd: Floats, sum_dy: Floats, sum_dy_xhat: Floats
    ) -> None:
        sum_dy[...] = dy.sum(axis=_all_but_last(dy), dtype=np.float64)
        sum_dy_xhat[...] = (dy * (x - mean)).sum(axis=_all_but_last(dy)) * rstd

    def normalize_dx(
        self,
        dy: Floats,
        x: Floats,
        mean: Floats,
        rstd: Floats,
        gamma: Floats,
        mean_dy: Floats,
        mean_dy_xhat: Floats,
        out: Floats,
    ) -> None:
        out[...] = (dy - mean_dy - (x - mean) * (rstd * mean_dy_xhat)) * (rstd * gamma)

    # --- elementwise -----------------------------------------------------------------------------------------------

    def add(self, a: Floats, b: Floats, out: Floats) -> None:
        np.add(a, b, out=out)

    def relu(self, x: Floats, out: Floats) -> None:
        np.maximum(x, 0, out=out)

    def relu_dx(self, dy: Floats, y: Floats, out: Floats) -> None:
        np.copyto(out, np.where(y > 0, dy, 0))

    # --- losses ------------------------------------------------------------------------------------------------------

    def softmax_cross_entropy(self, logits: Floats, labels: Ints, loss: Floats, probability: Floats) -> None:
        shifted = logits - logits.max(axis=1, keepdims=True)
        exponentials = np.exp(shifted)
        total = exponentials.sum(axis=1, keepdims=True)
        np.divide(exponentials, total, out=probability)
        loss[...] = np.log(total[:, 0]) - shifted[np.arange(len(labels)), labels]

    def softmax_cross_entropy_dx(self, probability: Floats, labels: Ints, scale: Floats, out: Floats) -> None:
        np.copyto(out, probability)
        out[np.arange(len(labels)), labels] -= 1
        out *= scale[:, None]

    def squared_error(self, x: Floats, target: Floats, loss: Floats) -> None:
        loss[...] = np.square(x - target).sum(axis=1)

    def squared_error_dx(self, x: Floats, target: Floats, scale: Floats, out: Floats) -> None:
        np.multiply(x - target, 2 * scale[:, None], out=out)

    # --- optimizer ---------------------------------------------------------------------------------------------------

    def sgd_update(
        self, w: Floats, g: Floats, velocity: Floats, lr: float, momentum: float, weight_decay: float, nesterov: bool
    ) -> None:
        step = g + weight_decay * w
        velocity *= momentum
        velocity += step
        w -= lr * (step + momentum * velocity if nesterov else velocity)


def _windows(x: Floats, kernel: Sizes, stride: Sizes, dilation: Sizes) -> Floats:
    """The view (N, *outputs, *kernel, C) of x (N, *inputs, C); writable, and it shares elements between windows."""
    outputs = tuple(
        max(0, (n - d * (k - 1) - 1) // s + 1)
        for n, k, s, d in zip(x.shape[1:-1], kernel, stride, dilation, strict=True)
    )
    inner = x.strides[1:-1]
    strides = (
        x.strides[0],
        *(b * s for b, s in zip(inner, stride, strict=True)),
        *(b * d for b, d in zip(inner, dilation, strict=True)),
        x.strides[-1],
    )
    return np.lib.stride_tricks.as_strided(x, (x.shape[0], *outputs, *kernel, x.shape[-1]), strides)


def _parts(windows: Floats) -> Iterator[tuple[slice, slice]]:
    """Slices of samples and of the first position dim whose unfolded windows stay under COLUMN_BYTES."""
    samples, rows = windows.shape[:2]
    row_bytes = max(1, prod(windows.shape[2:]) * windows.itemsize)
    rows_at_once = max(1, min(rows, COLUMN_BYTES // row_bytes))
    samples_at_once = max(1, COLUMN_BYTES // (row_bytes * rows)) if 0 < rows == rows_at_once else 1
    for n in range(0, samples, samples_at_once):
        for row in range(0, rows, rows_at_once):
            yield slice(n, n + samples_at_once), slice(row, row + rows_at_once)


def _tap(tap: Sizes, ndim: int) -> tuple[slice | int, ...]:
    """Index of one kernel position in `_windows` of an ndim-dimensional x."""
    return (slice(None),) * (ndim - 1) + tap


def _all_but_last(x: Array) -> tuple[int, ...]:
    return tuple(range(x.ndim - 1))
