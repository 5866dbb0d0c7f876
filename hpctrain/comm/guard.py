"""The collective guard: before ranks do something together, each tells the others what, and all must say the same.

Messages between a pair of ranks arrive in order, so the nth that one sends belongs to the nth thing that the two do
together: that is the sequence number. Pairs, not a collective of the group, since ranks that diverge may well be in
different communicators, where collectives would wait for each other for ever.
"""

from __future__ import annotations

import time

from mpi4py import MPI

from hpctrain.comm.divergence import LENGTH, Doing, describe
from hpctrain.comm.watch import Wait
from hpctrain.errors import DivergedError

_DOING, _LEFT = 1, 2  # tags: what a rank is about to do; that it will not do it, as somebody diverged


class Guard:
    """Compares over `comm`, a communicator of all ranks that is its own; a rank that answers nobody for `patience`
    seconds after others diverged is left out of the message.
    """

    def __init__(self, comm: MPI.Intracomm, patience: float) -> None:
        self.comm, self.patience = comm, patience
        self._sent: list[MPI.Request] = []
        self._left: dict[int, Doing] = {}
        """What ranks were about to do that met a divergence. They do nothing together with others any more."""

    def compare(self, wait: Wait) -> None:
        """Return once all ranks that do `wait` together have said the same. Else raise DivergedError, which names who
        does what: the same on all ranks, as each of them learns of it here, now or when it is next about to wait.
        """
        mine = Doing(str(wait), wait.nbytes)
        others = [rank for rank in wait.together if rank != self.comm.rank]
        said = {rank: bytearray(LENGTH) for rank in others}
        receives = {rank: self.comm.Irecv(said[rank], rank, _DOING) for rank in others}
        message = mine.pack()
        sends = [self.comm.Isend(message, rank, _DOING) for rank in others]
        while receives:
            # In this order: what a rank said before it left is found after the news that it left.
            self._listen()
            arrived = [rank for rank, request in receives.items() if request.Test()]
            for rank in arrived:
                del receives[rank]
            wait.awaited = tuple(receives)
            if receives.keys() & self._left.keys() or any(said[rank] != message for rank in arrived):
                for request in receives.values():
                    request.Cancel()
                    request.Wait()
                self._raise(mine)
            if receives and not arrived:
                time.sleep(0.0001)
        MPI.Request.Waitall(sends)

    def _listen(self) -> None:
        """Note who has left."""
        status = MPI.Status()
        while self.comm.Iprobe(MPI.ANY_SOURCE, _LEFT, status):
            message = bytearray(LENGTH)
            self.comm.Recv(message, status.source, _LEFT)
            self._left[status.source] = Doing.unpack(message)

    def _raise(self, mine: Doing) -> None:
        """Tell all ranks, hear what they were about to do, and raise."""
        message = mine.pack()
        others = [rank for rank in range(self.comm.size) if rank != self.comm.rank]
        self._sent += [self.comm.Isend(message, rank, _LEFT) for rank in others]  # kept, as nobody may receive them
        self._left[self.comm.rank] = Doing.unpack(message)
        deadline = time.monotonic() + self.patience
        while len(self._left) < self.comm.size and time.monotonic() < deadline:
            self._listen()
            time.sleep(0.0001)
        raise DivergedError(describe(self._left, self.comm.size))
