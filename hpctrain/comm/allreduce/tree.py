"""Binomial tree: all is summed to rank 0, then sent back. Also `reduce` and `broadcast` alone."""

from __future__ import annotations

import numpy as np

from hpctrain.comm.allreduce.cost import Network, Sent, sent_of
from hpctrain.comm.link import Link, Steps, add, flat


def parent(rank: int) -> int:
    """Towards rank 0: the lowest bit cleared."""
    return rank & (rank - 1)


def children(ranks: int, rank: int) -> list[int]:
    """Those whose parent is `rank`, nearest first."""
    below = (rank & -rank if rank else 1 << ranks.bit_length()).bit_length() - 1
    return [rank + (1 << i) for i in range(below) if rank + (1 << i) < ranks]


@flat
def steps(link: Link, buffer: np.ndarray) -> Steps:
    """Sum the contiguous 1D `buffer` over the ranks of `link`, in place."""
    yield from reduce(link, buffer)
    yield from broadcast(link, buffer)


@flat
def reduce(link: Link, buffer: np.ndarray) -> Steps:
    """Rank 0 ends with the sum; partial sums are left on the others."""
    inbox = link.scratch(buffer.size, buffer.dtype)
    for child in children(link.size, link.rank):
        yield [link.recv(inbox, child)]
        add(buffer, inbox)
    if link.rank > 0:
        yield [link.send(buffer, parent(link.rank))]


@flat
def broadcast(link: Link, buffer: np.ndarray) -> Steps:
    """All end with what rank 0 has."""
    if link.rank > 0:
        yield [link.recv(buffer, parent(link.rank))]
    yield [link.send(buffer, child) for child in reversed(children(link.size, link.rank))]


def cost(ranks: int, nbytes: float, net: Network) -> float:
    """Seconds: ceil(lg p) rounds up and as many down, 2 lg p (alpha + n beta) + lg p n gamma."""
    rounds = (ranks - 1).bit_length()
    return rounds * (2 * net.alpha + nbytes * (2 * net.beta + net.gamma))


def sent(ranks: int, rank: int, elements: int, itemsize: int) -> Sent:
    """Once to the parent, and to each child."""
    return sent_of([elements] * ((rank > 0) + len(children(ranks, rank))), itemsize)
