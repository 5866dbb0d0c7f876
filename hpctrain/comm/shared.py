"""Memory that the ranks of one host share: windows, flags in them, and sums of what lies there.

Every hand-over is: write, post a flag (release), see the flag (acquire), read. That holds before overwriting too: who
wants to write waits for the flags of those who read. Compiled code does it with atomic operations; without it the
same goes through `MPI_Win_sync`, which is a memory barrier.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

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

FOLDER = "/dev/shm"
"""Where MPI libraries keep windows that ranks share."""

SLICE = 1000.0
"""Microseconds to wait before MPI makes progress: others may be inside it and need an answer."""


def room() -> int:
    """Bytes that can still be shared on this host."""
    try:
        found = os.statvfs(FOLDER)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize


class Window:
    """Memory of every rank of `node` that all of them see. Collective.

    Raises SharedMemoryError, on all ranks alike and before any of it is touched, where there is not enough: a rank
    that touched it would die of SIGBUS.
    """

    def __init__(self, node: MPI.Intracomm, nbytes: int, flags: int, purpose: str) -> None:
        """`nbytes` of this rank, besides so many flags; all ranks give the same number of flags."""
        from mpi4py import MPI

        header = -(-flags * LINE // PAGE) * PAGE
        mine = header + -(-nbytes // PAGE) * PAGE
        need, free = node.allreduce(mine), node.allreduce(room(), MPI.MIN)
        if need > free:
            raise SharedMemoryError(
                f"{purpose} needs {need / 2**20:.1f} MiB of shared memory on a host, {FOLDER} has "
                f"{free / 2**20:.1f} MiB left; enlarge it (mount -o remount,size=..., docker run --shm-size=...), or "
                f"set plan.allreduce to an algorithm that sends messages, for instance ring"
            )
        info = MPI.Info.Create({"alloc_shared_noncontig": "true"})  # whole pages, near the rank that touches them first
        self.node = node
        self._win = MPI.Win.Allocate_shared(mine, 1, info, node)
        info.Free()
        self._win.Lock_all(MPI.MODE_NOCHECK)  # one epoch for life: flags do the rest
        whole = [np.asarray(self._win.Shared_query(r)[0], np.uint8) for r in range(node.size)]
        self._flags = [memory[:header].view(np.int64).reshape(-1, LINE // 8)[:flags] for memory in whole]
        self.segments = [memory[header:] for memory in whole]
        """By rank of the host, its bytes, which start at a page."""
        self._flags[node.rank].fill(0)
        node.Barrier()  # the flags are 0 before anybody looks

    def array(self, rank: int, offset: int, size: int, dtype: np.dtype) -> np.ndarray:
        """`size` elements of `rank`, from byte `offset` on."""
        return self.segments[rank][offset : offset + size * dtype.itemsize].view(dtype)

    def flag(self, rank: int, index: int) -> np.ndarray:
        """A counter, an int64 of one element; `rank` writes it, all may read it."""
        return self._flags[rank][index, :1]

    def meeting(self, index: int) -> Meeting:
        """All ranks meet, by their flags number `index`."""
        flags = [self.flag(rank, index) for rank in range(self.node.size)]
        kind: Any = PythonMeeting if _native is None else _native.Meeting
        made: Meeting = kind(flags, self.node.rank)
        return made

    def sync(self) -> None:
        """A memory barrier."""
        self._win.Sync()

    def progress(self) -> None:
        """Let MPI answer others."""
        self.node.Iprobe()

    def free(self) -> None:
        """Give the memory back; no array of it may be used any more. Collective."""
        self._flags, self.segments = [], []
        self._win.Unlock_all()
        self._win.Free()


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
