"""One rank's share of a training step, without the others: layers run as in training, but nothing arrives."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from hpctrain import optim
from hpctrain.backends.base import Array, Backend
from hpctrain.binding import Arena, statistics
from hpctrain.comm.exchange import Exchange, Way
from hpctrain.comm.neighbours import Views
from hpctrain.config import Optim
from hpctrain.executor import TRAINING, Executor
from hpctrain.graph import Graph
from hpctrain.layers import Input, Weight
from hpctrain.layers.loss import LOSS
from hpctrain.optim import Optimizer
from hpctrain.parameters import Parameters
from hpctrain.partition import Box, Partition, extent, volume
from hpctrain.planner.arena import Buffers
from hpctrain.planner.buffers import buffers
from hpctrain.planner.layout import Edge, differentiable, edges, kind, layouts
from hpctrain.planner.plan import Plan
from hpctrain.planner.schedule import LEAN, Economy, schedule
from hpctrain.precision import TYPES, exact

if TYPE_CHECKING:
    from mpi4py import MPI

POOL = np.random.default_rng(0).standard_normal(2**18).astype(np.float32)
"""Numbers that layers can compute with as with real ones: none of them zero, infinite or too small to be normal."""


class Absent:
    """The other ranks of a plan, as an Exchange sees its neighbours: they neither send nor take anything."""

    def __init__(self, ranks: int) -> None:
        self.ranks = frozenset(range(1, ranks))
        self.parts: dict[int, list[Any]] = {rank: [] for rank in self.ranks}

    def handover(self, tag: int, sends: Views, recvs: Views) -> Absent:
        """What there is to do of a way: nothing."""
        return self

    def offer(self) -> None:
        """Nobody reads."""

    def await_offers(self) -> None:
        """Nobody writes."""

    def leave(self) -> None:
        """Nobody waits."""


class Rehearsal(Executor):
    """Rank 0 of a plan, alone: layers, arrays and memory are those of training, of exchanges only what is local.

    What ranks would add up over the batch or a domain is this rank's part alone.
    """

    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        alone: MPI.Intracomm,
        backend: Backend,
        dtype: str,
        rules: Optim,
        economy: Economy = LEAN,
    ) -> None:
        """`alone` is a communicator of this rank and no other, `rules` are the optimizer's."""
        plan.check(graph)
        self.graph, self.plan, self.backend, self.dtype, self.seed = graph, plan, backend, TYPES[dtype], 0
        self.comm = alone
        self.seconds = {"compute": 0.0, "exchange": 0.0, "allreduce": 0.0}
        self._grids: Any = self
        self.layouts = layouts(graph, plan)
        self._differentiable, self._losses = differentiable(graph), graph.losses
        self.schedule = schedule(graph, self.layouts, economy)
        self.parameters = Parameters(self.layouts.values(), 0, self.dtype, 0, start=drawn)
        self.state = [t for place in self.layouts.values() for t in statistics(place, 0, exact(self.dtype), 0)]
        moved = edges(graph, plan, self.layouts)
        found = buffers(graph, self.layouts, moved, self.schedule, economy, 0)
        self.arena = Arena(found, backend, self.dtype, alone, moved, [0])
        self.exchanges = self._exchanges(moved, found)
        self._results = {name: self.arena.array(view) for name, view in found.results.items()}
        self.steps = [self._bind(unit, found) for unit in self.schedule.units]
        self._by_name = {step.name: step for step in self.steps}
        self._apart = 0.0
        self.given = {node.name: self._drawn_input(node.name) for node in graph if isinstance(node.layer, Input)}
        rows = {loss.name: self._results[loss.name].reshape(-1, loss.shape[-1]) for loss in self._losses}
        self.dloss = {name: np.zeros_like(mine) for name, mine in rows.items()}
        for gradient in self.dloss.values():
            gradient[:, LOSS] = 1 / len(gradient)
        blocks, shards = self.parameters.blocks(), self.parameters.shards()
        self._optimizer: Optimizer = optim.TABLE[rules.name](blocks, shards, backend, rules)
        self._nbytes = sum(block.weights.nbytes for block in blocks)
        self.update = 0.0
        """Seconds per byte of weights that the last update took."""

    # --- what stands in for the other ranks ------------------------------------------------------------------------

    def grid(self, partition: Partition) -> Rehearsal:
        """Of a partition: this rank."""
        return self

    def sub(self, axes: object) -> MPI.Intracomm:
        """Of the ranks along `axes`: this one."""
        return self.comm

    def _exchanges(self, moved: Sequence[Edge], found: Buffers) -> dict[Any, Exchange]:
        absent: Any = Absent(self.plan.ranks)
        made = {}
        for i, edge in enumerate(moved):
            key = edge.consumer, edge.slot
            if key in found.edges:
                fill = 0.0 if edge.slot is None else self.graph[edge.consumer].layer.fill
                arrays = self.arena.of_edge(found, key)
                made[key] = Exchange(self.comm, edge.have, edge.want, arrays, fill, 2 * i, absent)
        return made

    def _transfer(self, way: Way) -> Array:
        """What is local of a transfer. Copies are priced with those from other ranks, so their time is set apart."""
        begin = perf_counter()
        result = way.run()
        if way.copies:
            self._apart += perf_counter() - begin
        return result

    # --- a step ----------------------------------------------------------------------------------------------------

    @np.errstate(all="ignore")  # of groups of samples that are all other ranks' there are no statistics
    def run(self) -> np.ndarray:
        """(units, 2): seconds that each unit took in one step, forward and backward."""
        for name, values in self.given.items():
            np.copyto(self._results[name], values)
        self._phase = TRAINING
        begin = perf_counter()
        for group, copies in self.parameters.narrow.items():
            self.backend.narrow(self.parameters.groups[group].weights, copies)
        narrowed = perf_counter() - begin
        taken = np.zeros((len(self.steps), 2))
        for i, step in enumerate(self.steps):
            self._apart, begin = 0.0, perf_counter()
            self._forward_step(step, TRAINING)
            taken[i, 0] = perf_counter() - begin - self._apart
        for i, step in reversed(list(enumerate(self.steps))):
            self._apart, begin = 0.0, perf_counter()
            self._backward_step(step, self.dloss)
            taken[i, 1] = perf_counter() - begin - self._apart
        begin = perf_counter()
        self._optimizer.step(0.0)
        self.update = (perf_counter() - begin + narrowed) / max(1, self._nbytes)
        return taken

    def _drawn_input(self, name: str) -> np.ndarray:
        box = self.layouts[name].output.box(0)
        layer = self.graph[name].layer
        if isinstance(layer, Input) and layer.integer:
            return np.zeros(extent(box), np.int64)
        return np.resize(POOL, extent(box)).astype(kind(self.graph, name).dtype(self.dtype))


def drawn(weight: Weight, name: str, box: Box, seed: int) -> np.ndarray | float:
    """Starting values of a weight, of its distribution: the same numbers over and over, as more take long to draw."""
    how, scale = weight.init
    if how == "constant":
        return scale
    return scale * np.resize(POOL, volume(box)).reshape(extent(box))
