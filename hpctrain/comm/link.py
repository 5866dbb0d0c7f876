"""The ranks of a communicator as the allreduce algorithms see them: messages of any float type, counted.

    link = Link(comm); allreduce.get("ring").sum(link, buffer)

What runs at the same time needs links of its own, with tags of their own: `link.lane(1)`, `link.lane(2)`, ...
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeAlias, TypeVar, cast

import numpy as np

from hpctrain.partition import near_square

if TYPE_CHECKING:
    from mpi4py import MPI

MOST_ELEMENTS = 2**31 - 1
"""Of one message, before MPI 4: counts are C ints."""

P = ParamSpec("P")
T = TypeVar("T")


class Topology:
    """The communicators that the ranks of `comm` are split into; made when first asked for, collectively.

    `hosts`, one number for each rank, stands in for the hosts that MPI sees.
    """

    def __init__(self, comm: MPI.Intracomm, hosts: Sequence[int] | None = None) -> None:
        if hosts is not None and len(hosts) != comm.size:
            raise ValueError(f"hosts names {len(hosts)} ranks, the communicator has {comm.size}: give one each")
        self.comm = comm
        if hosts is not None:
            self.hosts = tuple(hosts)

    @cached_property
    def hosts(self) -> tuple[int, ...]:
        """The host of each rank, as the lowest rank on it."""
        from mpi4py import MPI

        here = self.comm.Split_type(MPI.COMM_TYPE_SHARED, self.comm.rank)
        found = tuple(self.comm.allgather(here.bcast(self.comm.rank)))
        here.Free()
        return found

    @property
    def even(self) -> bool:
        """Whether all hosts hold equally many ranks."""
        return len(set(Counter(self.hosts).values())) == 1

    @property
    def fewest(self) -> int:
        """How many ranks the host with the fewest holds."""
        return min(Counter(self.hosts).values())

    @cached_property
    def node(self) -> MPI.Intracomm:
        """The ranks of this host."""
        return self._split(self.hosts[self.comm.rank])

    @cached_property
    def across(self) -> MPI.Intracomm:
        """The ranks with this one's place in their hosts; where the place is 0, one of each host."""
        return self._split(self.node.rank)

    @cached_property
    def row(self) -> MPI.Intracomm:
        """Ranks that follow one another: a row of the near-square grid."""
        _, columns = near_square(self.comm.size)
        return self._split(self.comm.rank // columns)

    @cached_property
    def column(self) -> MPI.Intracomm:
        """One rank of each row."""
        _, columns = near_square(self.comm.size)
        return self._split(self.comm.rank % columns)

    def _split(self, color: int) -> MPI.Intracomm:
        return cast("MPI.Intracomm", self.comm.Split(color, self.comm.rank))

    def free(self) -> None:
        """Release the communicators. Collective."""
        for name in ("node", "across", "row", "column"):
            if name in self.__dict__:
                self.__dict__.pop(name).Free()


class Kept(Protocol):
    """Something of an algorithm that outlives a call."""

    def free(self) -> None:
        """Release it. Collective."""


class Waiting(Protocol):
    """What a step may wait for besides requests."""

    def test(self) -> bool:
        """Whether it has come."""

    def wait(self) -> None:
        """Return when it has."""


class Link:
    """Nonblocking messages among the ranks of `comm`, and how many of them this rank has sent.

    A `tag` belongs to one link of a communicator. Nothing allocates once the largest `scratch` has been asked for.
    """

    def __init__(self, comm: MPI.Intracomm, tag: int = 0, hosts: Sequence[int] | None = None) -> None:
        self.comm, self.tag, self.rank, self.size = comm, tag, comm.rank, comm.size
        self.topology = Topology(comm, hosts)
        self.messages = 0
        """Messages sent so far, those of `nodes()` and `grid()` among them."""
        self.nbytes = 0
        """Bytes sent so far, likewise."""
        self._whole: Link | None = None
        self._parts: dict[str, Link] = {}
        self._memory = np.empty(0, np.uint8)
        self._types: dict[tuple[int, int], MPI.Datatype] = {}
        self.kept: dict[str, Kept] = {}
        """What algorithms keep from one call to the next."""

    def lane(self, tag: int) -> Link:
        """A link of the same ranks for what runs at the same time: its own tag, scratch and counters."""
        lane = Link(self.comm, tag)
        lane.topology = self.topology
        return lane

    def send(self, array: np.ndarray, peer: int) -> MPI.Request:
        """Begin to send the contiguous `array`, which must not change until the request is complete.

        What has no elements is not sent.
        """
        if not array.size:
            return _nothing()
        link: Link | None = self
        while link is not None:
            link.messages += 1
            link.nbytes += array.nbytes
            link = link._whole
        return self.comm.Isend(self._wire(array), peer, self.tag)

    def recv(self, array: np.ndarray, peer: int) -> MPI.Request:
        """Begin to receive what `peer` sends into the contiguous `array`; nothing where it has no elements."""
        return self.comm.Irecv(self._wire(array), peer, self.tag) if array.size else _nothing()

    def _wire(self, array: np.ndarray) -> np.ndarray | list[Any]:
        """`array` as MPI takes it, which knows no floats of 16 bits, and does not count beyond MOST_ELEMENTS."""
        array = array.view(np.uint16) if array.itemsize == 2 else array
        if array.size <= MOST_ELEMENTS:
            return array
        key = array.size, array.itemsize
        if key not in self._types:
            self._types[key] = one_element(*key)
        return [array.view(np.uint8), 1, self._types[key]]

    def scratch(self, size: int, dtype: np.dtype) -> np.ndarray:
        """Memory for `size` elements, uninitialised, kept between calls; the next call hands out the same again."""
        nbytes = size * dtype.itemsize
        if nbytes > self._memory.size:
            self._memory = np.empty(nbytes, np.uint8)
        return self._memory[:nbytes].view(dtype)

    def nodes(self) -> tuple[Link, Link]:
        """(the ranks of this host, the ranks with this one's place in their hosts). Collective when first asked."""
        node, across = self.topology.node, self.topology.across
        return self._part("node", node), self._part("across", across)

    def grid(self) -> tuple[Link, Link]:
        """(row, column) of this rank in the near-square grid of all. Collective when first asked."""
        row, column = self.topology.row, self.topology.column
        return self._part("row", row), self._part("column", column)

    def _part(self, name: str, comm: MPI.Intracomm) -> Link:
        if name not in self._parts:
            part = self._parts[name] = Link(comm, self.tag)
            part._whole = self
        return self._parts[name]

    def free(self) -> None:
        """Release what algorithms keep, and the communicators of `nodes()` and `grid()`. Collective."""
        for kept in self.kept.values():
            kept.free()
        self.kept.clear()
        for datatype in self._types.values():
            datatype.Free()
        self._types.clear()
        for part in self._parts.values():
            part.free()
        self._parts.clear()
        self.topology.free()


def _nothing() -> MPI.Request:
    from mpi4py import MPI

    return MPI.REQUEST_NULL


def one_element(size: int, itemsize: int) -> MPI.Datatype:
    """The type of an array of so many elements, of any type of that length."""
    from mpi4py import MPI

    runs, rest = divmod(size, MOST_ELEMENTS)
    element = MPI.BYTE.Create_contiguous(itemsize)
    run = element.Create_contiguous(MOST_ELEMENTS)
    found = MPI.Datatype.Create_struct([runs, rest], [0, runs * MOST_ELEMENTS * itemsize], [run, element]).Commit()
    run.Free()
    element.Free()
    return found


def add(into: np.ndarray, other: np.ndarray) -> None:
    """into += other; floats of 16 bits are added in float32 and rounded once. Overflow gives infinity."""
    with np.errstate(over="ignore", invalid="ignore"):
        if into.itemsize == 2:
            np.add(into, other, out=into, dtype=np.float32, casting="unsafe")
        else:
            np.add(into, other, out=into)


def flat(steps: Callable[Concatenate[Link, np.ndarray, P], T]) -> Callable[Concatenate[Link, np.ndarray, P], T]:
    """`steps` that refuses, with ValueError, a buffer that is not a contiguous 1D array or may not be written."""

    @wraps(steps)
    def checked(link: Link, buffer: np.ndarray, *args: P.args, **kwargs: P.kwargs) -> T:
        if buffer.ndim != 1 or not buffer.flags.c_contiguous:
            raise ValueError(
                f"an allreduce takes a contiguous 1D array, not one of shape {buffer.shape} and strides "
                f"{buffer.strides} bytes; give x.reshape(-1) of a contiguous x, or sum a copy"
            )
        if not buffer.flags.writeable:
            raise ValueError("an allreduce writes its result to the buffer, which is read-only; give a copy")
        return steps(link, buffer, *args, **kwargs)

    return checked


Requests: TypeAlias = "list[MPI.Request]"

Steps: TypeAlias = "Iterator[Requests | Waiting]"
"""What an algorithm is: each list of requests must be complete before the next is asked for."""
