"""Classes of cuts of one part of an edge: the blocks that their ranks own, and what these want."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import NamedTuple

import numpy as np

from hpctrain.partition import AXES, Partition, names
from hpctrain.planner.ends import Ends
from hpctrain.planner.overlaps import Boxes, Overlaps, equal, group
from hpctrain.planner.sampling import Sample
from hpctrain.regions import Distribution, touched


class Classes(NamedTuple):
    """Ways to cut: blocks and strides in rank along some axes, (classes, axes) each, as bytes of int64."""

    size: int
    blocks: bytes
    strides: bytes

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Both, as arrays."""
        shape = self.size, -1 if self.blocks else 0
        return np.frombuffer(self.blocks, np.int64).reshape(shape), np.frombuffer(self.strides, np.int64).reshape(shape)


class Wishes(NamedTuple):
    """What is wanted, int32, clipped to the array: segments (dims, segments, ...), the intervals themselves (2, dims,
    ...) and whether ranks there take part (...); ... are coordinates, or classes and ranks.
    """

    starts: np.ndarray
    stops: np.ndarray
    outer: np.ndarray
    taking: np.ndarray


def common(mine: np.ndarray, wish: Wishes) -> np.ndarray:
    """Elements that blocks (2, dims, classes, ranks) and wishes have in common: (classes, classes, ranks)."""
    low, high = mine[:, :, :, None]
    found = np.broadcast_to(wish.taking.astype(np.float64), (mine.shape[2], *wish.taking.shape))
    for d in range(len(low)):
        n: np.ndarray | int = 0
        for starts, stops in zip(wish.starts[d], wish.stops[d], strict=True):
            n = n + np.maximum(0, np.minimum(high[d], stops) - np.maximum(low[d], starts))
        found = found * n
    return np.ascontiguousarray(found)


def alike(mine: np.ndarray, wish: Wishes) -> np.ndarray:
    """1 where the block is just what is wanted, of the same shape."""
    low, high = mine[:, :, :, None]
    found = np.broadcast_to(wish.taking.astype(np.float64), (mine.shape[2], *wish.taking.shape))
    for d in range(len(low)):
        found = found * ((low[d] == wish.outer[0, d]) & (high[d] == wish.outer[1, d]) & (low[d] < high[d]))
    return np.ascontiguousarray(found)


# --- coordinates -----------------------------------------------------------------------------------------------------


def _coordinates(blocks: np.ndarray, strides: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """(classes, axes, ranks)"""
    return ranks // strides[..., None] % blocks[..., None]


def _on_host(blocks: np.ndarray, strides: np.ndarray, sample: Sample) -> list[tuple[np.ndarray, np.ndarray]]:
    """All coordinates of the host of each rank, one after the other: ((classes, axes, ranks), the classes that have so
    many).
    """
    per_host = sample.per_host
    each = np.where(strides * blocks <= per_host, blocks, np.maximum(1, per_host // strides))
    first = _coordinates(blocks, strides, sample.looked_at // per_host * per_host)
    count, found = each.prod(1, dtype=np.int64), []
    for t in range(int(count.max(initial=1))):
        some = np.flatnonzero(count > t)
        step, left = np.zeros((len(some), blocks.shape[1]), np.int64), np.full(len(some), t)
        for a in range(blocks.shape[1] - 1, -1, -1):
            left, step[:, a] = np.divmod(left, each[some, a])
        found.append((first[some] + step[..., None], some))
    return found


# --- owners ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2**14)
def _owned(n: int, blocks: tuple[int, ...]) -> np.ndarray:
    """First and last + 1 of the block at each coordinate along axes of so many blocks, int32 (2, coordinates)."""
    axes = AXES[: len(blocks)]
    cut = Distribution((n,), (axes,), Partition.of(dict(zip(axes, blocks, strict=True)))).cuts[0]
    return np.array(cut.intervals, np.int32).T


class Owners:
    """Classes of owners."""

    def __init__(self, ends: Ends, blocks: np.ndarray, strides: np.ndarray) -> None:
        self._blocks, self._strides = blocks, strides
        self._columns = [[AXES.index(axis) for axis in names(axes)] for axes in ends.axes]
        self._cuts = [
            [_owned(n, tuple(row)) for row in blocks[:, columns].tolist()]
            for n, columns in zip(ends.shape, self._columns, strict=True)
        ]

    def at(self, ranks: np.ndarray) -> np.ndarray:
        """The block of each of `ranks`, int32 (2, dims, classes, ranks)."""
        return self._blocks_at(_coordinates(self._blocks, self._strides, ranks), np.arange(len(self._blocks)))

    def _blocks_at(self, coordinates: np.ndarray, classes: np.ndarray) -> np.ndarray:
        found = np.zeros((2, len(self._cuts), len(classes), coordinates.shape[2]), np.int32)
        for d, columns in enumerate(self._columns):
            at = _row_major(coordinates[:, columns], self._blocks[classes][:, columns])
            for i, c in enumerate(classes):
                found[:, d, i] = self._cuts[d][c][:, at[i]]
        return found

    def hosts(self, sample: Sample) -> list[tuple[np.ndarray, np.ndarray]]:
        """The blocks of the host of each rank, one after the other, and the classes that have so many."""
        return [(self._blocks_at(at, some), some) for at, some in _on_host(self._blocks, self._strides, sample)]

    def all_of(self, wish: Wishes) -> tuple[np.ndarray, np.ndarray]:
        """In how many blocks there is something of each wish, and how many are just that: (classes, classes, ranks)."""
        found = np.broadcast_to(wish.taking.astype(np.float64), (2, len(self._blocks), *wish.taking.shape)).copy()
        for d, cuts in enumerate(self._cuts):
            distinct = {id(cut): cut for cut in cuts}
            counted = {key: _blocks_met(cut, wish, d) for key, cut in distinct.items()}
            for i, cut in enumerate(cuts):
                found[:, i] *= counted[id(cut)]
        return found[0], found[1]


def _blocks_met(cut: np.ndarray, wish: Wishes, d: int) -> np.ndarray:
    """How many blocks (2, coordinates) hold something of what is wanted along dim d, and how many are just that."""
    low, high = cut[:, cut[0] < cut[1]]
    first = np.minimum(np.searchsorted(low, wish.outer[0, d]), len(low) - 1)
    same = (low[first] == wish.outer[0, d]) & (high[first] == wish.outer[1, d])
    starts, stops = wish.starts[d], wish.stops[d]
    if len(starts) == 1:
        met = np.searchsorted(low, stops[0]) - np.searchsorted(high, starts[0], "right")
        return np.stack([np.where(starts[0] < stops[0], met, 0), same])
    meets = np.zeros((*starts.shape[1:], len(low)), bool)
    for start, stop in zip(starts, stops, strict=True):
        meets |= np.minimum(high, stop[..., None]) > np.maximum(low, start[..., None])
    return np.stack([meets.sum(-1), same])


def _row_major(coordinates: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """(classes, ranks): of coordinates (classes, axes, ranks) along axes of so many blocks (classes, axes), as one."""
    at = np.zeros((coordinates.shape[0], coordinates.shape[2]), np.int64)
    for a in range(coordinates.shape[1]):
        at = at * blocks[:, a, None] + coordinates[:, a]
    return at


# --- who wants -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2**14)
def _wishes(ends: Ends, blocks: tuple[int, ...]) -> Wishes:
    """Those at each coordinate along axes of so many blocks."""
    axes = AXES[: len(blocks)]
    partition = Partition.of(dict(zip(axes, blocks, strict=True)))
    work = Distribution(ends.work, ends.work_axes, partition)
    region = touched(work, ends.needs, ends.shape)
    cut = tuple(axis for axis in axes if partition[axis] > 1)
    found = group(region, cut, tuple(range(len(ends.shape))), work.cuts if ends.masked else ())
    dims = [Overlaps.of(one, one) for one in region.cuts]
    size, segments = len(found.taking), max([len(one.starts) for one in dims], default=1)
    starts, stops = np.zeros((2, len(dims), segments, size), np.int32)
    outer = np.zeros((2, len(dims), size), np.int32)
    for d, (one, place) in enumerate(zip(dims, found.places, strict=True)):
        starts[d, : len(one.starts)], stops[d, : len(one.stops)] = one.starts[:, place], one.stops[:, place]
        outer[:, d] = one.outer[:, place]
        np.clip(starts[d], 0, ends.shape[d], out=starts[d])  # what lies beyond the array nobody has
        np.clip(stops[d], starts[d], max(ends.shape[d], 0), out=stops[d])
    return Wishes(starts, stops, outer, found.taking.astype(np.int32))


def _as_one(ends: Ends, blocks: tuple[int, ...]) -> tuple[int, ...]:
    """Blocks of the first axis alone that cut a single dim of work as `blocks` do: into equal parts of such."""
    count = prod(blocks)
    return (count, *(1 for _ in blocks[1:])) if len(ends.work) == 1 and ends.work[0] % count == 0 else blocks


class Wanters:
    """Classes of who wants."""

    def __init__(self, ends: Ends, blocks: np.ndarray, strides: np.ndarray) -> None:
        self._n, self._blocks, self._strides = ends.shape, blocks, strides
        self._cuts = [_wishes(ends, _as_one(ends, tuple(row))) for row in blocks.tolist()]
        self._segments = max(cut.starts.shape[1] for cut in self._cuts)

    def at(self, ranks: np.ndarray) -> Wishes:
        """What each of `ranks` wants."""
        return self._wishes_at(_coordinates(self._blocks, self._strides, ranks), np.arange(len(self._blocks)))

    def _wishes_at(self, coordinates: np.ndarray, classes: np.ndarray) -> Wishes:
        at = _row_major(coordinates, self._blocks[classes])
        dims, shape = len(self._n), at.shape
        starts, stops = np.zeros((2, dims, self._segments, *shape), np.int32)
        outer, taking = np.zeros((2, dims, *shape), np.int32), np.zeros(shape, np.int32)
        for j, c in enumerate(classes):
            cut, place = self._cuts[c], at[j]
            segments = cut.starts.shape[1]
            starts[:, :segments, j], stops[:, :segments, j] = cut.starts[..., place], cut.stops[..., place]
            outer[:, :, j], taking[j] = cut.outer[..., place], cut.taking[place]
        return Wishes(starts, stops, outer, taking)

    def hosts(self, sample: Sample) -> list[tuple[Wishes, np.ndarray]]:
        """What the ranks of each rank's host want, one after the other, and the classes that have so many."""
        return [(self._wishes_at(at, some), some) for at, some in _on_host(self._blocks, self._strides, sample)]

    def largest(self) -> np.ndarray:
        """The most that is wanted at any coordinate, float64 (classes,)."""
        sizes = (np.prod((cut.stops - cut.starts).sum(1), axis=0, dtype=np.float64) * cut.taking for cut in self._cuts)
        return np.array([size.max() for size in sizes])

    def all_of(self, mine: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each block (2, dims, classes, ranks), what all take together, how many these are, and how many want just
        that: (classes, classes, ranks).
        """
        distinct = {id(cut): cut for cut in self._cuts}
        taken = {key: _taken(cut, mine, self._n) for key, cut in distinct.items()}
        found = np.zeros((3, mine.shape[2], len(self._cuts), mine.shape[3]))
        for j, cut in enumerate(self._cuts):
            found[:, :, j] = taken[id(cut)]
        return found[0], found[1], found[2]


def _taken(cut: Wishes, mine: np.ndarray, n: tuple[int, ...]) -> np.ndarray:
    """Of each block (2, dims, ...), what all coordinates of a cut want of it, at how many something is wanted, and at
    how many just the block: (3, ...).
    """
    low, high = mine
    if len(n) == 0:
        return np.full((3, *mine.shape[2:]), cut.taking.sum())
    taking = cut.taking > 0
    first, last = cut.outer[..., taking]
    same = equal(n, first, last, low, high)
    if cut.starts.shape[1] == 1:
        return np.stack([*Boxes(n, cut.starts[:, 0, taking], cut.stops[:, 0, taking]).common(low, high), same])
    # many ranks, few different blocks
    distinct, which = np.unique(mine.reshape(2 * len(n), -1), axis=1, return_inverse=True)
    boxes: np.ndarray = distinct.reshape(2, len(n), -1, 1)
    both = common(boxes, Wishes(*(part[..., None] for part in cut)))[..., 0]
    shape = mine.shape[2:]
    return np.stack([both.sum(1)[which.ravel()].reshape(shape), (both > 0).sum(1)[which.ravel()].reshape(shape), same])
