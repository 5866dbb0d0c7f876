"""Convolution, matrix multiplication and pooling of every backend against SciPy, plain loops and adjoints.

Random shapes of odd sizes, contiguous and as views whose surroundings are NaN and must stay so.
"""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Iterator
from itertools import product
from math import prod

import numpy as np
import pytest
from cases import Arrays, Geometry, assert_close, cases
from scipy.signal import correlate

from hpctrain import backends
from hpctrain.backends.base import Backend

ENGINES = ["reference"]
if os.environ.get("HPCTRAIN_NATIVE") != "0":
    import hpctrain._native as kernels

    ENGINES += [f"native, {isa}" for isa in kernels.isas()]


@pytest.fixture(params=ENGINES)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every backend, and the compiled one with every instruction set that this machine has."""
    name, _, isa = request.param.partition(", ")
    if isa:
        kernels.select_isa(isa)
    yield backends.get(name)
    if isa:
        kernels.select_isa("")


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


def blocks(g: Geometry) -> list[tuple[slice, slice]]:
    """Which channels and which filters each group has."""
    channels, filters = g.c // g.groups, g.k // g.groups
    return [(slice(i * channels, (i + 1) * channels), slice(i * filters, (i + 1) * filters)) for i in range(g.groups)]


def dense(w: np.ndarray, g: Geometry) -> np.ndarray:
    """The weight of the same convolution without groups: (*kernel, c, k), zero between groups."""
    full = np.zeros((*g.kernel, g.c, g.k))
    for channels, filters in blocks(g):
        full[..., channels, filters] = w[..., filters]
    return full


def operands(g: Geometry, arrays: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random x, w and dy."""
    shapes = (g.n, *g.extent, g.c), (*g.kernel, g.c // g.groups, g.k), (g.n, *g.outputs, g.k)
    x, w, dy = (arrays.normal(*shape) for shape in shapes)
    return x, w, dy


def test_conv_equals_scipy(backend: Backend, dtype: np.dtype, seed: int) -> None:
    for g, arrays in cases(dtype, seed, grouped=True):
        x, w, _ = operands(g, arrays)
        out = arrays.out(g.n, *g.outputs, g.k)
        backend.conv(x, w, out, g.stride, g.dilation, g.groups)
        magnitude = scipy_conv(np.abs(x), dense(np.abs(w), g), g)
        assert_close(out, scipy_conv(x, dense(w, g), g), magnitude, dtype, prod(g.kernel) * g.c)


def scattered_dx(dy: np.ndarray, w: np.ndarray, g: Geometry) -> np.ndarray:
    dx, axes = np.zeros((g.n, *g.extent, g.c)), "abd"[: len(g.extent)]
    for at in g.positions():
        dx[g.window(at)] += np.einsum(f"nk,{axes}ck->n{axes}c", dy[:, *at].astype(float), w.astype(float))
    return dx


def gathered_dw(x: np.ndarray, dy: np.ndarray, g: Geometry) -> np.ndarray:
    dw, axes = np.zeros((*g.kernel, g.c, g.k)), "abd"[: len(g.extent)]
    for at in g.positions():
        dw += np.einsum(f"n{axes}c,nk->{axes}ck", x[g.window(at)].astype(float), dy[:, *at].astype(float))
    return np.concatenate([dw[..., channels, filters] for channels, filters in blocks(g)], axis=-1)


def test_conv_gradients_equal_loops_over_windows(backend: Backend, dtype: np.dtype, seed: int) -> None:
    for g, arrays in cases(dtype, seed, grouped=True):
        x, w, dy = operands(g, arrays)
        dx, dw = arrays.out(*x.shape), arrays.out(*w.shape)
        backend.conv_dx(dy, w, dx, g.stride, g.dilation, g.groups)
        backend.conv_dw(x, dy, dw, g.stride, g.dilation, g.groups)
        magnitude = scattered_dx(np.abs(dy), dense(np.abs(w), g), g)
        assert_close(dx, scattered_dx(dy, dense(w, g), g), magnitude, dtype, prod(g.kernel) * g.k)
        magnitude = gathered_dw(np.abs(x), np.abs(dy), g)
        assert_close(dw, gathered_dw(x, dy, g), magnitude, dtype, g.n * prod(g.outputs))


def test_conv_gradients_are_adjoints(backend: Backend, seed: int) -> None:
    for g, arrays in cases(np.dtype("float64"), seed, grouped=True):
        x, w, dy = operands(g, arrays)
        y, dx, dw = arrays.out(*dy.shape), arrays.out(*x.shape), arrays.out(*w.shape)
        backend.conv(x, w, y, g.stride, g.dilation, g.groups)
        backend.conv_dx(dy, w, dx, g.stride, g.dilation, g.groups)
        backend.conv_dw(x, dy, dw, g.stride, g.dilation, g.groups)
        assert np.vdot(x, dx) == pytest.approx(np.vdot(y, dy), rel=1e-11, abs=1e-11)
        assert np.vdot(w, dw) == pytest.approx(np.vdot(y, dy), rel=1e-11, abs=1e-11)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("limit", [1, 3000, 20_000])
def test_conv_larger_than_one_part_equals_scipy(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, seed: int, limit: int, groups: int
) -> None:
    monkeypatch.setattr("hpctrain.backends.windows.COLUMN_BYTES", limit)
    g = Geometry(5, (11, 7), 6, 12, (3, 2), (2, 1), (1, 2), groups)
    arrays = Arrays(np.dtype("float64"), seed, strided=True)
    x, w, dy = operands(g, arrays)
    y, dx, dw = arrays.out(*dy.shape), arrays.out(*x.shape), arrays.out(*w.shape)
    backend.conv(x, w, y, g.stride, g.dilation, groups)
    backend.conv_dx(dy, w, dx, g.stride, g.dilation, groups)
    backend.conv_dw(x, dy, dw, g.stride, g.dilation, groups)
    np.testing.assert_allclose(y, scipy_conv(x, dense(w, g), g), atol=1e-12)
    np.testing.assert_allclose(dx, scattered_dx(dy, dense(w, g), g), atol=1e-12)
    np.testing.assert_allclose(dw, gathered_dw(x, dy, g), atol=1e-12)
    arrays.check_surroundings()


@pytest.mark.parametrize("groups", [1, 8])
def test_conv_unfolds_no_more_than_its_limit(backend: Backend, monkeypatch: pytest.MonkeyPatch, groups: int) -> None:
    limit, extent = 2**20, (120, 130)
    monkeypatch.setattr("hpctrain.backends.windows.COLUMN_BYTES", limit)
    x, dy, w = np.ones((1, *extent, 8)), np.ones((1, 118, 128, 8)), np.ones((3, 3, 8 // groups, 8))
    calls = (
        lambda: backend.conv(x, w, dy, (1, 1), (1, 1), groups),
        lambda: backend.conv_dx(dy, w, x, (1, 1), (1, 1), groups),
        lambda: backend.conv_dw(x, dy, w, (1, 1), (1, 1), groups),
    )
    for call in calls:
        tracemalloc.start()
        call()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert limit / 2 < peak < 2 * limit  # in whole, the unfolded input has 8.7 MB


def test_conv_of_many_channels_alone(backend: Backend, dtype: np.dtype, seed: int) -> None:
    rng, channels = np.random.default_rng(seed), 3001
    x, w = (
        rng.standard_normal((1, 3, 5, channels)).astype(dtype),
        rng.standard_normal((3, 3, 1, channels)).astype(dtype),
    )
    y, dx = np.empty((1, 1, 3, channels), dtype), np.empty_like(x)
    backend.conv(x, w, y, (1, 1), (1, 1), channels)
    backend.conv_dx(y, w, dx, (1, 1), (1, 1), channels)
    for at in range(3):
        terms = x[0, :, at : at + 3] * w[:, :, 0].astype(float)
        assert_close(y[0, 0, at], terms.sum(axis=(0, 1)), np.abs(terms).sum(axis=(0, 1)), dtype, 9)
    middle = sum(y[0, 0, at] * w[:, 2 - at, 0].astype(float) for at in range(3))
    assert_close(dx[0, :, 2], middle, 100, dtype, 3)


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


@pytest.mark.parametrize("slope", [0.0, 0.1, 1.0])
def test_bias_and_activation_of_conv_and_gemm(backend: Backend, dtype: np.dtype, seed: int, slope: float) -> None:
    for g, arrays in cases(dtype, seed, dilated=True, grouped=True):
        x, w, b = arrays.normal(g.n, *g.extent, g.c), arrays.normal(*g.kernel, g.c // g.groups, g.k), arrays.normal(g.k)
        plain, out = (arrays.out(g.n, *g.outputs, g.k) for _ in range(2))
        backend.conv(x, w, plain, g.stride, g.dilation, g.groups)
        backend.conv(x, w, out, g.stride, g.dilation, g.groups, b, slope)
        want = plain + b
        np.testing.assert_allclose(out, np.where(want > 0, want, slope * want), rtol=1e-5, atol=1e-4)
        rows = plain.reshape(-1, g.k)[:5].copy()
        product = np.empty_like(rows)
        backend.gemm(rows, np.eye(g.k, dtype=dtype), product, bias=b, slope=slope)
        np.testing.assert_allclose(product, np.where(rows + b > 0, rows + b, slope * (rows + b)), rtol=1e-5, atol=1e-4)


# --- pooling ----------------------------------------------------------------------------------------------------------


def test_max_pool_takes_the_first_of_the_largest(backend: Backend, dtype: np.dtype, seed: int) -> None:
    ties = 0
    for g, arrays in cases(dtype, seed):
        values = arrays.rng.integers(-2, 3, (g.n, *g.extent, g.c)).astype(dtype)  # few values: many ties
        values[arrays.rng.random(values.shape) < 0.2] = -np.inf  # as padding is
        values[arrays.rng.random(values.shape) < 0.02] = np.nan
        x, dy = arrays.of(values), arrays.normal(g.n, *g.outputs, g.c)
        out, index, dx = arrays.out(*dy.shape), arrays.out(*dy.shape, dtype=np.int32), arrays.out(*x.shape)
        dilation = () if max(g.dilation) == 1 else (g.dilation,)
        backend.max_pool(x, out, index, g.kernel, g.stride, *dilation)
        backend.max_pool_dx(dy, index, dx, g.kernel, g.stride, *dilation)
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


def interpolation(index: np.ndarray, weight: np.ndarray, n: int) -> np.ndarray:
    """The matrix (outputs, n) of a resampling."""
    matrix = np.zeros((len(index), n))
    for output, tap in np.ndindex(index.shape):
        matrix[output, index[output, tap]] += weight[output, tap]
    return matrix


def test_resample_and_its_adjoint_equal_a_matrix(backend: Backend, dtype: np.dtype, seed: int) -> None:
    for number, (g, arrays) in enumerate(cases(dtype, seed)):
        shape, dim = (g.n, *g.extent, g.c), number % (len(g.extent) + 2)
        outputs, count = arrays.rng.integers(1, 9, 2).tolist()
        index = arrays.of(arrays.rng.integers(0, shape[dim], (outputs, count)).astype(np.int32))  # with repetitions
        weight = arrays.normal(outputs, count)
        x, dy = arrays.normal(*shape), arrays.normal(*shape[:dim], outputs, *shape[dim + 1 :])
        out, dx = arrays.out(*dy.shape), arrays.out(*shape)
        backend.resample(x, out, dim, index, weight)
        backend.resample_dx(dy, dx, dim, index, weight)
        matrix, size = interpolation(index, weight, shape[dim]), interpolation(index, np.abs(weight), shape[dim])
        for got, of, by, reach in ((out, x, matrix, size), (dx, dy, matrix.T, size.T)):
            want = np.moveaxis(np.tensordot(by, of.astype(float), (1, dim)), 0, dim)
            magnitude = np.moveaxis(np.tensordot(reach, np.abs(of), (1, dim)), 0, dim)
            assert_close(got, want, magnitude, dtype, outputs * count)
        assert np.vdot(out, dy) == pytest.approx(np.vdot(x, dx), rel=1e-4, abs=1e3 * float(np.finfo(dtype).eps))


def test_resample_interpolates_as_numpy_does(backend: Backend, seed: int) -> None:
    rng, n, outputs = np.random.default_rng(seed), 7, 18
    x, out, at = rng.standard_normal((1, n, 1)), np.empty((1, outputs, 1)), np.linspace(0, n - 1, outputs)
    low = np.minimum(at.astype(int), n - 2)
    backend.resample(x, out, 1, np.stack([low, low + 1], axis=1), np.stack([1 - (at - low), at - low], axis=1))
    np.testing.assert_allclose(out[0, :, 0], np.interp(at, np.arange(n), x[0, :, 0]), atol=1e-14)


def test_resample_passes_nan_only_where_it_is_read(backend: Backend, dtype: np.dtype) -> None:
    x, out, dx = np.ones((1, 3, 5, 1), dtype), np.empty((1, 4, 5, 1), dtype), np.empty((1, 3, 5, 1), dtype)
    x[0, 1, 2] = np.nan
    index, weight = np.array([[0, 1], [1, 1], [2, 0], [2, 2]]), np.full((4, 2), 0.5, dtype)
    backend.resample(x, out, 1, index, weight)
    assert np.argwhere(np.isnan(out[0, :, :, 0])).tolist() == [[0, 2], [1, 2]]
    backend.resample_dx(out, dx, 1, index, weight)
    assert np.argwhere(np.isnan(dx[0, :, :, 0])).tolist() == [[0, 2], [1, 2]]
