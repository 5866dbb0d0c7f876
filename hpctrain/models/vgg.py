"""VGG (Simonyan & Zisserman 2015): 3x3 convolutions between five poolings, then three dense layers."""

from __future__ import annotations

from hpctrain.graph import Graph
from hpctrain.layers import AdaptiveAvgPool, BatchNorm, Conv, Dense, Dropout, Flatten, MaxPool, ReLU
from hpctrain.models import Sample, finish, one_of, scaled, start

CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
"""By depth, how many convolutions each of the five stages has."""

FILTERS = (64, 128, 256, 512, 512)


def build(
    batch: int,
    sample: Sample,
    depth: int = 16,
    norm: bool = False,
    dropout: float = 0.5,
    hidden: int = 4096,
    width: float = 1.0,
) -> Graph:
    """For images of at least 32 x 32; for 3 channels and 1000 classes 132,863,336 (11) or 138,357,544 (16) parameters.

    `norm` adds a batch norm after every convolution, which keeps its bias. `hidden` is the size of the two dense
    layers, `width` scales all filters. Raises ValueError on a depth that is not in CONVOLUTIONS.
    """
    net, x = start(batch, sample)
    stages = zip(CONVOLUTIONS[one_of("depth", depth, CONVOLUTIONS)], FILTERS, strict=True)
    for stage, (convolutions, filters) in enumerate(stages, start=1):
        for i in range(1, convolutions + 1):
            x = net.add(f"conv{stage}_{i}", Conv(scaled(filters, width), kernel=3, padding=1), x)
            if norm:
                x = net.add(f"norm{stage}_{i}", BatchNorm(), x)
            x = net.add(f"relu{stage}_{i}", ReLU(), x)
        x = net.add(f"pool{stage}", MaxPool(2), x)
    # 7 x 7 already at 224
    x = net.add("average", AdaptiveAvgPool(7), x)
    x = net.add("flatten", Flatten(), x)
    for i in (1, 2):
        x = net.add(f"fc{i}", Dense(hidden), x)
        x = net.add(f"relu_fc{i}", ReLU(), x)
        x = net.add(f"dropout{i}", Dropout(dropout), x)
    x = net.add("fc3", Dense(sample.outputs), x)
    return finish(net, x, sample)
