"""LeNet-5 (LeCun et al. 1998) with ReLU and max pooling, as it is usually trained today."""

from __future__ import annotations

from hpctrain.graph import Graph
from hpctrain.layers import Conv, Dense, Flatten, MaxPool, ReLU
from hpctrain.models import Sample, finish, start


def build(batch: int, sample: Sample) -> Graph:
    """For images of 28 x 28 (padded to 32 as in the paper) or any size from 12; 61,706 parameters at 28x28x1."""
    net, x = start(batch, sample)
    x = net.add("conv1", Conv(6, kernel=5, padding=2), x)
    x = net.add("relu1", ReLU(), x)
    x = net.add("pool1", MaxPool(2), x)
    x = net.add("conv2", Conv(16, kernel=5), x)
    x = net.add("relu2", ReLU(), x)
    x = net.add("pool2", MaxPool(2), x)
    x = net.add("flatten", Flatten(), x)
    x = net.add("fc1", Dense(120), x)
    x = net.add("relu3", ReLU(), x)
    x = net.add("fc2", Dense(84), x)
    x = net.add("relu4", ReLU(), x)
    x = net.add("fc3", Dense(sample.outputs), x)
    return finish(net, x, sample)
