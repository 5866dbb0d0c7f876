"""Convolutions and pools of every geometry against their definitions, one element at a time."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from ops import run

from hpctrain.layers import AvgPool, Conv, ConvTranspose, MaxPool

CASES = 40
"""Random geometries for each test."""

MODES: dict[str, Any] = {"zero": {"mode": "constant"}, "periodic": {"mode": "wrap"}, "reflect": {"mode": "reflect"}}
"""How np.pad calls the borders."""


def geometry(rng: np.random.Generator) -> tuple[tuple[int, ...], ...]:
    """Extents, kernel, stride, dilation, and paddings before and after, of 1 to 3 position dims."""
    dims = int(rng.integers(1, 4))
    return tuple(
        tuple(rng.integers(low, high, dims).tolist()) for low, high in ((2, 7), (1, 4), (1, 4), (1, 3), (0, 3), (0, 3))
    )


def definition(x: np.ndarray, w: np.ndarray, layer: Conv, stride: tuple[int, ...], dilation: tuple[int, ...]) -> Any:
    """Every output and tap of a valid convolution of the padded x in turn."""
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, w.shape, strict=False)]
    outputs = [(n - r) // s + 1 for n, r, s in zip(x.shape[1:-1], reach, stride, strict=True)]
    y = np.zeros((len(x), *outputs, layer.filters))
    channels, filters = x.shape[-1] // layer.groups, layer.filters // layer.groups
    for at, tap in product(product(*map(range, outputs)), product(*map(range, w.shape[:-2]))):
        seen = x[(slice(None), *(o * s + t * d for o, s, t, d in zip(at, stride, tap, dilation, strict=True)))]
        for g in range(layer.groups):
            c, f = slice(g * channels, (g + 1) * channels), slice(g * filters, (g + 1) * filters)
            y[(slice(None), *at, f)] += seen[:, c] @ w[tap][:, f]
    return y


def test_convolutions_equal_their_definition(seed: int) -> None:
    rng, done = np.random.default_rng(seed), 0
    while done < CASES:
        extents, kernel, stride, dilation, before, after = geometry(rng)
        groups, border = int(rng.integers(1, 4)), ("zero", "periodic", "reflect")[rng.integers(3)]
        pads = tuple(zip(before, after, strict=True))
        room = [n + b + a - d * (k - 1) for n, (b, a), d, k in zip(extents, pads, dilation, kernel, strict=True)]
        if min(room) < 1 or (border == "reflect" and any(max(p) >= n for p, n in zip(pads, extents, strict=True))):
            continue
        layer = Conv(groups * int(rng.integers(1, 4)), kernel, stride, pads, dilation, groups, border=border)
        x = rng.normal(size=(2, *extents, groups * int(rng.integers(1, 3))))
        w, b = rng.normal(size=(*kernel, x.shape[-1] // groups, layer.filters)), rng.normal(size=layer.filters)
        padded = np.pad(x, ((0, 0), *pads, (0, 0)), **MODES[border])
        expected = definition(padded, w, layer, stride, dilation) + b
        # sums of at most 27 * 6 products of order 1: 162 * 2**-53 = 2e-14
        np.testing.assert_allclose(run(layer, x, weight=w, bias=b), expected, atol=1e-12, err_msg=f"{layer} {x.shape}")
        done += 1
    print(f"seed {seed}, {done} cases")


def test_transposed_convolutions_equal_their_definition(seed: int) -> None:
    """Each input is spread under the kernel; what falls on the padding is dropped."""
    rng, done = np.random.default_rng(seed), 0
    while done < CASES:
        extents, kernel, stride, dilation, before, after = geometry(rng)
        extra = tuple(int(rng.integers(0, max(s, d))) for s, d in zip(stride, dilation, strict=True))
        groups, filters, channels = (int(n) for n in rng.integers(1, 4, 3))
        layer = ConvTranspose(
            groups * filters, kernel, stride, tuple(zip(before, after, strict=True)), extra, dilation, groups
        )
        full = [(n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(extents, stride, dilation, kernel, strict=True)]
        kept = [f - b - a + e for f, b, a, e in zip(full, before, after, extra, strict=True)]
        if min(kept) < 1:
            continue
        x = rng.normal(size=(2, *extents, groups * channels))
        w, bias = rng.normal(size=(*kernel, channels, layer.filters)), rng.normal(size=layer.filters)
        y = np.zeros((2, *(f + e for f, e in zip(full, extra, strict=True)), layer.filters))
        for at, tap, g in product(product(*map(range, extents)), product(*map(range, kernel)), range(groups)):
            c, f = slice(g * channels, (g + 1) * channels), slice(g * filters, (g + 1) * filters)
            into = [i * s + t * d for i, s, t, d in zip(at, stride, tap, dilation, strict=True)]
            y[(slice(None), *into, f)] += x[(slice(None), *at, c)] @ w[tap][:, f]
        inside = tuple(slice(b, b + n) for b, n in zip(before, kept, strict=True))
        expected = y[(slice(None), *inside)] + bias
        found = run(layer, x, weight=w, bias=bias)
        np.testing.assert_allclose(found, expected, atol=1e-12, err_msg=f"{layer} {x.shape}")
        done += 1
    print(f"seed {seed}, {done} cases")


@pytest.mark.parametrize("ceil", [False, True])
def test_pools_look_at_what_lies_under_their_windows(ceil: bool, seed: int) -> None:
    rng, done = np.random.default_rng(seed), 0
    while done < CASES:
        extents, kernel, stride, dilation, before, after = geometry(rng)
        average = rng.random() < 0.5
        dilation = (1,) * len(extents) if average else dilation
        reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
        pads = tuple((min(b, r // 2), min(a, r // 2)) for b, a, r in zip(before, after, reach, strict=True))
        if any(n + sum(p) < r for n, p, r in zip(extents, pads, reach, strict=True)):
            continue
        x, counted = rng.normal(size=(2, *extents, 3)), bool(rng.integers(2))
        layer = (
            AvgPool(kernel, stride, pads, ceil, counted) if average else MaxPool(kernel, stride, pads, dilation, ceil)
        )
        found = run(layer, x)
        for dim, (n, (b, a), r, s) in enumerate(zip(extents, pads, reach, stride, strict=True), start=1):
            starts = range(-b, n + a - r + 1, s) if not ceil else [i for i in range(-b, n, s) if i - s + r < n + a]
            assert found.shape[dim] == max(1, len(starts)), f"{layer} {x.shape}"
        for at in np.ndindex(found.shape[1:-1]):
            begins = [o * s - b for o, s, (b, _) in zip(at, stride, pads, strict=True)]
            taps = [[i + t * d for t in range(k)] for i, k, d in zip(begins, kernel, dilation, strict=True)]
            under = [[i for i in t if 0 <= i < n] for t, n in zip(taps, extents, strict=True)]
            values = x[np.ix_(range(2), *under, range(3))].reshape(2, -1, 3)
            sizes = [
                sum(i < n + a for i in t) if counted else len(u)
                for t, u, n, (_, a) in zip(taps, under, extents, pads, strict=True)
            ]
            expected = values.sum(axis=1) / np.prod(sizes) if average else values.max(axis=1, initial=-np.inf)
            np.testing.assert_allclose(
                found[(slice(None), *at)], expected, atol=1e-12, err_msg=f"{layer} {x.shape} {at}"
            )
        done += 1
    print(f"seed {seed}, {done} cases")
