"""Bias and elementwise operations of every backend against NumPy, SciPy and differences.

And what holds for all operations: NaN passes through, empty arrays are fine.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from cases import assert_close, cases
from scipy.special import expit, log_expit, ndtr

from hpctrain import backends
from hpctrain.backends.base import ACTIVATIONS, POINTWISE_LOSSES, Backend


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


def test_elementwise(backend: Backend, dtype: np.dtype, seed: int) -> None:
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, np.finfo(dtype).tiny, -np.finfo(dtype).tiny], dtype)
    for g, arrays in cases(dtype, seed):
        shape = (g.n, *g.extent, g.c)
        a, b = (arrays.of(np.where(arrays.rng.random(shape) < 0.2, arrays.rng.choice(special, shape), v).astype(dtype))
                for v in arrays.rng.standard_normal((2, *shape)))  # fmt: skip
        total, product, y, dx = (arrays.out(*shape) for _ in range(4))
        with np.errstate(invalid="ignore"):
            backend.add(a, b, total)
            backend.multiply(a, b, product)
            backend.relu(a, y)
            backend.relu_dx(b, y, dx)
            for at in np.ndindex(shape):
                np.testing.assert_equal(total[at] + 0.0, a[at] + b[at] + 0.0)
                np.testing.assert_equal(product[at], a[at] * b[at])
                np.testing.assert_equal(y[at] + 0.0, a[at] if np.isnan(a[at]) or a[at] > 0 else 0.0)
                np.testing.assert_equal(dx[at] + 0.0, b[at] + 0.0 if y[at] > 0 else 0.0)
            backend.add(a, b, a)
            want = a * b
            backend.multiply(a, b, b)
        np.testing.assert_array_equal(a, total)
        np.testing.assert_array_equal(b, want)


SLOPE = 0.125


def activation(kind: str, x: np.ndarray) -> np.ndarray:
    """The function by SciPy, in float64."""
    x = x.astype(float)
    return {
        "leaky_relu": lambda: np.where(x > 0, x, SLOPE * x),
        "gelu": lambda: x * ndtr(x),
        "silu": lambda: x * expit(x),
        "sigmoid": lambda: expit(x),
        "tanh": lambda: np.tanh(x),
        "softplus": lambda: -log_expit(-x),
    }[kind]()


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activation_equals_scipy(backend: Backend, dtype: np.dtype, seed: int, kind: str) -> None:
    for number, (g, arrays) in enumerate(cases(dtype, seed)):
        x = arrays.normal(g.n, *g.extent, g.c)
        x *= (0.01, 1, 5, 100)[number % 4]
        out = arrays.out(*x.shape)
        backend.activate(kind, x, out, SLOPE)
        want = activation(kind, x)
        # the result's own rounding, and in exp(-x^2 / 2) and exp(x) what rounding does to the argument
        magnitude = np.abs(want) * (1 + np.where(kind == "gelu", np.square(x), np.abs(x)))
        subnormal = float(np.finfo(dtype).tiny / np.finfo(dtype).eps)  # such results keep fewer digits, or none
        assert_close(out, want, magnitude + subnormal, dtype, 8)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activation_slope_equals_differences(backend: Backend, dtype: np.dtype, seed: int, kind: str) -> None:
    for number, (g, arrays) in enumerate(cases(dtype, seed)):
        dy, x = arrays.normal(g.n, *g.extent, g.c), arrays.normal(g.n, *g.extent, g.c)
        x *= (1, 3, 0.3)[number % 3]
        x[np.abs(x) < 1e-3] = 0.5  # not at the kink
        out = arrays.out(*x.shape)
        backend.activate_dx(kind, dy, x, out, SLOPE)
        h, at = 1e-4, x.astype(float)
        ends = [activation(kind, at + k * h) for k in (-2, -1, 1, 2)]
        slope = (ends[0] - 8 * ends[1] + 8 * ends[2] - ends[3]) / (12 * h)
        np.testing.assert_allclose(out, dy * slope, atol=1e-10 + 100 * float(np.finfo(dtype).eps))


@pytest.mark.parametrize(
    ("kind", "far_below", "far_above", "slope_below", "slope_above", "slope_at_0"),
    [
        ("leaky_relu", -np.inf, np.inf, SLOPE, 1, SLOPE),
        ("gelu", 0, np.inf, 0, 1, 0.5),
        ("silu", 0, np.inf, 0, 1, 0.5),
        ("sigmoid", 0, 1, 0, 0, 0.25),
        ("tanh", -1, 1, 0, 0, 1),
        ("softplus", 0, np.inf, 0, 1, 0.5),
    ],
)
def test_activation_limits(
    backend: Backend,
    dtype: np.dtype,
    kind: str,
    far_below: float,
    far_above: float,
    slope_below: float,
    slope_above: float,
    slope_at_0: float,
) -> None:
    largest = np.finfo(dtype).max
    x = np.array([-np.inf, np.inf, np.nan, 0.0, -largest, largest, -1e4, 1e4], dtype)
    y, dx = np.empty_like(x), np.empty_like(x)
    backend.activate(kind, x, y, SLOPE)
    backend.activate_dx(kind, np.ones_like(x), x, dx, SLOPE)
    np.testing.assert_array_equal(y[:3], np.array([far_below, far_above, np.nan], dtype))
    np.testing.assert_array_equal(y[4:], activation(kind, x[4:]).astype(dtype))
    np.testing.assert_array_equal(dx[[0, 1, 4, 5, 6, 7]], [slope_below, slope_above] * 3)
    np.testing.assert_allclose([y[3], dx[3]], [activation(kind, x[3]), slope_at_0], rtol=2 * np.finfo(dtype).eps)
    assert np.isnan(dx[2]) != (kind == "leaky_relu")


def test_unknown_kind_is_refused(backend: Backend) -> None:
    x = np.ones((1, 3))
    for call in (lambda: backend.activate("elu", x, x), lambda: backend.activate_dx("elu", x, x, x)):
        with pytest.raises(ValueError, match=f"activation 'elu'.*{', '.join(ACTIVATIONS)}"):
            call()
    for call in (
        lambda: backend.pointwise_loss("hinge", x, x, x[:, 0]),
        lambda: backend.pointwise_loss_dx("hinge", x, x, x[:, 0], x),
    ):
        with pytest.raises(ValueError, match=f"loss 'hinge'.*{', '.join(POINTWISE_LOSSES)}"):
            call()


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


def empty_calls(backend: Backend, dtype: np.dtype, without: str) -> dict[str, Callable[[], list[np.ndarray | None]]]:
    """Operations on arrays without samples, positions or channels; what each returns then holds zeros, if anything."""
    n, rows, c = (0 if without == what else size for what, size in (("samples", 2), ("positions", 5), ("channels", 3)))
    outputs = max(0, rows - 2)
    shapes = (n, rows, 4, c), (n, outputs, 3, c), (n, outputs, 3, 2), (3, 2, c, 2), (n, c), (c,), (n,)
    x, pooled, y, w, rest, vector, loss = (np.full(shape, 5, dtype) for shape in shapes)
    index, labels, taps = np.zeros(pooled.shape, np.int32), np.zeros(x.shape[:-1], np.int64), np.zeros((rows, 2), int)
    channel, sample, one = np.full((2, c), 5.0), np.full((2, n, 1, 1, 1), 5.0), np.ones((1, 1, 1, 1), dtype)
    nothing, factors, window = np.zeros((4, 0), dtype), np.ones(taps.shape, dtype), ((3, 2), (1, 1))
    return {
        "conv": lambda: [backend.conv(x, w, y, (1, 1), (1, 1)), y],
        "conv_dx": lambda: [backend.conv_dx(y, w, x, (1, 1), (1, 1)), x],
        "conv_dw": lambda: [backend.conv_dw(x, y, w, (1, 1), (1, 1)), w],
        "gemm": lambda: [backend.gemm(nothing, nothing, total := np.full((4, 4), 5, dtype), False, True), total],
        "bias": lambda: [backend.bias_add(x, vector), backend.bias_grad(x, vector), vector],
        "max_pool": lambda: [backend.max_pool(x, pooled, index, *window), pooled],
        "max_pool_dx": lambda: [backend.max_pool_dx(pooled, index, x, *window), x],
        "avg_pool": lambda: [backend.avg_pool(x, pooled, one, *window), pooled],
        "avg_pool_dx": lambda: [backend.avg_pool_dx(pooled, x, one, *window), x],
        "sum_positions": lambda: [backend.sum_positions(x, rest, 1.0), rest],
        "spread_positions": lambda: [backend.spread_positions(rest, x, 1.0), x],
        "resample": lambda: [backend.resample(x, x.copy(), 1, taps, factors)],
        "resample_dx": lambda: [
            backend.resample_dx(x, x.copy(), 1, taps, factors),
            backend.resample_dx(x[:, :0], x, 1, taps[:0], factors[:0]),
            x,
        ],
        "moments": lambda: [backend.moments(x, *channel), backend.moments(x, *sample), channel, sample],
        "normalize": lambda: [
            backend.normalize(x, *channel, vector, vector, x),
            backend.normalize(x, *sample, vector, vector, x),
            x,
        ],
        "normalize_grad": lambda: [
            backend.normalize_grad(x, x, *np.ones((2, c)), *channel),
            backend.normalize_grad(x, x, *np.ones((2, n, 1, 1, 1)), *sample),
            channel,
            sample,
        ],
        "normalize_dx": lambda: [
            backend.normalize_dx(x, x, *channel, vector, *channel, x),
            backend.normalize_dx(x, x, *sample, vector, *sample, x),
        ],
        "elementwise": lambda: [
            *(backend.add(x, x, x), backend.multiply(x, x, x), backend.relu(x, x), backend.relu_dx(x, x, x)),
            *(backend.activate("gelu", x, x), backend.activate_dx("gelu", x, x, x), x),
        ],
        "softmax": lambda: [backend.softmax(x, x), backend.softmax_dx(x, x, x), x],
        "cross_entropy": lambda: [backend.cross_entropy(x, labels, vector, 0.1, loss, x.copy()), loss],
        "cross_entropy_dx": lambda: [backend.cross_entropy_dx(x, labels, vector, 0.1, loss, x.copy())],
        "pointwise_loss": lambda: [backend.pointwise_loss("huber", x, x, loss), loss],
        "pointwise_loss_dx": lambda: [backend.pointwise_loss_dx("huber", x, x, loss, x)],
        "sgd_update": lambda: [backend.sgd_update(nothing[0], nothing[0], nothing[1], 0.1, 0.9, 0.0, True)],
    }


@pytest.mark.parametrize("without", ["samples", "positions", "channels"])
@pytest.mark.parametrize("call", sorted(empty_calls(backends.get("reference"), np.dtype("float32"), "samples")))
def test_empty_arrays(backend: Backend, dtype: np.dtype, call: str, without: str) -> None:
    results = [result for result in empty_calls(backend, dtype, without)[call]() if result is not None]
    assert all(np.all(result == 0) for result in results)


def test_convolution_without_filters(backend: Backend, dtype: np.dtype) -> None:
    x, w, y = np.full((2, 5, 3), 5, dtype), np.zeros((3, 3, 0), dtype), np.zeros((2, 3, 0), dtype)
    backend.conv(x, w, y, (1,), (1,))
    backend.conv_dw(x, y, w, (1,), (1,))
    backend.conv_dx(y, w, x, (1,), (1,))
    assert np.array_equal(x, np.zeros((2, 5, 3)))


def test_sum_positions_of_no_positions_is_zero(backend: Backend, dtype: np.dtype) -> None:
    out = np.full((2, 3), 5, dtype)
    backend.sum_positions(np.zeros((2, 0, 4, 3), dtype), out, 1.0)
    assert np.array_equal(out, np.zeros((2, 3)))


def test_describe_is_one_line_that_begins_with_the_name(backend: Backend) -> None:
    line = backend.describe()
    assert line.startswith(f"{backend.name}: ")
    assert "\n" not in line
    assert set(backend.dtypes) >= {"float32", "float64"}
