"""A 3D network after CosmoFlow (Mathuriya et al. 2018): levels of convolution and pooling, then dense layers."""

from __future__ import annotations

from hpctrain.graph import Graph
from hpctrain.layers import BatchNorm, Conv, Dense, Flatten, MaxPool, ReLU
from hpctrain.models import Sample, finish, start

SMALLEST = 4
"""Pooling stops once the next volume would have fewer than this many voxels along an edge."""


def build(batch: int, sample: Sample, filters: int = 8, hidden: int = 64, norm: bool = True) -> Graph:
    """3x3x3 convolutions with batch norm, ReLU and 2x2x2 max pooling; filters double at every level."""
    net, x = start(batch, sample)
    level = 0
    while level == 0 or min(net[x].shape[1:-1]) >= 2 * SMALLEST:
        level += 1
        x = net.add(f"conv{level}", Conv(filters * 2 ** (level - 1), kernel=3, padding=1, bias=not norm), x)
        if norm:
            x = net.add(f"norm{level}", BatchNorm(), x)
        x = net.add(f"relu{level}", ReLU(), x)
        x = net.add(f"pool{level}", MaxPool(2), x)
    x = net.add("flatten", Flatten(), x)
    x = net.add("fc1", Dense(hidden), x)
    x = net.add("relu_fc1", ReLU(), x)
    x = net.add("fc2", Dense(sample.outputs), x)
    return finish(net, x, sample)
