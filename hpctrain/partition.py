"""Who owns what: intervals, boxes and process-grid coordinates. No MPI, no arrays: the planner uses it anywhere.

*axis* is an axis of the process grid, *dim* a dimension of a tensor, *box* a tuple of global slices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from math import prod

from hpctrain.errors import PlanError

AXES = ("batch", "depth", "height", "width", "channel", "contraction")

Shape = tuple[int, ...]
Box = tuple[slice, ...]
Interval = tuple[int, int]
AxisNames = str | tuple[str, ...] | None


# --- intervals and boxes ---------------------------------------------------------------------------------------


def split(n: int, parts: int, index: int) -> Interval:
    """Block `index` of `parts` balanced blocks of range(n); the first n % parts are one longer."""
    q, r = divmod(n, parts)
    start = index * q + min(index, r)
    return start, start + q + (index < r)


def extent(box: Box) -> Shape:
    """Number of elements along each dim; an inverted slice counts as empty."""
    return tuple(max(0, s.stop - s.start) for s in box)


def volume(box: Box) -> int:
    """Number of elements in `box`."""
    return prod(extent(box))


def overlap(a: Box, b: Box) -> Box | None:
    """The box common to `a` and `b`, or None where they do not meet."""
    box = tuple(slice(max(i.start, j.start), min(i.stop, j.stop)) for i, j in zip(a, b, strict=True))
    return box if all(s.start < s.stop for s in box) else None


def within(box: Box, origin: Box) -> Box:
    """`box` in the local coordinates of the array that fills `origin`."""
    return tuple(slice(s.start - o.start, s.stop - o.start) for s, o in zip(box, origin, strict=True))


def contains(outer: Box, inner: Box) -> bool:
    """Whether `inner` lies inside `outer` (an empty box lies inside any)."""
    return volume(inner) == 0 or all(o.start <= i.start and i.stop <= o.stop for o, i in zip(outer, inner, strict=True))


def whole(shape: Shape) -> Box:
    """The box of a tensor that is not cut."""
    return tuple(slice(0, n) for n in shape)


def empty(ndim: int) -> Box:
    """A box without elements."""
    return (slice(0, 0),) * ndim


# --- the process grid of a layer ---------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class Partition:
    """Number of blocks along each axis of the process grid: Pc = batch, Pr = the product of the rest."""

    batch: int = 1
    depth: int = 1
    height: int = 1
    width: int = 1
    channel: int = 1
    contraction: int = 1

    def __post_init__(self) -> None:
        for axis, parts in zip(AXES, self.shape, strict=True):
            if not isinstance(parts, int) or parts < 1:
                raise PlanError(f"partition: {axis} = {parts!r}; give a whole number of blocks, 1 or more")

    @classmethod
    def of(cls, parts: Mapping[str, int]) -> Partition:
        """A partition from {axis: blocks}; unnamed axes are not cut. Raises PlanError on an unknown axis."""
        if unknown := sorted(set(parts) - set(AXES)):
            raise PlanError(f"partition: no axis {unknown[0]!r}; the axes are {', '.join(AXES)}")
        return cls(**parts)

    def parts(self) -> dict[str, int]:
        """{axis: blocks} of the axes that are cut."""
        return {axis: n for axis, n in asdict(self).items() if n > 1}

    @property
    def shape(self) -> Shape:
        """Blocks per axis, in the order of AXES."""
        return (self.batch, self.depth, self.height, self.width, self.channel, self.contraction)

    @property
    def size(self) -> int:
        """Number of ranks that hold a block."""
        return prod(self.shape)

    @property
    def pr(self) -> int:
        """Ranks that cut model and domain."""
        return self.size // self.batch

    @property
    def pc(self) -> int:
        """Ranks that cut the batch."""
        return self.batch

    def __getitem__(self, axis: str) -> int:
        return self.shape[AXES.index(axis)]

    def coords(self, rank: int) -> Shape:
        """Grid coordinates of `rank`, row-major as MPI_Cart_create with reorder=False gives them."""
        coords = []
        for n in reversed(self.shape):
            rank, c = divmod(rank, n)
            coords.append(c)
        return tuple(reversed(coords))

    def strides(self) -> dict[str, int]:
        """Distance in rank between neighbours along each axis."""
        return {axis: prod(self.shape[i + 1 :]) for i, axis in enumerate(AXES)}

    def index(self, axes: tuple[str, ...], rank: int) -> int:
        """Row-major coordinate of `rank` along several axes taken as one."""
        coords, at = self.coords(rank), 0
        for axis in axes:
            at = at * self[axis] + coords[AXES.index(axis)]
        return at

    def offsets(self, axes: tuple[str, ...]) -> list[int]:
        """What each coordinate along `axes` (taken as one, row-major) adds to the rank."""
        strides = self.strides()
        steps = [[c * strides[axis] for c in range(self[axis])] for axis in axes]
        return [sum(step) for step in product(*steps)]

    def __str__(self) -> str:
        return " x ".join(f"{axis}={n}" for axis, n in self.parts().items()) or "1 rank"


# --- a box for every rank ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """How one dim is cut: its interval for each coordinate along `axes` (taken as one, row-major)."""

    axes: tuple[str, ...]
    intervals: tuple[Interval, ...]

    @cached_property
    def occupied(self) -> frozenset[int]:
        """Coordinates whose interval is not empty."""
        return frozenset(i for i, (start, stop) in enumerate(self.intervals) if start < stop)

    def meeting(self, start: int, stop: int) -> frozenset[int]:
        """Coordinates whose interval meets [start, stop)."""
        return frozenset(i for i, (a, b) in enumerate(self.intervals) if max(a, start) < min(b, stop))


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
        """Ranks whose box meets `box`, ascending. Looks at one dim at a time, never at all boxes."""
        if volume(box) == 0:
            return []
        found: dict[tuple[str, ...], frozenset[int]] = {}
        for cut, s in zip(self.cuts, box, strict=True):
            hits = cut.meeting(s.start, s.stop)
            found[cut.axes] = found.get(cut.axes, hits) & hits
        for cut in self.masks:
            found[cut.axes] = found.get(cut.axes, cut.occupied) & cut.occupied
        named = {axis for axes in found for axis in axes}
        steps = [[self.partition.offsets(axes)[i] for i in hits] for axes, hits in found.items()]
        steps += [self.partition.offsets((axis,)) for axis in AXES if axis not in named]
        return sorted(sum(step) for step in product(*steps))

    def overlaps(self, box: Box) -> Iterator[tuple[int, Box]]:
        """(rank, common box) for every rank whose box meets `box`, by ascending rank."""
        for rank in self.meeting(box):
            if common := overlap(self.box(rank), box):
                yield rank, common


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
        intervals: list[Interval] = [(0, n)]
        for axis in axes:
            parts = self.partition[axis]
            intervals = [
                (start + a, start + b)
                for start, stop in intervals
                for a, b in (split(stop - start, parts, i) for i in range(parts))
            ]
        return Cut(axes, tuple(intervals))

    @property
    def replicated_axes(self) -> tuple[str, ...]:
        """Axes along which every rank holds the same block: gradients are summed over these."""
        named = {axis for entry in self.axes for axis in names(entry)}
        return tuple(axis for axis in AXES if self.partition[axis] > 1 and axis not in named)

    def is_first_replica(self, rank: int) -> bool:
        """Whether `rank` is the one that stands for its replicas: coordinate 0 on every replicated axis."""
        return rank < self.partition.size and self.partition.index(self.replicated_axes, rank) == 0


@dataclass(frozen=True)
class Wanted(Region):
    """What every rank of a partition wants of a tensor: boxes may overlap (halos) and leave the array (padding)."""

    partition: Partition
    cuts: tuple[Cut, ...]
    masks: tuple[Cut, ...] = ()


def names(axes: AxisNames) -> tuple[str, ...]:
    """The axes of one dim as a tuple."""
    return () if axes is None else (axes,) if isinstance(axes, str) else axes


# --- what a box of work reads ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Along:
    """A tensor's interval along one dim, as a function of one dim of a layer's work: reach(start, stop)."""

    dim: int
    reach: Callable[[int, int], Interval] = lambda start, stop: (start, stop)


def touched(work: Distribution, dims: tuple[Along | None, ...], shape: Shape) -> Wanted:
    """The boxes of a tensor of `shape` that the blocks of `work` touch, empty blocks too; None is the whole dim."""
    cuts = []
    for along, n in zip(dims, shape, strict=True):
        if along is None:
            cuts.append(Cut((), ((0, n),)))
        else:
            cut = work.cuts[along.dim]
            cuts.append(Cut(cut.axes, tuple(along.reach(a, b) if a < b else (a, a) for a, b in cut.intervals)))
    return Wanted(work.partition, tuple(cuts))


def wanted(work: Distribution, dims: tuple[Along | None, ...], shape: Shape) -> Wanted:
    """The boxes that `touched` gives, but ranks without work want nothing."""
    return replace(touched(work, dims, shape), masks=work.cuts)


def traffic(have: Region, want: Region, rank: int) -> int:
    """Elements that `rank` sends to other ranks when every rank r owns have.box(r) and wants want.box(r)."""
    return sum(volume(box) for other, box in want.overlaps(have.box(rank)) if other != rank)
