"""What a step of training takes by a plan: computing, exchanging, summing gradients, counted as the executor does it.

Every figure is that of the slowest rank, and phases follow one another: an exchange makes all ranks wait for it. Only
sums of gradients may run while backward goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from hpctrain.graph import Graph
from hpctrain.layers import Input
from hpctrain.partition import AXES, extent, volume
from hpctrain.planner.compute import Pricer
from hpctrain.planner.layout import Layout, edges, layouts
from hpctrain.planner.plan import Group, Plan
from hpctrain.planner.priced import priced
from hpctrain.planner.schedule import schedule
from hpctrain.planner.seconds import LayerCost, PlanCost
from hpctrain.planner.setting import Setting
from hpctrain.planner.sums import allreduce_seconds, members, statistics_seconds
from hpctrain.planner.weights import Weights, weights
from hpctrain.planner.wire import Wire
from hpctrain.precision import exact

__all__ = ["LayerCost", "PlanCost", "at_once", "price"]

FLOAT64 = 8


def price(
    graph: Graph, plan: Plan, setting: Setting, ranks: int | None = None, pricer: Pricer | None = None
) -> PlanCost:
    """What a step by `plan` takes on so many ranks, those that it uses where None.

    `graph` is for a part of a batch. `pricer` may be one made before for the same graph, setting and ranks.
    """
    return _Pricing(graph, plan, setting, ranks or plan.ranks, pricer).run()


def at_once(setting: Setting, ranks: int) -> int:
    """Ranks of a host that compute at the same time."""
    return min(ranks, setting.machine.per_host or ranks)


class _Pricing:
    def __init__(self, graph: Graph, plan: Plan, setting: Setting, ranks: int, pricer: Pricer | None) -> None:
        self.graph, self.plan, self.setting, self.ranks = graph, plan, setting, ranks
        self.hosts = setting.machine.layout(ranks)
        self.pricer = pricer or Pricer(setting, graph, at_once(setting, ranks))
        self.places = layouts(graph, plan)
        self.order = schedule(graph, self.places, setting.economy)
        self.passes = [(again, self.order.units[i]) for again, i in self.order.backward()]
        """(whether it runs forward again, unit) in the order of backward."""
        self.again = {self.order.units[i].head for i in self.order.again}
        self.rows = {name: _Row(again=name in self.again) for name in self.places}

    def run(self) -> PlanCost:
        self._compute()
        self._exchange()
        for name, place in self.places.items():
            self.rows[name].statistics = self._statistics(place)
        sums = self._sums()
        parts, machine = self.setting.parts, self.setting.machine
        return PlanCost(
            tuple(self._layer(name, place) for name, place in self.places.items()),
            self.ranks,
            parts,
            allreduce=sum(s.seconds for s in sums),
            hidden=self._hidden(sums) if self._overlaps() else 0.0,
            update=self._held().updated * exact(self.setting.dtype).itemsize * machine.update,
            input=0.0 if machine.storage is None else parts * self._input_bytes() / machine.storage.read,
            step=machine.step,
            checkpoint=self._checkpoint(),
        )

    def _compute(self) -> None:
        for unit in self.order.units:
            work = extent(self.places[unit.head].work.box(0))
            ((forward, backward),) = self.pricer.seconds(unit, np.array([work])).tolist()
            row = self.rows[unit.head]
            row.forward += forward
            row.backward += backward + forward * row.again

    def _exchange(self) -> None:
        """Edges between units; within one, nothing moves."""
        wire = Wire.of(self.setting, self.ranks)
        found = {(edge.consumer, edge.slot): edge for edge in edges(self.graph, self.plan, self.places)}
        forward_again = {key for again, unit in self.passes if again for key in unit.inputs}
        for unit in self.order.units:
            for key in (*unit.inputs, (unit.head, None)):
                if (edge := found.get(key)) is None:
                    continue
                row = self.rows[unit.head]
                moved, halo = priced(edge, self.setting.dtype, wire)
                times = 1 + (key in forward_again or (key[1] is None and row.again))
                row.halo[FORWARD] += moved.forward * halo
                row.redistribution[FORWARD] += moved.forward * (not halo)
                row.halo[BACKWARD] += (moved.backward + moved.forward * (times - 1)) * halo
                row.redistribution[BACKWARD] += (moved.backward + moved.forward * (times - 1)) * (not halo)
                row.sent += moved.sent_forward * times + moved.sent_backward

    def _statistics(self, place: Layout) -> float:
        """Of norms whose samples or positions are cut: three numbers of a channel forward, two backward."""
        node, partition = place.node, place.partition
        axes = tuple(a for a in AXES if a in node.layer.reduce_axes(*node.input_shapes) and partition[a] > 1)
        if not axes:
            return 0.0
        hosts, _ = members((partition, axes), self.hosts)
        channels = extent(place.output.box(0))[-1] * FLOAT64
        return sum(statistics_seconds(numbers * channels, hosts, self.setting) for numbers in (3, 2))

    def _sums(self) -> list[_Sum]:
        """The buckets of all groups, in the order in which backward completes them; fills in the layers' shares."""
        dtype, sizes = exact(self.setting.dtype), dict[Group, dict[str, int]]()
        for name, place in self.places.items():
            for dist in place.weights.values():
                group = dist.partition, dist.replicated_axes
                if dist.replicated_axes:
                    mine = sizes.setdefault(group, {})
                    mine[name] = mine.get(name, 0) + volume(dist.box(0)) * dtype.itemsize
        found = []
        for group, layers in sizes.items():
            hosts, crowd = members(group, self.hosts)
            for bucket in self._buckets(layers):
                nbytes = sum(bucket.values())
                seconds = allreduce_seconds(nbytes, hosts, self.setting, crowd, self.plan.algorithm(group))
                for name, part in bucket.items():
                    self.rows[name].allreduce += seconds * part / nbytes
                found.append(_Sum(min(map(self._position, bucket)), seconds))
        return sorted(found, key=lambda s: -s.after)

    def _buckets(self, layers: Mapping[str, int]) -> list[dict[str, int]]:
        """As gradients.buckets: neighbours in the order of forward; all in one where sums do not overlap backward."""
        if not self._overlaps():
            return [dict(layers)]
        found: list[dict[str, int]] = []
        for name, nbytes in layers.items():
            if found and sum(found[-1].values()) < self.setting.bucket_bytes:
                found[-1][name] = nbytes
            else:
                found.append({name: nbytes})
        return found

    def _position(self, name: str) -> int:
        return next(i for i, unit in enumerate(self.order.units) if name in unit.names)

    def _overlaps(self) -> bool:
        asked = self.setting.overlap
        return len(set(self.hosts)) > 1 if asked is None else asked

    def _hidden(self, sums: list[_Sum]) -> float:
        """Seconds of sums that pass while backward goes on: one by one, each from when its bucket is complete."""
        ended, now = dict[int, float](), 0.0
        position = {unit.head: i for i, unit in enumerate(self.order.units)}
        for again, unit in self.passes:
            if not again:
                row = self.rows[unit.head]
                now += row.backward + row.halo[BACKWARD] + row.redistribution[BACKWARD]
                ended[position[unit.head]] = now
        done = 0.0
        for each in sums:
            done = max(done, ended[each.after]) + each.seconds
        return sum(s.seconds for s in sums) - max(0.0, done - now)

    def _held(self) -> Weights:
        return weights(self.places, 0, self.hosts, self.setting.shard, self.setting.share_weights)

    def _checkpoint(self) -> float:
        """Of rank 0, the first replica of all that it holds: it writes weights and what the optimizer keeps of them."""
        setting, storage = self.setting, self.setting.machine.storage
        if storage is None or not setting.save_every:
            return 0.0
        held = self._held()
        numbers = held.used + setting.optimizer_arrays * held.updated
        return numbers * exact(setting.dtype).itemsize / storage.write / setting.save_every

    def _input_bytes(self) -> int:
        inputs = [place for place in self.places.values() if isinstance(place.node.layer, Input)]
        return sum(volume(place.output.box(0)) for place in inputs) * exact(self.setting.dtype).itemsize

    def _layer(self, name: str, place: Layout) -> LayerCost:
        row, itemsize = self.rows[name], self.setting.dtype.itemsize
        numbers = sum(volume(dist.box(0)) for dist in place.weights.values())
        return LayerCost(
            name,
            type(place.node.layer).__name__,
            place.partition,
            row.forward,
            row.backward,
            row.halo[FORWARD],
            row.halo[BACKWARD],
            row.redistribution[FORWARD],
            row.redistribution[BACKWARD],
            row.statistics,
            row.allreduce,
            volume(place.output.box(0)) * itemsize + 2 * numbers * exact(self.setting.dtype).itemsize,
            row.sent,
        )


FORWARD, BACKWARD = range(2)


@dataclass
class _Row:
    """A layer's figures while they are collected."""

    again: bool
    forward: float = 0.0
    backward: float = 0.0
    halo: list[float] = field(default_factory=lambda: [0.0, 0.0])
    redistribution: list[float] = field(default_factory=lambda: [0.0, 0.0])
    statistics: float = 0.0
    allreduce: float = 0.0
    sent: int = 0


class _Sum(NamedTuple):
    """A bucket."""

    after: int
    """The unit whose backward completes it."""
    seconds: float
