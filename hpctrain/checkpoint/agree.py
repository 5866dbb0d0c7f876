"""What one rank sees, every rank learns: an error on one becomes the same CheckpointError on all, and nothing hangs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from hpctrain.errors import CheckpointError

T = TypeVar("T")

LISTED = 4  # errors of other ranks that one message repeats


class Communicator(Protocol):
    """The part of an mpi4py communicator that checkpoints use: collectives of small objects."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def bcast(self, obj: Any, /) -> Any: ...
    def gather(self, obj: Any, /) -> Any: ...
    def allgather(self, obj: Any, /) -> Any: ...


class Alone:
    """The communicator of one process without MPI."""

    rank = 0
    size = 1

    def bcast(self, obj: Any, /) -> Any:
        """`obj`, as rank 0 has it."""
        return obj

    def gather(self, obj: Any, /) -> Any:
        """`obj` of every rank, on rank 0."""
        return [obj]

    def allgather(self, obj: Any, /) -> Any:
        """`obj` of every rank, on every rank."""
        return [obj]


def on_first(comm: Communicator, action: Callable[[], T]) -> T:
    """Rank 0 runs `action`; every rank returns its (small) result, or raises CheckpointError as rank 0 does."""
    outcome = _attempt(action) if comm.rank == 0 else None
    result, error = comm.bcast(outcome)
    if error is not None:
        raise CheckpointError(error)
    return result


def on_all(comm: Communicator, action: Callable[[], T]) -> list[T]:
    """Every rank runs `action`; rank 0 returns all (small) results by rank, the others [].

    If it fails on any rank, every rank raises CheckpointError with the errors of all.
    """
    result, error = _attempt(action)
    errors = list(dict.fromkeys(e for e in comm.allgather(error) if e is not None))
    if errors:
        more = f"; and {len(errors) - LISTED} more like these" if len(errors) > LISTED else ""
        raise CheckpointError("; ".join(errors[:LISTED]) + more)
    return comm.gather(result) or []


def _attempt(action: Callable[[], T]) -> tuple[T | None, str | None]:
    # Only errors of files and checkpoints are shared; any other is a bug and must end the job with its traceback.
    try:
        return action(), None
    except CheckpointError as error:
        return None, str(error)
    except OSError as error:
        return None, f"{error.filename or 'checkpoint'}: {error.strerror}; check permissions and the file system"
