"""Sliding windows of NumPy arrays as views, and convolution as matrix products of what they show."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod

import numpy as np

from hpctrain.backends.base import Floats, Sizes

COLUMN_BYTES = 32 * 2**20
"""Limit of the unfolded input that a convolution holds at a time."""


def windows(x: Floats, kernel: Sizes, stride: Sizes, dilation: Sizes | None = None) -> Floats:
    """The view (N, *outputs, *kernel, C) of x (N, *inputs, C); writable, and it shares elements between windows."""
    dilation = dilation or (1,) * len(kernel)
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


def taps(seen: Floats, kernel: Sizes) -> list[Floats]:
    """What each kernel position sees, in C order of positions: views (N, *outputs, C) of `windows` of that kernel.

    Within one of them no element of the array stands twice: it can be added to.
    """
    before = (slice(None),) * (1 + len(kernel))
    return [seen[before + tap] for tap in product(*map(range, kernel))]


def conv(x: Floats, w: Floats, out: Floats, stride: Sizes, dilation: Sizes, groups: int) -> None:
    """`Backend.conv`."""
    out.fill(0)
    if x.size == 0 or w.size == 0:  # this rank has no input channels, or no filters
        return
    kernel, matrices = w.shape[:-2], _matrices(w, groups)
    seen, into = _by_group(windows(x, kernel, stride, dilation), groups), _by_group(out, groups)
    for part in _parts(seen):
        values = _unfold(seen, part, len(kernel)) @ matrices
        into[part] = np.moveaxis(values.reshape(groups, *into[part].shape[:-2], -1), 0, -2)


def conv_dx(dy: Floats, w: Floats, out: Floats, stride: Sizes, dilation: Sizes, groups: int) -> None:
    """`Backend.conv_dx`."""
    out.fill(0)
    if out.size == 0 or dy.size == 0:
        return
    kernel, matrices = w.shape[:-2], _matrices(w, groups).swapaxes(1, 2)
    seen, slopes = _by_group(windows(out, kernel, stride, dilation), groups), _by_group(dy, groups)
    for part in _parts(seen):
        columns = _unfold(slopes, part, 0) @ matrices
        columns = np.moveaxis(columns.reshape(groups, *seen[part].shape[:-2], -1), 0, -2)
        for into, share in zip(taps(seen[part], kernel), taps(columns, kernel), strict=True):
            into += share


def conv_dw(x: Floats, dy: Floats, out: Floats, stride: Sizes, dilation: Sizes, groups: int) -> None:
    """`Backend.conv_dw`."""
    if out.size == 0:
        return
    kernel, matrices = out.shape[:-2], np.zeros_like(_matrices(out, groups))
    seen, slopes = _by_group(windows(x, kernel, stride, dilation), groups), _by_group(dy, groups)
    for part in _parts(seen):
        matrices += _unfold(seen, part, len(kernel)).swapaxes(1, 2) @ _unfold(slopes, part, 0)
    grouped = matrices.reshape(groups, *out.shape[:-1], -1)
    out[...] = np.moveaxis(grouped, 0, -2).reshape(out.shape)


def _matrices(w: Floats, groups: int) -> Floats:
    """(groups, kernel positions * channels, filters), both of one group, from w (*kernel, channels, groups * filters).

    Groups are a dim of the products, not a loop: a depthwise convolution has as many as channels.
    """
    rows, filters = prod(w.shape[:-1]), w.shape[-1] // groups
    return np.ascontiguousarray(w.reshape(rows, groups, filters).swapaxes(0, 1))


def _by_group(x: Floats, groups: int) -> Floats:
    """The view (..., groups, channels of one group) of an array (..., channels)."""
    channels = x.shape[-1] // groups
    strides = (*x.strides[:-1], channels * x.strides[-1], x.strides[-1])
    return np.lib.stride_tricks.as_strided(x, (*x.shape[:-1], groups, channels), strides)


def _unfold(seen: Floats, part: tuple[slice, slice], kernel_dims: int) -> Floats:
    """(groups, positions, kernel positions * channels) of part of an array (N, *outputs, *kernel, groups, channels)."""
    block = np.moveaxis(seen[part], -2, 0)
    positions = block.ndim - kernel_dims - 1
    return block.reshape(block.shape[0], prod(block.shape[1:positions]), prod(block.shape[positions:]))


def _parts(seen: Floats) -> Iterator[tuple[slice, slice]]:
    """Slices of samples and of the first position dim whose unfolded windows stay under COLUMN_BYTES."""
    samples, rows = seen.shape[:2]
    row_bytes = max(1, prod(seen.shape[2:]) * seen.itemsize)
    rows_at_once = max(1, min(rows, COLUMN_BYTES // row_bytes))
    samples_at_once = max(1, COLUMN_BYTES // (row_bytes * rows)) if 0 < rows == rows_at_once else 1
    for n in range(0, samples, samples_at_once):
        for row in range(0, rows, rows_at_once):
            yield slice(n, n + samples_at_once), slice(row, row + rows_at_once)
