"""A multilayer perceptron: dense layers with ReLU between them."""

from __future__ import annotations

from collections.abc import Sequence

from hpctrain.graph import Graph
from hpctrain.layers import Dense, Flatten, ReLU
from hpctrain.models import Sample, finish, start


def build(batch: int, sample: Sample, hidden: Sequence[int] = (256, 128)) -> Graph:
    """Flattens the sample; one dense layer per entry of `hidden`, then the outputs."""
    net, x = start(batch, sample)
    if len(sample.shape) > 1:
        x = net.add("flatten", Flatten(), x)
    for i, units in enumerate(hidden, start=1):
        x = net.add(f"fc{i}", Dense(units), x)
        x = net.add(f"relu{i}", ReLU(), x)
    x = net.add("out", Dense(sample.outputs), x)
    return finish(net, x, sample)
