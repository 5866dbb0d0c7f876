"""What the price of a plan says is sent in a step is what its ranks send: to the byte, by shared memory or messages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from networks import NETWORKS

from hpctrain import backends
from hpctrain.executor import Executor
from hpctrain.graph import Graph
from hpctrain.layers import Phase
from hpctrain.machine import Compute, Copies, Level, Machine
from hpctrain.partition import Partition
from hpctrain.planner.baselines import baselines
from hpctrain.planner.cost import price
from hpctrain.planner.plan import Plan, uniform
from hpctrain.planner.schedule import KEEP, LEAN, Economy
from hpctrain.planner.search import search
from hpctrain.planner.setting import Setting

MACHINE = Machine(
    node=Level(1e-6, 1e-10, 0.0),
    network=Level(1e-5, 1e-9, 0.0),
    compute=Compute(1e9, 1e10),
    copies=Copies(1e-6, 1e-10),
)


def sent(comm: Any, graph: Graph, plan: Plan, economy: Economy, apart: bool) -> int:
    """By all ranks in one step; `apart`: each on a host of its own, so that messages carry it all."""
    hosts = list(range(comm.size)) if apart else None
    executor = Executor(graph, plan, comm, backends.get("reference"), "float64", economy=economy, hosts=hosts)
    for node in graph:
        if not node.inputs:
            executor.input(node.name).fill(1)
    rows = executor.forward(Phase(training=True))
    executor.backward({name: np.ones_like(mine) for name, mine in rows.items()})
    found = sum(comm.allgather(executor.bytes_sent()))
    executor.free()
    return found


@pytest.mark.parallel([2, 3, 4, 5, 6])
@pytest.mark.parametrize("name", ["lenet", "residual", "cosmoflow"])
def test_bytes_of_plans_are_exact(comm: Any, name: str) -> None:
    graph, setting = NETWORKS[name](), Setting(MACHINE, "float64", "reference")
    found = comm.bcast(planned(graph, setting, comm.size) if comm.rank == 0 else None)
    ways = [(LEAN, False), (KEEP, True), (Economy(True, True, recompute=3), False)]
    for i, (title, plan) in enumerate(found.items()):
        economy, apart = ways[i % len(ways)]
        expected = price(graph, plan, replace(setting, economy=economy)).sent_bytes
        assert sent(comm, graph, plan, economy, apart) == expected, (title, economy, apart)


def planned(graph: Graph, setting: Setting, ranks: int) -> dict[str, Plan]:
    """What is searched, what people do by hand, and a mixture."""
    found = {title: made[0] for title, made in baselines(graph, setting, ranks).items() if not isinstance(made, str)}
    mixed = uniform(graph, Partition(batch=2, channel=ranks // 2))
    return {"searched": search(graph, setting, ranks).plan, "mixed": mixed} | found
