"""Memory as a limit of plans: which partitions need little, whether a plan fits, and what to say where none does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import inf

import numpy as np

from hpctrain.errors import PlanError
from hpctrain.graph import Graph, Node
from hpctrain.layers import Input
from hpctrain.memory import mib
from hpctrain.partition import volume
from hpctrain.planner.groups import Group, candidates, chosen, follow, groups
from hpctrain.planner.layout import kind, layouts
from hpctrain.planner.memory import Memory, largest, predict
from hpctrain.planner.plan import Plan
from hpctrain.planner.schedule import segments_to_try
from hpctrain.planner.setting import Setting
from hpctrain.planner.states import block
from hpctrain.precision import exact
from hpctrain.regions import Along

LOOKED_AT = 64
"""Ranks whose memory is predicted: the first ones, which have the longest blocks."""

MOST_RANKS = 4096
"""Up to which more ranks are proposed where memory is short."""


def needed(graph: Graph, plan: Plan, setting: Setting, ranks: int, of: int = LOOKED_AT) -> tuple[int, Memory]:
    """(rank, its memory) of the rank that needs most among the first ones."""
    hosts = [setting.machine.layout(ranks)[rank] for rank in range(plan.ranks)]
    found = predict(
        graph,
        plan,
        range(min(of, plan.ranks)),
        setting.precision,
        setting.optimizer_arrays,
        setting.backend,
        setting.economy,
        setting.parts > 1,
        hosts,
        setting.shard,
        setting.share_weights,
    )
    return largest(found)


def fits(graph: Graph, plan: Plan, setting: Setting, ranks: int, limit: float) -> bool:
    """Whether no rank needs more than `limit` bytes."""
    return limit == inf or all(needed(graph, plan, setting, ranks, of)[1].total <= limit for of in (1, LOOKED_AT))


# --- roughly, for every partition of a group -------------------------------------------------------------------------


def bytes_of(graph: Graph, group: Group, partitions: np.ndarray, setting: Setting) -> np.ndarray:
    """About how many bytes rank 0 needs for a group, for each of `partitions` (n, 6) of its head.

    Weights with all that goes with them, outputs, and what is read or summed beyond an even share of a tensor.
    """
    full, itemsize = exact(setting.dtype).itemsize, setting.dtype.itemsize
    total = np.zeros(len(partitions))
    for name in group.names:
        node, own = graph[name], follow(graph, group, name, partitions)
        size = kind(graph, name).dtype(setting.dtype).itemsize
        layer, shapes = node.layer, node.input_shapes
        for weight in layer.weights(*shapes).values():
            numbers = block(weight.shape, weight.axes, own).prod(1)
            copies = 2 + setting.optimizer_arrays + (setting.parts > 1)
            total += numbers * (copies * full + itemsize * (itemsize < full))
        total += block(node.shape, layer.output_axes(*shapes), own).prod(1) * size
        if name == group.head:
            total += _beyond(node, own) * itemsize
    return total


def _beyond(node: Node, partitions: np.ndarray) -> np.ndarray:
    """Numbers that rank 0 reads of each input, or makes of the output, beyond an even share."""
    layer, shapes, size = node.layer, node.input_shapes, partitions.prod(1)
    work = block(layer.work_shape(*shapes), layer.work_axes(*shapes), partitions)
    found = np.zeros(len(partitions))
    tensors = zip((*layer.needs(*shapes), layer.produces(*shapes)), (*shapes, node.shape), strict=True)
    for dims, shape in tensors:
        read = np.ones(len(partitions))
        for along, n in zip(dims, shape, strict=True):
            read *= n if along is None else _reached(along, work)
        found += np.maximum(0, read - np.prod(shape) / size)
    return found


def _reached(along: Along, work: np.ndarray) -> np.ndarray:
    """Elements of a dim that blocks of work reach which begin at 0."""
    rows, where = np.unique(work[:, list(along.dims)], axis=0, return_inverse=True)
    spans = (along.reach(*(bound for n in row for bound in (0, n))) for row in rows.tolist())
    return np.array([stop - start for start, stop in spans])[where.ravel()]


def least(graph: Graph, setting: Setting, ranks: int) -> Plan:
    """A plan that needs little memory: every group has the partition that needs least of it."""
    found = groups(graph)
    rows = {}
    for group in found:
        states = candidates(graph, group, ranks, setting)
        rows[group.head] = states[bytes_of(graph, group, states, setting).argmin()]
    return Plan(chosen(graph, found, rows))


# --- what to say where nothing fits ----------------------------------------------------------------------------------


def refusal(graph: Graph, setting: Setting, ranks: int, limit: float) -> PlanError:
    """The error where no plan fits: what is needed at least, for which layer, and what would fit."""
    plan = least(graph, setting, ranks)
    rank, memory = needed(graph, plan, setting, ranks)
    return PlanError(
        f"no plan for {ranks} ranks found that fits into {mib(int(limit))}: the one that needs least takes {memory} "
        f"on rank {rank}; {_largest_layer(graph, plan, setting)}. {_remedies(graph, setting, ranks, limit, plan)}"
    )


def _largest_layer(graph: Graph, plan: Plan, setting: Setting) -> str:
    """The layer with the most bytes on rank 0, and what they are."""
    full, found = exact(setting.dtype).itemsize, []
    for name, place in layouts(graph, plan).items():
        size = kind(graph, name).dtype(setting.dtype).itemsize
        weights = sum(volume(dist.box(0)) for dist in place.weights.values()) * full * (2 + setting.optimizer_arrays)
        inputs = 0 if isinstance(place.node.layer, Input) else sum(volume(want.box(0)) for want in place.inputs) * size
        output = volume(place.output.box(0)) * size
        found.append((weights + inputs + output, name, weights, inputs + output))
    _, name, weights, tensors = max(found, key=lambda entry: entry[0])
    return f"layer {name} has most of it: {mib(weights)} with its weights, {mib(tensors)} of inputs and output"


def _remedies(graph: Graph, setting: Setting, ranks: int, limit: float, plan: Plan) -> str:
    asked = (find(graph, setting, ranks, limit, plan) for find in (_more_ranks, _recompute, _accumulate))
    ways = [way for way in asked if way]
    if not ways:
        return f"Nor would up to {MOST_RANKS} ranks, recomputing or accumulating do: make the network smaller"
    return f"What would fit: {'; or '.join(ways)}"


def _more_ranks(graph: Graph, setting: Setting, ranks: int, limit: float, plan: Plan) -> str:
    machine = setting.machine
    most = min(MOST_RANKS, machine.hosts * machine.per_host if machine.hosts and machine.per_host else MOST_RANKS)
    for count in _doubled(ranks, most):
        try:
            if needed(graph, least(graph, setting, count), setting, count, 1)[1].total <= limit:
                return f"{count} ranks"
        except PlanError:  # plan.only leaves nothing for so many
            return ""
    return ""


def _doubled(n: int, most: int) -> Iterator[int]:
    while (n := 2 * n) <= most:
        yield n


def _recompute(graph: Graph, setting: Setting, ranks: int, limit: float, plan: Plan) -> str:
    if setting.economy.recompute:
        return ""
    for segments in segments_to_try(graph):
        saving = replace(setting, economy=replace(setting.economy, recompute=segments))
        if needed(graph, plan, saving, ranks, 1)[1].total <= limit:
            return "memory.recompute = true"
    return ""


def _accumulate(graph: Graph, setting: Setting, ranks: int, limit: float, plan: Plan) -> str:
    batch = next(node.shape[0] for node in graph if isinstance(node.layer, Input))
    for count in _doubled(1, batch):
        try:
            part, parts = of_batch(graph, -(-batch // count)), count * setting.parts
            smaller = replace(setting, parts=parts)
            if needed(part, least(part, smaller, ranks), smaller, ranks, 1)[1].total <= limit:
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
