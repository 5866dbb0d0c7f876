"""Binary blocks: the ranks fall into blocks of powers of two, the largest first (11 = 8 + 2 + 1), and none sits idle.

Each block does a reduce-scatter by halving. From the smallest block on, its ranks hand what they hold, in pieces, to
the ranks of the next larger block that hold just that, and the sums come back the same way before each block's
allgather (Rabenseifner's algorithm; Chahal et al. 2018, section on binary blocks). Good where neighbouring blocks are
of similar sizes, as 8 + 4; worst where one rank faces many, as 8 + 1.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from hpctrain.comm.allreduce.cost import Network, Sent, sent_of
from hpctrain.comm.allreduce.halving import Halves, allgather, halvings, length, reduce_scatter, window
from hpctrain.comm.link import Link, Steps, add, flat
from hpctrain.partition import Interval


def blocks(ranks: int) -> list[tuple[int, int]]:
    """(first rank, lg of the size) of each block, largest first."""
    found, first = [], 0
    for rounds in reversed(range(ranks.bit_length())):
        if ranks >> rounds & 1:
            found.append((first, rounds))
            first += 1 << rounds
    return found


class Role(NamedTuple):
    """What a rank does."""

    halves: tuple[Halves, ...]
    peers: tuple[int, ...]
    """Within its block, by round."""
    held: Interval
    """What it holds after its block's reduce-scatter."""
    smaller: int | None
    """The rank of the next smaller block that holds this too."""
    larger: tuple[tuple[int, Interval], ...]
    """Ranks of the next larger block, and the pieces of it that they hold."""


@lru_cache(maxsize=1024)
def role(ranks: int, rank: int, elements: int) -> Role:
    """The role of `rank`."""
    every = blocks(ranks)
    block = max(i for i, (first, _) in enumerate(every) if first <= rank)
    first, rounds = every[block]
    place = rank - first
    smaller = None
    if block + 1 < len(every):
        below, lower = every[block + 1]
        smaller = below + place % 2**lower
    larger: tuple[tuple[int, Interval], ...] = ()
    if block > 0:
        above, higher = every[block - 1]
        others = range(place, 2**higher, 2**rounds)
        larger = tuple((above + other, window(elements, other, higher)) for other in others)
    peers = tuple(first + (place ^ 1 << i) for i in range(rounds))
    return Role(halvings(elements, place, rounds), peers, window(elements, place, rounds), smaller, larger)


@flat
def steps(link: Link, buffer: np.ndarray) -> Steps:
    """Sum the contiguous 1D `buffer` over the ranks of `link`, in place."""
    me = role(link.size, link.rank, buffer.size)
    held = buffer[slice(*me.held)]
    yield from reduce_scatter(link, buffer, me.halves, me.peers)
    if me.smaller is not None:
        inbox = link.scratch(held.size, buffer.dtype)
        yield [link.recv(inbox, me.smaller)]
        add(held, inbox)
    if me.larger:
        yield [link.send(buffer[slice(*piece)], peer) for peer, piece in me.larger]
        yield [link.recv(buffer[slice(*piece)], peer) for peer, piece in me.larger]
    if me.smaller is not None:
        yield [link.send(held, me.smaller)]
    yield from allgather(link, buffer, me.halves, me.peers)


def cost(ranks: int, nbytes: float, net: Network) -> float:
    """Seconds until the last rank is done (derived; with three blocks and more up to a quarter above what it takes).

    Blocks halve side by side, then wait for the smaller ones. A rank of the smaller block sends its pieces, and gets
    them back, one after the other, while the first ranks of the larger block add theirs.
    """
    rounds = [lg for _, lg in blocks(ranks)]
    piece = [net.alpha + nbytes / 2**lg * net.beta for lg in rounds]
    handing = [2 ** (larger - smaller) * time for larger, smaller, time in zip(rounds, rounds[1:], piece, strict=False)]
    ready = summed = 0.0  # when the block looked at may take from the smaller one, and when it has the sums
    for i in reversed(range(len(rounds))):
        halved = rounds[i] * net.alpha + (1 - 2 ** -rounds[i]) * nbytes * (net.beta + net.gamma)
        ready = max(halved, summed)
        summed = halved if i + 1 == len(rounds) else ready + handing[i] + nbytes / 2 ** rounds[i] * net.gamma
    end, at = 0.0, summed
    for i, lg in enumerate(rounds):
        if i < len(handing):
            at = max(ready + 2 * handing[0], summed + piece[0]) if i == 0 else at + handing[i]
        end = max(end, at + lg * net.alpha + (1 - 2**-lg) * nbytes * net.beta)
    return end


def sent(ranks: int, rank: int, elements: int, itemsize: int) -> Sent:
    """Given halves going down, kept ones coming up, and between the blocks what the rank holds, each way once."""
    me = role(ranks, rank, elements)
    sizes = [length(half) for both in me.halves for half in both] + [length(piece) for _, piece in me.larger]
    return sent_of(sizes + ([length(me.held)] if me.smaller is not None else []), itemsize)
