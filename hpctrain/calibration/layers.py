"""How long layers take on the blocks that plans give them, and what follows for layers that were not measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

from hpctrain.backends.base import Backend
from hpctrain.calibration.rehearsal import Rehearsal
from hpctrain.config import Optim
from hpctrain.errors import PlanError
from hpctrain.graph import Graph
from hpctrain.machine import Compute, Kernel
from hpctrain.partition import AXES, Partition, extent
from hpctrain.planner.compute import Work, block_name, by_formula, kernel_key, work_of
from hpctrain.planner.layout import differentiable
from hpctrain.planner.plan import Plan, extents, uniform
from hpctrain.planner.schedule import Unit
from hpctrain.precision import TYPES

if TYPE_CHECKING:
    from mpi4py import MPI

ALL_GRIDS = 4
"""Ranks up to which every grid of them is rehearsed."""

DIGITS = 4
"""Significant ones of what is written: no clock here is better."""

Pair = tuple[float, float]
"""Seconds of forward and of backward."""


# --- which plans -----------------------------------------------------------------------------------------------------


def plans(graph: Graph, ranks: int) -> list[Plan]:
    """The plans to rehearse for runs on so many ranks, the most telling first: uncut, cut in two along each axis, every
    grid of few ranks, and each axis by its further powers of two.
    """
    axes = [axis for axis in AXES if any(axis in extents(node) for node in graph)]
    asked = [Partition(), *(Partition.of({axis: 2}) for axis in axes)]
    asked += grids(axes, ranks) if 2 < ranks <= ALL_GRIDS else []
    parts = 4
    while parts <= ranks:
        asked += [Partition.of({axis: parts}) for axis in axes]
        parts *= 2
    found: dict[tuple[Partition, ...], Plan] = {}
    for grid in dict.fromkeys(asked):
        try:
            plan = uniform(graph, grid)
            plan.check(graph)
        except PlanError:  # this network cannot be cut like this
            continue
        found.setdefault(tuple(plan.partitions.values()), plan)
    return list(found.values())


def grids(axes: Sequence[str], ranks: int) -> list[Partition]:
    """Every grid of `ranks` blocks along these axes."""

    def cut(left: int, rest: Sequence[str]) -> Iterator[dict[str, int]]:
        if not rest:
            yield from [{}] if left == 1 else []
            return
        for n in (n for n in range(1, left + 1) if left % n == 0):
            yield from ({rest[0]: n} | more for more in cut(left // n, rest[1:]))

    return [Partition.of(parts) for parts in cut(ranks, axes)]


# --- what they took --------------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """A unit on a block: what it does there, and what it took."""

    work: Work
    seconds: Pair


class Times:
    """What units have taken, by key and block, from any number of steps of any number of plans of one network."""

    def __init__(self, graph: Graph, precision: str, backend: str) -> None:
        self.graph, self.precision, self.backend = graph, precision, backend
        self._varied = differentiable(graph)
        self._found: dict[str, dict[str, list[np.ndarray]]] = {}
        self._units: dict[str, Unit] = {}

    def add(self, rehearsal: Rehearsal, taken: np.ndarray) -> None:
        """What steps of a plan took: (steps, ranks, units, 2) seconds.

        Of each unit the median counts, the mean over ranks. What disturbs many steps, each in another unit, medians of
        units do not show, so they are scaled to the median of whole steps on the rank where that is longest: others
        wait for it. Units that are the same have their mean.
        """
        units = np.median(taken, axis=0).mean(axis=0)
        steps = np.median(taken.sum(axis=(2, 3)), axis=0)
        units *= steps.max() / units.sum()
        alike: dict[tuple[str, str], list[np.ndarray]] = {}
        for unit, seconds in zip(rehearsal.schedule.units, units, strict=True):
            key = kernel_key(self.graph, unit, self._varied, self.precision, self.backend)
            block = block_name(extent(rehearsal.layouts[unit.head].work.box(0)))
            alike.setdefault((key, block), []).append(seconds)
            self._units.setdefault(key, unit)
        for (key, block), several in alike.items():
            self._found.setdefault(key, {}).setdefault(block, []).append(np.mean(several, axis=0))

    def blocks(self, key: str) -> dict[str, Pair]:
        """{block: seconds} of a unit, the median over the plans that have it."""
        found = {block: np.median(taken, axis=0).tolist() for block, taken in self._found[key].items()}
        return {block: (_rounded(forward), _rounded(backward)) for block, (forward, backward) in found.items()}

    def kernels(self, at_once: int) -> tuple[Kernel, ...]:
        """All units, as a machine's file has them."""
        return tuple(Kernel(key, at_once, self.blocks(key)) for key in self._found)

    def measured(self) -> list[Measured]:
        """All of them, each on each block."""
        itemsize, found = TYPES[self.precision].itemsize, []
        for key, unit in self._units.items():
            for block, seconds in self.blocks(key).items():
                at = np.array([[int(n) for n in block.split("x")]])
                found.append(Measured(work_of(self.graph, unit, at, itemsize, self._varied), seconds))
        return found


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.{DIGITS}g}")


class Rehearsed(NamedTuple):
    """Steps of some plans."""

    times: Times
    update: float
    """Seconds per byte of weights that the optimizer takes."""
    left_out: int
    """Plans for which there was no time."""


def rehearse(
    comm: MPI.Intracomm,
    graph: Graph,
    asked: Sequence[Plan],
    backend: Backend,
    precision: str,
    rules: Optim,
    seconds: float,
    rounds: int | None = None,
) -> Rehearsed:
    """Steps of each plan by all ranks of `comm` at the same time, each alone, for about so many seconds. Collective."""
    alone = cast("MPI.Intracomm", comm.Split(comm.rank, 0))
    times, updates, begin = Times(graph, precision, backend.name), list[float](), perf_counter()
    done, longest = 0, 0.0
    for plan in asked:
        left = comm.bcast(seconds - (perf_counter() - begin))
        if done and left < 2 * longest:
            break
        started, share = perf_counter(), left / (len(asked) - done)
        rehearsal = Rehearsal(graph, plan, alone, backend, precision, rules)
        comm.allgather(rehearsal.run())
        taken = []
        for _ in range(rounds or _rounds(comm.bcast(perf_counter() - started), share)):
            taken.append(comm.allgather(rehearsal.run()))
            updates.append(rehearsal.update)
        times.add(rehearsal, np.array(taken))
        done += 1
        longest = max(longest, perf_counter() - started)
    alone.Free()
    return Rehearsed(times, _rounded(median(updates)), len(asked) - done)


def _rounds(first: float, share: float) -> int:
    """How many steps to take in `share` seconds, where binding and a first step took `first`."""
    return max(3, min(15, int((share - first) / max(first, 1e-3))))


# --- a formula for the others ----------------------------------------------------------------------------------------

INTENSE = 8.0
"""Operations per byte from which on a layer's speed is taken for that of its arithmetic."""


def compute(found: Iterable[Measured]) -> Compute:
    """Speeds by which all that was measured takes as long in the sum: bandwidth by layers that compute little, `flops`
    and the shares of it, by decades of operations, by those that compute much.
    """
    ways = [
        (float(operations[0]), float(moved[0]), seconds)
        for each in found
        for operations, moved, seconds in zip(each.work.operations, each.work.moved, each.seconds, strict=True)
        if seconds > 0
    ]
    call = min(seconds for _, _, seconds in ways)
    light = [(moved, t - call) for n, moved, t in ways if n < INTENSE * moved and t > 2 * call]
    bandwidth = sum(n for n, _ in light) / sum(t for _, t in light) if light else 1e10
    decades: dict[int, list[Pair]] = {}
    for n, moved, t in ways:
        if n >= INTENSE * moved and t > 2 * call:
            decades.setdefault(round(np.log10(n)), []).append((n, t - call))
    sums = [(decade, sum(n for n, _ in of), sum(t for _, t in of)) for decade, of in sorted(decades.items())]
    rates = rising(sums)
    most = rates[-1][1] if rates else bandwidth
    curve = tuple((10.0**decade, _rounded(rate / most)) for decade, rate in rates) or ((1.0, 1.0),)
    return Compute(_rounded(most), _rounded(bandwidth), curve, _rounded(call))


def rising(sums: Sequence[tuple[int, float, float]]) -> list[tuple[int, float]]:
    """(decade, operations, seconds) to (decade, operations per second): where a rate falls, neighbours have theirs
    together.
    """
    pools: list[tuple[list[int], float, float]] = []
    for decade, operations, seconds in sums:
        pools.append(([decade], operations, seconds))
        while len(pools) > 1 and pools[-2][1] / pools[-2][2] >= pools[-1][1] / pools[-1][2]:
            (before, n, t), (after, m, u) = pools[-2:]
            pools[-2:] = [(before + after, n + m, t + u)]
    return [(decade, n / t) for decades, n, t in pools for decade in decades]


def deviation(known: Compute, found: Iterable[Measured]) -> float:
    """By which factor the formula is off: the geometric mean over layers, weighted by their time."""
    total = off = 0.0
    for each in found:
        for formula, seconds in zip(by_formula(known, each.work)[0].tolist(), each.seconds, strict=True):
            if seconds > 0:
                total, off = total + seconds, off + seconds * abs(float(np.log(formula / seconds)))
    return float(np.exp(off / total)) if total else 1.0
