"""Of one dim of a tensor: what of the block at each coordinate of its owner is wanted at each of its consumer's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from hpctrain.partition import AXES, Partition
from hpctrain.regions import Cut, Region


class Overlaps(NamedTuple):
    """One dim, cut by its owners into ascending blocks [low, high) and wanted in intervals, by coordinate.

    `starts` and `stops` (segments, coordinates) say where in the array what is wanted comes from: one segment, several
    beyond a periodic or reflected border, each empty where there are fewer. `outer` (2, coordinates) is the interval
    itself, which may leave the array.
    """

    low: np.ndarray
    high: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    outer: np.ndarray

    @classmethod
    def of(cls, have: Cut, want: Cut) -> Overlaps:
        """Those of a dim, all int64."""
        low, high = np.array(have.intervals, np.int64).T
        outer = np.array(want.intervals, np.int64).T
        if not want.folded:
            return cls(low, high, outer[:1], outer[1:], outer)
        segments = np.zeros((2, max(map(len, want.folded)), len(want.folded)), np.int64)
        for c, found in enumerate(want.folded):
            for s, segment in enumerate(found):
                segments[:, s, c] = segment.start, segment.stop
        return cls(low, high, segments[0], segments[1], outer)

    def elements(self, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        """How many of block b are wanted at c, as often as they are; broadcasts."""
        low, high = self.low[b], self.high[b]
        found = 0
        for starts, stops in zip(self.starts, self.stops, strict=True):
            found = found + np.maximum(0, np.minimum(high, stops[c]) - np.maximum(low, starts[c]))
        return np.asarray(found)

    def same(self, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        """Whether block b is just what is wanted at c: along this dim a copy is then as contiguous as the arrays."""
        return (self.low[b] == self.outer[0][c]) & (self.high[b] == self.outer[1][c])

    def inside(self, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        """Whether what is wanted at c holds all of block b."""
        return (self.low[b] >= self.outer[0][c]) & (self.high[b] <= self.outer[1][c])

    def meeting(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(b, c, elements) of all pairs of coordinates that have something in common."""
        if len(self.starts) > 1:  # several segments may meet one block
            b, c = (grid.ravel() for grid in np.indices((len(self.low), self.outer.shape[1])))
        else:
            starts, stops = self.starts[0], self.stops[0]
            first = np.searchsorted(self.high, starts, "right")
            count = np.maximum(0, np.searchsorted(self.low, stops, "left") - first)
            c = np.repeat(np.arange(len(starts)), count)
            b = np.arange(len(c)) + np.repeat(first - np.cumsum(count) + count, count)
        n = self.elements(b, c)
        return b[n > 0], c[n > 0], n[n > 0]


# --- boxes -----------------------------------------------------------------------------------------------------------


class Boxes:
    """Many boxes in an array of shape n, int (dims, boxes) from `starts` to `stops` within it; those empty count not.

    What they have in common with other boxes is read off sums over all positions before a corner, which take as much
    memory as the array has elements.
    """

    def __init__(self, n: Sequence[int], starts: np.ndarray, stops: np.ndarray) -> None:
        some = (starts < stops).all(axis=0)
        ends = [(starts[d, some], stops[d, some]) for d in range(len(n))]
        shape = tuple(extent + 1 for extent in n)
        depth = np.zeros(shape, np.int64)  # by how many boxes each position is covered, once summed up
        self._before: list[np.ndarray] = []
        """For each choice of start or stop per dim, how many boxes have them at a position or before."""
        self._choices = list(product((0, 1), repeat=len(n)))
        for choice in self._choices:
            place = np.ravel_multi_index([end[which] for end, which in zip(ends, choice, strict=True)], shape)
            count = np.bincount(place, minlength=depth.size).reshape(shape)
            depth += (-1) ** sum(choice) * count
            self._before.append(_summed_up(count))
        self._covered = np.zeros(shape, np.int64)
        self._covered[(slice(1, None),) * len(n)] = _summed_up(_summed_up(depth)[(slice(-1),) * len(n)])

    def common(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(elements that all have in common with the box [low, high), how many of them meet it); (dims, ...) each."""
        elements, count = np.zeros((2, *low.shape[1:]), np.int64)
        for choice, before in zip(self._choices, self._before, strict=True):
            sign = (-1) ** sum(choice)
            corner = tuple(low[d] if first else high[d] for d, first in enumerate(choice))
            elements += sign * self._covered[corner]
            # a box that meets it starts before its end, and does not stop before its start
            count += sign * before[tuple(low[d] if first else high[d] - 1 for d, first in enumerate(choice))]
        some = (low < high).all(axis=0)
        return np.where(some, elements, 0), np.where(some, count, 0)


def _summed_up(found: np.ndarray) -> np.ndarray:
    """Sums over all positions up to each."""
    for d in range(found.ndim):
        found = found.cumsum(axis=d)
    return found


def equal(n: Sequence[int], starts: np.ndarray, stops: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """How many boxes (dims, boxes) are just the box [low, high), in an array of shape n; (dims, ...) each."""
    extents = np.array(n)[:, None]
    inside = ((starts >= 0) & (stops <= extents) & (starts < stops)).all(axis=0)
    known, asked = np.zeros(np.count_nonzero(inside), np.int64), np.zeros(low.shape[1:], np.int64)
    for d, extent in enumerate(n):
        for mine, theirs in ((starts, low), (stops, high)):
            known, asked = known * (extent + 1) + mine[d, inside], asked * (extent + 1) + theirs[d]
    known.sort()
    found = np.searchsorted(known, asked, "right") - np.searchsorted(known, asked)
    return np.where((low < high).all(axis=0), found, 0)


# --- coordinates -----------------------------------------------------------------------------------------------------


def coordinates(blocks: np.ndarray, axes: Sequence[str], ranks: np.ndarray) -> np.ndarray:
    """The row-major coordinate along `axes` taken as one of each of `ranks`, where `blocks` (..., 6) are the blocks by
    AXES: (..., ranks), that of the rank modulo the size where there are fewer blocks than ranks.
    """
    at = np.zeros((*blocks.shape[:-1], len(ranks)), np.int64)
    for axis in axes:
        i = AXES.index(axis)
        parts, stride = blocks[..., i, None], np.prod(blocks[..., i + 1 :], axis=-1, dtype=np.int64)[..., None]
        at = at * parts + ranks // stride % parts
    return at


class Group(NamedTuple):
    """Dims whose cuts share axes, so that one coordinate along `axes` stands for all of them; maybe no dim at all.

    `places` gives for each dim its cut's coordinate for each of the group's, `taking` whether ranks there take part.
    """

    axes: tuple[str, ...]
    dims: tuple[int, ...]
    places: tuple[np.ndarray, ...]
    taking: np.ndarray


_Conditions = tuple[tuple[str, ...], tuple[int, ...], tuple[Cut, ...]]
"""Axes, the dims that they cut, and the masks that say who takes part along them."""


def groups(region: Region) -> list[Group]:
    """The groups of a region, by their first dim, those without any last; every axis of its partition is in one."""
    partition = region.partition
    joined: list[_Conditions] = []
    named = {axis for cut in (*region.cuts, *region.masks) for axis in cut.axes}
    parts: list[_Conditions] = [(cut.axes, (d,), ()) for d, cut in enumerate(region.cuts)]
    parts += [(mask.axes, (), (mask,)) for mask in region.masks]
    parts += [((axis,), (), ()) for axis in partition.parts() if axis not in named]
    for axes, dims, masks in parts:
        for other in [known for known in joined if set(known[0]) & set(axes)]:
            joined.remove(other)
            axes = (*other[0], *(axis for axis in axes if axis not in other[0]))
            dims, masks = (*other[1], *dims), (*other[2], *masks)
        joined.append((axes, dims, masks))
    found = [group(region, *one) for one in joined]
    return sorted(found, key=lambda one: min(one.dims, default=len(region.cuts)))


def group(region: Region, axes: tuple[str, ...], dims: tuple[int, ...], masks: Sequence[Cut]) -> Group:
    """Those dims and masks of a region, whose cuts are along `axes`, as one."""
    size = int(np.prod([region.partition[axis] for axis in axes], dtype=np.int64))
    taking = np.ones(size, bool)
    for mask in masks:
        occupied = np.zeros(len(mask.intervals), bool)
        occupied[list(mask.occupied)] = True
        taking &= occupied[_within(region.partition, axes, mask.axes)]
    dims = tuple(sorted(dims))
    return Group(axes, dims, tuple(_within(region.partition, axes, region.cuts[d].axes) for d in dims), taking)


def _within(partition: Partition, axes: tuple[str, ...], some: tuple[str, ...]) -> np.ndarray:
    """The coordinate along `some` of `axes`, for each coordinate along all of them."""
    sizes = tuple(partition[axis] for axis in axes)
    at = np.zeros(sizes, np.int64)
    for axis in some:
        i = axes.index(axis)
        at = at * sizes[i] + np.arange(sizes[i]).reshape((-1,) + (1,) * (len(axes) - i - 1))
    return at.ravel()
