"""The networks that are timed, at their sizes and with the speed-up over PyTorch that we aim for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hpctrain import models
from hpctrain.graph import Graph
from hpctrain.layers import Conv, Dense, Flatten, MaxPool, ReLU
from hpctrain.models import Sample
from hpctrain.models.vgg import CONVOLUTIONS, FILTERS

FORMATS = ("nchw", "channels_last")
"""Of the memory of PyTorch's tensors."""


@dataclass(frozen=True)
class Case:
    """A network: what it is, its builder by batch, the batch, and peer_seconds / seconds to reach at least."""

    title: str
    build: Callable[[int], Graph]
    batch: int
    target: float
    bf16_target: float | None = None


def resnet18(batch: int) -> Graph:
    """With the 3x3 stem for small images; 10 classes."""
    return models.build("resnet18", batch, Sample((32, 32, 3), classes=10), {"stem": "cifar"})


def vgg11(batch: int) -> Graph:
    """The convolutions of configuration A at 32 x 32, which leave 512 numbers, and one dense layer of 10 classes.

    The classifier of the publication, 25088 x 4096 x 4096 x 1000 for images of 224 x 224, would be most of the work.
    """
    net, x = models.start(batch, sample := Sample((32, 32, 3), classes=10))
    for stage, (convolutions, filters) in enumerate(zip(CONVOLUTIONS[11], FILTERS, strict=True), start=1):
        for i in range(1, convolutions + 1):
            x = net.add(f"conv{stage}_{i}", Conv(filters, kernel=3, padding=1), x)
            x = net.add(f"relu{stage}_{i}", ReLU(), x)
        x = net.add(f"pool{stage}", MaxPool(2), x)
    x = net.add("flatten", Flatten(), x)
    return models.finish(net, net.add("fc", Dense(10), x), sample)


def alexnet(batch: int) -> Graph:
    """One tower, three dense layers, 1000 classes; no dropout, so that both sides compute the same."""
    return models.build("alexnet", batch, Sample((227, 227, 3), classes=1000), {"dropout": 0.0})


def lenet(batch: int) -> Graph:
    """28 x 28 grey images; 10 classes."""
    return models.build("lenet", batch, Sample((28, 28, 1), classes=10), {})


def cosmoflow(batch: int) -> Graph:
    """The network of MLPerf HPC on a volume half as wide, without dropout: four numbers of four channels."""
    return models.build("cosmoflow", batch, Sample((64, 64, 64, 4), values=4), {"variant": "mlperf", "dropout": 0.0})


CASES = {
    "resnet18": Case("ResNet-18 32x32", resnet18, 64, 1.8, 1.2),
    "vgg11": Case("VGG-11 32x32", vgg11, 64, 1.8),
    "alexnet": Case("AlexNet 227", alexnet, 32, 1.5, 1.2),
    "lenet": Case("LeNet 28x28", lenet, 64, 1.5),
    "cosmoflow": Case("CosmoFlow 64^3", cosmoflow, 2, 1.5),
}


def resnet18_large(batch: int, edge: int) -> Graph:
    """On images of edge x edge: the 7x7 stem, 1000 classes."""
    return models.build("resnet18", batch, Sample((edge, edge, 3), classes=1000), {})
