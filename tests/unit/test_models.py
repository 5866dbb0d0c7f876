"""The networks of the zoo: their options, odd sizes, and errors that say what fits."""

from __future__ import annotations

import re
from itertools import pairwise
from math import prod
from pathlib import Path

import pytest

from hpctrain import models
from hpctrain.errors import ConfigError, PlanError
from hpctrain.graph import Graph
from hpctrain.layers import MSE, BatchNorm, Conv, Dropout, GroupNorm, InstanceNorm, SoftmaxCrossEntropy
from hpctrain.models import ZOO, Sample


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


def test_unet_counts_scales_that_the_publication_does_not() -> None:
    """A shift for each filter of its 14 3x3x3 convolutions is in the published number, be it bias or beta."""
    sample = Sample((33, 17, 19, 3), classes=3, positions=(33, 17, 19))
    net = models.build("unet3d", 1, sample, {})
    scales = sum(prod(weight.shape) for _, key, weight in net.weights() if key == "gamma")
    assert scales == 32 + 64 + 64 + 128 + 128 + 256 + 256 + 512 + 2 * (256 + 128 + 64)
    assert parameters(net) - scales == 19_069_955


@pytest.mark.parametrize("edges", [(1, 1, 1), (2, 3, 5), (7, 8, 9), (16, 17, 31)])
@pytest.mark.parametrize("levels", [1, 2, 4])
def test_unet_has_logits_for_every_voxel_of_any_volume(edges: tuple[int, ...], levels: int) -> None:
    sample = Sample((*edges, 2), classes=5, positions=edges)
    net = models.build("unet3d", 3, sample, {"filters": 2, "levels": levels})
    assert net["out"].shape == net["loss"].input_shapes[0] == (3, *edges, 5)
    assert sum("concat" in node.name for node in net) == levels - 1


@pytest.mark.parametrize(
    ("norm", "same_as", "kind", "key"),
    [
        ("batch", True, BatchNorm, None),
        ("none", False, None, None),
        ("group", None, GroupNorm, {"down1.norm1": 2, "down1.norm2": 4, "bottom.norm2": 8}),
        ("instance", None, InstanceNorm, None),
    ],
)
def test_norms_of_unet(norm: str, same_as: bool | None, kind: type | None, key: dict[str, int] | None) -> None:
    sample = Sample((9, 7, 11, 1), classes=2, positions=(9, 7, 11))
    net = models.build("unet3d", 1, sample, {"filters": 2, "levels": 3, "norm": norm})
    layers = {node.name: node.layer for node in net}
    norms = {name: layer for name, layer in layers.items() if "norm" in name}
    assert len(norms) == (0 if kind is None else 10)
    assert all(type(layer) is kind for layer in norms.values())
    assert all(layer.bias == (kind is None) for name, layer in layers.items() if re.fullmatch(r".*\.conv[12]", name))
    if same_as is not None:
        same = models.build("unet3d", 1, sample, {"filters": 2, "levels": 3, "norm": same_as})
        assert layers == {node.name: node.layer for node in same}
    for name, groups in (key or {}).items():
        assert layers[name].groups == groups, "8, or as many as channels where these are fewer"


def test_unet_says_which_labels_it_takes() -> None:
    sample = Sample((44, 46, 47, 1), classes=2, positions=(44, 46, 47))
    with pytest.raises(
        PlanError,
        match=r"padding = 'valid' makes logits for \(4, 4, 4\) of \(44, 46, 47\) .* of the middle \(4, 4, 4\)",
    ):
        models.build("unet3d", 1, sample, {"padding": "valid", "levels": 3, "filters": 2})
    with pytest.raises(PlanError, match=r"a sample of the data has labels of shape \(\); give a label for every voxel"):
        models.build("unet3d", 1, Sample((8, 8, 8, 1), classes=2), {"filters": 2})
    with pytest.raises(PlanError, match=r"a sample of the data has values; give a label for every voxel"):
        models.build("unet3d", 1, Sample((8, 8, 8, 1), values=2), {"filters": 2})
    small = Sample((43, 46, 47, 1), classes=2, positions=(2, 4, 4))
    with pytest.raises(PlanError, match=r"layer up1.conv2 .*depth: a window of 3 does not fit an input of 2"):
        models.build("unet3d", 1, small, {"padding": "valid", "levels": 3, "filters": 2})


@pytest.mark.parametrize("edge", [64, 65, 100, 128, 129, 255, 256, 511, 512])
def test_cosmoflow_of_2020_has_one_size_for_all_volumes(edge: int) -> None:
    """Above 64 the volume that is left always has 2^3 voxels."""
    net = models.build("cosmoflow", 1, Sample((edge,) * 3 + (4,), values=4), {"variant": "oyama2020"})
    left = 2 if edge > 64 else 1
    assert net["flatten"].shape == (1, left**3 * 256)
    convolutions = 27 * sum(a * b for a, b in pairwise([4, 16, 32, 64, 128, 256, 256, 256])) + 16 * (1 + 2 + 4 + 8 + 48)
    dense = (left**3 * 256 + 1) * 2048 + (2048 + 1) * 256 + (256 + 1) * 4
    assert parameters(net) == convolutions + dense
    if edge > 64:
        assert parameters(net) == 9_438_644


def test_cosmoflow_of_mlperf_has_the_size_of_its_matrices() -> None:
    net = models.build("cosmoflow", 1, Sample((128,) * 3 + (4,), values=4), {"variant": "mlperf"})
    convolutions = sum((27 * a + 1) * b for a, b in pairwise([4, 32, 64, 128, 256, 512]))
    assert parameters(net) == convolutions + (64 * 512 + 1) * 128 + (128 + 1) * 64 + (64 + 1) * 4
    rates = [node.layer.rate for node in net if isinstance(node.layer, Dropout)]
    assert rates == [0.5, 0.5]


def test_cosmoflow_scales_with_its_options() -> None:
    sample = Sample((33, 35, 37, 2), values=3)
    options = {"variant": "oyama2020", "filters": 3, "hidden": 24, "norm": True, "dropout": 0.2}
    net = models.build("cosmoflow", 1, sample, options)
    assert [net[f"norm{i}"].shape[-1] for i in range(1, 8)] == [3, 6, 12, 24, 48, 48, 48]
    assert [net[f"fc{i}"].shape[-1] for i in (1, 2, 3)] == [24, 3, 3]
    assert parameters(net, "conv") == 27 * sum(a * b for a, b in pairwise([2, 3, 6, 12, 24, 48, 48, 48]))


def test_width_scales_every_filter_and_keeps_them_even() -> None:
    """Two groups divide them; 3 of 64 filters are 4."""
    image = Sample((224, 224, 3), classes=1000)
    net = models.build("alexnet", 1, image, {"width": 0.05, "two_groups": True, "hidden": 7})
    assert [net[f"conv{i}"].shape[-1] for i in range(1, 6)] == [6, 14, 20, 20, 14]
    assert net["fc1"].shape == net["fc2"].shape == (1, 7)
    for name in ("vgg16", "resnet50", "inception3"):
        full, half = (models.build(name, 1, image, {"width": width}) for width in (1, 0.5))
        for node in full:
            if isinstance(node.layer, Conv):
                assert half[node.name].layer.filters * 2 == node.layer.filters, node.name


def test_residual_network_takes_volumes() -> None:
    net = models.build("resnet18", 2, Sample((9, 11, 13, 1), values=3), {"stem": "cifar", "width": 0.1})
    assert net["layer4.1.relu2"].shape == (2, 2, 2, 2, 64)
    assert net["loss"].input_shapes == ((2, 3), (2, 3))


SMALLEST = {
    "alexnet": (63, 63, 3),
    "cosmoflow": (13, 17, 15, 2),
    "inception": (75, 75, 3),
    "lenet": (12, 12, 1),
    "mlp": (13, 17, 2),
    "resnet": (1, 1, 1),
    "unet3d": (1, 1, 1, 1),
    "vgg": (32, 32, 3),
}
"""By file: shapes of samples, for images the smallest that its documentation names."""


@pytest.mark.parametrize("name", ZOO)
def test_the_loss_ignores_the_label_that_the_data_do(name: str) -> None:
    shape = SMALLEST[ZOO[name][0]]
    positions = shape[:-1] if name == "unet3d" else ()
    for ignore in (None, 255):
        net = models.build(name, 5, Sample(shape, classes=7, positions=positions, ignore=ignore), {})
        assert net["loss"].layer == SoftmaxCrossEntropy(ignore=ignore)


@pytest.mark.parametrize("name", ZOO)
def test_the_loss_fits_the_targets(name: str) -> None:
    shape = SMALLEST[ZOO[name][0]]
    positions = shape[:-1] if name == "unet3d" else ()
    labels = models.build(name, 5, Sample(shape, classes=7, positions=positions), {})
    built = [labels]
    assert isinstance(labels["loss"].layer, SoftmaxCrossEntropy)
    assert labels["loss"].input_shapes == ((5, *positions, 7), (5, *positions))
    assert labels["x"].shape == (5, *shape)
    if not positions:
        built.append(models.build(name, 5, Sample(shape, values=3), {}))
        assert isinstance(built[1]["loss"].layer, MSE)
        assert built[1]["loss"].input_shapes == ((5, 3), (5, 3))
    for net in built:
        assert [node.name for node in net.losses] == ["loss"]
        assert all(net.consumers(node.name) for node in net if node.name != "loss")


@pytest.mark.parametrize("name", ["alexnet", "inception3", "lenet", "vgg11", "vgg16"])
def test_smaller_images_are_refused_with_layer_and_numbers(name: str) -> None:
    height, width, channels = SMALLEST[ZOO[name][0]]
    with pytest.raises(
        PlanError, match=r"^layer \S+ \(input .*\): height: a window of \d+ does not fit an input of \d+"
    ):
        models.build(name, 1, Sample((height - 1, width, channels), classes=2), {})


def test_smallest_image_for_lenet() -> None:
    assert models.build("lenet", 1, Sample((12, 12, 1), classes=2), {})["pool2"].shape == (1, 1, 1, 16)
    with pytest.raises(PlanError, match=r"layer pool2 .*height: a window of 2 does not fit an input of 1"):
        models.build("lenet", 1, Sample((11, 12, 1), classes=2), {})


def test_unknown_network_and_option_name_those_there_are() -> None:
    sample = Sample((13, 13, 1), classes=3)
    with pytest.raises(
        ConfigError,
        match=r"model.name = 'lenett': not a network here; choose alexnet, .*lenet, mlp, resnet, resnet18, ",
    ):
        models.build("lenett", 1, sample, {})
    with pytest.raises(ConfigError, match=r"model.options.filters: lenet has no such option; it takes no options"):
        models.build("lenet", 1, sample, {"filters": 3})
    with pytest.raises(ConfigError, match=r"model.options.depth: cosmoflow .*it takes filters, hidden, norm"):
        models.build("cosmoflow", 1, sample, {"depth": 3})
    with pytest.raises(ConfigError, match=r"model.options.depth: resnet18 has no such option; it takes stem, width"):
        models.build("resnet18", 1, sample, {"depth": 50})


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("resnet", {"depth": 20}, r"resnet cannot be built: depth = 20; choose 18, 34, 50"),
        ("resnet18", {"stem": "small"}, r"stem = 'small'; choose imagenet, cifar"),
        ("vgg", {"depth": "16"}, r"depth = '16'; choose 11, 13, 16, 19"),
        ("vgg11", {"width": 0}, r"width = 0; give a number above 0"),
        ("vgg11", {"width": "wide"}, r"model.options = \{'width': 'wide'\}: vgg11 cannot be built: "),
        ("cosmoflow", {"variant": "2018"}, r"variant = '2018'; choose small, mathuriya2018, oyama2020, mlperf"),
        ("unet3d", {"padding": "full"}, r"padding = 'full'; choose same, valid"),
        ("unet3d", {"levels": 0}, r"levels = 0; give 1 or more"),
        ("unet3d", {"norm": "grup"}, r"norm = 'grup'; choose batch, group, instance, none"),
        ("unet3d", {"norm": 1}, r"norm = 1; choose batch, group, instance, none"),
    ],
)
def test_value_of_an_option_that_does_not_fit(name: str, options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        models.build(name, 1, Sample((32, 32, 32, 1), classes=3), options)


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
