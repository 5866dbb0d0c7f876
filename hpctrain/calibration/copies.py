"""What ranks of a host take to read each other's memory: real exchanges of halos and redistributions, timed."""

from __future__ import annotations

from math import prod
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hpctrain.comm.exchange import Arrays, Exchange
from hpctrain.comm.neighbours import Neighbours
from hpctrain.machine import Copies
from hpctrain.partition import Partition, Shape, contains, extent, volume, within
from hpctrain.regions import Along, Distribution, Region, wanted

if TYPE_CHECKING:
    from mpi4py import MPI

FLOAT = np.dtype(np.float32)

RUNS = (16, 64, 512, 8192)
"""Floats side by side in what a rank reads of another."""

PARTS = (2, 64, 2048)
"""How many such runs it reads of each other rank."""

GATHERED = (4, 16, 64)
"""Floats of a position on one rank, where all ranks want all of them, as channels are gathered."""

EDGES = (5, 16, 45)
"""Of cubes of such positions, padded on all sides, as convolutions read them."""

MOST = 1 << 23
"""Floats of a rank's block at most."""


ITERATIONS = 20
"""Of a fit."""


class Case(NamedTuple):
    """A transfer: who has what, who wants what, and what a rank copies forward (bytes, runs)."""

    have: Region
    want: Region
    nbytes: int
    runs: int


def cases(ranks: int) -> list[Case]:
    """Redistributions from cuts of the first dim to cuts of the second one, gathers of channels, halos of rows."""
    found = []
    for run in RUNS:
        for parts in PARTS:
            if ranks * parts * run > MOST:
                continue
            shape = ranks * parts, ranks, run
            have = Distribution(shape, ("batch", None, None), Partition(batch=ranks))
            other = Distribution(shape, (None, "batch", None), Partition(batch=ranks))
            found.append(Case(have, other, ranks * parts * run * FLOAT.itemsize, ranks * parts))
    for run in GATHERED:
        for n in EDGES:
            if ranks * n**3 * run > MOST:
                continue
            have = Distribution((n, n, n, ranks * run), (None, None, None, "batch"), Partition(batch=ranks))
            padded = [Along(d, _reach(1)) for d in range(3)]
            runs = (ranks - 1) * n**3
            found.append(Case(have, wanted(have, (*padded, None), have.shape), runs * run * FLOAT.itemsize, runs))
    for rows in (1, 4):
        for run in (512, 8192, 65536):
            have = Distribution((4 * rows * ranks, run), ("batch", None), Partition(batch=ranks))
            want = wanted(have, (Along(0, _reach(rows)), Along(1)), have.shape)
            sides = min(2, ranks - 1)
            found.append(Case(have, want, sides * rows * run * FLOAT.itemsize, sides))
    return found


class _reach:
    """So many rows more on either side."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __call__(self, start: int, stop: int) -> tuple[int, int]:
        return start - self.rows, stop + self.rows


def measure(node: MPI.Intracomm, rounds: int) -> Copies | None:
    """alpha, beta and run that fit best, relative errors counting alike; None on a host of one rank. Collective."""
    if node.size < 2:
        return None
    tried = cases(node.size)
    room = max(4 * _floats(case, rank) for case in tried for rank in range(node.size))
    near = Neighbours(node, node.Dup(), range(node.size), room * FLOAT.itemsize, 2 * len(tried))
    floats = near.memory.view(FLOAT)
    floats.fill(1.0)
    made = []
    for i, case in enumerate(tried):
        arrays = _arrays(case, node.rank, floats)
        made.append(Exchange(node, case.have, case.want, arrays, 0.0, 2 * i, near))
    taken = np.zeros((rounds, len(tried), 2))
    for at in range(-1, rounds):
        for i, exchange in enumerate(made):
            for d, way in enumerate(exchange.ways):
                way.src.fill(1.0)  # as it is in training: just written by its owner
                node.Barrier()
                begin = perf_counter()
                way.run()
                taken[max(at, 0), i, d] = perf_counter() - begin
    for exchange in made:
        exchange.free()
    near.free()
    slowest = np.max(node.allgather(taken), axis=0)
    rows = np.array([[1.0, case.nbytes, case.runs] for case in tried for _ in range(2)])
    return fit(rows, np.median(slowest, axis=0).ravel())


def fit(rows: np.ndarray, seconds: np.ndarray) -> Copies:
    """alpha, beta and run for transfers (n, 3) of one, bytes and runs that took `seconds` (n,); none is negative.

    Least squares of what is too much and too little alike, as factors: each round divides by the root of time and fit.
    """
    keep, scale = [0, 1, 2], 1 / seconds
    for _ in range(ITERATIONS):
        found = np.zeros(3)
        while True:
            found[keep] = np.linalg.lstsq(rows[:, keep] * scale[:, None], seconds * scale, rcond=None)[0]
            if (found >= 0).all() or len(keep) == 1:
                break
            worst = int(np.argmin(found * rows.mean(axis=0)))
            keep.remove(worst)
            found[worst] = 0.0
        predicted = np.maximum(rows @ found, 1e-9)
        scale = 1 / np.sqrt(predicted * seconds)
    return Copies(max(float(found[0]), 0.0), max(float(found[1]), 1e-13), max(float(found[2]), 0.0))


def _arrays(case: Case, rank: int, floats: np.ndarray) -> Arrays:
    """As an executor lays them out, from the start of `floats`."""
    mine, wish = case.have.box(rank), case.want.box(rank)
    inplace = volume(mine) > 0 and contains(wish, mine)
    at = 0

    def take(shape: Shape) -> np.ndarray:
        nonlocal at
        found = floats[at : at + prod(shape)].reshape(shape)
        at += prod(shape)
        return found

    def pair() -> tuple[np.ndarray, np.ndarray]:
        outer = take(extent(wish))
        return outer, outer[within(mine, wish)] if inplace else take(extent(mine))

    (y, x), (dy, dx) = pair(), pair()
    return Arrays(x, y, inplace, dy, dx, inplace)


def _floats(case: Case, rank: int) -> int:
    return max(volume(case.have.box(rank)), volume(case.want.box(rank)))
