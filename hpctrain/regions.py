"""Who owns and who wants which box of a tensor, and what of it travels between two ranks. No MPI, no arrays."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import chain, product
from typing import NamedTuple

from hpctrain.errors import PlanError
from hpctrain.partition import AXES, AxisNames, Box, Interval, Partition, Shape, empty, names, split, volume

# --- a box for every rank ------------------------------------------------------------------------------------------


class Segment(NamedTuple):
    """From position `at` on, what is wanted holds [start, stop) of the array, last element first if `flipped`."""

    at: int
    start: int
    stop: int
    flipped: bool


@dataclass(frozen=True)
class Cut:
    """How one dim is cut: its interval for each coordinate along `axes` (taken as one, row-major).

    `folded`, where given, says what stands in each interval where it leaves the array (periodic or reflected borders).
    """

    axes: tuple[str, ...]
    intervals: tuple[Interval, ...]
    folded: tuple[tuple[Segment, ...], ...] = ()

    def segments(self, index: int) -> tuple[Segment, ...]:
        """Where the interval at coordinate `index` comes from."""
        if self.folded:
            return self.folded[index]
        start, stop = self.intervals[index]
        return (Segment(start, start, stop, False),)

    @cached_property
    def occupied(self) -> frozenset[int]:
        """Coordinates whose interval is not empty."""
        return frozenset(i for i, (start, stop) in enumerate(self.intervals) if start < stop)

    @cached_property
    def _ascending(self) -> tuple[list[int], list[int]] | None:
        """Starts and stops, if neither ever falls and nothing is folded: those that meet are found by bisection."""
        starts, stops = [start for start, _ in self.intervals], [stop for _, stop in self.intervals]
        rising = not self.folded and starts == sorted(starts) and stops == sorted(stops)
        return (starts, stops) if rising else None

    def meeting(self, start: int, stop: int) -> frozenset[int]:
        """Coordinates that hold something of [start, stop)."""
        if start >= stop:
            return frozenset()
        if self._ascending is None:
            parts = ((i, segment) for i in self.occupied for segment in self.segments(i))
            return frozenset(i for i, segment in parts if max(segment.start, start) < min(segment.stop, stop))
        starts, stops = self._ascending
        found = range(bisect_right(stops, start), bisect_left(starts, stop))
        return frozenset(i for i in found if i in self.occupied)


class Share(NamedTuple):
    """A part of an owner's box that another wants: `source` in the array, `target` in what is wanted, dims reversed."""

    source: Box
    target: Box
    flipped: tuple[bool, ...]

    @property
    def moved(self) -> bool:
        """Whether it lies elsewhere in what is wanted than in the array: beyond a periodic or reflected border."""
        return self.source != self.target or any(self.flipped)


Hits = tuple[tuple[str, ...], frozenset[int]]


class Region:
    """A box for every rank of a partition, held as one Cut per dim: sizes add up over dims, they do not multiply.

    `masks` are cuts of other dims that also decide whether a rank takes part: empty there means empty here.
    """

    partition: Partition
    cuts: tuple[Cut, ...]
    masks: tuple[Cut, ...] = ()

    def box(self, rank: int) -> Box:
        """The box of `rank`. One that is empty along a dim keeps its other dims; beyond the partition all are empty."""
        if rank >= self.partition.size:
            return empty(len(self.cuts))
        box = tuple(slice(*cut.intervals[self.partition.index(cut.axes, rank)]) for cut in self.cuts)
        if volume(box) == 0 or all(self.partition.index(cut.axes, rank) in cut.occupied for cut in self.masks):
            return box
        return (slice(box[0].start, box[0].start), *box[1:])

    @property
    def boxes(self) -> list[Box]:
        """The box of every rank of the partition."""
        return [self.box(rank) for rank in range(self.partition.size)]

    def meeting(self, box: Box) -> list[int]:
        """Ranks that hold something of `box`, ascending. Looks at one dim at a time, never at all boxes."""
        if volume(box) == 0:
            return []
        found: list[Hits] = []
        for cut, s in zip(self.cuts, box, strict=True):
            self._both(found, (cut.axes, cut.meeting(s.start, s.stop)))
        for cut in self.masks:
            self._both(found, (cut.axes, cut.occupied))
        named = {axis for axes, _ in found for axis in axes}
        steps = []
        for axes, hits in found:
            offsets = self.partition.offsets(axes)
            steps.append([offsets[i] for i in hits])
        steps += [self.partition.offsets((axis,)) for axis in AXES if axis not in named]
        return sorted(sum(step) for step in product(*steps))

    def _both(self, found: list[Hits], more: Hits) -> None:
        """Add a condition to `found`, whose conditions share no axis: those that share one with it become one."""
        for other in [hits for hits in found if set(hits[0]) & set(more[0])]:
            found.remove(other)
            more = self._join(more, other)
        found.append(more)

    def _join(self, a: Hits, b: Hits) -> Hits:
        if a[0] == b[0]:
            return a[0], a[1] & b[1]
        axes = (*a[0], *(axis for axis in b[0] if axis not in a[0]))
        sizes = [self.partition[axis] for axis in axes]

        def index(of: tuple[str, ...], coords: tuple[int, ...]) -> int:
            at = 0
            for axis in of:
                at = at * self.partition[axis] + coords[axes.index(axis)]
            return at

        every = enumerate(product(*(range(n) for n in sizes)))
        return axes, frozenset(i for i, c in every if index(a[0], c) in a[1] and index(b[0], c) in b[1])

    def shares(self, rank: int, box: Box) -> list[Share]:
        """What `rank` holds of `box`, in an order that is the same wherever it is asked."""
        if volume(box) == 0 or volume(self.box(rank)) == 0:
            return []
        per_dim = []
        for cut, s in zip(self.cuts, box, strict=True):
            segments = cut.segments(self.partition.index(cut.axes, rank))
            per_dim.append([part for segment in segments if (part := _clip(segment, s)) is not None])
        return [
            Share(
                tuple(slice(s.start, s.stop) for s in parts),
                tuple(slice(s.at, s.at + s.stop - s.start) for s in parts),
                tuple(s.flipped for s in parts),
            )
            for parts in product(*per_dim)
        ]


def _clip(segment: Segment, s: slice) -> Segment | None:
    """The part of `segment` that comes from `s`."""
    start, stop = max(segment.start, s.start), min(segment.stop, s.stop)
    if start >= stop:
        return None
    skipped = segment.stop - stop if segment.flipped else start - segment.start
    return Segment(segment.at + skipped, start, stop, segment.flipped)


@dataclass(frozen=True)
class Distribution(Region):
    """One tensor cut over a partition: `axes[d]` is the grid axis, or the tuple of axes, that cuts dim d (None: uncut).

    A tuple cuts by its first axis, and each block again by the next, so that finer cuts nest in coarser ones.
    The boxes are disjoint and cover the tensor, as long as every axis the partition cuts is named.
    """

    shape: Shape
    axes: tuple[AxisNames, ...]
    partition: Partition

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise PlanError(f"distribution: {len(self.shape)} dims {self.shape}, but axes for {len(self.axes)}")

    @cached_property
    def cuts(self) -> tuple[Cut, ...]:  # type: ignore[override]
        """One Cut per dim; axes of one block are left out."""
        return tuple(self._cut(n, names(axes)) for n, axes in zip(self.shape, self.axes, strict=True))

    def _cut(self, n: int, axes: Iterable[str]) -> Cut:
        axes = tuple(axis for axis in axes if self.partition[axis] > 1)
        return _evenly(n, axes, tuple(self.partition[axis] for axis in axes))

    @property
    def replicated_axes(self) -> tuple[str, ...]:
        """Axes along which every rank holds the same block: gradients are summed over these."""
        named = {axis for entry in self.axes for axis in names(entry)}
        return tuple(axis for axis in AXES if self.partition[axis] > 1 and axis not in named)

    def is_first_replica(self, rank: int) -> bool:
        """Whether `rank` is the one that stands for its replicas: coordinate 0 on every replicated axis."""
        return rank < self.partition.size and self.partition.index(self.replicated_axes, rank) == 0


@lru_cache(maxsize=4096)
def _evenly(n: int, axes: tuple[str, ...], parts: tuple[int, ...]) -> Cut:
    """range(n) in balanced blocks, each again by the next axis. Many tensors of a network share it: ranks are many."""
    intervals: list[Interval] = [(0, n)]
    for count in parts:
        intervals = [
            (start + a, start + b)
            for start, stop in intervals
            for a, b in (split(stop - start, count, i) for i in range(count))
        ]
    return Cut(axes, tuple(intervals))


@dataclass(frozen=True)
class Wanted(Region):
    """What every rank of a partition wants of a tensor: boxes may overlap (halos) and leave the array (padding)."""

    partition: Partition
    cuts: tuple[Cut, ...]
    masks: tuple[Cut, ...] = ()


# --- what a box of work reads ----------------------------------------------------------------------------------------


BEYOND = 2**62
"""Past the end of any array."""

FILL, WRAP, REFLECT = "fill", "wrap", "reflect"
"""What stands where a needed interval leaves the array: a constant, the array again, or the array reversed."""


def unchanged(start: int, stop: int) -> Interval:
    """The same interval."""
    return start, stop


@dataclass(frozen=True)
class Along:
    """A tensor's interval along one dim, as a function of a dim of a layer's work: reach(start, stop).

    Where it follows from several dims of the work, `dim` is a tuple, and reach takes the interval of each in turn.
    """

    dim: int | tuple[int, ...]
    reach: Callable[..., Interval] = unchanged
    border: str = FILL

    @property
    def dims(self) -> tuple[int, ...]:
        """The dims of the work that it follows from."""
        return (self.dim,) if isinstance(self.dim, int) else self.dim


def folded(start: int, stop: int, n: int, border: str) -> tuple[Segment, ...]:
    """Where [start, stop) of an array of `n` comes from if its border wraps or reflects (the edge is not repeated)."""
    found = []
    period = n if border == WRAP else max(1, 2 * (n - 1))
    at = start
    while at < stop:
        i = at % period
        run = min(stop - at, n - i if i < n else period - i)
        found.append(
            Segment(at, i, i + run, False) if i < n else Segment(at, period - i - run + 1, period - i + 1, True)
        )
        at += run
    return tuple(found)


def touched(work: Distribution, dims: tuple[Along | None, ...], shape: Shape) -> Wanted:
    """The boxes of a tensor of `shape` that the blocks of `work` touch, empty blocks too; None is the whole dim."""
    return Wanted(work.partition, tuple(_touched(work, along, n) for along, n in zip(dims, shape, strict=True)))


def _touched(work: Distribution, along: Along | None, n: int) -> Cut:
    if along is None:
        return Cut((), ((0, n),))
    cuts = [work.cuts[d] for d in along.dims]
    if along.reach is unchanged and cuts[0].intervals[-1][1] <= n:
        return cuts[0]
    intervals = []
    for blocks in product(*(cut.intervals for cut in cuts)):
        at = blocks[0][0]
        intervals.append(along.reach(*chain(*blocks)) if all(a < b for a, b in blocks) else (at, at))
    beyond = any(start < 0 or stop > n for start, stop in intervals)
    fold = (
        tuple(folded(*interval, n, along.border) for interval in intervals) if beyond and along.border != FILL else ()
    )
    return Cut(tuple(axis for cut in cuts for axis in cut.axes), tuple(intervals), fold)


def wanted(work: Distribution, dims: tuple[Along | None, ...], shape: Shape) -> Wanted:
    """The boxes that `touched` gives, but ranks without work want nothing."""
    return replace(touched(work, dims, shape), masks=work.cuts)


def sent(have: Region, want: Region, rank: int) -> int:
    """Elements that `rank` sends to others when every rank r owns have.box(r) and wants want.box(r)."""
    mine = have.box(rank)
    others = (r for r in want.meeting(mine) if r != rank)
    return sum(volume(share.source) for r in others for share in want.shares(r, mine))


def received(have: Region, want: Region, rank: int) -> int:
    """Elements that others send to `rank`."""
    boxes = (have.box(r) for r in owners(have, want, rank) if r != rank)
    return sum(volume(share.source) for box in boxes for share in want.shares(rank, box))


def owners(have: Region, want: Region, rank: int) -> list[int]:
    """Ranks that own something of what `rank` wants, ascending."""
    spans = want.shares(rank, (slice(-BEYOND, BEYOND),) * len(want.cuts))
    return sorted({r for share in spans for r in have.meeting(share.source)})
