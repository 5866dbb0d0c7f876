"""Seconds of every pair of partitions of neighbouring groups: lower bounds, and exactly where a plan chose them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hpctrain.graph import Node
from hpctrain.planner.bounds import pair_bounds
from hpctrain.planner.groups import Group, as_partition, follow
from hpctrain.planner.layout import Edge, kind, useful
from hpctrain.planner.limits import moved_bytes
from hpctrain.planner.priced import priced
from hpctrain.planner.states import States
from hpctrain.regions import Distribution, Wanted, wanted


class Link(NamedTuple):
    """An edge between layers of two groups."""

    producer: str
    """Head of the group that `source` is in."""
    consumer: str
    """Head of the group that `reader` is in."""
    source: str
    reader: str
    slot: int


@dataclass
class Table:
    """Of all pairs of states of two groups: seconds, and whether these are exact."""

    seconds: np.ndarray
    exact: np.ndarray
    changes: int = 0
    """How often an entry was corrected."""


class Pairs:
    """Links between groups, and the tables of their seconds, of which links that are alike share one."""

    def __init__(self, states: States, groups: Sequence[Group], partitions: Mapping[str, np.ndarray]) -> None:
        """`partitions` (n, 6) are the states of each group, by its head."""
        self.states, self.graph = states, states.graph
        self.groups = {group.head: group for group in groups}
        self.partitions = partitions
        self.links = list(self._links())
        self._useful = useful(self.graph)
        self._tables: dict[Hashable, Table] = {}
        self._memory: dict[Hashable, np.ndarray] = {}
        self._have: dict[Hashable, Distribution] = {}
        self._want: dict[Hashable, Wanted] = {}
        self._of = {link: self._table(link) for link in self.links}

    def _links(self) -> list[Link]:
        head = {name: group.head for group in self.groups.values() for name in group.names}
        found = (
            Link(head[source], head[node.name], source, node.name, slot)
            for node in self.graph
            for slot, source in enumerate(node.inputs)
        )
        return [link for link in found if link.producer != link.consumer]

    def __getitem__(self, link: Link) -> tuple[Hashable, Table]:
        """(key, table) of a link."""
        return self._of[link]

    def tables(self, per_byte: float = 0.0) -> dict[tuple[str, str], list[tuple[Hashable, np.ndarray]]]:
        """All of them, as `eliminate.solve` takes them, with a price of the memory that exchanges need."""
        found: dict[tuple[str, str], list[tuple[Hashable, np.ndarray]]] = {}
        for link in self.links:
            key, table = self._of[link]
            paid = table.seconds if per_byte == 0 else table.seconds + np.float32(per_byte) * self.memory(link)
            found.setdefault((link.producer, link.consumer), []).append(((key, table.changes, per_byte), paid))
        return found

    def memory(self, link: Link) -> np.ndarray:
        """About how many bytes an exchange needs on rank 0, of each pair of states."""
        key, _ = self._of[link]
        if key not in self._memory:
            have, want = self._followed(link.producer, link.source), self._followed(link.consumer, link.reader)
            itemsize = kind(self.graph, link.source).dtype(self.states.setting.dtype).itemsize
            several = self.states.ranks > self.states.wire.per_host
            self._memory[key] = moved_bytes(self.graph[link.reader], link.slot, have, want, itemsize, several)
        return self._memory[key]

    # --- bounds --------------------------------------------------------------------------------------------------

    def _table(self, link: Link) -> tuple[Hashable, Table]:
        have, want = self._followed(link.producer, link.source), self._followed(link.consumer, link.reader)
        key = (self._signature(link), have.tobytes(), want.tobytes())
        if key not in self._tables:
            seconds = self._bounds(link, have, want)
            self._tables[key] = Table(seconds, np.zeros(seconds.shape, bool))
        return key, self._tables[key]

    def _followed(self, head: str, name: str) -> np.ndarray:
        return follow(self.graph, self.groups[head], name, self.partitions[head])

    def _signature(self, link: Link) -> Hashable:
        """What the seconds of a link depend on besides partitions."""
        source, reader = self.graph[link.source], self.graph[link.reader]
        layer, shapes = reader.layer, reader.input_shapes
        work = layer.work_shape(*shapes), layer.work_axes(*shapes), layer.needs(*shapes)[link.slot]
        output = source.shape, source.layer.output_axes(*source.input_shapes)
        return output, work, self._gradient(link), kind(self.graph, link.source)

    def _gradient(self, link: Link) -> bool:
        return link.source in self.states.varied and link.reader in self._useful

    def _bounds(self, link: Link, have: np.ndarray, want: np.ndarray) -> np.ndarray:
        source, reader, states = self.graph[link.source], self.graph[link.reader], self.states
        itemsize = kind(self.graph, link.source).dtype(states.setting.dtype).itemsize
        found = pair_bounds(
            source, have, reader, link.slot, want, self._gradient(link), itemsize, states.wire, states.ranks
        )
        return found * np.float32(states.setting.parts)

    # --- exactly -------------------------------------------------------------------------------------------------

    def price(self, link: Link, producer: int, consumer: int) -> bool:
        """Puts the exact seconds of a pair of states into its table; whether that changed it."""
        _, table = self._of[link]
        if table.exact[producer, consumer]:
            return False
        before = table.seconds[producer, consumer]
        table.seconds[producer, consumer] = self._exact(link, producer, consumer)
        table.exact[producer, consumer] = True
        changed = bool(table.seconds[producer, consumer] != before)
        table.changes += changed
        return changed

    def _exact(self, link: Link, producer: int, consumer: int) -> float:
        source, reader, states = self.graph[link.source], self.graph[link.reader], self.states
        have = self._followed(link.producer, link.source)[producer]
        want = self._followed(link.consumer, link.reader)[consumer]
        edge = Edge(
            link.reader,
            link.slot,
            self._owned(source, have),
            self._read(reader, link.slot, want),
            kind(self.graph, link.source),
            self._gradient(link),
        )
        moved, _ = priced(edge, states.setting.dtype, states.wire)
        return states.setting.parts * (moved.forward + moved.backward)

    def _owned(self, node: Node, row: np.ndarray) -> Distribution:
        key = (node.name, row.tobytes())
        if key not in self._have:
            self._have[key] = node.layer.output(as_partition(row), *node.input_shapes)
        return self._have[key]

    def _read(self, node: Node, slot: int, row: np.ndarray) -> Wanted:
        key = (node.name, slot, row.tobytes())
        if key not in self._want:
            layer, shapes = node.layer, node.input_shapes
            self._want[key] = wanted(layer.work(as_partition(row), *shapes), layer.needs(*shapes)[slot], shapes[slot])
        return self._want[key]
