"""Ring allreduce whose reduce-scatter goes in segments: while one is added, the next is already on its way.

Same bytes as the ring and same bits, in (segments + 1) (p - 1) messages (as Open MPI's algorithm of this name).
"""

from __future__ import annotations

from math import ceil

import numpy as np

from hpctrain.comm.allreduce import ring
from hpctrain.comm.allreduce.cost import Network, Sent, sent_of
from hpctrain.comm.link import Link, Requests, Steps, add, flat
from hpctrain.partition import split

SEGMENT = 2**20
"""Bytes: so many that a message's overhead is small beside them; as Open MPI's."""


def segments(elements: float, itemsize: int, ranks: int, most: int = SEGMENT) -> int:
    """How many segments of at most `most` bytes the longest share is cut into, and so are all."""
    return max(1, ceil(ceil(elements / ranks) * itemsize / most))


@flat
def steps(link: Link, buffer: np.ndarray, most: int = SEGMENT) -> Steps:
    """Sum the contiguous 1D `buffer` over the ranks of `link`, in place, in segments of at most `most` bytes."""
    count = segments(buffer.size, buffer.itemsize, link.size, most)
    if count == 1:
        yield from ring.reduce_scatter(link, buffer)
    else:
        yield from _reduce_scatter(link, buffer, count)
    yield from ring.allgather(link, buffer)


def _reduce_scatter(link: Link, buffer: np.ndarray, count: int) -> Steps:
    """Messages in order of step and segment; each is under way while the one before it is added.

    Message t + 1 sends what message t + 1 - count brought, which has been added by then, as count is 2 or more.
    """
    p, rank = link.size, link.rank
    blocks = [ring.shares(block, count) for block in ring.shares(buffer, p)]
    arriving = [segment for step in range(p - 1) for segment in blocks[(rank - step - 2) % p]]
    leaving = [segment for step in range(p - 1) for segment in blocks[(rank - step - 1) % p]]
    longest = blocks[0][0].size
    inboxes = ring.shares(link.scratch(2 * longest, buffer.dtype), 2)

    def start(t: int) -> Requests:
        into = inboxes[t % 2][: arriving[t].size]
        return [link.recv(into, (rank - 1) % p), link.send(leaving[t], (rank + 1) % p)]

    under_way = start(0) if arriving else []
    for t, into in enumerate(arriving):
        requests, under_way = under_way, start(t + 1) if t + 1 < len(arriving) else []
        yield requests
        add(into, inboxes[t % 2][: into.size])


def cost(ranks: int, nbytes: float, net: Network, most: int = SEGMENT) -> float:
    """Seconds of a pipeline of two stages, transfer and addition, and of the ring's allgather (derived)."""
    count = segments(nbytes, 1, ranks, most)
    share = nbytes / ranks
    transfer, addition = net.alpha + share / count * net.beta, share / count * net.gamma
    if count == 1 or ranks == 1:
        return (ranks - 1) * (transfer + addition + net.alpha + share * net.beta)
    reduce = transfer + ((ranks - 1) * count - 1) * max(transfer, addition) + addition
    return reduce + (ranks - 1) * (net.alpha + share * net.beta)


def sent(ranks: int, rank: int, elements: int, itemsize: int, most: int = SEGMENT) -> Sent:
    """While reducing the segments of all blocks but the rank's own; while gathering as the ring does."""
    count = segments(elements, itemsize, ranks, most)
    size = [stop - start for start, stop in (split(elements, ranks, i) for i in range(ranks))]
    pieces = [split(size[i], count, k) for i in range(ranks) if i != rank for k in range(count)]
    gather = [size[i] for i in range(ranks) if i != (rank + 1) % ranks]
    return sent_of([stop - start for start, stop in pieces] + gather, itemsize)
