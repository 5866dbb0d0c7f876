"""What every rank has to do in a step, in seconds and bytes: what a simulation plays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hpctrain.graph import Graph
from hpctrain.layers import Input
from hpctrain.partition import AXES
from hpctrain.planner.compute import Pricer
from hpctrain.planner.cost import FLOAT64, at_once
from hpctrain.planner.layout import Layout, differentiable, edges, layouts
from hpctrain.planner.pairs import Way, extents, ways
from hpctrain.planner.plan import Plan
from hpctrain.planner.reduction import Bucket, overlaps, reductions, sets
from hpctrain.planner.schedule import Key, Schedule, schedule
from hpctrain.planner.setting import Setting
from hpctrain.planner.sums import statistics_seconds
from hpctrain.planner.transfers import is_halo
from hpctrain.planner.weights import weights
from hpctrain.planner.wire import Wire
from hpctrain.precision import exact


class Moves(NamedTuple):
    """An edge: what flows in the forward pass and, where gradients do, in the backward pass."""

    forward: Way
    backward: Way | None
    phase: str
    """halo or redistribution."""


class Gathers(NamedTuple):
    """What a norm gathers: by rank with which others, and the seconds that it takes forward and backward."""

    ranks: list[tuple[int, ...]]
    seconds: tuple[float, float]


class Workload(NamedTuple):
    """One step of `ranks` ranks."""

    schedule: Schedule
    compute: list[list[tuple[float, float]]]
    """By unit and rank, seconds forward and backward."""
    moves: dict[Key, Moves]
    gathers: dict[str, Gathers]
    """By layer."""
    sums: list[dict[int, list[Bucket]]]
    """By rank, the gradients that each unit's backward completes."""
    overlaps: bool
    """Whether they are summed while backward goes on."""
    varied: set[str]
    """Layers that have a backward pass."""
    input: list[float]
    """By rank, seconds of reading its part of the inputs."""
    update: list[float]
    """By rank, likewise of updating weights."""


def workload(
    graph: Graph, plan: Plan, setting: Setting, hosts: Sequence[int], pricer: Pricer | None = None
) -> Workload:
    """That of `plan` on ranks that lie on these `hosts`. Raises ConfigError where the machine says too little."""
    places, ranks = layouts(graph, plan), len(hosts)
    order = schedule(graph, places, setting.economy)
    sums: list[dict[int, list[Bucket]]] = [{} for _ in range(ranks)]
    for bucket in reductions(graph, plan, setting, places, order.units, hosts):
        for rank in bucket.ranks:
            sums[rank].setdefault(bucket.after, []).append(bucket)
    return Workload(
        order,
        _compute(order, places, ranks, pricer or Pricer(setting, graph, at_once(setting, ranks))),
        _moves(graph, plan, setting, places, order, hosts),
        {name: found for name, place in places.items() if (found := _gathers(place, setting, hosts)) is not None},
        sums,
        overlaps(setting, hosts),
        differentiable(graph),
        _input(places, setting, ranks),
        _update(places, setting, hosts),
    )


def _compute(order: Schedule, places: dict[str, Layout], ranks: int, pricer: Pricer) -> list[list[tuple[float, float]]]:
    """Each rank's block has its own time; few of them differ."""
    found = []
    for unit in order.units:
        blocks, which = np.unique(extents(places[unit.head].work, ranks), axis=0, return_inverse=True)
        seconds = pricer.seconds(unit, blocks)[which.ravel()]
        found.append([(forward, backward) for forward, backward in seconds.tolist()])
    return found


def _moves(
    graph: Graph, plan: Plan, setting: Setting, places: dict[str, Layout], order: Schedule, hosts: Sequence[int]
) -> dict[Key, Moves]:
    """Of the edges between units, where anything is moved."""
    wire = Wire.of(setting, len(hosts))
    between = {key for unit in order.units for key in (*unit.inputs, (unit.head, None))}
    found = {}
    for edge in edges(graph, plan, places):
        key = edge.consumer, edge.slot
        if key not in between or (edge.have.partition == edge.want.partition and edge.have.cuts == edge.want.cuts):
            continue  # within a unit, or every rank wants just what it has
        to_wanters, to_owners = ways(edge, setting.dtype, wire, hosts)
        # partial sums run backwards in the forward pass
        forward, backward = (to_wanters, to_owners) if edge.slot is not None else (to_owners, to_wanters)
        found[key] = Moves(forward, backward if edge.gradient else None, "halo" if is_halo(edge) else "redistribution")
    return found


def _gathers(place: Layout, setting: Setting, hosts: Sequence[int]) -> Gathers | None:
    """As `cost.price`: three numbers of a channel forward, two backward, among ranks that cut what a norm sums over."""
    node, partition = place.node, place.partition
    axes = tuple(a for a in AXES if a in node.layer.reduce_axes(*node.input_shapes) and partition[a] > 1)
    if not axes:
        return None
    found: list[tuple[int, ...]] = [()] * len(hosts)
    longest = 0.0, 0.0
    channels = int(extents(place.output, 1)[0, -1]) * FLOAT64
    for ranks in sets((partition, axes)):
        at = [hosts[rank] for rank in ranks]
        seconds = tuple(statistics_seconds(numbers * channels, at, setting) for numbers in (3, 2))
        longest = max(longest, (seconds[0], seconds[1]))
        for rank in ranks:
            found[rank] = ranks
    return Gathers(found, longest)


def _input(places: dict[str, Layout], setting: Setting, ranks: int) -> list[float]:
    storage, itemsize = setting.machine.storage, exact(setting.dtype).itemsize
    if storage is None:
        return [0.0] * ranks
    inputs = [place.output for place in places.values() if isinstance(place.node.layer, Input)]
    nbytes = sum(extents(output, ranks).prod(axis=1) for output in inputs) * itemsize
    return [float(n) / storage.read for n in np.broadcast_to(nbytes, ranks)]


def _update(places: dict[str, Layout], setting: Setting, hosts: Sequence[int]) -> list[float]:
    if not setting.machine.update:
        return [0.0] * len(hosts)
    itemsize = exact(setting.dtype).itemsize
    held = (weights(places, rank, hosts, setting.shard, setting.share_weights) for rank in range(len(hosts)))
    return [found.updated * itemsize * setting.machine.update for found in held]
