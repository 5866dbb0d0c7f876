"""A network of one's own: a residual block, batch norm, and a head that averages over positions.

mpirun -n 4 hpctrain train run.toml model.name=examples/net.py:build model.options.filters=8
"""

from hpctrain.graph import Graph
from hpctrain.layers import Add, BatchNorm, Conv, Dense, GlobalAvgPool, MaxPool, ReLU
from hpctrain.models import Sample, finish, start


def build(batch: int, sample: Sample, filters: int = 16, blocks: int = 2) -> Graph:
    """Keyword arguments come from [model.options]; `sample` describes the data set."""
    net, x = start(batch, sample)
    x = net.add("stem", Conv(filters, kernel=5, padding=2), x)
    for i in range(1, blocks + 1):
        x = residual(net, f"block{i}", x, filters)
        x = net.add(f"pool{i}", MaxPool(2), x)
    x = net.add("average", GlobalAvgPool(), x)
    x = net.add("out", Dense(sample.outputs), x)
    return finish(net, x, sample)


def residual(net: Graph, name: str, x: str, filters: int) -> str:
    """Two 3x3 convolutions beside the identity."""
    y = net.add(f"{name}.conv1", Conv(filters, kernel=3, padding=1, bias=False), x)
    y = net.add(f"{name}.norm1", BatchNorm(), y)
    y = net.add(f"{name}.relu1", ReLU(), y)
    y = net.add(f"{name}.conv2", Conv(filters, kernel=3, padding=1, bias=False), y)
    y = net.add(f"{name}.norm2", BatchNorm(), y)
    y = net.add(f"{name}.add", Add(), x, y)
    return net.add(f"{name}.relu2", ReLU(), y)
