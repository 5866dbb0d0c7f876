"""A graph and a plan bound to ranks: the list of (exchange, op) steps, and the same list reversed for gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from hpctrain.backends.base import Array, Backend
from hpctrain.binding import Arena, Step, bind_op, exchanges, last_steps, statistics
from hpctrain.comm import allreduce
from hpctrain.comm.exchange import Way
from hpctrain.comm.grid import ProcessGrid
from hpctrain.comm.link import Link
from hpctrain.comm.watch import Wait
from hpctrain.comm.watched import waiting
from hpctrain.errors import BackendUnavailable, PlanError
from hpctrain.graph import Graph
from hpctrain.layers import Phase
from hpctrain.parameters import Group, Parameters, Tensor
from hpctrain.partition import Box, Partition
from hpctrain.planner.arena import Buffers
from hpctrain.planner.buffers import buffers
from hpctrain.planner.layout import differentiable, edges, layouts
from hpctrain.planner.plan import Plan
from hpctrain.planner.schedule import KEEP, Economy, Unit, schedule
from hpctrain.precision import TYPES, exact

if TYPE_CHECKING:
    from mpi4py import MPI


TRAINING = Phase()


class Executor:
    """Runs one batch forward and backward; owns parameters, gradients, statistics and every buffer between layers.

    Collective over `comm`, which is duplicated. `dtype` is one of precision.TYPES. Raises PlanError, on all ranks
    alike, where the plan does not fit graph or ranks, and BackendUnavailable where the backend lacks the type.
    """

    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        comm: MPI.Intracomm,
        backend: Backend,
        dtype: str = "float32",
        seed: int = 0,
        economy: Economy = KEEP,
    ) -> None:
        plan.check(graph)
        if plan.ranks > comm.size:
            raise PlanError(f"the plan needs {plan.ranks} ranks, but there are {comm.size}: start {plan.ranks}")
        able = [name for name, kind in TYPES.items() if kind.name in backend.dtypes]
        if dtype not in able:
            raise BackendUnavailable(
                f"backend {backend.name} has no {dtype}, only {', '.join(able)}; set train.precision"
            )
        self.graph, self.plan, self.backend, self.dtype, self.seed = graph, plan, backend, TYPES[dtype], seed
        self.comm = comm.Dup()
        self.seconds = {"compute": 0.0, "exchange": 0.0, "allreduce": 0.0}
        """Time this rank has spent in each phase."""
        self._links: dict[Group, Link] = {}
        self._grids: dict[Partition, ProcessGrid] = {}
        self.layouts = layouts(graph, plan)
        self._differentiable, self._losses = differentiable(graph), graph.losses
        self.schedule = schedule(graph, self.layouts, economy)
        self.parameters = Parameters(self.layouts.values(), comm.rank, self.dtype, seed)
        self.state = [
            t for place in self.layouts.values() for t in statistics(place, self.rank, exact(self.dtype), seed)
        ]
        moved = edges(graph, plan, self.layouts)
        found = buffers(graph, self.layouts, moved, self.schedule, economy, self.rank)
        self.arena = Arena(found, backend, self.dtype)
        self.exchanges = exchanges(self.comm, graph, moved, found, self.arena)
        self._results = {name: self.arena.array(view) for name, view in found.results.items()}
        completed = last_steps(self.schedule.units, self.parameters)
        self.steps = [self._bind(unit, found, completed[unit.name]) for unit in self.schedule.units]
        self._by_name = {step.name: step for step in self.steps}
        self._waits = {group: self._wait(group) for group in self._links}

    # --- one batch -------------------------------------------------------------------------------------------------

    def input(self, name: str) -> Array:
        """The array to fill with this rank's box (`layouts[name].output.box(rank)`) of an input before `forward`."""
        return self._results[name]

    def forward(self, phase: Phase = TRAINING) -> dict[str, Array]:
        """Run all layers; returns this rank's rows (n, 4) of each loss layer's output."""
        self._phase = phase
        for group, copies in self.parameters.narrow.items():
            self.backend.narrow(self.parameters.groups[group].weights, copies)
        for step in self.steps:
            self._forward_step(step, phase)
        # (0, 4) on an idle rank
        return {loss.name: self._results[loss.name].reshape(-1, loss.shape[-1]) for loss in self._losses}

    def _forward_step(self, step: Step, phase: Phase) -> None:
        x = [self._transfer(edge.fwd) for edge in step.inputs]
        begin = perf_counter()
        y = step.result if step.sum_partials is None else step.sum_partials.reserve()
        if step.active:
            step.op.forward(x, step.weights, y, phase)
        self.seconds["compute"] += perf_counter() - begin
        if step.sum_partials is not None:
            np.copyto(step.result, self._transfer(step.sum_partials))

    def backward(self, dloss: Mapping[str, Array]) -> None:
        """Fill `gradient` of each parameter with the sum over the global batch of d(total)/d(weight).

        `dloss` has per loss layer the gradient of the total with respect to `forward`'s rows.
        """
        phase = replace(self._phase, again=True)
        for again, i in self.schedule.backward():
            step = self.steps[i]
            if not again:
                self._backward_step(step, dloss)
            elif i in self.schedule.again:
                self._forward_step(step, phase)
            else:  # its output is still there; what it reads may not be
                for edge in step.inputs:
                    self._transfer(edge.fwd)

    def _backward_step(self, step: Step, dloss: Mapping[str, Array]) -> None:
        dy = None
        if step.name in self._differentiable:
            dy = dloss[step.name] if step.name in dloss else self._output_gradient(step)
        if dy is not None:
            self._send_back(step, dy)
        for group in step.groups:
            self._sum_gradients(group)

    def _send_back(self, step: Step, dy: Array) -> None:
        """Gradients of what a step reads, from that of its output, and of its weights."""
        if step.spread_gradient is not None:
            into = step.spread_gradient.reserve()
            np.copyto(into, dy.reshape(into.shape))  # rows of nothing have other extents on an idle rank
            dy = self._transfer(step.spread_gradient)
        if step.masked is not None:
            np.copyto(step.masked, dy)
            dy = step.masked
        begin = perf_counter()
        dx = [
            None if edge.bwd is None or passed else edge.bwd.reserve()
            for edge, passed in zip(step.inputs, step.passed, strict=True)
        ]
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
        begin = perf_counter()
        if group in self._links:
            algorithm = allreduce.get(self.plan.algorithm(group) or "ring")
            with self._waits[group]:
                algorithm.sum(self._links[group], self.parameters.groups[group].partials)
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

    def makes(self, name: str) -> bool:
        """Whether the output of layer `name` stands anywhere: not if another layer runs within it."""
        return name in self._results

    def output(self, name: str) -> Array:
        """This rank's block of the output of layer `name`, valid until the next `forward`.

        With Economy.reuse only losses and what no layer reads stay that long. KeyError where fusion left it out.
        """
        return self._results[name]

    def output_gradient(self, name: str) -> Array:
        """This rank's block of the gradient of the output of layer `name`, valid until the next `backward`.

        With Economy.reuse others may lie there by then. KeyError where fusion left the output out.
        """
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
        for link in self._links.values():
            link.free()
        for grid in self._grids.values():
            grid.free()
        self.comm.Free()

    # --- binding ---------------------------------------------------------------------------------------------------

    def _grid(self, partition: Partition) -> ProcessGrid:
        """The process grid of a partition; collective when first asked for."""
        if partition not in self._grids:
            self._grids[partition] = ProcessGrid(self.comm, partition)
        return self._grids[partition]

    def _wait(self, group: Group) -> Wait:
        """What a sum of gradients is to the watchdog."""
        first, *more = dict.fromkeys(
            p.name.rpartition(".")[0] for p in self.parameters.by_name.values() if p.group == group
        )
        layers = f"{first} and {len(more)} more" if more else first
        return waiting(
            self._links[group].comm, layers, "gradient allreduce", self.parameters.groups[group].partials.nbytes
        )

    def _bind(self, unit: Unit, found: Buffers, groups: tuple[Group, ...]) -> Step:
        place = self.layouts[unit.head]
        mine = {n: self.parameters.by_name[f"{unit.head}.{n}"] for n in place.weights}
        owned = {t.name.rpartition("."): t.array for t in self.state}
        running = {name: array for (layer, _, name), array in owned.items() if layer == unit.head}
        op, active = bind_op(unit, place, self.rank, self.seed, self.backend, self.dtype, mine, self._grid)
        for partition, replicated in groups:  # collective: all grids are made now, in the same order on all ranks
            comm = self._grid(partition).sub(replicated) if replicated else None
            if comm is not None:
                self._links[partition, replicated] = Link(comm)
        partial = self.exchanges.get((unit.head, None))
        consumers = ((node.name, slot) for node, slot in self.graph.consumers(unit.name))
        return Step(
            name=unit.name,
            op=op,
            active=active,
            inputs=[self.exchanges[key] for key in unit.inputs],
            passed=[key in found.passed for key in unit.inputs],
            sum_partials=None if partial is None else partial.bwd,
            spread_gradient=None if partial is None else partial.fwd,
            outputs=[self.exchanges[key] for key in consumers],
            weights={name: p.used for name, p in mine.items()} | running,
            gradients={name: p.partial for name, p in mine.items()},
            result=self._results[unit.name],
            masked=self.arena.array(found.masked[unit.name]) if unit.name in found.masked else None,
            groups=groups,
        )
