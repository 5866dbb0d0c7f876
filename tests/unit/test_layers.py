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
from scipy.special import log_softmax
from sklearn.metrics import log_loss

from hpctrain.backends import reference
from hpctrain.layers import (
    MSE,
    Add,
    AvgPool,
    BatchNorm,
    Conv,
    Dense,
    Flatten,
    GlobalAvgPool,
    MaxPool,
    ReLU,
    SoftmaxCrossEntropy,
)
from hpctrain.layers.loss import LOSS, SCORE, WEIGHT, Loss
from hpctrain.layers.norm import merge_moments
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
    for x, block, box in zip(xs[: 1 if isinstance(layer, Loss) else None], dxs, bound.inputs, strict=False):
        dx = np.zeros(x.shape)
        paste(block, box, dx)
        np.testing.assert_allclose(dx, slopes(scalar, x), rtol=1e-6, atol=1e-7)
    for weight in place.weights:
        np.testing.assert_allclose(dws[weight], slopes(scalar, bound.w[weight]), rtol=1e-6, atol=1e-7, err_msg=weight)


def test_gradient_of_a_mean_squared_error_by_its_targets(seed: int) -> None:
    """Targets that a network computes (of a teacher, of another view) have a gradient, or must be refused."""
    rng = np.random.default_rng(seed)
    x, target = rng.normal(size=(2, 3, 5))
    bound = Bound(alone(MSE(), x.shape, x.shape), 0, {})
    bound.forward([x, target])
    dxs, _ = bound.backward(np.array([[1.0, 0, 0]] * 3))
    np.testing.assert_allclose(dxs[1], -2 * (x - target), rtol=1e-14)


# --- definitions --------------------------------------------------------------------------------------------------


def dilate(w: np.ndarray, dilation: tuple[int, ...]) -> np.ndarray:
    """`w` (kernel..., C, F) with zeros between its taps."""
    wide = tuple(d * (k - 1) + 1 for d, k in zip(dilation, w.shape[:-2], strict=True))
    found = np.zeros((*wide, *w.shape[-2:]))
    found[tuple(slice(None, None, d) for d in dilation)] = w
    return found


def convolved(layer: Conv, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Convolution by scipy: one sample, channel and filter at a time at full resolution, then every stride-th."""
    found = layer.windows(x.shape)
    padded = np.pad(x, [(0, 0), *((window.padding,) * 2 for window in found), (0, 0)])
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


@pytest.mark.parametrize("name", [name for name, (_, layer) in LAYERS.items() if isinstance(layer, Conv)])
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
        monkeypatch.setattr(reference, "COLUMN_BYTES", limit)
        np.testing.assert_allclose(bound.forward([x]), y, rtol=1e-12, atol=1e-12)
        (again,), grown = bound.backward(dy)
        np.testing.assert_allclose(again, dx, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(grown["weight"], dw["weight"], rtol=1e-12, atol=1e-12)


def pooled(x: np.ndarray, layer: MaxPool | AvgPool, fill: float, reduce: Callable[[np.ndarray], Any]) -> np.ndarray:
    """Pooling window by window."""
    found = layer.windows(x.shape)
    padded = np.pad(x, [(0, 0), *((w.padding,) * 2 for w in found), (0, 0)], constant_values=fill)
    counts = [(n + 2 * w.padding - w.kernel) // w.stride + 1 for w, n in zip(found, x.shape[1:-1], strict=True)]
    y = np.empty((x.shape[0], *counts, x.shape[-1]))
    for n, c in product(range(x.shape[0]), range(x.shape[-1])):
        for at in np.ndindex(*counts):
            window = tuple(slice(i * w.stride, i * w.stride + w.kernel) for i, w in zip(at, found, strict=True))
            y[(n, *at, c)] = reduce(padded[(n, *window, c)])
    return y


POOLS: dict[str, tuple[Shape, MaxPool | AvgPool]] = {
    name: (shape, layer) for name, (shape, layer) in LAYERS.items() if isinstance(layer, MaxPool | AvgPool)
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


def test_cross_entropy_equals_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for classes in (2, 5, 11):
        logits, labels = 3 * rng.normal(size=(9, classes)), rng.integers(0, classes, 9)
        rows = run(SoftmaxCrossEntropy(), logits, labels)
        probability = np.exp(log_softmax(logits, axis=1))
        np.testing.assert_allclose(
            rows[:, LOSS].mean(), log_loss(labels, probability, labels=range(classes)), rtol=1e-12
        )
        np.testing.assert_allclose(rows[:, LOSS], -log_softmax(logits, axis=1)[range(9), labels], rtol=1e-12)
        np.testing.assert_array_equal(rows[:, WEIGHT], 1)
        np.testing.assert_array_equal(rows[:, SCORE], probability.argmax(axis=1) == labels)


def test_cross_entropy_of_huge_logits_stays_finite() -> None:
    logits = np.array([[1e5, 0, -1e5], [-1e300, 1e300, 0], [7, 7, 7]])
    rows = run(SoftmaxCrossEntropy(), logits, np.array([0, 1, 2]))
    np.testing.assert_allclose(rows[:, LOSS], [0, 0, np.log(3)], rtol=1e-15)


def test_mean_squared_error_counts_values_not_samples(seed: int) -> None:
    x, target = np.random.default_rng(seed).normal(size=(2, 5, 3))
    rows = run(MSE(), x, target)
    np.testing.assert_allclose(rows[:, LOSS].sum() / rows[:, WEIGHT].sum(), np.mean((x - target) ** 2), rtol=1e-14)
    np.testing.assert_allclose(rows[:, SCORE].sum() / rows[:, WEIGHT].sum(), np.mean(np.abs(x - target)), rtol=1e-14)


def test_targets_that_a_loss_cannot_use() -> None:
    assert SoftmaxCrossEntropy().invalid(np.array([0, 2, 3, -1]), 3).tolist() == [False, False, True, True]
    # what is not finite is not invalid: it ends in the loss, which names the sample or skips it
    assert MSE().invalid(np.array([[0, 1], [np.nan, 1], [1, inf]]), 2).tolist() == [False, False, False]


# --- batch normalization ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 3), (3, 5, 4, 3), (2, 3, 1, 5, 2)])
def test_batch_norm_and_its_running_statistics(shape: Shape, seed: int) -> None:
    """Training divides by the batch's biased variance, evaluation by the running one, which gathers unbiased ones."""
    rng, layer, every = np.random.default_rng(seed), BatchNorm(eps=1e-3, momentum=0.2), tuple(range(len(shape) - 1))
    weights = {"gamma": rng.normal(size=shape[-1]), "beta": rng.normal(size=shape[-1])}
    running = {"running_mean": np.zeros(shape[-1]), "running_var": np.ones(shape[-1])}
    bound = Bound(alone(layer, shape), 0, weights | running)
    mean, var = running["running_mean"], running["running_var"]
    for _ in range(5):
        x = 3 * rng.normal(size=shape) + 7
        expected = (x - x.mean(every)) / np.sqrt(x.var(every) + 1e-3) * weights["gamma"] + weights["beta"]
        np.testing.assert_allclose(bound.forward([x]), expected, rtol=1e-11, atol=1e-12)
        mean, var = 0.8 * mean + 0.2 * x.mean(every), 0.8 * var + 0.2 * x.var(every, ddof=1)
        np.testing.assert_allclose(bound.w["running_mean"], mean, rtol=1e-12)
        np.testing.assert_allclose(bound.w["running_var"], var, rtol=1e-12)
    expected = (x - mean) / np.sqrt(var + 1e-3) * weights["gamma"] + weights["beta"]
    np.testing.assert_allclose(bound.forward([x], training=False), expected, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(bound.w["running_mean"], mean, rtol=1e-12, err_msg="evaluation moves nothing")


def test_batch_norm_of_data_far_from_zero_keeps_its_variance(seed: int) -> None:
    """The textbook E[x^2] - E[x]^2 would lose all digits here; merging by Chan's formula keeps them."""
    rng = np.random.default_rng(seed)
    x = 1e8 + rng.normal(size=(1001, 1))
    rows = [[len(p), p.mean(), ((p - p.mean()) ** 2).sum()] for p in (x[:7], x[7:7], x[7:600], x[600:]) if len(p)]
    count, mean, m2 = merge_moments(np.array([*rows, [0, 99.0, 99.0]]))
    centred = x - 1e8  # exact: 1e8 has 27 bits, x's last place is 2**-26
    assert count == 1001
    np.testing.assert_allclose(mean, x.mean(axis=0), rtol=1e-15)
    # the means of the parts err by 2**-53 * 1e8 = 1e-8, relative to differences of order 0.1
    np.testing.assert_allclose(m2, centred.var(axis=0) * 1001, rtol=1e-7)


def test_batch_norm_of_a_constant_channel_is_its_beta() -> None:
    bound = Bound(alone(BatchNorm(), (3, 2)), 0, {
        "gamma": np.ones(2), "beta": np.array([5.0, -1.0]), "running_mean": np.zeros(2), "running_var": np.ones(2),
    })  # fmt: skip
    y = bound.forward([np.array([[7.0, 1.0], [7.0, 2.0], [7.0, 3.0]])])
    np.testing.assert_array_equal(y[:, 0], 5)
    dxs, _ = bound.backward(np.ones((3, 2)))
    np.testing.assert_allclose(dxs[0], 0, atol=1e-12)
