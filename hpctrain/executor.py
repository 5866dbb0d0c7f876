"""A graph and a plan bound to ranks: the list of (exchange, op) steps, and the same list reversed for gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from hpctrain.backends.base import Array, Backend
from hpctrain.comm import allreduce
from hpctrain.comm.exchange import Exchange, Way
from hpctrain.comm.grid import ProcessGrid
from hpctrain.errors import BackendUnavailable, PlanError
from hpctrain.graph import Graph
from hpctrain.layers import Input, Op, Phase, Place
from hpctrain.parameters import Group, Parameters, Tensor, initial
from hpctrain.partition import AXES, Box, Partition, extent, volume
from hpctrain.planner.layout import Layout, differentiable, edges, layouts
from hpctrain.planner.plan import Plan
from hpctrain.regions import Region

if TYPE_CHECKING:
    from mpi4py import MPI


TRAINING = Phase()


@dataclass
class Step:
    """One layer on this rank."""

    name: str
    op: Op
    active: bool
    """Whether this rank produces anything, or must take part in the op's own communication all the same."""
    inputs: list[Exchange]
    sum_partials: Way | None
    """From what every rank produced to sums at their owners, where the layer sums over a cut dim."""
    spread_gradient: Way | None
    """The reverse: from the owners' gradient to everyone who produced a share."""
    outputs: list[Exchange]
    """The consumers' edges, whose `fwd.src` this step fills and whose `bwd.dst` holds its gradient."""
    weights: dict[str, Array]
    gradients: dict[str, Array]
    result: Array
    """This rank's block of the output: the source of the first consumer's edge."""
    groups: tuple[Group, ...]
    """Replica groups whose gradients are complete once this step's backward has run."""


class Executor:
    """Runs one batch forward and backward; owns parameters, gradients, statistics and every buffer between layers.

    Collective over `comm`, which is duplicated. `dtype` is float32 or float64. Raises PlanError, on all ranks alike,
    where the plan does not fit graph or ranks, and BackendUnavailable where the backend lacks the type.
    """

    def __init__(
        self, graph: Graph, plan: Plan, comm: MPI.Intracomm, backend: Backend, dtype: str = "float32", seed: int = 0
    ) -> None:
        plan.check(graph)
        if plan.ranks > comm.size:
            raise PlanError(f"the plan needs {plan.ranks} ranks, but there are {comm.size}: start {plan.ranks}")
        if dtype not in backend.dtypes:
            raise BackendUnavailable(
                f"backend {backend.name} has no {dtype}, only {', '.join(backend.dtypes)}; set train.precision"
            )
        self.graph, self.plan, self.backend, self.dtype, self.seed = graph, plan, backend, np.dtype(dtype), seed
        self.comm = comm.Dup()
        self.seconds = {"compute": 0.0, "exchange": 0.0, "allreduce": 0.0}
        """Time this rank has spent in each phase."""
        self._allreduce = allreduce.get(plan.allreduce).allreduce
        self._grids: dict[Partition, ProcessGrid] = {}
        self.layouts = layouts(graph, plan)
        self._differentiable, self._losses = differentiable(graph), graph.losses
        self.parameters = Parameters(self.layouts.values(), comm.rank, self.dtype, seed)
        self.state = [tensor for place in self.layouts.values() for tensor in self._statistics(place, seed)]
        self.exchanges = self._exchanges()
        self._inputs = {n.name: self._buffers(n.name) for n in graph if isinstance(n.layer, Input)}
        last = self._last_steps()
        self.steps = [
            self._bind(place, tuple(g for g, name in last.items() if name == place.node.name))
            for place in self.layouts.values()
            if not isinstance(place.node.layer, Input)
        ]
        self._by_name = {step.name: step for step in self.steps}

    # --- one batch -------------------------------------------------------------------------------------------------

    def input(self, name: str) -> Array:
        """The array to fill with this rank's box (`layouts[name].output.box(rank)`) of an input before `forward`."""
        return self._inputs[name][0]

    def forward(self, phase: Phase = TRAINING) -> dict[str, Array]:
        """Run all layers; returns this rank's rows (n, 4) of each loss layer's output."""
        for first, *more in self._inputs.values():
            for other in more:
                np.copyto(other, first)
        for step in self.steps:
            x = [self._transfer(edge.fwd) for edge in step.inputs]
            begin = perf_counter()
            y = step.result if step.sum_partials is None else step.sum_partials.reserve()
            if step.active:
                step.op.forward(x, step.weights, y, phase)
            self.seconds["compute"] += perf_counter() - begin
            if step.sum_partials is not None:
                np.copyto(step.result, self._transfer(step.sum_partials))
            for edge in step.outputs[1:]:  # the first one's source is the result itself
                np.copyto(edge.fwd.reserve(), step.result)
        # (0, 4) on an idle rank
        return {loss.name: self._by_name[loss.name].result.reshape(-1, loss.shape[-1]) for loss in self._losses}

    def backward(self, dloss: Mapping[str, Array]) -> None:
        """Fill `parameters.gradients` with the sums over the global batch of d(total)/d(weight).

        `dloss` has per loss layer the gradient of the total with respect to `forward`'s rows.
        """
        for step in reversed(self.steps):
            dy = None
            if step.name in self._differentiable:
                dy = dloss[step.name] if step.name in dloss else self._output_gradient(step)
            if dy is not None:
                self._backward_step(step, dy)
            for group in step.groups:
                self._sum_gradients(group)

    def _backward_step(self, step: Step, dy: Array) -> None:
        if step.spread_gradient is not None:
            into = step.spread_gradient.reserve()
            np.copyto(into, dy.reshape(into.shape))  # rows of nothing have other extents on an idle rank
            dy = self._transfer(step.spread_gradient)
        begin = perf_counter()
        dx = [None if edge.bwd is None else edge.bwd.reserve() for edge in step.inputs]
        if step.active:
            step.op.backward(dy, step.weights, dx, step.gradients)
        else:
            for gradient in step.gradients.values():
                gradient.fill(0)
        self.seconds["compute"] += perf_counter() - begin
        for edge in step.inputs:
            if edge.bwd is not None:
                self._transfer(edge.bwd)

    def _output_gradient(self, step: Step) -> Array | None:
        """The sum of what the consumers send back, in graph order; None where no gradient flows."""
        found = [edge.bwd.dst for edge in step.outputs if edge.bwd is not None]
        for other in found[1:]:
            self.backend.add(found[0], other, found[0])
        return found[0] if found else None

    def _sum_gradients(self, group: Group) -> None:
        partition, axes = group
        comm = self._grid(partition).sub(axes) if axes else None
        begin = perf_counter()
        if comm is not None:
            self._allreduce(comm, self.parameters.gradients[self.parameters.groups[group]])
        self.seconds["allreduce"] += perf_counter() - begin

    def _transfer(self, way: Way) -> Array:
        begin = perf_counter()
        result = way.run()
        self.seconds["exchange"] += perf_counter() - begin
        return result

    # --- what a run reports and saves ------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """This rank."""
        return self.comm.rank

    def box(self, name: str) -> Box:
        """This rank's box of the output of layer or input `name`."""
        return self.layouts[name].output.box(self.rank)

    def output(self, name: str) -> Array:
        """This rank's block of the output of layer `name`, valid until the next `forward`."""
        return self._by_name[name].result

    def output_gradient(self, name: str) -> Array:
        """This rank's block of the gradient of the output of layer `name`, valid until the next `backward`."""
        return next(edge.bwd.dst for edge in self._by_name[name].outputs if edge.bwd is not None)

    def tensors(self) -> list[Tensor]:
        """Everything trained or running that a checkpoint must hold, this rank's blocks, optimizer state apart."""
        return [*self.parameters.by_name.values(), *self.state]

    def bytes_sent(self) -> int:
        """Bytes this rank has sent in exchanges so far."""
        return sum(way.bytes_sent for exchange in self.exchanges.values() for way in exchange.ways)

    def free(self) -> None:
        """Release MPI resources. Collective."""
        for exchange in self.exchanges.values():
            exchange.free()
        for grid in self._grids.values():
            grid.free()
        self.comm.Free()

    # --- binding ---------------------------------------------------------------------------------------------------

    def _grid(self, partition: Partition) -> ProcessGrid:
        """The process grid of a partition; collective when first asked for."""
        if partition not in self._grids:
            self._grids[partition] = ProcessGrid(self.comm, partition)
        return self._grids[partition]

    def _exchanges(self) -> dict[tuple[str, int | None], Exchange]:
        found = {}
        for i, edge in enumerate(edges(self.graph, self.plan, self.layouts)):
            fill = 0.0 if edge.slot is None else self.graph[edge.consumer].layer.fill
            dtype = np.dtype(np.int64) if edge.integer else self.dtype
            backward = edge.gradient or edge.slot is None
            found[edge.consumer, edge.slot] = Exchange(self.comm, edge.have, edge.want, dtype, fill, 2 * i, backward)
        return found

    def _buffers(self, name: str) -> list[Array]:
        """Every array that must hold this rank's block of the output of `name` before its consumers run."""
        return [self.exchanges[node.name, slot].fwd.src for node, slot in self.graph.consumers(name)]

    def _statistics(self, place: Layout, seed: int) -> list[Tensor]:
        declared = place.node.layer.state(*place.node.input_shapes)
        found = []
        for name, dist in place.state.items():
            box = dist.box(self.rank)
            array = np.empty(extent(box), self.dtype)
            array[...] = initial(declared[name], name, box, seed)
            found.append(Tensor(f"{place.node.name}.{name}", dist, box, array))
        return found

    def _last_steps(self) -> dict[Group, str]:
        """The step of the backward pass that completes each replica group: the first layer that uses it."""
        last: dict[Group, str] = {}
        for name, parameter in self.parameters.by_name.items():
            layer = name.rpartition(".")[0]
            order = list(self.graph.nodes)
            if parameter.group not in last or order.index(layer) < order.index(last[parameter.group]):
                last[parameter.group] = layer
        return last

    def _bind(self, place: Layout, groups: tuple[Group, ...]) -> Step:
        node, rank = place.node, self.rank
        reduced = node.layer.reduce_axes(*node.input_shapes)
        axes = tuple(axis for axis in AXES if axis in reduced and place.partition[axis] > 1)
        comm = self._grid(place.partition).sub(axes) if axes else None
        for partition, replicated in groups:  # collective: all grids are made now, in the same order on all ranks
            if replicated:
                self._grid(partition).sub(replicated)
        mine = {n: self.parameters.by_name[f"{node.name}.{n}"] for n in place.weights}
        owned = {t.name.rpartition("."): t.array for t in self.state}
        running = {name: array for (layer, _, name), array in owned.items() if layer == node.name}
        produced: Region = place.output if place.partial is None else place.partial
        op = node.layer.bind(
            Place(
                node.name,
                self.seed,
                self.backend,
                self.dtype,
                node.input_shapes,
                tuple(want.box(rank) for want in place.inputs),
                place.work.box(rank),
                produced.box(rank),
                {name: p.box for name, p in mine.items()},
                comm,
            )
        )
        outputs = [self.exchanges[n.name, slot] for n, slot in self.graph.consumers(node.name)]
        partial = self.exchanges.get((node.name, None))
        return Step(
            name=node.name,
            op=op,
            active=volume(produced.box(rank)) > 0 or comm is not None,
            inputs=[self.exchanges[node.name, slot] for slot in range(len(node.inputs))],
            sum_partials=None if partial is None else partial.bwd,
            spread_gradient=None if partial is None else partial.fwd,
            outputs=outputs,
            weights={name: p.array for name, p in mine.items()} | running,
            gradients={name: p.gradient for name, p in mine.items()},
            result=outputs[0].fwd.src if outputs else np.zeros(extent(place.output.box(rank)), self.dtype),
            groups=groups,
        )
