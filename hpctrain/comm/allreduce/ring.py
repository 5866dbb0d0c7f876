"""Ring allreduce: reduce-scatter, then allgather. Sends the fewest bytes possible (Patarasuk & Yuan 2009)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hpctrain.comm.allreduce.cost import Network
from hpctrain.partition import split

if TYPE_CHECKING:
    from mpi4py import MPI


def allreduce(comm: MPI.Intracomm, buffer: np.ndarray) -> None:
    """Sum the contiguous 1D `buffer` over `comm` in place: each block travels p-1 hops summed, then p-1 copied."""
    p, rank = comm.size, comm.rank
    right, left = (rank + 1) % p, (rank - 1) % p
    blocks = [buffer[slice(*split(buffer.size, p, i))] for i in range(p)]
    inbox = np.empty_like(blocks[0])  # block 0 is the longest

    for step in range(p - 1):  # reduce-scatter
        out, into = blocks[(rank - step) % p], blocks[(rank - step - 1) % p]
        comm.Sendrecv(out, right, recvbuf=inbox[: into.size], source=left)
        into += inbox[: into.size]
    for step in range(p - 1):  # allgather
        out, into = blocks[(rank + 1 - step) % p], blocks[(rank - step) % p]
        comm.Sendrecv(out, right, recvbuf=into, source=left)


def cost(ranks: int, nbytes: int, net: Network) -> float:
    """Seconds: 2(p-1) messages of nbytes/p, half of them reduced on arrival."""
    share = nbytes / ranks
    return (ranks - 1) * (2 * net.alpha + share * (2 * net.beta + net.gamma))


def sent_bytes(ranks: int, rank: int, elements: int, itemsize: int) -> int:
    """Bytes that `rank` sends: p-1 blocks while reducing and p-1 while copying."""
    size = [stop - start for start, stop in (split(elements, ranks, i) for i in range(ranks))]
    reduce = sum(size[(rank - step) % ranks] for step in range(ranks - 1))
    gather = sum(size[(rank + 1 - step) % ranks] for step in range(ranks - 1))
    return (reduce + gather) * itemsize
