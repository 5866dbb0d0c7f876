"""What a run starts from, the same on all ranks: data sets, network, replicas and plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hpctrain import automatic, prepare, summation
from hpctrain.automatic import Basis
from hpctrain.comm.allreduce.choose import Surroundings
from hpctrain.comm.replicas import Replicas, divide
from hpctrain.comm.watched import watched
from hpctrain.comm.world import World, all_ranks
from hpctrain.config import AUTO, Config
from hpctrain.data.dataset import Dataset
from hpctrain.graph import Graph
from hpctrain.planner.plan import Plan
from hpctrain.reckoning import Forecast

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm


@dataclass(frozen=True)
class Start:
    """What a config names, and the ranks that are to run it."""

    data: Dataset
    test: Dataset | None
    alone: Config
    """The config as one replica sees it."""
    graph: Graph
    plan: Plan
    replicas: Replicas
    comm: Intracomm
    """The ranks of this rank's replica."""
    around: Surroundings
    """Of these ranks."""
    basis: Basis | None
    """What steps are priced by; rank 0 alone has one."""

    def forecast(self, plan: Plan) -> Forecast | None:
        """What a step takes by `plan`; None where nothing was measured, and no plan was found by a guess either."""
        if self.basis is None or (self.basis.guess and self.alone.plan.grid != AUTO):
            return None
        found, without = self.basis.forecast(plan, self.comm.size), ""
        if self.alone.compress.codec != "none":
            without += "; gradients as if not compressed"
        if self.replicas.count > 1:
            without += "; without what replicas exchange"
        return replace(found, source=found.source + without)


def start(world: World, config: Config, resume: Path | None = None) -> Start:
    """What `config` names, for all ranks of `world`. Collective; errors are raised on all ranks alike."""
    comm, plan = watched(world.comm, "agreement of all ranks"), None
    with all_ranks(comm):
        data, test = prepare.open_datasets(config)
        copies = prepare.replicas(config, world.size)
        alone = prepare.of_replica(config, copies)
        graph = prepare.build_graph(alone, data)
        if config.plan.grid != AUTO:
            plan = prepare.make_plan(alone, graph, resume)
        prepare.require_replicas(config, plan, copies, world.size)
    replicas = divide(world.comm, copies)
    inside = watched(replicas.inside, f"agreement of all ranks{' of a replica' * (copies > 1)}")
    around = summation.surroundings(inside, world.library)
    basis = automatic.basis(world, alone, data, graph, around)
    if plan is None:
        plan = automatic.find(world, basis, inside.size, copies, resume)
        with all_ranks(comm):
            prepare.require_replicas(config, plan, copies, world.size)
    return Start(data, test, alone, graph, plan, replicas, inside, around, basis)
