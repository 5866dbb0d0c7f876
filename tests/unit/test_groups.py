"""Groups of layers that share a partition, and the partitions that the search looks at, against enumeration."""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np
import pytest
from networks import NETWORKS, residual

from hpctrain.errors import PlanError
from hpctrain.graph import Graph
from hpctrain.layers import MSE, Conv, Dense, Flatten, GlobalAvgPool, MaxPool, ReLU
from hpctrain.machine import Machine
from hpctrain.models import Sample, alexnet, inception, resnet, unet3d
from hpctrain.partition import AXES, Partition
from hpctrain.planner.groups import ALL, Group, as_partition, candidates, chosen, follow, groups, head_layers
from hpctrain.planner.layout import edges, layouts
from hpctrain.planner.plan import Plan, extents
from hpctrain.planner.schedule import LEAN, schedule
from hpctrain.planner.setting import Setting

SETTING = Setting(Machine(), fewer="none")

SHORTCUT = """x
conv1 norm1 relu1
pool1
layer1.0.conv1 layer1.0.norm1 layer1.0.relu1
layer1.0.conv2 layer1.0.norm2 layer1.0.add layer1.0.relu2
layer1.1.conv1 layer1.1.norm1 layer1.1.relu1
layer1.1.conv2 layer1.1.norm2 layer1.1.add layer1.1.relu2
layer2.0.conv1 layer2.0.norm1 layer2.0.relu1
layer2.0.conv2 layer2.0.norm2 layer2.0.add layer2.0.relu2
layer2.0.shortcut.conv layer2.0.shortcut.norm"""
"""How ResNet-18 begins."""


def models() -> dict[str, Graph]:
    """Networks of every kind of connection."""
    return {name: build() for name, build in NETWORKS.items()} | {
        "resnet": resnet.build(5, Sample((65, 63, 3), classes=7)),
        "resnet50": resnet.build(4, Sample((64, 64, 3), classes=8), depth=50),
        "inception": inception.build(3, Sample((75, 75, 3), classes=7), width=0.1),
        "alexnet": alexnet.build(6, Sample((67, 67, 3), classes=5), hidden=24, width=0.1),
        "unet3d": unet3d.build(2, Sample((8, 9, 12, 1), classes=2, positions=(8, 9, 12)), filters=2, levels=3),
    }


def of(graph: Graph, name: str) -> Group:
    return next(group for group in groups(graph) if name in group.names)


# --- groups ------------------------------------------------------------------------------------------------------


def test_convolutions_keep_norms_additions_and_activations_that_follow_them() -> None:
    found = [" ".join(group.names) for group in groups(models()["resnet"])]
    assert found[: len(SHORTCUT.splitlines())] == SHORTCUT.splitlines()
    assert found[-4:] == ["average", "fc", "y", "loss"]


def test_dropout_follows_what_it_reads_and_a_tensor_read_twice_ends_a_group() -> None:
    net = models()["alexnet"]
    assert of(net, "dropout1").names == ("flatten", "dropout1")
    assert of(net, "dropout2").names == ("fc1", "relu_fc1", "dropout2")
    twice = groups(residual())
    assert {" ".join(group.names) for group in twice} >= {"conv norm add", "side", "twice relu", "stem"}


def test_what_a_global_pool_leaves_is_cut_on_its_own() -> None:
    """Its channels are dealt out to the ranks of all positions in an order that no single axis gives."""
    net = Graph()
    x = net.add("pool", GlobalAvgPool(), net.add("conv", Conv(6, 3), net.input("x", (4, 7, 9, 3))))
    net.add("loss", MSE(), net.add("relu", ReLU(), x), net.input("y", (4, 6)))
    assert [group.names for group in groups(net)] == [("x",), ("conv",), ("pool",), ("relu",), ("y",), ("loss",)]


@pytest.mark.parametrize("name", models())
def test_groups_hold_every_layer_once_and_all_that_runs_as_one(name: str) -> None:
    net = models()[name]
    found = groups(net)
    assert sorted(n for group in found for n in group.names) == sorted(net.nodes)
    for unit in schedule(net, layouts(net, Plan({node.name: Partition() for node in net})), LEAN).units:
        assert set(unit.names) <= set(of(net, unit.head).names)


@pytest.mark.parametrize("name", models())
def test_within_a_group_nothing_moves(name: str, seed: int) -> None:
    """Of random candidates, on even and odd numbers of ranks; of the same network every layer is cut as planned."""
    net, rng = models()[name], np.random.default_rng(seed)
    found = groups(net)
    for ranks in (2, 3, 12) if len(found) < 30 else (6,):
        states = {group.head: candidates(net, group, ranks, SETTING) for group in found}
        plan = Plan(chosen(net, found, {head: rows[rng.integers(len(rows))] for head, rows in states.items()}))
        plan.check(net)
        for edge in edges(net, plan):
            if edge.slot is not None and net[edge.consumer].inputs[edge.slot] in of(net, edge.consumer).names:
                assert edge.have.boxes == edge.want.boxes, f"{edge.consumer} on {ranks} ranks: {plan.partitions}"


def test_an_inception_module_reduces_to_its_two_ends() -> None:
    """Taking out nodes with one edge in and one out, and joining parallel edges, as the paper does."""
    net = inception.build(3, Sample((75, 75, 3), classes=7), width=0.1)
    module = [group for group in groups(net) if group.head.startswith("mixed6b")]
    head = {name: group.head for group in groups(net) for name in group.names}
    links = {(head[s], group.head) for group in module for name in group.names for s in net[name].inputs}
    links = {(u, v) for u, v in links if u != v}
    assert len(module) == 12
    for inner in [group.head for group in module if group.head != "mixed6b.concat"]:
        before, after = [u for u, v in links if v == inner], [v for u, v in links if u == inner]
        assert len(before) == len(after) == 1
        links = {link for link in links if inner not in link} | {(before[0], after[0])}
    assert links == {("mixed6a.concat", "mixed6b.concat")}


# --- candidates --------------------------------------------------------------------------------------------------


def allowed(net: Graph, group: Group, row: tuple[int, ...]) -> bool:
    """Whether a plan may cut the group like this: the head so, the others so that they own what they read."""
    partition = Partition(*row)
    try:
        plan = Plan({name: as_partition(follow(net, group, name, np.array([row]))[0]) for name in group.names})
        rest = {node.name: Partition() for node in net}
        Plan(rest | plan.partitions).check(net)
    except PlanError:
        return False
    places = layouts(net, Plan(rest | plan.partitions))
    own = places[group.head].output
    return partition.size > 0 and all(places[name].output.boxes == own.boxes for name in group.names)


@pytest.mark.parametrize(("name", "ranks"), [("lenet", 6), ("residual", 4), ("cosmoflow", 8), ("several losses", 12)])
def test_candidates_are_all_partitions_that_leave_no_block_empty(name: str, ranks: int) -> None:
    net, count = NETWORKS[name](), 0
    for group in groups(net):
        rows = product(*([n for n in range(1, ranks + 1) if ranks % n == 0] for _ in AXES))
        expected = {row for row in rows if prod(row) == ranks and allowed(net, group, row)}
        found = [tuple(row) for row in candidates(net, group, ranks, SETTING).tolist()]
        assert len(set(found)) == len(found)
        if expected:
            assert set(found) == expected, group.head
            count += len(found)
    assert count > 40


def test_where_not_all_ranks_find_work_the_most_do() -> None:
    net = Graph()
    net.add("loss", MSE(), net.add("fc", Dense(3), net.input("x", (3, 2))), net.input("y", (3, 3)))
    found = {group.head: candidates(net, group, 8, SETTING) for group in groups(net)}
    assert found["x"].prod(1).tolist() == [6, 4]  # batch=3, channel=2; and what divides 8
    assert set(found["fc"].prod(1)) == {8} or set(found["fc"].prod(1)) == {6, 4}
    assert found["y"].prod(1).max() == 6 or 8 in found["y"].prod(1)


def test_fewer_ranks_where_the_setting_says() -> None:
    net = models()["resnet"]
    sizes = {
        fewer: {
            g.head: set(candidates(net, g, 12, Setting(Machine(), fewer=fewer)).prod(1).tolist()) for g in groups(net)
        }
        for fewer in ("none", "head", "all")
    }
    smaller = {1, 2, 3, 4, 6, 8, 12}
    assert sizes["none"]["conv1"] == {12} == sizes["head"]["conv1"]
    assert sizes["all"]["conv1"] == smaller
    assert sizes["head"]["fc"] == sizes["head"]["average"] == smaller
    assert max(sizes["none"]["loss"]) == 5


def test_the_head_begins_at_the_last_pooling_and_holds_the_targets() -> None:
    net = models()["alexnet"]
    assert {"pool5", "average", "flatten", "fc1", "y", "loss"} <= head_layers(net)
    assert not {"x", "conv5", "relu5", "pool2"} & head_layers(net)
    assert head_layers(models()["unet3d"]) == {"loss", "y"}


def test_only_the_axes_that_are_allowed_are_cut() -> None:
    net = models()["resnet"]
    setting = Setting(Machine(), fewer="none", only={"Conv": ("batch", "height"), "Dense": ("channel",)})
    found = candidates(net, of(net, "layer1.0.conv1"), 4, setting)
    assert {as_partition(row) for row in found} == {
        Partition(height=4),
        Partition(batch=2, height=2),
        Partition(batch=4),
    }
    assert {as_partition(row) for row in candidates(net, of(net, "fc"), 6, setting)} == {Partition(channel=6)}


def test_an_axis_that_a_layer_lacks_leaves_it_on_one_rank() -> None:
    net = models()["resnet"]
    setting = Setting(Machine(), fewer="none", only={"Dense": ("height",)})
    assert candidates(net, of(net, "fc"), 6, setting).tolist() == [[1] * 6]


@pytest.mark.parametrize("ranks", [128, 4096])
def test_many_ranks_have_few_candidates_without_empty_blocks(ranks: int) -> None:
    net = resnet.build(4096, Sample((224, 224, 3), classes=1000), depth=50)
    assert ranks > ALL
    for group in groups(net):
        found = candidates(net, group, ranks, Setting(Machine(), fewer="none"))
        assert 1 <= len(found) <= 700
        for row in found[:: max(1, len(found) // 5)]:
            for name in group.names:
                own = as_partition(follow(net, group, name, row[None])[0])
                assert all(n <= extents(net[name])[axis] for axis, n in own.parts().items())
        assert found.prod(1).max() == ranks or not net[group.head].shape[1:-1]
        if group.head.endswith("conv2"):
            rows = {as_partition(row) for row in found}
            assert {Partition(batch=ranks), Partition(batch=ranks // 4, height=2, width=2)} <= rows


def test_candidates_on_many_ranks_hold_the_cubes_and_the_slabs_of_volumes() -> None:
    net = Graph()
    x = net.add("conv", Conv(8, 3, padding=1), net.input("x", (16, 64, 64, 64, 4)))
    x = net.add("fc", Dense(4), net.add("flatten", Flatten(), net.add("pool", MaxPool(8), x)))
    net.add("loss", MSE(), x, net.input("y", (16, 4)))
    rows = {as_partition(row) for row in candidates(net, of(net, "conv"), 512, SETTING)}
    assert Partition(depth=8, height=8, width=8) in rows
    assert Partition(batch=8, depth=4, height=4, width=4) in rows
    assert Partition(batch=16, depth=32) in rows
    assert Partition(batch=8, depth=64) in rows
    assert Partition(depth=2, height=4, width=64) not in rows
