"""`verify` finds every plan that computes something else, or moves other bytes, and no other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from networks import CASES, NETWORKS, network, random_plan, with_loss, with_partitions

from hpctrain.backends.reference import Reference
from hpctrain.comm.exchange import Way
from hpctrain.config import Optim
from hpctrain.graph import Graph
from hpctrain.layers import BatchNorm, Conv, Phase, Place, ReLU
from hpctrain.layers.conv import ConvOp
from hpctrain.parameters import Parameters
from hpctrain.partition import Partition
from hpctrain.planner.plan import Plan
from hpctrain.verify import command, table
from hpctrain.verify import traffic as traffics
from hpctrain.verify.run import Settings
from hpctrain.verify.sample import samples

OPTIM = Optim(lr=0.05, momentum=0.9, weight_decay=0.01)
HEIGHT = Partition(height=3)


def verified(
    comm: Any, net: Graph, plan: Plan, precision: str = "float64", steps: int = 2
) -> tuple[list[table.Row], list[traffics.Traffic]]:
    """The rows and edges that rank 0 would print; nothing on other ranks."""
    settings = Settings(Reference(), precision, 3, OPTIM)
    found = command.check(comm, MPI.COMM_SELF, net, plan, settings, steps)
    return table.rows(net, plan, found.findings, found.limits), found.traffic


def sampled(comm: Any, net: Graph, plan: Plan, budget: int = 2**20) -> list[table.Row]:
    """The rows of --sample-layers on rank 0."""
    rows = []
    for sample in samples(net, plan, budget, "float64"):
        settings = Settings(Reference(), "float64", 3, OPTIM)
        found = command.check(comm, MPI.COMM_SELF, sample.graph, sample.plan, settings, 1)
        rows += table.sample_rows(sample, found.findings, found.limits)
    return rows


def differing(rows: Sequence[table.Row]) -> list[str]:
    """The layers that differ."""
    return [row.layer for row in rows if not row.equal]


def chain() -> Graph:
    """conv1 -> relu -> conv2 -> norm -> loss; the bias of conv2 has no effect, so that its gradient is all rounding."""
    net = Graph()
    x = net.add("conv1", Conv(5, kernel=3, padding=1), net.input("x", (3, 13, 7, 2)))
    x = net.add("conv2", Conv(4, kernel=3, padding=1), net.add("relu", ReLU(), x))
    return with_loss(net, net.add("norm", BatchNorm(), x))


# --- no false alarms ----------------------------------------------------------------------------------------------


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_equal_on_random_plans(comm: Any, name: str, precision: str, seed: int) -> None:
    net, rng = NETWORKS[name](), np.random.default_rng(seed)
    rows, edges = verified(comm, net, random_plan(rng, net, comm.size), precision)
    assert differing(rows) == []
    assert all(edge.equal for edge in edges)
    if comm.rank == 0:
        assert {row.layer for row in rows} == {node.name for node in net if node.inputs}
        compared = {kind for row in rows for kind in row.differences}
        assert compared == {"output", "input_gradient", "weight_gradient", "weights"}
        assert table.verdict(rows, edges).startswith("equal")


@pytest.mark.parallel([3])
@pytest.mark.parametrize("case", CASES)
def test_sampled_layers_are_equal(comm: Any, case: str, seed: int) -> None:
    net = network(case)
    rows = sampled(comm, net, random_plan(np.random.default_rng(seed), net, comm.size))
    assert differing(rows) == []
    assert comm.rank > 0 or "layer" in {row.layer for row in rows}


@pytest.mark.parallel([3])
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_gradient_that_is_all_rounding_is_no_difference(comm: Any, precision: str) -> None:
    net = chain()
    rows, _ = verified(comm, net, with_partitions(net, {}, HEIGHT), precision, steps=3)
    assert differing(rows) == []


# --- planted errors -----------------------------------------------------------------------------------------------


class ShiftedConvOp(ConvOp):
    """Reads a wrong halo above blocks that are not at the border: the row below it, twice."""

    def __init__(self, layer: Conv, place: Place) -> None:
        super().__init__(layer, place)
        self.wrong = layer.filters == 4 and place.inputs[0][1].start > 0

    def forward(self, x: Sequence[Any], w: Mapping[str, Any], y: Any, phase: Phase) -> None:
        (mine,) = x
        if self.wrong:
            mine = mine.copy()
            mine[:, 0] = mine[:, 1]
        super().forward([mine], w, y, phase)


@pytest.mark.parallel([3])
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_wrong_halo_is_found_and_the_layer_named(comm: Any, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Conv, "bind", lambda self, place: ShiftedConvOp(self, place))
    net = chain()
    rows, edges = verified(comm, net, with_partitions(net, {}, HEIGHT), precision)
    if comm.rank == 0:
        said = " ".join(table.verdict(rows, edges).split())
        assert said.startswith(
            "conv2 (Conv, height=3) is the first layer that differs, in step 1: its output, on rank "
        )
        assert "with box [0:3, " in said
        assert "--sample-layers" in said
        assert "conv1" in differing(rows)  # through gradients
    alone = sampled(comm, net, with_partitions(net, {}, HEIGHT))
    assert differing(alone) == (["conv2"] if comm.rank == 0 else [])


@pytest.mark.parallel([2])
def test_lost_halo_of_a_gradient_is_found(comm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net = chain()
    plan = with_partitions(net, {}, Partition(height=2))
    take = Way._take

    def forgetful(self: Way, to: np.ndarray, source: np.ndarray) -> None:
        """Leaves out what arrives of the gradient of relu's output (3, 13, 7, 5): a row of the neighbour's halo."""
        if not (self._add and to.shape == (3, 1, 7, 5)):
            take(self, to, source)

    monkeypatch.setattr(Way, "_take", forgetful)
    rows, edges = verified(comm, net, plan)
    if comm.rank == 0:
        said = table.verdict(rows, edges)
        assert said.startswith("conv2 (Conv, height=2) is the first layer that differs, in step 1: its")
        assert "gradient of its input relu" in " ".join(said.split())
        assert differing(rows) == ["conv1", "conv2"], "relu runs within conv1"


@pytest.mark.parallel([3])
def test_weights_that_start_otherwise_are_found(comm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Parameters.__init__

    def other(self: Parameters, layouts: Any, rank: int, *rest: Any) -> None:
        make(self, layouts, rank, *rest)
        if rank == 2:
            self.by_name["norm.beta"].array[...] += 1e-6

    monkeypatch.setattr(Parameters, "__init__", other)
    net = chain()
    rows, edges = verified(comm, net, with_partitions(net, {}, HEIGHT))
    if comm.rank == 0:
        said = " ".join(table.verdict(rows, edges).split())
        assert said.startswith("norm (BatchNorm, height=3) is the first layer that differs, in step 1: its output")
        assert "on rank 2" in said


@pytest.mark.parallel([2])
def test_bytes_other_than_predicted_are_a_difference(comm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    count = traffics.sent_bytes

    def fewer(edge: Any, rank: int, itemsize: int) -> tuple[int, int]:
        forward, backward = count(edge, rank, itemsize)
        return forward - 8 * (edge.consumer == "conv2" and rank == 1), backward

    monkeypatch.setattr(traffics, "sent_bytes", fewer)
    net = chain()
    rows, edges = verified(comm, net, with_partitions(net, {}, Partition(height=2)))
    assert differing(rows) == []
    if comm.rank == 0:
        assert [edge.edge for edge in edges if not edge.equal] == ["relu -> conv2"]
        assert table.verdict(rows, edges).startswith("relu -> conv2 is the first of 1 edges to move other bytes")
