"""Updates of weights by every backend, against the formulas written out, and norms against exact fractions."""

from __future__ import annotations

import os
from fractions import Fraction

import numpy as np
import pytest
from cases import Arrays, assert_close

from hpctrain import backends
from hpctrain.backends.base import Backend


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


@pytest.mark.parametrize("decoupled", [False, True])
def test_adam_update(backend: Backend, dtype: np.dtype, seed: int, decoupled: bool) -> None:
    arrays, size, lr, beta1, beta2, eps, decay = Arrays(dtype, seed, strided=False), 1003, 0.1, 0.9, 0.99, 1e-3, 0.01
    w, mean, square = arrays.normal(size), arrays.normal(size), abs(arrays.normal(size))
    want_w, want_m, want_s = (a.astype(float) for a in (w, mean, square))
    for update in (1, 2, 3):
        g = arrays.normal(size)
        backend.adam_update(w, g, mean, square, lr, beta1, beta2, eps, decay, decoupled, update)
        for i in range(size):
            slope = float(g[i]) + (0 if decoupled else decay * want_w[i])
            want_m[i] = beta1 * want_m[i] + (1 - beta1) * slope
            want_s[i] = beta2 * want_s[i] + (1 - beta2) * slope**2
            step = want_m[i] / (1 - beta1**update) / ((want_s[i] / (1 - beta2**update)) ** 0.5 + eps)
            want_w[i] -= lr * step + (lr * decay * want_w[i] if decoupled else 0)
    assert_close(mean, want_m, 20, dtype, 3 * 4)
    assert_close(square, want_s, 20, dtype, 3 * 4)
    # a mean of order 1 over roots that are as small as eps allows in the worst case
    assert_close(w, want_w, 20 * np.abs(want_w).max(), dtype, 3 * 12)


def test_lars_update(backend: Backend, dtype: np.dtype, seed: int) -> None:
    arrays, size, momentum, decay = Arrays(dtype, seed, strided=False), 1003, 0.9, 0.01
    w, velocity = arrays.normal(size), arrays.normal(size)
    want_w, want_v = w.astype(float), velocity.astype(float)
    for rate in (0.1, 0.2, 0.01):
        g = arrays.normal(size)
        backend.lars_update(w, g, velocity, rate, momentum, decay)
        for i in range(size):
            want_v[i] = momentum * want_v[i] + rate * (float(g[i]) + decay * want_w[i])
            want_w[i] -= want_v[i]
    assert_close(velocity, want_v, 20, dtype, 3 * 4)
    assert_close(w, want_w, 20, dtype, 3 * 4)


@pytest.mark.parametrize("size", [0, 1, 31, 33, 4095, 4097, 100_003])
def test_sum_squares_equals_exact_fractions(backend: Backend, dtype: np.dtype, seed: int, size: int) -> None:
    x = Arrays(dtype, seed, strided=False).normal(size)
    exact = float(sum((Fraction(float(a)) ** 2 for a in x), Fraction(0)))
    # float64 in blocks that are added in pairs: a few roundings more than the logarithm of the number of elements
    assert abs(backend.sum_squares(x) - exact) <= 160 * float(np.finfo(float).eps) * exact
    assert isinstance(backend.sum_squares(x), float)


@pytest.mark.skipif(os.environ.get("HPCTRAIN_NATIVE") == "0", reason="installed without compiled kernels")
def test_compiled_updates_refuse_misfits() -> None:
    native, x = backends.get("native"), np.ones(3)
    with pytest.raises(ValueError, match=r"adam_update: updates are counted from 1, not 0"):
        native.adam_update(x, x, x, x, 0.1, 0.9, 0.99, 1e-8, 0.0, False, 0)
    with pytest.raises(ValueError, match=r"lars_update: .*3 channels.*\(2\)"):
        native.lars_update(x, x[:2].copy(), x, 0.1, 0.9, 0.0)
    with pytest.raises(ValueError, match=r"sum_squares: 1D arrays.*\(1, 3\)"):
        native.sum_squares(x[None])
    with pytest.raises(TypeError, match=r"sum_squares: .*got int64"):
        native.sum_squares(x.astype(int))
