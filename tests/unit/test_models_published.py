"""The networks of the zoo have the numbers of parameters and the extents that are published."""

from __future__ import annotations

from math import prod

import pytest

from hpctrain import models
from hpctrain.models import Sample

IMAGE = Sample((224, 224, 3), classes=1000)

PUBLISHED: dict[str, tuple[str, Sample, dict[str, object], int]] = {
    "AlexNet": ("alexnet", IMAGE, {}, 61_100_840),
    "AlexNet, two groups": ("alexnet", Sample((227, 227, 3), classes=1000), {"two_groups": True}, 60_965_224),
    "VGG-11": ("vgg11", IMAGE, {}, 132_863_336),
    "VGG-11 with batch norm": ("vgg11", IMAGE, {"norm": True}, 132_868_840),
    "VGG-13": ("vgg", IMAGE, {"depth": 13}, 133_047_848),
    "VGG-16": ("vgg16", IMAGE, {}, 138_357_544),
    "VGG-16 with batch norm": ("vgg16", IMAGE, {"norm": True}, 138_365_992),
    "VGG-19": ("vgg", IMAGE, {"depth": 19}, 143_667_240),
    "ResNet-18": ("resnet18", IMAGE, {}, 11_689_512),
    "ResNet-34": ("resnet34", IMAGE, {}, 21_797_672),
    "ResNet-50": ("resnet50", IMAGE, {}, 25_557_032),
    "ResNet-18 for CIFAR-10": ("resnet18", Sample((32, 32, 3), classes=10), {"stem": "cifar"}, 11_173_962),
    "Inception-v3": ("inception3", Sample((299, 299, 3), classes=1000), {}, 23_834_568),
    "CosmoFlow 2018": ("cosmoflow", Sample((128,) * 3 + (1,), values=3), {"variant": "mathuriya2018"}, 7_041_443),
    "3D U-Net": (
        "unet3d",
        Sample((132, 132, 116, 3), classes=3, positions=(44, 44, 28)),
        {"padding": "valid", "norm": False},
        19_069_955,
    ),
}
"""Network, sample and options, and the number of parameters published for it: in torchvision's tables, in the papers
on AlexNet and 3D U-Net, and for CosmoFlow in the logs of its authors' runs."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_network_has_the_published_number_of_parameters(name: str) -> None:
    network, sample, options, expected = PUBLISHED[name]
    net = models.build(network, 2, sample, options)
    assert sum(prod(weight.shape) for _, _, weight in net.weights()) == expected


@pytest.mark.parametrize(
    ("network", "sample", "options", "shapes"),
    [
        ("alexnet", IMAGE, {}, {"conv1": (55, 55, 64), "pool2": (13, 13, 192), "pool5": (6, 6, 256)}),
        (
            "alexnet",
            Sample((227, 227, 3), classes=1000),
            {"two_groups": True},
            {"conv1": (55, 55, 96), "conv2": (27, 27, 256), "pool5": (6, 6, 256)},
        ),
        ("vgg16", IMAGE, {}, {"relu1_2": (224, 224, 64), "conv4_3": (28, 28, 512), "pool5": (7, 7, 512)}),
        ("resnet18", IMAGE, {}, {"pool1": (56, 56, 64), "layer4.1.relu2": (7, 7, 512)}),
        (
            "resnet50",
            IMAGE,
            {},
            {"layer1.0.add": (56, 56, 256), "layer3.5.relu3": (14, 14, 1024), "layer4.2.relu3": (7, 7, 2048)},
        ),
        ("resnet34", Sample((32, 32, 3), classes=10), {"stem": "cifar"}, {"layer1.2.relu2": (32, 32, 64)}),
        # Szegedy et al. 2016, table 1
        (
            "inception3",
            Sample((299, 299, 3), classes=1000),
            {},
            {
                "conv1a.relu": (149, 149, 32),
                "conv2b.relu": (147, 147, 64),
                "pool2": (35, 35, 192),
                "mixed5d.concat": (35, 35, 288),
                "mixed6e.concat": (17, 17, 768),
                "mixed7a.concat": (8, 8, 1280),
                "mixed7c.concat": (8, 8, 2048),
            },
        ),
        # Cicek et al. 2016, figure 2
        (
            "unet3d",
            Sample((132, 132, 116, 3), classes=3, positions=(44, 44, 28)),
            {"padding": "valid"},
            {
                "down1.relu2": (128, 128, 112, 64),
                "down3.relu2": (26, 26, 22, 256),
                "bottom.relu2": (9, 9, 7, 512),
                "up3.concat": (18, 18, 14, 768),
                "up1.concat": (48, 48, 32, 192),
                "out": (44, 44, 28, 3),
            },
        ),
        ("cosmoflow", Sample((128,) * 3 + (1,), values=3), {"variant": "mathuriya2018"}, {"relu7": (2, 2, 2, 256)}),
        ("cosmoflow", Sample((128,) * 3 + (4,), values=4), {"variant": "mlperf"}, {"pool5": (4, 4, 4, 512)}),
    ],
)
def test_published_extents(
    network: str, sample: Sample, options: dict[str, object], shapes: dict[str, tuple[int, ...]]
) -> None:
    net = models.build(network, 2, sample, options)
    assert {name: net[name].shape[1:] for name in shapes} == shapes
