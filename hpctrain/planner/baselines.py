"""The plans that people make by hand, priced like those of the search: what a search has to beat."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from hpctrain.errors import PlanError
from hpctrain.graph import Graph, Node
from hpctrain.layers import Conv, ConvTranspose, Dense, Input
from hpctrain.layers.base import SPATIAL
from hpctrain.partition import Partition
from hpctrain.planner.compute import Pricer
from hpctrain.planner.cost import at_once, price
from hpctrain.planner.groups import factorizations, groups
from hpctrain.planner.plan import Plan, extents, uniform
from hpctrain.planner.seconds import PlanCost
from hpctrain.planner.setting import Setting

Baseline = tuple[Plan, PlanCost] | str
"""A plan and its price, or why there is none."""


class Grid(NamedTuple):
    """One grid for all layers, coarsened where a layer is too small for it, and its price."""

    partition: Partition
    plan: Plan
    cost: PlanCost


def baselines(graph: Graph, setting: Setting, ranks: int, pricer: Pricer | None = None) -> dict[str, Baseline]:
    """{name: plan and price, or why there is none}: "data" cuts the batch alone, "model" channels of convolutions and
    dense layers, "domain" positions, "one weird trick" (Krizhevsky 2014) the batch, but channels of dense layers;
    "best uniform grid" is the best of `grids`.
    """
    pricer = pricer or Pricer(setting, graph, at_once(setting, ranks))
    found: dict[str, Baseline] = {}
    for name, make in MAKERS.items():
        try:
            plan = make(graph, ranks, setting.allreduce)
        except PlanError as error:
            found[name] = str(error)
        else:
            found[name] = plan, price(graph, plan, setting, ranks, pricer)
    try:
        best = min(grids(graph, setting, ranks, pricer), key=lambda grid: grid.cost.seconds)
        found["best uniform grid"] = best.plan, best.cost
    except PlanError as error:
        found["best uniform grid"] = str(error)
    return found


def grids(graph: Graph, setting: Setting, ranks: int, pricer: Pricer | None = None) -> list[Grid]:
    """Every Pr x Pc grid of `ranks`, for all layers alike: Pc cuts the batch, Pr channels or positions, the latter as
    evenly as they allow. Raises PlanError where none of them suits any layer.
    """
    pricer = pricer or Pricer(setting, graph, at_once(setting, ranks))
    found = []
    for partition in _uniform(graph, ranks):
        plan = uniform(graph, partition, setting.allreduce)
        found.append(Grid(partition, plan, price(graph, plan, setting, ranks, pricer)))
    if not found:
        raise PlanError(f"no grid of {ranks} ranks: no layer has so many samples, positions or channels")
    return found


def _uniform(graph: Graph, ranks: int) -> list[Partition]:
    """The grids that some layer can take in full."""
    found = []
    for batch in (n for n in range(1, ranks + 1) if ranks % n == 0):
        rest = ranks // batch
        ways = [{}] if rest == 1 else [{"channel": rest}, _evenly(graph, rest)]
        found += [Partition.of({"batch": batch} | way) for way in ways if way is not None]
    return [grid for grid in found if any(_takes(node, grid) for node in graph)]


def _takes(node: Node, grid: Partition) -> bool:
    limits = extents(node)
    return all(n <= limits.get(axis, 1) for axis, n in grid.parts().items())


def _evenly(graph: Graph, blocks: int) -> dict[str, int] | None:
    """So many blocks of the positions of the first input that has some, of least surface; None where it has too few."""
    limits = next((found for node in graph if (found := extents(node)).keys() & set(SPATIAL)), {})
    axes = [axis for axis in SPATIAL if axis in limits]
    ways = list(factorizations(blocks, [limits[axis] for axis in axes]))
    if not ways:
        return None
    best = min(ways, key=lambda way: sum(n / limits[axis] for axis, n in zip(axes, way, strict=True)))
    return {axis: n for axis, n in zip(axes, best, strict=True) if n > 1}


# --- by hand ---------------------------------------------------------------------------------------------------------


def _data(graph: Graph, ranks: int, allreduce: str | None) -> Plan:
    samples = _samples(graph)
    if samples < ranks:
        raise PlanError(f"a batch of {samples} cannot be cut over {ranks} ranks; enlarge train.batch")
    return uniform(graph, Partition(batch=ranks), allreduce)


def _model(graph: Graph, ranks: int, allreduce: str | None) -> Plan:
    limits = {n.name: extents(n)["channel"] for n in graph if isinstance(n.layer, Conv | ConvTranspose | Dense)}
    if max(limits.values(), default=0) < ranks:
        raise PlanError(
            f"no convolution or dense layer has {ranks} channels, at most {max(limits.values(), default=0)}"
        )
    return uniform(graph, Partition(channel=ranks), allreduce)


def _domain(graph: Graph, ranks: int, allreduce: str | None) -> Plan:
    way = _evenly(graph, ranks)
    if way is None:
        raise PlanError(f"the input has too few positions to cut them over {ranks} ranks")
    return uniform(graph, Partition.of(way), allreduce)


def _weird(graph: Graph, ranks: int, allreduce: str | None) -> Plan:
    dense = [group for group in groups(graph) if isinstance(graph[group.head].layer, Dense)]
    if not dense or not any(isinstance(node.layer, Conv | ConvTranspose) for node in graph):
        raise PlanError("it is for networks with convolutions and dense layers")
    plan = _data(graph, ranks, allreduce)
    cut = uniform(graph, Partition(channel=ranks), allreduce)
    mixed = {name: cut.partitions[name] for group in dense for name in group.names}
    return Plan(plan.partitions | mixed, allreduce)


def _samples(graph: Graph) -> int:
    return next(node.shape[0] for node in graph if isinstance(node.layer, Input))


MAKERS: Mapping[str, Callable[[Graph, int, str | None], Plan]] = {
    "data": _data,
    "model": _model,
    "domain": _domain,
    "one weird trick": _weird,
}
"""Raise PlanError where there is no such plan."""
