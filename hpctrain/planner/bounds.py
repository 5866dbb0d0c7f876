"""Lower bounds of what edges cost, for all pairs of partitions of two layers at once; and min-plus products.

Up to sampling.ALL ranks every one is priced, as `transfers.transfer` does it but for contiguous runs; of more a sample,
and the slowest of these is a lower bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np

from hpctrain.graph import Node
from hpctrain.partition import AXES, names
from hpctrain.planner.classes import Classes, Wanters
from hpctrain.planner.ends import Ends, parts
from hpctrain.planner.rows import Rows, rows
from hpctrain.planner.sampling import ALL, Sample
from hpctrain.planner.wire import Wire

try:
    from hpctrain import _native as compiled
except ImportError:
    compiled = None
_native: Any = compiled
"""The compiled kernels, where there are any."""


def pair_bounds(
    producer: Node,
    p: np.ndarray,
    consumer: Node,
    slot: int,
    q: np.ndarray,
    gradient: bool,
    itemsize: int,
    wire: Wire,
    ranks: int,
) -> np.ndarray:
    """(n, m) float32: for `producer` cut by p (n, 6) and `consumer` by q (m, 6), blocks by AXES, the seconds that the
    forward and (`gradient`) the backward transfer of input `slot` take at least, together.
    """
    ends, prices = Ends.between(producer, consumer, slot), _Prices.of(wire, itemsize, True, gradient)
    found = _priced(_problem(ends, p, q, wire, ranks), prices)
    if ranks > ALL and any(len(part.ends.shape) > 1 for part in parts(ends)):
        return np.maximum(found, _of_largest(ends, p, q, prices, ranks, wire.per_host))
    return found


def partial_bounds(node: Node, q: np.ndarray, gradient: bool, itemsize: int, wire: Wire, ranks: int) -> np.ndarray:
    """(m,) float32: the same for the partial sums of `node` cut by q (m, 6)."""
    problem = _problem(Ends.partial(node), q, q, wire, ranks)
    return _priced(problem, _Prices.of(wire, itemsize, gradient, True), diagonal=True)


class _Prices(NamedTuple):
    """Seconds per near and far transfer or message, per element, and per run; and which directions count."""

    near_alpha: float
    near: float
    run: float
    far_alpha: float
    far: float
    copies: bool
    to_wanters: bool
    to_owners: bool

    @classmethod
    def of(cls, wire: Wire, itemsize: int, to_wanters: bool, to_owners: bool) -> _Prices:
        near, far = wire.near_beta * itemsize, wire.far_beta * itemsize
        return cls(wire.near_alpha, near, wire.run, wire.far_alpha, far, wire.copies, to_wanters, to_owners)


class _Table(NamedTuple):
    """Rows of one part of an edge, and the class among them of each partition, int32."""

    have: np.ndarray
    want: np.ndarray
    rows: Rows


class _Problem(NamedTuple):
    """What two sets of partitions exchange, as products over `tables`; which ranks and neighbours take part, 1 or 0,
    float64 (partitions, [neighbours,] ranks).
    """

    tables: list[_Table]
    sample: Sample
    has: np.ndarray
    wants: np.ndarray
    has_beside: np.ndarray
    wants_beside: np.ndarray


def _problem(ends: Ends, p: np.ndarray, q: np.ndarray, wire: Wire, ranks: int) -> _Problem:
    p, q = np.asarray(p, np.int64), np.asarray(q, np.int64)
    sample = Sample.of(ranks, wire, p, q)
    looked_at, beside = sample.looked_at, sample.beside
    tables = []
    for part in parts(ends):
        have, have_class = _classes(p, part.have_axes)
        want, want_class = _classes(q, part.want_axes)
        tables.append(_Table(have_class, want_class, rows(part.ends, have, want, sample)))
    others = beside < ranks if sample.summed else (beside < ranks) & (beside != looked_at)
    present = [looked_at < blocks.prod(1)[:, None] for blocks in (p, q)]
    present += [others & (beside < blocks.prod(1)[:, None, None]) for blocks in (p, q)]
    return _Problem(tables, sample, *(each.astype(np.float64) for each in present))


def _classes(blocks: np.ndarray, axes: Sequence[str]) -> tuple[Classes, np.ndarray]:
    """The classes of partitions (any, 6) along `axes`, and which each of them is of."""
    columns = [AXES.index(axis) for axis in axes]
    if not columns:
        return Classes(1, b"", b""), np.zeros(len(blocks), np.int32)
    cut = blocks[:, columns]
    strides = np.stack([blocks[:, i + 1 :].prod(1) for i in columns], 1)
    keys = np.concatenate([cut, np.where(cut > 1, strides, 1)], 1)
    found, which = np.unique(keys, axis=0, return_inverse=True)
    count, half = len(found), len(columns)
    return Classes(count, found[:, :half].tobytes(), found[:, half:].tobytes()), which.ravel().astype(np.int32)


def _priced(problem: _Problem, prices: _Prices, diagonal: bool = False) -> np.ndarray:
    """(n, m), or where `diagonal` (n,) of every partition with itself: the slowest rank's seconds, both ways."""
    n, m = len(problem.has), len(problem.wants)
    out = np.empty(n if diagonal else (n, m), np.float32)
    if _native is None:
        for i in range(n):
            found = _price(problem, prices, i, slice(i, i + 1) if diagonal else slice(0, m))
            out[i] = found[0] if diagonal else found
        return out
    _native.edge_bounds(
        [table.have for table in problem.tables],
        [table.want for table in problem.tables],
        [list(table.rows) for table in problem.tables],
        problem.has,
        problem.wants,
        problem.has_beside,
        problem.wants_beside,
        problem.sample.summed,
        list(prices[:5]),
        *prices[5:],
        out,
    )
    return out


class _Moved(NamedTuple):
    """What ranks exchange with some others in one direction: elements, with how many, in how many contiguous runs."""

    elements: np.ndarray
    peers: np.ndarray
    runs: np.ndarray

    def plus(self, more: _Moved, times: int = 1) -> _Moved:
        return _Moved(*(mine + times * other for mine, other in zip(self, more, strict=True)))


def _of_largest(ends: Ends, p: np.ndarray, q: np.ndarray, prices: _Prices, ranks: int, per_host: int) -> np.ndarray:
    """(n, m) float32: what the rank that wants most takes at least, as each of its host owns no more than the largest
    block. Of a reshape few ranks want far more than others, and no sample has them.
    """
    p, q, most = np.asarray(p, np.int64), np.asarray(q, np.int64), np.ones(len(q))
    for part in parts(ends):
        want, which = _classes(q, part.want_axes)
        most *= Wanters(part.ends, *want.arrays()).largest()[which]
    block = np.ones(len(p))
    for n, axes in zip(ends.shape, ends.axes, strict=True):
        block *= -(-n // p[:, [AXES.index(axis) for axis in names(axes)]].prod(1))

    def messages(alpha: float, beta: float, beside: int) -> np.ndarray:
        peers = np.maximum(0.0, most / block[:, None] - beside)
        return alpha * peers + beta * np.maximum(0.0, most - beside * block[:, None])

    near = messages(0.0 if prices.copies else prices.near_alpha, prices.near, 1)
    if ranks <= per_host:
        ways = prices.to_wanters + (prices.to_owners and not prices.copies)
        return np.asarray(ways * near, np.float32)
    far = messages(prices.far_alpha, prices.far, per_host)
    return np.asarray((prices.to_wanters + prices.to_owners) * far, np.float32)


def _price(problem: _Problem, prices: _Prices, i: int, j: slice) -> np.ndarray:
    """Partition i of the owners with those j of who wants: what the compiled kernel does, in the same order."""
    sample = problem.sample
    wants = problem.wants[j]
    has = np.broadcast_to(problem.has[i], wants.shape)

    def each(field: str, t: int | None = None) -> Iterator[np.ndarray]:
        for table in problem.tables:
            every: np.ndarray = getattr(table.rows, field)
            of = every if field == "wanted" else (every if t is None else every[t])[table.have[i]]
            yield of[table.want[j]]

    def moved(present: np.ndarray, field: str, counts: str, same: str, t: int | None = None) -> _Moved:
        elements = peers = runs = present
        alike = each(same, t) if sample.runs else repeat(0.0)
        numbers = each(counts) if counts else repeat(None)
        for n, number, just in zip(each(field, t), numbers, alike):  # noqa: B905 (some are endless)
            count: np.ndarray = np.asarray(n > 0 if number is None else number, np.float64)
            runs = runs * just + elements * (count - just)
            elements, peers = elements * n, peers * count
        return _Moved(elements, peers, runs)

    own = moved(has * wants, "own", "", "own_same")
    received = moved(wants, "wanted", "owners", "owners_same").plus(own, -1)
    sent = moved(has, "given", "wanters", "wanters_same").plus(own, -1)
    copied = own.elements - reduce(np.multiply, each("kept"), has * wants)
    near_in, near_out = received, sent
    if sample.several:
        none = np.zeros_like(wants)
        near_in = near_out = _Moved(none, none, none)
    for t in range(problem.has_beside.shape[1]):
        gives, takes = ("near_owners", "near_wanters") if sample.summed else ("", "")
        near_in = near_in.plus(moved(problem.has_beside[i, t] * wants, "gives", gives, "gives_same", t))
        near_out = near_out.plus(moved(has * problem.wants_beside[j, t], "takes", takes, "takes_same", t))
    if sample.summed:
        near_in, near_out = near_in.plus(own, -1), near_out.plus(own, -1)
    elements = np.maximum(received.elements - near_in.elements, sent.elements - near_out.elements)
    peers = np.maximum(received.peers - near_in.peers, sent.peers - near_out.peers)
    far = prices.far_alpha * peers + prices.far * elements
    if prices.copies:
        once = prices.near_alpha * ((near_in.peers > 0) | (near_out.peers > 0))
        more = np.where(copied > 0, own.runs, 0)
        forward, backward = (
            once + prices.near * (near.elements + copied) + prices.run * (near.runs + more) + far
            for near in (near_in, near_out)
        )
    else:
        messages = prices.near_alpha * np.maximum(near_in.peers, near_out.peers)
        forward = backward = messages + prices.near * np.maximum(near_in.elements, near_out.elements) + far
    return np.asarray(prices.to_wanters * forward.max(1) + prices.to_owners * backward.max(1), np.float32)


def min_plus(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n, k) float32: the least over j of a[i, j] + b[j, k], for a (n, m) and b (m, k); infinity where m is 0."""
    a, b = np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32)
    out = np.full((a.shape[0], b.shape[1]), np.inf, np.float32)
    if _native is not None:
        _native.min_plus(a, b, out)
        return out
    for start in range(0, len(a), 64):  # a block of rows and one of b stay in the cache
        block = out[start : start + 64]
        sums = np.empty_like(block)
        for j in range(a.shape[1]):
            np.add(a[start : start + 64, j, None], b[j], out=sums)
            np.minimum(block, sums, out=block)
    return out
