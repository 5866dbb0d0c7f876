"""How many threads a rank may run: the cores that it was bound to, shared fairly with the ranks bound to the same."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpi4py import MPI


def cores() -> frozenset[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def fair_threads(masks: Sequence[frozenset[int]], rank: int) -> int:
    """Threads for `rank` of a node whose ranks may run on `masks`: a core counts one over the ranks that share it."""
    return max(1, int(sum(1 / sum(core in mask for mask in masks) for core in masks[rank]) + 1e-9))


def threads(node: MPI.Intracomm) -> int:
    """Threads for this rank: OMP_NUM_THREADS where it is set, else its share of its cores. Collective over `node`."""
    masks = node.allgather(cores())
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(asked) if asked.isdigit() and int(asked) > 0 else fair_threads(masks, node.rank)
