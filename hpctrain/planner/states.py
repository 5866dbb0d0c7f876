"""Seconds and bytes of every partition of every group of layers, whatever the partitions of others."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from hpctrain.graph import Graph, Node
from hpctrain.layers import Input
from hpctrain.machine import numbered
from hpctrain.partition import AXES, AxisNames, Partition, names
from hpctrain.planner.compute import Pricer, kernel_key
from hpctrain.planner.cost import FLOAT64, at_once
from hpctrain.planner.groups import Group, as_partition, follow
from hpctrain.planner.layout import Edge, differentiable, kind, layout, layouts
from hpctrain.planner.plan import Plan
from hpctrain.planner.priced import priced
from hpctrain.planner.schedule import Unit, schedule
from hpctrain.planner.setting import Setting
from hpctrain.planner.sums import allreduce_seconds, statistics_seconds
from hpctrain.planner.wire import Wire
from hpctrain.precision import exact


@dataclass
class Costs:
    """Of each partition of a group: seconds of a step, and whether partial sums are in them exactly or at least."""

    seconds: np.ndarray
    partial: np.ndarray
    """What partial sums take of these seconds."""
    exact: np.ndarray
    sums: np.ndarray
    """What sums of gradients take of these seconds."""
    changes: int = 0
    """How often an entry was corrected."""


class States:
    """Prices groups of one graph; what is alike is priced once."""

    def __init__(self, graph: Graph, setting: Setting, ranks: int) -> None:
        self.graph, self.setting, self.ranks = graph, setting, ranks
        self.hosts = np.array(setting.machine.layout(ranks))
        self.wire = Wire.of(setting, ranks)
        self.pricer = Pricer(setting, graph, at_once(setting, ranks))
        self.varied = differentiable(graph)
        self._signatures: dict[str, Hashable] = {}
        self._found: dict[Hashable, Costs] = {}
        self._sets: dict[Hashable, _Together] = {}
        self._distinct: dict[_Set, _Together] = {}
        self._whole = sum(int(np.prod(w.shape)) for _, _, w in graph.weights()) * exact(setting.dtype).itemsize

    @cached_property
    def units(self) -> dict[str, Unit]:
        """By their first layer, the units that run where no exchange is due within a group."""
        places = layouts(self.graph, Plan({node.name: Partition() for node in self.graph}))
        return {unit.head: unit for unit in schedule(self.graph, places, self.setting.economy).units}

    def costs(self, group: Group, partitions: np.ndarray) -> tuple[Hashable, Costs]:
        """(key, those of `partitions` (n, 6) of the group's head), the same object for groups that are alike."""
        key = (self._signature(group), partitions.tobytes())
        if key not in self._found:
            self._found[key] = self._costs(group, partitions)
        return key, self._found[key]

    def price(self, group: Group, partitions: np.ndarray, state: int) -> bool:
        """Puts the exact seconds of the partial sums of a state into its costs; whether that changed them."""
        _, costs = self.costs(group, partitions)
        if costs.exact[state]:
            return False
        costs.exact[state] = True
        exact_seconds = self._exactly(group, partitions[state])
        changed = abs(exact_seconds - costs.partial[state]) > 1e-6 * exact_seconds
        costs.seconds[state] += exact_seconds - costs.partial[state]
        costs.partial[state] = exact_seconds
        costs.changes += changed
        return bool(changed)

    def _signature(self, group: Group) -> Hashable:
        """What tells groups from others that cost something else."""
        if group.head not in self._signatures:
            self._signatures[group.head] = tuple(self._said(group))
        return self._signatures[group.head]

    def _said(self, group: Group) -> Iterator[Hashable]:
        for name in group.names:
            node = self.graph[name]
            unit, gradient = self.units.get(name), name in self.varied
            said = unit and kernel_key(self.graph, unit, self.varied, self.setting.precision, self.setting.backend)
            yield repr(node.layer), node.input_shapes, gradient, said, kind(self.graph, name)

    def _costs(self, group: Group, partitions: np.ndarray) -> Costs:
        parts, machine = self.setting.parts, self.setting.machine
        full = exact(self.setting.dtype).itemsize
        seconds, sums = np.zeros(len(partitions)), np.zeros(len(partitions))
        for name in group.names:
            node, own = self.graph[name], follow(self.graph, group, name, partitions)
            weights, mine = self._weights(node, own)
            sums += mine
            seconds += mine + weights * full * machine.update + parts * self._statistics(node, own)
            if isinstance(node.layer, Input) and machine.storage is not None:
                seconds += parts * block(node.shape, node.layer.work_axes(), own).prod(1) * full / machine.storage.read
        head = self.graph[group.head]
        several = partitions[:, self._summed(head)].prod(1) > 1
        partial = np.zeros(len(partitions))
        partial[several] = parts * self._partial(head, partitions[several])
        seconds += parts * self._compute(group, partitions, several) + partial
        return Costs(seconds, partial, ~several, sums)

    # --- computing -----------------------------------------------------------------------------------------------

    def _compute(self, group: Group, partitions: np.ndarray, partial: np.ndarray) -> np.ndarray:
        """Of all units; where there are partial sums, nothing runs within the head."""
        seconds = np.zeros(len(partitions))
        for name in group.names:
            unit = self.units.get(name)
            if unit is None:
                continue
            own = follow(self.graph, group, name, partitions)
            if name != group.head or len(unit.names) == 1:
                seconds += self._of_unit(unit, own)
                continue
            seconds[~partial] += self._of_unit(unit, own[~partial])
            for each in unit.names if partial.any() else ():
                alone = Unit((each,), tuple((each, slot) for slot in range(len(self.graph[each].inputs))))
                seconds[partial] += self._of_unit(alone, follow(self.graph, group, each, partitions)[partial])
        return seconds

    def _of_unit(self, unit: Unit, partitions: np.ndarray) -> np.ndarray:
        if not len(partitions):
            return np.zeros(0)
        node = self.graph[unit.head]
        shape, axes = node.layer.work_shape(*node.input_shapes), node.layer.work_axes(*node.input_shapes)
        return self.pricer.seconds(unit, block(shape, axes, partitions)).sum(1)

    # --- what ranks do together ----------------------------------------------------------------------------------

    def _weights(self, node: Node, partitions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(weights on rank 0, seconds of summing their gradients at the rate of a full bucket)."""
        count, seconds = np.zeros(len(partitions)), np.zeros(len(partitions))
        for weight in node.layer.weights(*node.input_shapes).values():
            mine = block(weight.shape, weight.axes, partitions).prod(1)
            named = {axis for axes in weight.axes for axis in names(axes)}
            rates = [self._together(row, named, False).rate for row in partitions]
            count += mine
            seconds += mine * exact(self.setting.dtype).itemsize * rates
        return count, seconds

    def _statistics(self, node: Node, partitions: np.ndarray) -> np.ndarray:
        """Of norms, as `cost` counts it."""
        axes = set(node.layer.reduce_axes(*node.input_shapes))
        if not axes:
            return np.zeros(len(partitions))
        channels = block(node.shape, node.layer.output_axes(*node.input_shapes), partitions)[:, -1] * FLOAT64
        together = [self._together(row, axes, True) for row in partitions]
        first, each = np.array([t.statistics for t in together]).T
        return np.asarray(first + each * channels)

    def _together(self, row: np.ndarray, axes: set[str], along: bool) -> _Together:
        """What ranks take that differ in their coordinates `along` these axes, or along all others."""
        mine = tuple((axis in axes) == along for axis in AXES)
        key = (row.tobytes(), mine)
        if key not in self._sets:
            found = _set_of(row, mine, self.hosts)
            if found not in self._distinct:
                self._distinct[found] = self._of_set(found)
            self._sets[key] = self._distinct[found]
        return self._sets[key]

    def _of_set(self, ranks: _Set) -> _Together:
        several = overlaps(self.setting, self.hosts.tolist())
        size = max(1, min(self.setting.bucket_bytes, self._whole) if several else self._whole)
        rate = allreduce_seconds(size, ranks.hosts, self.setting, ranks.crowd) / size
        if len(ranks.hosts) == 1:
            return _Together(rate, (0.0, 0.0))
        gathers = [sum(statistics_seconds(k * n, ranks.hosts, self.setting) for k in (3, 2)) for n in (0, MANY)]
        return _Together(rate, (gathers[0], (gathers[1] - gathers[0]) / MANY))

    # --- partial sums --------------------------------------------------------------------------------------------

    def _summed(self, node: Node) -> list[int]:
        """Axes, by number, that cut a layer's work but not what it makes: ranks along them make parts of the same."""
        layer, shapes = node.layer, node.input_shapes
        followed = {d for along in layer.produces(*shapes) if along is not None for d in along.dims}
        axes = enumerate(layer.work_axes(*shapes))
        return [AXES.index(a) for d, cut in axes if d not in followed for a in names(cut)]

    def _partial(self, node: Node, partitions: np.ndarray) -> np.ndarray:
        """What the exchange of partial sums takes rank 0, which has the longest block; of halves in runs nothing."""
        summed, axes = self._summed(node), node.layer.output_axes(*node.input_shapes)
        peers = np.array([_peers(row, summed, self.wire.per_host) for row in partitions]).reshape(-1, 2)
        itemsize = kind(self.graph, node.name).dtype(self.setting.dtype).itemsize
        longest = block(node.shape, axes, partitions).prod(1) * itemsize
        shortest = block(node.shape, axes, partitions, longest=False).prod(1) * itemsize
        # forward an owner adds up what the others made of its block, backward it reads the blocks of the others
        peers = peers * (shortest > 0)[:, None]
        seconds = self._messages(peers, longest)
        return seconds + self._messages(peers, shortest) if node.name in self.varied else seconds

    def _messages(self, peers: np.ndarray, nbytes: np.ndarray) -> np.ndarray:
        """Seconds of a rank that receives so much of each peer, (n, 2) near and far."""
        wire, (near, far) = self.wire, peers.T
        handshakes = near > 0 if wire.copies else near
        first = wire.near_alpha * handshakes + wire.near_beta * near * nbytes
        return np.asarray(first + wire.far_alpha * far + wire.far_beta * far * nbytes)

    def _exactly(self, group: Group, row: np.ndarray) -> float:
        """Seconds of the exchange of partial sums."""
        node = self.graph[group.head]
        place = layout(node, as_partition(row))
        if place.partial is None:
            return 0.0
        gradient = node.name in self.varied
        edge = Edge(node.name, None, place.output, place.partial, kind(self.graph, node.name), gradient)
        moved, _ = priced(edge, self.setting.dtype, self.wire)
        return self.setting.parts * (moved.forward + moved.backward)


def overlaps(setting: Setting, hosts: Sequence[int]) -> bool:
    """Whether gradients are summed while backward goes on."""
    return hosts[-1] > hosts[0] if setting.overlap is None else setting.overlap


def block(shape: Sequence[int], axes: Sequence[AxisNames], partitions: np.ndarray, longest: bool = True) -> np.ndarray:
    """Extents (n, dims) of the longest block of a tensor, which rank 0 has, or of the shortest."""
    found = np.tile(np.array(shape, np.int64), (len(partitions), 1))
    for d, cut in enumerate(axes):
        for axis in names(cut):
            blocks = partitions[:, AXES.index(axis)]
            found[:, d] = -(-found[:, d] // blocks) if longest else found[:, d] // blocks
    return found


def _peers(row: np.ndarray, axes: Sequence[int], per_host: int) -> tuple[int, int]:
    """(others on its host, on other hosts) that differ from rank 0 in their coordinates along these axes."""
    offsets = np.zeros(1, np.int64)
    for i in sorted(axes):
        offsets = (offsets[:, None] + np.arange(row[i]) * int(row[i + 1 :].prod())).ravel()
    near = int((offsets < per_host).sum())
    return near - 1, len(offsets) - near


MANY = 2**20
"""Bytes of statistics: what gathering takes is a line over them."""


class _Together(NamedTuple):
    """What ranks take together."""

    rate: float
    """Seconds per byte of gradient, where a full bucket is summed, or all at once where backward has ended."""
    statistics: tuple[float, float]
    """Seconds of a norm, and per byte of one number of each of its channels."""


class _Set(NamedTuple):
    """Ranks that sum or gather together: their hosts, and how many such sets share a host's links."""

    hosts: tuple[int, ...]
    crowd: int


def _set_of(row: np.ndarray, mine: Sequence[bool], hosts: np.ndarray) -> _Set:
    """Of the sets of ranks of a partition that differ along the axes that are `mine`, the one on the most hosts."""
    offsets, firsts = np.zeros(1, np.int64), np.zeros(1, np.int64)
    stride = int(row.prod())
    for parts, own in zip(row.tolist(), mine, strict=True):
        stride //= parts
        steps = np.arange(parts) * stride
        if own:
            offsets = (offsets[:, None] + steps).ravel()
        else:
            firsts = (firsts[:, None] + steps).ravel()
    found = hosts[firsts[:, None] + offsets]
    counts = 1 + (np.diff(found, axis=1) > 0).sum(1)  # hosts hold consecutive ranks
    best = found[counts.argmax()]
    if counts.max() == 1:
        return _Set((0,) * len(best), 1)
    here = int((best == best[0]).sum())
    there = int((hosts[: int(row.prod())] == best[0]).sum())
    return _Set(numbered(best.tolist()), -(-there // here))
