"""What a run starts from, the same on all ranks: data sets, network, replicas and plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hpctrain import prepare, summation
from hpctrain.comm.allreduce.choose import Surroundings
from hpctrain.comm.replicas import Replicas, divide
from hpctrain.comm.watched import watched
from hpctrain.comm.world import World, all_ranks
from hpctrain.config import Config
from hpctrain.data.dataset import Dataset
from hpctrain.graph import Graph
from hpctrain.planner.plan import Plan

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


def start(world: World, config: Config, resume: Path | None = None) -> Start:
    """What `config` names, for all ranks of `world`. Collective; errors are raised on all ranks alike."""
    with all_ranks(watched(world.comm, "agreement of all ranks")):
        data, test = prepare.open_datasets(config)
        copies = prepare.replicas(config, world.size)
        alone = prepare.of_replica(config, copies)
        graph = prepare.build_graph(alone, data)
        plan = prepare.make_plan(alone, graph, resume)
        prepare.require_replicas(config, plan, copies, world.size)
    replicas = divide(world.comm, copies)
    comm = watched(replicas.inside, f"agreement of all ranks{' of a replica' * (copies > 1)}")
    around = summation.surroundings(comm, world.library)
    return Start(data, test, alone, graph, plan, replicas, comm, around)
