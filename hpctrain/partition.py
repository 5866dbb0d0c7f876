"""Intervals, boxes and process-grid coordinates. No MPI, no arrays: the planner uses it anywhere.

*axis* is an axis of the process grid, *dim* a dimension of a tensor, *box* a tuple of global slices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import isqrt, prod

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


def near_square(n: int) -> tuple[int, int]:
    """(rows, columns) with rows * columns = n, as near to a square as divisors allow, rows the fewer."""
    rows = next(rows for rows in range(isqrt(n), 0, -1) if n % rows == 0)
    return rows, n // rows


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


def boxes_of_run(shape: Shape, start: int, stop: int) -> list[tuple[Box, slice]]:
    """The elements `start` to `stop` of an array of `shape`, in C order, as boxes, each with its stretch of the run."""
    if start >= stop:
        return []
    if not shape:
        return [((), slice(0, 1))]
    inner = prod(shape[1:])
    found: list[tuple[Box, slice]] = []
    at = start
    while at < stop:
        row, first = divmod(at, inner)
        if first == 0 and stop - at >= inner:  # whole rows
            rows = (stop - at) // inner
            found.append(((slice(row, row + rows), *whole(shape[1:])), slice(at - start, at - start + rows * inner)))
            at += rows * inner
            continue
        last = min(inner, first + stop - at)
        for box, stretch in boxes_of_run(shape[1:], first, last):
            moved = slice(stretch.start + at - start, stretch.stop + at - start)
            found.append(((slice(row, row + 1), *box), moved))
        at += last - first
    return found


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
        return {axis: n for axis, n in zip(AXES, self.shape, strict=True) if n > 1}

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


def names(axes: AxisNames) -> tuple[str, ...]:
    """The axes of one dim as a tuple."""
    return () if axes is None else (axes,) if isinstance(axes, str) else axes
