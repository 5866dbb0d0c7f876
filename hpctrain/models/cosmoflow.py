"""CosmoFlow: 3D networks that read cosmological parameters from volumes; a small one, and three as published."""

from __future__ import annotations

from dataclasses import dataclass

from hpctrain.graph import Graph
from hpctrain.layers import AvgPool, BatchNorm, Conv, Dense, Dropout, Flatten, Layer, LeakyReLU, MaxPool, ReLU
from hpctrain.models import Sample, finish, one_of, start

SMALLEST = 4
"""Pooling of "small" stops once the next volume would have fewer than this many voxels along an edge."""


@dataclass(frozen=True)
class Design:
    """A published network: convolutions with leaky ReLU, some with pooling, then three dense layers."""

    kernels: tuple[int, ...]
    strides: tuple[int, ...]
    factors: tuple[int, ...]
    """Filters of each convolution, as multiples of the first one's."""
    padding: int
    pool: Layer
    pooled: int
    """How many convolutions are pooled at any extent of the volume."""
    until: int
    """The others are pooled while an edge has more than so many voxels; 0 never."""
    filters: int
    dense: tuple[int, int]
    slope: float
    dropout: tuple[int, int]
    """Which dense layers have dropout before them."""


DESIGNS = {
    "mathuriya2018": Design(
        kernels=(3, 4, 4, 3, 3, 2, 2),
        strides=(1, 1, 1, 2, 1, 1, 1),
        factors=(1, 2, 4, 8, 16, 16, 16),
        padding=0,
        pool=AvgPool(2),
        pooled=3,
        until=0,
        filters=16,
        dense=(2048, 256),
        slope=0.01,
        dropout=(1, 2),
    ),
    "oyama2020": Design(
        kernels=(3,) * 7,
        strides=(1, 1, 1, 2, 1, 1, 1),
        factors=(1, 2, 4, 8, 16, 16, 16),
        padding=1,
        pool=AvgPool(3, stride=2, padding=1),
        pooled=5,
        until=2,
        filters=16,
        dense=(2048, 256),
        slope=0.01,
        dropout=(2, 3),
    ),
    "mlperf": Design(
        kernels=(3,) * 5,
        strides=(1,) * 5,
        factors=(1, 2, 4, 8, 16),
        padding=1,
        pool=MaxPool(2),
        pooled=5,
        until=0,
        filters=32,
        dense=(128, 64),
        slope=0.3,
        dropout=(2, 3),
    ),
}


def build(
    batch: int,
    sample: Sample,
    filters: int = 0,
    hidden: int = 0,
    norm: bool | None = None,
    dropout: float = 0.5,
    variant: str = "small",
) -> Graph:
    """`filters` of the first convolution and `hidden` units of the first dense layer; 0 are those of the variant.

    - "small": 3x3x3 convolutions with batch norm, ReLU and 2x2x2 max pooling until the volume is small; filters double
      at every level, from 8; one hidden layer of 64 units, no dropout. For any volume.
    - "mathuriya2018" (Mathuriya et al. 2018): seven convolutions without padding, three average poolings; for volumes
      of about 128^3 voxels. 7,041,443 parameters for 1 channel and 3 values.
    - "oyama2020" (Oyama et al. 2020): for volumes of 64^3 to 512^3, pooled once or twice more where they are larger
      than 128^3: 9,438,644 parameters at 128^3, 256^3 and 512^3 for 4 channels and 4 values.
    - "mlperf" (MLPerf HPC 1.0): five levels of convolution and max pooling, for volumes of at least 32^3. Its output
      is 1.2 tanh(x), here x, as its targets are within -1 and 1.

    `norm` puts a batch norm after every convolution; None: in "small" only. Raises ValueError on another variant.
    """
    if one_of("variant", variant, ("small", *DESIGNS)) == "small":
        return _small(batch, sample, filters or 8, hidden or 64, norm is not False)
    design = DESIGNS[variant]
    net, x = start(batch, sample)
    layers = zip(design.kernels, design.strides, design.factors, strict=True)
    for i, (kernel, stride, factor) in enumerate(layers, start=1):
        conv = Conv(factor * (filters or design.filters), kernel, stride, design.padding, bias=not norm)
        x = _conv(net, i, conv, bool(norm), LeakyReLU(design.slope), x)
        if i <= design.pooled or 0 < design.until < min(net[x].shape[1:-1]):
            x = net.add(f"pool{i}", design.pool, x)
    x = net.add("flatten", Flatten(), x)
    first, second = design.dense
    if hidden:
        first, second = hidden, max(1, hidden * second // first)
    for i, units in enumerate((first, second, sample.outputs), start=1):
        if i in design.dropout:
            x = net.add(f"dropout{i}", Dropout(dropout), x)
        x = net.add(f"fc{i}", Dense(units), x)
        if i < 3:
            x = net.add(f"relu_fc{i}", LeakyReLU(design.slope), x)
    return finish(net, x, sample)


def _small(batch: int, sample: Sample, filters: int, hidden: int, norm: bool) -> Graph:
    net, x = start(batch, sample)
    level = 0
    while level == 0 or min(net[x].shape[1:-1]) >= 2 * SMALLEST:
        level += 1
        conv = Conv(filters * 2 ** (level - 1), kernel=3, padding=1, bias=not norm)
        x = _conv(net, level, conv, norm, ReLU(), x)
        x = net.add(f"pool{level}", MaxPool(2), x)
    x = net.add("flatten", Flatten(), x)
    x = net.add("fc1", Dense(hidden), x)
    x = net.add("relu_fc1", ReLU(), x)
    x = net.add("fc2", Dense(sample.outputs), x)
    return finish(net, x, sample)


def _conv(net: Graph, i: int, conv: Conv, norm: bool, activation: Layer, x: str) -> str:
    x = net.add(f"conv{i}", conv, x)
    if norm:
        x = net.add(f"norm{i}", BatchNorm(), x)
    return net.add(f"relu{i}", activation, x)
