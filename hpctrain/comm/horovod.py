"""Horovod's allreduce, to compare with: it has a thread of its own that sends messages. Loaded when a plan names it.

Horovod 0.28.1 has no bfloat16; floats of 16 bits are summed in float32, rounded once at the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hpctrain.comm.allreduce import ring
from hpctrain.comm.allreduce.mpi import narrow, widened
from hpctrain.comm.link import Link, Steps, flat
from hpctrain.errors import BackendUnavailable, LaunchError, PlanError

if TYPE_CHECKING:
    from mpi4py import MPI

cost = ring.cost

_GROUP: list[MPI.Group] = []
"""The ranks that Horovod was started with: it knows one set of them in a process."""


class Pending:
    """A sum under way."""

    def __init__(self, hvd: Any, handle: int) -> None:
        self._hvd, self._handle = hvd, handle

    def test(self) -> bool:
        """Whether it is there."""
        if not self._hvd.poll(self._handle):
            return False
        self._hvd.synchronize(self._handle)
        return True

    def wait(self) -> None:
        """Return when it is."""
        self._hvd.synchronize(self._handle)


@flat
def steps(link: Link, buffer: np.ndarray) -> Steps:
    """Sum the contiguous 1D `buffer` over the ranks of `link`, in place.

    Raises BackendUnavailable where Horovod is not installed, LaunchError where MPI was started for one thread, and
    PlanError where it already sums over other ranks.
    """
    if not buffer.size:
        return
    hvd, torch = _started(link)
    wide = widened(link, buffer)
    # the name says which sums of the ranks belong together; the same again is negotiated faster
    name = f"{link.tag}.{wide.size}.{wide.dtype}"
    yield Pending(hvd, hvd.allreduce_async_(torch.from_numpy(wide), op=hvd.Sum, name=name))
    narrow(wide, buffer)


def _started(link: Link) -> tuple[Any, Any]:
    """(horovod.torch, torch), with Horovod running on the ranks of `link`."""
    from mpi4py import MPI

    try:
        import horovod.torch as hvd
        import torch
    except ImportError as error:
        raise BackendUnavailable(
            f"allreduce = horovod: not installed ({error}); it has to be built against this MPI:\n"
            "benchmarks/build_horovod.sh VENV"
        ) from None
    group = link.comm.Get_group()
    if not _GROUP:
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            raise LaunchError(
                "allreduce = horovod: its thread uses MPI beside ours, and MPI was started for one;\n"
                "export HPCTRAIN_MPI_THREADS=multiple"
            )
        hvd.init(comm=link.comm)
        _GROUP.append(group)
    elif MPI.Group.Compare(group, _GROUP[0]) != MPI.IDENT:
        raise PlanError(
            f"allreduce = horovod: it sums over {_GROUP[0].size} ranks already, and can over no other group; name it "
            "for one group of the plan, and another algorithm for the rest"
        )
    return hvd, torch
