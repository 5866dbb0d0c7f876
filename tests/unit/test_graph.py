"""Graphs: shapes that follow, edges, and errors that name the layer."""

from __future__ import annotations

import pytest
from networks import network

from hpctrain.errors import PlanError
from hpctrain.graph import Graph
from hpctrain.layers import MSE, Add, Conv, Dense, Flatten, Input, MaxPool, ReLU, SoftmaxCrossEntropy


def residual() -> Graph:
    """A block with a shortcut, and a classifier."""
    net = Graph()
    x = net.add("stem", Conv(4, kernel=3, stride=2, padding=1), net.input("x", (3, 9, 7, 2)))
    y = net.add("relu", ReLU(), net.add("conv", Conv(4, kernel=3, padding=1), x))
    z = net.add("flat", Flatten(), net.add("add", Add(), x, y))
    net.add("loss", SoftmaxCrossEntropy(), net.add("fc", Dense(5), z), net.input("y", (3,), integer=True))
    return net


def test_shapes_follow_from_inputs_and_layers() -> None:
    assert {node.name: node.shape for node in residual()} == {
        "x": (3, 9, 7, 2),
        "stem": (3, 5, 4, 4),
        "conv": (3, 5, 4, 4),
        "relu": (3, 5, 4, 4),
        "add": (3, 5, 4, 4),
        "flat": (3, 80),
        "y": (3,),
        "fc": (3, 5),
        "loss": (3, 3),
    }


def test_every_layer_comes_after_its_inputs() -> None:
    net = residual()
    seen: set[str] = set()
    for node in net:
        assert set(node.inputs) <= seen
        assert node.input_shapes == tuple(net[name].shape for name in node.inputs)
        seen.add(node.name)
    assert seen == set(net.nodes)


def test_consumers_are_all_uses_in_graph_order() -> None:
    net = residual()
    assert [(node.name, slot) for node, slot in net.consumers("stem")] == [("conv", 0), ("add", 0)]
    assert [(node.name, slot) for node, slot in net.consumers("relu")] == [("add", 1)]
    assert [(node.name, slot) for node, slot in net.consumers("y")] == [("loss", 1)]
    assert net.consumers("loss") == []
    twice = network("add")
    assert [(node.name, slot) for node, slot in twice.consumers("pre")] == [("layer", 0), ("layer", 2)]


def test_weights_by_layer() -> None:
    shapes = {f"{node.name}.{name}": weight.shape for node, name, weight in residual().weights()}
    assert shapes == {
        "stem.weight": (3, 3, 2, 4),
        "stem.bias": (4,),
        "conv.weight": (3, 3, 4, 4),
        "conv.bias": (4,),
        "fc.weight": (80, 5),
        "fc.bias": (5,),
    }


def test_inputs_say_what_they_hold() -> None:
    net = residual()
    assert net["x"].layer == Input((3, 9, 7, 2))
    assert net["y"].layer == Input((3,), integer=True)
    with pytest.raises(PlanError, match="an input has no op"):
        net["x"].layer.bind(None)  # type: ignore[arg-type]


def test_loss_must_be_one() -> None:
    net = Graph()
    x, y = net.input("x", (3, 5)), net.input("y", (3, 5))
    with pytest.raises(PlanError, match="trained on one loss, this one has 0"):
        _ = net.loss
    net.add("one", MSE(), x, y)
    assert net.loss.name == "one"
    net.add("two", MSE(), y, x)
    with pytest.raises(PlanError, match="trained on one loss, this one has 2"):
        _ = net.loss


def test_errors_name_the_layer() -> None:
    net = Graph()
    x = net.input("x", (3, 5, 5, 2))
    net.add("conv1", Conv(4, kernel=3), x)
    with pytest.raises(PlanError, match="layer conv1: the name is taken; give each layer its own"):
        net.add("conv1", ReLU(), x)
    with pytest.raises(PlanError, match="layer relu: no layer 'conv2' before it; there are x, conv1"):
        net.add("relu", ReLU(), "conv2")
    with pytest.raises(PlanError, match=r"layer pool \(input \(3, 3, 3, 4\)\): height: a window of 4 does not fit"):
        net.add("pool", MaxPool(4), "conv1")
    assert list(net.nodes) == ["x", "conv1"], "a layer that does not fit is not added"
