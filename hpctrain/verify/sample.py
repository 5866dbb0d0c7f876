"""Networks of one layer each, on shapes cut to fit: to check a network that is too large to run whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import lcm, prod

import numpy as np

from hpctrain.backends.base import Array
from hpctrain.errors import PlanError
from hpctrain.graph import Graph, Node
from hpctrain.layers import MSE, AvgPool, Conv, Input, Layer, Loss, MaxPool, Phase, Place, Weight
from hpctrain.layers.base import Op
from hpctrain.memory import MIB, mib
from hpctrain.partition import AxisNames, Partition, Shape, names
from hpctrain.planner import memory
from hpctrain.planner.plan import Plan, require_blocks

STRIDES = 12
"""Extents keep their remainder by this while they can: what is left over by strides of 2, 3, 4 and 6."""


@dataclass(frozen=True)
class Sample:
    """A network around layer `name`, on inputs of `shapes`; `alike` are the layers that it stands for."""

    name: str
    graph: Graph
    plan: Plan
    shapes: tuple[Shape, ...]
    full: tuple[Shape, ...]
    alike: tuple[str, ...]


@dataclass(frozen=True)
class Owner(Layer):
    """y = x * scale, cut along `axes` as another layer's output would be. It is trained, so that gradients flow."""

    axes: tuple[AxisNames, ...]

    def output_shape(self, *x: Shape) -> Shape:
        return x[0]

    def work_axes(self, *x: Shape) -> tuple[AxisNames, ...]:
        return self.axes

    def weights(self, *x: Shape) -> dict[str, Weight]:
        return {"scale": Weight((x[0][-1],), (self.axes[-1],), ("constant", 1.0))}

    def bind(self, place: Place) -> Op:
        return OwnerOp()


class OwnerOp:
    """Remembers its input."""

    def forward(self, x: Sequence[Array], w: Mapping[str, Array], y: Array, phase: Phase) -> None:
        self.x = x[0]
        np.multiply(self.x, w["scale"], out=y)

    def backward(self, dy: Array, w: Mapping[str, Array], dx: Sequence[Array | None], dw: Mapping[str, Array]) -> None:
        np.sum(dy * self.x, axis=tuple(range(dy.ndim - 1)), out=dw["scale"])
        if dx[0] is not None:
            np.multiply(dy, w["scale"], out=dx[0])


def samples(graph: Graph, plan: Plan, budget: int, precision: str) -> Iterator[Sample]:
    """One network for each layer of `graph` that differs from those before it in more than its name.

    None needs more than about `budget` bytes on one rank. Raises PlanError where a layer cannot be cut down to that.
    """
    alike: dict[tuple[object, ...], list[Node]] = {}
    for node in graph:
        if not isinstance(node.layer, Input):
            alike.setdefault(_kind(graph, plan, node), []).append(node)
    for node, *others in alike.values():
        yield _fit(graph, plan, node, budget, precision, tuple(other.name for other in others))


def _kind(graph: Graph, plan: Plan, node: Node) -> tuple[object, ...]:
    """Equal for layers that a single check covers."""
    producers = tuple((plan.partitions[name], _owner_axes(graph[name]), graph[name].layer) for name in node.inputs)
    owners = tuple((cut, axes, layer if isinstance(layer, Input) else None) for cut, axes, layer in producers)
    twice = tuple(node.inputs.index(name) for name in node.inputs)
    return node.layer, node.input_shapes, plan.partitions[node.name], owners, twice


def _owner_axes(node: Node) -> tuple[AxisNames, ...]:
    return node.layer.output_axes(*node.input_shapes)


# --- one network ---------------------------------------------------------------------------------------------------


def _build(graph: Graph, plan: Plan, node: Node, shapes: Sequence[Shape]) -> tuple[Graph, Plan]:
    """Inputs -> owners cut like the producers -> the layer -> loss, the last on one rank. Raises PlanError."""
    net, cuts = Graph(), {}
    for name, shape in zip(node.inputs, shapes, strict=True):
        if name in net.nodes:
            continue
        source, partition = graph[name], plan.partitions[name]
        if isinstance(source.layer, Input) and (source.layer.integer or isinstance(node.layer, Loss)):
            net.input(name, shape, source.layer.integer)
        else:
            net.add(name, Owner(_owner_axes(source)), net.input(f"{name} input", shape))
            cuts[f"{name} input"] = Partition()
        cuts[name] = partition
    cuts[node.name] = plan.partitions[node.name]
    net.add(node.name, node.layer, *node.inputs)
    if not plan.empty_blocks:
        require_blocks(net[node.name], cuts[node.name])  # empty ones would not be in the user's network
    if not isinstance(node.layer, Loss):
        target = net.input(f"target of {node.name}", net[node.name].shape)
        net.add(f"loss of {node.name}", MSE(), node.name, target)
        cuts |= {target: Partition(), f"loss of {node.name}": Partition()}
    return net, Plan(cuts, plan.allreduce, empty_blocks=True)


def _fit(graph: Graph, plan: Plan, node: Node, budget: int, precision: str, alike: tuple[str, ...]) -> Sample:
    shapes, full = node.input_shapes, node.input_shapes
    net, cuts = _build(graph, plan, node, shapes)
    while (need := _need(net, precision)) > budget:
        for smaller in _smaller(graph, plan, node, shapes):
            try:
                net, cuts = _build(graph, plan, node, smaller)
            except PlanError:  # too small for the layer: try another dim
                continue
            shapes = smaller
            break
        else:
            raise PlanError(
                f"layer {node.name}: on the smallest inputs that it can be checked on, "
                f"{' and '.join(map(str, shapes))}, it needs {mib(need)}; give --budget {-(-need // MIB)}"
            )
    return Sample(node.name, net, cuts, shapes, full, alike)


def _need(net: Graph, precision: str) -> int:
    """Bytes to run `net` on one rank."""
    alone = Plan({node.name: Partition() for node in net})
    return memory.predict(net, alone, [0], precision, backend="reference")[0].total


# --- smaller shapes ----------------------------------------------------------------------------------------------


def _smaller(graph: Graph, plan: Plan, node: Node, shapes: tuple[Shape, ...]) -> Iterator[tuple[Shape, ...]]:
    """`shapes` with one dim about halved, in all inputs that agree in it: the largest first, channels last."""
    leader = shapes[0]
    dims = sorted(range(len(leader) - 1), key=lambda d: -leader[d])
    for dim in [*dims, len(leader) - 1]:
        blocks = _blocks(graph, plan, node, dim)
        n = _reduced(leader[dim], blocks, max(2 * max(blocks), _reach(node.layer, leader, dim)))
        if n is not None:
            yield tuple(_with(shape, dim, leader[dim], n) for shape in shapes)


def _with(shape: Shape, dim: int, old: int, new: int) -> Shape:
    same = dim < len(shape) and shape[dim] == old
    return (*shape[:dim], new, *shape[dim + 1 :]) if same else shape


def _reduced(n: int, blocks: Sequence[int], least: int) -> int | None:
    """About n / 2, at least `least`, with as much as possible of the remainders of `n` by blocks and strides."""
    for modulus in (lcm(STRIDES, *blocks), lcm(2, *blocks), 2, 1):
        wanted = max(n // 2, least)
        m = wanted - (wanted - n) % modulus
        m = m if m >= max(least, wanted // 2) else m + modulus
        if 0 < m < n:
            return m
    return None


def _blocks(graph: Graph, plan: Plan, node: Node, dim: int) -> tuple[int, ...]:
    """Into how many blocks the layer cuts its work, and its producers their output, along `dim`."""
    work = node.layer.work_axes(*node.input_shapes)
    cuts = [(plan.partitions[node.name], work[dim])] if dim < len(work) else []
    for name in node.inputs:
        axes = _owner_axes(graph[name])
        cuts += [(plan.partitions[name], axes[dim])] if dim < len(axes) else []
    return tuple(chain((prod(partition[axis] for axis in names(axes)) for partition, axes in cuts), (1,)))


def _reach(layer: Layer, x: Shape, dim: int) -> int:
    """Extent of the input under a window along `dim`."""
    inside = 0 < dim < len(x) - 1
    return layer.windows(x)[dim - 1].reach if inside and isinstance(layer, Conv | MaxPool | AvgPool) else 1
