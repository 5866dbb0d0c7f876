"""Normalization of every backend against NumPy and differences: per channel, sample, group and position.

Statistics are float64 whatever the arrays are.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import numpy as np
import pytest
from cases import Arrays, assert_close, cases

from hpctrain.backends.base import Backend

SHAPE = (3, 5, 2, 7, 3)
"""Samples, positions, and channels that may be taken as 7 groups of 3."""

RUN = 16
"""Rows that a backend may add up in the arrays' own precision, before all else in float64."""
PIECES = 8
"""The first of so many pieces of rows gives the number about which squares of all of them are taken."""


def moments_tolerance(x: np.ndarray, dtype: np.dtype) -> tuple[float, float]:
    """Absolute error of means, and relative error of sums of squares.

    Differences, squares and the additions of a run round each term RUN + 2 times. About a number that is k standard
    deviations from the mean squares add up to 1 + k^2 as much; 1 + k^2 <= PIECES, as one piece makes the variance that
    large. Float64 adds some 1e-14, relative to the largest number.
    """
    rounding = (RUN + 2) * float(np.finfo(dtype).eps) / 2
    return rounding * float(np.ptp(x)) + 1e-14 * float(np.abs(x).max(initial=1)), PIECES * rounding + 1e-11


class Norm(NamedTuple):
    """Shapes that broadcast against an array of shape `x` for one kind of normalization."""

    x: tuple[int, ...]
    over: tuple[int, ...]
    """The dims that are summed."""
    statistics: tuple[int, ...]
    gamma: tuple[int, ...]


NORMS = {
    "batch": Norm(SHAPE[:4], (0, 1, 2), (7,), (7,)),
    "each channel of a group": Norm(SHAPE, (1, 2, 3), (3, 1, 1, 1, 3), (3,)),
    "group": Norm(SHAPE, (1, 2, 4), (3, 1, 1, 7, 1), (7, 3)),
    "instance": Norm(SHAPE[:4], (1, 2), (3, 1, 1, 7), (7,)),
    "sample": Norm(SHAPE[:4], (1, 2, 3), (3, 1, 1, 1), (7,)),
    "layer": Norm(SHAPE[:4], (3,), (3, 5, 2, 1), (7,)),
    "layer, 2 dims": Norm(SHAPE[:4], (2, 3), (3, 5, 1, 1), (2, 7)),
    "layer of a matrix": Norm(SHAPE[:2], (1,), (3, 1), (5,)),
    "one channel": Norm((3, 5, 1), (0, 1), (1,), (1,)),
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("strided", [False, True])
def test_moments_of_every_kind(backend: Backend, dtype: np.dtype, seed: int, kind: str, strided: bool) -> None:
    norm, arrays = NORMS[kind], Arrays(dtype, seed, strided)
    x = arrays.normal(*norm.x)
    mean, m2 = (np.full(norm.statistics, 77.0) for _ in range(2))
    backend.moments(x, mean, m2)
    exact = x.astype(float)
    of_mean, of_m2 = moments_tolerance(exact, dtype)
    np.testing.assert_allclose(mean, exact.mean(norm.over).reshape(mean.shape), rtol=0, atol=of_mean)
    count = prod(norm.x[d] for d in norm.over)
    np.testing.assert_allclose(m2, exact.var(norm.over).reshape(m2.shape) * count, rtol=of_m2, atol=1e-14)
    arrays.check_surroundings()


def norm_loss(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, dy: np.ndarray, over: tuple[int, ...]) -> float:
    """<dy, x normalized over these dims>, in NumPy's own terms."""
    mean, var = x.mean(over, keepdims=True), x.var(over, keepdims=True)
    return float(np.sum(dy * ((x - mean) / np.sqrt(var + 1e-3) * gamma + beta)))


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("strided", [False, True])
def test_gradients_of_every_kind_equal_differences(backend: Backend, seed: int, kind: str, strided: bool) -> None:
    norm, arrays = NORMS[kind], Arrays(np.dtype("float64"), seed, strided)
    x, dy, gamma, beta = (arrays.normal(*shape) for shape in (norm.x, norm.x, norm.gamma, norm.gamma))
    y, g, dx, count = arrays.out(*norm.x), arrays.out(*norm.x), arrays.out(*norm.x), prod(norm.x[d] for d in norm.over)
    mean, m2, sum_g, sum_g_xhat = (np.full(norm.statistics, 77.0) for _ in range(4))
    dgamma, dbeta = np.full((2, *norm.gamma), 77.0)
    backend.moments(x, mean, m2)
    rstd = 1 / np.sqrt(m2 / count + 1e-3)
    backend.normalize(x, mean, rstd, gamma, beta, y)
    backend.normalize_grad(dy, x, mean, rstd, dbeta, dgamma)
    g[...] = dy * gamma
    backend.normalize_grad(g, x, mean, rstd, sum_g, sum_g_xhat)
    backend.normalize_dx(dy, x, mean, rstd, gamma, sum_g / count, sum_g_xhat / count, dx)
    arrays.check_surroundings()
    inputs = [np.array(a) for a in (x, gamma, beta)]
    assert np.vdot(y, dy) == pytest.approx(norm_loss(*inputs, dy, norm.over), rel=1e-10, abs=1e-10)
    for array, gradient in zip(inputs, (dx, dgamma, dbeta), strict=True):
        for _ in range(3):
            at, h, losses = tuple(arrays.rng.integers(array.shape)), 1e-5, []
            for step in (h, -2 * h, h):
                array[at] += step
                losses.append(norm_loss(*inputs, dy, norm.over))
            assert gradient[at] == pytest.approx((losses[0] - losses[1]) / (2 * h), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_far_from_zero(backend: Backend, dtype: np.dtype, seed: int, offset: float) -> None:
    for g, arrays in cases(dtype, seed, wide=True):
        x = arrays.of((arrays.rng.standard_normal((g.n, *g.extent, g.c)) + offset).astype(dtype))
        mean, m2 = arrays.out(g.c, dtype=float), arrays.out(g.c, dtype=float)
        backend.moments(x, mean, m2)
        exact = x.reshape(-1, g.c).astype(np.longdouble)  # of the rounded values: only the algorithm may err
        of_mean, of_m2 = moments_tolerance(exact, dtype)
        np.testing.assert_allclose(mean, exact.mean(axis=0).astype(float), rtol=0, atol=of_mean)
        want = ((exact - exact.mean(axis=0)) ** 2).sum(axis=0)
        np.testing.assert_allclose(m2, want.astype(float), rtol=of_m2, atol=1e-11)


def test_moments_of_a_sudden_change(backend: Backend, dtype: np.dtype, seed: int) -> None:
    """The worst for what squares are taken about: constant for long, then something else altogether."""
    for count in (33, 255, 257, 5001):
        for channels in (1, 3, 70):
            x = np.random.default_rng(seed).standard_normal((count, channels)).astype(dtype) + dtype.type(1000)
            x[: max(1, count // PIECES)] = 0
            mean, m2 = np.zeros((2, channels))
            backend.moments(x, mean, m2)
            of_mean, of_m2 = moments_tolerance(x, dtype)
            exact = x.astype(np.longdouble)
            np.testing.assert_allclose(mean, exact.mean(axis=0).astype(float), rtol=0, atol=of_mean)
            np.testing.assert_allclose(m2, (exact.var(axis=0) * count).astype(float), rtol=of_m2)


def test_sums_beyond_the_range_of_float32(backend: Backend, seed: int) -> None:
    """Squares and products of numbers that float32 just holds; the statistics are float64."""
    x, dy = (np.random.default_rng(seed).standard_normal((2, 301, 5)) * 1e37).astype(np.float32)
    mean, m2, sum_dy, sum_dy_xhat = np.zeros((4, 5))
    backend.moments(x, mean, m2)
    backend.normalize_grad(dy, x, mean, np.ones(5), sum_dy, sum_dy_xhat)
    exact, g = x.astype(float), dy.astype(float)
    np.testing.assert_allclose(mean, exact.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(m2, exact.var(axis=0) * 301, rtol=1e-6)
    np.testing.assert_allclose(sum_dy, g.sum(axis=0), rtol=1e-6)
    np.testing.assert_allclose(sum_dy_xhat, (g * (exact - mean)).sum(axis=0), rtol=1e-5)


def test_infinities_add_up(backend: Backend, dtype: np.dtype) -> None:
    """To an infinite mean, or none; channels beside them are untouched by it."""
    x = np.ones((300, 4), dtype)
    x[7, 1], x[290, 2], x[3, 3], x[200, 3] = np.inf, -np.inf, np.inf, -np.inf
    mean, m2 = np.zeros((2, 4))
    with np.errstate(invalid="ignore"):
        backend.moments(x, mean, m2)
    np.testing.assert_array_equal(mean, [1, np.inf, -np.inf, np.nan])
    np.testing.assert_array_equal(m2, [0, np.nan, np.nan, np.nan])


def test_normalize_operations_round_no_more_than_their_type(backend: Backend, dtype: np.dtype, seed: int) -> None:
    for g, arrays in cases(dtype, seed, wide=True):
        x, dy, y, dx = (arrays.normal(g.n, *g.extent, g.c) for _ in range(4))
        gamma, beta = arrays.normal(g.c), arrays.normal(g.c)
        statistics = Arrays(np.dtype("float64"), seed, strided=False)
        mean, mean_g, mean_g_xhat = (statistics.normal(g.c) for _ in range(3))
        rstd, sum_dy, sum_dy_xhat = np.exp(statistics.normal(g.c)), statistics.out(g.c), statistics.out(g.c)
        backend.normalize(x, mean, rstd, gamma, beta, y)
        backend.normalize_grad(dy, x, mean, rstd, sum_dy, sum_dy_xhat)
        backend.normalize_dx(dy, x, mean, rstd, gamma, mean_g, mean_g_xhat, dx)
        xhat, reach = (x - mean) * rstd, (np.abs(x) + np.abs(mean)) * rstd
        assert_close(y, xhat * gamma + beta, reach * np.abs(gamma) + np.abs(beta), dtype, 3)
        want, size = rstd * (gamma * dy - mean_g - xhat * mean_g_xhat), np.abs(gamma * dy)
        assert_close(dx, want, rstd * (size + np.abs(mean_g) + reach * np.abs(mean_g_xhat)), dtype, 5)
        for sums, terms in ((sum_dy, dy.astype(float)), (sum_dy_xhat, dy * xhat)):
            flat = terms.reshape(-1, g.c)
            magnitude = (np.abs(dy) * (reach + 1)).reshape(-1, g.c).sum(axis=0)
            # in float64, but for runs
            length = RUN if dtype == np.float32 else len(flat)
            assert_close(sums, flat.sum(axis=0), magnitude, dtype, length)


@pytest.mark.parametrize("kind", [kind for kind in NORMS if kind != "batch"])
def test_every_kind_rounds_no_more_than_its_type(backend: Backend, dtype: np.dtype, seed: int, kind: str) -> None:
    norm, arrays, statistics = NORMS[kind], Arrays(dtype, seed, True), Arrays(np.dtype(float), seed + 1, False)
    x, dy, gamma, beta = (arrays.normal(*shape) for shape in (norm.x, norm.x, norm.gamma, norm.gamma))
    mean, mean_g, mean_g_xhat = (statistics.normal(*norm.statistics) for _ in range(3))
    rstd, y, dx = np.exp(statistics.normal(*norm.statistics)), arrays.out(*norm.x), arrays.out(*norm.x)
    backend.normalize(x, mean, rstd, gamma, beta, y)
    backend.normalize_dx(dy, x, mean, rstd, gamma, mean_g, mean_g_xhat, dx)
    for at in np.ndindex(norm.x):
        m, r, p, q, a, b = (np.broadcast_to(v, norm.x)[at] for v in (mean, rstd, mean_g, mean_g_xhat, gamma, beta))
        xhat, reach = (float(x[at]) - m) * r, (abs(float(x[at])) + abs(m)) * r
        assert_close(y[at], xhat * a + b, reach * abs(a) + abs(b), dtype, 3)
        assert_close(
            dx[at], r * (a * float(dy[at]) - p - xhat * q), r * (abs(a * dy[at]) + abs(p) + reach * abs(q)), dtype, 5
        )
    arrays.check_surroundings()


@pytest.mark.parametrize("kind", [kind for kind in NORMS if kind != "batch"])
@pytest.mark.parametrize("slope", [1.0, 0.0, 0.25])
def test_every_kind_adds_and_activates(backend: Backend, dtype: np.dtype, seed: int, kind: str, slope: float) -> None:
    norm, arrays, statistics = NORMS[kind], Arrays(dtype, seed, True), Arrays(np.dtype(float), seed + 1, False)
    x, add, gamma, beta = (arrays.normal(*shape) for shape in (norm.x, norm.x, norm.gamma, norm.gamma))
    mean, rstd = statistics.normal(*norm.statistics), np.exp(statistics.normal(*norm.statistics))
    out = arrays.out(*norm.x)
    backend.normalize(x, mean, rstd, gamma, beta, out, add, slope)
    linear = (x - mean) * rstd * gamma + beta + add.astype(float)
    reach = (np.abs(x) + np.abs(mean)) * rstd * np.abs(gamma) + np.abs(beta) + np.abs(add)
    assert_close(out, np.where(linear > 0, linear, slope * linear), reach, dtype, 4)
    backend.normalize(x, mean, rstd, gamma, beta, add, add, slope)
    np.testing.assert_array_equal(add, out)
    arrays.check_surroundings()


@pytest.mark.parametrize("over", [(1, 2), (1, 2, 3), (2, 3), (0, 1)])
@pytest.mark.parametrize("shape", [(1, 211, 163, 5), (3, 67, 71, 19), (2, 33, 1, 70)])
def test_sums_of_many_elements(
    backend: Backend, dtype: np.dtype, seed: int, over: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    """More than one thread or block takes at a time, far from zero; sums by row and by column."""
    rng = np.random.default_rng(seed)
    x, dy = (rng.standard_normal(shape) + 100).astype(dtype), rng.standard_normal(shape).astype(dtype)
    kept = tuple(1 if d in over else n for d, n in enumerate(shape))
    mean, m2, sum_dy, sum_dy_xhat = np.full((4, *kept), 77.0)
    backend.moments(x, mean, m2)
    exact = x.astype(np.longdouble)
    summed = np.moveaxis(exact, over, range(len(over))).reshape(prod(shape[d] for d in over), -1)
    of_mean, of_m2 = moments_tolerance(summed, dtype)
    np.testing.assert_allclose(mean, exact.mean(over, keepdims=True).astype(float), rtol=0, atol=of_mean)
    centre = exact - exact.mean(over, keepdims=True)
    np.testing.assert_allclose(m2, (centre**2).sum(over, keepdims=True).astype(float), rtol=of_m2)
    rstd = 1 / np.sqrt(m2 + 1)
    terms = ((x.astype(float) - mean) * rstd) * dy
    backend.normalize_grad(dy, x, mean, rstd, sum_dy, sum_dy_xhat)
    # in double, but for runs of RUN numbers in their own precision
    magnitude = np.abs(dy).astype(float).sum(over, keepdims=True)
    rounding = 1e-12 + (RUN + 2) * float(np.finfo(dtype).eps)
    reach = (np.abs(terms) + np.abs(dy) * np.abs(mean) * rstd).sum(over, keepdims=True)
    np.testing.assert_array_less(np.abs(sum_dy - dy.sum(over, np.float64, keepdims=True)), rounding * magnitude)
    np.testing.assert_array_less(np.abs(sum_dy_xhat - terms.sum(over, keepdims=True)), rounding * reach)
    # the same statistics, summed over other dims: what layer norm's weights get
    gradient = np.full((2, shape[-1]), 77.0)
    backend.normalize_grad(dy, x, mean, rstd, *gradient)
    want = dy.sum((0, 1, 2), np.float64), terms.sum((0, 1, 2))
    reach = (np.abs(terms) + np.abs(dy) * (np.abs(mean) * rstd + 1)).sum((0, 1, 2))
    np.testing.assert_array_less(np.abs(gradient - np.stack(want)), np.stack([rounding * reach] * 2))
