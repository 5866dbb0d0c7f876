"""The plans that people make by hand, and every uniform grid."""

from __future__ import annotations

from math import prod

import pytest
from networks import residual
from planning import HOST, HOSTS, digits, towers

from hpctrain.graph import Graph
from hpctrain.layers import MSE, Conv, Dense, Flatten
from hpctrain.models import Sample, mlp
from hpctrain.partition import Partition
from hpctrain.planner.baselines import baselines, grids
from hpctrain.planner.cost import price
from hpctrain.planner.plan import Plan
from hpctrain.planner.replicas import replica_groups
from hpctrain.planner.setting import Setting

NAMES = ["data", "model", "domain", "one weird trick", "best uniform grid"]


def plan_of(net: Graph, name: str, ranks: int) -> Plan:
    found = baselines(net, Setting(HOST), ranks)[name]
    assert not isinstance(found, str), found
    return found[0]


def why_not(net: Graph, name: str, ranks: int) -> str:
    found = baselines(net, Setting(HOST), ranks)[name]
    assert isinstance(found, str)
    return found


def test_all_are_there_and_priced_as_any_plan() -> None:
    net, setting = towers(), Setting(HOSTS)
    found = baselines(net, setting, 4)
    assert list(found) == NAMES
    for entry in found.values():
        assert not isinstance(entry, str)
        entry[0].check(net)
        assert entry[1] == price(net, entry[0], setting, 4)


def test_data_parallelism_cuts_the_batch_and_nothing_else() -> None:
    plan = plan_of(towers(), "data", 4)
    assert set(plan.partitions.values()) == {Partition(batch=4)}


def test_data_parallelism_sends_nothing_and_sums_every_weight_once() -> None:
    """Each of P ranks holds all weights: one group, of all bytes."""
    net = towers()
    found = baselines(net, Setting(HOST), 4)["data"]
    assert not isinstance(found, str)
    plan, cost = found
    assert cost.sent_bytes == 0
    (nbytes,) = replica_groups(net, plan, Setting(HOST).dtype).values()
    assert nbytes == 4 * sum(prod(weight.shape) for _, _, weight in net.weights())


def test_model_parallelism_sums_no_gradients() -> None:
    """No rank holds weights that another one holds, where all layers have channels enough."""
    plan = plan_of(mlp.build(5, Sample((9,), classes=8), hidden=(12, 16)), "model", 4)
    assert {plan.partitions[name] for name in ("fc1", "fc2", "out")} == {Partition(channel=4)}


def test_domain_parallelism_cuts_the_longer_side_first() -> None:
    net = Graph()
    x = net.add("conv", Conv(4, 3, padding=1), net.input("x", (2, 8, 64, 3)))
    net.add("loss", MSE(), net.add("fc", Dense(4), net.add("flatten", Flatten(), x)), net.input("y", (2, 4)))
    assert plan_of(net, "domain", 4).partitions["conv"] == Partition(width=4)
    assert plan_of(net, "domain", 32).partitions["conv"] == Partition(height=2, width=16)
    assert plan_of(net, "domain", 4).partitions["fc"] == Partition(channel=4)


def test_one_weird_trick_cuts_the_batch_of_convolutions_and_channels_of_dense_layers() -> None:
    plan = plan_of(towers(), "one weird trick", 4)
    dense = {"fc1", "relu_fc1", "dropout2", "fc2", "relu_fc2", "fc3"}
    assert {plan.partitions[name] for name in dense} == {Partition(channel=4)}
    assert {partition for name, partition in plan.partitions.items() if name not in dense} == {Partition(batch=4)}


def test_where_there_is_none_the_reason_is_said() -> None:
    assert why_not(towers(), "data", 8) == "a batch of 4 cannot be cut over 8 ranks; enlarge train.batch"
    assert "a batch of 4" in why_not(towers(), "one weird trick", 8)
    assert "at most 64" in why_not(towers(), "model", 4096) or "channels" in why_not(towers(), "model", 4096)
    net = mlp.build(8, Sample((9,), classes=8), hidden=(12, 16))
    assert "too few positions" in why_not(net, "domain", 4)
    assert "convolutions and dense" in why_not(net, "one weird trick", 4)


def test_more_ranks_than_anything_can_be_cut_into_have_no_grid() -> None:
    found = baselines(mlp.build(2, Sample((3,), classes=3), hidden=(3,)), Setting(HOST), 97)
    assert all(isinstance(entry, str) for entry in found.values())


@pytest.mark.parametrize("ranks", [1, 4, 6])
def test_grids_are_every_pr_by_pc(ranks: int) -> None:
    net = digits(12)
    found = grids(net, Setting(HOST), ranks)
    divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
    assert {grid.partition.pc for grid in found} == set(divisors)
    assert all(grid.partition.size == ranks for grid in found)
    cut = {(g.partition.pc, g.partition.channel > 1) for g in found}
    assert cut == {(n, channels) for n in divisors for channels in ((False, True) if n < ranks else (False,))}
    best = baselines(net, Setting(HOST), ranks)["best uniform grid"]
    assert not isinstance(best, str)
    assert best[1].seconds == min(grid.cost.seconds for grid in found)


def test_a_grid_of_one_axis_is_its_baseline() -> None:
    net, setting = residual(), Setting(HOST)
    found, priced = {g.partition: g.cost for g in grids(net, setting, 3)}, baselines(net, setting, 3)
    for name, grid in (("data", Partition(batch=3)), ("model", Partition(channel=3))):
        entry = priced[name]
        assert not isinstance(entry, str)
        assert found[grid] == entry[1]
