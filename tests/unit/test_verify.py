"""What `verify` decides without ranks: which layers to sample on which shapes, how exact to be, and what to print."""

from __future__ import annotations

import json
import random
from math import inf, isfinite, prod

import numpy as np
import pytest
from networks import NETWORKS

from hpctrain import models
from hpctrain.config import Config, Data, Model, Optim, Run, Train
from hpctrain.console import WIDTH
from hpctrain.errors import PlanError
from hpctrain.graph import Graph
from hpctrain.layers import MSE, BatchNorm, Conv, Dense, Dice, Flatten, Input, MaxPool, ReLU, SoftmaxCrossEntropy
from hpctrain.models import Sample
from hpctrain.partition import Partition, whole
from hpctrain.planner import memory
from hpctrain.planner.plan import Plan, uniform
from hpctrain.verify import table
from hpctrain.verify.compare import KINDS, Finding
from hpctrain.verify.run import draw
from hpctrain.verify.sample import _reduced, samples
from hpctrain.verify.tolerance import FLOAT64, tolerances
from hpctrain.verify.traffic import Traffic

MIB = 2**20


def resnet(grid: Partition) -> tuple[Graph, Plan]:
    """ResNet-18 for batches of 32 photographs."""
    net = models.build("resnet18", 32, Sample((224, 224, 3), classes=1000), {})
    return net, uniform(net, grid)


# --- sampled layers -----------------------------------------------------------------------------------------------


def test_samples_fit_the_budget_and_keep_layers_and_cuts() -> None:
    net, plan = resnet(Partition(batch=2, height=3))
    found = list(samples(net, plan, 64 * MIB, "float64"))
    covered = [name for sample in found for name in (sample.name, *sample.alike)]
    assert sorted(covered) == sorted(node.name for node in net if not isinstance(node.layer, Input))
    assert any(sample.alike for sample in found)
    for sample in found:
        alone = Plan({node.name: Partition() for node in sample.graph})
        assert memory.predict(sample.graph, alone, [0], "float64", backend="reference")[0].total <= 64 * MIB
        node = sample.graph[sample.name]
        assert node.layer == net[sample.name].layer
        assert sample.plan.partitions[sample.name] == plan.partitions[sample.name]
        assert [sample.plan.partitions[name] for name in node.inputs] == [
            plan.partitions[name] for name in net[sample.name].inputs
        ]
        for shape, full in zip(sample.shapes, sample.full, strict=True):
            assert all(0 < n <= most for n, most in zip(shape, full, strict=True))
            assert len(shape) == 1 or shape[-1] == full[-1] or isinstance(node.layer, Dense)
            assert shape[0] >= plan.partitions[sample.name].batch
            if len(shape) == 4:
                assert shape[1] >= min(full[1], 6)  # two rows for each of the 3 blocks


def test_a_producer_that_is_cut_otherwise_makes_another_sample() -> None:
    net = Graph()
    x = net.input("x", (4, 9, 7, 3))
    for i in range(3):
        x = net.add(f"relu{i}", ReLU(), net.add(f"conv{i}", Conv(3, kernel=3, padding=1), x))
    net.add("loss", MSE(), net.add("flat", Flatten(), x), net.input("y", (4, 189)))
    two = Partition(height=2)
    plan = uniform(net, two)
    alike = {sample.name: sample.alike for sample in samples(net, plan, 64 * MIB, "float64")}
    # the first convolution reads an input
    assert alike == {"conv0": (), "relu0": ("relu1", "relu2"), "conv1": ("conv2",), "flat": (), "loss": ()}
    plan = Plan(plan.partitions | {"relu1": Partition(width=2)})
    alike = {sample.name: sample.alike for sample in samples(net, plan, 64 * MIB, "float64")}
    assert alike["relu0"] == ("relu2",)
    assert alike["conv1"] == alike["relu1"] == ()


def test_axes_that_share_a_dim_leave_no_block_empty_in_a_sample() -> None:
    """Flat elements are dealt to rows and channels together: 3 x 40 blocks need 120 elements, not 40."""
    net = Graph()
    flat = net.add("flat", Flatten(), net.input("x", (2, 21, 17, 8)))
    net.add("loss", MSE(), flat, net.input("y", net[flat].shape))
    one = Partition()
    cut = Partition(height=3, channel=40)
    plan = Plan({"x": one, "flat": cut, "y": one, "loss": one})
    plan.check(net)
    sample = next(samples(net, plan, 30 * 2**10, "float64"))
    assert prod(sample.shapes[0][1:]) >= 120, sample.shapes
    Plan({**sample.plan.partitions, "flat": cut}, empty_blocks=False).check(sample.graph)
    with pytest.raises(PlanError, match=r"layer flat: on the smallest inputs .*, \(2, 21, 2, 4\), it needs"):
        next(samples(net, plan, 20 * 2**10, "float64"))


def test_budget_too_small_names_the_layer_and_what_it_needs() -> None:
    net = Graph()
    x = net.add("wide", Dense(50_000), net.input("x", (4, 1000)))
    net.add("loss", MSE(), x, net.input("y", (4, 50_000)))
    with pytest.raises(
        PlanError, match=r"layer wide: on the smallest inputs.*needs [\d.]+ MiB; give --budget \d+"
    ) as said:
        list(samples(net, uniform(net, Partition(batch=2)), MIB, "float64"))
    budget = int(str(said.value).split()[-1])
    assert [s.name for s in samples(net, uniform(net, Partition(batch=2)), budget * MIB, "float64")] == ["wide", "loss"]


def test_reduced_extents(seed: int) -> None:
    rng, count = random.Random(seed), 0
    for _ in range(2000):
        n, blocks, least = rng.randint(2, 400), (rng.randint(1, 5), rng.randint(1, 5)), rng.randint(1, 30)
        m = _reduced(n, blocks, least)
        if m is None:
            assert n <= least + 1
            continue
        count += 1
        assert least <= m < n
        if n >= 300 and least <= 30:  # room for all remainders: 12 * lcm(blocks) <= 240
            assert (n - m) % 2 == 0
    print(f"seed {seed}, {count} extents reduced")
    assert _reduced(224, (2, 3), 6) == 104  # leaves 8 by 12, as 224 does
    assert _reduced(25, (2,), 4) == 13


# --- tolerances ---------------------------------------------------------------------------------------------------


def test_tolerances_of_float64_are_one_number() -> None:
    net, _ = resnet(Partition())
    assert {t.output for t in tolerances(net, "float64").values()} == {FLOAT64}


def test_tolerances_of_float32_grow_on_the_way() -> None:
    net = Graph()
    x = net.add("first", Conv(8, kernel=3, padding=1), net.input("x", (2, 9, 9, 4)))
    x = net.add("second", Conv(8, kernel=3, padding=1), net.add("relu", ReLU(), x))
    net.add("loss", MSE(), x, net.input("y", (2, 9, 9, 8)))
    found = tolerances(net, "float32")
    eps = 2.0**-23
    assert found["first"].output == pytest.approx(8 * eps * (9 * 4 + 1) ** 0.5, rel=0.2)
    assert found["first"].output < found["relu"].output < found["second"].output < 1e-4
    assert found["second"].gradient < 1e-4 < found["relu"].gradient < 0.05  # through a kink
    assert (found["second"].mean_square, found["relu"].mean_square, found["first"].mean_square) == (False, True, True)
    assert all(isfinite(t.gradient) for t in found.values())


# --- batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_batches_are_labels_or_numbers_and_change_every_step(name: str) -> None:
    net = NETWORKS[name]()
    for node in net:
        if not isinstance(node.layer, Input):
            continue
        drawn = [draw(net, node, 3, step, whole(node.shape)) for step in (0, 1)]
        assert drawn[0].shape == node.shape
        assert (drawn[0] != drawn[1]).any()
        if node.layer.integer:
            classes = net[net.consumers(node.name)[0][0].inputs[0]].shape[-1]
            assert drawn[0].min() >= 0
            assert drawn[0].max() < classes
        elif node.name == "y":
            assert 0 <= drawn[0].min() <= drawn[0].max() < 1
        else:
            assert drawn[0].min() < -1


def test_one_in_eight_labels_is_the_one_that_losses_ignore() -> None:
    """Unless another loss on these labels refuses it; and each box is its part of the whole."""
    for layers, expected in (
        ([SoftmaxCrossEntropy(ignore=255)], 255),
        ([Dice(ignore=-1), SoftmaxCrossEntropy(ignore=-1)], -1),
        ([SoftmaxCrossEntropy(ignore=255), Dice()], None),
        ([SoftmaxCrossEntropy(), Dice()], None),
    ):
        net = Graph()
        x, y = net.input("x", (3, 41, 37, 5)), net.input("y", (3, 41, 37), integer=True)
        for i, layer in enumerate(layers):
            net.add(f"loss{i}", layer, x, y)
        every = whole(net[y].shape)
        labels = draw(net, net[y], 3, 0, every)
        kept = labels[(labels >= 0) & (labels < 5)]
        assert set(kept.tolist()) == set(range(5))
        assert set(np.unique(labels).tolist()) - set(range(5)) == (set() if expected is None else {expected})
        share = 1 - kept.size / labels.size
        assert share == 0 if expected is None else abs(share - 1 / 8) < 0.02  # 4 standard deviations of 4551 labels
        box = (slice(1, 3), slice(5, 40), slice(0, 7))
        np.testing.assert_array_equal(draw(net, net[y], 3, 0, box), labels[box])


# --- what is printed ----------------------------------------------------------------------------------------------


def finding(layer: str, kind: str, difference: float, **more: object) -> Finding:
    """A finding judged by FLOAT64."""
    return Finding(layer, kind, kind, 0, difference, FLOAT64, **more)  # type: ignore[arg-type]


def printed(net: Graph, plan: Plan, findings: list[Finding], every: bool = False, precision: str = "float64") -> str:
    """The tables and the verdict."""
    rows = table.rows(net, plan, findings, tolerances(net, precision))
    edges = [Traffic(f"some layer -> layer {i}", "x", 10**9, i, 10**9, i, 2, True) for i in range(50)]
    return "\n".join(table.report(rows, edges, every))


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("every", [False, True])
def test_every_line_fits_the_terminal(every: bool, precision: str) -> None:
    net, plan = resnet(Partition(batch=2, depth=1, height=3, width=2))
    findings = [finding(n.name, kind, 1.2e-16) for n in net if n.inputs for kind in KINDS]
    findings[17] = finding("layer4.1.conv1", "output", inf, rank=3, box=whole((32, 7, 7, 512)), at=(1, 2, 3, 4))
    text = printed(net, plan, findings, every, precision)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert text.count("DIFFERS") == 1
    assert ("more layers are equal" in text) == (not every)
    assert len(text.splitlines()) > 100 if every else len(text.splitlines()) < 40


def test_the_first_in_order_of_execution_is_named() -> None:
    net = Graph()
    x = net.add("a", Conv(3, kernel=3, padding=1), net.input("x", (2, 5, 5, 2)))
    x = net.add("c", MaxPool(2), net.add("b", BatchNorm(), x))
    net.add("loss", MSE(), net.add("flat", Flatten(), x), net.input("y", (2, 12)))
    plan = uniform(net, Partition(height=2))
    order = [finding("b", "output", 0.0), finding("c", "input_gradient", 3e-3), finding("a", "weight_gradient", 0.5)]
    text = " ".join(printed(net, plan, order).split())
    assert "c (MaxPool, height=2) is the first layer that differs, in step 1" in text
    assert "largest difference 3e-3, tolerance 1e-10" in text
    assert "b BatchNorm h2 0 - - - 1e-10 ok" in text
    assert "Blocks: h height." in text


def test_records_are_flat_json() -> None:
    net, plan = resnet(Partition(height=2))
    config = Config(
        model=Model(name="resnet18"),
        data=Data(train="nowhere"),
        optim=Optim(lr=0.1),
        train=Train(epochs=1, batch=32),
        run=Run(folder="nowhere"),
    )
    rows = table.rows(net, plan, [finding("conv1", "output", 1e-17)], tolerances(net, "float64"))
    edges = [Traffic("x -> conv1", "conv1", 5, 0, 6, 0, 2, False)]
    layer, edge, summary = json.loads(json.dumps(table.records(config, 2, rows, edges)))
    assert (layer["layer"], layer["output"], layer["weights"], layer["equal"]) == ("conv1", 1e-17, None, True)
    assert (edge["edge"], edge["forward_bytes"], edge["predicted_forward_bytes"]) == ("x -> conv1", 5, 6)
    assert summary["equal"] is False
    assert "x -> conv1 is the first of 1 edges" in summary["verdict"]
    assert all(not isinstance(v, dict | list) for record in (layer, edge, summary) for v in record.values())
