"""1-D tables of an edge for many partitions at once: what ranks have in common along a dim, by the cuts of that dim.

Partitions that cut a dim into the same blocks, at the same distance in rank, share a class; there are few of these, and
all that a pair of partitions exchanges is a product of the rows of its classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from hpctrain.graph import Node
from hpctrain.layers.base import Dims
from hpctrain.partition import AXES, AxisNames, Partition, Shape, names
from hpctrain.planner.overlaps import Overlaps, coordinates, group
from hpctrain.regions import Distribution, touched


class Ends(NamedTuple):
    """A tensor of `shape` whose dims its owners cut by `axes`, and how what is wanted of it follows from a work.

    `masked` says whether ranks without work want nothing.
    """

    shape: Shape
    axes: tuple[AxisNames, ...]
    needs: Dims
    work: Shape
    work_axes: tuple[AxisNames, ...]
    masked: bool = True

    @classmethod
    def between(cls, producer: Node, consumer: Node, slot: int) -> Ends:
        """Those of the output of `producer` that is input `slot` of `consumer`."""
        layer, shapes = consumer.layer, consumer.input_shapes
        axes = producer.layer.output_axes(*producer.input_shapes)
        needs = layer.needs(*shapes)[slot]
        return cls(producer.shape, axes, needs, layer.work_shape(*shapes), layer.work_axes(*shapes))

    @classmethod
    def partial(cls, node: Node) -> Ends:
        """Those of the sums that every rank makes a part of."""
        layer, shapes = node.layer, node.input_shapes
        axes, produced = layer.output_axes(*shapes), layer.produces(*shapes)
        return cls(node.shape, axes, produced, layer.work_shape(*shapes), layer.work_axes(*shapes), masked=False)


class Table(NamedTuple):
    """What dims with common axes contribute, float64 (classes of owners, classes of who wants, ranks).

    `have` (n,) and `want` (m,) are the class of each partition. Of each rank: what is wanted of its `own` block, and of
    that what is `kept` where it is, what is `wanted` of all blocks, and `given` of its block to all; how many `owners`
    and `wanters` that makes; and what each of its neighbours gives and takes (neighbours, ...).
    """

    have: np.ndarray
    want: np.ndarray
    own: np.ndarray
    kept: np.ndarray
    wanted: np.ndarray
    given: np.ndarray
    owners: np.ndarray
    wanters: np.ndarray
    gives: np.ndarray
    takes: np.ndarray


def tables(
    ends: Ends, p: np.ndarray, q: np.ndarray, ranks: np.ndarray, neighbours: np.ndarray, counts: bool
) -> list[Table]:
    """The tables of all dims, for owners by the partitions `p` (n, 6) and who wants by `q` (m, 6).

    `neighbours` (any, ranks) are what each of `ranks` has beside it; -1 is none. `owners` and `wanters` are only there
    if `counts`.
    """
    return [_table(ends, dims, p, q, ranks, neighbours, counts) for dims in joined(ends)]


class Joined(NamedTuple):
    """Dims of a tensor whose cuts may share axes, and dims of the work with these axes."""

    axes: tuple[str, ...]
    dims: tuple[int, ...]
    work: tuple[int, ...]


def joined(ends: Ends) -> list[Joined]:
    """All dims, and those of the work that none of them follows, by the axes that they share."""
    parts = []
    followed = {w for along in ends.needs if along is not None for w in along.dims}
    for d, along in enumerate(ends.needs):
        work = () if along is None else along.dims
        parts.append(Joined(tuple(a for w in work for a in names(ends.work_axes[w])), (d,), work))
    parts += [Joined(names(axes), (), (w,)) for w, axes in enumerate(ends.work_axes) if w not in followed]
    found: list[Joined] = []
    for axes, dims, work in parts:
        for other in [known for known in found if set(known.axes) & set(axes)]:
            found.remove(other)
            axes = (*other.axes, *(axis for axis in axes if axis not in other.axes))
            dims, work = (*other.dims, *dims), (*other.work, *work)
        found.append(Joined(axes, dims, tuple(dict.fromkeys(work))))
    return found


# --- classes of partitions -------------------------------------------------------------------------------------------


def _classes(blocks: np.ndarray, axes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(one partition of each class, the class of each partition): alike are the blocks and strides along `axes`."""
    columns = [AXES.index(axis) for axis in axes]
    strides = np.stack([np.prod(blocks[:, i + 1 :], axis=1, dtype=np.int64) for i in columns], 1) if columns else None
    if strides is None:
        return blocks[:1], np.zeros(len(blocks), np.int32)
    cut = blocks[:, columns]
    keys = np.concatenate([cut, np.where(cut > 1, strides, 0)], 1)
    _, first, which = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    return blocks[first], which.ravel().astype(np.int32)


class Cuts(NamedTuple):
    """What dims are cut into along some axes: Overlaps of which only one end counts, by dim; who takes part, by
    coordinate."""

    dims: tuple[Overlaps, ...]
    taking: np.ndarray


@lru_cache(maxsize=2**14)
def _owned(n: int, axes: tuple[str, ...], blocks: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """First and last + 1 of the block at each coordinate, int32."""
    partition = Partition.of(dict(zip(axes, blocks, strict=True)))
    cut = Distribution((n,), (axes,), partition).cuts[0]
    low, high = np.array(cut.intervals, np.int32).T
    return low, high


class Wishes(NamedTuple):
    """What is wanted of some dims at each coordinate of a group, int32: segments (dims, segments, coordinates), the
    intervals themselves (2, dims, coordinates), and whether ranks there take part (coordinates,).
    """

    starts: np.ndarray
    stops: np.ndarray
    outer: np.ndarray
    taking: np.ndarray


@lru_cache(maxsize=2**14)
def _wishes(ends: Ends, dims: Joined, blocks: tuple[int, ...]) -> Wishes:
    """Those of a cut of the group's axes into `blocks`; `ends` holds the group's dims alone."""
    partition = Partition.of(dict(zip(dims.axes, blocks, strict=True)))
    work = Distribution(ends.work, ends.work_axes, partition)
    region = touched(work, ends.needs, ends.shape)
    cut = tuple(axis for axis in dims.axes if partition[axis] > 1)
    found = group(region, cut, tuple(range(len(ends.shape))), work.cuts if ends.masked else ())
    overlaps = [Overlaps.of(one, one) for one in region.cuts]
    size, segments = len(found.taking), max([len(one.starts) for one in overlaps], default=1)
    starts, stops = np.zeros((2, len(overlaps), segments, size), np.int32)
    outer = np.zeros((2, len(overlaps), size), np.int32)
    for d, (one, place) in enumerate(zip(overlaps, found.places, strict=True)):
        starts[d, : len(one.starts)], stops[d, : len(one.stops)] = one.starts[:, place], one.stops[:, place]
        outer[:, d] = one.outer[:, place]
    n = np.array(ends.shape, np.int32).reshape(-1, 1, 1)
    np.clip(starts, 0, n, out=starts)  # what lies beyond the array nobody has
    np.clip(stops, 0, n, out=stops)
    return Wishes(starts, stops, outer, found.taking.astype(np.int32))


def _alone(ends: Ends, dims: Joined) -> Ends:
    """`ends` of a group's dims alone: the same for many layers."""
    place = {w: i for i, w in enumerate(dims.work)}

    def moved(d: int) -> object:
        along = ends.needs[d]
        if along is None:
            return None
        at = tuple(place[w] for w in along.dims)
        return replace(along, dim=at[0] if len(at) == 1 else at)

    needs = tuple(moved(d) for d in dims.dims)
    shape, axes = (tuple(of[d] for d in dims.dims) for of in (ends.shape, ends.axes))
    work, work_axes = (tuple(of[w] for w in dims.work) for of in (ends.work, ends.work_axes))
    return Ends(shape, axes, needs, work, work_axes, ends.masked)  # type: ignore[arg-type]


# --- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """A group's classes: `mine` (dims, 2, classes, ranks) are the blocks of their ranks, `wishes` what these want,
    shaped (..., classes, ranks), and `cuts` of each class of wishes all coordinates.
    """

    ends: Ends
    owned: list[list[tuple[np.ndarray, np.ndarray]]]
    mine: np.ndarray
    cuts: list[Wishes]
    wishes: Wishes
    distinct: np.ndarray


def _table(
    ends: Ends,
    dims: Joined,
    p: np.ndarray,
    q: np.ndarray,
    ranks: np.ndarray,
    neighbours: np.ndarray,
    counts: bool,
) -> Table:
    alone = _alone(ends, dims)
    owner_axes = [names(axes) for axes in alone.axes]
    have, have_class = _classes(p, [axis for axes in owner_axes for axis in axes])
    want, want_class = _classes(q, dims.axes)
    every = np.concatenate([ranks, *neighbours])
    place = coordinates(want, dims.axes, every)
    cuts = [
        _wishes(alone, Joined(dims.axes, (), ()), tuple(int(row[AXES.index(axis)]) for axis in dims.axes))
        for row in want
    ]
    segments = max(cut.starts.shape[1] for cut in cuts)
    wishes = Wishes(
        *(
            np.stack(part, -2)
            for part in zip(*(_at(cut, c, segments) for cut, c in zip(cuts, place, strict=True)), strict=True)
        )
    )
    mine = np.zeros((2, len(owner_axes), len(have), len(every)), np.int32)
    for d, (n, axes) in enumerate(zip(alone.shape, owner_axes, strict=True)):
        for i, (row, b) in enumerate(zip(have, coordinates(have, axes, every), strict=True)):
            low, high = _owned(n, axes, tuple(int(row[AXES.index(axis)]) for axis in axes))
            mine[0, d, i], mine[1, d, i] = low[b], high[b]
    r = len(ranks)
    own = _common(mine[..., :r], _cut(wishes, 0, r))
    inside = (mine[0, :, :, None, :r] >= wishes.outer[0, :, None, :, :r]) & (
        mine[1, :, :, None, :r] <= wishes.outer[1, :, None, :, :r]
    )
    kept = np.prod(np.where(inside, (mine[1] - mine[0])[:, :, None, :r], 0), axis=0, dtype=np.float64)
    kept = kept * wishes.taking[:, :r]
    wanted = (
        np.prod((wishes.stops - wishes.starts).sum(1), axis=0, dtype=np.float64)[None, :, :r] * wishes.taking[:, :r]
    )
    given, wanters = _over_wishes(mine[..., :r], cuts, counts)
    owners = _over_owners(alone, have, owner_axes, _cut(wishes, 0, r)) if counts else own[:0]
    gives, takes = [], []
    for t in range(1, len(neighbours) + 1):
        beside = slice(t * r, (t + 1) * r)
        gives.append(_common(mine[..., beside], _cut(wishes, 0, r)))
        takes.append(_common(mine[..., :r], _cut(wishes, t * r, (t + 1) * r)))
    none = np.zeros((0, *own.shape))
    return Table(
        have_class,
        want_class,
        own,
        kept,
        np.broadcast_to(wanted, own.shape),
        given,
        owners,
        wanters,
        np.stack(gives) if gives else none,
        np.stack(takes) if takes else none,
    )


def _at(cut: Wishes, c: np.ndarray, segments: int) -> Wishes:
    more = ((0, 0), (0, segments - cut.starts.shape[1]), (0, 0))
    return Wishes(np.pad(cut.starts, more)[..., c], np.pad(cut.stops, more)[..., c], cut.outer[..., c], cut.taking[c])


def _cut(wishes: Wishes, start: int, stop: int) -> Wishes:
    return Wishes(*(part[..., start:stop] for part in wishes))


def _common(mine: np.ndarray, wishes: Wishes) -> np.ndarray:
    """Elements that blocks (2, dims, classes, ranks) and wishes have in common: (classes, classes, ranks)."""
    found = np.broadcast_to(wishes.taking.astype(np.float64), (mine.shape[2], *wishes.taking.shape))
    low, high = mine[:, :, :, None]
    for d in range(len(low)):
        n = 0
        for starts, stops in zip(wishes.starts[d], wishes.stops[d], strict=True):
            n = n + np.maximum(0, np.minimum(high[d], stops) - np.maximum(low[d], starts))
        found = found * n
    return np.ascontiguousarray(found)


def _over_wishes(mine: np.ndarray, cuts: Sequence[Wishes], counts: bool) -> tuple[np.ndarray, np.ndarray]:
    """Of each block, what all that want it take together, and how many they are: (classes, classes, ranks)."""
    low, high = mine
    given = np.zeros((mine.shape[2], len(cuts), mine.shape[3]))
    wanters = np.zeros_like(given)
    for j, cut in enumerate(cuts):
        n = np.broadcast_to(cut.taking, (*low.shape[1:], len(cut.taking)))
        for d in range(len(low)):
            a, b = low[d, ..., None], high[d, ..., None]
            n = n * sum(
                np.maximum(0, np.minimum(b, stops) - np.maximum(a, starts))
                for starts, stops in zip(cut.starts[d], cut.stops[d], strict=True)
            )
        given[:, j] = n.sum(-1)
        wanters[:, j] = (n > 0).sum(-1)
    return given, wanters if counts else given[:0]


def _over_owners(ends: Ends, have: np.ndarray, axes: Sequence[tuple[str, ...]], wishes: Wishes) -> np.ndarray:
    """How many blocks what a rank wants lies in: (classes, classes, ranks)."""
    found = np.broadcast_to(wishes.taking.astype(np.float64), (len(have), *wishes.taking.shape)).copy()
    for d, (n, by) in enumerate(zip(ends.shape, axes, strict=True)):
        for i, row in enumerate(have):
            low, high = _owned(n, by, tuple(int(row[AXES.index(axis)]) for axis in by))
            meets = np.zeros((*wishes.taking.shape, len(low)), bool)
            for starts, stops in zip(wishes.starts[d], wishes.stops[d], strict=True):
                meets |= np.minimum(high, stops[..., None]) > np.maximum(low, starts[..., None])
            found[i] *= meets.sum(-1)
    return found
