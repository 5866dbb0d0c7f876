"""Convolution, matrix multiplication and pooling of every backend against SciPy, plain loops and adjoints.

Random shapes of odd sizes, contiguous and as views whose surroundings are NaN and must stay so.
"""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np
import pytest
from cases import Arrays, Geometry, assert_close, cases
from scipy.signal import correlate

from hpctrain.backends.base import Backend

# --- convolution and matrix multiplication ----------------------------------------------------------------------------


def scipy_conv(x: np.ndarray, w: np.ndarray, g: Geometry) -> np.ndarray:
    """The convolution by SciPy, in float64: taps spread by zeros for the dilation, then every stride-th position."""
    spread = np.zeros([d * (k - 1) + 1 for d, k in zip(g.dilation, g.kernel, strict=True)] + [g.c, g.k])
    spread[tuple(slice(None, None, d) for d in g.dilation)] = w
    step = tuple(slice(None, None, s) for s in g.stride)
    out = np.zeros((g.n, *g.outputs, g.k))
    for n, c, k in product(range(g.n), range(g.c), range(g.k)):
        out[n, ..., k] += correlate(x[n, ..., c].astype(float), spread[..., c, k], "valid", "direct")[step]
    return out


def test_conv_equals_scipy(backend: Backend, dtype: np.dtype, seed: int) -> None:
    for g, arrays in cases(dtype, seed):
        x, w, out = (
            arrays.normal(g.n, *g.extent, g.c),
            arrays.normal(*g.kernel, g.c, g.k),
            arrays.out(g.n, *g.outputs, g.k),
        )
        backend.conv(x, w, out, g.stride, g.dilation)
        magnitude = scipy_conv(np.abs(x), np.abs(w), g)
        assert_close(out, scipy_conv(x, w, g), magnitude, dtype, prod(g.kernel) * g.c)


def scattered_dx(dy: np.ndarray, w: np.ndarray, g: Geometry) -> np.ndarray:
    dx, axes = np.zeros((g.n, *g.extent, g.c)), "abd"[: len(g.extent)]
    for at in g.positions():
        dx[g.window(at)] += np.einsum(f"nk,{axes}ck->n{axes}c", dy[:, *at].astype(float), w.astype(float))
    return dx


def gathered_dw(x: np.ndarray, dy: np.ndarray, g: Geometry) -> np.ndarray:
    dw, axes = np.zeros((*g.kernel, g.c, g.k)), "abd"[: len(g.extent)]
    for at in g.positions():
        dw += np.einsum(f"n{axes}c,nk->{axes}ck", x[g.window(at)].astype(float), dy[:, *at].astype(float))
    return dw


def test_conv_gradients_equal_loops_over_windows(backend: Backend, dtype: np.dtype, seed: int) -> None:
    for g, arrays in cases(dtype, seed):
        x, w, dy = (
            arrays.normal(g.n, *g.extent, g.c),
            arrays.normal(*g.kernel, g.c, g.k),
            arrays.normal(g.n, *g.outputs, g.k),
        )
        dx, dw = arrays.out(*x.shape), arrays.out(*w.shape)
        backend.conv_dx(dy, w, dx, g.stride, g.dilation)
        backend.conv_dw(x, dy, dw, g.stride, g.dilation)
        magnitude = scattered_dx(np.abs(dy), np.abs(w), g)
        assert_close(dx, scattered_dx(dy, w, g), magnitude, dtype, prod(g.kernel) * g.k)
        magnitude = gathered_dw(np.abs(x), np.abs(dy), g)
        assert_close(dw, gathered_dw(x, dy, g), magnitude, dtype, g.n * prod(g.outputs))


def test_conv_gradients_are_adjoints(backend: Backend, seed: int) -> None:
    for g, arrays in cases(np.dtype("float64"), seed):
        x, w, dy = (
            arrays.normal(g.n, *g.extent, g.c),
            arrays.normal(*g.kernel, g.c, g.k),
            arrays.normal(g.n, *g.outputs, g.k),
        )
        y, dx, dw = arrays.out(*dy.shape), arrays.out(*x.shape), arrays.out(*w.shape)
        backend.conv(x, w, y, g.stride, g.dilation)
        backend.conv_dx(dy, w, dx, g.stride, g.dilation)
        backend.conv_dw(x, dy, dw, g.stride, g.dilation)
        assert np.vdot(x, dx) == pytest.approx(np.vdot(y, dy), rel=1e-11, abs=1e-11)
        assert np.vdot(w, dw) == pytest.approx(np.vdot(y, dy), rel=1e-11, abs=1e-11)


def test_conv_larger_than_one_part_equals_scipy(backend: Backend, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr("hpctrain.backends.reference.COLUMN_BYTES", 3000)
    g = Geometry(5, (11, 7), 3, 2, (3, 2), (2, 1), (1, 2))
    arrays = Arrays(np.dtype("float64"), seed, strided=True)
    x, w, dy = arrays.normal(5, 11, 7, 3), arrays.normal(3, 2, 3, 2), arrays.normal(5, *g.outputs, 2)
    y, dx, dw = arrays.out(*dy.shape), arrays.out(*x.shape), arrays.out(*w.shape)
    backend.conv(x, w, y, g.stride, g.dilation)
    backend.conv_dx(dy, w, dx, g.stride, g.dilation)
    backend.conv_dw(x, dy, dw, g.stride, g.dilation)
    np.testing.assert_allclose(y, scipy_conv(x, w, g), atol=1e-12)
    np.testing.assert_allclose(dx, scattered_dx(dy, w, g), atol=1e-12)
    np.testing.assert_allclose(dw, gathered_dw(x, dy, g), atol=1e-12)
    arrays.check_surroundings()


@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
def test_gemm(backend: Backend, dtype: np.dtype, seed: int, transpose_a: bool, transpose_b: bool) -> None:
    for _, arrays in cases(dtype, seed):
        m, n, k = arrays.rng.integers(1, 40, 3).tolist()
        a = arrays.normal(*((k, m) if transpose_a else (m, k)))
        b = arrays.normal(*((n, k) if transpose_b else (k, n)))
        out = arrays.out(m, n)
        backend.gemm(a, b, out, transpose_a, transpose_b)
        terms = np.einsum(f"{'ki' if transpose_a else 'ik'},{'jk' if transpose_b else 'kj'}->ijk", a, b, dtype=float)
        assert_close(out, terms.sum(axis=2), np.abs(terms).sum(axis=2), dtype, k)


# --- pooling ----------------------------------------------------------------------------------------------------------


def test_max_pool_takes_the_first_of_the_largest(backend: Backend, dtype: np.dtype, seed: int) -> None:
    ties = 0
    for g, arrays in cases(dtype, seed, dilated=False):
        values = arrays.rng.integers(-2, 3, (g.n, *g.extent, g.c)).astype(dtype)  # few values: many ties
        values[arrays.rng.random(values.shape) < 0.2] = -np.inf  # as padding is
        values[arrays.rng.random(values.shape) < 0.02] = np.nan
        x, dy = arrays.of(values), arrays.normal(g.n, *g.outputs, g.c)
        out, index, dx = arrays.out(*dy.shape), arrays.out(*dy.shape, dtype=np.int32), arrays.out(*x.shape)
        backend.max_pool(x, out, index, g.kernel, g.stride)
        backend.max_pool_dx(dy, index, dx, g.kernel, g.stride)
        want_dx = np.zeros(x.shape)
        for n, c, at in product(range(g.n), range(g.c), g.positions()):
            window = x[g.window(at)][n, ..., c]
            place = int(np.argmax(window))  # the first; NaN counts as largest
            ties += np.count_nonzero(window == window.flat[place]) > 1
            np.testing.assert_equal(out[n, *at, c], window.flat[place])
            assert index[n, *at, c] == place
            want_dx[g.window(at)][n, ..., c][np.unravel_index(place, g.kernel)] += dy[n, *at, c]
        assert_close(dx, want_dx, 4 * np.abs(dy).max(), dtype, prod(g.kernel))
    assert ties > 20


def test_avg_pool_and_its_adjoint(backend: Backend, dtype: np.dtype, seed: int) -> None:
    for g, arrays in cases(dtype, seed, dilated=False):
        x, dy = arrays.normal(g.n, *g.extent, g.c), arrays.normal(g.n, *g.outputs, g.c)
        divisor = arrays.of(arrays.rng.integers(1, 9, (1, *g.outputs, 1)).astype(dtype))
        out, dx = arrays.out(*dy.shape), arrays.out(*x.shape)
        backend.avg_pool(x, out, divisor, g.kernel, g.stride)
        backend.avg_pool_dx(dy, dx, divisor, g.kernel, g.stride)
        want, want_dx = np.zeros(dy.shape), np.zeros(x.shape)
        for at in g.positions():
            want[:, *at] = x[g.window(at)].astype(float).sum(axis=tuple(range(1, x.ndim - 1))) / divisor[0, *at]
            share = dy[:, *at].astype(float) / divisor[0, *at]
            want_dx[g.window(at)] += share.reshape(g.n, *(1,) * len(g.kernel), g.c)
        assert_close(out, want, np.abs(x).max() * prod(g.kernel), dtype, prod(g.kernel))
        assert_close(dx, want_dx, np.abs(dy).max() * prod(g.kernel), dtype, prod(g.kernel))
        assert np.vdot(out, dy) == pytest.approx(np.vdot(x, dx), rel=1e-4, abs=1e3 * float(np.finfo(dtype).eps))


def test_sum_and_spread_positions(backend: Backend, dtype: np.dtype, seed: int) -> None:
    for g, arrays in cases(dtype, seed, wide=True):
        x, dy, scale = arrays.normal(g.n, *g.extent, g.c), arrays.normal(g.n, g.c), 1 / 7
        out, dx = arrays.out(g.n, g.c), arrays.out(*x.shape)
        backend.sum_positions(x, out, scale)
        backend.spread_positions(dy, dx, scale)
        terms = scale * x.reshape(g.n, -1, g.c).astype(float)
        assert_close(out, terms.sum(axis=1), np.abs(terms).sum(axis=1), dtype, prod(g.extent))
        for at in product(*map(range, g.extent)):
            assert_close(dx[:, *at], scale * dy.astype(float), np.abs(dy), dtype, 1)
