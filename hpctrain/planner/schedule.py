"""In which order a rank runs the layers of a network: which of them run as one, and which run again in backward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isqrt

from hpctrain.graph import Graph, Node
from hpctrain.layers import Add, Input, LeakyReLU, ReLU
from hpctrain.layers.base import Tail
from hpctrain.planner.layout import Layout

Key = tuple[str, int | None]
"""An edge: input `slot` of a layer, or its partial sums (None)."""


@dataclass(frozen=True)
class Economy:
    """What an executor does to save time and memory; none of it changes what is computed, but for rounding.

    `fuse`: activations, and additions before them, run within the layer whose output they read. `reuse`: a tensor's
    memory is another's as soon as nobody needs it, so that only the last ones can be looked at after a step.
    `recompute`: into how many segments the network is cut, of which backward runs all but the last a second time, so
    that only what passes between segments is kept (Chen et al. 2016); 0 keeps what gradients need.
    """

    fuse: bool = False
    reuse: bool = False
    recompute: int = 0


KEEP = Economy()
"""Every tensor of a step stays until the next."""

LEAN = Economy(fuse=True, reuse=True)
"""What runs do unless they recompute."""


@dataclass(frozen=True)
class Unit:
    """Layers that run as one: the first computes, the others follow within it (`tail`)."""

    names: tuple[str, ...]
    inputs: tuple[Key, ...]
    """The edges of the first layer, then that of the tensor that is added."""
    tail: Tail | None = None

    @property
    def head(self) -> str:
        """The layer whose op it is."""
        return self.names[0]

    @property
    def name(self) -> str:
        """The layer whose output it makes."""
        return self.names[-1]


@dataclass(frozen=True)
class Schedule:
    """Units in forward order. Backward runs them in reverse order, and before that again those that `again` holds."""

    units: tuple[Unit, ...]
    segment: tuple[int, ...]
    """Of each unit, in which segment it lies."""
    again: frozenset[int]
    """Units whose output is not kept: backward makes it again when it comes to their segment."""

    def backward(self) -> Iterator[tuple[bool, int]]:
        """(whether it runs forward again, unit) in the order of the backward pass."""
        at = len(self.units)
        while at > 0:
            begin = self.segment.index(self.segment[at - 1])
            members = range(begin, at)
            if any(i in self.again for i in members):
                yield from ((True, i) for i in members)
            yield from ((False, i) for i in reversed(members))
            at = begin


def schedule(graph: Graph, places: Mapping[str, Layout], economy: Economy) -> Schedule:
    """The schedule of one step, the same on every rank."""
    found = tuple(_units(graph, places, economy.fuse))
    count = min(max(1, economy.recompute), len(found))
    segment = tuple(i * count // len(found) for i in range(len(found)))
    last = {unit.name: i for i, unit in enumerate(found)}
    crossing = {
        last[source]
        for i, unit in enumerate(found)
        for name, slot in unit.inputs
        if slot is not None and (source := graph[name].inputs[slot]) in last and segment[last[source]] != segment[i]
    }
    crossing |= {i for i, unit in enumerate(found) if not graph.consumers(unit.name)}
    again = (i for i in range(len(found)) if segment[i] < count - 1 and i not in crossing)
    return Schedule(found, segment, frozenset(again))


def segments_to_try(graph: Graph) -> list[int]:
    """Numbers of segments among which the best for memory lies: around the square root of the number of layers."""
    return list(range(2, 2 * isqrt(len(graph.nodes)) + 2))


def _units(graph: Graph, places: Mapping[str, Layout], fuse: bool) -> Iterator[Unit]:
    """Every layer that computes, in graph order; one that others follow within stands where the last of these does."""
    chains: dict[str, Unit] = {}
    taken: set[str] = set()
    for node in graph:
        if isinstance(node.layer, Input) or node.name in taken:
            continue
        unit = _followed(graph, places, node, taken) if fuse else _alone(node)
        chains[unit.name] = unit
        taken.update(unit.names)
    yield from (chains[node.name] for node in graph if node.name in chains)


def _alone(node: Node) -> Unit:
    return Unit((node.name,), tuple((node.name, slot) for slot in range(len(node.inputs))))


def _followed(graph: Graph, places: Mapping[str, Layout], head: Node, taken: set[str]) -> Unit:
    """`head` and what can run within it: an addition, if it takes one, and an activation."""
    unit, at = _alone(head), head
    if not head.layer.takes_tail or places[head.name].partial is not None:
        return unit
    names, inputs, adds, slope = list(unit.names), unit.inputs, False, 1.0
    follower = _only_consumer(graph, places, at)
    if head.layer.takes_addend and follower is not None and isinstance(follower[0].layer, Add):
        node, slot = follower
        if len(node.inputs) == 2 and node.name not in taken:
            names, inputs, adds, at = [*names, node.name], (*inputs, (node.name, 1 - slot)), True, node
            follower = _only_consumer(graph, places, at)
    if follower is not None and (found := _slope(follower[0])) is not None:
        names, slope = [*names, follower[0].name], found
    if len(names) == 1:
        return unit
    return Unit(tuple(names), inputs, Tail(adds, slope))


def _slope(node: Node) -> float | None:
    """The slope below 0 of an activation whose output tells the sign of its input; None for other layers."""
    if isinstance(node.layer, ReLU):
        return 0.0
    if isinstance(node.layer, LeakyReLU) and 0 <= node.layer.slope <= 1:
        return node.layer.slope
    return None


def _only_consumer(graph: Graph, places: Mapping[str, Layout], node: Node) -> tuple[Node, int] | None:
    """What alone reads the output of `node`, and on every rank just the block that this rank makes."""
    users = graph.consumers(node.name)
    if len(users) != 1:
        return None
    ((user, slot),) = users
    have, want = places[node.name].output, places[user.name].inputs[slot]
    return (user, slot) if have.partition == want.partition and have.cuts == want.cuts else None
