"""NCCL's allreduce of arrays on CUDA devices, one device a rank. Loaded when a plan names it.

Written against nccl4py 0.6; not run on a device yet.
"""

from __future__ import annotations

from typing import Any

from hpctrain.comm.allreduce import ring
from hpctrain.comm.link import Link, Steps
from hpctrain.errors import BackendUnavailable, PlanError

cost = ring.cost


class Communicator:
    """NCCL's communicator of the ranks of a link. Collective; the device that is current becomes this rank's."""

    def __init__(self, link: Link) -> None:
        try:
            import nccl.core as nccl
        except ImportError as error:
            raise BackendUnavailable(
                f"allreduce = nccl: not installed ({error});\npip install 'nccl4py[cu13]' (CUDA 12: [cu12])"
            ) from None
        self._nccl = nccl
        made = nccl.get_unique_id().as_bytes if link.rank == 0 else None
        shared = nccl.UniqueId.from_bytes(link.comm.bcast(made))
        self._comm = nccl.Communicator.init(link.size, link.rank, shared)

    def sum(self, buffer: Any, stream: Any) -> None:
        """Sum `buffer` in place, in the order of `stream`."""
        self._comm.allreduce(buffer, buffer, self._nccl.SUM, stream=stream)

    def free(self) -> None:
        """Release it. Collective."""
        self._comm.destroy()


class Pending:
    """Work of a stream."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def test(self) -> bool:
        """Whether it is done."""
        return bool(self._stream.done)

    def wait(self) -> None:
        """Return when it is."""
        self._stream.synchronize()


def steps(link: Link, buffer: Any) -> Steps:
    """Sum the contiguous 1D `buffer`, a CuPy array, over the ranks of `link`, in place, on the current stream.

    bfloat16 too. Raises BackendUnavailable where nccl4py is not installed, PlanError for an array in host memory.
    """
    if not hasattr(buffer, "__cuda_array_interface__"):
        raise PlanError("allreduce = nccl sums arrays on CUDA devices, this one is in host memory; choose another")
    import cupy

    if not buffer.size:
        return
    kept = link.kept.get("nccl")
    if not isinstance(kept, Communicator):
        link.kept["nccl"] = kept = Communicator(link)
    stream = cupy.cuda.get_current_stream()
    kept.sum(buffer, stream.ptr)
    yield Pending(stream)
