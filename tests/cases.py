"""Random geometries and arrays for tests of array operations, and the error that rounding may leave."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import numpy as np

CASES = 12
"""Random geometries per test, each in 2D or 3D, contiguous or strided."""


def tolerance(dtype: np.dtype, length: int) -> float:
    """Bound of |computed - exact| / sum of |terms| for a sum of `length` products, added in any order.

    Each product and each addition rounds by a factor of at most 1 + u with u = eps / 2, so no term gathers more than
    length + 1 of them: |error| <= ((1 + u)^(length + 1) - 1) * sum |terms|, about (length + 1) u. The oracle's own
    error, in float64, is no larger: that makes (length + 1) eps. The 4 are for one more factor and for rounding inputs.
    """
    return (length + 4) * float(np.finfo(dtype).eps)


def assert_close(got: np.ndarray, want: np.ndarray, magnitude: Any, dtype: np.dtype, length: int) -> None:
    """Elementwise: |got - want| within tolerance(dtype, length) times the sum of |terms| that make up the element."""
    excess = np.abs(got.astype(np.float64) - want) - tolerance(dtype, length) * np.asarray(magnitude)
    assert got.shape == want.shape
    assert np.all(excess <= 0), (
        f"{np.max(excess):.3g} over the bound at {np.unravel_index(np.argmax(excess), got.shape)}"
    )


class Arrays:
    """Makes arrays of one dtype for an operation; strided ones lie inside a larger array of NaN."""

    def __init__(self, dtype: np.dtype, seed: int, strided: bool) -> None:
        self.dtype, self.rng, self.strided = dtype, np.random.default_rng(seed), strided
        self.surroundings: list[tuple[np.ndarray, np.ndarray]] = []

    def of(self, values: np.ndarray) -> np.ndarray:
        if not self.strided:
            return np.ascontiguousarray(values, values.dtype)
        outer = np.full([n + 3 for n in values.shape], np.nan if values.dtype.kind == "f" else -7, values.dtype)
        inside = tuple(slice(1, 1 + n) for n in values.shape)
        view, rest = outer[inside], np.ones(outer.shape, bool)
        view[...], rest[inside] = values, False
        self.surroundings.append((outer, rest))
        return view

    def normal(self, *shape: int) -> np.ndarray:
        return self.of(self.rng.standard_normal(shape).astype(self.dtype))

    def out(self, *shape: int, dtype: Any = None) -> np.ndarray:
        return self.of(np.full(shape, 77, dtype or self.dtype))

    def check_surroundings(self) -> None:
        for outer, rest in self.surroundings:
            assert np.all(np.isnan(outer[rest]) if outer.dtype.kind == "f" else outer[rest] == -7)


class Geometry(NamedTuple):
    """A convolution or pooling: x (n, *extent, c) and a window; channels and filters in `groups` equal runs."""

    n: int
    extent: tuple[int, ...]
    c: int
    k: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @property
    def outputs(self) -> tuple[int, ...]:
        spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        return tuple((n - span) // s + 1 for n, span, s in zip(self.extent, spans, self.stride, strict=True))

    def window(self, at: tuple[int, ...]) -> tuple[slice, ...]:
        """Index into x, of all samples and channels, of the window of output position `at`."""
        starts = [o * s for o, s in zip(at, self.stride, strict=True)]
        spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        inner = [slice(a, a + span, d) for a, span, d in zip(starts, spans, self.dilation, strict=True)]
        return (slice(None), *inner, slice(None))

    def positions(self) -> Iterator[tuple[int, ...]]:
        return product(*map(range, self.outputs))


def geometries(seed: int, dilated: bool = True, wide: bool = False, grouped: bool = False) -> Iterator[Geometry]:
    """CASES random ones, whatever remains of x behind the last window included.

    `wide` has some of many channels, `grouped` up to 3 groups and some convolutions of each channel alone.
    """
    rng = np.random.default_rng(seed)
    for case in range(CASES):
        dims = 2 + case % 2
        kernel = tuple(rng.integers(1, 5 - dims // 3, dims).tolist())
        stride = tuple(rng.integers(1, 4, dims).tolist())
        dilation = tuple(rng.integers(1, 3, dims).tolist()) if dilated else (1,) * dims
        spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
        extent = tuple(int(span + rng.integers(0, 6)) for span in spans)
        n, c, k = rng.integers(1, 5, 3).tolist()
        if wide and case % 3 == 0:
            c = int(rng.integers(60, 600))
        groups = int(rng.integers(1, 4)) if grouped else 1
        if grouped and case % 4 == 3:
            groups, c = int(rng.integers(5, 9)), 1
        yield Geometry(n, extent, c * groups, k * groups, kernel, stride, dilation, groups)


def cases(
    dtype: np.dtype, seed: int, dilated: bool = True, wide: bool = False, grouped: bool = False
) -> Iterator[tuple[Geometry, Arrays]]:
    """Each geometry with its arrays, half of them strided; afterwards nothing around the views has changed."""
    for number, geometry in enumerate(geometries(seed, dilated, wide, grouped)):
        arrays = Arrays(dtype, seed + number, strided=number % 4 >= 2)
        yield geometry, arrays
        arrays.check_surroundings()


def printed_floats(program: str, argument: str, threads: int) -> np.ndarray:
    """The float32 numbers that a Python program writes to stdout, run in a process of its own with so many threads."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_DYNAMIC": "false"}
    ended = subprocess.run([sys.executable, "-c", program, argument], env=environment, capture_output=True, check=False)
    assert ended.returncode == 0, ended.stderr.decode()
    return np.frombuffer(ended.stdout, np.float32)
