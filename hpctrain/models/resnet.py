"""ResNet (He et al. 2016): four stages of residual blocks, strides in the 3x3 convolutions ("version 1.5")."""

from __future__ import annotations

from dataclasses import dataclass

from hpctrain.graph import Graph
from hpctrain.layers import Add, BatchNorm, Conv, Dense, GlobalAvgPool, MaxPool, ReLU
from hpctrain.models import Sample, finish, one_of, scaled, start


@dataclass(frozen=True)
class Shape:
    """How many blocks each stage has, and whether they are bottlenecks (1x1, 3x3, 1x1) or basic (3x3, 3x3)."""

    blocks: tuple[int, int, int, int]
    bottleneck: bool


SHAPES = {
    18: Shape((2, 2, 2, 2), bottleneck=False),
    34: Shape((3, 4, 6, 3), bottleneck=False),
    50: Shape((3, 4, 6, 3), bottleneck=True),
}
"""By depth."""


def build(batch: int, sample: Sample, depth: int = 18, stem: str = "imagenet", width: float = 1.0) -> Graph:
    """11,689,512 (depth 18), 21,797,672 (34) or 25,557,032 (50) parameters for 3 channels and 1000 classes.

    `stem` is "imagenet", a 7x7 convolution with stride 2 and a 3x3 max pooling with stride 2, or "cifar", a 3x3
    convolution with stride 1, for images of about 32 x 32. `width` scales all filters. Volumes work too.
    Raises ValueError on another depth or stem.
    """
    net, x = start(batch, sample)
    shape = SHAPES[one_of("depth", depth, SHAPES)]
    filters = scaled(64, width)
    large = one_of("stem", stem, ("imagenet", "cifar")) == "imagenet"
    first = Conv(filters, kernel=7, stride=2, padding=3, bias=False) if large else _conv(filters)
    x = _conv_norm(net, "", 1, first, x)
    x = net.add("relu1", ReLU(), x)
    if large:
        x = net.add("pool1", MaxPool(3, stride=2, padding=1), x)
    for stage, blocks in enumerate(shape.blocks):
        for i in range(blocks):
            stride = 2 if stage > 0 and i == 0 else 1
            x = _block(net, f"layer{stage + 1}.{i}.", filters * 2**stage, stride, shape.bottleneck, x)
    x = net.add("average", GlobalAvgPool(), x)
    x = net.add("fc", Dense(sample.outputs), x)
    return finish(net, x, sample)


def _block(net: Graph, name: str, filters: int, stride: int, bottleneck: bool, x: str) -> str:
    """The convolutions of one block beside a shortcut, which is a 1x1 convolution where the shape changes."""
    if bottleneck:
        outputs = 4 * filters
        convolutions = [_conv(filters, kernel=1), _conv(filters, stride=stride), _conv(outputs, kernel=1)]
    else:
        outputs = filters
        convolutions = [_conv(filters, stride=stride), _conv(filters)]
    y = x
    for i, conv in enumerate(convolutions, start=1):
        y = _conv_norm(net, name, i, conv, y)
        if i < len(convolutions):
            y = net.add(f"{name}relu{i}", ReLU(), y)
    if stride > 1 or net[x].shape[-1] != outputs:
        x = net.add(f"{name}shortcut.conv", _conv(outputs, kernel=1, stride=stride), x)
        x = net.add(f"{name}shortcut.norm", BatchNorm(), x)
    y = net.add(f"{name}add", Add(), y, x)
    return net.add(f"{name}relu{len(convolutions)}", ReLU(), y)


def _conv_norm(net: Graph, name: str, i: int, conv: Conv, x: str) -> str:
    x = net.add(f"{name}conv{i}", conv, x)
    return net.add(f"{name}norm{i}", BatchNorm(), x)


def _conv(filters: int, kernel: int = 3, stride: int = 1) -> Conv:
    """A convolution that keeps positions, up to its stride; the norm after it makes a bias needless."""
    return Conv(filters, kernel, stride=stride, padding=kernel // 2, bias=False)
