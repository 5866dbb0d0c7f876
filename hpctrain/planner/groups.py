"""Layers that share one partition, and the partitions that they may have: the states that the search chooses among.

A group is a layer and those that follow it element by element and alone read it: normalization, activation, dropout,
an addition. The search never cuts these in another way than what they follow, though a plan may: it would move a
tensor to compute the same, which pays only where a normalization has to gather statistics over very many ranks.

On up to ALL ranks, candidates are all partitions without empty blocks. On more, at most three of batch, positions,
channels and contraction are cut, and positions along each choice of their axes as evenly as their extents allow.
Partitions that leave the output of a sum over cut channels in other blocks than those that followers have are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import numpy as np

from hpctrain.errors import PlanError
from hpctrain.graph import Graph, Node
from hpctrain.layers import AdaptiveAvgPool, AvgPool, GlobalAvgPool, Input, Loss, MaxPool
from hpctrain.layers.base import SPATIAL
from hpctrain.partition import AXES, Partition, names, split
from hpctrain.planner.plan import work_dims
from hpctrain.planner.setting import Setting
from hpctrain.regions import Along, Distribution

ALL = 64
"""Ranks up to which all partitions are candidates."""

KINDS_AT_ONCE = 3
"""Of batch, positions, channels and contraction, how many are cut together on more ranks."""


class Group(NamedTuple):
    """Layers that share a partition, in graph order."""

    head: str
    """The first: its partition is the group's, the others have that of its output."""
    names: tuple[str, ...]


def groups(graph: Graph) -> list[Group]:
    """The groups of all layers and inputs, in the order of their heads."""
    users = readers(graph)
    leaders: dict[str, str] = {}
    members: dict[str, list[str]] = {}
    for node in graph:
        able = [
            source
            for slot, source in enumerate(node.inputs)
            if len(users[source]) == 1 and _elementwise(node, slot) and _adjacent(graph[leaders[source]])
        ]
        leader = min(able, key=lambda source: _rank(graph[source]), default=None)
        leaders[node.name] = node.name if leader is None else leaders[leader]
        members.setdefault(leaders[node.name], []).append(node.name)
    return [Group(head, tuple(found)) for head, found in members.items()]


def readers(graph: Graph) -> dict[str, list[Node]]:
    """Of each layer, those that read it, once for every use."""
    found: dict[str, list[Node]] = {node.name: [] for node in graph}
    for node in graph:
        for source in node.inputs:
            found[source].append(node)
    return found


def _rank(node: Node) -> tuple[bool, bool]:
    """An addition runs within what takes an addend; the first of them, as in `schedule`."""
    return not node.layer.takes_addend, isinstance(node.layer, Input)


def _elementwise(node: Node, slot: int) -> bool:
    """Whether a layer makes of each element of input `slot` the one in the same place, and may be cut as that is."""
    layer, shapes = node.layer, node.input_shapes
    if isinstance(layer, Loss):
        return False
    same = tuple(Along(d) for d in range(len(node.shape)))
    axes = layer.work_axes(*shapes)
    return (
        shapes[slot] == node.shape == layer.work_shape(*shapes)
        and layer.needs(*shapes)[slot] == layer.produces(*shapes) == same
        and axes == layer.output_axes(*shapes)
        and all(len(names(a)) == 1 for a in axes)
    )


def _adjacent(head: Node) -> bool:
    """Whether axes that cut a dim of the output together are neighbours on the grid, in its order: then one does."""
    order = [axis for axis in AXES if axis in {a for _, axes in work_dims(head) for a in axes}]
    return all(
        [order.index(axis) for axis in cut] == list(range(order.index(cut[0]), order.index(cut[0]) + len(cut)))
        for cut in map(names, head.layer.output_axes(*head.input_shapes))
        if len(cut) > 1
    )


def follow(graph: Graph, group: Group, name: str, partitions: np.ndarray) -> np.ndarray:
    """The partitions (n, 6) of layer `name` where those of its group's head are `partitions`."""
    head, node = graph[group.head], graph[name]
    if name == group.head:
        return partitions
    found = np.ones_like(partitions)
    output = head.layer.output_axes(*head.input_shapes)
    for axes, cut in zip(node.layer.work_axes(*node.input_shapes), output, strict=True):
        (axis,) = names(axes)
        found[:, AXES.index(axis)] = partitions[:, [AXES.index(a) for a in names(cut)]].prod(1)
    return found


def as_partition(row: np.ndarray) -> Partition:
    """A row of candidates."""
    return Partition(*(int(n) for n in row))


# --- candidates ------------------------------------------------------------------------------------------------------

Dims = tuple[tuple[int, tuple[str, ...]], ...]
"""(extent, axes that cut it): so many blocks at most."""


def candidates(graph: Graph, group: Group, ranks: int, setting: Setting) -> np.ndarray:
    """The partitions (n, 6) of the group's head, by AXES, of which no layer of the group has an empty block.

    On all `ranks`, or as many as work; where the setting allows fewer, also on divisors of `ranks` and powers of two.
    Raises PlanError where plan.only leaves none.
    """
    node = graph[group.head]
    dims = list(work_dims(node))
    if len(group.names) > 1:
        cuts = map(names, node.layer.output_axes(*node.input_shapes))
        dims += [(n, cut) for n, cut in zip(node.shape, cuts, strict=True) if cut]
    kind = type(node.layer).__name__
    axes = {axis for _, cut in dims for axis in cut} & set(setting.only.get(kind, AXES))
    limits = tuple((n, tuple(a for a in cut if a in axes)) for n, cut in dims)
    found = _of_sizes(limits, _sizes(limits, ranks, _may_have_fewer(graph, group, setting)), ranks)
    if len(group.names) > 1:
        found = found[_alike(node, found)]
    if not len(found):
        raise PlanError(
            f"layer {node.name} ({kind}): no partition along {', '.join(sorted(axes, key=AXES.index)) or 'no axis'} "
            f'suits {ranks} ranks; give plan.only more axes for {kind}, or set plan.fewer = "all"'
        )
    return found


def _may_have_fewer(graph: Graph, group: Group, setting: Setting) -> bool:
    return setting.fewer == "all" or (setting.fewer == "head" and group.head in head_layers(graph))


def head_layers(graph: Graph) -> frozenset[str]:
    """What stands behind the last position: layers of vectors, the pooling before them, losses and their targets."""
    return _head_layers(graph, len(graph.nodes))


@lru_cache(maxsize=4)
def _head_layers(graph: Graph, count: int) -> frozenset[str]:
    """Of a graph while it has `count` layers."""
    found = {n.name for n in graph if isinstance(n.layer, Loss) or (n.inputs and len(n.shape) <= 2)}
    users = readers(graph)
    for node in reversed(list(graph)):
        if users[node.name] and all(user.name in found for user in users[node.name]):
            pooling = isinstance(node.layer, MaxPool | AvgPool | AdaptiveAvgPool | GlobalAvgPool)
            target = isinstance(node.layer, Input) and all(isinstance(user.layer, Loss) for user in users[node.name])
            if pooling or target:
                found.add(node.name)
    return frozenset(found)


def _sizes(limits: Dims, ranks: int, fewer: bool) -> tuple[int, ...]:
    """Numbers of ranks to cut over: all, or the most that work and the most that divide them; and fewer, if allowed."""
    sizes = [n for n in range(ranks, 0, -1) if ranks % n == 0 or n & (n - 1) == 0]
    if fewer:
        return tuple(sizes)
    room = min(ranks, prod(n for n, cut in limits if cut)) if any(cut for _, cut in limits) else 1
    most = next(n for n in range(room, 0, -1) if len(_of_size(limits, n, ranks > ALL)))
    divisor = next(n for n in sizes if ranks % n == 0 and len(_of_size(limits, n, ranks > ALL)))
    return (most,) if most == ranks else tuple(dict.fromkeys((most, divisor)))


def _of_sizes(limits: Dims, sizes: Sequence[int], ranks: int) -> np.ndarray:
    return np.concatenate([_of_size(limits, size, ranks > ALL) for size in sizes])


@lru_cache(maxsize=4096)
def _of_size(limits: Dims, size: int, selected: bool) -> np.ndarray:
    """All partitions (n, 6) into `size` blocks within the limits; where `selected`, those that the module names."""
    axes = [axis for axis in AXES if any(axis in cut for _, cut in limits)]
    most = {axis: min(n for n, cut in limits if axis in cut) for axis in axes}
    rows = list(factorizations(size, [most[axis] for axis in axes]))
    parts = np.ones((len(rows), len(AXES)), np.int32)
    if rows and axes:
        parts[:, [AXES.index(axis) for axis in axes]] = rows
    for n, cut in limits:
        parts = parts[parts[:, [AXES.index(axis) for axis in cut]].prod(1) <= n]
    return _selected(parts, most) if selected else parts


def factorizations(size: int, most: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every way to write `size` as a product of one number up to each of `most`."""
    if not most:
        if size == 1:
            yield ()
        return
    for n in range(1, min(size, most[0]) + 1):
        if size % n == 0 and size // n <= prod(most[1:]):
            yield from ((n, *rest) for rest in factorizations(size // n, most[1:]))


def _selected(parts: np.ndarray, most: Mapping[str, int]) -> np.ndarray:
    """Those with few kinds of axes cut, and the positions evenly."""
    positions = [AXES.index(axis) for axis in SPATIAL]
    others = [i for i in range(len(AXES)) if i not in positions]
    kinds = (parts[:, others] > 1).sum(1) + (parts[:, positions] > 1).any(1)
    parts = parts[kinds <= KINDS_AT_ONCE]
    extents = np.array([most.get(axis, 1) for axis in SPATIAL])
    border = (parts[:, positions] / extents).sum(1)  # in proportion to the elements at the edges of a block
    best: dict[tuple[int, ...], int] = {}
    for i, row in enumerate(parts):
        cut = tuple(int(row[j] > 1) for j in positions)
        key = (*(int(row[j]) for j in others), *cut)
        if key not in best or border[i] < border[best[key]]:
            best[key] = i
    return parts[sorted(best.values())]


def _alike(head: Node, parts: np.ndarray) -> np.ndarray:
    """Which partitions leave output in the blocks that an axis of its own cuts it into: followers then have these."""
    same = np.ones(len(parts), bool)
    for n, cut in zip(head.shape, map(names, head.layer.output_axes(*head.input_shapes)), strict=True):
        if len(cut) > 1:
            columns = parts[:, [AXES.index(axis) for axis in cut]]
            same &= [_cuts_evenly(n, tuple(row)) for row in columns.tolist()]
    return same


@lru_cache(maxsize=65536)
def _cuts_evenly(n: int, parts: tuple[int, ...]) -> bool:
    """Whether n elements in blocks, each again in blocks, are what as many balanced blocks are."""
    blocks = prod(parts)
    if n % blocks == 0 or sum(count > 1 for count in parts) < 2:
        return True
    axes = AXES[: len(parts)]
    (nested,) = Distribution((n,), (axes,), Partition.of(dict(zip(axes, parts, strict=True)))).cuts
    return nested.intervals == tuple(split(n, blocks, i) for i in range(blocks))


def chosen(graph: Graph, found: Sequence[Group], partitions: Mapping[str, np.ndarray]) -> dict[str, Partition]:
    """The partition of every layer, in graph order, where those of the groups' heads are rows `partitions`."""
    of = {
        name: as_partition(follow(graph, group, name, partitions[group.head][None])[0])
        for group in found
        for name in group.names
    }
    return {node.name: of[node.name] for node in graph}
