"""Rabenseifner's algorithm: reduce-scatter by recursive halving, allgather by recursive doubling.

As few bytes as the ring in 2 lg p messages. Where the ranks are no power of two, the first ones are paired to one
*place* each. A pair splits the buffer: each half is summed by the member that holds it, and in the first round the half
that the place gives away is sent by the member that has it, who then waits for the last round. So a pair costs half a
buffer each way, where handing all of it to one member costs a whole one (Rabenseifner & Traeff 2004 split it likewise).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from hpctrain.comm.allreduce.cost import Network, Sent, sent_of
from hpctrain.comm.allreduce.halving import Halves, allgather, halve, halvings, length, reduce_scatter
from hpctrain.comm.link import Link, Steps, add, flat


class Role(NamedTuple):
    """What a rank does."""

    place: int
    half: int | None
    """Which half of the buffer it holds of its pair's, 0 or 1; None where it is not paired."""
    halves: tuple[Halves, ...]
    """Of its place, by round."""

    @property
    def active(self) -> bool:
        """Whether it goes on after the first round: it holds the half that its place keeps."""
        return self.half in (None, self.place & 1)


def surplus(ranks: int) -> int:
    """Ranks above a power of two: as many as there are pairs."""
    return ranks - 2 ** (ranks.bit_length() - 1)


@lru_cache(maxsize=1024)
def role(ranks: int, rank: int, elements: int) -> Role:
    """The role of `rank`."""
    pairs = surplus(ranks)
    place, half = (rank // 2, rank % 2) if rank < 2 * pairs else (rank - pairs, None)
    return Role(place, half, halvings(elements, place, ranks.bit_length() - 1))


def holder(ranks: int, place: int, half: int) -> int:
    """The rank that holds `half` of the buffer in `place`."""
    pairs = surplus(ranks)
    return 2 * place + half if place < pairs else place + pairs


@flat
def steps(link: Link, buffer: np.ndarray) -> Steps:
    """Sum the contiguous 1D `buffer` over the ranks of `link`, in place."""
    if link.size == 1:
        return
    me = role(link.size, link.rank, buffer.size)
    kept, given = (buffer[slice(*half)] for half in me.halves[0])
    keeper, taker = (holder(link.size, me.place ^ 1, half) for half in (me.place & 1, 1 - (me.place & 1)))
    mine, others = (buffer[slice(*half)] for half in halve((0, buffer.size), me.half or 0))
    if me.half is not None:
        inbox = link.scratch(mine.size, buffer.dtype)
        yield [link.recv(inbox, link.rank ^ 1), link.send(others, link.rank ^ 1)]
        add(mine, inbox)
    if me.active:
        inbox = link.scratch(kept.size, buffer.dtype)
        yield [link.recv(inbox, keeper), *([link.send(given, taker)] if me.half is None else [])]
        add(kept, inbox)
        peers = [holder(link.size, me.place ^ 1 << i, me.place & 1) for i in range(1, len(me.halves))]
        yield from reduce_scatter(link, buffer, me.halves[1:], peers)
        yield from allgather(link, buffer, me.halves[1:], peers)
        yield [link.send(kept, keeper), *([link.recv(given, taker)] if me.half is None else [])]
    else:
        yield [link.send(given, taker)]
        yield [link.recv(given, taker)]
    if me.half is not None:
        yield [link.recv(others, link.rank ^ 1), link.send(mine, link.rank ^ 1)]


def cost(ranks: int, nbytes: float, net: Network) -> float:
    """Seconds: 2 lg p alpha + (p-1)/p n (2 beta + gamma) for p = 2**k (Thakur et al. 2005, section 4.5).

    Else with the largest such p below, and for the pairs, half a buffer there and back: 2 alpha + n (beta + gamma / 2)
    (derived; with the whole of it moved it is 2 alpha + n (2 beta + gamma)).
    """
    rounds = ranks.bit_length() - 1
    seconds = 2 * rounds * net.alpha + (1 - 2**-rounds) * nbytes * (2 * net.beta + net.gamma)
    if surplus(ranks):
        seconds += 2 * net.alpha + nbytes * (net.beta + net.gamma / 2)
    return seconds


def sent(ranks: int, rank: int, elements: int, itemsize: int) -> Sent:
    """Given halves going down, kept ones coming up; of a pair twice with each other, and only one goes on."""
    if ranks == 1:
        return Sent(0, 0)
    me = role(ranks, rank, elements)
    if me.half is None:
        return sent_of([length(half) for both in me.halves for half in both], itemsize)
    mine, others = halve((0, elements), me.half)
    sizes = [length(mine), length(others)]
    if me.active:
        sizes += [length(me.halves[0].kept), *(length(half) for both in me.halves[1:] for half in both)]
    else:
        sizes += [length(me.halves[0].given)]
    return sent_of(sizes, itemsize)
