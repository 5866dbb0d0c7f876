"""For one part of an edge and many ways to cut it: what each rank has in common with others along its dims.

Ways that cut into the same blocks, at the same distance in rank, are one class. Everything else multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from hpctrain.planner.classes import Classes, Owners, Wanters, Wishes, alike, common
from hpctrain.planner.ends import Ends
from hpctrain.planner.sampling import Sample


class Rows(NamedTuple):
    """float64 (classes of owners, classes of who wants, ranks), but for `wanted`.

    Of each rank: what it `wanted` of all blocks (classes of who wants, ranks); of its `own`, what is `kept` where it
    is, and what is `given` of its block to all; with how many `owners` and `wanters` that is. `gives` and `takes`
    (neighbours, ...) are what it is given by, and taken by, each neighbour; or by its whole host together, itself
    included, and then `near_owners` and `near_wanters` are how many of these. Each `_same` counts the blocks that are
    just what is wanted. What the sample does not need is empty.
    """

    wanted: np.ndarray
    own: np.ndarray
    own_same: np.ndarray
    kept: np.ndarray
    owners: np.ndarray
    owners_same: np.ndarray
    given: np.ndarray
    wanters: np.ndarray
    wanters_same: np.ndarray
    gives: np.ndarray
    gives_same: np.ndarray
    takes: np.ndarray
    takes_same: np.ndarray
    near_owners: np.ndarray
    near_wanters: np.ndarray


@lru_cache(maxsize=12)  # tens of MiB each for thousands of ranks
def rows(ends: Ends, have: Classes, want: Classes, sample: Sample) -> Rows:
    """Those of `ends`, one of ends.parts, for classes of its owners and of who wants."""
    owners, wanters = Owners(ends, *have.arrays()), Wanters(ends, *want.arrays())
    mine, wish = owners.at(sample.looked_at), wanters.at(sample.looked_at)
    wanted = np.prod((wish.stops - wish.starts).sum(1), axis=0, dtype=np.float64) * wish.taking
    count, count_same = owners.all_of(wish)
    given, takers, takers_same = wanters.all_of(mine)
    same = (alike(mine, wish), count_same, takers_same) if sample.runs else (NONE, NONE, NONE)
    near = _near(owners, wanters, mine, wish, sample)
    return Rows(wanted, common(mine, wish), same[0], _kept(mine, wish), count, same[1], given, takers, same[2], *near)


NONE = np.zeros((0, 0, 0))
"""What nobody asks for."""


def _near(owners: Owners, wanters: Wanters, mine: np.ndarray, wish: Wishes, sample: Sample) -> tuple[np.ndarray, ...]:
    """`gives` and what follows in Rows."""
    if sample.summed:
        shape = mine.shape[2], *wish.taking.shape
        gives = _over_hosts([(part, wish, np.s_[i]) for part, i in owners.hosts(sample)], shape, sample.runs)
        takes = _over_hosts([(mine, part, np.s_[:, j]) for part, j in wanters.hosts(sample)], shape, sample.runs)
        return gives[0][None], gives[1][None], takes[0][None], takes[1][None], gives[2], takes[2]
    if not sample.several:
        return (NONE[None],) * 4 + (NONE, NONE)
    given = [(owners.at(ranks), wish) for ranks in sample.beside]
    taken = [(mine, wanters.at(ranks)) for ranks in sample.beside]
    found: list[np.ndarray] = []
    for pairs in (given, taken):
        found.append(np.stack([common(*pair) for pair in pairs]))
        found.append(np.stack([alike(*pair) for pair in pairs]) if sample.runs else NONE[None])
    return (*found, NONE, NONE)


def _kept(mine: np.ndarray, wish: Wishes) -> np.ndarray:
    """The elements of blocks all of which are wanted."""
    low, high = mine[:, :, :, None]
    found = np.broadcast_to(wish.taking.astype(np.float64), (mine.shape[2], *wish.taking.shape))
    for d in range(len(low)):
        found = found * np.where((wish.outer[0, d] <= low[d]) & (high[d] <= wish.outer[1, d]), high[d] - low[d], 0)
    return np.ascontiguousarray(found)


def _over_hosts(
    found: Sequence[tuple[np.ndarray, Wishes, Any]], shape: tuple[int, ...], runs: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(elements, if `runs` the blocks that are just what is wanted, how many have any) summed over the coordinates of a
    host, each of them with the classes that have it.
    """
    elements, count = np.zeros((2, *shape))
    same = np.zeros(shape) if runs else NONE
    for mine, wish, classes in found:
        n = common(mine, wish)
        elements[classes] += n
        count[classes] += n > 0
        if runs:
            same[classes] += alike(mine, wish)
    return elements, same, count
