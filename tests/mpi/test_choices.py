"""Which allreduce an executor binds for a group: the plan's, the chooser's, or what an earlier run chose elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from hpctrain import backends
from hpctrain.comm.allreduce.choose import Choice
from hpctrain.errors import PlanError
from hpctrain.executor import Executor
from hpctrain.gradients import Summing, summing
from hpctrain.models import Sample, mlp
from hpctrain.partition import Partition
from hpctrain.planner.plan import Plan, uniform
from hpctrain.planner.replicas import replica_groups
from hpctrain.precision import TYPES

NET = mlp.build(7, Sample((5,), classes=3))
GRID = Partition(batch=2)


def choices(comm: Any, plan: Plan) -> tuple[dict[str, str], list[tuple[int, tuple[int, ...]]]]:
    """({group: algorithm} that an executor binds, what it asked the chooser, who always says "tree")."""
    asked: list[tuple[int, tuple[int, ...]]] = []

    def choose(nbytes: int, ranks: Sequence[int]) -> Choice:
        asked.append((nbytes, tuple(ranks)))
        return Choice("tree", 1.0, "for a test")

    executor = Executor(NET, plan, comm, backends.get("reference"), "float64", summing=Summing(choose=choose))
    found = {str(group[0]): name for group, name in executor.gradients.choices.items()}
    executor.free()
    return found, asked


@pytest.mark.parallel([2, 3])
def test_chooser_is_asked_for_what_the_plan_leaves_open(comm: Any) -> None:
    plan = uniform(NET, GRID)
    ((group, nbytes),) = replica_groups(NET, plan, TYPES["float64"]).items()
    assert choices(comm, plan) == ({"batch=2": "tree"}, [(nbytes, (0, 1))])
    assert choices(comm, plan.with_choices({group: "ring"})) == ({"batch=2": "ring"}, [])
    assert choices(comm, replace(plan, allreduce="mpi")) == ({"batch=2": "mpi"}, [])


@pytest.mark.parallel([2])
def test_resumed_run_on_other_hosts_chooses_anew(comm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = uniform(NET, GRID)
    ((group, nbytes),) = replica_groups(NET, plan, TYPES["float64"]).items()
    shared = plan.with_choices({group: "shared"})
    assert choices(comm, replace(shared, resumed=True)) == ({"batch=2": "shared"}, [])
    monkeypatch.setattr(summing, "Topology", lambda comm: SimpleNamespace(hosts=(0, 1)))
    assert choices(comm, replace(shared, resumed=True)) == ({"batch=2": "tree"}, [(nbytes, (0, 1))])
    with pytest.raises(PlanError, match="allreduce 'shared' for 2 ranks on 2 hosts, which share no memory"):
        choices(comm, shared)
