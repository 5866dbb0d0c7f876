"""Who sends how much to whom along an edge: one table of all pairs of ranks, from one small table for each dim."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hpctrain.partition import Partition
from hpctrain.planner.layout import Edge
from hpctrain.planner.overlaps import Overlaps, coordinates
from hpctrain.planner.transfers import seconds, traffic
from hpctrain.planner.wire import Wire
from hpctrain.regions import Cut, Region


def volumes(have: Region, want: Region, ranks: int) -> np.ndarray:
    """(ranks, ranks) elements that each rank owns (row) of what each wants (column), its own part on the diagonal."""
    found = np.zeros((ranks, ranks), np.int64)
    part = np.ones((have.partition.size, want.partition.size), np.int64)
    for owned, wished in zip(have.cuts, want.cuts, strict=True):
        blocks, wishes = np.arange(len(owned.intervals)), np.arange(len(wished.intervals))
        table = Overlaps.of(owned, wished).elements(blocks[:, None], wishes)
        part *= table[np.ix_(places(have.partition, owned), places(want.partition, wished))]
    for cut in have.masks:
        part[~_occupied(have.partition, cut)] = 0
    for cut in want.masks:
        part[:, ~_occupied(want.partition, cut)] = 0
    found[: part.shape[0], : part.shape[1]] = part
    return found


def extents(region: Region, ranks: int) -> np.ndarray:
    """(ranks, dims) of every rank's box (masks left aside), 0 for ranks beyond the partition."""
    found = np.zeros((ranks, len(region.cuts)), np.int64)
    size = min(ranks, region.partition.size)
    for dim, cut in enumerate(region.cuts):
        lengths = np.array([max(0, stop - start) for start, stop in cut.intervals])
        found[:size, dim] = lengths[places(region.partition, cut, size)]
    return found


def places(partition: Partition, cut: Cut, ranks: int | None = None) -> np.ndarray:
    """(ranks,): which interval of `cut` each of the first ranks of `partition` has, all where None."""
    ids = np.arange(partition.size if ranks is None else ranks)
    return coordinates(np.array(partition.shape, np.int64), cut.axes, ids)


def _occupied(partition: Partition, cut: Cut) -> np.ndarray:
    return np.isin(places(partition, cut), list(cut.occupied))


class Way(NamedTuple):
    """One direction of an edge, lists by rank: (peer, bytes) that it sends and receives in messages; of its host,
    who reads what it has and whose it reads, and the seconds that it copies."""

    sends: list[list[tuple[int, int]]]
    receives: list[list[tuple[int, int]]]
    readers: list[list[int]]
    writers: list[list[int]]
    copying: list[float]

    def idle(self, rank: int) -> bool:
        """Whether a rank has no part in it."""
        messages = self.sends[rank] or self.receives[rank] or self.readers[rank] or self.writers[rank]
        return not messages and self.copying[rank] == 0


def ways(edge: Edge, dtype: np.dtype, wire: Wire, hosts: Sequence[int]) -> tuple[Way, Way]:
    """(from owners to those who want it, back) of `edge` in a run of type `dtype`."""
    itemsize = edge.kind.dtype(dtype).itemsize
    found = volumes(edge.have, edge.want, len(hosts)) * itemsize
    np.fill_diagonal(found, 0)
    at = np.array(hosts)
    by_copying = (at[:, None] == at) & wire.copies
    moved, near = traffic(edge, wire.per_host), wire._replace(far_alpha=0.0, far_beta=0.0)
    both = []
    for back, table in ((False, found), (True, found.T)):
        copying = np.zeros(len(hosts))
        if wire.copies:
            taken = seconds(moved, itemsize, near, back)
            copying[: len(taken)] = taken
        both.append(_way(np.where(by_copying, 0, table), by_copying & (table > 0), copying))
    return both[0], both[1]


def _way(messages: np.ndarray, copied: np.ndarray, copying: np.ndarray) -> Way:
    ranks = range(len(copying))
    sends: list[list[tuple[int, int]]] = [[] for _ in ranks]
    receives: list[list[tuple[int, int]]] = [[] for _ in ranks]
    for source, target in zip(*(which.tolist() for which in messages.nonzero()), strict=True):
        nbytes = int(messages[source, target])
        sends[source].append((target, nbytes))
        receives[target].append((source, nbytes))
    readers: list[list[int]] = [[] for _ in ranks]
    writers: list[list[int]] = [[] for _ in ranks]
    for source, target in zip(*(which.tolist() for which in copied.nonzero()), strict=True):
        readers[source].append(target)
        writers[target].append(source)
    return Way(sends, receives, readers, writers, copying.tolist())
