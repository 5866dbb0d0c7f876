"""Lower bounds of what edges cost, for all pairs of partitions of two layers at once; and products of such tables.

Of few ranks every one is priced, as `transfers.transfer` does it but for contiguous runs; of many a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from hpctrain.graph import Node
from hpctrain.planner.tables import Ends, Table, tables
from hpctrain.planner.wire import Wire

try:
    from hpctrain import _native as compiled
except ImportError:
    compiled = None
_native: Any = compiled
"""The compiled kernels, where there are any."""

ALL = 64
"""Up to so many ranks every one is looked at."""


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
    """(n, m) float32: for `producer` cut by p (n, 6) and `consumer` by q (m, 6), blocks by AXES, what the forward and
    (`gradient`) the backward transfer of input `slot` take at least; without runs exactly, up to `ALL` ranks.
    """
    return _bounds(Ends.between(producer, consumer, slot), p, q, (True, gradient), itemsize, wire, ranks)


def partial_bounds(node: Node, q: np.ndarray, gradient: bool, itemsize: int, wire: Wire, ranks: int) -> np.ndarray:
    """(m,) float32: the same for the partial sums of `node` cut by q (m, 6)."""
    each = _bounds(Ends.partial(node), q, q, (gradient, True), itemsize, wire, ranks)
    return np.ascontiguousarray(np.diagonal(each))


def sample(ranks: int) -> np.ndarray:
    """The ranks to look at: all, or of many the first and last, those a power of two from these, and two amid all axes.

    These have neighbours on both sides along every axis of four blocks or more, where blocks are powers of two.
    """
    if ranks <= ALL:
        return np.arange(ranks)
    powers = [1 << k for k in range((ranks - 1).bit_length())]
    return np.array(sorted({0, ranks - 1, ranks // 3, 2 * ranks // 3, *powers, *(ranks - 1 - n for n in powers)}))


class _Prices(NamedTuple):
    """Seconds: per near and far transfer or message, per element; and which directions count."""

    near_alpha: float
    near: float
    far_alpha: float
    far: float
    copies: bool
    to_wanters: bool
    to_owners: bool


def _bounds(
    ends: Ends, p: np.ndarray, q: np.ndarray, ways: tuple[bool, bool], itemsize: int, wire: Wire, ranks: int
) -> np.ndarray:
    prices = _Prices(
        wire.near_alpha, wire.near_beta * itemsize, wire.far_alpha, wire.far_beta * itemsize, wire.copies, *ways
    )
    p, q = np.ascontiguousarray(p, np.int64), np.ascontiguousarray(q, np.int64)
    ids = sample(ranks)
    beside = np.zeros((0, len(ids)), np.int64)
    several = ranks > wire.per_host
    if several:
        beside = ids // wire.per_host * wire.per_host + np.arange(wire.per_host)[:, None]
    counts = several or not wire.copies
    found = tables(ends, p, q, ids, beside, counts)
    sizes_p, sizes_q = p.prod(1)[:, None], q.prod(1)[:, None]
    others = (beside != ids) & (beside < ranks)
    return _priced(
        found,
        (ids < sizes_p).astype(np.float64),
        (ids < sizes_q).astype(np.float64),
        (others & (beside < sizes_p[:, :, None])).astype(np.float64),
        (others & (beside < sizes_q[:, :, None])).astype(np.float64),
        prices,
        counts,
        several,
    )


def _priced(
    found: Sequence[Table],
    has: np.ndarray,
    wants: np.ndarray,
    has_beside: np.ndarray,
    wants_beside: np.ndarray,
    prices: _Prices,
    counts: bool,
    several: bool,
) -> np.ndarray:
    """What `_native.edge_bounds` does, in the same order of operations."""
    out = np.empty((len(has), len(wants)), np.float32)
    for i in range(len(has)):

        def product(field: str, present: np.ndarray, i: int = i) -> np.ndarray:
            total = present
            for table in found:
                total = total * getattr(table, field)[..., table.have[i], :, :][..., table.want, :]
            return total

        own = product("own", has[i] * wants)
        copied = own - product("kept", has[i] * wants)
        received = product("wanted", wants) - own
        sent = product("given", np.broadcast_to(has[i], wants.shape)) - own
        near = [received, sent]
        peers = [np.zeros(()), np.zeros(())]
        near_peers = peers
        if counts:
            itself = own > 0
            peers = [
                product("owners", wants) - itself,
                product("wanters", np.broadcast_to(has[i], wants.shape)) - itself,
            ]
            near_peers = peers
        if several:
            gives = product("gives", has_beside[i][:, None, :] * wants)
            takes = product("takes", wants_beside.transpose(1, 0, 2) * has[i])
            near = [gives.sum(0), takes.sum(0)]
            near_peers = [(gives > 0).sum(0), (takes > 0).sum(0)]
        elements = np.maximum(received - near[0], sent - near[1])
        far = prices.far_alpha * np.maximum(peers[0] - near_peers[0], peers[1] - near_peers[1]) + prices.far * elements
        if prices.copies:
            once = prices.near_alpha * ((near[0] > 0) | (near[1] > 0))
            forward, backward = (once + prices.near * (n + copied) + far for n in near)
        else:
            forward = prices.near_alpha * np.maximum(*near_peers) + prices.near * np.maximum(*near) + far
            backward = forward
        out[i] = prices.to_wanters * forward.max(1) + prices.to_owners * backward.max(1)
    return out


def min_plus(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n, k) float32: the least over j of a (n, m)[i, j] + b (m, k)[j, k]."""
    a, b = np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32)
    out = np.full((a.shape[0], b.shape[1]), np.inf, np.float32)
    for start in range(0, len(a), 64):  # a block of rows and one of b stay in the cache
        rows = out[start : start + 64]
        sums = np.empty_like(rows)
        for j in range(a.shape[1]):
            np.add(a[start : start + 64, j, None], b[j], out=sums)
            np.minimum(rows, sums, out=rows)
    return out
