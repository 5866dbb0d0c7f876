"""`hpctrain verify`: runs the user's network by its plan and once whole, and says where the two differ."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, cast

from hpctrain import automatic, backends, memory, prepare
from hpctrain.comm.watched import begin
from hpctrain.comm.world import World, all_ranks
from hpctrain.config import AUTO, Config
from hpctrain.console import Console, print_json, wrapped
from hpctrain.errors import PlanError
from hpctrain.graph import Graph
from hpctrain.partition import Partition
from hpctrain.planner import memory as need
from hpctrain.planner.plan import Plan
from hpctrain.planner.schedule import Economy
from hpctrain.verify import table
from hpctrain.verify.compare import Finding, Item, after_update, before_update, compare
from hpctrain.verify.run import Run, Settings
from hpctrain.verify.sample import Sample, samples
from hpctrain.verify.tolerance import Tolerance, tolerances
from hpctrain.verify.traffic import Traffic, traffic

if TYPE_CHECKING:
    from mpi4py import MPI

DIFFERS = 1
"""Exit status where the plan computes or moves something else."""


@dataclass(frozen=True)
class Options:
    """What `hpctrain verify` was asked for besides the config."""

    steps: int = 2
    sample_layers: bool = False
    budget: int = 256 * memory.MIB
    """Bytes that one of the sampled layers may need."""
    all: bool = False
    json: bool = False


def run(world: World, config: Config, options: Options) -> int:
    """Check the plan of `config`; the exit status: 0, or DIFFERS. Collective; bad input is refused on all ranks alike.

    Of the data only the shapes are used. Rank 0 runs the whole network beside its share of it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # there is nothing to save: no need to wait for a good moment
    console = Console(world.rank, config.run.log_every)
    begin(world.comm, config.run.stall_seconds, guarded=config.debug.collectives)  # rank 0 may take as long as it likes
    with all_ranks(world.comm):
        data, _ = prepare.open_datasets(config)
        graph = prepare.build_graph(config, data)
        plan = None if config.plan.grid == AUTO else prepare.make_plan(config, graph)
    if plan is None:
        plan = automatic.find_for(world, config, data, graph)
    with all_ranks(world.comm):
        plan.check(graph)
        train = config.train
        settings = Settings(backends.get(train.backend, train.exact), train.precision, train.seed, config.optim)
        settings.backend.use_threads(world.threads)
        chosen = list(samples(graph, plan, options.budget, train.precision)) if options.sample_layers else []
    console.note(table.heading(config, graph, plan, world.size, options.steps, chosen))
    for line in plan.notes:
        console.note(wrapped(line))
    if not options.sample_layers:
        _require_room(world, config, graph, plan)
    alone = cast("MPI.Intracomm", world.comm.Split(world.rank))
    with memory.explained(lambda: f"{prepare.most_memory(config, graph, plan)}, and rank 0 runs all of it too"):
        if options.sample_layers:
            rows, edges = _check_samples(world, alone, chosen, settings, options.steps, console)
        else:
            checked = check(world.comm, alone, graph, plan, settings, options.steps)
            rows, edges = table.rows(graph, plan, checked.findings, checked.limits), checked.traffic
    alone.Free()
    equal = world.comm.bcast(all(row.equal for row in rows) and all(edge.equal for edge in edges))
    if world.rank == 0:
        for text in table.report(rows, edges, options.all):
            console.note(text)
        if options.json:
            print_json("verify", table.records(config, world.size, rows, edges))
    return 0 if equal else DIFFERS


class Checked(NamedTuple):
    """What came out of one network, on rank 0; elsewhere nothing."""

    findings: list[Finding]
    traffic: list[Traffic]
    limits: dict[str, Tolerance]


def check(
    comm: MPI.Intracomm, alone: MPI.Intracomm, graph: Graph, plan: Plan, settings: Settings, steps: int
) -> Checked:
    """Train `graph` by `plan`, and on rank 0 whole, over `alone`; up to the first step that differs. Collective."""
    limits = tolerances(graph, settings.precision)
    whole = None
    if comm.rank == 0:
        whole = Run(graph, Plan({node.name: Partition() for node in graph}), alone, settings)
    planned = Run(graph, plan, comm, settings, Economy(fuse=True))
    findings: list[Finding] = []
    for step in range(steps):
        for each in filter(None, (whole, planned)):
            each.forward_backward(step)
        found = _compare(planned, before_update(planned, whole), limits, step)
        for each in filter(None, (whole, planned)):
            each.update()
        found += _compare(planned, after_update(planned, whole), limits, step)
        findings += found
        if comm.bcast(not all(finding.equal for finding in found)):
            break
    moved = traffic(planned.executor, step + 1)
    for each in filter(None, (whole, planned)):
        each.free()
    return Checked(findings, moved, limits)


def _compare(planned: Run, items: Iterable[Item], limits: dict[str, Tolerance], step: int) -> list[Finding]:
    found = (compare(planned, item, limits[item.layer], step) for item in items)
    return [finding for finding in found if finding is not None]


def _check_samples(
    world: World, alone: MPI.Intracomm, chosen: list[Sample], settings: Settings, steps: int, console: Console
) -> tuple[list[table.Row], list[Traffic]]:
    rows: list[table.Row] = []
    edges: list[Traffic] = []
    with console.progress(len(chosen), "layers") as bar:
        for sample in chosen:
            checked = check(world.comm, alone, sample.graph, sample.plan, settings, steps)
            rows += table.sample_rows(sample, checked.findings, checked.limits)
            edges += [edge for edge in checked.traffic if edge.consumer == sample.name]
            bar.advance(1, sample.name)
    return rows, edges


def _require_room(world: World, config: Config, graph: Graph, plan: Plan) -> None:
    """Raises PlanError, on all ranks, where rank 0 cannot hold the whole network beside its share."""
    alone = Plan({node.name: Partition() for node in graph})
    share = need.of_run(config, graph, plan, [world.rank])[world.rank].total
    whole = need.of_run(config, graph, alone, [0])[0].total
    others = world.node.allreduce(share) - share
    checks = ((share + whole, memory.process_room()), (share + whole + others, memory.host_room()))
    with all_ranks(world.comm):
        for asked, room in checks if world.rank == 0 else ():
            if room is not None and asked > room.nbytes:
                raise PlanError(
                    f"the whole network, which rank 0 runs, needs {memory.mib(whole)}, with the shares beside it "
                    f"{memory.mib(asked)}, but there are {memory.mib(room.nbytes)} ({room.limit}); check layers one at "
                    "a time, on shapes cut to fit: --sample-layers"
                )
