"""Two ways to go through the steps of an algorithm: all at once, or a little whenever the caller has time."""

from __future__ import annotations

from hpctrain.comm.link import Requests, Steps, Waiting


def run(steps: Steps) -> None:
    """Go through all `steps`, waiting for each."""
    for pending in steps:
        _wait(pending)


def _wait(pending: Requests | Waiting) -> None:
    from mpi4py import MPI

    if isinstance(pending, list):
        MPI.Request.Waitall(pending)
    else:
        pending.wait()


def _test(pending: Requests | Waiting) -> bool:
    from mpi4py import MPI

    return MPI.Request.Testall(pending) if isinstance(pending, list) else pending.test()


class Running:
    """An algorithm under way while its caller does something else.

    Several may run at once if each has a link of its own (`Link.lane`) and every rank starts them in the same order.
    Links that an algorithm splits (`nodes`, `grid`) are to be split before the first starts, as splitting waits.
    """

    def __init__(self, steps: Steps) -> None:
        """Begin: what can be sent or received at once is."""
        self._steps = steps
        self._pending: Requests | Waiting | None = next(steps, None)

    def poll(self) -> bool:
        """Go on as far as is possible without waiting; whether all is done. Call it often."""
        while self._pending is not None and _test(self._pending):
            self._pending = next(self._steps, None)
        return self._pending is None

    def wait(self) -> None:
        """Go on to the end. Others that run at the same time stand still meanwhile, on this rank."""
        while self._pending is not None:
            _wait(self._pending)
            self._pending = next(self._steps, None)
