"""The networks of the zoo: published numbers, odd sizes, and errors that say what fits."""

from __future__ import annotations

from itertools import pairwise
from math import prod
from pathlib import Path

import pytest

from hpctrain import models
from hpctrain.errors import ConfigError, PlanError
from hpctrain.graph import Graph
from hpctrain.layers import MSE, BatchNorm, Loss, SoftmaxCrossEntropy
from hpctrain.models import Sample


def parameters(net: Graph, layer: str = "") -> int:
    """Trained numbers of a network, or of its layers whose names begin with `layer`."""
    return sum(prod(weight.shape) for node, _, weight in net.weights() if node.name.startswith(layer))


def test_lenet_has_the_published_size() -> None:
    """LeCun et al. 1998, with C3 fully connected: 156 + 2,416 + 48,120 + 10,164 + 850."""
    net = models.build("lenet", 64, Sample((28, 28, 1), classes=10), {})
    assert parameters(net) == 61_706
    layers = ("conv1", "conv2", "fc1", "fc2", "fc3")
    assert [parameters(net, name) for name in layers] == [156, 2416, 48_120, 10_164, 850]
    shapes = {node.name: node.shape for node in net}
    assert shapes["pool1"] == (64, 14, 14, 6)
    assert shapes["pool2"] == (64, 5, 5, 16)
    assert shapes["flatten"] == (64, 400)
    assert shapes["fc3"] == (64, 10)


def test_mlp_has_the_size_of_its_matrices() -> None:
    net = models.build("mlp", 3, Sample((28, 28, 1), classes=10), {})
    assert parameters(net) == 784 * 256 + 256 + 256 * 128 + 128 + 128 * 10 + 10
    small = models.build("mlp", 3, Sample((7,), values=2), {"hidden": [5]})
    assert parameters(small) == 7 * 5 + 5 + 5 * 2 + 2
    assert "flatten" not in small.nodes
    assert parameters(models.build("mlp", 3, Sample((7,), values=2), {"hidden": []})) == 7 * 2 + 2


@pytest.mark.parametrize("edge", [8, 9, 15, 16, 17, 31, 32, 33, 64, 65])
def test_cosmoflow_halves_until_small_and_doubles_its_filters(edge: int) -> None:
    net = models.build("cosmoflow", 2, Sample((edge, edge + 1, edge, 1), values=3), {"filters": 4})
    levels = sum(node.name.startswith("conv") for node in net)
    halved = edge
    for level in range(1, levels + 1):
        halved //= 2
        assert net[f"conv{level}"].shape[-1] == net[f"pool{level}"].shape[-1] == 4 * 2 ** (level - 1)
        assert net[f"pool{level}"].shape[1] == halved
    assert 4 <= halved < 8
    flat = prod(net[f"pool{levels}"].shape[1:])
    assert parameters(net, "fc") == flat * 64 + 64 + 64 * 3 + 3
    # convolutions before a norm have no bias of their own
    channels = [1, *(4 * 2**level for level in range(levels))]
    convolutions = sum(27 * a * b for a, b in pairwise(channels))
    assert parameters(net, "conv") == convolutions
    assert parameters(net, "norm") == 2 * sum(channels[1:])


def test_cosmoflow_without_norms_has_biases() -> None:
    net = models.build("cosmoflow", 2, Sample((9, 9, 9, 2), values=3), {"filters": 3, "norm": False})
    assert not any(isinstance(node.layer, BatchNorm) for node in net)
    assert parameters(net, "conv") == 27 * 2 * 3 + 3


@pytest.mark.parametrize("name", models.ZOO)
def test_the_loss_fits_the_targets(name: str) -> None:
    shape = (13, 17, 15, 2) if name == "cosmoflow" else (13, 17, 2)
    labels = models.build(name, 5, Sample(shape, classes=7), {})
    assert isinstance(labels.loss.layer, SoftmaxCrossEntropy)
    assert labels.loss.input_shapes == ((5, 7), (5,))
    assert labels["x"].shape == (5, *shape)
    values = models.build(name, 5, Sample(shape, values=3), {})
    assert isinstance(values.loss.layer, MSE)
    assert values.loss.input_shapes == ((5, 3), (5, 3))
    for net in (labels, values):
        assert sum(isinstance(node.layer, Loss) for node in net) == 1
        assert all(net.consumers(node.name) for node in net if node.name != "loss")


def test_smallest_image_for_lenet() -> None:
    assert models.build("lenet", 1, Sample((12, 12, 1), classes=2), {})["pool2"].shape == (1, 1, 1, 16)
    with pytest.raises(PlanError, match=r"layer pool2 .*height: a window of 2 does not fit an input of 1"):
        models.build("lenet", 1, Sample((11, 12, 1), classes=2), {})


def test_unknown_network_and_option_name_those_there_are() -> None:
    sample = Sample((13, 13, 1), classes=3)
    with pytest.raises(
        ConfigError, match=r"model.name = 'lenett': not a network here; choose cosmoflow, lenet, mlp or"
    ):
        models.build("lenett", 1, sample, {})
    with pytest.raises(ConfigError, match=r"model.options.filters: lenet has no such option; it takes no options"):
        models.build("lenet", 1, sample, {"filters": 3})
    with pytest.raises(ConfigError, match=r"model.options.depth: cosmoflow .*it takes filters, hidden, norm"):
        models.build("cosmoflow", 1, sample, {"depth": 3})


def test_network_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text(
        "from hpctrain.layers import Dense\n"
        "from hpctrain.models import finish, start\n"
        "def build(batch, sample, scale=1):\n"
        "    net, x = start(batch, sample)\n"
        "    x = net.add('wide', Dense(7 * scale), x)\n"
        "    return finish(net, net.add('out', Dense(sample.outputs), x), sample)\n"
        "number = 7\n"
    )
    net = models.build(f"{path}:build", 3, Sample((5,), classes=2), {"scale": 3})
    assert list(net.nodes) == ["x", "wide", "out", "y", "loss"]
    assert net["wide"].shape == (3, 21)
    with pytest.raises(ConfigError, match=r"model.options.size: .*net.py:build has no such option; it takes scale"):
        models.build(f"{path}:build", 3, Sample((5,), classes=2), {"size": 3})
    for name in ("other", "number"):
        with pytest.raises(ConfigError, match=rf"net.py has no function {name}\(batch, sample, \*\*options\)"):
            models.build(f"{path}:{name}", 3, Sample((5,), classes=2), {})
    with pytest.raises(ConfigError, match=r"model.name: no Python file .*missing.py; paths are relative to"):
        models.build(f"{tmp_path}/missing.py:build", 3, Sample((5,), classes=2), {})
