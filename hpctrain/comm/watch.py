"""The watchdog: a rank that waits long for others says what for, and one that waits too long ends the job.

The waiting thread is inside MPI, which only it may call. What it waits for stands in a plain attribute, `WATCH.now`,
and a thread without MPI looks at that once a second.
"""

from __future__ import annotations

import math
import os
import sys
import textwrap
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from types import TracebackType

from hpctrain.comm.board import Board, Entry
from hpctrain.comm.launchers import LOST_RANK

WIDTH = 79
"""Columns of a message."""


class Wait:
    """Something that this rank does together with others: made once, entered (`with wait:`) around each time it waits.

    Entering and leaving takes well under a microsecond. `layer` is "" for what belongs to none.
    """

    __slots__ = ("awaited", "layer", "nbytes", "operation", "outer", "patient", "peers", "since", "together")

    def __init__(
        self,
        layer: str,
        operation: str,
        peers: Sequence[int],
        together: Sequence[int] = (),
        nbytes: int = 0,
        patient: bool = False,
    ) -> None:
        """`peers` are the ranks that it waits for, `together` all that enter at the same point of the program, and
        compare what they do where `debug.collectives` says so. A `patient` one is reported, but never ends the job.
        """
        self.layer, self.operation, self.nbytes = layer, operation, nbytes
        self.peers, self.together, self.patient = tuple(peers), tuple(together), patient
        self.awaited = self.peers
        """Those of them that are known to be missing."""
        self.since = 0.0
        self.outer: Wait | None = None

    def __enter__(self) -> None:
        self.outer = WATCH.now
        self.since = time.monotonic()
        WATCH.now = self
        if WATCH.guard is not None and self.together:
            self._compare(WATCH.guard)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        WATCH.now = self.outer

    def _compare(self, guard: Callable[[Wait], None]) -> None:
        try:
            guard(self)
        except BaseException:
            WATCH.now = self.outer  # a `with` that was not entered is not left
            raise
        finally:
            self.awaited = self.peers

    def __str__(self) -> str:
        return f"{self.operation} of {self.layer}" if self.layer else self.operation


class Watch:
    """What this process waits for, and the thread that looks at it."""

    def __init__(self) -> None:
        self.now: Wait | None = None
        """Set by the main thread; None while it waits for nobody."""
        self.guard: Callable[[Wait], None] | None = None
        """Compares what ranks do, before they do it."""
        self.board: Board | None = None
        """What the other ranks of this host wait for."""
        self.stall_seconds, self.abort_seconds = 60.0, math.inf  # nothing ends before a config says when
        self._rank, self._host = 0, "this host"
        self._seen: tuple[Wait, float] | None = None
        self._due = 0.0

    def waiting(self, layer: str, operation: str, peers: Sequence[int]) -> Wait:
        """A Wait for `peers`, which compares nothing with them."""
        return Wait(layer, operation, peers)

    def start(self, rank: int, hostname: str) -> None:
        """Begin to look, from a thread that ends with the process."""
        self._rank, self._host = rank, hostname
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    @property
    def period(self) -> float:
        """Seconds between two looks."""
        return min(1.0, self.stall_seconds / 4)

    def look(self, now: float) -> tuple[str, bool] | None:
        """(what is to be said at time `now`, whether the job is to end), or None. At stall_seconds, then at twice that
        and so on.
        """
        wait = self.now
        if wait is None or not wait.awaited:
            self._post(None)
            return None
        seen = wait, wait.since
        if seen != self._seen:
            self._seen, self._due = seen, self.stall_seconds
            self._post(wait)
        waited = now - wait.since
        ending = waited >= self.abort_seconds and not wait.patient
        if waited < self._due and not ending:
            return None
        while self._due <= waited:
            self._due *= 2
        found = self._who_for_whom(wait)
        if found is None:  # another rank says it, unless that fails to
            if not ending or waited < self.abort_seconds + 3 * self.period:
                return None
            found = [self._rank], wait.awaited
        return self.message(wait, waited, *found), ending

    def message(self, wait: Wait, waited: float, who: Sequence[int], whom: Sequence[int]) -> str:
        """That ranks `who` have waited so many seconds for `whom`, in lines of at most WIDTH columns."""
        ending = waited >= self.abort_seconds and not wait.patient
        they = f"{ranks(who)} on {self._host} {'has' if len(who) == 1 else 'have'}"
        text = f"hpctrain: {'error: ' * ending}{they} waited {waited:.0f} s for {ranks(whom)} in {wait}"
        if ending:
            text += f"; this ends the job (run.abort_seconds = {self.abort_seconds:g})"
        elif self.abort_seconds < math.inf and not wait.patient:
            text += f"; at {self.abort_seconds:g} s the job ends (run.abort_seconds)"
        return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False) + "\n"

    def _who_for_whom(self, wait: Wait) -> tuple[Sequence[int], Sequence[int]] | None:
        """The ranks of this host that wait, and for whom; None where another rank of this host is to say it.

        Those in one collective say it once, and leave each other out. Others leave it to those who wait for somebody
        that does not wait itself, if there are any.
        """
        if self.board is None:
            return [self._rank], wait.awaited
        waiting = self.board.waiting()
        if len(wait.peers) + 1 < len(wait.together) or not wait.together:
            idle = [rank for rank in wait.awaited if rank not in waiting]
            elsewhere = not idle and len(waiting) < len(self.board.ranks)
            return None if elsewhere else ([self._rank], idle or wait.awaited)
        mine = Entry(wait.since, _digest(wait))
        waiting[self._rank] = mine
        alike = {rank: entry.since for rank, entry in waiting.items() if entry.digest == mine.digest}
        if self._rank != min(alike, key=lambda rank: (alike[rank], rank)):
            return None
        return list(alike), [rank for rank in wait.awaited if rank not in alike] or wait.awaited

    def _post(self, wait: Wait | None) -> None:
        if self.board is not None:
            self.board.post(None if wait is None else Entry(wait.since, _digest(wait)))

    def _run(self) -> None:
        while True:
            time.sleep(self.period)
            found = self.look(time.monotonic())
            if found is None:
                continue
            text, ending = found
            with suppress(OSError):  # of a terminal that is gone
                os.write(2, text.encode())  # in one piece, as other ranks speak at the same time
            if ending:
                with suppress(OSError):
                    sys.stdout.flush()
                os._exit(LOST_RANK)  # the main thread cannot be reached; the launcher ends the other ranks


WATCH = Watch()
"""That of this process."""


def _digest(wait: Wait) -> int:
    """Equal on ranks that wait for the same together, never 0."""
    return zlib.crc32(f"{wait} {wait.together}".encode()) + 1


def ranks(numbers: Sequence[int]) -> str:
    """`rank 3`, or `ranks 0-2, 5`."""
    found = sorted(numbers)
    if len(found) == 1:
        return f"rank {found[0]}"
    starts = [a for before, a in pairwise([-2, *found]) if a != before + 1]
    ends = [a for a, after in pairwise([*found, math.inf]) if after != a + 1]
    runs = (f"{a}" if a == b else f"{a}, {b}" if b == a + 1 else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
    return f"ranks {', '.join(runs)}"
