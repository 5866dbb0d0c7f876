"""Softmax and losses of every backend against SciPy, plain loops and differences, on vectors and on images."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from cases import CASES, Arrays, assert_close
from scipy.special import huber, log_expit, log_softmax, softmax

from hpctrain.backends.base import POINTWISE_LOSSES, Backend


def arrays_of(dtype: np.dtype, seed: int) -> Iterator[tuple[int, tuple[int, ...], Arrays]]:
    """CASES times (classes, shape of the labels, arrays), half of them strided; nothing around the views changes."""
    for case in range(CASES):
        arrays = Arrays(dtype, seed + case, strided=case % 4 >= 2)
        n, *positions, k = arrays.rng.integers(1, (9, 7, 5, 3, 12), 5).tolist()
        yield k, (n, *positions[: case % 4]), arrays
        arrays.check_surroundings()


def rows(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """One number per sample, in float64, to multiply an array (N, ...)."""
    return values.astype(float).reshape(-1, *(1,) * (like.ndim - 1))


def test_softmax_equals_scipy(backend: Backend, dtype: np.dtype, seed: int) -> None:
    for k, shape, arrays in arrays_of(dtype, seed):
        x, dy = arrays.normal(*shape, k), arrays.normal(*shape, k)
        x *= 10.0 ** (k % 4)
        y, dx = arrays.out(*x.shape), arrays.out(*x.shape)
        backend.softmax(x, y)
        backend.softmax_dx(dy, y, dx)
        want, reach = softmax(x.astype(float), axis=-1), np.abs(x).max() + 1
        assert_close(y, want, reach * want + float(np.finfo(dtype).tiny / np.finfo(dtype).eps), dtype, 4 * k)
        for at in np.ndindex(shape):
            jacobian = np.diag(want[at]) - np.outer(want[at], want[at])
            assert_close(dx[at], dy[at] @ jacobian, 4 * reach * np.abs(dy[at]).max(), dtype, k)


def test_cross_entropy_equals_scipy(backend: Backend, dtype: np.dtype, seed: int) -> None:
    for case, (k, shape, arrays) in enumerate(arrays_of(dtype, seed)):
        smoothing, ignored = (0.0, 0.3)[case % 2], 0
        logits, weight = arrays.normal(*shape, k), arrays.of((1 + np.arange(k) / 3).astype(dtype))
        logits *= 10.0 ** (case % 5)
        labels, scale = arrays.of(arrays.rng.integers(-1, k + 1, shape)), arrays.normal(shape[0])
        table = arrays.out(shape[0], 4)  # the loss is a column of what a layer gives
        probability, dx = arrays.out(*logits.shape), arrays.out(*logits.shape)
        backend.cross_entropy(logits, labels, weight, smoothing, table[:, 1], probability)
        backend.cross_entropy_dx(probability, labels, weight, smoothing, scale, dx)
        surprise, loss, gradient = -log_softmax(logits.astype(float), axis=-1), np.zeros(shape[0]), np.zeros(dx.shape)
        for at in np.ndindex(shape):
            if not 0 <= labels[at] < k:
                ignored += 1
                continue
            aim = smoothing / k * weight.astype(float)
            aim[labels[at]] += (1 - smoothing) * weight[labels[at]]
            loss[at[0]] += aim @ surprise[at]
            gradient[at] = float(scale[at[0]]) * (np.exp(-surprise[at]) * aim.sum() - aim)
        reach = (np.abs(logits).max() + 1) * float(weight.max())  # exp makes an absolute error of its argument relative
        assert_close(table[:, 1], loss, reach * labels[0].size * 2, dtype, k)
        assert_close(probability, np.exp(-surprise), reach, dtype, k)
        assert_close(dx, gradient, 2 * reach * np.abs(rows(scale, dx)) + np.finfo(dtype).tiny, dtype, k)
        np.testing.assert_array_equal(table[:, [0, 2, 3]], 77)
        assert np.all(dx[(labels < 0) | (labels >= k)] == 0)
        assert ignored > 0 or labels.size < 50


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_gradient_equals_differences(backend: Backend, seed: int, smoothing: float) -> None:
    arrays = Arrays(np.dtype("float64"), seed, strided=False)
    logits, labels, weight, scale = arrays.normal(2, 3, 5), np.array([[4, 0, -100], [2, 5, 2]]), *arrays.normal(2, 5)
    losses, probability, dx = np.zeros((2, 2)), arrays.out(2, 3, 5), arrays.out(2, 3, 5)
    backend.cross_entropy(logits, labels, weight, smoothing, losses[0], probability)
    backend.cross_entropy_dx(probability, labels, weight, smoothing, scale[:2], dx)
    for at in np.ndindex(2, 3, 5):
        for side, h in enumerate((1e-6, -1e-6)):
            moved = logits.copy()
            moved[at] += h
            backend.cross_entropy(moved, labels, weight, smoothing, losses[side], np.empty_like(probability))
        assert dx[at] == pytest.approx(np.vdot(scale[:2], losses[0] - losses[1]) / 2e-6, abs=1e-8)


def test_cross_entropy_of_extremes(backend: Backend, dtype: np.dtype) -> None:
    """A class that -inf excludes costs nothing; NaN at a position that does not count does not count."""
    logits = np.array([[[0, -np.inf, 0], [np.nan, 1, 2]], [[1e4, -1e4, 0], [0, np.nan, 0]]], dtype)
    labels, weight = np.array([[2, 3], [1, 0]], np.uint8), np.ones(3, dtype)
    loss, probability, dx = np.empty(2, dtype), np.empty_like(logits), np.empty_like(logits)
    backend.cross_entropy(logits, labels, weight, 0.0, loss, probability)
    backend.cross_entropy_dx(probability, labels, weight, 0.0, np.ones(2, dtype), dx)
    np.testing.assert_allclose(loss, [np.log(2), np.nan], rtol=4 * np.finfo(dtype).eps)
    np.testing.assert_array_equal(dx[0], [[0.5, 0, -0.5], [0, 0, 0]])
    np.testing.assert_array_equal(dx[1, 0], [1, -1, 0])
    assert np.isnan(dx[1, 1]).all()


DELTA = 0.75
TERMS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "squared": lambda x, t: (x - t) ** 2,
    "absolute": lambda x, t: np.abs(x - t),
    "huber": lambda x, t: huber(DELTA, x - t),
    "logistic": lambda x, t: -t * log_expit(x) - (1 - t) * log_expit(-x),
}
"""The losses by SciPy, in float64."""


@pytest.mark.parametrize("kind", POINTWISE_LOSSES)
def test_pointwise_loss_equals_scipy_and_differences(backend: Backend, dtype: np.dtype, seed: int, kind: str) -> None:
    for k, shape, arrays in arrays_of(dtype, seed):
        x, scale = arrays.normal(*shape, k), arrays.normal(shape[0])
        target = arrays.of(arrays.rng.random(x.shape).astype(dtype))
        table, dx = arrays.out(shape[0], 4), arrays.out(*x.shape)
        backend.pointwise_loss(kind, x, target, table[:, 0], DELTA)
        backend.pointwise_loss_dx(kind, x, target, scale, dx, DELTA)
        terms, (a, t) = TERMS[kind], (x.astype(float), target.astype(float))
        reach = (np.abs(a) + np.abs(t) + 1) ** 2
        over = tuple(range(1, x.ndim))
        assert_close(table[:, 0], terms(a, t).sum(over), reach.sum(over), dtype, 4)
        h = 1e-7
        slope = (terms(a + h, t) - terms(a - h, t)) / (2 * h)
        smooth = (np.abs(a - t) > 1e-3) | (kind != "absolute")
        want = np.where(smooth, rows(scale, x) * slope, dx)
        np.testing.assert_allclose(dx, want, atol=3e-6)
        np.testing.assert_array_equal(table[:, 1:], 77)


@pytest.mark.parametrize("kind", POINTWISE_LOSSES)
def test_pointwise_loss_at_its_limits(backend: Backend, dtype: np.dtype, kind: str) -> None:
    far = float(np.finfo(dtype).max) / 4
    x, target = np.array([0, DELTA, -DELTA, far, -far, np.nan], dtype), np.zeros(6, dtype)
    loss, dx = np.empty(6, dtype), np.empty(6, dtype)
    with np.errstate(over="ignore"):  # the square of the largest number
        backend.pointwise_loss(kind, x, target, loss, DELTA)
    backend.pointwise_loss_dx(kind, x, target, np.ones(6, dtype), dx, DELTA)
    log2, half = np.log(2), DELTA**2 / 2
    sides = np.log1p(np.exp(DELTA)), np.log1p(np.exp(-DELTA))
    losses, slopes = {
        "squared": ([0, 2 * half, 2 * half, np.inf, np.inf], [0, 2 * DELTA, -2 * DELTA, 2 * far, -2 * far]),
        "absolute": ([0, DELTA, DELTA, far, far], [0, 1, -1, 1, -1]),
        "huber": ([0, half, half, DELTA * far, DELTA * far], [0, DELTA, -DELTA, DELTA, -DELTA]),
        "logistic": ([log2, *sides, far, 0], [0.5, 1 / (1 + np.exp(-DELTA)), 1 / (1 + np.exp(DELTA)), 1, 0]),
    }[kind]
    np.testing.assert_allclose(loss, [*losses, np.nan], rtol=4 * np.finfo(dtype).eps)
    np.testing.assert_allclose(dx, [*slopes, np.nan], rtol=4 * np.finfo(dtype).eps)


def test_logistic_loss_of_a_right_and_certain_prediction_keeps_its_digits(backend: Backend, dtype: np.dtype) -> None:
    x, target, loss = np.array([[30], [-30]], dtype), np.array([[1], [0]], dtype), np.empty(2, dtype)
    backend.pointwise_loss("logistic", x, target, loss)
    np.testing.assert_allclose(loss, np.log1p(np.exp(-30)), rtol=20 * np.finfo(dtype).eps)


def test_losses_of_many_elements_are_added_in_double(backend: Backend) -> None:
    n = 2**21 + 1
    x, loss = np.full((1, n, 1), 0.1, np.float32), np.empty(1, np.float32)
    backend.pointwise_loss("absolute", x, np.zeros_like(x), loss)
    assert loss[0] == np.float32(n * float(np.float32(0.1)))
    two, weight = np.zeros((1, n, 2), np.float32), np.ones(2, np.float32)
    backend.cross_entropy(two, np.zeros((1, n), np.int8), weight, 0.0, loss, np.empty_like(two))
    assert loss[0] == pytest.approx(n * np.log(2), rel=2e-7)


def test_label_scores_equal_a_loop(backend: Backend, dtype: np.dtype, seed: int) -> None:
    counted = ties = 0
    for k, shape, arrays in arrays_of(dtype, seed):
        values = arrays.rng.integers(-2, 3, (*shape, k)).astype(dtype)  # few values: many ties
        values[arrays.rng.random(values.shape) < 0.05] = np.nan
        logits, weight = arrays.of(values), arrays.of((1 + np.arange(k) / 4).astype(dtype))
        labels = arrays.of(arrays.rng.integers(-2, k + 2, shape))
        table, want = arrays.out(shape[0], 4), np.zeros((shape[0], 3))
        backend.label_scores(logits, labels, weight, table[:, 3], table[:, 1], table[:, 0])
        for at in np.ndindex(shape):
            if 0 <= labels[at] < k:
                counted += 1
                best = max(range(k), key=lambda c: (np.isnan(values[at][c]), values[at][c]))
                ties += np.count_nonzero(values[at] == values[at][best]) > 1
                want[at[0]] += weight[labels[at]], best == labels[at], 1
        np.testing.assert_array_equal(table[:, [3, 1, 0]], want)  # quarters and counts: exact
        np.testing.assert_array_equal(table[:, 2], 77)
    assert counted > 20
    assert ties > 5


def test_agreement_equals_a_loop(backend: Backend, dtype: np.dtype, seed: int) -> None:
    for k, shape, arrays in arrays_of(dtype, seed):
        x, target = (arrays.of(arrays.rng.choice([-1, 0, 0.5, 1, np.nan], (*shape, k)).astype(dtype)) for _ in range(2))
        table, want = arrays.out(shape[0], 2), np.zeros(shape[0])
        backend.agreement(x, target, table[:, 1])
        for at in np.ndindex(x.shape):
            want[at[0]] += (x[at] > 0) == (target[at] > 0.5)
        np.testing.assert_array_equal(table[:, 1], want)
        np.testing.assert_array_equal(table[:, 0], 77)


@pytest.mark.parametrize("classes", [1, 16, 17, 33, 2049, 5000])
def test_softmax_and_cross_entropy_of_many_classes(backend: Backend, dtype: np.dtype, seed: int, classes: int) -> None:
    """Around what kernels take at a time: 16 classes side by side, rows of 2048."""
    arrays = Arrays(dtype, seed, strided=True)
    x, labels, weight = arrays.normal(3, 5, classes), arrays.rng.integers(0, classes, (3, 5)), np.ones(classes, dtype)
    x *= 10
    y, p, loss = arrays.out(3, 5, classes), arrays.out(3, 5, classes), np.empty(3, dtype)
    backend.softmax(x, y)
    backend.cross_entropy(x, labels, weight, 0.0, loss, p)
    surprise = -log_softmax(x.astype(float), axis=-1)
    reach = np.abs(x).max() + 1
    assert_close(y, np.exp(-surprise), reach * np.exp(-surprise), dtype, 4 * classes)
    assert_close(p, np.exp(-surprise), reach * np.exp(-surprise), dtype, 4 * classes)
    want = np.take_along_axis(surprise, labels[..., None], -1).sum((1, 2))
    assert_close(loss, want, 10 * reach, dtype, classes)
    arrays.check_surroundings()


LABEL_TYPES = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


@pytest.mark.parametrize("kind", LABEL_TYPES)
def test_labels_of_every_integer_type(backend: Backend, dtype: np.dtype, seed: int, kind: str) -> None:
    rng, limits = np.random.default_rng(seed), np.iinfo(kind)
    labels = np.array([[0, 1, 2], [2, limits.max, max(limits.min, -2)]], kind)
    counts = (labels >= 0) & (labels < 3)
    logits, weight = rng.standard_normal((2, 3, 3)).astype(dtype), np.ones(3, dtype)
    loss, p, dx, scores = np.empty(2, dtype), np.empty_like(logits), np.empty_like(logits), np.empty((3, 2), dtype)
    backend.cross_entropy(logits, labels, weight, 0.0, loss, p)
    backend.cross_entropy_dx(p, labels, weight, 0.0, np.ones(2, dtype), dx)
    backend.label_scores(logits, labels, weight, *scores)
    at_label = np.take_along_axis(log_softmax(logits, -1), np.where(counts, labels, 0).astype(int)[..., None], -1)
    np.testing.assert_allclose(loss, -np.where(counts, at_label[..., 0], 0).sum(1), rtol=1e-5)
    np.testing.assert_array_equal((dx != 0).any(axis=-1), counts)
    np.testing.assert_array_equal(scores[2], counts.sum(axis=1))


def test_losses_of_nothing(backend: Backend, dtype: np.dtype) -> None:
    for shape in ((0, 3), (2, 0), (2, 0, 5), (2, 4, 0)):
        x, labels, n = np.zeros(shape, dtype), np.zeros(shape[:-1], np.int64), shape[0]
        rows, weight = np.full((5, n), 7, dtype), np.ones(shape[-1], dtype)
        backend.softmax(x, x)
        backend.softmax_dx(x, x, x)
        backend.cross_entropy(x, labels, weight, 0.1, rows[0], x)
        backend.cross_entropy_dx(x, labels, weight, 0.1, np.ones(n, dtype), x)
        backend.label_scores(x, labels, weight, *rows[1:4])
        backend.pointwise_loss("logistic", x, x, rows[4])
        backend.pointwise_loss_dx("logistic", x, x, np.ones(n, dtype), x)
        np.testing.assert_array_equal(rows, 0)
