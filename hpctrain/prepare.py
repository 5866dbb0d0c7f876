"""From a config to what it names: data sets, network and plan. Local work without MPI, the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from msgspec import structs

from hpctrain import models
from hpctrain.config import AUTO, Config
from hpctrain.data.dataset import Dataset
from hpctrain.errors import ConfigError, DataError, PlanError
from hpctrain.graph import Graph
from hpctrain.layers import Input
from hpctrain.memory import mib
from hpctrain.partition import Shape
from hpctrain.planner import memory
from hpctrain.planner import plan as plans
from hpctrain.planner.plan import Plan
from hpctrain.planner.replicas import replica_groups
from hpctrain.precision import TYPES


def replicas(config: Config, ranks: int = 0) -> int:
    """How many copies of the network a run on so many ranks trains; raises as `of_replica` does.

    Where the config does not say, as many as there is room for, or if there is less, the fewest that make sense. Copies
    whose plan is to be found have a rank each then.
    """
    if config.sync.strategy == "allreduce":
        return 1
    asked = asked_ranks(config)
    count = config.sync.replicas or max(1 + config.sync.spare, ranks // asked)
    of_replica(config, count)
    return count


def asked_ranks(config: Config) -> int:
    """Ranks that the config's grid or plan file asks for; 1 where the plan is to be found, for any number of them."""
    grid = config.plan.grid
    if grid == AUTO:
        return 1
    return plans.load(Path(grid)).ranks if isinstance(grid, str) else grid.partition.size


def of_replica(config: Config, count: int) -> Config:
    """The config as one of `count` replicas sees it: with a batch of its own. Raises ConfigError where that fails."""
    batch, parts, spare = config.train.batch, config.train.accumulate, config.sync.spare
    if batch % (count * parts):
        among = f"{count} replicas" + (f" of {parts} parts (train.accumulate)" if parts > 1 else "")
        raise ConfigError(
            f"train.batch = {batch} does not divide among {among}; give a multiple of {count * parts}, or set "
            "sync.replicas"
        )
    if spare >= count:
        raise ConfigError(f"sync.spare = {spare} of {count} replicas leaves none to wait for; at most {count - 1}")
    return structs.replace(config, train=structs.replace(config.train, batch=batch // count))


def require_replicas(config: Config, plan: Plan | None, count: int, ranks: int) -> None:
    """Raises PlanError where `count` replicas of `plan`, or of one to be found, are not just what `ranks` hold."""
    if plan is None and ranks % count:
        raise PlanError(
            f"{count} replicas cannot have equally many of {ranks} ranks; start a multiple of {count}, or set "
            "sync.replicas"
        )
    if plan is None or config.sync.strategy == "allreduce" or count * plan.ranks == ranks:
        return
    fits = f"sync.replicas = {ranks // plan.ranks} would fit" if ranks % plan.ranks == 0 else "no number of them fits"
    raise PlanError(
        f"{count} replica{'s' * (count > 1)} of a plan for {plan.ranks} ranks take {count * plan.ranks}, but there are "
        f"{ranks}; start {count * plan.ranks} ranks ({fits} {ranks})"
    )


@dataclass(frozen=True)
class Described:
    """What data.sample says of data that are elsewhere; fields are those of a Dataset."""

    folder: Path
    x_shape: Shape
    y_shape: Shape
    classes: int | None
    samples: int
    ignore: int | None = None


def described(config: Config) -> Described | None:
    """What data.sample says; None where it says nothing. Raises ConfigError where it says two things."""
    sample = config.data.sample
    if sample is None:
        return None
    if sample.classes is not None and sample.values != 1:
        raise ConfigError(f"data.sample.values = {sample.values} has no effect beside classes; give one of them")
    if sample.classes is None and sample.positions:
        raise ConfigError("data.sample.positions are those of labels: give their number too, data.sample.classes")
    y_shape = (sample.values,) if sample.classes is None else sample.positions
    return Described(Path(config.data.train), sample.shape, y_shape, sample.classes, sample.count)


def known_data(config: Config) -> Dataset | Described:
    """The training set, or where its folder is not there what data.sample says of it. Raises DataError."""
    said = described(config)
    if Path(config.data.train).exists():
        return open_datasets(config)[0]
    if said is None:
        raise DataError(
            f"{config.data.train}: no such folder; to plan for data that are elsewhere, say what they look like: "
            "data.sample = {shape = [224, 224, 3], classes = 1000, count = 1281167} (or values in place of classes)"
        )
    return said


def _require_described(config: Config, train: Dataset) -> None:
    """Raises DataError where data.sample says something else than the data that are there."""
    said = described(config)
    for what in ("x_shape", "y_shape", "classes", "samples") if said is not None else ():
        if getattr(said, what) != getattr(train, what):
            raise DataError(
                f"{train.folder}: {what} {getattr(train, what)}, but data.sample says {getattr(said, what)}; mend "
                "data.sample, or remove it: it is needed only where the data are not there"
            )


def open_datasets(config: Config) -> tuple[Dataset, Dataset | None]:
    """Training and test set, checked to be of one kind. Raises DataError."""
    train = Dataset(Path(config.data.train), config.data.normalize)
    _require_described(config, train)
    if config.data.test is None:
        return train, None
    test = Dataset(Path(config.data.test), config.data.normalize)
    for what in ("x_shape", "y_shape", "classes", "ignore"):
        if getattr(train, what) != getattr(test, what):
            raise DataError(
                f"{test.folder}: {what} {getattr(test, what)}, but {train.folder} has {getattr(train, what)}; "
                "give a test set of the same kind"
            )
    test.mean, test.std = train.mean, train.std
    return train, test


def verify(train: Dataset, test: Dataset | None, rank: int, ranks: int) -> None:
    """Compare the hashes of all data, each rank those of some shards. Raises DataError."""
    for data in filter(None, (train, test)):
        data.verify(range(rank, len(data.shards), ranks))


def build_graph(config: Config, data: Dataset | Described) -> Graph:
    """The network of `config` for samples of `data`. Raises ConfigError or PlanError naming what does not fit."""
    labels = data.classes is not None
    positions = data.y_shape if labels else ()
    sample = models.Sample(data.x_shape, data.classes, prod(data.y_shape), positions, data.ignore)
    try:
        graph = models.build(config.model.name, config.train.part, sample, config.model.options)
    except PlanError as error:
        raise PlanError(f"{data.folder}: samples of {data.x_shape} do not fit {config.model.name}: {error}") from None
    _require_inputs(graph, config, data)
    return graph


def _require_inputs(graph: Graph, config: Config, data: Dataset | Described) -> None:
    """Raises ConfigError where a network's inputs are not what the loader fills: x and y of a batch."""
    if not isinstance(graph, Graph):
        raise ConfigError(f"model.name: {config.model.name} returned {type(graph).__name__}; it must return a Graph")
    found = {node.name: (node.shape, node.layer.integer) for node in graph if isinstance(node.layer, Input)}
    batch = config.train.part
    expected = {"x": ((batch, *data.x_shape), False), "y": ((batch, *data.y_shape), data.classes is not None)}
    if found != expected:
        raise ConfigError(
            f"model.name: {config.model.name} has inputs {_shapes(found)}, but a batch of {data.folder} is "
            f"{_shapes(expected)}; give a network and data that fit each other"
        )


def _shapes(tensors: dict[str, tuple[Shape, bool]]) -> str:
    said = (f"{name} {shape}{' of integers' if integer else ''}" for name, (shape, integer) in tensors.items())
    return ", ".join(said) or "none"


def make_plan(config: Config, graph: Graph, resume: Path | None = None) -> Plan:
    """The plan that `config` names: a grid for all layers, or a file; `automatic` finds others. Raises PlanError.

    A run that goes on in the folder `resume` with the same partitions keeps the allreduce algorithms chosen then: its
    sums are added in the same order.
    """
    if isinstance(config.plan.grid, str):
        found = plans.load(Path(config.plan.grid))
        try:
            found.check(graph)
            _require_groups(graph, found)
        except PlanError as error:
            raise PlanError(f"{config.plan.grid}: {error}") from None
    else:
        found = plans.uniform(graph, config.plan.grid.partition)
    if config.plan.allreduce is not None:
        return replace(found, allreduce=config.plan.allreduce)
    kept = resume / "plan.json" if resume is not None else None
    if found.allreduce is None and kept is not None and kept.is_file():
        earlier = plans.load(kept)
        if earlier.partitions == found.partitions:
            return replace(found, allreduce=earlier.allreduce, resumed=True)
    return found


def _require_groups(graph: Graph, plan: Plan) -> None:
    """Raises PlanError where the plan names an allreduce algorithm for ranks that sum nothing together."""
    if not isinstance(plan.allreduce, Mapping):
        return
    groups = [plans.group_name(group) for group in replica_groups(graph, plan, TYPES["float32"])]
    for name in plan.allreduce:
        if name not in groups:
            there = f"choose one of {'; '.join(groups)}" if groups else "no gradients are summed"
            raise PlanError(f"allreduce of {name!r}: no such group of ranks in this plan; {there}")


def most_memory(config: Config, graph: Graph, plan: Plan, among: int = 64) -> str:
    """Which rank needs most memory, and how much; of the first `among`, as these have the longer blocks."""
    rank, need = memory.largest(memory.of_run(config, graph, plan, range(min(plan.ranks, among))))
    keeping = without_recomputing(config, graph, plan, rank)
    return f"rank {rank} needs most{f' of the first {among}' if plan.ranks > among else ''}, {need}" + (
        f"; {mib(keeping)} without memory.recompute" if keeping else ""
    )


def without_recomputing(
    config: Config, graph: Graph, plan: Plan, rank: int, hosts: Sequence[int] | None = None
) -> int | None:
    """Bytes that `rank` would need if a run that recomputes did not; None where it does not."""
    if not config.memory.recompute:
        return None
    keeping = structs.replace(config, memory=structs.replace(config.memory, recompute=False))
    return memory.of_run(keeping, graph, plan, [rank], hosts)[rank].total
