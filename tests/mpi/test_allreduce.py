"""Allreduce algorithms: exact sums, the same bits every time, and the messages and bytes that they state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpctrain.comm import allreduce
from hpctrain.comm.link import Link
from hpctrain.precision import BF16

SIZES = (0, 1, 2, 3, 5, 17, 1023, 100_003)
DTYPES = [np.dtype(name) for name in ("float32", "float64", "float16")] + [BF16]
LARGEST = {"float32": 2**19, "float64": 2**48, "float16": 2**7, "bfloat16": 2**4}
"""Whole numbers up to this add up, over 9 ranks, to what the type has digits for: no order of adding rounds."""


def whole_numbers(size: int, ranks: int, dtype: np.dtype, seed: list[int]) -> tuple[list[np.ndarray], np.ndarray]:
    """(buffer of every rank, their sum)."""
    most = LARGEST[dtype.name]
    every = np.random.default_rng(seed).integers(-most, most, (ranks, size), endpoint=True)
    return list(every.astype(dtype)), every.sum(axis=0).astype(dtype)


@pytest.mark.parallel([1, 2, 3, 4, 5, 6, 7, 8, 9])
@pytest.mark.parametrize("name", allreduce.TABLE)
def test_sum_of_whole_numbers_is_exact(comm: Any, name: str, seed: int) -> None:
    link = Link(comm)
    for dtype in DTYPES:
        for size in SIZES:
            every, total = whole_numbers(size, comm.size, dtype, [seed, size])
            for sum_up in (allreduce.get(name).sum, lambda *args: allreduce.run(allreduce.get(name).steps(*args))):
                buffer = every[comm.rank].copy()
                assert sum_up(link, buffer) is None
                np.testing.assert_array_equal(buffer, total, strict=True)
    link.free()
