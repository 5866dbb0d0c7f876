"""Hierarchical: first the ranks of each host, then one message per host, then the ranks of each host again.

Where all hosts hold equally many ranks, a rank sums one share of its host's buffers, sums that with those of its place
on the other hosts, and gathers the rest: every rank works, and what crosses between hosts is what one rank per host
would send. Else one rank of each host does it for all. `Within` is how the ranks of a host combine: here by messages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from hpctrain.comm.allreduce import halving_doubling, ring, tree
from hpctrain.comm.allreduce.cost import Network, Sent
from hpctrain.comm.link import Link, Steps, flat
from hpctrain.partition import split

Part = Callable[[Link, np.ndarray], Steps]
"""A step among ranks of one host: (link, buffer)."""


class Within(NamedTuple):
    """How the ranks of a host combine their buffers, and spread the result."""

    reduce_scatter: Part
    """Rank r ends with the host's sum in its share, split(size, ranks, r)."""
    allgather: Part
    """Rank r starts with its share, and ends with all."""
    reduce: Part
    """Rank 0 ends with the host's sum."""
    broadcast: Part
    """All end with what rank 0 has."""


MESSAGES = Within(ring.reduce_scatter, ring.allgather, tree.reduce, tree.broadcast)


@flat
def steps(link: Link, buffer: np.ndarray, between: Part = halving_doubling.steps, within: Within = MESSAGES) -> Steps:
    """Sum the contiguous 1D `buffer` over the ranks of `link`, in place. Splits the link at the first call."""
    node, across = link.nodes()
    if link.topology.even:
        yield from within.reduce_scatter(node, buffer)
        yield from between(across, ring.shares(buffer, node.size)[node.rank])
        yield from within.allgather(node, buffer)
    else:
        yield from within.reduce(node, buffer)
        if node.rank == 0:
            yield from between(across, buffer)
        yield from within.broadcast(node, buffer)


def cost(ranks: int, nbytes: float, net: Network) -> float:
    """Seconds of a ring in the host and of halving-doubling between hosts, where a host's ranks share its link.

    Where hosts hold `per_host` ranks but for one that holds fewer: of the tree, and of one rank of each host.
    """
    near, hosts = net.near or net, -(-ranks // net.per_host)
    if ranks % net.per_host:
        return tree.cost(net.per_host, nbytes, near) + halving_doubling.cost(hosts, nbytes, net)
    between = Network(net.alpha, net.beta * net.per_host, net.gamma)
    return ring.cost(net.per_host, nbytes, near) + halving_doubling.cost(hosts, nbytes / net.per_host, between)


def sent(ranks: int, rank: int, elements: int, itemsize: int, hosts: Sequence[int] = ()) -> Sent:
    """What the parts send; `hosts` has the host of each rank, by default the same for all."""
    hosts = hosts or [0] * ranks
    here = [other for other in range(ranks) if hosts[other] == hosts[rank]]
    place, counts = here.index(rank), Counter(hosts)
    firsts = sorted(hosts.index(host) for host in counts)
    host = firsts.index(here[0])
    if len(set(counts.values())) == 1:
        start, stop = split(elements, len(here), place)
        near = ring.sent(len(here), place, elements, itemsize)
        far = halving_doubling.sent(len(firsts), host, stop - start, itemsize)
    else:
        near = tree.sent(len(here), place, elements, itemsize)
        far = halving_doubling.sent(len(firsts), host, elements, itemsize) if place == 0 else Sent(0, 0)
    return Sent(near.messages + far.messages, near.nbytes + far.nbytes)
