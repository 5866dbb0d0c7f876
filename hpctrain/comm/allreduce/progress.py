"""Two ways to go through the steps of an algorithm: all at once, or a little whenever the caller has time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpctrain.comm.link import Steps

if TYPE_CHECKING:
    from mpi4py import MPI


def run(steps: Steps) -> None:
    """Go through all `steps`, waiting for each."""
    from mpi4py import MPI

    for requests in steps:
        MPI.Request.Waitall(requests)


class Running:
    """An algorithm under way while its caller does something else.

    Several may run at once if each has a link of its own (`Link.lane`) and every rank starts them in the same order.
    Links that an algorithm splits (`nodes`, `grid`) are to be split before the first starts, as splitting waits.
    """

    def __init__(self, steps: Steps) -> None:
        """Begin: what can be sent or received at once is."""
        self._steps = steps
        self._requests: list[MPI.Request] | None = next(steps, None)

    def poll(self) -> bool:
        """Go on as far as is possible without waiting; whether all is done. Call it often."""
        from mpi4py import MPI

        while self._requests is not None and MPI.Request.Testall(self._requests):
            self._requests = next(self._steps, None)
        return self._requests is None

    def wait(self) -> None:
        """Go on to the end. Others that run at the same time stand still meanwhile, on this rank."""
        from mpi4py import MPI

        while self._requests is not None:
            MPI.Request.Waitall(self._requests)
            self._requests = next(self._steps, None)
