"""The price of a plan, against figures worked out by hand and what layouts say is sent."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from msgspec.structs import replace as changed

from hpctrain import models
from hpctrain.graph import Graph
from hpctrain.layers import BatchNorm, Conv, Dense, Flatten, ReLU
from hpctrain.machine import Compute, Copies, Level, Machine, Storage
from hpctrain.models import Sample, finish, start
from hpctrain.partition import Partition
from hpctrain.planner.cost import PlanCost, price
from hpctrain.planner.layout import edges, sent_bytes
from hpctrain.planner.plan import Plan, uniform
from hpctrain.planner.schedule import KEEP, Economy
from hpctrain.planner.setting import Setting

FLOPS, BANDWIDTH = 1e9, 1e30
"""Bandwidth beyond all others, so that only operations count."""

MACHINE = Machine(
    name="test",
    node=Level(0.0, 1e-9, 0.0),
    compute=Compute(FLOPS, BANDWIDTH),
    copies=Copies(1e-6, 1e-9),
    storage=Storage(read=1e6, write=1e6),
    update=1e-9,
    step=1e-4,
)
FAR = changed(MACHINE, per_host=1, copies=None, network=Level(0.0, 1e-8, 0.0))
"""Every rank on a host of its own."""


def dense(batch: int, inputs: int, units: int) -> Graph:
    net, x = start(batch, sample := Sample((inputs,), classes=units))
    return finish(net, net.add("fc", Dense(units, bias=False), x), sample)


def convolution() -> Graph:
    net, x = start(6, sample := Sample((11, 7, 3), classes=5))
    x = net.add("conv1", Conv(4, kernel=3, padding=1), x)
    x = net.add("norm1", BatchNorm(), x)
    x = net.add("relu1", ReLU(), x)
    x = net.add("conv2", Conv(8, kernel=5, padding=2), x)
    x = net.add("flatten", Flatten(), x)
    return finish(net, net.add("fc", Dense(5), x), sample)


def cost(graph: Graph, grid: dict[str, int], machine: Machine = MACHINE, **more: object) -> PlanCost:
    return price(graph, uniform(graph, Partition.of(grid)), replace(Setting(machine), **more))


def layer(found: PlanCost, name: str):
    return next(row for row in found.layers if row.name == name)


def test_dense_layer_alone() -> None:
    """Forward 2 N C U operations; backward, whose input has no gradient, as many."""
    found = cost(dense(6, 10, 4), {})
    assert layer(found, "fc").compute_forward == pytest.approx(2 * 6 * 10 * 4 / FLOPS)
    assert layer(found, "fc").compute_backward == pytest.approx(2 * 6 * 10 * 4 / FLOPS)
    assert found.update == pytest.approx(4 * 10 * 4 * 1e-9)
    assert found.input == pytest.approx(4 * (6 * 10 + 6) / 1e6)
    assert found.allreduce == found.halo == found.redistribution == 0
    assert found.step == 1e-4


def test_data_parallel_dense_layer_sums_its_weights_by_the_ring() -> None:
    found = cost(dense(6, 10, 4), {"batch": 2}, FAR, allreduce="ring", overlap=False)
    assert found.allreduce == pytest.approx(2 * (2 - 1) / 2 * 160 * 1e-8)
    assert layer(found, "fc").allreduce == found.allreduce
    assert found.hidden == 0


def test_model_parallel_dense_layer_gathers_inputs_and_sums_nothing() -> None:
    """Each of 2 ranks owns half of x, wants it whole: 6 x 5 words; the loss then wants all 4 outputs of its 3 rows."""
    graph = dense(6, 10, 4)
    plan = uniform(graph, Partition(channel=2))
    found = price(graph, plan, Setting(FAR))
    assert found.allreduce == 0
    sent = sum(sum(sent_bytes(edge, rank, np.dtype(np.float32))) for edge in edges(graph, plan) for rank in range(2))
    assert found.sent_bytes == sent > 0
    into = layer(found, "fc")
    assert into.halo_forward + into.redistribution_forward == pytest.approx(6 * 5 * 4 * 1e-8)
    assert into.halo_backward + into.redistribution_backward == 0  # nothing before it is trained


@pytest.mark.parametrize("grid", [{"batch": 3}, {"height": 3}, {"batch": 2, "width": 2}, {"channel": 2, "height": 2}])
@pytest.mark.parametrize("economy", [KEEP, Economy(fuse=True, reuse=True)])
def test_bytes_are_those_of_the_layouts(grid: dict[str, int], economy: Economy) -> None:
    graph = convolution()
    plan = uniform(graph, Partition.of(grid))
    found = price(graph, plan, Setting(MACHINE, economy=economy))
    sent = sum(
        sum(sent_bytes(edge, rank, np.dtype(np.float32))) for edge in edges(graph, plan) for rank in range(plan.ranks)
    )
    assert found.sent_bytes == sent


def test_halo_of_a_convolution_cut_in_height() -> None:
    """conv2 of 5 x 5 on 11 rows cut into 6 and 5: each rank reads 2 rows of 7 x 4 of 6 samples, twice over a step."""
    found = layer(cost(convolution(), {"height": 2}, changed(MACHINE, copies=Copies(1e-6, 1e-9))), "conv2")
    assert found.halo_forward == pytest.approx(1e-6 + 6 * 2 * 7 * 4 * 4 * 1e-9)
    assert found.halo_backward == pytest.approx(1e-6 + 6 * 2 * 7 * 4 * 4 * 1e-9)
    assert found.redistribution == 0


def test_phases_add_up_and_layers_share_the_sums() -> None:
    found = cost(convolution(), {"batch": 2, "height": 2})
    assert sum(found.phases().values()) == pytest.approx(found.seconds)
    assert sum(row.allreduce for row in found.layers) == pytest.approx(found.allreduce) != 0
    assert layer(found, "norm1").statistics > 0
    assert layer(found, "relu1").compute == 0, "it runs within the norm"


def test_parts_of_a_batch_repeat_all_but_the_sums_and_the_update() -> None:
    one, three = (cost(convolution(), {"batch": 2}, parts=parts) for parts in (1, 3))
    assert three.compute == pytest.approx(3 * one.compute)
    assert three.input == pytest.approx(3 * one.input)
    assert (three.allreduce, three.update, three.step) == (one.allreduce, one.update, one.step)
    assert three.sent_bytes == 3 * one.sent_bytes


def test_recomputing_runs_forward_twice_but_for_what_is_kept() -> None:
    graph = convolution()
    plain = cost(graph, {"height": 2}, economy=Economy(fuse=True, reuse=True))
    again = cost(graph, {"height": 2}, economy=Economy(fuse=True, reuse=True, recompute=2))
    forward = {row.name: row.compute_forward for row in plain.layers}
    more = {row.name: row.compute - layer(plain, row.name).compute for row in again.layers}
    assert more["conv1"] == pytest.approx(forward["conv1"])
    assert more["fc"] == 0
    assert again.sent_bytes > plain.sent_bytes


def test_sums_hide_behind_backward_only_between_hosts() -> None:
    """fc's sum of 0.4 s starts when its backward ends; conv2's and conv1's backward then take longer."""
    graph = convolution()
    slow = changed(FAR, network=Level(0.0, 1e-8, 0.0), compute=Compute(1e7, BANDWIDTH))
    seen = cost(graph, {"batch": 2}, slow, allreduce="ring", bucket_bytes=1)
    blind = cost(graph, {"batch": 2}, slow, allreduce="ring", bucket_bytes=1, overlap=False)
    assert blind.hidden == 0
    assert 0 < seen.hidden < seen.allreduce
    last = layer(seen, "conv1")
    assert seen.allreduce - seen.hidden == pytest.approx(last.allreduce), "only the first layer's sum is left over"
    assert cost(graph, {"batch": 2}, MACHINE).hidden == 0


def test_layers_that_use_fewer_ranks() -> None:
    graph = dense(6, 10, 4)
    plan = Plan({"x": Partition(batch=2), "y": Partition(), "fc": Partition(), "loss": Partition()})
    found = price(graph, plan, Setting(MACHINE))
    assert layer(found, "fc").compute_forward == pytest.approx(2 * 6 * 10 * 4 / FLOPS)
    assert layer(found, "fc").redistribution_forward == pytest.approx(1e-6 + 3 * 10 * 4 * 1e-9), "its own half stays"
    assert found.allreduce == 0


def test_more_bandwidth_never_costs() -> None:
    graph = models.build("lenet", 12, Sample((28, 28, 1), classes=10), {})
    grids = [{"batch": 4}, {"height": 4}, {"channel": 2, "batch": 2}]
    for grid in grids:
        slow, fast = (cost(graph, grid, changed(FAR, network=Level(1e-6, beta, 0.0))).seconds for beta in (1e-8, 1e-9))
        assert fast < slow


def test_a_step_has_its_share_of_the_next_checkpoint() -> None:
    """10 x 4 weights and their momentum at 1 MB/s, every 5 steps; each of 2 ranks of a cut by channel writes half."""
    graph = dense(6, 10, 4)
    assert cost(graph, {}, save_every=5).checkpoint == pytest.approx(2 * 160 / 1e6 / 5)
    assert cost(graph, {"channel": 2}, save_every=5).checkpoint == pytest.approx(160 / 1e6 / 5)
    assert cost(graph, {}).checkpoint == 0
