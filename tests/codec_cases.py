"""Ranks of one process for tests of codecs, and a gradient of odd parameters."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import prod
from threading import Barrier
from typing import Any, TypeVar

import numpy as np

from hpctrain.comm.codecs import TABLE, Codec, Part
from hpctrain.config import Compress

T = TypeVar("T")

SHAPES = {
    "conv.weight": (3, 3, 5, 7),
    "conv.bias": (7,),
    "scale": (1,),
    "nothing": (0, 4),
    "dense.weight": (211, 331),  # more than a block
    "dense.bias": (331,),
}


def parts_of(shapes: dict[str, tuple[int, ...]]) -> tuple[list[Part], int]:
    """Parts one after the other, and their total size."""
    parts, at = [], 0
    for name, shape in shapes.items():
        parts.append(Part(name, slice(at, at + prod(shape)), shape, len(shape) > 1))
        at += prod(shape)
    return parts, at


PARTS, SIZE = parts_of(SHAPES)


def make(
    name: str,
    place: int = 0,
    shapes: dict[str, tuple[int, ...]] = SHAPES,
    dtype: str = "float32",
    momentum: float = 0.9,
    seed: int = 5,
    **settings: Any,
) -> Codec:
    """The codec `name` of rank `place` for a gradient of these shapes; without a warm-up unless settings give one."""
    compress = Compress(codec=name, **({"warmup_epochs": 0.0} | settings))  # type: ignore[arg-type]
    return TABLE[name](*parts_of(shapes), compress, momentum, seed, place, np.dtype(dtype))


def gradient(seed: int, step: int, rank: int, size: int = SIZE, dtype: str = "float32") -> np.ndarray:
    """Numbers of many magnitudes."""
    rng = np.random.default_rng([seed, step, rank])
    return (rng.normal(size=size) * 10.0 ** rng.integers(-4, 2, size)).astype(dtype)


class Only:
    """One rank of two, the other of which sends nothing: sums are what this one sends."""

    rank, size = 0, 2

    def total(self, buffer: np.ndarray) -> None:
        pass

    def gather(self, payload: np.ndarray) -> np.ndarray:
        return payload[None].copy()


class Together:
    """The wire of one of `size` ranks that are threads. Sums add in the order of ranks, 16-bit floats in float32."""

    def __init__(self, rank: int, size: int, barrier: Barrier, slots: list[Any]) -> None:
        self.rank, self.size, self.barrier, self.slots = rank, size, barrier, slots

    def _everyone(self, array: np.ndarray) -> list[np.ndarray]:
        self.slots[self.rank] = array.copy()
        self.barrier.wait(30)
        found = list(self.slots)
        self.barrier.wait(30)
        return found

    def total(self, buffer: np.ndarray) -> None:
        first, *others = self._everyone(buffer)
        for other in others:
            exact = first.astype(np.float32) + other if buffer.itemsize == 2 else first + other
            first = exact.astype(buffer.dtype)
        buffer[...] = first

    def gather(self, payload: np.ndarray) -> np.ndarray:
        return np.stack(self._everyone(payload))


def together(size: int, task: Callable[[Together], T]) -> list[T]:
    """What `task` returns on each of `size` ranks."""
    barrier, slots = Barrier(size), [None] * size

    def run(rank: int) -> T:
        try:
            return task(Together(rank, size, barrier, slots))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    errors = [e for f in futures if (e := f.exception()) is not None]
    for error in sorted(errors, key=lambda e: type(e).__name__ == "BrokenBarrierError"):
        raise error
    return [f.result() for f in futures]


def state_of(codec: Codec) -> dict[str, np.ndarray]:
    """A copy, as a checkpoint keeps it."""
    return {name: array.copy() for name, array in codec.state.items()}
