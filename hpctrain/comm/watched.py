"""Communicators whose collectives the watchdog sees, and the guard compares, under a name that a user knows."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any, Self

from mpi4py import MPI

from hpctrain.comm.guard import Guard
from hpctrain.comm.watch import WATCH, Wait

COLLECTIVES = (
    *("allgather", "alltoall", "barrier", "bcast", "gather", "scatter"),
    *("Allgather", "Allgatherv", "Allreduce", "Alltoall", "Barrier", "Bcast", "Gather", "Gatherv", "Reduce", "Scatter"),
    *("Create_cart", "Dup", "Split", "Split_type"),
)
"""Methods that wait for the other ranks, without holding the interpreter meanwhile."""


class Watched(MPI.Intracomm):
    """A communicator like any other; `watched` makes one. Its duplicates are of this class too, without a name."""

    _layer = ""
    _operation = ""
    _patient = False
    _waits: dict[str, Wait]

    def __new__(cls, comm: MPI.Intracomm | None = None) -> Self:
        """Another object for the communicator `comm`."""
        self = super().__new__(cls, comm)
        self._waits = {}
        return self

    def allreduce(self, sendobj: Any, op: MPI.Op | Callable[[Any, Any], Any] = MPI.SUM) -> Any:
        """In rank order. At first mpi4py's own duplicates the communicator, and holds the interpreter until all do."""
        with self._wait("allreduce", (sendobj,)):
            return reduce(op, super().allgather(sendobj))

    def _wait(self, name: str, args: tuple[Any, ...]) -> Wait:
        """Of method `name`, called with these arguments."""
        wait = self._waits.get(name)
        if wait is None:
            operation = f"{self._operation} ({name})" if self._operation else name
            wait = self._waits[name] = waiting(self, self._layer, operation, patient=self._patient)
        if WATCH.guard is not None:
            wait.nbytes = getattr(args[0], "nbytes", 0) if args else 0
        return wait


def _noted(name: str) -> Callable[..., Any]:
    """Method `name`, within its Wait."""
    call = getattr(MPI.Intracomm, name)

    def collective(self: Watched, *args: Any, **options: Any) -> Any:
        with self._wait(name, args):
            return call(self, *args, **options)

    return collective


for _name in COLLECTIVES:
    setattr(Watched, _name, _noted(_name))


def watched(comm: MPI.Intracomm, operation: str = "", layer: str = "", patient: bool = False) -> Watched:
    """The communicator `comm` itself, its collectives called `operation` of `layer` in messages."""
    found = Watched(comm)
    found._layer, found._operation, found._patient = layer, operation, patient
    return found


def world_ranks(comm: MPI.Intracomm) -> tuple[int, ...]:
    """The ranks of `comm` as all messages number them: by COMM_WORLD."""
    world = MPI.COMM_WORLD.Get_group()
    return tuple(MPI.Group.Translate_ranks(comm.Get_group(), range(comm.size), world))


def others(comm: MPI.Intracomm) -> tuple[int, ...]:
    """The ranks of `comm` but for this one, as all messages number them."""
    return tuple(rank for i, rank in enumerate(world_ranks(comm)) if i != comm.rank)


def waiting(comm: MPI.Intracomm, layer: str, operation: str, nbytes: int = 0, patient: bool = False) -> Wait:
    """A Wait of all ranks of `comm` for each other."""
    return Wait(layer, operation, others(comm), world_ranks(comm), nbytes, patient)


def begin(comm: MPI.Intracomm, stall_seconds: float, abort_seconds: float = math.inf, guarded: bool = False) -> None:
    """From here on the limits of a run's config hold, and ranks compare what they do if it is `guarded`.

    Collective over `comm`, which has all ranks.
    """
    WATCH.guard = None
    WATCH.stall_seconds, WATCH.abort_seconds = stall_seconds, abort_seconds
    if guarded:
        WATCH.guard = Guard(comm.Dup(), stall_seconds).compare
