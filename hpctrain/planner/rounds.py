"""What each rank does in an allreduce: its messages, in the order in which the algorithm's own steps make them.

The steps run on stretches of a buffer that have a length and nothing in them, over a link that notes what is asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np

from hpctrain.comm.allreduce import TABLE, ring
from hpctrain.comm.link import Link, Steps
from hpctrain.partition import near_square


class Post(NamedTuple):
    """Ready to send so many bytes to `peer`, or to receive them from it."""

    peer: int
    nbytes: int
    sends: bool


class Wait(NamedTuple):
    """For messages, by their number among the rank's posts."""

    posts: tuple[int, ...]


class Add(NamedTuple):
    """So many bytes, to as many; `near` where they came from ranks of one host."""

    nbytes: int
    near: bool


Step: TypeAlias = "Post | Wait | Add"

STEPS: dict[str, Callable[[Link, np.ndarray], Steps]] = {
    **{name: TABLE[name].steps for name in TABLE if name not in ("shared", "mpi")},
    "reduce_scatter": ring.reduce_scatter,
    "allgather": ring.allgather,
}
"""Algorithms that send messages of ours, and the halves of which sharded updates take one each."""


@lru_cache(maxsize=4096)
def steps_of(name: str, hosts: tuple[int, ...], rank: int, elements: int, dtype: np.dtype) -> tuple[Step, ...]:
    """What `rank` of a group does, whose ranks lie on `hosts`, to sum (or scatter, or gather) so many elements."""
    notes = _Notes()
    link = _Link(range(len(hosts)), rank, hosts, notes)
    for pending in STEPS[name](cast(Link, link), cast(np.ndarray, _Stretch(elements, dtype, link))):
        notes.steps.append(Wait(tuple(post for post in cast("list[int | None]", pending) if post is not None)))
    return tuple(notes.steps)


class _Notes:
    """What a rank has been seen to do."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.posts = 0


class _Link:
    """Stands for comm.link.Link: `members` are the ranks of the group that it links."""

    def __init__(self, members: Sequence[int], rank: int, hosts: Sequence[int], notes: _Notes) -> None:
        """`rank` is among `members`, `hosts` has the host of every rank of the group."""
        self.members, self.rank, self.size = members, members.index(rank), len(members)
        self._hosts, self.notes = hosts, notes
        counts = Counter(hosts[member] for member in members).values()
        self.near = len(counts) == 1
        self.topology = SimpleNamespace(even=len(set(counts)) == 1)

    def send(self, array: _Stretch, peer: int) -> int | None:
        """As Link.send; the number of the post, None where there is nothing to send."""
        return self._post(array, peer, True)

    def recv(self, array: _Stretch, peer: int) -> int | None:
        """As Link.recv."""
        return self._post(array, peer, False)

    def _post(self, array: _Stretch, peer: int, sends: bool) -> int | None:
        if not array.size:
            return None
        self.notes.steps.append(Post(self.members[peer], array.nbytes, sends))
        self.notes.posts += 1
        return self.notes.posts - 1

    def scratch(self, size: int, dtype: np.dtype) -> _Stretch:
        """As Link.scratch."""
        return _Stretch(size, dtype, self)

    def nodes(self) -> tuple[_Link, _Link]:
        """As Link.nodes."""
        by_host: dict[int, list[int]] = {}
        for member in self.members:
            by_host.setdefault(self._hosts[member], []).append(member)
        here = by_host[self._hosts[self._me]]
        place = here.index(self._me)
        across = sorted(found[place] for found in by_host.values() if place < len(found))
        return self._part(here), self._part(across)

    def grid(self) -> tuple[_Link, _Link]:
        """As Link.grid."""
        _, columns = near_square(self.size)
        row, column = divmod(self.rank, columns)
        return self._part(self.members[row * columns : (row + 1) * columns]), self._part(self.members[column::columns])

    @property
    def _me(self) -> int:
        return self.members[self.rank]

    def _part(self, members: Sequence[int]) -> _Link:
        return _Link(members, self._me, self._hosts, self.notes)


class _Stretch:
    """Stands for a contiguous 1D array, as far as algorithms look at one; adding to it is noted."""

    ndim = 1
    flags = SimpleNamespace(c_contiguous=True, writeable=True)

    def __init__(self, size: int, dtype: np.dtype, link: _Link) -> None:
        self.size, self.dtype, self.itemsize = size, dtype, dtype.itemsize
        self._link = link

    @property
    def nbytes(self) -> int:
        """As of an array."""
        return self.size * self.itemsize

    def __getitem__(self, where: slice) -> _Stretch:
        return _Stretch(len(range(self.size)[where]), self.dtype, self._link)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> _Stretch:
        """comm.link.add: what is added lies in the scratch memory of the link that it came by."""
        link: _Link = inputs[1]._link
        link.notes.steps.append(Add(self.nbytes, link.near))
        return self
