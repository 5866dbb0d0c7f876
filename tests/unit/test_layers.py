"""Layers against definitions written out here or in other libraries, and their gradients against differences."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import inf
from typing import Any

import numpy as np
import pytest
from networks import CASES, LAYERS
from ops import Bound, alone, case, paste, random_weights, run
from scipy.signal import correlate

from hpctrain.backends import windows
from hpctrain.layers import (
    Add,
    AvgPool,
    Conv,
    Dense,
    Flatten,
    GlobalAvgPool,
    MaxPool,
    ReLU,
)
from hpctrain.layers.loss import SCORE, WEIGHT, Loss
from hpctrain.partition import Shape

# --- gradients ----------------------------------------------------------------------------------------------------


def slopes(f: Callable[[], float], x: np.ndarray, h: float = 1e-5) -> np.ndarray:
    """Central differences of f() by every element of `x`, which f reads."""
    found = np.empty(x.shape)
    for at in np.ndindex(x.shape):
        before = x[at]
        x[at] = before + h
        above = f()
        x[at] = before - h
        found[at] = (above - f()) / (2 * h)
        x[at] = before
    return found


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_differences(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    layer, xs = case(name, rng)
    place = alone(layer, *(x.shape for x in xs))
    bound = Bound(place, 0, random_weights(place, rng))
    dy = rng.normal(size=place.output.shape)
    if isinstance(layer, Loss):
        dy[:, [WEIGHT, SCORE]] = 0  # these have no gradient

    def scalar() -> float:
        return float((bound.forward(xs) * dy).sum())

    scalar()
    dxs, dws = bound.backward(dy)
    # differences err by h**2 / 6 of the third derivative (1e-11 here, 0 where linear) and by 2**-53 * |scalar| / h: at
    # most 1e-16 * 1e2 / 1e-5 = 1e-9
    for x, block, wish in zip(xs[: 1 if isinstance(layer, Loss) else None], dxs, bound.wants, strict=False):
        dx = np.zeros(x.shape)
        paste(block, wish, dx)
        np.testing.assert_allclose(dx, slopes(scalar, x), rtol=1e-6, atol=1e-7)
    for weight in place.weights:
        np.testing.assert_allclose(dws[weight], slopes(scalar, bound.w[weight]), rtol=1e-6, atol=1e-7, err_msg=weight)


# --- definitions --------------------------------------------------------------------------------------------------


def dilate(w: np.ndarray, dilation: tuple[int, ...]) -> np.ndarray:
    """`w` (kernel..., C, F) with zeros between its taps."""
    wide = tuple(d * (k - 1) + 1 for d, k in zip(dilation, w.shape[:-2], strict=True))
    found = np.zeros((*wide, *w.shape[-2:]))
    found[tuple(slice(None, None, d) for d in dilation)] = w
    return found


PLAIN = [n for n, (_, c) in LAYERS.items() if isinstance(c, Conv) and (c.groups, c.border) == (1, "zero")]
"""Convolutions that scipy knows; test_layers_conv.py has all of them."""


def convolved(layer: Conv, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Convolution by scipy: one sample, channel and filter at a time at full resolution, then every stride-th."""
    assert (layer.groups, layer.border) == (1, "zero")
    found = layer.windows(x.shape)
    padded = np.pad(x, [(0, 0), *((window.before, window.after) for window in found), (0, 0)])
    w = dilate(w, tuple(window.dilation for window in found))
    keep = tuple(slice(None, None, window.stride) for window in found)
    return np.stack(
        [
            np.stack(
                [
                    sum(correlate(sample[..., c], w[..., c, f], "valid")[keep] for c in range(x.shape[-1]))
                    for f in range(w.shape[-1])
                ],
                axis=-1,
            )
            for sample in padded
        ]
    )


@pytest.mark.parametrize("name", PLAIN)
def test_convolution_equals_scipy(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    layer, (x,) = case(name, rng)
    assert isinstance(layer, Conv)
    place = alone(layer, x.shape)
    weights = random_weights(place, rng)
    expected = convolved(layer, x, weights["weight"]) + weights.get("bias", 0)
    assert place.output.shape == expected.shape
    # at most 3 * 3 * 3 * 4 products of order 1 (scipy may use an FFT: a few more roundings)
    np.testing.assert_allclose(run(layer, x, **weights), expected, rtol=1e-12, atol=1e-12)


def test_convolution_in_parts_is_the_convolution(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large inputs are unfolded a few samples, or rows, at a time: here with limits from one row to everything."""
    rng, layer = np.random.default_rng(seed), Conv(4, kernel=3, stride=2, padding=1)
    x = rng.normal(size=(5, 9, 7, 3))
    place = alone(layer, x.shape)
    bound, dy = Bound(place, 0, random_weights(place, rng)), rng.normal(size=place.output.shape)
    y = bound.forward([x])
    (dx,), dw = bound.backward(dy)
    for limit in (1, 1000, 3000, 10_000, 20_000):
        monkeypatch.setattr(windows, "COLUMN_BYTES", limit)
        np.testing.assert_allclose(bound.forward([x]), y, rtol=1e-12, atol=1e-12)
        (again,), grown = bound.backward(dy)
        np.testing.assert_allclose(again, dx, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(grown["weight"], dw["weight"], rtol=1e-12, atol=1e-12)


def pooled(x: np.ndarray, layer: MaxPool | AvgPool, fill: float, reduce: Callable[[np.ndarray], Any]) -> np.ndarray:
    """Pooling window by window."""
    found = layer.windows(x.shape)
    padded = np.pad(x, [(0, 0), *((w.before, w.after) for w in found), (0, 0)], constant_values=fill)
    counts = [(n - w.kernel) // w.stride + 1 for w, n in zip(found, padded.shape[1:-1], strict=True)]
    y = np.empty((x.shape[0], *counts, x.shape[-1]))
    for n, c in product(range(x.shape[0]), range(x.shape[-1])):
        for at in np.ndindex(*counts):
            window = tuple(slice(i * w.stride, i * w.stride + w.kernel) for i, w in zip(at, found, strict=True))
            y[(n, *at, c)] = reduce(padded[(n, *window, c)])
    return y


POOLS: dict[str, tuple[Shape, MaxPool | AvgPool]] = {
    name: (shape, layer)
    for name, (shape, layer) in LAYERS.items()
    if isinstance(layer, MaxPool | AvgPool) and not layer.ceil
}


@pytest.mark.parametrize("name", POOLS)
def test_pooling_equals_windows_one_by_one(name: str, seed: int) -> None:
    shape, layer = POOLS[name]
    x = np.random.default_rng(seed).normal(size=shape)
    if isinstance(layer, MaxPool):
        expected = pooled(x, layer, -inf, np.max)
        np.testing.assert_array_equal(run(layer, x), expected)
    else:
        # padding that does not count is left out of the mean altogether
        expected = pooled(x, layer, 0.0, np.mean) if layer.count_padding else pooled(x, layer, np.nan, np.nanmean)
        np.testing.assert_allclose(run(layer, x), expected, rtol=1e-13, atol=1e-15)
    assert alone(layer, shape).output.shape == expected.shape


def test_average_pool_that_counts_padding(seed: int) -> None:
    x, layer = np.random.default_rng(seed).normal(size=(2, 5, 7, 3)), AvgPool(3, stride=2, padding=1)
    np.testing.assert_allclose(run(layer, x), pooled(x, layer, 0.0, np.mean), rtol=1e-13, atol=1e-15)


def test_other_layers_equal_one_line_of_numpy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, 3, 5, 4, 2)), rng.normal(size=(2, 3, 5, 4, 2))
    np.testing.assert_allclose(run(GlobalAvgPool(), x), x.mean(axis=(1, 2, 3)), rtol=1e-13, atol=1e-15)
    np.testing.assert_array_equal(run(ReLU(), x), np.where(x > 0, x, 0))
    np.testing.assert_array_equal(run(Add(), x, y), x + y)
    np.testing.assert_array_equal(run(Add(), x, y, x), x + y + x)
    np.testing.assert_array_equal(run(Flatten(), x), x.reshape(2, 120))
    v, w, b = rng.normal(size=(5, 7)), rng.normal(size=(7, 3)), rng.normal(size=3)
    np.testing.assert_allclose(run(Dense(3), v, weight=w, bias=b), np.einsum("nc,ck->nk", v, w) + b, rtol=1e-12)
