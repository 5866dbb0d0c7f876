"""The ranks of a job as copies of one network: each on some ranks, and who holds the same blocks in the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from mpi4py import MPI


@dataclass(frozen=True)
class Replicas:
    """`count` copies of a network; this rank is one of copy `index`."""

    count: int
    index: int
    inside: MPI.Intracomm
    """The ranks of this replica."""
    across: MPI.Intracomm
    """The ranks with this one's place in all replicas, by replica: they hold the same blocks."""

    def free(self) -> None:
        """Release the communicators. Collective."""
        self.inside.Free()
        self.across.Free()


def divide(comm: MPI.Intracomm, count: int) -> Replicas:
    """The ranks of `comm` as `count` replicas of equal size, neighbours together. Collective; `count` divides them."""
    ranks = comm.size // count
    index, place = divmod(comm.rank, ranks)
    inside, across = comm.Split(index, comm.rank), comm.Split(place, comm.rank)
    return Replicas(count, index, cast("MPI.Intracomm", inside), cast("MPI.Intracomm", across))
