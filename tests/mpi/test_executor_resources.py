"""The executor sends the bytes that the planner counts, frees what it takes, and refuses plans that do not fit."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
import pytest
from executing import forward_backward, known, load_weights, serial
from mpi4py import MPI
from networks import NETWORKS, draw, network, random_plan, single, with_loss, with_partitions

from hpctrain.backends.reference import Reference
from hpctrain.comm import grid as grid_module
from hpctrain.comm.grid import ProcessGrid
from hpctrain.errors import BackendUnavailable, PlanError
from hpctrain.executor import Executor
from hpctrain.graph import Graph
from hpctrain.layers import BatchNorm, Conv, Input, Phase, ReLU
from hpctrain.optim.base import runs
from hpctrain.partition import Box, Partition
from hpctrain.planner.layout import edges, sent_bytes
from hpctrain.planner.plan import Plan

PLANS = 4
"""Random plans for every network and number of ranks."""


# --- bytes --------------------------------------------------------------------------------------------------------


def shared(a: Box, b: Box) -> int:
    """Elements in both boxes, counted per dim."""
    return prod(len(range(max(i.start, j.start), min(i.stop, j.stop))) for i, j in zip(a, b, strict=True))


def learns(net: Graph, name: str) -> bool:
    """Whether anything above or at layer `name` has weights."""
    node = net[name]
    own = not isinstance(node.layer, Input) and bool(node.layer.weights(*node.input_shapes))
    return own or any(learns(net, source) for source in node.inputs)


def counted(net: Graph, plan: Plan, rank: int, ranks: int, itemsize: int) -> Iterator[tuple[int, int]]:
    """Bytes that `rank` sends forward and backward, edge by edge, from all pairs of boxes."""
    for edge in edges(net, plan):
        # partial sums flow from their wanters to their owners
        first, last = (edge.have, edge.want) if edge.slot is not None else (edge.want, edge.have)
        source = edge.consumer if edge.slot is None else net[edge.consumer].inputs[edge.slot]
        size = 8 if getattr(net[source].layer, "integer", False) else itemsize
        others = [r for r in range(ranks) if r != rank]
        forward = sum(shared(first.box(rank), last.box(r)) for r in others)
        backward = sum(shared(last.box(rank), first.box(r)) for r in others) if learns(net, source) else 0
        yield forward * size, backward * size


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("name", NETWORKS)
def test_bytes_sent_are_the_bytes_planned(comm: Any, name: str, precision: str, seed: int) -> None:
    net, data, _ = known(name, seed)
    rng, itemsize, total = np.random.default_rng(seed), int(precision[5:]) // 8, 0
    for _ in range(PLANS):
        plan = random_plan(rng, net, comm.size)
        executor = Executor(net, plan, comm, Reference(), precision)
        load_weights(executor, data)
        assert executor.bytes_sent() == 0
        planned = [sent_bytes(edge, comm.rank, np.dtype(precision)) for edge in edges(net, plan)]
        assert planned == list(counted(net, plan, comm.rank, comm.size, itemsize))
        forward, backward = (sum(way) for way in zip(*planned, strict=True))
        for step in range(2):
            forward_backward(executor, data, step)
        assert executor.bytes_sent() == 2 * (forward + backward)
        executor.forward(Phase(training=False))
        assert executor.bytes_sent() == 3 * forward + 2 * backward
        total += comm.allreduce(forward + backward)
        executor.free()
    assert (total > 0) == (comm.size > 1)


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("axis", ["batch", "contraction"])
def test_dead_end_gets_no_gradient_and_adds_none(comm: Any, axis: str, seed: int) -> None:
    """A layer that nothing reads, a probe, sends nothing back: what its buffers happen to hold must not be added."""
    net, probed = network("relu"), network("relu")
    probed.add("probe", Conv(2, kernel=1), "pre")
    data, grid = draw(probed, seed), Partition(height=2)
    plan = with_partitions(probed, {"probe": Partition.of({axis: 2})}, other=grid)
    executor = Executor(probed, plan, comm, Reference(), "float64")
    load_weights(executor, data)
    backward = executor.exchanges["probe", 0].bwd
    if backward is not None:
        backward.dst.fill(np.nan)
        backward.src.fill(np.nan)
    forward_backward(executor, data, 0)
    expected = serial(net, data)["step 0: pre.weight gradient"][1]
    mine = executor.parameters.by_name["pre.weight"]
    np.testing.assert_allclose(mine.gradient, expected[mine.box], rtol=1e-10, atol=1e-10)
    planned = sum(sum(sent_bytes(edge, comm.rank, np.dtype(np.float64))) for edge in edges(probed, plan))
    assert executor.bytes_sent() == planned


# --- what does not fit --------------------------------------------------------------------------------------------


@pytest.mark.parallel([1, 2])
def test_plan_for_more_ranks_than_there_are_is_refused(comm: Any) -> None:
    net = network("dense")
    plan = with_partitions(net, {"layer": Partition(batch=5)})
    with pytest.raises(PlanError, match=f"needs 5 ranks, but there are {comm.size}: start 5"):
        Executor(net, plan, comm, Reference(), "float64")
    with pytest.raises(PlanError, match=f"batch=5 needs 5 ranks, but there are {comm.size}.*or give a smaller grid"):
        ProcessGrid(comm, Partition(batch=5))


@pytest.mark.parallel([1, 2])
def test_unknown_allreduce_precision_and_axis_are_refused(comm: Any) -> None:
    net = network("dense")
    with pytest.raises(PlanError, match=r"'butterfly' does not exist; choose one of ring, .*mpi"):
        Executor(net, Plan(single(net).partitions, "butterfly"), comm, Reference(), "float64")
    with pytest.raises(BackendUnavailable, match=r"no float16, only float32, float64, bf16; set train.precision"):
        Executor(net, single(net), comm, Reference(), "float16")
    with pytest.raises(PlanError, match=r"layer layer: width=2 cuts nothing of it.*batch, channel, contraction"):
        Executor(net, with_partitions(net, {"layer": Partition(width=2)}), comm, Reference(), "float64")


@pytest.mark.parallel([1])
def test_input_that_no_layer_reads_is_named(comm: Any) -> None:
    net = network("dense")
    net.input("mask", (5,))
    with pytest.raises(PlanError, match="mask"):
        Executor(net, single(net), comm, Reference(), "float64").forward()


# --- resources ----------------------------------------------------------------------------------------------------


@pytest.mark.parallel([1, 2, 4])
def test_free_releases_every_communicator(comm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """MPI libraries have room for a few thousand communicators; a search over plans makes many executors."""
    grids: list[ProcessGrid] = []

    class Recorded(ProcessGrid):
        def __init__(self, comm: Any, partition: Partition) -> None:
            super().__init__(comm, partition)
            grids.append(self)

    monkeypatch.setattr(grid_module, "ProcessGrid", Recorded)
    net = network("batch norm")
    plan = with_partitions(net, {}, other=Partition(batch=comm.size))
    executor = Executor(net, plan, comm, Reference(), "float64")
    executor.free()
    assert executor.comm == MPI.COMM_NULL
    assert grids or comm.size == 1
    assert all(grid.comm == MPI.COMM_NULL for grid in grids)


@pytest.mark.parallel([1, 3])
def test_flat_buffers_hold_every_parameter_once_and_say_what_decays(comm: Any) -> None:
    net = Graph()
    x = net.add("conv", Conv(4, kernel=3), net.input("x", (3, 7, 5, 2)))
    x = net.add("norm", BatchNorm(), net.add("again", Conv(3, kernel=3), x))
    with_loss(net, net.add("relu", ReLU(), x))
    grid = Partition(height=comm.size)
    grids = {"conv": grid, "again": grid, "norm": Partition(batch=comm.size)}
    executor = Executor(net, with_partitions(net, grids), comm, Reference(), "float64")
    flat = executor.parameters
    blocks, size = flat.blocks(), sum(block.weights.size for block in flat.blocks())
    for i, block in enumerate(blocks):
        block.weights[...] = sum(other.weights.size for other in blocks[:i]) + np.arange(block.weights.size)
        block.gradients[...] = -block.weights
    seen = np.zeros(size, bool)
    covered = np.zeros(size, bool)
    both = runs(flat.shards())
    assert len(both) == 1 + len(blocks), "a call for all of a group that decay, if any, and one for all that do not"
    for i, where, decay, at in both:
        covered[at] = True
        for name, p in flat.by_name.items():
            inside = np.isin(blocks[i].weights[where], p.array)
            assert not inside.any() or decay == name.endswith(".weight")
    assert covered.all()
    copies = flat.like(np.concatenate([block.weights for block in blocks]), "velocity")
    for (name, p), copied in zip(flat.by_name.items(), copies, strict=True):
        assert copied.name == f"velocity/{name}"
        assert copied.box == p.box
        np.testing.assert_array_equal(copied.array, p.array)
        np.testing.assert_array_equal(p.gradient, -p.array)
        assert not seen[p.array.astype(int)].any()
        seen[p.array.astype(int)] = True
    assert seen.all()
    convolutions = ["again.bias", "again.weight", "conv.bias", "conv.weight"]
    assert sorted(flat.by_name) == [*convolutions, "norm.beta", "norm.gamma"]
    assert [t.name for t in executor.tensors()][-2:] == ["norm.running_mean", "norm.running_var"]
