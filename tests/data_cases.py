"""Small data sets for tests, and the arrays they were written from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import UNSET

from hpctrain.data.index import Index, Layout
from hpctrain.data.writer import write_shards


@dataclass(frozen=True)
class Source:
    """What was written: x (n, *x_shape), y (n, *y_shape), ids (n,), in `folder`."""

    folder: Path
    x: np.ndarray
    y: np.ndarray
    ids: np.ndarray
    index: Index


def random_x(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Random numbers of any stored dtype."""
    if np.dtype(dtype).kind == "f":
        return (rng.standard_normal(shape) * 3 + 1).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)


def write(
    folder: Path,
    rng: np.random.Generator,
    samples: int = 23,
    x_shape: tuple[int, ...] = (7, 5, 3),
    dtype: str = "uint8",
    y_shape: tuple[int, ...] = (),
    classes: int | None = 4,
    per_shard: int = 9,
    ignore: int | None = None,
    **options: Any,
) -> Source:
    """A data set in shards of `per_shard` samples, with labels, or float32 values where `classes` is None.

    A third of the labels are `ignore`, where that is given.
    """
    x = random_x(rng, (samples, *x_shape), dtype)
    if classes is None:
        y = rng.standard_normal((samples, *y_shape)).astype(np.float32)
    else:
        y = rng.integers(0, classes, (samples, *y_shape))
    if ignore is not None:
        y[rng.random(y.shape) < 1 / 3] = ignore
    ids = rng.permutation(10 * samples)[:samples].astype(np.int64)
    layout = Layout(x_shape, dtype, y_shape, y.dtype.name, classes, ignore=UNSET if ignore is None else ignore)
    index = write_shards(folder, [(x, y, ids)], layout, samples, shard_bytes=per_shard * layout.x_bytes, **options)
    return Source(folder, x, y, ids, index)
