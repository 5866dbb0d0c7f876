"""One mechanism for every change of ownership: redistribution, halo, padding, channel gather, and their gradients.

An edge of the network owns four arrays. The producer's op writes `fwd.src` and the consumer's reads `fwd.dst`; in
backward the consumer's op writes `bwd.src` and the producer's reads `bwd.dst`. Where a rank wants all that it has
(halo, gather), `fwd.src` is the interior of `fwd.dst` and `bwd.dst` that of `bwd.src`: the interior is never copied.

    x = edge.fwd.reserve(); op.forward(..., out=x); edge.fwd.start(); y = edge.fwd.finish()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from hpctrain.partition import Region, contains, extent, overlap, within


class Message(NamedTuple):
    """What travels between this rank and `peer`; `view` is its place in the block, None if that is the buffer."""

    peer: int
    buffer: np.ndarray
    view: np.ndarray | None


class Way:
    """One direction of an edge: `src` flows into `dst` through one persistent message per pair of ranks."""

    def __init__(
        self,
        comm: MPI.Intracomm,
        src: np.ndarray,
        dst: np.ndarray,
        own: tuple[np.ndarray, np.ndarray] | None,
        sends: Sequence[tuple[int, np.ndarray]],
        recvs: Sequence[tuple[int, np.ndarray]],
        add: bool,
        tag: int,
    ) -> None:
        """`own` is (to, from) of the part that stays on this rank, None where `dst` shares memory with `src`."""
        self.src, self.dst = src, dst
        self._own, self._add = own, add
        self._clear = add and not np.shares_memory(src, dst)
        self._out = [_message(peer, view, direct=True) for peer, view in sends]
        self._in = [_message(peer, view, direct=not add) for peer, view in recvs]
        self._requests: list[MPI.Prequest] = [comm.Recv_init(m.buffer, m.peer, tag) for m in self._in]
        self._requests += [comm.Send_init(m.buffer, m.peer, tag) for m in self._out]
        self.bytes_per_transfer = sum(m.buffer.nbytes for m in self._out)
        """What this rank sends to others at each `start`."""
        self.bytes_sent = 0
        """What this rank has sent so far."""

    def reserve(self) -> np.ndarray:
        """The array to write before `start`."""
        return self.src

    def start(self) -> None:
        """Begin the transfer; `src` must not be written until `finish`."""
        for message in self._out:
            if message.view is not None:
                np.copyto(message.buffer, message.view)
        self.bytes_sent += self.bytes_per_transfer
        MPI.Prequest.Startall(self._requests)

    def finish(self) -> np.ndarray:
        """Complete the transfer and return `dst`. Additions: the own part first, then by rank, always the same."""
        if self._clear:
            self.dst.fill(0)
        if self._own is not None:
            np.copyto(*self._own)
        MPI.Request.Waitall(self._requests)
        for message in self._in:
            if message.view is None:
                continue
            if self._add:
                np.add(message.view, message.buffer, out=message.view)
            else:
                np.copyto(message.view, message.buffer)
        return self.dst

    def run(self) -> np.ndarray:
        """`start` and `finish` with nothing between."""
        self.start()
        return self.finish()

    def free(self) -> None:
        """Release the persistent requests."""
        for request in self._requests:
            request.Free()
        self._requests = []


class Exchange:
    """Rank r owns `have.box(r)` of a global array (disjoint boxes) and wants `want.box(r)`.

    Wanted boxes may overlap (halo) and leave the array: there `fill` stands. `fwd` copies from owners to wanters; `bwd`
    is its adjoint: what several ranks hold of an owner's box is added up, and gradients of fill are dropped.
    Collective over `comm`; `tag` and `tag + 1` must be this edge's own.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        have: Region,
        want: Region,
        dtype: np.dtype,
        fill: float = 0.0,
        tag: int = 0,
        backward: bool = True,
    ) -> None:
        mine, wish = have.box(comm.rank), want.box(comm.rank)
        inplace = np.prod(extent(mine)) > 0 and contains(wish, mine)
        own = None if inplace else overlap(mine, wish)
        outgoing = [(r, box) for r, box in want.overlaps(mine) if r != comm.rank]
        incoming = [(r, box) for r, box in have.overlaps(wish) if r != comm.rank]

        y = np.full(extent(wish), fill, dtype)
        x = y[within(mine, wish)] if inplace else np.empty(extent(mine), dtype)
        self.fwd = Way(
            comm,
            x,
            y,
            (y[within(own, wish)], x[within(own, mine)]) if own else None,
            [(r, x[within(box, mine)]) for r, box in outgoing],
            [(r, y[within(box, wish)]) for r, box in incoming],
            add=False,
            tag=tag,
        )
        self.bwd: Way | None = None
        if not backward:
            return
        dy = np.zeros(extent(wish), dtype)
        dx = dy[within(mine, wish)] if inplace else np.empty(extent(mine), dtype)
        self.bwd = Way(
            comm,
            dy,
            dx,
            (dx[within(own, mine)], dy[within(own, wish)]) if own else None,
            [(r, dy[within(box, wish)]) for r, box in incoming],
            [(r, dx[within(box, mine)]) for r, box in outgoing],
            add=True,
            tag=tag + 1,
        )

    @property
    def ways(self) -> list[Way]:
        """Forward, and backward where it was built."""
        return [self.fwd] if self.bwd is None else [self.fwd, self.bwd]

    def free(self) -> None:
        """Release MPI resources."""
        for way in self.ways:
            way.free()


def _message(peer: int, view: np.ndarray, direct: bool) -> Message:
    """A message that fills `view`; a contiguous view can be its own buffer where nothing is added."""
    if direct and view.flags.c_contiguous:
        return Message(peer, view, None)
    return Message(peer, np.empty(view.shape, view.dtype), view)
