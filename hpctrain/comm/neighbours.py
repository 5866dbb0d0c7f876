"""Exchanges between ranks of one host: who wants something copies it out of its owner's array; nobody packs or sends.

The arrays lie in a window. An owner says that it has written, those who read say that they have, and the owner goes on
when all of them have: its memory may be another array's next.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import cast

import numpy as np
from mpi4py import MPI

from hpctrain.comm.shared import Wait, Window
from hpctrain.errors import SharedMemoryError

SHARED, MESSAGES = "shared memory", "messages"
"""What exchanges go by, on one host."""

FLAGS = 2
"""Of a way: how often this rank has written what others read, and how often it has read what others wrote."""

Views = Sequence[tuple[int, list[np.ndarray]]]
"""By rank of the communicator: views of this rank's arrays."""


def neighbours(
    comm: MPI.Intracomm, hosts: Sequence[int], wanted_by: Collection[int], nbytes: int, ways: int
) -> tuple[Neighbours | None, str]:
    """`nbytes` shared among the ranks of a host, if any is wanted by another there; and what exchanges go by.

    `wanted_by` are the ranks that want something of this one, `hosts` numbers the host of each rank. Collective.
    """
    here = [rank for rank, host in enumerate(hosts) if host == hosts[comm.rank]]
    wanted = comm.allgather(bool(set(wanted_by) & set(here) - {comm.rank}))
    if not any(wanted):
        return None, MESSAGES
    node = cast("MPI.Intracomm", comm.Split(hosts[comm.rank], comm.rank))
    if any(wanted[rank] for rank in here):
        try:
            return Neighbours(comm, node, here, nbytes, ways), SHARED
        except SharedMemoryError as error:
            node.Free()
            return None, f"{MESSAGES}: {error}"
    node.Free()
    return None, MESSAGES


class Neighbours:
    """The other ranks of this host, and memory of this rank that they see. Collective over the host.

    Raises SharedMemoryError, on all its ranks alike, where memory cannot be shared.
    """

    def __init__(self, comm: MPI.Intracomm, node: MPI.Intracomm, here: Sequence[int], nbytes: int, ways: int) -> None:
        """`here`: of the ranks of `node`, those in `comm`. Their ways have the tags 0 to `ways` - 1."""
        self.comm, self.node = comm, node
        self._window = Window(node, nbytes, FLAGS * ways, "arrays between layers")
        self.memory = self._window.segments[node.rank][:nbytes]
        """For the arrays that are exchanged."""
        self._place = {rank: place for place, rank in enumerate(here) if place != node.rank}
        """Of the other ranks of this host, their rank on it."""
        self.ranks = frozenset(self._place)

    def handover(self, tag: int, sends: Views, recvs: Views) -> Handover | None:
        """What neighbours do of a way; None if nothing. Collective over ranks that have a part in it."""
        sends, recvs = ([(r, views) for r, views in ranks if r in self._place] for ranks in (sends, recvs))
        return Handover(self, self._window, tag, sends, recvs) if sends or recvs else None

    def told(self, view: np.ndarray) -> tuple[int, tuple[int, ...]]:
        """Where `view` begins in this rank's memory, and its strides: what a neighbour needs to see it."""
        return view.ctypes.data - self.memory.ctypes.data, view.strides

    def seen(self, rank: int, told: tuple[int, tuple[int, ...]], like: np.ndarray) -> np.ndarray:
        """What `rank` has `told`, of the extents and type of `like`; read-only."""
        offset, strides = told
        memory = self._window.segments[self._place[rank]]
        view = np.ndarray(like.shape, like.dtype, memory, offset, strides)
        view.flags.writeable = False
        return view

    def places(self, ranks: Views) -> list[int]:
        """Of `ranks`, their rank on this host."""
        return [self._place[rank] for rank, _ in ranks]

    def free(self) -> None:
        """Let go of the memory. Collective."""
        self._window.free()
        self.memory = np.empty(0, np.uint8)
        self.node.Free()


class Handover:
    """What this rank and its neighbours do of a way between its start and its finish."""

    def __init__(self, near: Neighbours, window: Window, tag: int, sends: Views, recvs: Views) -> None:
        asked = [near.comm.isend([near.told(view) for view in views], rank, tag) for rank, views in sends]
        self.parts = {
            rank: [
                (to, near.seen(rank, told, to)) for to, told in zip(views, near.comm.recv(None, rank, tag), strict=True)
            ]
            for rank, views in recvs
        }
        """By neighbour: (to, from) of what this rank wants of it."""
        MPI.Request.waitall(asked)
        self._written = window.meeting(FLAGS * tag, near.places(recvs))
        self._read = window.meeting(FLAGS * tag + 1, near.places(sends))
        self._all_written = Wait(self._written.complete, window.progress)
        self._all_read = Wait(self._read.complete, window.progress)

    def offer(self) -> None:
        """Say that neighbours may read."""
        self._written.come()

    def await_offers(self) -> None:
        """Return when this rank may."""
        self._all_written.wait()

    def leave(self) -> None:
        """Say that it has, and return when the neighbours have."""
        self._read.come()
        self._all_read.wait()
