"""Random cases under MPI: rank 0 draws a network and a plan for it, all ranks train it, rank 0 compares.

Hypothesis runs on rank 0 alone, which sends every case to the others and gets one verdict for all of them, so that all
stay in step while it looks for the smallest case that fails.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from math import prod
from time import monotonic
from typing import Any

import hypothesis
import numpy as np
from executing import OPTIM, TOLERANCE, Blocks, blocks, forward_backward, load_weights
from hypothesis import strategies as st
from mpi4py import MPI
from networks import ONE, Data, draw, single

from hpctrain.backends.reference import Reference
from hpctrain.executor import Executor
from hpctrain.graph import Graph, Node
from hpctrain.layers import BCEWithLogits, Dice, Input, Loss, Phase, Place
from hpctrain.optim import SGD
from hpctrain.partition import Partition, Shape, names
from hpctrain.planner.layout import differentiable, edges, layouts, sent_bytes
from hpctrain.planner.plan import Plan, extents
from hpctrain.planner.schedule import KEEP, Economy

STEPS = 2
SHRINKING = 25.0
"""Seconds to look for a smaller case, once one has failed: less than pytest allows a test."""


@dataclass(frozen=True)
class Case:
    """A network, the plan to train it by, and the seed of its data and its dropout."""

    net: Graph
    plan: Plan
    seed: int

    def __repr__(self) -> str:
        lines = [f"case of seed {self.seed}, allreduce {self.plan.allreduce}"]
        for n in self.net:
            reads = f" of {', '.join(n.inputs)}" if n.inputs else ""
            lines.append(f"  {n.name}: {n.layer}{reads} -> {n.shape}; cut: {self.plan.partitions[n.name]}")
        return "\n".join(lines)


# --- plans --------------------------------------------------------------------------------------------------------


@cache
def grids(axes: tuple[str, ...], size: int) -> list[Partition]:
    """Every partition of `size` blocks along `axes`, those that cut few axes first."""
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    found = [parts for parts in product(divisors, repeat=len(axes)) if prod(parts) == size]
    found.sort(key=lambda parts: (sum(n > 1 for n in parts), parts))
    return [Partition.of(dict(zip(axes, parts, strict=True))) for parts in found]


def fits(node: Node, partition: Partition) -> bool:
    """Whether every block of the layer's work has elements."""
    layer, shapes = node.layer, node.input_shapes
    work = zip(layer.work_shape(*shapes), layer.work_axes(*shapes), strict=True)
    return all(prod(partition[axis] for axis in names(axes)) <= n for n, axes in work)


@st.composite
def plans(draw: Callable[..., Any], net: Graph, ranks: int) -> Plan:
    """A partition for every layer, over all ranks half of the time, for the layer "layer" more often; one plan of three
    has empty blocks.
    """
    empty = draw(st.sampled_from([False, False, True]))
    found = {}
    for n in net:
        most = [ranks] * ranks * (4 if n.name == "layer" else 1)
        size = draw(st.sampled_from([*range(1, ranks + 1), *most]))
        able = [grid for grid in grids(tuple(extents(n)), size) if empty or fits(n, grid)]
        if n.name == "layer" and draw(st.sampled_from([False, False, True])):
            able = [grid for grid in able if grid.contraction > 1] or able
        found[n.name] = draw(st.sampled_from(able)) if able else ONE
    return Plan(found, draw(st.sampled_from(["ring", "mpi"])), empty_blocks=empty)


def cases(nets: st.SearchStrategy[Graph], ranks: int) -> st.SearchStrategy[Case]:
    """A network, a plan for it, and a seed."""
    return nets.flatmap(lambda net: st.builds(Case, st.just(net), plans(net, ranks), st.integers(0, 2**16)))


# --- data ---------------------------------------------------------------------------------------------------------


def data_of(case: Case) -> Data:
    """Data of order 1, some labels ignored. The loss is about a mean, so that two steps keep weights of order 1."""
    net = case.net
    data = draw(net, case.seed, STEPS)
    rng = np.random.default_rng(case.seed + 1)
    for loss in net.losses:
        target = data.inputs.get(loss.inputs[1])
        if target is None:
            continue
        if isinstance(loss.layer, Loss) and loss.layer.ignore is not None:
            target[rng.random(target.shape) < 0.3] = loss.layer.ignore
        elif isinstance(loss.layer, BCEWithLogits | Dice) and target.dtype.kind == "f":
            target[...] = 1 / (1 + np.exp(-2 * target))
    most = max(prod(net[loss.inputs[0]].shape[1:]) for loss in net.losses)
    return replace(data, counts=data.counts / most)


# --- one case on all ranks, with NaN wherever something has to be written -------------------------------------------


class Poisoned(Reference):
    """Uninitialised memory happens to be 0 too often."""

    def empty(self, shape: Shape, dtype: np.dtype) -> np.ndarray:
        return np.full(shape, np.nan if dtype.kind == "f" else dtype.kind == "b" or np.iinfo(dtype).max, dtype)


def poison(executor: Executor) -> None:
    """What a training step writes anew: outputs, gradients of inputs, and of weights that a loss depends on."""
    for exchange in executor.exchanges.values():
        for way in exchange.ways:
            way.src.fill(np.nan if way.src.dtype.kind == "f" else np.iinfo(way.src.dtype).max)
    depended = differentiable(executor.graph)
    for step in executor.steps:
        for gradient in step.gradients.values() if step.name in depended else ():
            gradient.fill(np.nan)


class Guarded:
    """An op whose exceptions are noted: it goes on with what it has, as the other ranks wait for its blocks."""

    def __init__(self, op: Any, name: str, notes: list[str]) -> None:
        self.op, self.name, self.notes = op, name, notes

    def forward(self, *arguments: Any) -> None:
        self._run("forward", *arguments)

    def backward(self, *arguments: Any) -> None:
        self._run("backward", *arguments)

    def _run(self, way: str, *arguments: Any) -> None:
        try:
            getattr(self.op, way)(*arguments)
        except Exception:
            self.notes.append(f"{way} of {self.name} raised\n{traceback.format_exc(limit=-3)}")


def rehearse(case: Case, rank: int) -> list[str]:
    """What is wrong with the case before anything communicates: errors of the plan's check, of layouts and of bind."""
    try:
        case.plan.check(case.net)
        for name, place in layouts(case.net, case.plan).items():
            if not isinstance(place.node.layer, Input):
                boxes = {weight: dist.box(rank) for weight, dist in place.weights.items()}
                inputs = tuple(want.box(rank) for want in place.inputs)
                output = (place.partial or place.output).box(rank)
                shapes, dtype, work = place.node.input_shapes, np.dtype(np.float64), place.work.box(rank)
                backend = Poisoned()
                place.node.layer.bind(Place(name, case.seed, backend, dtype, shapes, inputs, work, output, boxes, None))
    except Exception:
        return [f"before communication\n{traceback.format_exc(limit=-3)}"]
    return []


def trained(comm: Any, case: Case, plan: Plan, data: Data, economy: Economy = KEEP) -> tuple[Blocks, list[str]]:
    """Outputs, gradients and weights of every step of training and of one evaluation, and what ops raised."""
    executor = Executor(case.net, plan, comm, Poisoned(), "float64", case.seed, economy)
    notes: list[str] = []
    for step in executor.steps:
        if getattr(step.op, "comm", None) is None:  # else the others wait for this rank within the op: end the run
            step.op = Guarded(step.op, step.name, notes)
    load_weights(executor, data)
    flat = executor.parameters
    found: Blocks = {}
    sgd = SGD(flat.blocks(), flat.shards(), executor.backend, OPTIM)
    for number in range(STEPS):
        poison(executor)
        forward_backward(executor, data, number)
        found |= {f"step {number}: {name}": block for name, block in blocks(executor).items()}
        sgd.step(OPTIM.lr)
        for tensor in executor.tensors():
            found[f"step {number}: {tensor.name} updated"] = (tensor.box, tensor.array.copy())
    planned = [sent_bytes(edge, comm.rank, np.dtype(np.float64)) for edge in edges(case.net, plan)]
    expected = STEPS * sum(forward + backward for forward, backward in planned)
    if executor.bytes_sent() != expected:
        notes.append(f"sent {executor.bytes_sent()} bytes; the plan counts {expected}")
    executor.forward(Phase(training=False))
    for n in case.net:
        if not isinstance(n.layer, Input) and executor.makes(n.name):
            found[f"evaluation: {n.name}"] = (executor.box(n.name), executor.output(n.name).copy())
    executor.free()
    return found, notes


def as_computed(names_of: Sequence[str]) -> list[str]:
    """Names of blocks in the order in which a step makes them: outputs, gradients from the last layer back, updates."""

    def order(i: int) -> tuple[str, int, int]:
        step, _, what = names_of[i].partition(": ")
        kind = 1 if what.endswith(" gradient") else 2 if what.endswith(" updated") else 0
        return step.replace("evaluation", "then"), kind, -i if kind == 1 else i

    return [names_of[i] for i in sorted(range(len(names_of)), key=order)]


def difference(net: Graph, found: Sequence[Blocks], expected: Blocks) -> str | None:
    """The first thing, in the order of computation, that some rank has otherwise than one rank alone, or nobody has.

    Outputs that fusion left out are not looked at.
    """
    for name in as_computed(list(found[0])):
        whole = expected[name][1]
        scale = max(1.0, float(np.abs(whole).max(initial=0)))
        if not np.isfinite(scale):
            return f"{name}: not finite on one rank: {whole.reshape(-1)[:9]}"
        holders = np.zeros(whole.shape, int)
        for rank, of_rank in enumerate(found):
            box, block = of_rank[name]
            holders[box] += 1
            # see TOLERANCE: sums that cancel leave an error of the size of their terms, so of the largest element
            close = np.abs(block - whole[box]) <= TOLERANCE * scale if block.size else np.ones(block.shape, bool)
            if block.size and not close.all():
                at = tuple(np.argwhere(~close)[0].tolist())
                return f"{name}: rank {rank} has {block[at]} at {at} of its box {box}, one rank {whole[box][at]}"
        once = name.split(": ")[-1].removesuffix(" gradient") in net.nodes
        if (holders == 0).any() or (once and (holders > 1).any()):
            return f"{name}: elements are held by {np.unique(holders).tolist()} ranks"
    return None


def judge(comm: Any, case: Case) -> str | None:
    """Train by the plan on all ranks, and alone on rank 0, which gets the verdict: None, or what is wrong."""
    early = [f"rank {rank}: {note}" for rank, of in enumerate(comm.allgather(rehearse(case, comm.rank))) for note in of]
    if early:
        return early[0]
    data = data_of(case)
    found, notes = trained(comm, case, case.plan, data, Economy(fuse=True))
    both = comm.gather((found, notes))
    if comm.rank:
        return None
    late = [f"rank {rank}: {note}" for rank, (_, of) in enumerate(both) for note in of]
    alone, raised = trained(MPI.COMM_SELF, case, single(case.net), data)
    late += [f"one rank: {note}" for note in raised]
    return late[0] if late else difference(case.net, [blocks for blocks, _ in both], alone)


# --- hypothesis on rank 0 -----------------------------------------------------------------------------------------


class CaseFails(AssertionError):
    """A case on which ranks and one rank differ."""


def drive(
    comm: Any,
    strategy: st.SearchStrategy[Case],
    examples: int,
    seed: int,
    note: Callable[[Case], None] = lambda c: None,
) -> int:
    """Judge `examples` different cases; how many it were, on rank 0. Raises CaseFails with the smallest that fails.

    `note` is told each case, on rank 0. An exception in the midst of communication ends all ranks, with the case.
    """
    if comm.rank:
        while (case := comm.bcast(None)) is not None:
            judge_or_leave(comm, case)
        return 0
    verdicts: dict[str, str | None] = {}
    failed_at: list[float] = []
    fatal: list[CaseFails] = []

    def verdict_of(case: Case) -> str | None:
        key = repr(case)
        if fatal:
            raise fatal[0]
        if key not in verdicts:
            if monotonic() > failed_at[0] + SHRINKING if failed_at else len(verdicts) >= examples:
                return None
            comm.bcast(case)
            try:
                verdicts[key] = judge_or_leave(comm, case)
            except CaseFails as error:
                fatal.append(error)
                raise
            note(case)
        return verdicts[key]

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=3 * examples,  # some are drawn twice
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        suppress_health_check=list(hypothesis.HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )
    @hypothesis.given(strategy)
    def trial(case: Case) -> None:
        if (verdict := verdict_of(case)) is not None:
            failed_at[:] = failed_at or [monotonic()]
            raise CaseFails(f"{verdict}\n{case}")

    try:
        trial()
    finally:
        if not fatal:  # else the others are stuck: the report of this failure ends them
            comm.bcast(None)
    return len(verdicts)


def judge_or_leave(comm: Any, case: Case) -> str | None:
    """`judge`; an exception out of it is one in the midst of communication, and says on which case."""
    try:
        return judge(comm, case)
    except Exception as error:
        raise CaseFails(f"ended all ranks in the midst of communication: {error!r}\n{case}") from error
