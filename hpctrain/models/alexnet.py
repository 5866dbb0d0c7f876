"""AlexNet: the single tower of Krizhevsky 2014 as it is used today, and the two groups of Krizhevsky et al. 2012."""

from __future__ import annotations

from hpctrain.graph import Graph
from hpctrain.layers import AdaptiveAvgPool, Conv, Dense, Dropout, Flatten, MaxPool, ReLU
from hpctrain.models import Sample, finish, scaled, start

ONE_TOWER = (64, 192, 384, 256, 256)
TWO_GROUPS = (96, 256, 384, 384, 256)


def build(
    batch: int,
    sample: Sample,
    two_groups: bool = False,
    dropout: float = 0.5,
    hidden: int = 4096,
    width: float = 1.0,
) -> Graph:
    """For images of at least 63 x 63; 61,100,840 parameters for 3 channels and 1000 classes (published size: 224).

    `two_groups` cuts the filters of convolutions 2, 4 and 5 into two that see half of the channels each, as on the two
    GPUs of 2012: 60,965,224 parameters, for images from 67 x 67 (published size: 227). Its local response
    normalization, which has no parameters, is left out.
    `hidden` is the size of the two dense layers, `width` scales all filters.
    """
    net, x = start(batch, sample)
    filters = [scaled(n, width) for n in (TWO_GROUPS if two_groups else ONE_TOWER)]
    groups = 2 if two_groups else 1
    # 227 = 55 * 4 + 11 - 4 fits without padding
    convolutions = (
        Conv(filters[0], kernel=11, stride=4, padding=0 if two_groups else 2),
        Conv(filters[1], kernel=5, padding=2, groups=groups),
        Conv(filters[2], kernel=3, padding=1),
        Conv(filters[3], kernel=3, padding=1, groups=groups),
        Conv(filters[4], kernel=3, padding=1, groups=groups),
    )
    for i, conv in enumerate(convolutions, start=1):
        x = net.add(f"conv{i}", conv, x)
        x = net.add(f"relu{i}", ReLU(), x)
        if i in (1, 2, 5):
            x = net.add(f"pool{i}", MaxPool(3, stride=2), x)
    # 6 x 6 already at 224 and 227
    x = net.add("average", AdaptiveAvgPool(6), x)
    x = net.add("flatten", Flatten(), x)
    for i in (1, 2):
        x = net.add(f"dropout{i}", Dropout(dropout), x)
        x = net.add(f"fc{i}", Dense(hidden), x)
        x = net.add(f"relu_fc{i}", ReLU(), x)
    x = net.add("fc3", Dense(sample.outputs), x)
    return finish(net, x, sample)
