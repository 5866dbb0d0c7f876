"""A graph and a plan bound to ranks: the list of (exchange, op) steps, and the same list reversed for gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from hpctrain.backends.base import Array, Backend
from hpctrain.binding import Arena, Step, bind_op, exchanges, statistics
from hpctrain.comm.exchange import Way
from hpctrain.comm.grid import Grids
from hpctrain.errors import BackendUnavailable, PlanError
from hpctrain.gradients import Gradients, Summing
from hpctrain.graph import Graph
from hpctrain.layers import Phase
from hpctrain.parameters import Parameters, Tensor, sorted_by_group
from hpctrain.partition import Box
from hpctrain.planner.arena import Buffers
from hpctrain.planner.buffers import buffers
from hpctrain.planner.layout import differentiable, edges, layouts
from hpctrain.planner.plan import Plan
from hpctrain.planner.schedule import KEEP, Economy, Unit, schedule
from hpctrain.precision import TYPES, exact

if TYPE_CHECKING:
    from mpi4py import MPI


TRAINING = Phase()

PLAIN = Summing()
"""By the ring where the plan says nothing else."""


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
        summing: Summing = PLAIN,
        hosts: Sequence[int] | None = None,
    ) -> None:
        """`hosts`, one number for each rank, stands in for the hosts that MPI sees."""
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
        self._grids = Grids(self.comm)
        self.layouts = layouts(graph, plan)
        self._differentiable, self._losses = differentiable(graph), graph.losses
        self.schedule = schedule(graph, self.layouts, economy)
        units, declared = [unit.names for unit in self.schedule.units], sorted_by_group(self.layouts.values())
        self.gradients = Gradients(self.comm, plan, declared, units, exact(self.dtype), summing, self._grids.sub, seed)
        self.parameters = Parameters(self.layouts.values(), comm.rank, self.dtype, seed, self.gradients.allocate)
        self.gradients.publish()
        self.state = [
            t for place in self.layouts.values() for t in statistics(place, self.rank, exact(self.dtype), seed)
        ]
        moved = edges(graph, plan, self.layouts)
        found = buffers(graph, self.layouts, moved, self.schedule, economy, self.rank)
        self.arena = Arena(found, backend, self.dtype, self.comm, moved, hosts or self.gradients.hosts)
        self.exchanges = exchanges(self.comm, graph, moved, found, self.arena)
        self._results = {name: self.arena.array(view) for name, view in found.results.items()}
        self.steps = [self._bind(unit, found) for unit in self.schedule.units]
        self._by_name = {step.name: step for step in self.steps}

    # --- one batch -------------------------------------------------------------------------------------------------

    def input(self, name: str) -> Array:
        """The array to fill with this rank's box (`layouts[name].output.box(rank)`) of an input before `forward`."""
        return self._results[name]

    def forward(self, phase: Phase = TRAINING) -> dict[str, Array]:
        """Run all layers; returns this rank's rows (n, 4) of each loss layer's output."""
        self._phase = phase
        self.updated()
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

    def backward(self, dloss: Mapping[str, Array], first: bool = True, last: bool = True) -> None:
        """Fill `gradient` of each parameter with the sum over the global batch of d(total)/d(weight).

        `dloss` has per loss layer the gradient of the total with respect to `forward`'s rows. Where a batch comes in
        several parts, `first` and `last` say which this one is; `gradient` is that of all parts after the last one.
        """
        if first:
            begin = perf_counter()
            self.gradients.begin()
            self.seconds["allreduce"] += perf_counter() - begin
        phase = replace(self._phase, again=True)
        for again, i in self.schedule.backward():
            step = self.steps[i]
            if not again:
                self._backward_step(step, dloss)
                begin = perf_counter()
                self.gradients.completed(i, phase.step, first, last)
                self.seconds["allreduce"] += perf_counter() - begin
            elif i in self.schedule.again:
                self._forward_step(step, phase)
            else:  # its output is still there; what it reads may not be
                for edge in step.inputs:
                    self._transfer(edge.fwd)
        if last:
            begin = perf_counter()
            self.gradients.finish()
            self.seconds["allreduce"] += perf_counter() - begin

    def updated(self) -> None:
        """After an update, and before others than `forward` read weights: all ranks get what they hold. Collective."""
        self.gradients.publish()

    def _backward_step(self, step: Step, dloss: Mapping[str, Array]) -> None:
        dy = None
        if step.name in self._differentiable:
            dy = dloss[step.name] if step.name in dloss else self._output_gradient(step)
        if dy is not None:
            self._send_back(step, dy)

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

    @property
    def exchange_by(self) -> str:
        """What exchanges on this host go by: "shared memory", or "messages", and why if that is not what was meant."""
        return self.arena.exchange_by

    def bytes_sent(self) -> int:
        """Bytes this rank has handed to others in exchanges so far, by messages or through shared memory."""
        return sum(way.bytes_sent for exchange in self.exchanges.values() for way in exchange.ways)

    def free(self) -> None:
        """Release MPI resources. Collective."""
        for exchange in self.exchanges.values():
            exchange.free()
        self.arena.free()
        self.gradients.free()
        self._grids.free()
        self.comm.Free()

    # --- binding ---------------------------------------------------------------------------------------------------

    def _bind(self, unit: Unit, found: Buffers) -> Step:
        place = self.layouts[unit.head]
        mine = {n: self.parameters.by_name[f"{unit.head}.{n}"] for n in place.weights}
        owned = {t.name.rpartition("."): t.array for t in self.state}
        running = {name: array for (layer, _, name), array in owned.items() if layer == unit.head}
        op, active = bind_op(unit, place, self.rank, self.seed, self.backend, self.dtype, mine, self._grids.grid)
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
        )
