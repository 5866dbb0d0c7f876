"""What an edge moves, exactly, rank by rank, and how long that takes: what `comm.exchange.Exchange` does, counted.

Rank r owns block b(r) and wants interval c(r) along each dim, so that what two ranks have in common is a product over
dims, and what a rank receives of all, or sends to all, one of sums of 1-D overlaps. Dims whose cuts share an axis
(what a reshape wants) count as one: sums are then over the coordinates that they share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from hpctrain.planner.layout import Edge
from hpctrain.planner.overlaps import Boxes, Group, Overlaps, coordinates, equal, groups
from hpctrain.planner.wire import Wire
from hpctrain.regions import Region


class Transfer(NamedTuple):
    """Seconds that an edge takes the slowest rank, forward and backward, and the bytes that all ranks send."""

    forward: float
    backward: float
    sent_forward: int
    sent_backward: int


class Moved(NamedTuple):
    """What ranks exchange with others in one direction, arrays by rank: elements, with how many, in how many runs.

    A run is contiguous in the arrays of both ends. A reshape's dims are one here: runs within them are not counted.
    """

    elements: np.ndarray
    peers: np.ndarray
    runs: np.ndarray

    def __sub__(self, other: Moved) -> Moved:
        return Moved(*(mine - theirs for mine, theirs in zip(self, other, strict=True)))


class Traffic(NamedTuple):
    """What every rank that has a part in an edge moves, from owners to those who want it; backward the reverse.

    Near is on the same host. `own` is what a rank copies within its own memory, `own_runs` in how many runs.
    """

    received_near: Moved
    received_far: Moved
    sent_near: Moved
    sent_far: Moved
    own: np.ndarray
    own_runs: np.ndarray


def transfer(edge: Edge, dtype: np.dtype, wire: Wire) -> Transfer:
    """The price of `edge` in a run of type `dtype`, for a training step (backward 0 where no gradient flows)."""
    moved = traffic(edge, wire.per_host)
    itemsize = edge.kind.dtype(dtype).itemsize
    to_wanters = float(seconds(moved, itemsize, wire).max())
    to_owners = float(seconds(moved, itemsize, wire, back=True).max())
    total = int((moved.received_near.elements + moved.received_far.elements).sum()) * itemsize
    # partial sums run backwards in the forward pass
    forward, backward = (to_wanters, to_owners) if edge.slot is not None else (to_owners, to_wanters)
    return Transfer(forward, backward, total, total) if edge.gradient else Transfer(forward, 0.0, total, 0)


def seconds(moved: Traffic, itemsize: int, wire: Wire, back: bool = False) -> np.ndarray:
    """What each rank takes, from owners to those who want it or `back`, by rank.

    Who wants something copies it; back, the owner adds up, which costs as much. Messages go both ways at once.
    """
    work, other = (moved.sent_near, moved.received_near) if back else (moved.received_near, moved.sent_near)
    if wire.copies:
        near = wire.near_alpha * ((work.peers > 0) | (other.peers > 0))
        near = near + wire.near_beta * itemsize * (work.elements + moved.own) + wire.run * (work.runs + moved.own_runs)
    else:
        near = _messages(moved.received_near, moved.sent_near, itemsize, wire.near_alpha, wire.near_beta)
    far = _messages(moved.received_far, moved.sent_far, itemsize, wire.far_alpha, wire.far_beta)
    return np.asarray(near + far)


def _messages(received: Moved, sent: Moved, itemsize: int, alpha: float, beta: float) -> np.ndarray:
    peers, elements = np.maximum(received.peers, sent.peers), np.maximum(received.elements, sent.elements)
    return np.asarray(alpha * peers + beta * itemsize * elements)


def is_halo(edge: Edge) -> bool:
    """Whether every rank wants at least what it has: a halo, a gather or sums in place, else a redistribution."""
    if edge.have.partition != edge.want.partition:
        return False
    ends = _Ends.of(edge)
    return bool((ends.kept() == ends.mine()).all())


def traffic(edge: Edge, per_host: int) -> Traffic:
    """What every rank moves, where each host has so many consecutive ranks."""
    ends = _Ends.of(edge)
    own = ends.own(ends.have.groups)
    received = ends.received() - own
    sent = ends.sent() - ends.own(ends.want.groups)
    copied = own.elements - ends.kept()
    near = ends.near(per_host) if len(ends.ranks) > per_host else (received, sent)
    own_runs = np.where(copied > 0, own.runs, 0)
    return Traffic(near[0], received - near[0], near[1], sent - near[1], copied, own_runs)


class _End(NamedTuple):
    """Owners, or those who want: the coordinate of each rank along each dim, and whether it takes part."""

    places: list[np.ndarray]
    present: np.ndarray
    groups: list[Group]

    @classmethod
    def of(cls, region: Region, ranks: np.ndarray) -> _End:
        blocks = np.array(region.partition.shape, np.int64)
        places = [coordinates(blocks, cut.axes, ranks) for cut in region.cuts]
        found, present = groups(region), ranks < region.partition.size
        for group in found:
            present = present & group.taking[coordinates(blocks, group.axes, ranks)]
        return cls(places, present, found)


class _Ends(NamedTuple):
    """Both ends of an edge; ranks are all that have a part in it."""

    ranks: np.ndarray
    dims: list[Overlaps]
    have: _End
    want: _End

    @classmethod
    def of(cls, edge: Edge) -> _Ends:
        ranks = np.arange(max(edge.have.partition.size, edge.want.partition.size))
        dims = [Overlaps.of(*cuts) for cuts in zip(edge.have.cuts, edge.want.cuts, strict=True)]
        return cls(ranks, dims, _End.of(edge.have, ranks), _End.of(edge.want, ranks))

    def own(self, groups: Sequence[Group]) -> Moved:
        """What each rank wants of its own block, runs counted by `groups`."""
        each = [_meeting(*at) for at in self._places()]
        found = [_joined([each[d] for d in group.dims]) for group in groups]
        return _moved(found, self.have.present & self.want.present)

    def mine(self) -> np.ndarray:
        """Elements of each rank's block."""
        sizes = (dim.high[b] - dim.low[b] for dim, b, _ in self._places())
        return np.asarray(_product(sizes, self.have.present))

    def kept(self) -> np.ndarray:
        """Those of them that lie where they are wanted already, as all of the block is wanted."""
        inside = (dim.inside(b, c) * (dim.high[b] - dim.low[b]) for dim, b, c in self._places())
        return np.asarray(_product(inside, self.have.present & self.want.present))

    def _places(self) -> Iterable[tuple[Overlaps, np.ndarray, np.ndarray]]:
        return zip(self.dims, self.have.places, self.want.places, strict=True)

    def received(self) -> Moved:
        """What each rank wants of all blocks, its own included."""
        found = [_summed(self.dims, group, self.want.places, owners=True) for group in self.have.groups]
        return _moved(found, self.want.present)

    def sent(self) -> Moved:
        """What all ranks want of each one's block, itself included."""
        found = [_summed(self.dims, group, self.have.places, owners=False) for group in self.want.groups]
        return _moved(found, self.have.present)

    def near(self, per_host: int) -> tuple[Moved, Moved]:
        """(received, sent) between each rank and the others of its host: all pairs of each host."""
        count = len(self.ranks)
        hosts = -(-count // per_host)

        def by_host(found: np.ndarray) -> np.ndarray:
            padded = np.zeros(hosts * per_host, found.dtype)
            padded[:count] = found
            return padded.reshape(hosts, per_host)

        has, wants = by_host(self.have.present), by_host(self.want.present)
        places = [(dim, by_host(b), by_host(c)) for dim, b, c in self._places()]
        others = ~np.eye(per_host, dtype=bool)
        received, sent = np.zeros((2, 3, hosts, per_host), np.int64)
        step = max(1, IN_CACHE // per_host**2)
        for some in (slice(start, start + step) for start in range(0, hosts, step)):
            present = wants[some, :, None] & has[some, None, :] & others
            factors = [_meeting(dim, b[some, None, :], c[some, :, None]) for dim, b, c in places]
            for i, pairs in enumerate(_moved(factors, present)):  # (host, who wants, who has)
                received[i, some], sent[i, some] = pairs.sum(axis=2), pairs.sum(axis=1)
        return Moved(*received.reshape(3, -1)[:, :count]), Moved(*sent.reshape(3, -1)[:, :count])


IN_CACHE = 2**15
"""Pairs of ranks whose numbers stay in the cache of a core."""

Factors = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Along one dim: elements in common, and for how many others there are any, and these are all that both have."""


def _meeting(dim: Overlaps, b: np.ndarray, c: np.ndarray) -> Factors:
    """Those of one pair of ranks."""
    n = dim.elements(b, c)
    meets = n > 0
    return n, meets.astype(np.int64), (meets & dim.same(b, c)).astype(np.int64)


def _joined(factors: Sequence[Factors]) -> Factors:
    """Of several dims taken as one."""
    n = meets = same = np.ones((), np.int64)
    for more in factors:
        n, meets, same = n * more[0], meets * more[1], same * more[2]
    return n, meets, same


def _moved(factors: Sequence[Factors], present: np.ndarray) -> Moved:
    """Products over dims, from the outermost on, where the rank takes part.

    A dim that both ends have in full goes on with the runs of the dims within it; one that is cut begins new ones.
    """
    elements = peers = runs = np.ones((), np.int64)
    for n, meets, same in factors:
        runs = runs * same + elements * (meets - same)
        elements, peers = elements * n, peers * meets
    return Moved(elements * present, peers * present, runs * present)


def _product(factors: Iterable[np.ndarray], present: np.ndarray) -> np.ndarray:
    found = present.astype(np.int64)
    for factor in factors:
        found = found * factor
    return found


def _summed(dims: Sequence[Overlaps], group: Group, index: Sequence[np.ndarray], owners: bool) -> Factors:
    """For every rank, by its coordinates `index`, the sums over the others of a group: the `owners`, or who wants."""
    if not group.dims:
        count = np.asarray(np.count_nonzero(group.taking))
        return count, count, count
    if len(group.dims) == 1 and len(group.places[0]) == len(_cut(dims[group.dims[0]], owners)):
        return _summed_pairs(dims[group.dims[0]], group.taking, index[group.dims[0]], owners)
    chosen, at = [dims[d] for d in group.dims], np.stack([index[d] for d in group.dims])
    if not owners and all(len(dim.starts) == 1 for dim in chosen):
        return _summed_boxes(chosen, group, at)
    distinct, which = np.unique(at, axis=1, return_inverse=True)
    found = []
    for dim, mine, place in zip(chosen, distinct, group.places, strict=True):
        b, c = (place, mine[:, None]) if owners else (mine[:, None], place)
        found.append(_meeting(dim, b, c))
    n, meets, same = ((many @ group.taking.astype(np.int64))[which.ravel()] for many in _joined(found))
    return n, meets, same


def _summed_boxes(dims: Sequence[Overlaps], group: Group, index: np.ndarray) -> Factors:
    """`_summed` over all who want something of several dims."""
    n = [int(dim.high.max()) for dim in dims]
    at = [place[group.taking] for place in group.places]
    first, last = np.stack([dim.outer[:, place] for dim, place in zip(dims, at, strict=True)], 1)
    low, high = np.stack([np.stack([dim.low[b], dim.high[b]]) for dim, b in zip(dims, index, strict=True)], 1)
    starts, stops = np.clip([first, last], 0, np.array(n)[:, None])
    return *Boxes(n, starts, stops).common(low, high), equal(n, first, last, low, high)


def _cut(dim: Overlaps, owners: bool) -> np.ndarray:
    return dim.low if owners else dim.outer[0]


def _summed_pairs(dim: Overlaps, taking: np.ndarray, index: np.ndarray, owners: bool) -> Factors:
    """`_summed` of a single dim: over the pairs that meet, which are few beside all that there are."""
    b, c, n = dim.meeting()
    mine, others = (c, b) if owners else (b, c)
    size = len(_cut(dim, not owners))

    def of(weights: np.ndarray) -> np.ndarray:
        return np.bincount(mine, weights * taking[others], size).astype(np.int64)[index]

    return of(n), of(np.ones(len(n))), of(dim.same(b, c))
