"""Graphs: shapes that follow, edges, and errors that name the layer."""

from __future__ import annotations

import pytest
from networks import network

from hpctrain.errors import PlanError
from hpctrain.graph import Graph
from hpctrain.layers import (
    MSE,
    Add,
    Conv,
    Dense,
    Dice,
    Flatten,
    Input,
    MaxPool,
    ReLU,
    Reshape,
    Slice,
    SoftmaxCrossEntropy,
)


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
        "loss": (3, 4),
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


def test_losses_are_found_in_order_and_there_must_be_one() -> None:
    net = Graph()
    x, y = net.input("x", (3, 5)), net.input("y", (3, 5))
    with pytest.raises(PlanError, match="trained on a loss, this one has none among x, y"):
        _ = net.losses
    net.add("one", MSE(), x, y)
    net.add("two", MSE(), y, x)
    assert [loss.name for loss in net.losses] == ["one", "two"]


def test_labels_go_to_losses_that_take_them_and_numbers_to_all_other_layers() -> None:
    net = Graph()
    x, y, labels = net.input("x", (3, 5)), net.input("y", (3,)), net.input("labels", (3,), integer=True)
    volume, marks = net.input("volume", (2, 4, 5, 3)), net.input("marks", (2, 4, 5), integer=True)
    with pytest.raises(PlanError, match=r"layer loss .*: y holds numbers, but labels are due; .* integer=True"):
        net.add("loss", SoftmaxCrossEntropy(), x, y)
    with pytest.raises(PlanError, match=r"layer relu .*: labels holds labels, but numbers are due; .* without integer"):
        net.add("relu", ReLU(), labels)
    net.add("loss", SoftmaxCrossEntropy(), x, labels)
    net.add("dice", Dice(), volume, marks)
    net.add("masks", Dice(), volume, volume)
    # what a network computes are never labels
    computed = net.add("flat", Reshape((4, 5)), net.add("one", Slice(-1, 0, 1), volume))
    with pytest.raises(PlanError, match="flat holds numbers, but labels are due"):
        net.add("wrong", Dice(), volume, computed)


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
