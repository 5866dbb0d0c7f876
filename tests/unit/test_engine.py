"""Direct convolution and matrix products of the engine on every instruction set, against `reference` in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import numpy as np
import pytest
from cases import Arrays, Geometry, assert_close, geometries, printed_floats

from hpctrain.backends.reference import Reference

if os.environ.get("HPCTRAIN_NATIVE") == "0":
    pytest.skip("HPCTRAIN_NATIVE=0: installed without compiled kernels", allow_module_level=True)

import hpctrain._native as kernels

FLOAT = np.dtype(np.float32)
EXACT = Reference()


@pytest.fixture(params=kernels.isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this machine has, in turn."""
    kernels.select_isa(request.param)
    assert kernels.isa() == request.param
    yield request.param
    kernels.select_isa("")


def magnitude(compute: Callable[..., None], a: np.ndarray, b: np.ndarray, like: np.ndarray, *rest: Any) -> np.ndarray:
    """The sum of |terms| of each element of `like`, in float64."""
    out = np.empty(like.shape)
    compute(np.abs(a).astype(float), np.abs(b).astype(float), out, *rest)
    return out


def check(g: Geometry, arrays: Arrays) -> None:
    """The three passes of a convolution against `reference`."""
    x, dy = arrays.normal(g.n, *g.extent, g.c), arrays.normal(g.n, *g.outputs, g.k)
    w, geometry = arrays.normal(*g.kernel, g.c // g.groups, g.k), (g.stride, g.dilation, g.groups)
    passes = (
        (kernels.conv, EXACT.conv, x, w, dy, prod(w.shape[:-1])),
        (kernels.conv_dx, EXACT.conv_dx, dy, w, x, prod(g.kernel) * g.k // g.groups),
        (kernels.conv_dw, EXACT.conv_dw, x, dy, w, g.n * prod(g.outputs)),
    )
    for compute, exactly, a, b, like, length in passes:
        out, want = arrays.out(*like.shape), np.empty(like.shape)
        compute(a, b, out, *geometry, exact=True)
        exactly(a.astype(float), b.astype(float), want, *geometry)
        assert_close(out, want, magnitude(exactly, a, b, like, *geometry), FLOAT, length)
    arrays.check_surroundings()


def conv(channels: int, filters: int, groups: int = 1, n: int = 2, **more: Any) -> Geometry:
    """A 2D convolution, 3 x 3 on 6 x 7 unless `more` says otherwise."""
    shape = {"extent": (6, 7), "kernel": (3, 3), "stride": (1, 1), "dilation": (1, 1)} | more
    return Geometry(n, c=channels * groups, k=filters * groups, groups=groups, **shape)


@pytest.mark.parametrize("strided", [False, True])
def test_any_number_of_channels(seed: int, strided: bool) -> None:
    rng = np.random.default_rng(seed)
    for number, channels in enumerate([*range(1, 20), 31, 32, 33, 47, 48, 49, 63, 64, 65, 70]):
        filters = int(rng.integers(1, 71))
        check(conv(channels, filters), Arrays(FLOAT, seed + number, strided))
        check(conv(filters, channels, stride=(2, 2)), Arrays(FLOAT, seed + number, strided))


@pytest.mark.parametrize(
    "g",
    [
        conv(300, 5),  # sums of several blocks of terms
        conv(5, 300, extent=(4, 4)),
        conv(130, 140, n=60, extent=(3, 3)),  # outputs (1, 1): positions are the samples
        conv(9, 10, groups=3, extent=(9, 8), kernel=(3, 2), dilation=(2, 3)),
        conv(1, 3, groups=7),
        conv(2, 1, groups=5),
        *(conv(1, 1, groups, stride=(1, 2), dilation=(2, 1)) for groups in (2, 15, 16, 17, 100)),
        conv(3, 4, extent=(17, 19), kernel=(2, 3), stride=(5, 4)),  # inputs that no window touches
        conv(3, 4, extent=(17, 19), kernel=(2, 3), stride=(3, 4), dilation=(4, 5)),
        conv(3, 20, extent=(21, 21), kernel=(11, 11), stride=(4, 4)),
        conv(6, 7, extent=(3, 700), kernel=(1, 1)),  # more than a chunk of positions
        conv(6, 7, extent=(3, 700), kernel=(3, 5), stride=(1, 3)),
        Geometry(3, (29,), 5, 6, (4,), (2,), (3,)),
        Geometry(1, (40,), 70, 33, (3,), (1,), (1,)),
        Geometry(2, (5, 6, 7), 4, 33, (3, 3, 3), (1, 1, 1), (1, 1, 1)),
        Geometry(2, (6, 7, 9), 20, 6, (2, 3, 2), (2, 1, 2), (1, 2, 3), 2),
        Geometry(1, (5, 6, 7), 19, 19, (3, 2, 1), (1, 2, 3), (1, 1, 1), 19),
        Geometry(1, (4, 1, 1), 2, 3, (2, 1, 1), (1, 1, 1), (1, 1, 1)),
    ],
)
def test_geometries(g: Geometry, seed: int) -> None:
    for strided in (False, True):
        check(g, Arrays(FLOAT, seed, strided))


def test_random_geometries(seed: int) -> None:
    for number, g in enumerate(geometries(seed, wide=True, grouped=True)):
        check(g, Arrays(FLOAT, seed + number, strided=number % 2 == 0))


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_empty_arrays_and_sums_of_nothing(groups: int) -> None:
    ones, some = (1, 1), 8
    for n, channels, filters, extent in ((0, some, some, 5), (2, 0, some, 5), (2, some, 0, 5), (2, some, some, 2)):
        g = Geometry(n, (extent, 5), channels, filters, (3, 3), ones, ones, groups)
        x, w = np.ones((n, extent, 5, channels), np.float32), np.ones((3, 3, channels // groups, filters), np.float32)
        dy = np.ones((n, max(0, g.outputs[0]), 3, filters), np.float32)
        kernels.conv(x, w, dy, ones, ones, groups)
        kernels.conv_dx(dy, w, x, ones, ones, groups)
        kernels.conv_dw(x, dy, w, ones, ones, groups)
        assert not np.any(dy)
        assert not np.any(x)
        assert not np.any(w)


def test_nan_and_infinity_reach_just_what_reads_them() -> None:
    ones = (1, 1)
    for groups, channels in ((1, 20), (20, 1)):
        x, w = np.ones((1, 9, 8, 20), np.float32), np.ones((3, 3, channels, 20), np.float32)
        x[0, 4, 4, 7], x[0, 0, 0, 3] = np.nan, np.inf
        y, dx, dw = np.empty((1, 7, 6, 20), np.float32), np.empty_like(x), np.empty_like(w)
        kernels.conv(x, w, y, ones, ones, groups, exact=True)
        filters = slice(None) if groups == 1 else 7
        reached = np.zeros(y.shape, bool)
        reached[0, 2:5, 2:5, filters] = True
        assert np.array_equal(np.isnan(y), reached)
        assert np.all(np.isinf(y[0, 0, 0, slice(None) if groups == 1 else 3]))
        dy = np.ones_like(y)
        dy[0, 3, 3, 7] = np.nan
        kernels.conv_dx(dy, w, dx, ones, ones, groups, exact=True)
        reached = np.zeros(x.shape, bool)
        reached[0, 3:6, 3:6, filters] = True
        assert np.array_equal(np.isnan(dx), reached)
        kernels.conv_dw(np.ones_like(x), dy, dw, ones, ones, groups, exact=True)
        assert np.array_equal(np.unique(np.argwhere(np.isnan(dw))[:, 3]), [7])
        assert np.all(np.isnan(dw[..., 7]))


def test_bias_and_accumulate(seed: int) -> None:
    arrays = Arrays(FLOAT, seed, strided=True)
    for g in (conv(5, 37), conv(300, 6), conv(4, 5, groups=3), conv(1, 1, groups=21)):
        x, w, b = arrays.normal(g.n, *g.extent, g.c), arrays.normal(*g.kernel, g.c // g.groups, g.k), arrays.normal(g.k)
        before, plain = arrays.normal(g.n, *g.outputs, g.k), arrays.out(g.n, *g.outputs, g.k)
        kernels.conv(x, w, plain, g.stride, g.dilation, g.groups, exact=True)
        for bias, accumulate in ((b, False), (None, True), (b, True)):
            out = arrays.of(before)
            kernels.conv(x, w, out, g.stride, g.dilation, g.groups, bias, accumulate, exact=True)
            want = plain.astype(float) + (0 if bias is None else b) + (before if accumulate else 0)
            np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5 * np.abs(plain).max())
    arrays.check_surroundings()


@pytest.mark.parametrize("slope", [0.0, 0.25, 1.5])
def test_activation_after_the_bias(seed: int, slope: float) -> None:
    """The same bits as bias and activation one after the other."""
    arrays = Arrays(FLOAT, seed, strided=True)
    for g in (conv(5, 37), conv(300, 6), conv(64, 64, extent=(9, 10)), conv(4, 5, groups=3), conv(1, 1, groups=21)):
        x, w, b = arrays.normal(g.n, *g.extent, g.c), arrays.normal(*g.kernel, g.c // g.groups, g.k), arrays.normal(g.k)
        for exact, bias in ((True, b), (False, b), (True, None)):
            plain, out = (arrays.out(g.n, *g.outputs, g.k) for _ in range(2))
            kernels.conv(x, w, plain, g.stride, g.dilation, g.groups, bias, exact=exact)
            kernels.conv(x, w, out, g.stride, g.dilation, g.groups, bias, exact=exact, slope=slope)
            assert np.array_equal(out, np.where(plain > 0, plain, FLOAT.type(slope) * plain))
    for m, n, k in MATRICES:
        a, b, bias = arrays.normal(m, k), arrays.normal(k, n), arrays.normal(n)
        plain, out = arrays.out(m, n), arrays.out(m, n)
        for right in (b, b.T.copy().T):
            kernels.gemm(a, right, plain, bias=bias)
            kernels.gemm(a, right, out, bias=bias, slope=slope)
            assert np.array_equal(out, np.where(plain > 0, plain, FLOAT.type(slope) * plain))
    arrays.check_surroundings()


@pytest.mark.parametrize("exact", [True, False])
def test_relu_keeps_nan_and_takes_minus_infinity_to_0(exact: bool) -> None:
    x, w, bias = np.ones((1, 6, 6, 64), np.float32), np.zeros((3, 3, 64, 64), np.float32), np.zeros(64, np.float32)
    w[1, 1], bias[:4] = np.eye(64), (np.nan, -np.inf, np.inf, -3)
    y, product = np.empty((1, 4, 4, 64), np.float32), np.empty((6, 64), np.float32)
    kernels.conv(x, w, y, (1, 1), (1, 1), bias=bias, exact=exact, slope=0.0)
    kernels.gemm(x[0, 0], w[1, 1], product, bias=bias, slope=0.0)
    for row in (y[0, 1, 2], product[5]):
        np.testing.assert_allclose(row[:5], [np.nan, 0, np.inf, 0, 1], atol=1e-5)


MATRICES = [
    *((m, n, k) for m in (1, 5, 6, 7, 33) for n, k in ((1, 1), (15, 70), (65, 3))),
    *((250, 19, 900), (3, 50, 0), (4, 700, 900), (33, 1000, 270), (200, 1400, 200), (190, 185, 1500)),
]


@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_matrix_products(seed: int, transpose_a: bool, transpose_b: bool, strided: bool) -> None:
    arrays = Arrays(FLOAT, seed, strided)
    for m, n, k in MATRICES:
        a, b = (
            arrays.normal(*shape)
            for shape in ((m, k)[:: -1 if transpose_a else 1], (k, n)[:: -1 if transpose_b else 1])
        )
        left, right = a.T if transpose_a else a, b.T if transpose_b else b
        bias, before = arrays.normal(n), arrays.normal(m, n)
        out, more = arrays.out(m, n), arrays.of(before.copy())
        kernels.gemm(a, b, out, transpose_a, transpose_b)
        kernels.gemm(left, right, more, bias=bias, accumulate=True)
        want, size = left.astype(float) @ right, np.abs(left).astype(float) @ np.abs(right)
        assert_close(out, want, size, FLOAT, k)
        assert_close(more, want + bias + before, size + np.abs(bias) + np.abs(before), FLOAT, k + 2)
    arrays.check_surroundings()


THREADS = """
import sys
import numpy as np
import hpctrain._native as kernels

kernels.select_isa(sys.argv[1])
rng, ones = np.random.default_rng(3), (1, 1)


def thrice(compute, shape):
    results = [np.empty(shape, np.float32) for _ in range(3)]
    for out in results:
        compute(out)
        assert out.tobytes() == results[0].tobytes()
    sys.stdout.buffer.write(out.tobytes())


for n, extent, c, k, groups in ((3, 13, 40, 70, 1), (40, 20, 1, 6, 1), (1, 9, 30, 30, 30), (1, 4, 8, 300, 2)):
    x, w, dy = (rng.standard_normal(shape, np.float32) for shape in
                ((n, extent, extent, c), (3, 3, c // groups, k), (n, extent - 2, extent - 2, k)))
    thrice(lambda out: kernels.conv(x, w, out, ones, ones, groups, exact=True), dy.shape)
    thrice(lambda out: kernels.conv_dx(dy, w, out, ones, ones, groups, exact=True), x.shape)
    thrice(lambda out: kernels.conv_dw(x, dy, out, ones, ones, groups, exact=True), w.shape)
a, b = rng.standard_normal((40, 900), np.float32), rng.standard_normal((900, 1000), np.float32)
for left, right in ((a, b), (a, b.T.copy().T), (b.T, a.T), (a[:, :40].T, a)):
    thrice(lambda out: kernels.gemm(left, right, out), (left.shape[0], right.shape[1]))
"""


def test_threads(isa: str) -> None:
    """The same bits every time with a fixed number of threads; with another number the same but for rounding."""
    found = [printed_floats(THREADS, isa, threads) for threads in (1, 2, 5, 5)]
    assert found[0].size > 100_000
    assert found[2].tobytes() == found[3].tobytes()
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-4, atol=1e-3)


def test_instruction_set_by_environment(isa: str) -> None:
    command = [sys.executable, "-c", "from hpctrain import backends; print(backends.get('native').describe())"]
    done = subprocess.run(command, env=os.environ | {"HPCTRAIN_ISA": isa}, capture_output=True, text=True, check=True)
    assert f"convolution with {isa};" in done.stdout


def test_unknown_instruction_set_is_refused_with_the_choices() -> None:
    command = [sys.executable, "-c", "from hpctrain import backends; backends.get('native')"]
    done = subprocess.run(
        command, env=os.environ | {"HPCTRAIN_ISA": "mmx"}, capture_output=True, text=True, check=False
    )
    last = done.stderr.splitlines()[-1]
    assert "BackendUnavailable: backend 'native': HPCTRAIN_ISA 'mmx'" in last
    assert all(name in last for name in kernels.isas())
    with pytest.raises(ValueError, match=r"select_isa 'mmx' .*choose one of .*portable"):
        kernels.select_isa("mmx")


X, W = np.ones((2, 6, 7, 4), np.float32), np.ones((3, 3, 4, 5), np.float32)
Y = np.ones((2, 4, 5, 5), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: kernels.conv(X, W, Y.astype(float), (1, 1), (1, 1)), TypeError, r"conv: takes float32 .*float64"),
        (
            lambda: kernels.conv(X, W, Y[:1], (1, 1), (1, 1)),
            ValueError,
            r"conv: weights \(3, 3, 4, 5\) over \(2, 6, 7, 4\)",
        ),
        (lambda: kernels.conv(X, W, Y, (1,), (1,)), ValueError, r"conv: .*one number per position dim"),
        (lambda: kernels.conv(X, W, Y, (1, 0), (1, 1)), ValueError, r"conv: .*start at 1"),
        (lambda: kernels.conv(X, W, Y, (1, 1), (1, 1), 3), ValueError, r"4 channels and 5 filters .* 3 equal groups"),
        (lambda: kernels.conv(X[..., ::2], W, Y, (1, 1), (1, 1)), ValueError, r"conv: channels must be contiguous"),
        (lambda: kernels.conv(X, W, Y, (1, 1), (1, 1), bias=X[0, 0, 0]), ValueError, r"conv: bias .* of 5 numbers"),
        (lambda: kernels.conv_dx(Y, W[1:], X, (1, 1), (1, 1)), ValueError, r"conv_dx: weights \(2, 3, 4, 5\)"),
        (lambda: kernels.conv_dw(X, Y, W[..., :4], (1, 1), (1, 1)), ValueError, r"conv_dw: weights .*do not give"),
        (lambda: kernels.gemm(X[0, 0], X[0, 0], X[0, 0]), ValueError, r"gemm: \(7, 4\) times \(7, 4\) does not give"),
        (lambda: kernels.gemm(X[0, 0], X[0, 0], X[0], True), ValueError, r"gemm: \(7, 4\) transposed times"),
        (lambda: kernels.gemm(X[0], X[0, 0], X[0, 0]), ValueError, r"gemm: matrices are needed"),
        (
            lambda: kernels.gemm(X[0, ::2, ::2, 0], X[0, 0], X[0, 0]),
            ValueError,
            r"gemm: rows or columns .*ascontiguous",
        ),
    ],
)
def test_unfit_arrays(call: Callable[[], None], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
