"""Requests to stop at the next good moment. No MPI, so that they can be noted before it starts."""

from __future__ import annotations

import signal
from types import FrameType


class StopSignal:
    """A request to stop at the next good moment: SIGUSR1, SIGTERM or SIGINT. The second SIGTERM or SIGINT kills."""

    def __init__(self) -> None:
        self.received: int | None = None
        """The number of the signal that came first; None while none has."""

    def install(self) -> None:
        """From here on note these signals instead of dying of them. Main thread only."""
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number
        if number != signal.SIGUSR1:  # launchers and batch systems repeat that one
            signal.signal(number, signal.SIG_DFL)


STOP = StopSignal()
"""The one of this process."""
