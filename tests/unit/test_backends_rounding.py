"""Every operation takes bfloat16: as in float32, then rounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hpctrain.backends.base import Backend
from hpctrain.backends.reference import Reference
from hpctrain.backends.rounding import to_bfloat16
from hpctrain.precision import BF16


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(BF16)


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, BF16)


def test_it_is_one_of_the_types(backend: Backend) -> None:
    assert "bfloat16" in backend.dtypes
    assert np.dtype("bfloat16") == BF16
    assert backend.empty((2, 3), BF16).dtype == BF16


VECTOR = np.linspace(0.5, 2, 3, dtype=np.float32)
STATISTIC = VECTOR.astype(float)
LABELS = np.array([0, 2, -1, 1])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("conv", (normal(2, 5, 3), normal(2, 3, 4), zeros(2, 4, 4), (1,), (1,), 1, np.ones(4, np.float32), 0.5)),
        ("conv_dx", (normal(2, 4, 4), normal(2, 3, 4), zeros(2, 5, 3), (1,), (1,))),
        ("conv_dw", (normal(2, 5, 3), normal(2, 4, 4), np.zeros((2, 3, 4), np.float32), (1,), (1,))),
        ("gemm", (normal(4, 3), normal(3, 5), zeros(4, 5))),
        ("bias_add", (normal(4, 3), VECTOR)),
        ("bias_grad", (normal(4, 3), np.zeros(3, np.float32))),
        ("max_pool", (normal(1, 5, 3), zeros(1, 4, 3), np.zeros((1, 4, 3), np.int32), (2,), (1,))),
        ("max_pool_dx", (normal(1, 4, 3), np.ones((1, 4, 3), np.int32), zeros(1, 5, 3), (2,), (1,))),
        ("avg_pool", (normal(1, 5, 3), zeros(1, 4, 3), np.full((1, 1, 1), 3.0, np.float32), (2,), (1,))),
        ("sum_positions", (normal(2, 5, 3), zeros(2, 3), 0.3)),
        ("spread_positions", (normal(2, 3), zeros(2, 5, 3), 0.3)),
        ("moments", (normal(4, 3), np.zeros(3), np.zeros(3))),
        ("normalize", (normal(4, 3), STATISTIC, STATISTIC, VECTOR, VECTOR, zeros(4, 3))),
        ("normalize_dx", (normal(4, 3), normal(4, 3), STATISTIC, STATISTIC, VECTOR, STATISTIC, STATISTIC, zeros(4, 3))),
        ("add", (normal(4, 3), normal(4, 3), zeros(4, 3))),
        ("relu", (normal(4, 3), zeros(4, 3))),
        ("relu_dx", (normal(4, 3), normal(4, 3), zeros(4, 3))),
        ("activate", ("gelu", normal(4, 3), zeros(4, 3))),
        ("softmax", (normal(4, 3), zeros(4, 3))),
        ("cross_entropy", (normal(4, 3), LABELS, VECTOR, 0.1, np.zeros(4), zeros(4, 3))),
    ],
)
def test_operations(backend: Backend, name: str, arguments: tuple[Any, ...]) -> None:
    """What `reference` computes in float64 of the same numbers, but for rounding; inputs stay as they are."""

    def widened(a: Any, dtype: type = float) -> Any:
        return a.astype(dtype) if isinstance(a, np.ndarray) and a.dtype.kind not in "iu" else a

    given = [a.copy() if isinstance(a, np.ndarray) else a for a in arguments]
    want = [widened(a) if isinstance(a, np.ndarray) else a for a in arguments]
    getattr(backend, name)(*given)
    getattr(Reference(), name)(*want)
    changed = 0
    for before, got, exact in zip(arguments, given, want, strict=True):
        if not isinstance(before, np.ndarray):
            continue
        assert got.dtype == before.dtype
        np.testing.assert_allclose(widened(got), exact, rtol=2**-8, atol=1e-5)
        changed += not np.array_equal(widened(before), exact)
    assert changed


def test_an_output_may_be_an_input(backend: Backend) -> None:
    a, b = normal(5, 3), normal(3, 5).T.copy()
    want = to_bfloat16(a.astype(np.float32) + b.astype(np.float32))
    backend.add(a, b, a)
    assert np.array_equal(a, want)
    backend.relu(a, a)
    assert np.array_equal(a, np.maximum(want, to_bfloat16(np.float32([0]))))


def test_inputs_may_be_read_only_and_outputs_views(backend: Backend) -> None:
    a, whole = normal(4, 6), np.full((6, 8), 7, BF16)
    a.flags.writeable = False
    backend.multiply(a, a, whole[1:5, 1:7])
    assert np.array_equal(whole[1:5, 1:7], to_bfloat16(np.square(a.astype(np.float32))))
    assert np.sum(whole.astype(float) == 7) == 48 - 24


def test_nan_and_infinity_pass(backend: Backend) -> None:
    a, out = to_bfloat16(np.float32([np.nan, np.inf, -np.inf, 2])), zeros(4)
    backend.add(a, a, out)
    np.testing.assert_array_equal(out.astype(float), [np.nan, np.inf, -np.inf, 4])


@pytest.mark.parametrize("cast", [lambda b, x, n, w: (b.narrow(x, n), b.widen(n, w))])
def test_casts(backend: Backend, cast: Callable[..., Any]) -> None:
    x = np.float32([1, 1 + 2**-8, 1 + 3 * 2**-8, -3.4e38, 0, -0.0, np.nan, 1e-40])
    narrow, wide = np.empty(x.shape, BF16), np.empty(x.shape, np.float32)
    cast(backend, x, narrow, wide)
    np.testing.assert_array_equal(wide, [1, 1, 1 + 2**-6, -np.inf, 0, 0, np.nan, wide[-1]])
    assert wide[-1] == pytest.approx(1e-40, rel=2**-6)
    assert np.signbit(wide[5])
