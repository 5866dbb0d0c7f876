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
    found: dict[str, Baseline] = {
        name: plan if isinstance(plan, str) else (plan, price(graph, plan, setting, ranks, pricer))
        for name, plan in by_hand(graph, setting, ranks).items()
    }
    priced = grids(graph, setting, ranks, pricer)
    best = min(priced, key=lambda grid: grid.cost.seconds, default=None)
    found["best uniform grid"] = f"no layer takes a grid of {ranks} ranks" if best is None else (best.plan, best.cost)
    return found


def by_hand(graph: Graph, setting: Setting, ranks: int) -> dict[str, Plan | str]:
    """The plans of `baselines` but for grids, without prices."""
    found: dict[str, Plan | str] = {}
    for name, make in MAKERS.items():
        try:
            found[name] = make(graph, ranks, setting.allreduce)
        except PlanError as error:
            found[name] = str(error)
    return found


def grids(graph: Graph, setting: Setting, ranks: int, pricer: Pricer | None = None) -> list[Grid]:
    """Every Pr x Pc grid of `ranks` that some layer takes in full, for all layers alike: Pc cuts the batch, Pr channels
    or positions, the latter as evenly as they allow.
    """
    pricer = pricer or Pricer(setting, graph, at_once(setting, ranks))
    plans = uniform_plans(graph, setting, ranks)
    return [Grid(grid, plan, price(graph, plan, setting, ranks, pricer)) for grid, plan in plans]


def uniform_plans(graph: Graph, setting: Setting, ranks: int) -> list[tuple[Partition, Plan]]:
    """The grids of `grids` and their plans, without prices."""
    return [(grid, uniform(graph, grid, setting.allreduce)) for grid in _uniform(graph, ranks)]


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
