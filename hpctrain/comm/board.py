"""What the ranks of a host wait for, on a page of memory that their watchdogs read: MPI is not for these threads."""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mpi4py import MPI


class Entry(NamedTuple):
    """What a rank waits for: since when, by the clock that the processes of a host share, and a digest of the Wait."""

    since: float
    digest: int


_ENTRY = struct.Struct("<dQ")


class Board:
    """A page with an entry for each of `ranks`, of which the one at `place` is this rank's."""

    def __init__(self, page: mmap.mmap | bytearray, ranks: Sequence[int], place: int) -> None:
        self.ranks, self.rank = tuple(ranks), ranks[place]
        self._page, self._offset = page, place * _ENTRY.size

    def post(self, entry: Entry | None) -> None:
        """What this rank waits for, or None."""
        _ENTRY.pack_into(self._page, self._offset, *(entry or Entry(0.0, 0)))

    def waiting(self) -> dict[int, Entry]:
        """{rank: entry} of those that wait."""
        found = (Entry(*_ENTRY.unpack_from(self._page, i * _ENTRY.size)) for i in range(len(self.ranks)))
        return {rank: entry for rank, entry in zip(self.ranks, found, strict=True) if entry.digest}


def shared(node: MPI.Intracomm, ranks: Sequence[int]) -> Board | None:
    """The board of the ranks of `node`, called `ranks` in messages; None, on all of them, where they share no files.

    Collective.
    """
    path, page = None, None
    with suppress(OSError):
        if node.rank == 0:
            path = _new_file(len(ranks) * _ENTRY.size)
    path = node.bcast(path)
    with suppress(OSError):
        if path is not None:
            with open(path, "r+b") as file:
                page = mmap.mmap(file.fileno(), 0)
    everyone = all(node.allgather(page is not None))
    if node.rank == 0 and path is not None:
        os.unlink(path)
    return Board(page, ranks, node.rank) if page is not None and everyone else None


def _new_file(size: int) -> str:
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    fd, path = tempfile.mkstemp(prefix="hpctrain-", dir=memory)
    os.ftruncate(fd, size)
    os.close(fd)
    return path
