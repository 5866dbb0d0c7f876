"""Elementwise operations, pooling and normalization of bf16 arrays by the compiled backend.

Compared with the same operations of `reference` in float64 on the same, already rounded inputs: what is computed in
float32 and then rounded to bf16 differs by half a unit in bf16's last place, and a little of float32.
"""

from __future__ import annotations

import os
from math import prod

import numpy as np
import pytest
from cases import Arrays, cases

from hpctrain.backends.base import ACTIVATIONS
from hpctrain.backends.native import Native
from hpctrain.backends.reference import Reference
from hpctrain.precision import BF16

pytestmark = pytest.mark.skipif(
    os.environ.get("HPCTRAIN_NATIVE") == "0", reason="HPCTRAIN_NATIVE=0: installed without compiled kernels"
)

HALF, SINGLE = 2.0**-8, 2.0**-24
"""The relative error of rounding to bf16 (8 bits) and to float32 (24 bits)."""


@pytest.fixture
def native() -> Native:
    return Native()


class Halves:
    """Arrays of bf16, each with its copy in float64; strided ones lie inside a larger array that must not change."""

    def __init__(self, seed: int, strided: bool) -> None:
        self.arrays = Arrays(np.dtype("float32"), seed, strided)
        self.rng = self.arrays.rng
        self.surroundings: list[tuple[np.ndarray, np.ndarray]] = []

    def of(self, values: np.ndarray) -> np.ndarray:
        outer = np.full([n + 3 * self.arrays.strided for n in values.shape], 5, BF16)
        view = outer[tuple(slice(0, n) for n in values.shape)]
        with np.errstate(invalid="ignore"):
            view[...] = values.astype(BF16)
        self.surroundings.append((outer, view))
        return view

    def normal(self, *shape: int) -> np.ndarray:
        return self.of(self.rng.standard_normal(shape))

    def vector(self, count: int) -> np.ndarray:
        return self.rng.standard_normal(count).astype(np.float32)

    def check_surroundings(self) -> None:
        for outer, view in self.surroundings:
            view[...] = 5
            assert np.all(outer == 5)


def wide(*arrays: np.ndarray) -> list[np.ndarray]:
    return [a.astype(np.float64) for a in arrays]


def assert_rounded(got: np.ndarray, want: np.ndarray, terms: np.ndarray | float, length: int) -> None:
    """`want` rounded to bf16, after `length` roundings to float32 of numbers as large as `terms`."""
    single = length * SINGLE * np.asarray(terms)
    assert got.dtype == BF16
    excess = np.abs(got.astype(float) - want) - (
        HALF * (np.abs(want) + single) + single + 2.0**-134
    )  # of subnormal ones
    assert np.all(excess <= 0), f"{np.max(excess):.3g} over the bound"


def geometries(seed: int) -> list[tuple[tuple[int, ...], Halves]]:
    """Shapes of odd sizes, contiguous and strided, narrow and wide."""
    shapes = [(*(g.n, *g.extent, g.c),) for g, _ in cases(np.dtype("float32"), seed, wide=True)]
    return [(shape, Halves(seed + i, strided=i % 2 == 1)) for i, shape in enumerate(shapes)]


def test_elementwise_operations_round_once(native: Native, seed: int) -> None:
    """To float32 and then to bf16, as NumPy and ml_dtypes do."""
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3.3e38])
    for shape, halves in geometries(seed):
        a, b = (
            halves.of(np.where(halves.rng.random(shape) < 0.1, halves.rng.choice(special, shape), v))
            for v in halves.rng.standard_normal((2, *shape))
        )
        total, product, y, dx = (halves.of(np.zeros(shape)) for _ in range(4))
        native.add(a, b, total)
        native.multiply(a, b, product)
        native.relu(a, y)
        native.relu_dx(b, y, dx)
        with np.errstate(invalid="ignore", over="ignore"):
            np.testing.assert_array_equal(*wide(total, (a.astype(np.float32) + b.astype(np.float32)).astype(BF16)))
            np.testing.assert_array_equal(*wide(product, (a.astype(np.float32) * b.astype(np.float32)).astype(BF16)))
        np.testing.assert_array_equal(y.astype(float), np.maximum(a.astype(float), 0))
        np.testing.assert_array_equal(dx.astype(float), np.where(y.astype(float) > 0, b.astype(float), 0))
        native.activation_grad(b, y, 0.0)
        np.testing.assert_array_equal(*wide(b, dx))
        native.add(a, a, a)  # in place
        halves.check_surroundings()


def test_conversions_of_every_number(native: Native) -> None:
    """x * 1 and x + 0 are x for all 65536; sums that lie between two of them are rounded as ml_dtypes does."""
    every = np.arange(2**16, dtype=np.uint16).view(BF16)
    out, one, zero = np.empty_like(every), np.ones_like(every), np.zeros_like(every)
    with np.errstate(invalid="ignore", over="ignore"):
        native.multiply(every, one, out)
        np.testing.assert_array_equal(*wide(out, every))
        native.add(every, zero, out)
        np.testing.assert_array_equal(*wide(out, every))
        for step in (1, 3, 257, 4099):
            other = np.roll(every, step)
            native.add(every, other, out)
            want = (every.astype(np.float32) + other.astype(np.float32)).astype(BF16)
            np.testing.assert_array_equal(*wide(out, want))


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations(native: Native, seed: int, kind: str) -> None:
    for shape, halves in geometries(seed):
        x, dy, out, dx = halves.normal(*shape), halves.normal(*shape), halves.normal(*shape), halves.normal(*shape)
        native.activate(kind, x, out, 0.125)
        native.activate_dx(kind, dy, x, dx, 0.125)
        want, want_dx = np.empty((2, *shape))
        Reference().activate(kind, *wide(x), want, 0.125)
        Reference().activate_dx(kind, *wide(dy, x), want_dx, 0.125)
        assert_rounded(out, want, np.abs(want), 1)
        assert_rounded(dx, want_dx, np.abs(want_dx), 1)
        halves.check_surroundings()


@pytest.mark.parametrize("slope", [1.0, 0.0, 0.125])
@pytest.mark.parametrize("added", [False, True])
def test_normalization(native: Native, seed: int, slope: float, added: bool) -> None:
    for shape, halves in geometries(seed):
        x, add, dy, y, dx = (halves.normal(*shape) for _ in range(5))
        c = shape[-1]
        gamma, beta = halves.vector(c), halves.vector(c)
        mean, mean_g, mean_g_xhat = halves.rng.standard_normal((3, c))
        rstd, sums, want_sums = np.exp(halves.vector(c).astype(float)), np.empty((2, c)), np.empty((2, c))
        want, want_dx = np.empty((2, *shape))
        exact = wide(add)[0] if added else None
        native.normalize(x, mean, rstd, gamma, beta, y, add if added else None, slope)
        Reference().normalize(*wide(x), mean, rstd, *wide(gamma, beta), want, exact, slope)
        reach = (np.abs(wide(x)[0]) + np.abs(mean)) * rstd
        terms = reach * np.abs(gamma) + np.abs(beta) + (np.abs(exact) if exact is not None else 0.0)
        assert_rounded(y, want, terms, 8)

        masked, outer = wide(dy)[0], np.array(dy)
        Reference().activation_grad(masked, *wide(y), slope)
        native.normalize_grad(dy, x, mean, rstd, *sums, y, slope)
        assert_rounded(dy, masked, np.abs(masked), 1)
        Reference().normalize_grad(*wide(dy, x), mean, rstd, *want_sums)
        for got, exact_sum, size in zip(sums, want_sums, (1.0, reach), strict=True):
            magnitude = (np.abs(wide(dy)[0]) * size).reshape(-1, c).sum(axis=0)
            assert np.all(np.abs(got - exact_sum) <= 20 * SINGLE * magnitude)

        native.normalize_dx(dy, x, mean, rstd, gamma, mean_g, mean_g_xhat, dx)
        Reference().normalize_dx(*wide(dy, x), mean, rstd, *wide(gamma), mean_g, mean_g_xhat, want_dx)
        terms = rstd * (np.abs(gamma * wide(dy)[0]) + np.abs(mean_g) + reach * np.abs(mean_g_xhat))
        assert_rounded(dx, want_dx, terms, 8)

        bias, again = np.full(c, 77, np.float32), halves.of(wide(outer)[0])
        native.bias_grad(again, bias, y, slope)
        np.testing.assert_array_equal(*wide(again, dy))
        size = np.abs(wide(dy)[0]).reshape(-1, c).sum(axis=0)
        assert np.all(np.abs(bias - wide(dy)[0].reshape(-1, c).sum(axis=0)) <= 20 * SINGLE * size)
        native.bias_grad(dy, bias)
        assert np.all(np.abs(bias - wide(dy)[0].reshape(-1, c).sum(axis=0)) <= 20 * SINGLE * size)
        halves.check_surroundings()


def test_moments(native: Native, seed: int) -> None:
    """Differences, squares and the additions of a run of 16 round each term 18 times; see reduction.cpp for the 8."""
    for shape, halves in [*geometries(seed), ((3, 700, 5), Halves(seed, True)), ((2, 301, 130), Halves(seed, False))]:
        x = halves.of(halves.rng.standard_normal(shape) + 3)
        mean, m2 = np.zeros((2, shape[-1]))
        native.moments(x, mean, m2)
        flat = wide(x)[0].reshape(-1, shape[-1])
        assert np.all(np.abs(mean - flat.mean(axis=0)) <= 18 * SINGLE * np.ptp(flat) + 1e-14)
        np.testing.assert_allclose(m2, flat.var(axis=0) * len(flat), rtol=8 * 18 * SINGLE, atol=1e-14)
        halves.check_surroundings()


def test_bias_and_positions(native: Native, seed: int) -> None:
    for shape, halves in geometries(seed):
        x, dy = halves.normal(*shape), halves.normal(shape[0], shape[-1])
        sums, bias, before = halves.normal(shape[0], shape[-1]), halves.vector(shape[-1]), wide(x)[0]
        native.sum_positions(x, sums, 1 / 7)
        magnitude = np.abs(before).reshape(shape[0], -1, shape[-1]).sum(axis=1) / 7
        assert_rounded(sums, before.reshape(shape[0], -1, shape[-1]).sum(axis=1) / 7, magnitude, 20)
        native.bias_add(x, bias)
        assert_rounded(x, before + bias, np.abs(before) + np.abs(bias), 1)
        native.spread_positions(dy, x, 1 / 7)
        want = np.broadcast_to(wide(dy)[0].reshape(shape[0], *(1,) * (len(shape) - 2), -1) / 7, shape)
        assert_rounded(x, want, np.abs(want), 2)
        halves.check_surroundings()


def test_max_pool(native: Native, seed: int) -> None:
    """The same element wins; gradients are rounded at each of at most prod(kernel) additions."""
    for number, (g, _) in enumerate(cases(np.dtype("float32"), seed, wide=True)):
        halves = Halves(seed + number, strided=number % 2 == 1)
        values = halves.rng.integers(-2, 3, (g.n, *g.extent, g.c)).astype(float)
        values[halves.rng.random(values.shape) < 0.1] = -np.inf
        values[halves.rng.random(values.shape) < 0.02] = np.nan
        x, dy, dx = halves.of(values), halves.normal(g.n, *g.outputs, g.c), halves.normal(*values.shape)
        out, index = halves.normal(*dy.shape), np.empty(dy.shape, np.int32)
        want, want_index, want_dx, size = np.empty(dy.shape), np.empty_like(index), np.empty(x.shape), np.empty(x.shape)
        native.max_pool(x, out, index, g.kernel, g.stride, g.dilation)
        native.max_pool_dx(dy, index, dx, g.kernel, g.stride, g.dilation)
        Reference().max_pool(values, want, want_index, g.kernel, g.stride, g.dilation)
        np.testing.assert_array_equal(out.astype(float), want)
        np.testing.assert_array_equal(index, want_index)
        Reference().max_pool_dx(*wide(dy), index, want_dx, g.kernel, g.stride, g.dilation)
        Reference().max_pool_dx(np.abs(wide(dy)[0]), index, size, g.kernel, g.stride, g.dilation)
        assert np.all(np.abs(dx.astype(float) - want_dx) <= prod(g.kernel) * 1.01 * HALF * size)
        halves.check_surroundings()


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0), (1, 1, 1)])
def test_nothing_and_one_element(native: Native, shape: tuple[int, ...]) -> None:
    x, channels = np.full(shape, 3, BF16), shape[-1]
    statistics, bias = np.full((2, channels), 5.0), np.full(channels, 5, np.float32)
    native.moments(x, *statistics)
    native.bias_grad(x, bias, x, 0.0)
    one, vectors = np.ones((2, channels)), np.ones((2, channels), np.float32)
    native.normalize(x, *one, *vectors, x, x, 0.0)  # (3 - 1) + 1 + 3
    expected = 3.0 if x.size else 0.0
    assert np.all(statistics[0] == expected)
    assert np.all(statistics[1] == 0)
    assert np.all(bias == expected)
    assert np.all(x == 6)


def test_vectors_beside_bf16_are_float32(native: Native) -> None:
    x, statistics, vector = np.zeros((3, 2), BF16), np.ones((2, 2)), np.zeros(2, BF16)
    with pytest.raises(TypeError, match=r"normalize: .*vectors beside bf16 float32.*got uint16, float64"):
        native.normalize(x, *statistics, vector, vector, x)
    with pytest.raises(TypeError, match=r"add: .*one type.*got uint16, float32, uint16"):
        native.add(x, x.astype(np.float32), x)
