"""Which arrays a rank needs between layers, who shares one, and from when to when each is needed.

An edge of the network has four arrays (comm/exchange.py). Where a rank wants all that it has (halo, padding), what the
producer writes is the interior of what the consumer reads; one such array serves several consumers where it can.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpctrain.graph import Graph
from hpctrain.layers import Add, Input, Loss
from hpctrain.partition import Box, contains, extent, volume, within
from hpctrain.planner.arena import Buffers, EdgeViews, Span, View
from hpctrain.planner.layout import Edge, Layout, kind
from hpctrain.planner.schedule import Economy, Key, Schedule, Unit


@dataclass(frozen=True)
class Times:
    """When each unit runs: forward, in backward once more, and backward. `end` is after everything."""

    forward: list[int]
    again: dict[int, int]
    backward: list[int]
    end: int

    @staticmethod
    def of(schedule: Schedule) -> Times:
        """Inputs are there at time 0, the first unit runs at 1."""
        count = len(schedule.units)
        again, backward = dict[int, int](), [0] * count
        for time, (repeated, i) in enumerate(schedule.backward(), start=count + 1):
            if repeated:
                again[i] = time
            else:
                backward[i] = time
        return Times(list(range(1, count + 1)), again, backward, count + len(again) + count + 1)


def buffers(
    graph: Graph, places: Mapping[str, Layout], moved: Sequence[Edge], schedule: Schedule, economy: Economy, rank: int
) -> Buffers:
    """All arrays of `rank` between layers: who shares one, and when each is needed."""
    return _Arranging(graph, places, moved, schedule, economy, rank).run()


class _Arranging:
    """Goes forward over what is produced, then backward over gradients."""

    def __init__(
        self,
        graph: Graph,
        places: Mapping[str, Layout],
        moved: Sequence[Edge],
        schedule: Schedule,
        economy: Economy,
        rank: int,
    ) -> None:
        self.graph, self.places, self.schedule, self.rank = graph, places, schedule, rank
        self.keep = not economy.reuse
        self.times = Times.of(schedule)
        self.moved = {(edge.consumer, edge.slot): edge for edge in moved}
        self.unit_of = {key: i for i, unit in enumerate(schedule.units) for key in unit.inputs}
        self.position = {unit.name: i for i, unit in enumerate(schedule.units)}
        self.readers: dict[str, list[Key]] = {}
        for key in self.moved:  # in graph order
            if key in self.unit_of:
                self.readers.setdefault(self._source(key), []).append(key)
        self.out = Buffers()
        self.forward: dict[Key, tuple[View, View, bool]] = {}

    def run(self) -> Buffers:
        """Everything."""
        for node in self.graph:
            if isinstance(node.layer, Input) or node.name in self.position:
                self._result(node.name)
        for i in reversed(range(len(self.schedule.units))):
            self._gradients(i)
        for i, unit in enumerate(self.schedule.units):
            if (key := (unit.head, None)) in self.moved:
                self.out.edges[key] = self._partial_sums(self.moved[key], i)
        return self.out

    def _source(self, key: Key) -> str:
        name, slot = key
        return self.graph[name].inputs[slot or 0]

    def _boxes(self, key: Key) -> tuple[Box, Box]:
        """What this rank has and wants of an edge."""
        edge = self.moved[key]
        return edge.have.box(self.rank), edge.want.box(self.rank)

    # --- forward ---------------------------------------------------------------------------------------------------

    def _result(self, name: str) -> None:
        """The output of a unit or input, and what its consumers read."""
        keys, out = self.readers.get(name, []), self.out
        primary = self._primary(keys)
        mine = self.places[name].output.box(self.rank)
        of = kind(self.graph, name)
        shared = [key for key in keys if primary is not None and self._within(key, primary)]
        spans = self._needed(name, keys, shared)
        if primary is None:
            whole = out.results[name] = out.add(extent(mine), spans, of)
        else:
            wish = self._boxes(primary)[1]
            whole = out.add(extent(wish), spans, of)
            out.results[name] = out.interior(whole, within(mine, wish))
        for key in keys:
            wish = self._boxes(key)[1]
            if key in shared and primary is not None:
                dst = out.interior(whole, within(wish, self._boxes(primary)[1]))
                self.forward[key] = out.results[name], dst, True
            else:
                dst = out.add(extent(wish), self._read(key), of)
                self.forward[key] = out.results[name], dst, False

    def _primary(self, keys: Sequence[Key]) -> Key | None:
        """The edge whose consumer wants most of those that want all that this rank has."""
        inplace = [key for key in keys if volume(self._boxes(key)[0]) and contains(*reversed(self._boxes(key)))]
        return max(inplace, key=lambda key: volume(self._boxes(key)[1]), default=None)

    def _within(self, key: Key, primary: Key) -> bool:
        """Whether the consumer of `key` can read from the array of `primary`: borders, if it has some, must agree."""
        if key == primary:
            return True
        (mine, wish), most = self._boxes(key), self._boxes(primary)[1]
        if not (volume(mine) and contains(wish, mine) and contains(most, wish)):
            return False
        want, other = self.moved[key].want, self.moved[primary].want
        inside = all(
            s.start >= 0 and s.stop <= n for s, n in zip(wish, self.graph[self._source(key)].shape, strict=True)
        )
        same = (want.cuts, self._fill(key)) == (other.cuts, self._fill(primary))
        return inside or same

    def _fill(self, key: Key) -> float:
        return self.graph[key[0]].layer.fill

    def _needed(self, name: str, keys: Sequence[Key], shared: Sequence[Key]) -> list[Span]:
        """When the output of a unit or input is."""
        times, i = self.times, self.position.get(name)
        first = 0 if i is None else times.forward[i]
        reads, later = [times.forward[self.unit_of[key]] for key in keys], []
        later += [times.again[j] for key in keys if (j := self.unit_of[key]) in times.again]
        later += [times.backward[self.unit_of[key]] for key in shared if self._kept(key)]
        if i is None:  # what is read is looked at after the forward pass, if a loss is not finite
            later.append(len(self.schedule.units))
        elif self._keeps_output(self.schedule.units[i]):
            later.append(times.backward[i])
        if self.keep or not keys:
            return [(0, times.end)]
        if i in self.schedule.again:
            return [(first, max([first, *reads])), (times.again[i], max([times.again[i], *later]))]
        return [(first, max([first, *reads, *later]))]

    def _read(self, key: Key) -> list[Span]:
        """When the consumer of `key` needs what it reads, where that is an array of its own."""
        i, times = self.unit_of[key], self.times
        if self.keep:
            return [(0, times.end)]
        first, again = times.forward[i], times.again.get(i)
        last = times.backward[i] if self._kept(key) else again or first
        return [(first, last)] if again is None else [(first, first), (again, last)]

    def _kept(self, key: Key) -> bool:
        """Whether the gradient of what reads it needs it; a tensor that is added within a unit is not."""
        return key[0] == self.schedule.units[self.unit_of[key]].head and self.graph[key[0]].layer.keeps_inputs

    def _keeps_output(self, unit: Unit) -> bool:
        return self.graph[unit.head].layer.keeps_output or (unit.tail is not None and unit.tail.slope != 1)

    # --- backward --------------------------------------------------------------------------------------------------

    def _gradients(self, i: int) -> None:
        """The gradients of what unit `i` reads; those of its output are known already."""
        unit, out, now = self.schedule.units[i], self.out, self.times.backward[i]
        dy = self._output_gradient(unit.name)
        if self.keep and dy is not None and unit.tail is not None and unit.tail.slope != 1:
            out.masked[unit.name] = out.add(extent(self.places[unit.name].output.box(self.rank)), [(0, self.times.end)])
        passed = self._passed(unit) if dy is not None else None
        for key in unit.inputs:
            src, dst, inplace = self.forward[key]
            if not self.moved[key].gradient:
                out.edges[key] = EdgeViews(src, dst, inplace, None, None, False)
                continue
            source = self._source(key)
            then = self.times.backward[self.position[source]] if source in self.position else now
            mine, wish = self._boxes(key)
            if key == passed and dy is not None:
                out.passed.add(key)
                out.found[dy.buffer].until(then)
                out.edges[key] = EdgeViews(src, dst, inplace, dy, dy, True)
                continue
            nested = volume(mine) > 0 and contains(wish, mine)
            of = self.moved[key].kind
            gradient = out.add(extent(wish), self._span(now, then if nested else now), of)
            if nested:
                back = out.interior(gradient, within(mine, wish))
            else:
                back = out.add(extent(mine), self._span(now, then), of)
            out.edges[key] = EdgeViews(src, dst, inplace, gradient, back, nested)

    def _output_gradient(self, name: str) -> View | None:
        """Where the gradient of a unit's output is summed: what its first consumer sends back."""
        if isinstance(self.graph[name].layer, Loss):
            return None
        backs = (self.out.edges[key].back for key in self.readers.get(name, []))
        return next((back for back in backs if back is not None), None)

    def _passed(self, unit: Unit) -> Key | None:
        """The input of a sum whose gradient needs no place of its own: it is that of the output, moved nowhere."""
        if self.keep or self.places[unit.head].partial is not None:
            return None
        adds = isinstance(self.graph[unit.head].layer, Add)
        keys = unit.inputs if adds else unit.inputs[-1:] if unit.tail is not None and unit.tail.adds else ()
        for key in keys:
            edge = self.moved[key]
            if edge.gradient and edge.have.partition == edge.want.partition and edge.have.cuts == edge.want.cuts:
                return key
        return None

    def _partial_sums(self, edge: Edge, i: int) -> EdgeViews:
        """Sums run from what every rank produced to the owners, and their gradient back: each at one time."""
        times, out = self.times, self.out
        mine, produced = edge.have.box(self.rank), edge.want.box(self.rank)
        nested = volume(mine) > 0 and contains(produced, mine)
        forward = [(t, t) for t in (times.forward[i], times.again.get(i)) if t is not None]
        forward = [(0, times.end)] if self.keep else forward
        backward = self._span(times.backward[i], times.backward[i])
        partial, gradient = (out.add(extent(produced), spans, edge.kind) for spans in (forward, backward))
        if nested:
            box = within(mine, produced)
            return EdgeViews(out.interior(gradient, box), gradient, True, partial, out.interior(partial, box), True)
        sums, of_sums = (out.add(extent(mine), spans, edge.kind) for spans in (forward, backward))
        return EdgeViews(of_sums, gradient, False, partial, sums, False)

    def _span(self, first: int, last: int) -> list[Span]:
        return [(0, self.times.end)] if self.keep else [(first, last)]
