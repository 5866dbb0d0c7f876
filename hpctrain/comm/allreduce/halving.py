"""Recursive halving and doubling among 2**k places: what halving-doubling and binary blocks have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hpctrain.comm.link import Link, Steps, add
from hpctrain.partition import Interval


class Halves(NamedTuple):
    """Of what a place holds: the half that it keeps, and the one that it gives to its partner."""

    kept: Interval
    given: Interval


def halve(window: Interval, bit: int) -> Halves:
    """Keep the lower half of `window`, which may be one longer, or with `bit` the upper one."""
    start, stop = window
    middle = (start + stop + 1) // 2
    low, high = (start, middle), (middle, stop)
    return Halves(high, low) if bit else Halves(low, high)


def halvings(elements: int, place: int, rounds: int) -> tuple[Halves, ...]:
    """What `place` of 2**rounds keeps and gives in each round: bit i of the place says which half in round i.

    So the largest halves go to the nearest neighbour, place ^ 1, which often is on the same host.
    """
    found: list[Halves] = []
    window = (0, elements)
    for i in range(rounds):
        found.append(halve(window, place >> i & 1))
        window = found[-1].kept
    return tuple(found)


def window(elements: int, place: int, rounds: int) -> Interval:
    """What `place` holds after all rounds. Places that agree in the lower bits share what those hold."""
    return halvings(elements, place, rounds)[-1].kept if rounds else (0, elements)


def reduce_scatter(link: Link, buffer: np.ndarray, halves: Sequence[Halves], peers: Sequence[int]) -> Steps:
    """In each round give one half to a peer, and add what it gives to the other."""
    for (kept, given), peer in zip(halves, peers, strict=True):
        into = buffer[slice(*kept)]
        inbox = link.scratch(into.size, buffer.dtype)
        yield [link.recv(inbox, peer), link.send(buffer[slice(*given)], peer)]
        add(into, inbox)


def allgather(link: Link, buffer: np.ndarray, halves: Sequence[Halves], peers: Sequence[int]) -> Steps:
    """The same rounds backwards: sums of the half that was kept against those of the half that was given."""
    for (kept, given), peer in reversed(list(zip(halves, peers, strict=True))):
        yield [link.recv(buffer[slice(*given)], peer), link.send(buffer[slice(*kept)], peer)]


def length(interval: Interval) -> int:
    """Number of elements."""
    return interval[1] - interval[0]
