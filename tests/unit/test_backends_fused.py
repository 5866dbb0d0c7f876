"""Normalization with addition and activation, and masked gradients, in one pass: equal to the operations one by one."""

from __future__ import annotations

import numpy as np
import pytest
from cases import Arrays, assert_close, cases

from hpctrain.backends.base import Backend

SLOPES = (1.0, 0.0, 0.125)
SPECIAL = (0.0, -0.0, np.inf, -np.inf, np.nan)


def act(v: np.ndarray, slope: float) -> np.ndarray:
    """The activation element by element; NaN stays."""
    return v if slope == 1 else np.where(v > 0, v, np.where(np.isnan(v), v, 0.0 if slope == 0 else slope * v))


def masked(dy: np.ndarray, y: np.ndarray, slope: float) -> np.ndarray:
    """dy times the activation's derivative; a slope of 0 gives 0 for infinity and NaN too."""
    return np.where(y > 0, dy, 0.0 if slope == 0 else slope * dy)


def statistics(arrays: Arrays, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Any mean, and a positive factor."""
    mean, rstd = arrays.rng.standard_normal((2, channels))
    return mean, np.exp(rstd)


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("added", [False, True])
def test_normalize_adds_and_activates(backend: Backend, dtype: np.dtype, seed: int, slope: float, added: bool) -> None:
    for g, arrays in cases(dtype, seed, wide=True):
        x, add = (arrays.normal(g.n, *g.extent, g.c) for _ in range(2))
        gamma, beta, out = arrays.normal(g.c), arrays.normal(g.c), arrays.out(*x.shape)
        mean, rstd = statistics(arrays, g.c)
        backend.normalize(x, mean, rstd, gamma, beta, out, add if added else None, slope)
        linear = (x.astype(float) - mean) * rstd * gamma + beta + (add if added else 0.0)
        terms = (np.abs(x) + np.abs(mean)) * rstd * np.abs(gamma) + np.abs(beta) + (np.abs(add) if added else 0.0)
        assert_close(out, act(linear, slope), terms, dtype, 5)


def test_activations_of_normalize_are_exact(backend: Backend, dtype: np.dtype, seed: int) -> None:
    """With mean 0 and factors 1 only the activation is left: slope 0 is `relu`, whatever the values."""
    for g, arrays in cases(dtype, seed, wide=True):
        values = arrays.rng.standard_normal((g.n, *g.extent, g.c)).astype(dtype)
        values[arrays.rng.random(values.shape) < 0.3] = arrays.rng.choice(SPECIAL)
        x, out, want = arrays.of(values), arrays.out(*values.shape), arrays.out(*values.shape)
        zero, one = np.zeros(g.c), np.ones(g.c)
        vectors = zero, one, arrays.of(np.ones(g.c, dtype)), arrays.of(np.zeros(g.c, dtype))
        with np.errstate(invalid="ignore"):
            for slope in SLOPES:
                backend.normalize(x, *vectors, out, None, slope)
                np.testing.assert_array_equal(out, act(values, slope))
            backend.normalize(x, *vectors, out, slope=0.0)
            backend.relu(x, want)
        np.testing.assert_array_equal(out, want)


def test_normalize_in_place_of_what_it_adds(backend: Backend, dtype: np.dtype, seed: int) -> None:
    arrays = Arrays(dtype, seed, strided=True)
    x, add, out, vector = arrays.normal(3, 5, 7, 19), arrays.normal(3, 5, 7, 19), arrays.out(3, 5, 7, 19), np.ones(19)
    gamma, beta = arrays.normal(19), arrays.normal(19)
    backend.normalize(x, vector, vector, gamma, beta, out, add, 0.0)
    backend.normalize(x, vector, vector, gamma, beta, add, add, 0.0)
    np.testing.assert_array_equal(add, out)
    backend.normalize(x, vector, vector, gamma, beta, out)
    backend.normalize(x, vector, vector, gamma, beta, x)
    np.testing.assert_array_equal(x, out)
    arrays.check_surroundings()


@pytest.mark.parametrize("slope", SLOPES)
def test_masked_gradients_equal_mask_then_gradient(backend: Backend, dtype: np.dtype, seed: int, slope: float) -> None:
    for g, arrays in cases(dtype, seed, wide=True):
        x, y, first, second, third = (arrays.normal(g.n, *g.extent, g.c) for _ in range(5))
        y[arrays.rng.random(y.shape) < 0.1] = 0
        mean, rstd = statistics(arrays, g.c)
        wants = [masked(dy.copy(), y, slope).astype(dtype) for dy in (first, second, third)]
        sums, biases, bias_sums = np.full((2, g.c), 77.0), arrays.out(g.c), arrays.out(g.c)
        backend.activation_grad(first, y, slope)
        backend.bias_grad(second, biases, y, slope)
        backend.normalize_grad(third, x, mean, rstd, *sums, y, slope)
        for dy, want in zip((first, second, third), wants, strict=True):
            np.testing.assert_array_equal(dy, want)
        backend.bias_grad(wants[1], bias_sums)
        np.testing.assert_array_equal(biases, bias_sums)
        plain = np.full((2, g.c), 77.0)
        backend.normalize_grad(wants[2], x, mean, rstd, *plain)
        np.testing.assert_array_equal(sums, plain)


def test_masks_of_special_values(backend: Backend, dtype: np.dtype) -> None:
    """Where y is not above 0, NaN included, a slope of 0 gives 0 even for an infinite gradient."""
    y, dy = (np.array(a, dtype).reshape(-1, 1) for a in zip(*[(a, b) for a in SPECIAL for b in SPECIAL], strict=True))
    for slope in (0.0, 0.125):
        got, sums = [dy.copy() for _ in range(3)], np.zeros((2, 1))
        backend.activation_grad(got[0], y, slope)
        with np.errstate(invalid="ignore"):
            backend.bias_grad(got[1], np.zeros(1, dtype), y, slope)
            backend.normalize_grad(got[2], y, np.zeros(1), np.ones(1), *sums, y, slope)
        for found in got:
            np.testing.assert_array_equal(found, masked(dy, y, slope))


def test_gradients_through_an_activated_normalization(backend: Backend, seed: int) -> None:
    """Of <dy, relu(normalize(x) + add)> by everything that goes in, against differences."""
    arrays, shape, slope, h = Arrays(np.dtype(float), seed, strided=True), (3, 5, 2, 7), 0.125, 1e-6
    x, add, dy, y, dx = (arrays.normal(*shape) for _ in range(5))
    gamma, beta, count = arrays.normal(7), arrays.normal(7), 30
    inputs, outer = [np.array(a) for a in (x, add, gamma, beta)], np.array(dy)

    def loss() -> float:
        x, add, gamma, beta = inputs
        xhat = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-3)
        return float(np.vdot(act(xhat * gamma + beta + add, slope), outer))

    mean, m2, dbeta, dgamma = np.zeros((4, 7))
    backend.moments(x, mean, m2)
    rstd = 1 / np.sqrt(m2 / count + 1e-3)
    backend.normalize(x, mean, rstd, gamma, beta, y, add, slope)
    assert np.vdot(y, dy) == pytest.approx(loss(), rel=1e-11, abs=1e-11)
    backend.normalize_grad(dy, x, mean, rstd, dbeta, dgamma, y, slope)
    backend.normalize_dx(dy, x, mean, rstd, gamma, gamma * dbeta / count, gamma * dgamma / count, dx)
    for array, gradient in zip(inputs, (dx, dy, dgamma, dbeta), strict=True):
        for _ in range(5):
            at, losses = tuple(arrays.rng.integers(array.shape)), []
            for step in (h, -2 * h, h):
                array[at] += step
                losses.append(loss())
            assert gradient[at] == pytest.approx((losses[0] - losses[1]) / (2 * h), rel=1e-5, abs=1e-6)
    arrays.check_surroundings()


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_fused_operations_of_nothing(backend: Backend, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    x, channels = np.zeros(shape, dtype), shape[-1]
    sums, bias = np.full((2, channels), 5.0), np.full(channels, 5, dtype)
    vectors = np.ones((2, channels)), np.ones((2, channels), dtype)
    backend.normalize(x, *vectors[0], *vectors[1], x, x, 0.0)
    backend.normalize_grad(x, x, *vectors[0], *sums, x, 0.0)
    backend.bias_grad(x, bias, x, 0.0)
    backend.activation_grad(x, x, 0.0)
    assert np.all(sums == 0)
    assert np.all(bias == 0)


def test_slopes_below_zero_are_refused(backend: Backend, dtype: np.dtype) -> None:
    """The sign of y would not say on which side of 0 the activation was."""
    x, sums, vector = np.ones((3, 2), dtype), np.ones((2, 2)), np.ones(2, dtype)
    for call in (
        lambda slope: backend.activation_grad(x, x, slope),
        lambda slope: backend.bias_grad(x, vector, x, slope),
        lambda slope: backend.normalize(x, *sums, vector, vector, x, None, slope),
        lambda slope: backend.normalize_grad(x, x, *sums, *sums.copy(), x, slope),
    ):
        for slope in (-0.5, np.nan):
            with pytest.raises(ValueError, match=r"slope (-0\.5|-?nan).*0 or more"):
                call(slope)
