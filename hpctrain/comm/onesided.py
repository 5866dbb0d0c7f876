"""Memory that other replicas read and write without the help of its rank: MPI windows with passive targets.

Open MPI does this by loads and stores between ranks of a host, whatever the owner computes. Between hosts, and in MPICH
everywhere, an access may have to wait until its target next enters the library: once a step and more.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from mpi4py import MPI

from hpctrain.comm.replicas import Replicas
from hpctrain.comm.watch import Wait
from hpctrain.comm.watched import others

HEADER = 64
"""Bytes before a vector, so that it starts a cache line; the first 8 are its version."""

SPINS, YIELDS, NAP = 50, 500, 2e-4


class Patience:
    """What to do between two looks at something that others change: nothing, then yield the core, then sleep."""

    def __init__(self) -> None:
        self.looks = 0

    def pause(self) -> None:
        """Call it after each look in vain. Lets MPI progress, as the others may wait for an answer of this rank."""
        self.looks += 1
        MPI.COMM_SELF.Iprobe()
        if self.looks > YIELDS:
            time.sleep(NAP)
        elif self.looks > SPINS:
            os.sched_yield()


class Vectors:
    """A vector in every replica, with a version number; its ranks hold a part each, of `size` elements on this one.

    A replica locks a whole vector, on all ranks of both: nobody sees one half old and half new, and what several
    ranks of a replica hold alike stays alike. All methods are collective over the ranks of the calling replica, but for
    the constructor and `free`, which are over all.
    """

    def __init__(self, replicas: Replicas, size: int, dtype: np.dtype) -> None:
        self.size, self.dtype, self._inside = size, np.dtype(dtype), replicas.inside
        self._wait = Wait("", "an exchange with other replicas", others(replicas.across))
        self._window = MPI.Win.Allocate(HEADER + size * self.dtype.itemsize, 1, comm=replicas.across)
        self._window.Lock(replicas.across.rank)
        self._window.Put(np.zeros(1, np.int64), replicas.across.rank, 0)
        self._window.Unlock(replicas.across.rank)
        replicas.across.Barrier()

    @contextmanager
    def locked(self, replica: int, shared: bool = False) -> Iterator[None]:
        """Around accesses to the vector of `replica`: nobody else writes it, nor reads it unless `shared`."""
        kind, first = MPI.LOCK_SHARED if shared else MPI.LOCK_EXCLUSIVE, self._inside.rank == 0
        with self._wait:
            if not first:
                self._inside.Barrier()
            self._window.Lock(replica, kind)  # of the first rank: decides for all
            if first:
                self._inside.Barrier()
        yield
        self._window.Flush(replica)
        self._inside.Barrier()
        self._window.Unlock(replica)

    def get(self, replica: int, out: np.ndarray) -> int:
        """Fill `out` (at most `size` elements) from the vector of `replica`, which is locked; its version."""
        version = np.empty(1, np.int64)
        self._window.Get(version, replica, 0)
        self._window.Get(_bytes(out), replica, HEADER)
        self._window.Flush(replica)
        return int(version[0])

    def version(self, replica: int) -> int:
        """The version of the vector of `replica`, which is locked."""
        return self.get(replica, np.empty(0, self.dtype))

    def put(self, replica: int, values: np.ndarray, version: int) -> None:
        """Write `values` (at most `size` elements) to the vector of `replica`, which is locked."""
        self._window.Put(_bytes(values), replica, HEADER)
        self._window.Put(np.array([version]), replica, 0)
        self._window.Flush(replica)

    def free(self) -> None:
        """Release the window. Collective over all replicas."""
        self._window.Free()


class Words:
    """Whole numbers in the memory of rank 0 of `comm`, 0 at first, that every rank reads and sets at any moment."""

    def __init__(self, comm: MPI.Intracomm, count: int) -> None:
        self.count = count
        self._window = MPI.Win.Allocate(8 * count if comm.rank == 0 else 0, 8, comm=comm)
        if comm.rank == 0:
            self._window.Lock(0)
            self._window.Put(np.zeros(count, np.int64), 0)
            self._window.Unlock(0)
        comm.Barrier()
        self._window.Lock_all()

    def read(self) -> list[int]:
        """All of them."""
        found, nothing = np.empty((2, self.count), np.int64)
        self._window.Get_accumulate(nothing, found, 0, op=MPI.NO_OP)
        self._window.Flush(0)
        return [int(word) for word in found]

    def set(self, index: int, value: int) -> None:
        """Set one; whoever reads after this returns finds it."""
        self._window.Accumulate(np.array([value]), 0, target=index, op=MPI.REPLACE)
        self._window.Flush(0)

    def free(self) -> None:
        """Release the window. Collective."""
        self._window.Unlock_all()
        self._window.Free()


def _bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)
