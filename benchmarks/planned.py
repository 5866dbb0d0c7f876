"""The jobs of plan_accuracy.py: on the ranks of an MPI job, time plans beside rehearsals of layers, or count bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import networks
import numpy as np
from msgspec import structs
from ours import OPTIM, Ours

from hpctrain import backends, models
from hpctrain.bench import Options, Ranks
from hpctrain.calibration import command, copies, layers
from hpctrain.calibration.rehearsal import Rehearsal
from hpctrain.comm import world
from hpctrain.comm.allreduce import choose
from hpctrain.comm.allreduce.choose import Choice
from hpctrain.console import Console
from hpctrain.gradients import Summing
from hpctrain.graph import Graph
from hpctrain.layers import Conv, Dense
from hpctrain.machine import Machine
from hpctrain.models import Sample
from hpctrain.partition import Partition
from hpctrain.planner.cost import price
from hpctrain.planner.plan import Plan, extents, uniform
from hpctrain.planner.search import search
from hpctrain.planner.seconds import PlanCost
from hpctrain.planner.setting import Setting

SIZES = tuple(1024 * 8**i for i in range(6))
"""Bytes of the allreduces that are timed: 1 KiB to 32 MiB."""

ROUNDS = 7


@dataclass(frozen=True)
class Network:
    """What is planned for: a network by batch, and its batches for timing, in a hurry, and for counting bytes."""

    build: Callable[[int], Graph]
    batch: int
    quick: int
    least: int


def unet3d(batch: int) -> Graph:
    """Two classes of voxels; a quarter of the published filters."""
    sample = Sample((32, 32, 32, 1), classes=2, positions=(32, 32, 32))
    return models.build("unet3d", batch, sample, {"filters": 8, "levels": 3})


NETWORKS = {
    "resnet18": Network(networks.resnet18, 64, 16, 6),
    "vgg11": Network(networks.vgg11, 64, 16, 6),
    "alexnet": Network(networks.alexnet, 32, 8, 6),
    "cosmoflow": Network(networks.cosmoflow, 2, 2, 2),
    "unet3d": Network(unet3d, 4, 2, 2),
}


# --- which plans -----------------------------------------------------------------------------------------------------


def plans(graph: Graph, ranks: int) -> dict[str, Plan]:
    """Plans of so many ranks by name: one axis for all layers, and mixed ones."""
    if ranks == 1:
        return {"uncut": uniform(graph, Partition())}
    first = next(node for node in graph if isinstance(node.layer, Conv))
    able = [axis for axis in ("batch", "depth", "height", "width", "channel") if extents(first).get(axis, 0) >= ranks]
    whole = {axis: uniform(graph, Partition.of({axis: ranks})) for axis in able}
    found = {axis: plan for axis, plan in whole.items() if (axis, "depth" in able) != ("width", True)}
    dense = [node.name for node in graph if isinstance(node.layer, Dense)]
    early = whole.get("batch", whole["height"])
    half = list(graph.nodes)[: len(graph.nodes) // 2]
    if dense:
        at = list(graph.nodes).index(dense[0])
        found["channel in dense"] = joined(early, whole["channel"], list(graph.nodes)[:at])
    else:
        found["height, then channel"] = joined(whole["height"], whole["channel"], half)
    if "batch" in whole:
        found["height, then batch"] = joined(whole["height"], whole["batch"], half)
    return found


def joined(first: Plan, then: Plan, names: Sequence[str]) -> Plan:
    """`first` for these layers, `then` for the others."""
    return Plan({name: (first if name in names else then).partitions[name] for name in first.partitions})


# --- time ------------------------------------------------------------------------------------------------------------


def time_plans(names: Sequence[str], quick: bool, out: Path) -> None:
    """Predicted and measured steps of all plans of these networks on the ranks of this job."""
    here = world.start()
    with Ranks(here) as ranks:
        options = Options((1024, 1 << 20, 1 << 25) if quick else SIZES, rounds=3 if quick else None)
        known, _ = command.sums(here, ranks, options, Console(1))
    known = structs.replace(known, step=command.agreement(here, 5 if quick else command.ROUNDS))
    records = [record for name in names for record in _Network(here, name, known, quick).run()]
    if here.rank == 0:
        out.write_text(json.dumps(records))


class _Network:
    """One network on the ranks of this job."""

    def __init__(self, here: world.World, name: str, known: Machine, quick: bool) -> None:
        self.world, self.name, self.known = here, name, known
        self.rounds = 2 if quick else ROUNDS
        self.graph = NETWORKS[name].build(NETWORKS[name].quick if quick else NETWORKS[name].batch)
        self.backend = backends.get("native")
        self.backend.use_threads(here.threads)
        self.rehearsed: list[list[list[np.ndarray]]] = []
        """Of each rehearsal, step by step, the seconds of each rank's units."""
        self.update: list[float] = []
        self.taken: dict[str, list[list[float]]] = {}

    def run(self) -> list[dict[str, Any]]:
        """A record for each plan."""
        alone = self.world.comm.Split(self.world.rank, 0)
        asked = layers.plans(self.graph, self.world.size)[: None if self.world.size > 1 else 1]
        self.rehearsals = [Rehearsal(self.graph, plan, alone, self.backend, "float32", OPTIM) for plan in asked]
        self.rehearsed = [[] for _ in asked]
        self.copies = copies.measure(self.world.node, self.rounds)
        for rehearsal in self.rehearsals:
            rehearsal.run()  # memory is touched for the first time
        for _ in range(2):
            self._rehearse()
        timed, chosen = plans(self.graph, self.world.size), ""
        if self.world.size > 1:
            timed, chosen = self._with_choice(timed)
        sides = {name: self._side(plan) for name, plan in timed.items()}
        for at in range(-1, self.rounds):
            self._rehearse()
            for name, side in sides.items():
                measured = self._step(side)
                if at >= 0:
                    self.taken.setdefault(name, []).append(measured)
        setting = Setting(self._machine())
        records = [self._record(name, price(self.graph, plan, setting), chosen) for name, plan in timed.items()]
        for side in sides.values():
            side.executor.free()
        return records

    def _rehearse(self) -> None:
        for rehearsal, taken in zip(self.rehearsals, self.rehearsed, strict=True):
            taken.append(self.world.comm.allgather(rehearsal.run()))
            self.update.append(rehearsal.update)

    def _machine(self) -> Machine:
        times = layers.Times(self.graph, "float32", "native")
        for rehearsal, taken in zip(self.rehearsals, self.rehearsed, strict=True):
            times.add(rehearsal, np.array(taken))
        found = structs.replace(
            self.known,
            copies=self.copies,
            compute=layers.compute(times.measured()),
            kernels=times.kernels(self.world.node_size),
            update=median(self.update),
        )
        made: Machine = self.world.comm.bcast(found)
        return made

    def _with_choice(self, timed: dict[str, Plan]) -> tuple[dict[str, Plan], str]:
        """With the plan that the planner finds, and its name: one of these, where it is that."""
        setting = Setting(self._machine())
        ranks = self.world.size
        plan = search(self.graph, setting, ranks).plan if self.world.rank == 0 else None
        found = self.world.comm.bcast(plan)
        same = next((name for name, plan in timed.items() if plan.partitions == found.partitions), None)
        return (timed, same) if same else (timed | {"planner's": found}, "planner's")

    def _side(self, plan: Plan) -> Ours:
        machine, hosts = self._machine(), [0] * self.world.size

        def choice(nbytes: int, ranks: Sequence[int]) -> Choice:
            return choose.choose(nbytes, [hosts[rank] for rank in ranks], machine, 2**62)

        return Ours(self.graph, self.world.comm, plan, summing=Summing(choose=choice))

    def _step(self, side: Ours) -> list[float]:
        """Seconds of a step, of its phases, and bytes: of the slowest rank, and summed. Collective."""
        executor = side.executor
        before, sent = dict(executor.seconds), executor.bytes_sent()
        self.world.comm.Barrier()
        begin = perf_counter()
        side.gradients()
        updating = perf_counter()
        side.optimizer.step(OPTIM.lr)
        end = perf_counter()
        spent = [executor.seconds[phase] - before[phase] for phase in ("compute", "exchange", "allreduce")]
        every = np.array(self.world.comm.allgather([end - begin, *spent, end - updating]))
        nbytes = sum(self.world.comm.allgather(executor.bytes_sent() - sent))
        return [float(every[:, 0].max()), *every[:, 1:].mean(axis=0).tolist(), nbytes]

    def _record(self, name: str, cost: PlanCost, chosen: str) -> dict[str, Any]:
        seconds, compute, exchange, allreduce, update, _ = (median(of) for of in zip(*self.taken[name], strict=True))
        phases = cost.phases()
        return {
            "network": self.name,
            "plan": name,
            "chosen": name == chosen,
            "ranks": self.world.size,
            "threads": self.world.threads,
            "batch": self.graph["x"].shape[0],
            "precision": "float32",
            "seconds": seconds,
            "predicted_seconds": cost.seconds,
            "error": cost.seconds / seconds - 1,
            "compute_seconds": compute,
            "exchange_seconds": exchange,
            "allreduce_seconds": allreduce,
            "update_seconds": update,
            "predicted_compute_seconds": phases["compute"],
            "predicted_exchange_seconds": phases["halo"] + phases["redistribution"],
            "predicted_allreduce_seconds": phases["allreduce"],
            "predicted_update_seconds": phases["update"],
            "bytes": int(self.taken[name][-1][-1]),
            "predicted_bytes": cost.sent_bytes,
        }


# --- bytes -----------------------------------------------------------------------------------------------------------


def count_bytes(names: Sequence[str], quick: bool, out: Path) -> None:
    """Bytes that one step sends by each plan, as predicted and as counted."""
    here = world.start()
    machine = Machine(copies=copies.Copies(1e-6, 1e-10), compute=layers.Compute(1e11, 1e10))
    records = []
    for name in names[:1] if quick else names:
        graph = NETWORKS[name].build(NETWORKS[name].least)
        for plan_name, plan in plans(graph, here.size).items():
            side = Ours(graph, here.comm, plan)
            side.gradients()
            sent = sum(here.comm.allgather(side.executor.bytes_sent()))
            side.executor.free()
            predicted = price(graph, plan, Setting(machine)).sent_bytes
            record = {"network": name, "plan": plan_name, "ranks": here.size, "batch": graph["x"].shape[0]}
            records.append(record | {"bytes": sent, "predicted_bytes": predicted})
    if here.rank == 0:
        out.write_text(json.dumps(records))


ROLES: Mapping[str, Callable[[Sequence[str], bool, Path], None]] = {"time": time_plans, "count": count_bytes}
