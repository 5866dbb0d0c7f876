"""Convolution and matrix products of bfloat16 on every instruction set, against `reference` in float64."""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
import pytest
from cases import Arrays, Geometry, geometries, printed_floats, tolerance

from hpctrain.backends.reference import Reference
from hpctrain.backends.rounding import to_bfloat16
from hpctrain.precision import BF16

if os.environ.get("HPCTRAIN_NATIVE") == "0":
    pytest.skip("HPCTRAIN_NATIVE=0: installed without compiled kernels", allow_module_level=True)

import hpctrain._native as kernels

from hpctrain.backends.native import Native

FLOAT = np.dtype(np.float32)
EXACT = Reference()
UNIT = 2.0**-8
"""Rounding to bfloat16 changes a number by this fraction of it at most."""
WINOGRAD = 1e-5
"""max|error| / max|result| of Winograd's convolution in float32, which its own tests hold."""


@pytest.fixture(params=kernels.isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this machine has, in turn."""
    kernels.select_isa(request.param)
    yield request.param
    kernels.select_isa("")


def assert_close(got: np.ndarray, want: np.ndarray, magnitude: Any, length: int, winograd: bool = False) -> None:
    """The error of summing in float32, and where the result is bfloat16 that of rounding it once."""
    summed = tolerance(FLOAT, length) * np.asarray(magnitude)
    if winograd:
        summed = np.maximum(summed, WINOGRAD * np.abs(want).max(initial=0))
    bound = summed + (UNIT * (np.abs(want) + summed) if got.dtype == BF16 else 0)
    wrong = np.abs(got.astype(float) - want)
    assert got.shape == want.shape
    assert np.all(wrong <= bound), f"{(wrong - bound).max():.3g} over the bound, shape {got.shape}"
    assert wrong.max(initial=0) <= 2e-2 * np.abs(want).max(initial=0)


def check(g: Geometry, arrays: Arrays, exact: bool = True) -> None:
    """The three passes of a convolution against `reference`."""
    x, dy = arrays.normal(g.n, *g.extent, g.c), arrays.normal(g.n, *g.outputs, g.k)
    w, geometry = arrays.normal(*g.kernel, g.c // g.groups, g.k), (g.stride, g.dilation, g.groups)
    native = Native(exact)
    passes = (
        (native.conv, EXACT.conv, x, w, dy, prod(w.shape[:-1]), BF16),
        (native.conv_dx, EXACT.conv_dx, dy, w, x, prod(g.kernel) * g.k // g.groups, BF16),
        (native.conv_dw, EXACT.conv_dw, x, dy, w, g.n * prod(g.outputs), FLOAT),
    )
    for compute, exactly, a, b, like, length, dtype in passes:
        out, want, size = arrays.out(*like.shape, dtype=dtype), np.empty(like.shape), np.empty(like.shape)
        compute(a, b, out, *geometry)
        exactly(a.astype(float), b.astype(float), want, *geometry)
        exactly(np.abs(a.astype(float)), np.abs(b.astype(float)), size, *geometry)
        assert_close(out, want, size, length, not exact)
    arrays.check_surroundings()


def conv(channels: int, filters: int, groups: int = 1, n: int = 2, **more: Any) -> Geometry:
    """A 2D convolution, 3 x 3 on 6 x 7 unless `more` says otherwise."""
    shape = {"extent": (6, 7), "kernel": (3, 3), "stride": (1, 1), "dilation": (1, 1)} | more
    return Geometry(n, c=channels * groups, k=filters * groups, groups=groups, **shape)


@pytest.mark.parametrize("strided", [False, True])
def test_any_number_of_channels(seed: int, strided: bool) -> None:
    rng = np.random.default_rng(seed)
    for number, channels in enumerate([*range(1, 20), 31, 32, 33, 64, 65, 70]):
        filters = int(rng.integers(1, 71))
        check(conv(channels, filters, n=1 + number % 3), Arrays(BF16, seed + number, strided))
        check(conv(filters, channels, stride=(2, 2)), Arrays(BF16, seed + number, strided))


@pytest.mark.parametrize(
    "g",
    [
        conv(300, 6),
        conv(6, 300, extent=(4, 4)),
        conv(130, 140, n=60, extent=(3, 3)),
        conv(9, 10, groups=3, extent=(9, 8), kernel=(3, 2), dilation=(2, 3)),
        conv(2, 4, groups=3, stride=(2, 2)),
        conv(1, 3, groups=7),
        *(conv(1, 1, groups, stride=(1, 2), dilation=(2, 1)) for groups in (2, 15, 16, 17, 100)),
        conv(3, 4, extent=(17, 19), kernel=(2, 3), stride=(5, 4)),  # inputs that no window touches
        conv(3, 4, extent=(17, 19), kernel=(2, 3), stride=(3, 4), dilation=(4, 5)),
        conv(3, 20, extent=(21, 21), kernel=(11, 11), stride=(4, 4)),
        conv(6, 7, extent=(3, 700), kernel=(3, 5), stride=(1, 3)),
        conv(64, 64, n=1, extent=(150, 61), kernel=(3, 3), stride=(2, 1)),  # more than a part
        conv(70, 34, n=1, extent=(171, 31), kernel=(2, 1), stride=(5, 1)),
        conv(16, 16, n=40, extent=(33, 31), kernel=(1, 1), stride=(2, 2)),
        Geometry(3, (29,), 5, 6, (4,), (2,), (3,)),
        Geometry(1, (40,), 70, 33, (3,), (1,), (1,)),
        Geometry(1, (20000,), 20, 32, (3,), (2,), (1,)),
        Geometry(2, (5, 6, 7), 4, 33, (3, 3, 3), (1, 1, 1), (1, 1, 1)),
        Geometry(1, (50, 26, 27), 8, 18, (3, 3, 3), (2, 2, 2), (1, 1, 1)),
        Geometry(2, (6, 7, 9), 20, 6, (2, 3, 2), (2, 1, 2), (1, 2, 3), 2),
        Geometry(1, (5, 6, 7), 19, 19, (3, 2, 1), (1, 2, 3), (1, 1, 1), 19),
    ],
)
def test_geometries(g: Geometry, seed: int) -> None:
    for strided in (False, True):
        check(g, Arrays(BF16, seed, strided))


@pytest.mark.parametrize(
    "g",
    [
        conv(64, 70, n=3, extent=(18, 21)),
        conv(33, 40, n=1, extent=(170, 60)),  # more than a part
        conv(64, 64, n=30, extent=(14, 14)),
        conv(20, 32, n=2, extent=(19, 18), kernel=(5, 5)),
        Geometry(1, (40, 22, 23), 16, 32, (3, 3, 3), (1, 1, 1), (1, 1, 1)),
        # outputs of whole tiles and a little more
        conv(128, 130, n=9, extent=(15, 15)),
        conv(128, 128, n=9, extent=(15, 10)),
        conv(66, 128, n=9, extent=(10, 15), groups=2),
    ],
)
def test_winograd(g: Geometry, seed: int) -> None:
    for strided in (False, True):
        check(g, Arrays(BF16, seed, strided), exact=False)


def test_random_geometries(seed: int) -> None:
    for number, g in enumerate(geometries(seed, wide=True, grouped=True)):
        check(g, Arrays(BF16, seed + number, strided=number % 2 == 0))


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_empty_arrays_and_sums_of_nothing(groups: int) -> None:
    ones, some, native = (1, 1), 8, Native()
    for n, channels, filters, extent in ((0, some, some, 5), (2, 0, some, 5), (2, some, 0, 5), (2, some, some, 2)):
        g = Geometry(n, (extent, 5), channels, filters, (3, 3), ones, ones, groups)
        x, w = np.ones((n, extent, 5, channels), BF16), np.ones((3, 3, channels // groups, filters), BF16)
        dy, dw = np.ones((n, max(0, g.outputs[0]), 3, filters), BF16), np.ones(w.shape, FLOAT)
        native.conv(x, w, dy, ones, ones, groups)
        native.conv_dx(dy, w, x, ones, ones, groups)
        native.conv_dw(x, dy, dw, ones, ones, groups)
        assert not np.any(dy.astype(FLOAT))
        assert not np.any(x.astype(FLOAT))
        assert not np.any(dw)


@pytest.mark.parametrize("exact", [True, False])
def test_bias_and_activation(seed: int, exact: bool) -> None:
    arrays, native = Arrays(BF16, seed, strided=True), Native(exact)
    for g in (conv(6, 37), conv(300, 6), conv(64, 64, extent=(9, 11)), conv(4, 5, groups=3), conv(1, 1, groups=21)):
        x, w = arrays.normal(g.n, *g.extent, g.c), arrays.normal(*g.kernel, g.c // g.groups, g.k)
        bias, want = arrays.normal(g.k).astype(FLOAT), np.empty((g.n, *g.outputs, g.k))
        EXACT.conv(x.astype(float), w.astype(float), want, g.stride, g.dilation, g.groups)
        want += bias
        for slope in (0.0, 0.1):
            out = arrays.out(*want.shape)
            native.conv(x, w, out, g.stride, g.dilation, g.groups, bias, slope)
            expected = np.where(want > 0, want, slope * want)
            np.testing.assert_allclose(out.astype(float), expected, rtol=UNIT, atol=1e-5 * np.abs(want).max())
    arrays.check_surroundings()


MATRICES = [
    *((m, n, k) for m in (1, 5, 6, 7, 33) for n, k in ((1, 1), (15, 70), (66, 4))),
    *((250, 19, 900), (3, 50, 0), (4, 700, 900), (33, 1000, 2070), (200, 1400, 200), (190, 185, 1501)),
]


@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_matrix_products(seed: int, transpose_a: bool, transpose_b: bool, strided: bool) -> None:
    arrays, native = Arrays(BF16, seed, strided), Native()
    for m, n, k in MATRICES:
        a, b = (
            arrays.normal(*shape)
            for shape in ((m, k)[:: -1 if transpose_a else 1], (k, n)[:: -1 if transpose_b else 1])
        )
        left, right = (t.astype(float) for t in (a.T if transpose_a else a, b.T if transpose_b else b))
        bias, want, size = arrays.normal(n).astype(FLOAT), left @ right, np.abs(left) @ np.abs(right)
        for dtype in (BF16, FLOAT):
            out, finished = (arrays.out(m, n, dtype=dtype) for _ in range(2))
            native.gemm(a, b, out, transpose_a, transpose_b)
            assert_close(out, want, size, k)
            native.gemm(a, b, finished, transpose_a, transpose_b, bias, 0.0)
            summed = want + bias
            assert_close(
                finished, np.maximum(summed, 0), np.where(summed > -1e-3 * size, size + np.abs(bias), 0), k + 1
            )
    arrays.check_surroundings()


def test_casts() -> None:
    """Every bfloat16 there and back; floats like NumPy rounds them, on ties and at the ends of the range too."""
    native, every = Native(), np.arange(1 << 16, dtype=np.uint16).view(BF16)
    floats, back = np.empty(every.shape, FLOAT), np.zeros(every.shape, BF16)
    native.widen(every, floats)
    np.testing.assert_array_equal(floats, every.astype(FLOAT))
    native.narrow(floats, back)
    numbers = ~np.isnan(floats)
    assert np.array_equal(back.view(np.uint16)[numbers], every.view(np.uint16)[numbers])
    assert np.isnan(back.astype(FLOAT)[~numbers]).all()
    for low in (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):  # below, at, and above ties
        bits = (np.arange(1 << 16, dtype=np.uint32) << 16) | np.uint32(low)
        given = bits.view(FLOAT)
        for n in (given.size, 5, 1, 0):
            out = np.zeros(n, BF16)
            native.narrow(given[:n], out)
            want = to_bfloat16(given[:n])
            assert np.array_equal(np.isnan(out.astype(FLOAT)), np.isnan(given[:n]))
            same = out.view(np.uint16) == want.view(np.uint16)
            assert np.all(same | np.isnan(given[:n]))


def test_nan_and_infinity_reach_just_what_reads_them() -> None:
    ones, native = (1, 1), Native(exact=True)
    x, w = np.ones((1, 9, 8, 20), BF16), np.ones((3, 3, 20, 20), BF16)
    x[0, 4, 4, 7], x[0, 0, 0, 3] = np.nan, np.inf
    y, dx, dw = np.empty((1, 7, 6, 20), BF16), np.empty_like(x), np.empty(w.shape, FLOAT)
    native.conv(x, w, y, ones, ones)
    reached = np.zeros(y.shape, bool)
    reached[0, 2:5, 2:5] = True
    assert np.array_equal(np.isnan(y.astype(FLOAT)), reached)
    assert np.all(np.isinf(y[0, 0, 0].astype(FLOAT)))
    dy = np.ones_like(y)
    dy[0, 3, 3, 7] = np.nan
    native.conv_dx(dy, w, dx, ones, ones)
    reached = np.zeros(x.shape, bool)
    reached[0, 3:6, 3:6] = True
    assert np.array_equal(np.isnan(dx.astype(FLOAT)), reached)
    native.conv_dw(np.ones_like(x), dy, dw, ones, ones)
    assert np.array_equal(np.unique(np.argwhere(np.isnan(dw))[:, 3]), [7])


THREADS = """
import sys
import numpy as np
from hpctrain.backends.native import Native
from hpctrain.precision import BF16
import hpctrain._native as kernels

kernels.select_isa(sys.argv[1])
rng, native = np.random.default_rng(3), Native()


def thrice(compute, shape, dtype=BF16):
    results = [np.empty(shape, dtype) for _ in range(3)]
    for out in results:
        compute(out)
        assert out.tobytes() == results[0].tobytes()
    sys.stdout.buffer.write(out.astype(np.float32).tobytes())


def normal(*shape):
    return rng.standard_normal(shape).astype(BF16)


for n, extent, c, k, groups, step in ((3, 13, 40, 70, 1, 1), (40, 20, 4, 6, 1, 1), (1, 9, 30, 30, 30, 2),
                                      (1, 4, 8, 300, 2, 1), (2, 33, 64, 64, 1, 2)):
    ones, steps, outputs = (1, 1), (step, step), (extent - 3) // step + 1
    x, w, dy = normal(n, extent, extent, c), normal(3, 3, c // groups, k), normal(n, outputs, outputs, k)
    thrice(lambda out: native.conv(x, w, out, steps, ones, groups), dy.shape)
    thrice(lambda out: native.conv_dx(dy, w, out, steps, ones, groups), x.shape)
    thrice(lambda out: native.conv_dw(x, dy, out, steps, ones, groups), w.shape, np.float32)
a, b = normal(40, 900), normal(900, 1000)
for left, right in ((a, b), (a, b.T.copy().T), (b.T, a.T), (a[:, :40].T, a)):
    thrice(lambda out: native.gemm(left, right, out), (left.shape[0], right.shape[1]))
"""


def test_threads(isa: str) -> None:
    """The same bits every time with a fixed number of threads; with another number the same but for rounding."""
    found = [printed_floats(THREADS, isa, threads) for threads in (1, 2, 5, 5)]
    assert found[0].size > 100_000
    assert found[2].tobytes() == found[3].tobytes()
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=2 * UNIT, atol=2e-3)


def test_mixed_arrays_are_refused_with_what_is_taken() -> None:
    x, w = np.ones((1, 4, 4, 2), BF16), np.ones((3, 3, 2, 5), BF16)
    with pytest.raises(TypeError, match=r"conv: takes float32 .*bfloat16 .*got uint16, uint16, float32"):
        Native().conv(x, w, np.ones((1, 2, 2, 5), FLOAT), (1, 1), (1, 1))
    with pytest.raises(TypeError, match=r"conv_dw: takes .*weight gradients and biases float32.*got uint16"):
        Native().conv_dw(x, np.ones((1, 2, 2, 5), BF16), w, (1, 1), (1, 1))
    with pytest.raises(ValueError, match=r"widen: 1D arrays of one length"):
        Native().widen(x, w.astype(FLOAT))
