"""Which ranks hold the same parameters under a plan, and how many bytes of gradient they sum."""

from __future__ import annotations

from math import prod

import numpy as np

from hpctrain.graph import Graph
from hpctrain.partition import volume
from hpctrain.planner.layout import layouts
from hpctrain.planner.plan import Group, Plan
from hpctrain.precision import exact


def replica_groups(graph: Graph, plan: Plan, dtype: np.dtype) -> dict[Group, int]:
    """{group: bytes of gradient on its rank 0, which has the longest blocks}, of groups of more than one rank."""
    found: dict[Group, int] = {}
    for place in layouts(graph, plan).values():
        for dist in place.weights.values():
            group = (dist.partition, dist.replicated_axes)
            if ranks(group) > 1:
                found[group] = found.get(group, 0) + volume(dist.box(0)) * exact(dtype).itemsize
    return found


def ranks(group: Group) -> int:
    """How many ranks sum gradients together."""
    partition, axes = group
    return prod(partition[axis] for axis in axes)
