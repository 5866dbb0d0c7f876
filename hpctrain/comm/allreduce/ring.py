"""Ring allreduce: reduce-scatter, then allgather, neighbour to neighbour.

Sends the fewest bytes possible, 2 (p - 1) / p of the buffer from each rank (Patarasuk & Yuan 2009), in 2 (p - 1)
messages. Each block is summed by the ranks in the order of the ring, and ends at the rank of its number.
"""

from __future__ import annotations

import numpy as np

from hpctrain.comm.allreduce.cost import Network, Sent, sent_of
from hpctrain.comm.link import Link, Steps, add, flat
from hpctrain.partition import split


def shares(buffer: np.ndarray, ranks: int) -> list[np.ndarray]:
    """The balanced stretches of `buffer`, one for each rank."""
    return [buffer[slice(*split(buffer.size, ranks, rank))] for rank in range(ranks)]


@flat
def steps(link: Link, buffer: np.ndarray) -> Steps:
    """Sum the contiguous 1D `buffer` over the ranks of `link`, in place."""
    yield from reduce_scatter(link, buffer)
    yield from allgather(link, buffer)


@flat
def reduce_scatter(link: Link, buffer: np.ndarray) -> Steps:
    """Rank r ends with the sum in its share, split(size, p, r); partial sums are left in the others."""
    p, rank, block = link.size, link.rank, shares(buffer, link.size)
    for step in range(p - 1):
        into = block[(rank - step - 2) % p]
        inbox = link.scratch(into.size, buffer.dtype)
        yield [link.recv(inbox, (rank - 1) % p), link.send(block[(rank - step - 1) % p], (rank + 1) % p)]
        add(into, inbox)


@flat
def allgather(link: Link, buffer: np.ndarray) -> Steps:
    """Rank r starts with its share, split(size, p, r), and ends with all."""
    p, rank, block = link.size, link.rank, shares(buffer, link.size)
    for step in range(p - 1):
        into, out = block[(rank - step - 1) % p], block[(rank - step) % p]
        yield [link.recv(into, (rank - 1) % p), link.send(out, (rank + 1) % p)]


def cost(ranks: int, nbytes: float, net: Network) -> float:
    """Seconds: 2(p-1) messages of nbytes/p, half of them reduced on arrival."""
    share = nbytes / ranks
    return (ranks - 1) * (2 * net.alpha + share * (2 * net.beta + net.gamma))


def sent(ranks: int, rank: int, elements: int, itemsize: int) -> Sent:
    """While reducing all blocks but the rank's own, while gathering all but the right neighbour's."""
    size = [stop - start for start, stop in (split(elements, ranks, i) for i in range(ranks))]
    own, right = {rank}, {(rank + 1) % ranks}
    return sent_of((size[i] for without in (own, right) for i in range(ranks) if i not in without), itemsize)
