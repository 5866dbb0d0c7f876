"""Random transfers of a global array between ranks, and what each rank gets by brute force over all elements."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from networks import random_partition

from hpctrain.partition import (
    Box,
    Cut,
    Distribution,
    Interval,
    Partition,
    Region,
    Shape,
    Wanted,
    extent,
)

# --- random boxes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transfer:
    """A global array, who owns which part of it, and who wants which."""

    shape: Shape
    have: Region
    want: Region


def random_transfer(rng: np.random.Generator, ranks: int) -> Transfer:
    """Owned boxes that cover the array, evenly cut or not; wanted boxes of any kind."""
    shape = tuple(rng.integers(1, 10, rng.integers(1, 5)).tolist())
    kind = rng.integers(4)
    want = distribution(rng, shape, ranks) if kind == 0 else wishes(rng, shape, ranks)
    have = uneven(rng, shape, ranks) if kind == 1 else distribution(rng, shape, ranks)
    return Transfer(shape, have, want)


def deal_axes(rng: np.random.Generator, partition: Partition, dims: int) -> list[tuple[str, ...]]:
    """Every axis that is cut, dealt to some dim."""
    dealt: list[tuple[str, ...]] = [()] * dims
    for axis in rng.permutation(list(partition.parts())).tolist():
        d = int(rng.integers(dims))
        dealt[d] = (*dealt[d], axis)
    return dealt


def distribution(rng: np.random.Generator, shape: Shape, ranks: int) -> Distribution:
    """Balanced blocks; some are empty where a dim is short."""
    partition = random_partition(rng, ranks)
    return Distribution(shape, tuple(deal_axes(rng, partition, len(shape))), partition)


def uneven(rng: np.random.Generator, shape: Shape, ranks: int) -> Wanted:
    """Disjoint boxes that cover the array, of any size, some empty."""
    partition, cuts = random_partition(rng, ranks), []
    for n, axes in zip(shape, deal_axes(rng, partition, len(shape)), strict=True):
        inner = np.sort(rng.integers(0, n + 1, prod(partition[a] for a in axes) - 1)).tolist()
        cuts.append(Cut(axes, tuple(zip([0, *inner], [*inner, n], strict=True))))
    return Wanted(partition, tuple(cuts))


def wishes(rng: np.random.Generator, shape: Shape, ranks: int) -> Wanted:
    """Boxes that overlap, reach past neighbours, leave the array, are empty, or are the same on several ranks."""
    partition = random_partition(rng, ranks)
    dealt = deal_axes(rng, partition, len(shape) + 1)  # the last: axes along which ranks want the same
    cuts = [
        Cut(axes, tuple(wish(rng, n) for _ in range(parts(partition, axes))))
        for n, axes in zip(shape, dealt, strict=False)
    ]
    masks: tuple[Cut, ...] = ()
    if dealt[-1] and rng.random() < 0.5:
        masks = (Cut(dealt[-1], tuple((0, int(rng.integers(2))) for _ in range(parts(partition, dealt[-1])))),)
    return Wanted(partition, tuple(cuts), masks)


def parts(partition: Partition, axes: tuple[str, ...]) -> int:
    """Coordinates along `axes` taken as one."""
    return prod(partition[axis] for axis in axes)


def wish(rng: np.random.Generator, n: int) -> Interval:
    """An interval that may begin before 0, end after n, lie outside altogether, or be empty."""
    start = int(rng.integers(-3, n + 1))
    return start, start + int(rng.integers(0, n + 5))


# --- the same by brute force --------------------------------------------------------------------------------------


def indices(box: Box) -> np.ndarray:
    """Global index of every element of `box`: (elements, dims)."""
    return np.stack(np.meshgrid(*(np.arange(s.start, s.stop) for s in box), indexing="ij"), axis=-1).reshape(
        -1, len(box)
    )


def forward(transfer: Transfer, array: np.ndarray, rank: int, fill: float) -> np.ndarray:
    """What `rank` gets of the global `array`: element by element."""
    box = transfer.want.box(rank)
    y = np.full(extent(box), fill, array.dtype)
    for at in indices(box):
        if all(0 <= i < n for i, n in zip(at, transfer.shape, strict=True)):
            y[tuple(i - s.start for i, s in zip(at, box, strict=True))] = array[tuple(at)]
    return y


def backward(transfer: Transfer, gradients: list[np.ndarray]) -> np.ndarray:
    """The global sum of what every rank sends back."""
    total = np.zeros(transfer.shape)
    for rank, gradient in enumerate(gradients):
        at = indices(transfer.want.box(rank))
        inside = ((at >= 0) & (at < transfer.shape)).all(axis=1)
        np.add.at(total, tuple(at[inside].T), gradient.reshape(-1)[inside])
    return total


def common(a: Box, b: Box) -> int:
    """Elements in both boxes."""
    return len({tuple(i) for i in indices(a).tolist()} & {tuple(i) for i in indices(b).tolist()})


def whole_numbers(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    """Float64 whose sums and products are exact in any order."""
    return rng.integers(-99, 100, shape).astype(np.float64)


class Posted:
    """A communicator that notes what persistent messages are made on it."""

    def __init__(self, comm: Any) -> None:
        self.comm, self.rank = comm, comm.rank
        self.sends: list[tuple[int, int, int]] = []
        self.recvs: list[tuple[int, int, int]] = []

    def Send_init(self, buffer: np.ndarray, peer: int, tag: int) -> Any:
        self.sends.append((peer, buffer.nbytes, tag))
        return self.comm.Send_init(buffer, peer, tag)

    def Recv_init(self, buffer: np.ndarray, peer: int, tag: int) -> Any:
        self.recvs.append((peer, buffer.nbytes, tag))
        return self.comm.Recv_init(buffer, peer, tag)
