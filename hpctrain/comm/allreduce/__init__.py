"""Allreduce algorithms, one file each. `TABLE` lists them; a plan names one.

An algorithm is a generator `steps(link, buffer)`, which sums a contiguous 1D buffer in place: it starts messages, hands
out their requests, and goes on when they are complete. So one text serves both who waits (`Algorithm.sum`) and who does
something else meanwhile (`Running`). Beside it stand its `cost` in seconds by the alpha-beta-gamma model, and `sent`,
the messages and bytes that a rank sends, exactly.

float32, float64, float16 and bfloat16; the last two are added in float32 and rounded after each addition. The order of
the additions depends on rank and size only, and all ranks end with the same bits ("mpi": as the library does it).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import numpy as np

from hpctrain.comm.allreduce import (
    binary_blocks,
    halving_doubling,
    hierarchical,
    mpi,
    recursive_doubling,
    ring,
    segmented_ring,
    shared,
    tree,
    two_dimensional,
)
from hpctrain.comm.allreduce.cost import Network, Sent
from hpctrain.comm.allreduce.progress import Running, run
from hpctrain.comm.link import Link, Steps
from hpctrain.errors import PlanError

__all__ = ["LIBRARIES", "TABLE", "Algorithm", "Network", "Running", "Sent", "get", "mean", "run"]


class Algorithm(NamedTuple):
    """What a plan names, the executor runs and the planner prices."""

    summary: str
    steps: Callable[[Link, np.ndarray], Steps]
    cost: Callable[[int, float, Network], float]
    """(ranks, nbytes, net)"""
    sent: Callable[[int, int, int, int], Sent] | None
    """(ranks, rank, elements, itemsize); None where a library does not tell."""
    blocking: Callable[[Link, np.ndarray], None] | None = None
    """A way to do all steps at once that is faster than one by one, where there is one."""

    def sum(self, link: Link, buffer: np.ndarray) -> None:
        """Sum the contiguous 1D `buffer` over the ranks of `link`, in place, and wait for it."""
        if self.blocking is not None:
            self.blocking(link, buffer)
        else:
            run(self.steps(link, buffer))


def _ours(summary: str, module: ModuleType) -> Algorithm:
    return Algorithm(summary, module.steps, module.cost, module.sent)


TABLE = {
    "ring": _ours("fewest bytes, neighbours only", ring),
    "segmented_ring": _ours("the ring, added while more arrives", segmented_ring),
    "recursive_doubling": _ours("fewest messages, for short buffers", recursive_doubling),
    "halving_doubling": _ours("fewest bytes in few messages", halving_doubling),
    "binary_blocks": _ours("the same in blocks of powers of two", binary_blocks),
    "tree": _ours("all to one rank and back", tree),
    "hierarchical": _ours("within hosts, then between them", hierarchical),
    "two_dimensional": _ours("rings along rows and columns", two_dimensional),
    "shared": _ours("through memory shared by the ranks of a host", shared),
    "mpi": Algorithm("the MPI library's choice", mpi.steps, mpi.cost, None, mpi.blocking),
}


def _library(summary: str, name: str) -> Algorithm:
    """The algorithm of another library: its module is imported when it is used."""

    def steps(link: Link, buffer: np.ndarray) -> Steps:
        found: Steps = import_module(f"hpctrain.comm.{name}").steps(link, buffer)
        return found

    return Algorithm(summary, steps, ring.cost, None)


LIBRARIES = {
    "horovod": _library("Horovod's, to compare with", "horovod"),
    "nccl": _library("NCCL's, between CUDA devices", "nccl"),
}
"""Those that need something installed, so that they are never chosen unasked."""


def get(name: str) -> Algorithm:
    """The algorithm called `name`. Raises PlanError naming those there are."""
    every = TABLE | LIBRARIES
    if name not in every:
        raise PlanError(f"allreduce algorithm {name!r} does not exist; choose one of {', '.join(every)}")
    return every[name]


def mean(buffer: np.ndarray, ranks: int) -> None:
    """Make the sum over `ranks` in `buffer` their mean; floats of 16 bits are divided in float32 and rounded once."""
    if buffer.itemsize == 2:
        np.divide(buffer, np.float32(ranks), out=buffer, dtype=np.float32, casting="unsafe")
    else:
        np.divide(buffer, ranks, out=buffer)
