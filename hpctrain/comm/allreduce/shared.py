"""Through memory that the ranks of a host share: each adds up its share of what all have written there.

A buffer that lies in such memory (`InPlace`) is never copied, and its sum is read where it is made: in the memory of
the first rank. Any other buffer is copied in, and the sum is copied out.
"""

from __future__ import annotations

import numpy as np

from hpctrain.comm.allreduce import halving_doubling
from hpctrain.comm.allreduce.cost import Network, Sent
from hpctrain.comm.link import Link, Steps, flat
from hpctrain.comm.shared import Meeting, Wait, Window, shared_sum
from hpctrain.errors import PlanError
from hpctrain.partition import split

FLAGS = 2
"""For the meetings of an `InPlace`: `written` and `summed`."""

MEETINGS = 3e-6
"""Seconds that both take, with what Python takes to begin."""


class InPlace:
    """The sum of `size` elements that every rank of a window has at byte `offset`, read from the first rank's.

    All ranks write theirs, all run `steps`, and all read `sums`, until the next ones write. Those that share meetings
    must come one after the other.
    """

    def __init__(
        self,
        window: Window,
        offset: int,
        size: int,
        dtype: np.dtype,
        written: Meeting,
        summed: Meeting,
        adding: int | None = None,
    ) -> None:
        """`adding`: how many ranks add up a share, the first ones; all where None."""
        rank, ranks = window.node.rank, window.node.size
        vectors = [window.array(r, offset, size, dtype) for r in range(ranks)]
        self.sums = vectors[0]
        adding = adding or ranks
        self.share = slice(*split(size, adding, rank)) if rank < adding else slice(size, size)
        """What this rank adds up."""
        mine = [vector[self.share] for vector in vectors]
        self._sum = shared_sum(mine, self.sums[self.share], written, summed)
        self._added = Wait(self._sum.add, window.progress)
        self._all_added = Wait(self._sum.run, window.progress)

    def steps(self, across: Link | None = None) -> Steps:
        """Sum over the ranks of the window; over those of `across` too, which have this one's share on other hosts."""
        if across is not None and across.size > 1:
            yield self._added
            yield from halving_doubling.steps(across, self.sums[self.share])
        yield self._all_added

    def sum(self) -> None:
        """Sum over the ranks of the window, and wait for it."""
        self._all_added.wait()


class Copied:
    """A window for buffers that lie elsewhere, of up to `nbytes`. Collective."""

    def __init__(self, link: Link, nbytes: int) -> None:
        self.nbytes = nbytes
        self.window = Window(link.comm, nbytes, FLAGS + 1, f"allreduce of {nbytes} bytes")
        self._meetings = self.window.meeting(0), self.window.meeting(1)
        self._left = self.window.meeting(FLAGS)
        self.free_again = Wait(self._left.complete, self.window.progress)
        """That all have copied out what was there before."""
        self._left.come()
        self._sums: dict[tuple[int, np.dtype], InPlace] = {}

    def of(self, size: int, dtype: np.dtype) -> InPlace:
        """The sum of so many elements."""
        key = size, dtype
        if key not in self._sums:
            self._sums[key] = InPlace(self.window, 0, size, dtype, *self._meetings)
        return self._sums[key]

    def leave(self) -> None:
        """Say that this rank has copied out."""
        self._left.come()

    def free(self) -> None:
        """Release the memory. Collective."""
        self._sums.clear()
        self.window.free()


@flat
def steps(link: Link, buffer: np.ndarray) -> Steps:
    """Sum the contiguous 1D `buffer` over the ranks of `link`, in place; PlanError where they are on several hosts.

    Allocates at the first call and where a buffer is larger than those before; all ranks do so together.
    """
    if not buffer.size or link.size == 1:
        return
    copied = _memory(link, buffer.nbytes)
    yield copied.free_again
    found = copied.of(buffer.size, buffer.dtype)
    np.copyto(copied.window.array(link.rank, 0, buffer.size, buffer.dtype), buffer)
    yield from found.steps()
    np.copyto(buffer, found.sums)
    copied.leave()


def _memory(link: Link, nbytes: int) -> Copied:
    kept = link.kept.get("shared")
    if isinstance(kept, Copied) and kept.nbytes >= nbytes:
        return kept
    if len(set(link.topology.hosts)) > 1:
        raise PlanError(
            f"allreduce 'shared' of ranks on {len(set(link.topology.hosts))} hosts; they share no memory: "
            f"choose hierarchical, ring or another"
        )
    if kept is not None:
        kept.free()
    link.kept["shared"] = made = Copied(link, nbytes)
    return made


def cost(ranks: int, nbytes: float, net: Network) -> float:
    """Seconds where the buffer lies in that memory: two meetings, and every rank adds up its share of all buffers."""
    near = net.near or net
    return (ranks > 1) * (MEETINGS + near.gamma * nbytes * (ranks - 1) / ranks)


def sent(ranks: int, rank: int, elements: int, itemsize: int) -> Sent:
    """No messages."""
    return Sent(0, 0)
