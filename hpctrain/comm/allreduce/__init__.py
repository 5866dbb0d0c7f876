"""Allreduce algorithms: one file each, with the function on a contiguous buffer and its cost. `TABLE` lists them.

Every `allreduce(comm, buffer)` sums in place, in an order that depends on rank and size only ("mpi": in the library's
order, which MPICH for one does not repeat from run to run). Every `cost(ranks, nbytes, net)` gives seconds by the
alpha-beta model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from hpctrain.comm.allreduce import mpi, ring
from hpctrain.comm.allreduce.cost import Network
from hpctrain.errors import PlanError


class Algorithm(NamedTuple):
    """What a plan names, the executor calls and the planner prices."""

    allreduce: Callable[[Any, np.ndarray], None]
    cost: Callable[[int, int, Network], float]


TABLE = {
    "ring": Algorithm(ring.allreduce, ring.cost),
    "mpi": Algorithm(mpi.allreduce, mpi.cost),
}


def get(name: str) -> Algorithm:
    """The algorithm called `name`. Raises PlanError naming those there are."""
    if name not in TABLE:
        raise PlanError(f"allreduce algorithm {name!r} does not exist; choose one of {', '.join(TABLE)}")
    return TABLE[name]
