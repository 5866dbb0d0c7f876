"""One mechanism for every change of ownership: redistribution, halo, padding, channel gather, and their gradients.

An edge of the network has four arrays. The producer's op writes `fwd.src` and the consumer's reads `fwd.dst`; in
backward the consumer's op writes `bwd.src` and the producer's reads `bwd.dst`. Where a rank wants all that it has
(halo, gather), `fwd.src` is the interior of `fwd.dst` and `bwd.dst` that of `bwd.src`: the interior is never copied.
What nobody sends, padding, is filled anew at every transfer, as the memory may be another array's in between.
Ranks on this rank's host read from its arrays themselves, where they lie in shared memory (comm/neighbours.py).

    x = edge.fwd.reserve(); op.forward(..., out=x); edge.fwd.start(); y = edge.fwd.finish()
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from hpctrain.comm.link import MOST_ELEMENTS, one_element
from hpctrain.comm.neighbours import Neighbours
from hpctrain.comm.watch import WATCH
from hpctrain.partition import Box, Shape, contains, extent, volume, within
from hpctrain.precision import BF16
from hpctrain.regions import Region, Share, owners

Copy = tuple[np.ndarray, np.ndarray]
"""(to, from): two views of one shape."""


class Message(NamedTuple):
    """What travels between this rank and `peer`: `parts` are (view of the block, its place in `buffer`).

    It has none where the buffer is itself the view.
    """

    peer: int
    buffer: np.ndarray
    parts: list[Copy]


class Way:
    """One direction of an edge: `src` flows into `dst`.

    Neighbours copy out of each other's arrays; between others goes one persistent message per pair of ranks.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        src: np.ndarray,
        dst: np.ndarray,
        own: Sequence[Copy],
        sends: Sequence[tuple[int, list[np.ndarray]]],
        recvs: Sequence[tuple[int, list[np.ndarray]]],
        add: bool,
        tag: int,
        clear: bool = False,
        borders: Sequence[np.ndarray] = (),
        fill: float = 0.0,
        near: Neighbours | None = None,
    ) -> None:
        """`own` are the parts that stay on this rank and do not lie in memory that `dst` shares with `src`.

        Where there are neighbours, `src` is of `near.memory`.
        """
        self.src, self.dst = src, dst
        self._own, self._add, self._clear = own, add, clear
        self._borders, self._fill = borders, fill
        beside: Collection[int] = () if near is None else near.ranks
        self._out = [_message(peer, views, direct=True) for peer, views in sends if peer not in beside]
        self._in = [_message(peer, views, direct=not add) for peer, views in recvs if peer not in beside]
        self._types: list[MPI.Datatype] = []
        self._requests: list[MPI.Prequest] = [comm.Recv_init(self._spec(m.buffer), m.peer, tag) for m in self._in]
        self._requests += [comm.Send_init(self._spec(m.buffer), m.peer, tag) for m in self._out]
        self._handover = None if near is None else near.handover(tag, sends, recvs)
        parts = {message.peer: message.parts for message in self._in}
        parts |= {} if self._handover is None else self._handover.parts
        self._arrived = [part for peer, _ in recvs for part in parts[peer]]
        """Whatever way it comes by, in the order of ranks, so that sums have the same bits."""
        self.bytes_per_transfer = sum(view.nbytes for _, views in sends for view in views)
        """What this rank hands to others at each `start`, in messages or for them to read."""
        self.bytes_sent = 0
        """What this rank has handed to others so far."""
        self.peers = tuple(sorted({peer for peer, _ in (*recvs, *sends)}))
        self.wait = WATCH.waiting("", "exchange", self.peers)
        """What `finish` is to the watchdog; who knows more of it gives it another name."""

    def _spec(self, buffer: np.ndarray) -> np.ndarray | list[Any]:
        """`buffer` as MPI takes it: where its elements are too many to be counted, as one element of a large type."""
        buffer = buffer.view(np.uint16) if buffer.dtype == BF16 else buffer  # MPI has no such type
        if buffer.size <= MOST_ELEMENTS:
            return buffer
        self._types.append(one_element(buffer.size, buffer.itemsize))
        return [buffer.view(np.uint8), 1, self._types[-1]]

    def reserve(self) -> np.ndarray:
        """The array to write before `start`."""
        return self.src

    def start(self) -> None:
        """Begin the transfer; `src` must not be written until `finish`."""
        for border in self._borders:
            border.fill(self._fill)
        for message in self._out:
            for view, place in message.parts:
                np.copyto(place, view)
        self.bytes_sent += self.bytes_per_transfer
        if self._handover is not None:
            self._handover.offer()
        if self._requests:
            MPI.Prequest.Startall(self._requests)

    def finish(self) -> np.ndarray:
        """Complete the transfer and return `dst`. Additions: the own part first, then by rank, always the same.

        Neighbours finish their common ways in one order: each waits until the others have read.
        """
        if self._clear:
            self.dst.fill(0)
        for to, source in self._own:
            self._take(to, source)
        with self.wait:
            if self._requests:
                MPI.Request.Waitall(self._requests)
            if self._handover is not None:
                self._handover.await_offers()
            for view, place in self._arrived:
                self._take(view, place)
            if self._handover is not None:
                self._handover.leave()
        return self.dst

    def _take(self, to: np.ndarray, source: np.ndarray) -> None:
        if self._add:
            np.add(to, source, out=to)
        else:
            np.copyto(to, source)

    @property
    def copies(self) -> bool:
        """Whether parts of `dst` that come from this rank itself are copied."""
        return bool(self._own)

    def run(self) -> np.ndarray:
        """`start` and `finish` with nothing between."""
        self.start()
        return self.finish()

    def free(self) -> None:
        """Release the persistent requests, and the neighbours' memory."""
        for request in self._requests:
            request.Free()
        for datatype in self._types:
            datatype.Free()
        self._requests, self._types = [], []
        self._arrived, self._handover = [], None


class Arrays(NamedTuple):
    """The arrays of an edge on one rank; those of backward are None where no gradient flows."""

    src: np.ndarray
    dst: np.ndarray
    inplace: bool
    """Whether `src` is the part of `dst` that this rank owns."""
    gradient: np.ndarray | None
    """What the consumer writes in backward, and `back` what the producer then reads."""
    back: np.ndarray | None
    inplace_back: bool


def own_arrays(
    have: Region,
    want: Region,
    rank: int,
    dtype: np.dtype,
    backward: bool,
    zeros: Callable[[Shape, np.dtype], np.ndarray] = np.zeros,
) -> Arrays:
    """Arrays of an edge alone, made by `zeros`."""
    mine, wish = have.box(rank), want.box(rank)
    inplace = volume(mine) > 0 and contains(wish, mine)

    def pair() -> tuple[np.ndarray, np.ndarray]:
        outer = zeros(extent(wish), dtype)
        return outer, outer[within(mine, wish)] if inplace else zeros(extent(mine), dtype)

    y, x = pair()
    dy, dx = pair() if backward else (None, None)
    return Arrays(x, y, inplace, dy, dx, inplace)


class Exchange:
    """Rank r owns `have.box(r)` of a global array (disjoint boxes) and wants `want.box(r)`.

    Wanted boxes may overlap (halo) and leave the array: there `fill` stands, or what the region says of its borders.
    `fwd` copies from owners to wanters; `bwd` is its adjoint: what several ranks hold of an owner's box is added up,
    and gradients of fill are dropped. Collective over `comm`; `tag` and `tag + 1` must be this edge's own. The arrays
    are of `near.memory` where there are neighbours.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        have: Region,
        want: Region,
        arrays: Arrays,
        fill: float = 0.0,
        tag: int = 0,
        near: Neighbours | None = None,
    ) -> None:
        me = comm.rank
        mine, wish = have.box(me), want.box(me)
        own = want.shares(me, mine)
        outgoing = [(r, want.shares(r, mine)) for r in want.meeting(mine) if r != me]
        incoming = [(r, want.shares(me, have.box(r))) for r in owners(have, want, me) if r != me]
        x, y = arrays.src, arrays.dst
        self.fwd = Way(
            comm,
            x,
            y,
            [(_target(y, share, wish), _source(x, share, mine)) for share in own if share.moved or not arrays.inplace],
            [(r, [_source(x, share, mine) for share in shares]) for r, shares in outgoing],
            [(r, [_target(y, share, wish) for share in shares]) for r, shares in incoming],
            add=False,
            tag=tag,
            borders=[y[box] for box in _borders(have, want, me)],
            fill=fill,
            near=near,
        )
        self.bwd: Way | None = None
        dy, dx = arrays.gradient, arrays.back
        if dy is None or dx is None:
            return
        kept = arrays.inplace_back
        self.bwd = Way(
            comm,
            dy,
            dx,
            [(_source(dx, share, mine), _target(dy, share, wish)) for share in own if share.moved or not kept],
            [(r, [_target(dy, share, wish) for share in shares]) for r, shares in incoming],
            [(r, [_source(dx, share, mine) for share in shares]) for r, shares in outgoing],
            add=True,
            tag=tag + 1,
            clear=not kept,
            near=near,
        )

    @staticmethod
    def alone(
        comm: MPI.Intracomm,
        have: Region,
        want: Region,
        dtype: np.dtype,
        fill: float = 0.0,
        tag: int = 0,
        backward: bool = True,
    ) -> Exchange:
        """An edge that has arrays of its own."""
        return Exchange(comm, have, want, own_arrays(have, want, comm.rank, dtype, backward), fill, tag)

    @property
    def ways(self) -> list[Way]:
        """Forward, and backward where it was built."""
        return [self.fwd] if self.bwd is None else [self.fwd, self.bwd]

    def free(self) -> None:
        """Release MPI resources."""
        for way in self.ways:
            way.free()


def _borders(have: Region, want: Region, rank: int) -> list[Box]:
    """Slabs that cover what `rank` wants beyond the array, in the coordinates of what it wants."""
    wish = want.box(rank)
    if volume(wish) == 0:
        return []
    everything = tuple(slice(0, max(stop for _, stop in cut.intervals)) for cut in have.cuts)
    shares = want.shares(rank, everything)
    if not shares:
        return [tuple(slice(0, n) for n in extent(wish))]
    found, inner = [], [slice(0, n) for n in extent(wish)]
    for d, s in enumerate(wish):
        first = min(share.target[d].start for share in shares) - s.start
        last = max(share.target[d].stop for share in shares) - s.start
        for slab in (slice(0, first), slice(last, s.stop - s.start)):
            if slab.start < slab.stop:
                found.append((*inner[:d], slab, *inner[d + 1 :]))
        inner[d] = slice(first, last)
    return found


def _source(block: np.ndarray, share: Share, box: Box) -> np.ndarray:
    """`share` in the block that owns it, in the order in which it is wanted."""
    view = block[within(share.source, box)]
    return view[tuple(slice(None, None, -1 if flipped else 1) for flipped in share.flipped)]


def _target(block: np.ndarray, share: Share, box: Box) -> np.ndarray:
    """`share` in the block that wants it."""
    return block[within(share.target, box)]


def _message(peer: int, views: list[np.ndarray], direct: bool) -> Message:
    """A message that fills `views`; a single contiguous one can be its own buffer where nothing is added."""
    if direct and len(views) == 1 and views[0].flags.c_contiguous:
        return Message(peer, views[0], [])
    buffer = np.empty(sum(view.size for view in views), views[0].dtype)
    parts, at = [], 0
    for view in views:
        parts.append((view, buffer[at : at + view.size].reshape(view.shape)))
        at += view.size
    return Message(peer, buffer, parts)
