"""`plan.grid = "auto"`: the plan that the planner finds for the ranks of a run. Rank 0 looks for it, all get the same.

What a run's steps should take is priced here too, by whatever plan it has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

from msgspec import structs

from hpctrain import machine, planning, runfolder, summation
from hpctrain.comm.allreduce import choose
from hpctrain.comm.allreduce.choose import Surroundings
from hpctrain.comm.watched import watched
from hpctrain.comm.world import World, all_ranks
from hpctrain.config import Config
from hpctrain.data.dataset import Dataset
from hpctrain.errors import PlanError
from hpctrain.graph import Graph
from hpctrain.machine import Compute, Copies, Machine
from hpctrain.planner import plan as plans
from hpctrain.planner.baselines import baselines
from hpctrain.planner.compute import FORMULA, INTERPOLATED, MEASURED
from hpctrain.planner.cost import price
from hpctrain.planner.plan import Plan
from hpctrain.planner.search import Found
from hpctrain.planning import Chosen, Task
from hpctrain.reckoning import Forecast

GUESS = Compute(flops=5e10, bandwidth=1e10, call=2e-5)
"""Of a thread, where nothing was measured: a core of today's servers, by its order of magnitude."""

SOURCES = {MEASURED: "measured", INTERPOLATED: "interpolated", FORMULA: "by formula"}
"""What a layer's time is."""

GUESSED = "guessed figures"

CALIBRATE = "hpctrain calibrate CONFIG.toml, on as many ranks, measures it"


# --- by which figures ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Basis:
    """What a run's plans are priced by."""

    task: Task
    guess: bool
    """Whether how fast a rank computes is a guess."""

    def source(self, plan: Plan, ranks: int) -> str:
        """Where the figures for a plan on so many ranks are from, as the end of a sentence."""
        found, chosen = self.task.machine, self.task.chosen
        if self.guess and found.compute is not None:
            return f"by a guess: {found.compute.flops / 1e9:.0f} GFLOP/s a rank"
        how = Counter(self.task.sources(plan, ranks).values())
        layers = ", ".join(f"{how[source]} {said}" for source, said in SOURCES.items() if how[source])
        measured = f", {'measured' if found.library else 'figures of'} {found.date}" if found.date else ""
        return f"by {chosen.name}{measured}; layers: {layers}"

    def forecast(self, plan: Plan, ranks: int) -> Forecast:
        """What a step takes by `plan` on so many ranks."""
        cost = price(self.task.graph, plan, self.task.setting, ranks)
        return Forecast.of(cost, self.task.machine, self.source(plan, ranks), self.guess)


def basis(world: World, config: Config, data: Dataset, graph: Graph, around: Surroundings) -> Basis | None:
    """By the machine that plan.machine names, or this one as it was calibrated; else by a guess. None but on rank 0.

    `config` and `around` are those of one replica. Ranks lie on hosts as they do in this run, whatever the machine's
    file says, and share equally in what memory is free there. Collective; raises ConfigError, on all ranks, where the
    file is damaged, or plan.machine names none.
    """
    fullest, found = max(world.comm.allgather(world.node_size)), None
    with all_ranks(world.comm):
        if world.rank == 0:
            chosen = _chosen(config, world.threads)
            placed = _placed(_of_library(chosen.machine, world.library), around.hosts)
            limit = min(around.room / fullest, placed.memory or inf)
            task = Task(config, data, graph, replace(chosen, machine=placed), limit)
            found = Basis(task, chosen.name == GUESSED)
    return found


def _chosen(config: Config, threads: int) -> Chosen:
    each = structs.replace(GUESS, flops=GUESS.flops * threads, bandwidth=GUESS.bandwidth * threads)
    if config.plan.machine is not None:
        chosen = planning.choose_machine(config)
        return replace(chosen, machine=structs.replace(chosen.machine, compute=chosen.machine.compute or each))
    known = machine.load(machine.default_path()) or Machine()
    name = "this machine" if known.compute or known.kernels else GUESSED
    copies = known.copies or Copies(choose.NODE.alpha, choose.NODE.beta)
    return Chosen(structs.replace(known, compute=known.compute or each, copies=copies), name, True)


def _of_library(found: Machine, library: str) -> Machine:
    """`found`, without what another MPI library took."""
    if found.library in ("", library):
        return found
    return structs.replace(found, node=None, network=None, tables=())


def _placed(found: Machine, hosts: Sequence[int]) -> Machine:
    """`found` with as many ranks on a host as there are, of hosts that hold different numbers the largest; messages
    that were not measured as `choose` takes them to be.
    """
    levels = {"node": found.node or choose.NODE, "network": found.network or choose.NETWORK}
    return structs.replace(found, per_host=max(Counter(hosts).values()), hosts=None, **levels)


# --- the plan --------------------------------------------------------------------------------------------------------


def find(world: World, found: Basis | None, ranks: int, copies: int, resume: Path | None = None) -> Plan:
    """The plan for each of `copies` of the network, of so many ranks; `found` is needed on rank 0 alone.

    A run that goes on in the folder `resume` on as many ranks keeps the plan that is there. Collective; raises
    PlanError on all ranks where no plan fits.
    """
    comm = watched(world.comm, "search for a plan", patient=True)
    plan = None
    with all_ranks(comm):
        if found is not None:
            plan = _kept(found, resume, world.size, copies) or _searched(found, ranks)
    common: Plan = comm.bcast(plan)
    return common


def find_for(world: World, config: Config, data: Dataset, graph: Graph) -> Plan:
    """The plan by which all ranks together train one copy of the network, in float32 by the compiled kernels, whatever
    `config` says: so that what is verified is what is trained. Collective; raises as `basis` and `find` do.
    """
    train = structs.replace(config.train, precision="float32", backend="native", exact=False)
    around = summation.surroundings(world.comm, world.library)
    priced = basis(world, structs.replace(config, train=train), data, graph, around)
    return find(world, priced, world.size, 1)


def _kept(found: Basis, resume: Path | None, size: int, copies: int) -> Plan | None:
    """The plan of a run folder, if it is for so many ranks and this network."""
    path = None if resume is None else resume / "plan.json"
    if path is None or not path.is_file() or runfolder.ranks(path.parent) != size:
        return None
    earlier, asked = plans.load(path), found.task.config.plan.allreduce
    if copies > 1 and copies * earlier.ranks != size:
        return None
    try:
        earlier.check(found.task.graph)
    except PlanError:  # of another network; whether the run can go on with this one is for its checkpoint to say
        return None
    note = f"plan: that of {path}, made for {size} ranks; without the file another is searched for"
    if asked is not None:
        return replace(earlier, allreduce=asked, notes=(note,))
    return replace(earlier, resumed=True, notes=(note,))


def _searched(found: Basis, ranks: int) -> Plan:
    best, task = found.task.search(ranks), found.task
    others = baselines(task.graph, task.setting, ranks)
    seconds = {name: each[1].seconds for name, each in others.items() if not isinstance(each, str)}
    plan, asked = best.plan, task.config.plan.allreduce
    source = f"predicted {found.source(plan, ranks)}{f' ({CALIBRATE})' if found.guess else ''}"
    notes = (describe(best, seconds, ranks), source, *best.notes, *plan.notes)
    return replace(plan, allreduce=asked if asked is not None else plan.allreduce, notes=notes)


def describe(found: Found, others: dict[str, float], ranks: int) -> str:
    """What was found, and beside which other plan that is."""
    step, beside = found.cost.seconds, ""
    if others:
        best = min(others, key=lambda name: others[name])
        beside = f"; the best of the usual plans, {best}: {milliseconds(others[best])}"
    return (
        f"plan: searched for {ranks} rank{'s' * (ranks != 1)}, a step should take {milliseconds(step)}{beside}; none "
        f"is more than {100 * found.gap:.2g} % better by this model"
    )


def milliseconds(seconds: float) -> str:
    """Three digits at most: a prediction has no more."""
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
