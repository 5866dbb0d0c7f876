"""What the checkpoint tests share: random tensors, random tilings dealt to ranks, saving for many ranks without MPI."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from hpctrain.checkpoint import Block, writer
from hpctrain.partition import Box, Shape, extent, volume, whole

DTYPES = ("float32", "float64", "int64")


def random_box(rng: np.random.Generator, shape: Shape) -> Box:
    """A box inside `shape`, sometimes empty."""
    ends = [sorted(rng.integers(0, n + 1, 2).tolist()) for n in shape]
    return tuple(slice(a, b) for a, b in ends)


def random_tiling(rng: np.random.Generator, shape: Shape, cuts: int) -> list[Box]:
    """Boxes that tile `shape`, found by `cuts` random cuts of random boxes: in general no grid."""
    boxes = [whole(shape)]
    for _ in range(cuts):
        i = int(rng.integers(len(boxes)))
        dims = [d for d, n in enumerate(extent(boxes[i])) if n > 1]
        if dims:
            box, d = boxes.pop(i), int(rng.choice(dims))
            at = int(rng.integers(box[d].start + 1, box[d].stop))
            boxes += [(*box[:d], slice(*ends), *box[d + 1 :]) for ends in ((box[d].start, at), (at, box[d].stop))]
    return boxes


def random_tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Global arrays of odd sizes, 0-d and empty ones included."""
    shapes = {
        "conv1.weight": (3, 5, 2, 7),
        "momentum/conv1.weight": (3, 5, 2, 7),
        "bias": (11,),
        "scale": (),
        "none": (0, 3),
    }
    shapes |= {f"dense{i}": tuple(rng.integers(1, 14, rng.integers(1, 5)).tolist()) for i in range(3)}
    return {
        name: rng.integers(-(2**23), 2**23, shape).astype(DTYPES[i % len(DTYPES)])
        for i, (name, shape) in enumerate(shapes.items())
    }


def with_strides(rng: np.random.Generator, array: np.ndarray) -> np.ndarray:
    """The same elements, in memory of another order: as they are, transposed, or inside a larger array."""
    if array.ndim == 0:
        return array
    match rng.integers(3):
        case 0:
            return array.copy()
        case 1:
            return np.asfortranarray(array)
        case _:
            return np.repeat(array, 2, axis=-1)[..., ::2]


def deal(rng: np.random.Generator, tensors: dict[str, np.ndarray], ranks: int, cuts: int = 5) -> list[list[Block]]:
    """Each rank's blocks of a random tiling of each tensor; some ranks get several, some an empty one."""
    dealt: list[list[Block]] = [[] for _ in range(ranks)]
    for name, array in tensors.items():
        for box in random_tiling(rng, array.shape, cuts):
            dealt[rng.integers(ranks)].append(Block(name, array.shape, box, with_strides(rng, array[box])))
        if array.ndim:
            box = (slice(0, 0), *whole(array.shape)[1:])
            dealt[rng.integers(ranks)].append(Block(name, array.shape, box, array[box]))
    return dealt


def save_ranks(folder: Path, step: int, dealt: Sequence[Sequence[Block]], state: dict | None = None) -> Path:
    """The parts of `save` in turn, for every rank."""
    tmp = writer.prepare(folder, step, state or {})
    files = [writer.write_blocks(tmp, step, rank, blocks) for rank, blocks in enumerate(dealt)]
    return writer.commit(tmp, step, state or {}, files)


def one_tensor(value: float, ranks: int = 3, rows: int = 7) -> list[list[Block]]:
    """Tensor "w" (ranks * rows, 13) of float32, filled with `value`, in one block per rank."""
    shape = (ranks * rows, 13)
    boxes = [(slice(rank * rows, (rank + 1) * rows), slice(0, 13)) for rank in range(ranks)]
    return [[Block("w", shape, box, np.full(extent(box), value, np.float32))] for box in boxes]


def hash_blocks_touched(shape: Shape, itemsize: int, hash_block: int, box: Box) -> set[int]:
    """Numbers of the hash blocks of an array of `shape` that hold elements of `box`, element by element."""
    numbers = np.arange(volume(whole(shape))).reshape(shape) * itemsize // hash_block
    return set(numbers[box].ravel().tolist())


class Crash(BaseException):
    """Stands for kill -9: nothing of the program runs after it."""


def crash_at(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """From the n-th call that changes the disk on, all of them raise Crash instead."""
    left = n

    def dying(real: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                raise Crash
            return real(*args, **kwargs)

        return call

    for name in ("mkdir", "pwrite", "posix_fallocate", "fsync", "rename", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))
