"""Normalization, elementwise operations, losses and optimizer of every backend against NumPy, SciPy and differences.

And what holds for all operations: NaN passes through, empty arrays are fine.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from cases import CASES, Arrays, assert_close, cases
from scipy.special import log_softmax

from hpctrain import backends
from hpctrain.backends.base import Backend

# --- bias and normalization: statistics are float64 whatever the arrays are -------------------------------------------


def test_bias(backend: Backend, dtype: np.dtype, seed: int) -> None:
    for g, arrays in cases(dtype, seed, wide=True):
        y, bias, db = (
            arrays.normal(g.n, *g.extent, g.c),
            arrays.of((np.arange(g.c) - 0.3).astype(dtype)),
            arrays.out(g.c),
        )
        before = y.copy()
        backend.bias_add(y, bias)
        backend.bias_grad(y, db)
        for c in range(g.c):
            np.testing.assert_array_equal(y[..., c], before[..., c] + bias[c])
            assert_close(db[c], y[..., c].astype(float).sum(), np.abs(y[..., c]).sum(), dtype, y.size)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_far_from_zero(backend: Backend, dtype: np.dtype, seed: int, offset: float) -> None:
    for g, arrays in cases(dtype, seed, wide=True):
        x = arrays.of((arrays.rng.standard_normal((g.n, *g.extent, g.c)) + offset).astype(dtype))
        mean, m2 = arrays.out(g.c, dtype=float), arrays.out(g.c, dtype=float)
        backend.moments(x, mean, m2)
        exact = x.reshape(-1, g.c).astype(np.longdouble)  # of the rounded values: only the algorithm may err
        np.testing.assert_allclose(mean, exact.mean(axis=0).astype(float), rtol=1e-13, atol=1e-13)
        want = ((exact - exact.mean(axis=0)) ** 2).sum(axis=0)
        np.testing.assert_allclose(m2, want.astype(float), rtol=1e-11, atol=1e-11)


def batch_norm_loss(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, dy: np.ndarray) -> float:
    """<dy, batch norm of x>, in NumPy's own terms."""
    axes = tuple(range(x.ndim - 1))
    return float(np.sum(dy * ((x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-3) * gamma + beta)))


def test_batch_norm_gradients_equal_finite_differences(backend: Backend, seed: int) -> None:
    for g, arrays in cases(np.dtype("float64"), seed):
        x, dy = arrays.normal(g.n + 1, *g.extent, g.c), arrays.normal(g.n + 1, *g.extent, g.c)
        gamma, beta, mean, m2, sum_dy, sum_dy_xhat = (arrays.normal(g.c) for _ in range(6))
        y, dx, count = arrays.out(*x.shape), arrays.out(*x.shape), x.size // g.c
        backend.moments(x, mean, m2)
        rstd = 1 / np.sqrt(m2 / count + 1e-3)
        backend.normalize(x, mean, rstd, gamma, beta, y)
        assert np.vdot(y, dy) == pytest.approx(batch_norm_loss(x, gamma, beta, dy), rel=1e-10, abs=1e-10)
        backend.normalize_grad(dy, x, mean, rstd, sum_dy, sum_dy_xhat)
        backend.normalize_dx(dy, x, mean, rstd, gamma, sum_dy / count, sum_dy_xhat / count, dx)
        inputs = [np.array(a) for a in (x, gamma, beta)]
        for array, gradient in zip(inputs, (dx, sum_dy_xhat, sum_dy), strict=True):
            at, h = tuple(arrays.rng.integers(array.shape)), 1e-5
            array[at] += h
            above = batch_norm_loss(*inputs, dy)
            array[at] -= 2 * h
            below = batch_norm_loss(*inputs, dy)
            array[at] += h
            assert gradient[at] == pytest.approx((above - below) / (2 * h), rel=1e-5, abs=1e-5)


def test_normalize_operations_round_no_more_than_their_type(backend: Backend, dtype: np.dtype, seed: int) -> None:
    for g, arrays in cases(dtype, seed, wide=True):
        x, dy, y, dx = (arrays.normal(g.n, *g.extent, g.c) for _ in range(4))
        gamma, beta = arrays.normal(g.c), arrays.normal(g.c)
        statistics = Arrays(np.dtype("float64"), seed, strided=False)
        mean, mean_dy, mean_dy_xhat = (statistics.normal(g.c) for _ in range(3))
        rstd, sum_dy, sum_dy_xhat = np.exp(statistics.normal(g.c)), statistics.out(g.c), statistics.out(g.c)
        backend.normalize(x, mean, rstd, gamma, beta, y)
        backend.normalize_grad(dy, x, mean, rstd, sum_dy, sum_dy_xhat)
        backend.normalize_dx(dy, x, mean, rstd, gamma, mean_dy, mean_dy_xhat, dx)
        xhat, reach = (x - mean) * rstd, (np.abs(x) + np.abs(mean)) * rstd
        assert_close(y, xhat * gamma + beta, reach * np.abs(gamma) + np.abs(beta), dtype, 3)
        want, size = gamma * rstd * (dy - mean_dy - xhat * mean_dy_xhat), np.abs(gamma) * rstd
        assert_close(dx, want, size * (np.abs(dy) + np.abs(mean_dy) + reach * np.abs(mean_dy_xhat)), dtype, 5)
        for sums, terms in ((sum_dy, dy.astype(float)), (sum_dy_xhat, dy * xhat)):
            flat = terms.reshape(-1, g.c)
            magnitude = (np.abs(dy) * (reach + 1)).reshape(-1, g.c).sum(axis=0)
            assert_close(sums, flat.sum(axis=0), magnitude, np.dtype("float64"), len(flat))


# --- elementwise, losses, optimizer -----------------------------------------------------------------------------------


def test_elementwise(backend: Backend, dtype: np.dtype, seed: int) -> None:
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, np.finfo(dtype).tiny, -np.finfo(dtype).tiny], dtype)
    for g, arrays in cases(dtype, seed):
        shape = (g.n, *g.extent, g.c)
        a, b = (arrays.of(np.where(arrays.rng.random(shape) < 0.2, arrays.rng.choice(special, shape), v).astype(dtype))
                for v in arrays.rng.standard_normal((2, *shape)))  # fmt: skip
        total, y, dx = arrays.out(*shape), arrays.out(*shape), arrays.out(*shape)
        with np.errstate(invalid="ignore"):
            backend.add(a, b, total)
            backend.relu(a, y)
            backend.relu_dx(b, y, dx)
            for at in np.ndindex(shape):
                np.testing.assert_equal(total[at] + 0.0, a[at] + b[at] + 0.0)
                np.testing.assert_equal(y[at] + 0.0, a[at] if np.isnan(a[at]) or a[at] > 0 else 0.0)
                np.testing.assert_equal(dx[at] + 0.0, b[at] + 0.0 if y[at] > 0 else 0.0)
            backend.add(a, b, a)
        np.testing.assert_array_equal(a, total)


def test_softmax_cross_entropy_equals_scipy(backend: Backend, dtype: np.dtype, seed: int) -> None:
    for case in range(CASES):
        arrays = Arrays(dtype, seed + case, strided=False)
        n, k = arrays.rng.integers(1, 30, 2).tolist()
        logits = arrays.of((arrays.rng.standard_normal((n, k)) * 10 ** (case % 5)).astype(dtype))
        labels, scale = arrays.rng.integers(0, k, n), arrays.normal(n)
        loss, probability, dx = arrays.out(n), arrays.out(n, k), arrays.out(n, k)
        backend.softmax_cross_entropy(logits, labels, loss, probability)
        backend.softmax_cross_entropy_dx(probability, labels, scale, dx)
        want = log_softmax(logits.astype(float), axis=1)
        reach = np.abs(logits).max() + 1  # exp turns an absolute error of eps * |logit| into a relative one
        assert_close(loss, -want[np.arange(n), labels], reach, dtype, k)
        assert_close(probability, np.exp(want), reach, dtype, k)
        onehot = labels[:, None] == np.arange(k)
        assert_close(dx, scale[:, None] * (np.exp(want) - onehot), reach * np.abs(scale[:, None]), dtype, k)


def test_softmax_gradient_equals_finite_differences(backend: Backend, seed: int) -> None:
    arrays = Arrays(np.dtype("float64"), seed, strided=False)
    logits, labels, scale = arrays.normal(3, 7), np.array([6, 0, 3]), arrays.normal(3)
    losses, probability, dx = np.zeros((2, 3)), arrays.out(3, 7), arrays.out(3, 7)
    backend.softmax_cross_entropy(logits, labels, losses[0], probability)
    backend.softmax_cross_entropy_dx(probability, labels, scale, dx)
    for at in np.ndindex(3, 7):
        for side, h in enumerate((1e-6, -1e-6)):
            moved = logits.copy()
            moved[at] += h
            backend.softmax_cross_entropy(moved, labels, losses[side], np.empty_like(probability))
        assert dx[at] == pytest.approx(np.vdot(scale, losses[0] - losses[1]) / 2e-6, abs=1e-8)


def test_squared_error(backend: Backend, dtype: np.dtype, seed: int) -> None:
    for case in range(CASES):
        arrays = Arrays(dtype, seed + case, strided=False)
        n, k = arrays.rng.integers(1, 30, 2).tolist()
        x, target, scale = arrays.normal(n, k), arrays.normal(n, k), arrays.normal(n)
        loss, dx = arrays.out(n), arrays.out(n, k)
        backend.squared_error(x, target, loss)
        backend.squared_error_dx(x, target, scale, dx)
        difference = x.astype(float) - target
        assert_close(loss, np.array([row @ row for row in difference]), (difference**2).sum(axis=1), dtype, k + 2)
        for row in range(n):
            want = 2 * float(scale[row]) * difference[row]
            assert_close(dx[row], want, np.abs(want), dtype, 3)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_update(backend: Backend, dtype: np.dtype, seed: int, nesterov: bool) -> None:
    arrays, size, lr, momentum, decay = Arrays(dtype, seed, strided=False), 1003, 0.1, 0.9, 0.01
    w, velocity = arrays.normal(size), arrays.normal(size)
    want_w, want_v = w.astype(float), velocity.astype(float)
    for _ in range(3):
        g = arrays.normal(size)
        backend.sgd_update(w, g, velocity, lr, momentum, decay, nesterov)
        for i in range(size):
            slope = float(g[i]) + decay * want_w[i]
            want_v[i] = momentum * want_v[i] + slope
            want_w[i] -= lr * (slope + momentum * want_v[i] if nesterov else want_v[i])
    assert_close(velocity, want_v, 20, dtype, 3 * 4)
    assert_close(w, want_w, 20, dtype, 3 * 4)


# --- what holds for all of them ---------------------------------------------------------------------------------------


def test_nan_reaches_exactly_the_outputs_that_depend_on_it(backend: Backend, dtype: np.dtype, seed: int) -> None:
    for g, arrays in cases(dtype, seed):
        x, w, out = (
            arrays.normal(g.n, *g.extent, g.c),
            arrays.normal(*g.kernel, g.c, g.k),
            arrays.out(g.n, *g.outputs, g.k),
        )
        at = tuple(arrays.rng.integers(x.shape))
        x[at] = np.nan
        backend.conv(x, w, out, g.stride, g.dilation)
        for position in g.positions():
            touched = np.isnan(x[g.window(position)]).any(axis=tuple(range(1, x.ndim)))
            assert np.array_equal(np.isnan(out[:, *position]).all(axis=-1), touched)
        sums, mean, m2 = arrays.out(g.n, g.c), np.zeros(g.c), np.zeros(g.c)
        backend.sum_positions(x, sums, 1.0)
        backend.moments(x, mean, m2)
        assert np.argwhere(np.isnan(sums)).tolist() == [[at[0], at[-1]]]
        assert np.flatnonzero(np.isnan(mean)).tolist() == np.flatnonzero(np.isnan(m2)).tolist() == [at[-1]]


def empty_calls(backend: Backend, dtype: np.dtype) -> dict[str, Callable[[], list[np.ndarray]]]:
    """Operations on no samples, each returning what must be zero afterwards (if it holds anything)."""
    x, y, w, out = (np.full(s, 5, dtype) for s in ((0, 5, 4, 3), (0, 3, 3, 2), (3, 2, 3, 2), (0, 3)))
    vector, statistic, index = np.full(3, 5, dtype), np.full((2, 3), 5.0), np.zeros((0, 3, 3, 3), np.int32)
    pooled, one, labels = np.zeros((0, 3, 3, 3), dtype), np.ones((1, 1, 1, 1), dtype), np.zeros(0, np.int64)
    rows, row, window = np.zeros((0, 4), dtype), np.zeros(0, dtype), ((3, 2), (1, 1))
    return {
        "conv": lambda: [backend.conv(x, w, y, (1, 1), (1, 1))],
        "conv_dx": lambda: [backend.conv_dx(y, w, x, (1, 1), (1, 1))],
        "conv_dw": lambda: [backend.conv_dw(x, y, w, (1, 1), (1, 1)), w],
        "gemm": lambda: [backend.gemm(rows, rows, product_ := np.full((4, 4), 5, dtype), transpose_a=True), product_],
        "bias": lambda: [backend.bias_add(x, vector), backend.bias_grad(x, vector), vector],
        "max_pool": lambda: [
            backend.max_pool(x, pooled, index, *window),
            backend.max_pool_dx(pooled, index, x, *window),
        ],
        "avg_pool": lambda: [backend.avg_pool(x, pooled, one, *window), backend.avg_pool_dx(pooled, x, one, *window)],
        "positions": lambda: [backend.sum_positions(x, out, 1.0), backend.spread_positions(out, x, 1.0)],
        "moments": lambda: [backend.moments(x, *statistic), statistic],
        "normalize": lambda: [backend.normalize(x, *statistic, vector, vector, x)],
        "normalize_grad": lambda: [backend.normalize_grad(x, x, *np.ones((2, 3)), *statistic), statistic],
        "normalize_dx": lambda: [backend.normalize_dx(x, x, *statistic, vector, *statistic, x)],
        "elementwise": lambda: [backend.add(x, x, x), backend.relu(x, x), backend.relu_dx(x, x, x)],
        "softmax": lambda: [backend.softmax_cross_entropy(rows, labels, row, rows.copy())],
        "softmax_dx": lambda: [backend.softmax_cross_entropy_dx(rows, labels, row, rows.copy())],
        "squared_error": lambda: [
            backend.squared_error(rows, rows, row),
            backend.squared_error_dx(rows, rows, row, rows),
        ],
        "sgd_update": lambda: [backend.sgd_update(row, row, row.copy(), 0.1, 0.9, 0.0, True)],
    }


@pytest.mark.parametrize("call", sorted(empty_calls(backends.get("reference"), np.dtype("float32"))))
def test_empty_arrays(backend: Backend, dtype: np.dtype, call: str) -> None:
    results = [result for result in empty_calls(backend, dtype)[call]() if result is not None]
    assert all(np.all(result == 0) for result in results)


def test_sum_positions_of_no_positions_is_zero(backend: Backend, dtype: np.dtype) -> None:
    out = np.full((2, 3), 5, dtype)
    backend.sum_positions(np.zeros((2, 0, 4, 3), dtype), out, 1.0)
    assert np.array_equal(out, np.zeros((2, 3)))


def test_describe_is_one_line_that_begins_with_the_name(backend: Backend) -> None:
    line = backend.describe()
    assert line.startswith(f"{backend.name}: ")
    assert "\n" not in line
    assert set(backend.dtypes) >= {"float32", "float64"}
