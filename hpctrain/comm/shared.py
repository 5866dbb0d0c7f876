"""Memory that the ranks of one host share: windows, flags in them, and sums of what lies there.

Every hand-over is: write, post a flag (release), see the flag (acquire), read. That holds before overwriting too: who
wants to write waits for the flags of those who read. Compiled code does it with atomic operations.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hpctrain import memory
from hpctrain.errors import SharedMemoryError

if TYPE_CHECKING:
    from mpi4py import MPI

try:
    from hpctrain import _native as compiled
except ImportError:
    compiled = None
_native: Any = compiled
"""The compiled kernels, where there are any."""

LINE = 64
"""Bytes of a cache line. Flags have one each."""

PAGE = 4096

SLICE = 1000.0
"""Microseconds to wait before MPI makes progress: others may be inside it and need an answer."""


def room() -> int:
    """Bytes that can still be shared on this host: what is free, as such memory is no other."""
    found = memory.host_room()
    return sys.maxsize if found is None else found.nbytes


class Window:
    """Memory of every rank of `node` that all of them see. Collective.

    It is a file without a name (memfd), not one of MPI's windows: those take Open MPI long to make, and lie in
    /dev/shm, which has 64 MiB in many containers. It goes when the last array of it goes, and with killed ranks.
    Raises SharedMemoryError, on all ranks alike, where there is not enough, or no such file.
    """

    def __init__(self, node: MPI.Intracomm, nbytes: int, flags: int, purpose: str) -> None:
        """`nbytes` of this rank, besides so many flags; all ranks give the same number of flags."""
        header = -(-flags * LINE // PAGE) * PAGE
        said = node.allgather((header + -(-nbytes // PAGE) * PAGE, room()))
        sizes, free = [size for size, _ in said], min(left for _, left in said)
        self.node = node
        if sum(sizes) > free:
            raise SharedMemoryError(
                f"{purpose}: {memory.mib(sum(sizes))} to be shared by the {node.size} ranks of a host, which has "
                f"{memory.mib(free)} left; use more hosts or less memory"
            )
        starts = [sum(sizes[:rank]) for rank in range(node.size)]
        file = _mapped(node, sum(sizes), starts[node.rank], sizes[node.rank], purpose)
        whole = [file[start : start + size] for start, size in zip(starts, sizes, strict=True)]
        self._flags = [each[:header].view(np.int64).reshape(-1, LINE // 8)[:flags] for each in whole]
        self.segments = [each[header:] for each in whole]
        """By rank of the host, its bytes, which start at a page."""

    def array(self, rank: int, offset: int, size: int, dtype: np.dtype) -> np.ndarray:
        """`size` elements of `rank`, from byte `offset` on."""
        return self.segments[rank][offset : offset + size * dtype.itemsize].view(dtype)

    def flag(self, rank: int, index: int) -> np.ndarray:
        """A counter, an int64 of one element; `rank` writes it, all may read it."""
        return self._flags[rank][index, :1]

    def meeting(self, index: int, others: Sequence[int] | None = None) -> Meeting:
        """This rank meets `others`, or all, by their flags number `index`. These need not wait for this one."""
        ranks = range(self.node.size) if others is None else [self.node.rank, *others]
        flags = [self.flag(rank, index) for rank in ranks]
        kind: Any = PythonMeeting if _native is None else _native.Meeting
        made: Meeting = kind(flags, ranks.index(self.node.rank))
        return made

    def progress(self) -> None:
        """Let MPI answer others."""
        self.node.Iprobe()

    def free(self) -> None:
        """Let go of the memory, which the system takes back once no array of it is left."""
        self._flags, self.segments = [], []


def _mapped(node: MPI.Intracomm, nbytes: int, start: int, mine: int, purpose: str) -> np.ndarray:
    """A new file without a name that all ranks of `node` map, zeros; this rank takes `mine` bytes of it at `start`.

    Taken at once: where the memory is not there, that is an error now and no SIGBUS at the first touch.
    """
    fd, error = -1, ""
    made: tuple[int, int, tuple[int, int]] | None = None
    try:
        if node.rank == 0:
            fd = os.memfd_create(memory.WINDOW)
            os.ftruncate(fd, nbytes)
            made = os.getpid(), fd, _identity(fd)
    except OSError as raised:
        error = str(raised)
    made = node.bcast(made)
    try:
        if made is not None:
            process, number, identity = made
            if node.rank > 0:
                fd = os.open(f"/proc/{process}/fd/{number}", os.O_RDWR)
            if _identity(fd) != identity:
                raise OSError(f"process {process} is another one here: ranks in different containers")
            os.posix_fallocate(fd, start, mine)
            found = np.frombuffer(mmap.mmap(fd, nbytes), np.uint8)
    except OSError as raised:
        error = str(raised)
    errors = [text for text in node.allgather(error) if text]  # and nobody closes what others have yet to open
    if fd >= 0:
        os.close(fd)
    if errors:
        raise SharedMemoryError(
            f"{purpose}: the {node.size} ranks of a host cannot share {memory.mib(nbytes)}: {errors[0]}; "
            f"run them in one container, or set plan.allreduce to an algorithm that sends messages, for instance ring"
        )
    return found


def _identity(fd: int) -> tuple[int, int]:
    """Of the file that `fd` is open on."""
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


class Meeting(Protocol):
    """Ranks that come together again and again; none can be two rounds ahead of another."""

    def come(self) -> None:
        """Say that this rank is there."""

    def complete(self, microseconds: float) -> bool:
        """Whether all are, waiting for so long."""

    def missing(self) -> list[int]:
        """The ranks that are not."""


class SharedSum(Protocol):
    """This rank's share of the sum of vectors that all ranks of a host write."""

    def add(self, microseconds: float) -> bool:
        """Whether the share is made, after waiting for so long for the others to have written."""

    def run(self, microseconds: float) -> bool:
        """Whether all shares are made."""


class Wait:
    """Something in shared memory to wait for, in a step of an allreduce."""

    def __init__(self, done: Callable[[float], bool], progress: Callable[[], None]) -> None:
        self._done, self._progress = done, progress

    def test(self) -> bool:
        """Whether it has come; asks once."""
        return self._done(0.0)

    def wait(self) -> None:
        """Return when it has come."""
        while not self._done(SLICE):
            self._progress()


def shared_sum(from_: Sequence[np.ndarray], out: np.ndarray, written: Meeting, summed: Meeting) -> SharedSum:
    """The sum of the vectors `from_`, in their order, into `out`, which may be one of them.

    Additions start when all ranks have come to `written`; who has added comes to `summed`.
    """
    kinds = {"float32": "SharedSumFloat", "float64": "SharedSumDouble"}
    if _native is None or out.dtype.name not in kinds:
        return PythonSharedSum(from_, out, written, summed)
    made: SharedSum = getattr(_native, kinds[out.dtype.name])(list(from_), out, written, summed)
    return made


# --- without compiled kernels ----------------------------------------------------------------------------------------


class PythonMeeting:
    """What the compiled Meeting does. The interpreter's stores of an int64 are whole, and x86 keeps their order; other
    processors order them by the barriers inside `sched_yield` and MPI's calls."""

    def __init__(self, flags: Sequence[np.ndarray], me: int) -> None:
        self._flags, self._me, self._round = [flag.data for flag in flags], me, 0

    def come(self) -> None:
        """Say that this rank is there."""
        self._round += 1
        self._flags[self._me][0] = self._round

    def complete(self, microseconds: float) -> bool:
        """Whether all are, waiting for about so long."""
        tries = 1 + int(microseconds)  # of about a microsecond
        for flag in self._flags:
            while flag[0] < self._round:
                tries -= 1
                if tries <= 0:
                    return False
                os.sched_yield()
        return True

    def missing(self) -> list[int]:
        """The ranks that are not."""
        return [rank for rank, flag in enumerate(self._flags) if flag[0] < self._round]


class PythonSharedSum:
    """What the compiled SharedSum does."""

    def __init__(self, from_: Sequence[np.ndarray], out: np.ndarray, written: Meeting, summed: Meeting) -> None:
        self._from, self._out, self._written, self._summed = from_, out, written, summed
        self._waiting = self._added = self._came = False
        wide = np.dtype(np.float32) if out.itemsize == 2 else out.dtype
        self._total = np.empty(out.size, wide)

    def add(self, microseconds: float) -> bool:
        """Whether the share is made, after waiting for so long for the others to have written."""
        if self._added:
            return True
        if not self._waiting:
            self._written.come()
            self._waiting = True
        if not self._written.complete(microseconds):
            return False
        with np.errstate(over="ignore", invalid="ignore"):  # as compiled code does it
            np.copyto(self._total, self._from[0], casting="unsafe")
            for other in self._from[1:]:
                np.add(self._total, other, out=self._total, dtype=self._total.dtype, casting="unsafe")
            np.copyto(self._out, self._total, casting="unsafe")
        self._waiting, self._added = False, True
        return True

    def run(self, microseconds: float) -> bool:
        """Whether all shares are made."""
        if not self.add(microseconds):
            return False
        if not self._came:
            self._summed.come()
            self._came = True
        if not self._summed.complete(microseconds):
            return False
        self._added = self._came = False
        return True
