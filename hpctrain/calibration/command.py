"""`hpctrain calibrate`: measures this machine on the ranks that it is started on, and writes what it finds."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

from msgspec.structs import replace

from hpctrain import backends, machine, models, prepare, summation
from hpctrain.backends.base import Backend
from hpctrain.bench import PEER, Options, Ranks, bytes_text, records_of, time_text
from hpctrain.calibration import copies, layers, storage
from hpctrain.comm.allreduce import choose, measure
from hpctrain.comm.world import World, all_ranks
from hpctrain.config import Config, Optim
from hpctrain.console import Console, print_json, wrapped
from hpctrain.data.dataset import Dataset
from hpctrain.data.files import write_atomic
from hpctrain.errors import ConfigError
from hpctrain.graph import Graph
from hpctrain.machine import Kernel, Level, Machine, Table, numbered
from hpctrain.metrics import Totals
from hpctrain.request import RunRequest
from hpctrain.verdict import judge

SECONDS = 75.0
"""For layers; all the rest takes less than half as long."""

ROUNDS = 31
"""Of what takes microseconds."""


class Wanted(NamedTuple):
    """The network whose layers are measured, and how."""

    graph: Graph
    precision: str
    backend: Backend
    rules: Optim
    data: Dataset | None = None
    """Where they are here."""


def run(world: World, request: RunRequest | None, options: Options, out: Path | None) -> int:
    """Measure messages, sums, copies and layers, of the run asked for, and write them where runs and plans look."""
    console, path, old = Console(world.rank), out or machine.default_path(), Machine()
    with all_ranks(world.comm):
        if world.rank == 0:
            old = machine.load(path) or old
        config = None if request is None else request.load()
        wanted = _wanted(config, options.quick)
    wanted.backend.use_threads(world.threads)
    with Ranks(world) as ranks:
        threads = f"{world.threads} thread{'s' * (world.threads > 1)} each"
        console.note(wrapped(f"{ranks}, {threads}, {world.library}; to {path}"))
        found, records = sums(world, ranks, options, console)
    found = _with_layers(_with_copies(found, world, options, console), world, wanted, options, console)
    if old.library == found.library:
        found = replace(found, kernels=_with_blocks_of(old, found.kernels))
    if config is None:
        found = replace(found, kernels=())  # of a network that nobody runs
    elif wanted.data is not None:
        found = replace(found, storage=storage.measure(world.comm, config, wanted.data))
    with all_ranks(world.comm):
        if world.rank == 0:
            _write(path, old.updated(replace(found, source=_sources(world, found))))
    if options.json and world.rank == 0:
        print_json("calibrate", records)
    return 0


def _wanted(config: Config | None, quick: bool) -> Wanted:
    """What the config runs; without one a small network, of which only the speeds that its layers reach are of use."""
    if config is None:
        sample = models.Sample((28, 28, 1) if quick else (32, 32, 3), classes=10)
        graph = models.build("lenet" if quick else "resnet18", 16, sample, {} if quick else {"stem": "cifar"})
        return Wanted(graph, "float32", backends.get("native"), Optim(lr=0.1, momentum=0.9))
    alone, train = prepare.of_replica(config, prepare.replicas(config)), config.train
    data = prepare.known_data(alone)
    return Wanted(
        prepare.build_graph(alone, data),
        train.precision,
        backends.get(train.backend, train.exact),
        summation.optimizer_config(config),
        data if isinstance(data, Dataset) else None,
    )


def _with_copies(found: Machine, world: World, options: Options, console: Console) -> Machine:
    near = copies.measure(world.node, 3 if options.quick else ROUNDS)
    if near is not None:
        console.note(f"reading of a host's memory: {time_text(near.alpha)} each, {1e-9 / near.beta:.2f} GB/s")
    step = agreement(world, 5 if options.quick else ROUNDS)
    per_host = world.node_size if world.node_size < world.size else None
    return replace(found, copies=near, step=step, date=date.today().isoformat(), per_host=per_host)


def _with_layers(found: Machine, world: World, wanted: Wanted, options: Options, console: Console) -> Machine:
    asked = layers.plans(wanted.graph, world.size)
    rehearsed = layers.rehearse(
        world.comm,
        wanted.graph,
        asked[:2] if options.quick else asked,
        wanted.backend,
        wanted.precision,
        wanted.rules,
        SECONDS,
        1 if options.quick else None,
    )
    measured, kernels = rehearsed.times.measured(), rehearsed.times.kernels(world.node_size)
    compute = layers.compute(measured)
    left_out = f"; {rehearsed.left_out} plans left out for want of time" if rehearsed.left_out else ""
    console.note(f"{len(kernels)} layers on {sum(len(kernel.blocks) for kernel in kernels)} blocks{left_out}")
    off = layers.deviation(compute, measured)
    console.note(
        f"other layers by formula: {compute.flops / 1e9:.1f} GFLOP/s, {compute.bandwidth / 1e9:.1f} GB/s; "
        f"for these it is off by {100 * (off - 1):.0f} %"
    )
    return replace(found, compute=compute, kernels=kernels, update=rehearsed.update)


def sums(world: World, ranks: Ranks, options: Options, console: Console) -> tuple[Machine, list[dict[str, Any]]]:
    """Messages, and allreduces of all sizes and algorithms; what is known by then, and a record of each."""
    near, far = measure.levels(ranks.link)
    console.note("\n".join(_said(what, level) for what, level in (("host", near), ("network", far)) if level))
    seconds: dict[str, dict[int, float]] = {}
    for nbytes in options.sizes if world.size > 1 else ():
        for name, taken in ranks.time(nbytes, options).items():
            seconds.setdefault(name, {})[nbytes] = taken
    tables = (Table(numbered(ranks.hosts), seconds),) if seconds else ()
    found = Machine(world.library, near, far, tables)
    room, records = choose.least_room(world.comm), []
    for nbytes in options.sizes if seconds else ():
        taken_by = {name: times[nbytes] for name, times in seconds.items()}
        choice = choose.choose(nbytes, ranks.hosts, found, room)
        ratio = taken_by[PEER] / choice.seconds
        console.note(f"{bytes_text(nbytes):>10}  {choice.name:<20}{time_text(choice.seconds):>10}{ratio:8.2f} x mpi")
        records += records_of(nbytes, taken_by, world.size, options.dtype, choice.name)
    return found, records


def agreement(world: World, rounds: int) -> float:
    """Seconds of the small allreduce of every step."""
    taken, totals = [], Totals({"loss": [0.0, 0.0, 0.0, 0.0]}, 1.0)
    for _ in range(rounds):
        world.comm.Barrier()
        begin = perf_counter()
        judge(world.comm, totals, None, ([], []), False)
        taken.append(perf_counter() - begin)
    return max(world.comm.allgather(median(taken)))


def _with_blocks_of(old: Machine, kernels: Sequence[Kernel]) -> tuple[Kernel, ...]:
    """`kernels`, with the blocks that only an older calibration measured."""
    known = {(kernel.key, kernel.at_once): kernel.blocks for kernel in old.kernels}
    return tuple(replace(k, blocks=known.get((k.key, k.at_once), {}) | k.blocks) for k in kernels)


def _sources(world: World, found: Machine) -> dict[str, str]:
    how = f"hpctrain calibrate on {world.size} ranks of {world.threads} threads, {found.date}"
    fields = ("node", "network", "tables", "copies", "compute", "kernels", "update", "step", "storage")
    return {field: how for field in fields if getattr(found, field)}


def _said(what: str, level: Level) -> str:
    return (
        f"messages within the {what}: {time_text(level.alpha)} each, {1e-9 / level.beta:.2f} GB/s; "
        f"additions {1e-9 / level.gamma:.2f} GB/s"
    )


def _write(path: Path, found: Machine) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error}); give --out a path in a folder of yours") from None
    write_atomic(path, machine.encode(found))
