"""Plans that the search finds on machines of different kinds compute what one rank computes."""

from __future__ import annotations

from typing import Any

import pytest
from executing import assert_equal, known, train
from msgspec.structs import replace

from hpctrain.machine import Compute, Copies, Level, Machine
from hpctrain.partition import Partition
from hpctrain.planner.plan import Plan
from hpctrain.planner.search import search
from hpctrain.planner.setting import Setting

COPYING = Machine(node=Level(1e-9, 1e-12, 0.0), copies=Copies(1e-9, 1e-13), compute=Compute(1e8, 1e9))
"""Computing is slow, moving free: every layer is cut as finely as blocks are even."""

SUMMING = replace(COPYING, node=Level(1e-3, 1e-6, 0.0))
"""Sums of gradients are slow: weights are cut."""

MOVING = Machine(node=Level(1e-7, 1e-9, 0.0), network=Level(1e-5, 1e-7, 0.0), per_host=2, compute=Compute(1e12, 1e12))
"""Messages are slow, between hosts the more: some ranks have nothing to do."""


@pytest.mark.parallel([2, 4])
@pytest.mark.parametrize("name", ["residual", "cosmoflow"])
def test_searched_plans_equal_one_rank(comm: Any, name: str) -> None:
    seed = 5
    net, data, serial = known(name, seed)
    settings = [Setting(machine, fewer="all") for machine in (COPYING, SUMMING, MOVING)]
    plans = {tuple(plan.partitions.items()): plan for s in settings if (plan := searched(net, s, comm))}
    if comm.rank == 0:
        print(f"{name} on {comm.size} ranks: {len(plans)} plans")
        assert len(plans) >= 2
        assert any(set(plan.partitions.values()) != {Partition()} for plan in plans.values())
    for plan in plans.values():
        assert_equal(train(net, plan, comm, data), serial, plan)


def searched(net: Any, setting: Setting, comm: Any) -> Plan:
    """Found by one rank for all, as a run does it."""
    plan: Plan = comm.bcast(search(net, setting, comm.size).plan if comm.rank == 0 else None)
    return plan
