"""Memory as a limit of plans: which partitions need little, whether a plan fits, and what to say where none does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from math import inf

import numpy as np

from hpctrain.errors import ConfigError, PlanError
from hpctrain.graph import Graph, Node
from hpctrain.layers import Input
from hpctrain.layers.base import Dims
from hpctrain.memory import mib
from hpctrain.partition import Partition, Shape, volume
from hpctrain.planner.baselines import by_hand, uniform_plans
from hpctrain.planner.groups import Group, candidates, chosen, follow, groups
from hpctrain.planner.layout import edges, kind, layouts
from hpctrain.planner.memory import Memory, largest, predict
from hpctrain.planner.pairs import extents
from hpctrain.planner.plan import Plan
from hpctrain.planner.schedule import Economy, schedule, segments_to_try
from hpctrain.planner.setting import Setting
from hpctrain.planner.states import block
from hpctrain.planner.transfers import traffic
from hpctrain.planner.wire import Wire
from hpctrain.precision import exact
from hpctrain.regions import Along

LOOKED_AT = 64
"""Ranks among which those are sought that need most: the first ones, which have the longest blocks."""

PREDICTED = 3
"""Of them, how many have their memory predicted: rank 0, and those that read and write most."""

AMPLE = 4
"""Where what is counted roughly is so many times less than the limit, nothing is predicted: a tensor has four arrays at
most, on both sides of its edge and for both passes."""

MOST_RANKS = 4096
"""Up to which more ranks are proposed where memory is short."""


def needed(graph: Graph, plan: Plan, setting: Setting, ranks: int) -> tuple[int, Memory]:
    """(rank, its memory) of the rank that needs most, among those that may.

    On more than `LOOKED_AT` ranks messages are counted as if none of them were contiguous in its tensor.
    """
    ids, hosts = _greedy(graph, plan), setting.machine.layout(ranks)[: plan.ranks]
    if plan.ranks <= LOOKED_AT:
        return largest(_predicted(graph, plan, setting, ids, hosts))
    found = _predicted(graph, plan, setting, ids, None)
    messages = _messages(graph, plan, setting, ids, Wire.of(setting, ranks).per_host)
    return largest({rank: replace(found[rank], messages=messages[rank]) for rank in ids})


def _predicted(
    graph: Graph, plan: Plan, setting: Setting, ids: Sequence[int], hosts: Sequence[int] | None
) -> dict[int, Memory]:
    """As `predict`; where `hosts` is None without messages."""
    return predict(
        graph,
        plan,
        ids,
        setting.precision,
        setting.optimizer_arrays,
        setting.backend,
        setting.economy,
        setting.parts > 1,
        [0] * plan.ranks if hosts is None else hosts,
        setting.shard,
        setting.share_weights,
    )


def _messages(graph: Graph, plan: Plan, setting: Setting, ids: Sequence[int], per_host: int) -> dict[int, int]:
    """Bytes that each of these ranks sends to and receives from other hosts, both ways."""
    found = dict.fromkeys(ids, 0)
    for edge in edges(graph, plan):
        moved, itemsize = traffic(edge, per_host), edge.kind.dtype(setting.dtype).itemsize
        both = (moved.received_far.elements + moved.sent_far.elements) * itemsize * (1 + edge.gradient)
        for rank in ids:
            found[rank] += int(both[rank]) if rank < len(both) else 0
    return found


def _greedy(graph: Graph, plan: Plan) -> list[int]:
    """The first rank, and those with the most elements in inputs, halos included, and outputs of all layers."""
    total = np.zeros(min(LOOKED_AT, plan.ranks))
    for place in layouts(graph, plan).values():
        for region in (place.output, *place.inputs):
            total += extents(region, len(total)).prod(axis=1)
    most = np.argsort(-total, kind="stable")[: PREDICTED - 1].tolist()
    return sorted({0, *most})


def fits(graph: Graph, plan: Plan, setting: Setting, ranks: int, limit: float) -> bool:
    """Whether no rank needs more than `limit` bytes."""
    if limit == inf:
        return True
    several = plan.ranks > Wire.of(setting, ranks).per_host
    if AMPLE * _roughly(graph, plan, setting, several) <= limit:
        return True
    return needed(graph, plan, setting, ranks)[1].total <= limit


# --- roughly, for every partition of a group -------------------------------------------------------------------------


def bytes_of(graph: Graph, group: Group, partitions: np.ndarray, setting: Setting) -> np.ndarray:
    """About how many bytes rank 0 needs for a group, for each of `partitions` (n, 6) of its head.

    Weights with all that goes with them, outputs, and what is read or summed beyond an even share of a tensor.
    """
    full, itemsize = exact(setting.dtype).itemsize, setting.dtype.itemsize
    total, in_memory = np.zeros(len(partitions)), _in_memory(graph, len(graph.nodes), setting.economy)
    for name in group.names:
        node, own = graph[name], follow(graph, group, name, partitions)
        size = kind(graph, name).dtype(setting.dtype).itemsize
        layer, shapes = node.layer, node.input_shapes
        for weight in layer.weights(*shapes).values():
            numbers = block(weight.shape, weight.axes, own).prod(1)
            copies = 2 + setting.optimizer_arrays + (setting.parts > 1)
            total += numbers * (copies * full + itemsize * (itemsize < full))
        total += block(node.shape, layer.output_axes(*shapes), own).prod(1) * size * (name in in_memory)
        if name == group.head:
            total += _beyond(node, own) * itemsize
    return total


@lru_cache(maxsize=4)
def _in_memory(graph: Graph, count: int, economy: Economy) -> frozenset[str]:
    """Layers whose output has an array: inputs, and the last of those that run as one. Of a graph of `count` layers."""
    places = layouts(graph, Plan({node.name: Partition() for node in graph}))
    inputs = {node.name for node in graph if isinstance(node.layer, Input)}
    return frozenset(inputs | {unit.name for unit in schedule(graph, places, economy).units})


def _beyond(node: Node, partitions: np.ndarray) -> np.ndarray:
    """Numbers that rank 0 reads of each input, or makes of the output, beyond an even share."""
    layer, shapes, size = node.layer, node.input_shapes, partitions.prod(1)
    tensors = zip((*layer.needs(*shapes), layer.produces(*shapes)), (*shapes, node.shape), strict=True)
    return sum(
        (np.maximum(0, _reads(node, dims, shape, partitions) - np.prod(shape) / size) for dims, shape in tensors),
        np.zeros(len(partitions)),
    )


def moved_bytes(
    reader: Node, slot: int, have: np.ndarray, want: np.ndarray, itemsize: int, several_hosts: bool
) -> np.ndarray:
    """About how many bytes (n, m) rank 0 needs between layers of partitions `have` and `want`: what is read where they
    differ, its gradient, and as much for messages.
    """
    arrays = 4 if several_hosts else 2
    dims, shape = reader.layer.needs(*reader.input_shapes)[slot], reader.input_shapes[slot]
    read = _reads(reader, dims, shape, want) * (itemsize * arrays)
    same = (have[:, None] == want[None]).all(2)
    return np.where(same, 0.0, read).astype(np.float32)


def _reads(node: Node, dims: Dims, shape: Shape, partitions: np.ndarray) -> np.ndarray:
    """Elements of a tensor that the longest block of work reaches."""
    layer, shapes = node.layer, node.input_shapes
    work = block(layer.work_shape(*shapes), layer.work_axes(*shapes), partitions)
    found = np.ones(len(partitions))
    for along, n in zip(dims, shape, strict=True):
        found *= n if along is None else _reached(along, work)
    return found


def _reached(along: Along, work: np.ndarray) -> np.ndarray:
    """Elements of a dim that blocks of work reach which begin at 0."""
    rows, where = np.unique(work[:, list(along.dims)], axis=0, return_inverse=True)
    spans = (along.reach(*(bound for n in row for bound in (0, n))) for row in rows.tolist())
    return np.array([stop - start for start, stop in spans])[where.ravel()]


def least(graph: Graph, setting: Setting, ranks: int) -> tuple[Plan, tuple[int, Memory]]:
    """A plan that needs little memory, and `needed` by it: of the least partition of each group, or one by hand."""
    found = groups(graph)
    rows = {}
    for group in found:
        states = candidates(graph, group, ranks, setting)
        rows[group.head] = states[bytes_of(graph, group, states, setting).argmin()]
    others = [plan for _, plan in uniform_plans(graph, setting, ranks)]
    others += [plan for plan in by_hand(graph, setting, ranks).values() if not isinstance(plan, str)]
    several = ranks > Wire.of(setting, ranks).per_host
    plans = [Plan(chosen(graph, found, rows)), *sorted(others, key=lambda p: _roughly(graph, p, setting, several))[:1]]
    memory = [needed(graph, plan, setting, ranks) for plan in plans]
    return min(zip(plans, memory, strict=True), key=lambda entry: entry[1][1].total)


def _roughly(graph: Graph, plan: Plan, setting: Setting, several_hosts: bool) -> float:
    """About how many bytes rank 0 needs."""
    rows = {name: np.array([partition.shape], np.int32) for name, partition in plan.partitions.items()}
    total = sum(float(bytes_of(graph, group, rows[group.head], setting)[0]) for group in groups(graph))
    size = setting.dtype.itemsize
    for node in graph:
        for slot, source in enumerate(node.inputs):
            if plan.partitions[source] == plan.partitions[node.name]:
                continue
            total += float(moved_bytes(node, slot, rows[source], rows[node.name], size, several_hosts)[0, 0])
    return total


# --- what to say where nothing fits ----------------------------------------------------------------------------------


def refusal(graph: Graph, setting: Setting, ranks: int, limit: float) -> PlanError:
    """The error where no plan fits: what is needed at least, for which layer, and what would fit."""
    plan, (rank, memory) = least(graph, setting, ranks)
    return PlanError(
        f"no plan for {ranks} ranks found that fits into {mib(int(limit))}: the one that needs least takes {memory} "
        f"on rank {rank}; {_largest_layer(graph, plan, setting)}. {_remedies(graph, setting, ranks, limit, plan)}"
    )


def _largest_layer(graph: Graph, plan: Plan, setting: Setting) -> str:
    """The layer with the most bytes on rank 0, with those that follow it, and what they are."""
    full, places, found = exact(setting.dtype).itemsize, layouts(graph, plan), []
    for group in groups(graph):
        numbers = sum(volume(d.box(0)) for name in group.names for d in places[name].weights.values())
        weights = numbers * full * (2 + setting.optimizer_arrays)
        ends = (*places[group.head].inputs, places[group.names[-1]].output)
        tensors = sum(volume(region.box(0)) for region in ends) * setting.dtype.itemsize
        found.append((weights + tensors, group.head, weights, tensors))
    _, name, weights, tensors = max(found, key=lambda entry: entry[0])
    return f"layer {name} has most of it: {mib(weights)} with its weights, {mib(tensors)} of inputs and output"


def _remedies(graph: Graph, setting: Setting, ranks: int, limit: float, plan: Plan) -> str:
    asked = (find(graph, setting, ranks, limit, plan) for find in (_more_ranks, _recompute, _accumulate))
    ways = [way for way in asked if way]
    if not ways:
        most = _most_ranks(setting)
        more = f"up to {most} ranks, " if most > ranks else ""
        elsewhere = "" if most == MOST_RANKS else "take a machine with more ranks or memory, or "
        return f"Nor would {more}recomputing or accumulating do: {elsewhere}make the network smaller"
    return f"What would fit: {'; or '.join(ways)}"


def _more_ranks(graph: Graph, setting: Setting, ranks: int, limit: float, plan: Plan) -> str:
    for count in _doubled(ranks, _most_ranks(setting)):
        try:
            if least(graph, setting, count)[1][1].total <= limit:
                return f"{count} ranks"
        except (ConfigError, PlanError):  # nothing is known of so many, or plan.only leaves nothing for them
            return ""
    return ""


def _most_ranks(setting: Setting) -> int:
    """What more ranks may be proposed up to: those that the machine has, where that is known."""
    machine = setting.machine
    return min(MOST_RANKS, machine.hosts * machine.per_host if machine.hosts and machine.per_host else MOST_RANKS)


def _doubled(n: int, most: int) -> Iterator[int]:
    while (n := 2 * n) <= most:
        yield n


def _recompute(graph: Graph, setting: Setting, ranks: int, limit: float, plan: Plan) -> str:
    if setting.economy.recompute:
        return ""
    for segments in segments_to_try(graph):
        saving = replace(setting, economy=replace(setting.economy, recompute=segments))
        if needed(graph, plan, saving, ranks)[1].total <= limit:
            return "memory.recompute = true"
    return ""


def _accumulate(graph: Graph, setting: Setting, ranks: int, limit: float, plan: Plan) -> str:
    batch = next(node.shape[0] for node in graph if isinstance(node.layer, Input))
    for count in _doubled(1, batch):
        try:
            part, parts = of_batch(graph, -(-batch // count)), count * setting.parts
            smaller = replace(setting, parts=parts)
            if least(part, smaller, ranks)[1][1].total <= limit:
                return f"train.accumulate = {parts}"
        except PlanError:  # a layer that takes no smaller batch
            return ""
    return ""


def of_batch(graph: Graph, batch: int) -> Graph:
    """The same network for another number of samples. Raises PlanError where a layer does not take so few."""
    found = Graph()
    for node in graph:
        layer = node.layer
        if isinstance(layer, Input):
            layer = replace(layer, shape=(batch, *layer.shape[1:]))
        found.add(node.name, layer, *node.inputs)
    return found
