"""A network of one's own: blocks of two branches beside the identity, and a head that averages over positions.

net.toml trains it. Here it is in place of the network of another config:

mpirun -n 4 hpctrain train run.toml model.name=examples/net.py:build model.options.filters=8
"""

from hpctrain.graph import Graph
from hpctrain.layers import Add, BatchNorm, Concat, Conv, Dense, Dropout, GlobalAvgPool, MaxPool, ReLU
from hpctrain.models import Sample, finish, start


def build(batch: int, sample: Sample, filters: int = 16, blocks: int = 2) -> Graph:
    """Keyword arguments come from [model.options]; `sample` describes the data set."""
    net, x = start(batch, sample)
    x = net.add("stem", Conv(filters, kernel=5, stride=2, padding=2), x)
    for i in range(1, blocks + 1):
        x = block(net, f"block{i}", x, filters)
        x = net.add(f"pool{i}", MaxPool(2), x)
    x = net.add("average", GlobalAvgPool(), x)
    x = net.add("dropout", Dropout(0.1), x)
    x = net.add("out", Dense(sample.outputs), x)
    return finish(net, x, sample)


def block(net: Graph, name: str, x: str, filters: int) -> str:
    """x + mix(near(x) beside far(x)); `net.add` returns the name by which later layers read a result."""
    near = conv(net, f"{name}.near", Conv(filters, kernel=3, padding=1, bias=False), x)
    far = conv(net, f"{name}.far", Conv(filters, kernel=3, padding=2, dilation=2, bias=False), x)
    y = net.add(f"{name}.both", Concat(), near, far)
    y = net.add(f"{name}.mix", Conv(filters, kernel=1), y)
    return net.add(f"{name}.add", Add(), x, y)


def conv(net: Graph, name: str, layer: Conv, x: str) -> str:
    """A convolution with batch norm and ReLU."""
    x = net.add(f"{name}.conv", layer, x)
    x = net.add(f"{name}.norm", BatchNorm(), x)
    return net.add(f"{name}.relu", ReLU(), x)
