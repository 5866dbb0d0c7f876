"""Random transfers of a global array between ranks, and what each rank gets by brute force over all elements."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from networks import random_partition

from hpctrain.partition import Box, Interval, Partition, Shape, extent
from hpctrain.regions import Cut, Distribution, Region, Wanted, folded

# --- random boxes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transfer:
    """A global array, who owns which part of it, and who wants which."""

    shape: Shape
    have: Region
    want: Region
    borders: tuple[str, ...] = ()
    """What stands beyond the array along each dim; none named: the fill value."""


def random_transfer(rng: np.random.Generator, ranks: int) -> Transfer:
    """Owned boxes that cover the array, evenly cut or not; wanted boxes of any kind."""
    shape = tuple(rng.integers(1, 10, rng.integers(1, 5)).tolist())
    kind = rng.integers(4)
    borders = tuple(("fill", "wrap", "reflect")[i] for i in rng.integers(0, 3, len(shape)) * (rng.random() < 0.7))
    want = distribution(rng, shape, ranks) if kind == 0 else wishes(rng, shape, ranks, borders)
    have = uneven(rng, shape, ranks) if kind == 1 else distribution(rng, shape, ranks)
    return Transfer(shape, have, want, borders)


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


def wishes(rng: np.random.Generator, shape: Shape, ranks: int, borders: tuple[str, ...] = ()) -> Wanted:
    """Boxes that overlap, reach past neighbours, leave the array, are empty, or are the same on several ranks."""
    partition = random_partition(rng, ranks)
    dealt = deal_axes(rng, partition, len(shape) + 1)  # the last: axes along which ranks want the same
    cuts = []
    for n, axes, border in zip(shape, dealt, borders or ("fill",) * len(shape), strict=False):
        intervals = tuple(wish(rng, n) for _ in range(parts(partition, axes)))
        pieces = () if border == "fill" else tuple(folded(start, stop, n, border) for start, stop in intervals)
        cuts.append(Cut(axes, intervals, pieces))
    masks: tuple[Cut, ...] = ()
    if rng.random() < 0.5:  # of any axes: of those that cut a dim, of some of them, of others
        some = [axis for axis in rng.permutation(list(partition.parts())).tolist() if rng.random() < 0.6]
        masks = (Cut(tuple(some), tuple((0, int(rng.random() < 0.7)) for _ in range(parts(partition, tuple(some))))),)
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


def sources(transfer: Transfer, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """For every element that `rank` wants its place in the array (elements, dims), and whether there is one."""
    at = indices(transfer.want.box(rank))
    for d, (n, border) in enumerate(zip(transfer.shape, transfer.borders, strict=False)):
        if border == "wrap":
            at[:, d] %= n
        if border == "reflect" and n == 1:
            at[:, d] = 0
        while border == "reflect" and n > 1 and ((at[:, d] < 0) | (at[:, d] >= n)).any():
            at[:, d] = np.abs(at[:, d])
            at[:, d] = np.where(at[:, d] >= n, 2 * (n - 1) - at[:, d], at[:, d])
    return at, ((at >= 0) & (at < transfer.shape)).all(axis=1)


def forward(transfer: Transfer, array: np.ndarray, rank: int, fill: float) -> np.ndarray:
    """What `rank` gets of the global `array`: element by element."""
    at, inside = sources(transfer, rank)
    y = np.full(len(at), fill, array.dtype)
    y[inside] = array[tuple(at[inside].T)]
    return y.reshape(extent(transfer.want.box(rank)))


def backward(transfer: Transfer, gradients: list[np.ndarray]) -> np.ndarray:
    """The global sum of what every rank sends back."""
    total = np.zeros(transfer.shape)
    for rank, gradient in enumerate(gradients):
        at, inside = sources(transfer, rank)
        np.add.at(total, tuple(at[inside].T), gradient.reshape(-1)[inside])
    return total


def common(transfer: Transfer, owner: int, user: int) -> int:
    """How many of the elements that `user` wants `owner` has; one that is wanted twice counts twice."""
    at, inside = sources(transfer, user)
    own = {tuple(i) for i in indices(transfer.have.box(owner)).tolist()}
    return sum(tuple(i) in own for i in at[inside].tolist())


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
