"""Recursive doubling: each round doubles the group whose sum a rank holds. Fewest messages, for short buffers.

Partners send each other the whole buffer. Where the ranks are no power of two, the first ones are paired: the even one
of a pair hands its buffer to the odd one, and gets the result from it (as MPICH does).
"""

from __future__ import annotations

import numpy as np

from hpctrain.comm.allreduce.cost import Network, Sent, sent_of
from hpctrain.comm.link import Link, Steps, add, flat


@flat
def steps(link: Link, buffer: np.ndarray) -> Steps:
    """Sum the contiguous 1D `buffer` over the ranks of `link`, in place."""
    rounds = link.size.bit_length() - 1
    surplus = link.size - 2**rounds
    inbox = link.scratch(buffer.size, buffer.dtype)
    paired = link.rank < 2 * surplus
    if paired and link.rank % 2 == 0:
        yield [link.send(buffer, link.rank + 1)]
        yield [link.recv(buffer, link.rank + 1)]
        return
    if paired:
        yield [link.recv(inbox, link.rank - 1)]
        add(buffer, inbox)
    place = link.rank // 2 if paired else link.rank - surplus
    for i in range(rounds):
        other = place ^ (1 << i)
        peer = 2 * other + 1 if other < surplus else other + surplus
        yield [link.recv(inbox, peer), link.send(buffer, peer)]
        add(buffer, inbox)  # a + b here, b + a there: the same bits
    if paired:
        yield [link.send(buffer, link.rank - 1)]


def cost(ranks: int, nbytes: float, net: Network) -> float:
    """Seconds: lg p (alpha + n beta + n gamma) (Thakur et al. 2005, section 4.5), each surplus there and back.

    The surplus costs 2 alpha + 2 n beta + n gamma more (derived).
    """
    rounds = ranks.bit_length() - 1
    seconds = rounds * (net.alpha + nbytes * (net.beta + net.gamma))
    if ranks != 2**rounds:
        seconds += 2 * net.alpha + nbytes * (2 * net.beta + net.gamma)
    return seconds


def sent(ranks: int, rank: int, elements: int, itemsize: int) -> Sent:
    """The whole buffer in each round; once from a rank that is folded in, once more from the one that folds it in."""
    rounds = ranks.bit_length() - 1
    paired = rank < 2 * (ranks - 2**rounds)
    count = 1 if paired and rank % 2 == 0 else rounds + paired
    return sent_of([elements] * count, itemsize)
