"""Where everything of a layer lies under a partition: the boxes that the executor moves and the cost model prices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import numpy as np

from hpctrain.graph import Graph, Node
from hpctrain.layers import Input, Loss
from hpctrain.partition import Partition
from hpctrain.planner.plan import Plan
from hpctrain.precision import exact
from hpctrain.regions import Distribution, Region, Wanted, received, sent, touched, wanted


@dataclass(frozen=True)
class Layout:
    """One layer: the work of every rank, the inputs it needs, the output it owns, and its parameters and statistics.

    `partial` is what every rank produces where that is not what it owns: sums over ranks are then due.
    """

    node: Node
    partition: Partition
    work: Distribution
    inputs: tuple[Wanted, ...]
    partial: Wanted | None
    output: Distribution
    weights: Mapping[str, Distribution]
    state: Mapping[str, Distribution]


def layout(node: Node, partition: Partition) -> Layout:
    """The layout of one layer."""
    layer, shapes = node.layer, node.input_shapes
    work, output = layer.work(partition, *shapes), layer.output(partition, *shapes)
    needs = layer.needs(*shapes)
    inputs = tuple(wanted(work, dims, shape) for dims, shape in zip(needs, shapes, strict=True))
    produced = touched(work, layer.produces(*shapes), output.shape)  # without work: zeros, and perhaps a bias
    return Layout(
        node,
        partition,
        work,
        inputs,
        None if produced.cuts == output.cuts else produced,
        output,
        {name: Distribution(w.shape, w.axes, partition) for name, w in layer.weights(*shapes).items()},
        {name: Distribution(w.shape, w.axes, partition) for name, w in layer.state(*shapes).items()},
    )


def layouts(graph: Graph, plan: Plan) -> dict[str, Layout]:
    """The layout of every layer, in graph order."""
    return {node.name: layout(node, plan.partitions[node.name]) for node in graph}


def differentiable(graph: Graph) -> set[str]:
    """Layers that depend on a trained parameter, and the loss on them: gradients flow through these only."""
    trained: set[str] = set()
    for node in graph:
        if node.layer.weights(*node.input_shapes) or any(name in trained for name in node.inputs):
            trained.add(node.name)
    return trained & useful(graph)


def useful(graph: Graph) -> set[str]:
    """Layers that the loss depends on, itself included."""
    found: set[str] = set()
    for node in reversed(list(graph)):
        if isinstance(node.layer, Loss) or any(user.name in found for user, _ in graph.consumers(node.name)):
            found.add(node.name)
    return found


class Kind(Enum):
    """What a tensor holds: numbers of the run's type, labels, or what stays exact where that is bf16."""

    NUMBERS = "numbers"
    LABELS = "labels"
    EXACT = "exact"

    def dtype(self, run: np.dtype) -> np.dtype:
        """Its type in a run of type `run`."""
        return {Kind.NUMBERS: run, Kind.LABELS: np.dtype(np.int64), Kind.EXACT: exact(run)}[self]


def kind(graph: Graph, name: str) -> Kind:
    """What the output of layer or input `name` holds: rows of losses and the targets that only they read are exact."""
    layer, users = graph[name].layer, graph.consumers(name)
    if isinstance(layer, Input) and layer.integer:
        return Kind.LABELS
    target = isinstance(layer, Input) and users and all(isinstance(n.layer, Loss) and slot > 0 for n, slot in users)
    return Kind.EXACT if isinstance(layer, Loss) or target else Kind.NUMBERS


@dataclass(frozen=True)
class Edge:
    """A transfer between owners and users of one tensor: input `slot` of `consumer`, or its partial sums (slot None).

    Forward runs from `have` to `want`, backward from `want` to `have`; partial sums the other way round.
    """

    consumer: str
    slot: int | None
    have: Region
    want: Region
    kind: Kind
    gradient: bool


def edges(graph: Graph, plan: Plan, places: Mapping[str, Layout] | None = None) -> list[Edge]:
    """Every transfer of one training step, in the order the executor makes them forward; `places` are the layouts."""
    places = layouts(graph, plan) if places is None else places
    varied, needed, found = differentiable(graph), useful(graph), []
    for name, place in places.items():
        for slot, (source, want) in enumerate(zip(place.node.inputs, place.inputs, strict=True)):
            gradient = source in varied and name in needed
            found.append(Edge(name, slot, places[source].output, want, kind(graph, source), gradient))
        if place.partial is not None:
            found.append(Edge(name, None, place.output, place.partial, kind(graph, name), name in varied))
    return found


def sent_bytes(edge: Edge, rank: int, dtype: np.dtype) -> tuple[int, int]:
    """Bytes that `rank` sends to others along `edge` in the forward and in the backward pass of one step."""
    itemsize = edge.kind.dtype(dtype).itemsize
    out = sent(edge.have, edge.want, rank) * itemsize
    back = received(edge.have, edge.want, rank) * itemsize if edge.gradient or edge.slot is None else 0
    # partial sums run backwards in the forward pass
    return (out, back) if edge.slot is not None else (back, out if edge.gradient else 0)
