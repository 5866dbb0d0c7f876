"""The op of a layer and rank on blocks of global arrays, without MPI: what ranks would compute, one after another."""

from __future__ import annotations

from math import prod

import numpy as np
from networks import LAYERS, node

from hpctrain.backends.reference import Reference
from hpctrain.layers import (
    MSE,
    Add,
    Layer,
    Place,
    SoftmaxCrossEntropy,
)
from hpctrain.partition import Box, Partition, Shape, extent, overlap, whole, within
from hpctrain.planner.layout import Layout, layout

ONE = Partition()
FLOAT = np.dtype(np.float64)
Arrays = dict[str, np.ndarray]


class Bound:
    """The op of one rank of a layer, and its blocks of given global arrays."""

    def __init__(self, place: Layout, rank: int, weights: Arrays) -> None:
        shapes, self.fill = place.node.input_shapes, place.node.layer.fill
        self.inputs = [want.box(rank) for want in place.inputs]
        self.output = (place.partial or place.output).box(rank)
        boxes = {name: dist.box(rank) for name, dist in place.weights.items()}
        held = {**place.weights, **place.state}
        self.w = {name: weights[name][dist.box(rank)].copy() for name, dist in held.items()}
        self.op = place.node.layer.bind(
            Place(Reference(), FLOAT, shapes, tuple(self.inputs), place.work.box(rank), self.output, boxes, None)
        )

    def forward(self, xs: list[np.ndarray], training: bool = True) -> np.ndarray:
        """This rank's share of the output."""
        return self.compute([cut(x, box, self.fill) for x, box in zip(xs, self.inputs, strict=True)], training)

    def compute(self, blocks: list[np.ndarray], training: bool = True) -> np.ndarray:
        """The same from this rank's input boxes."""
        y = np.full(extent(self.output), np.nan)
        self.op.forward(blocks, self.w, y, training)
        return y

    def backward(self, dy: np.ndarray) -> tuple[list[np.ndarray], Arrays]:
        """Gradients of this rank's input boxes and weights, after `forward`."""
        dxs = [np.full(extent(box), np.nan) for box in self.inputs]
        dws = {name: np.full_like(w, np.nan) for name, w in self.w.items()}
        self.op.backward(dy, self.w, dxs, dws)
        return dxs, dws


def cut(x: np.ndarray, box: Box, fill: float) -> np.ndarray:
    """What `box` holds of `x`, `fill` outside it."""
    y = np.full(extent(box), fill, x.dtype)
    if (inside := overlap(box, whole(x.shape))) is not None:
        y[within(inside, box)] = x[inside]
    return y


def paste(block: np.ndarray, box: Box, into: np.ndarray) -> None:
    """Add the block that fills `box` to the whole array; what is outside is dropped."""
    if (inside := overlap(box, whole(into.shape))) is not None:
        into[inside] += block[within(inside, box)]


def alone(layer: Layer, *shapes: Shape) -> Layout:
    """The layout of `layer` on one rank."""
    return layout(node(layer, *shapes), ONE)


def random_weights(place: Layout, rng: np.random.Generator) -> Arrays:
    """Weights of order 1; running statistics with positive variances."""
    held = {**place.weights, **place.state}
    return {name: 0.5 + rng.uniform(0.1, 1, dist.shape) * (-1) ** (len(dist.shape) > 1) for name, dist in held.items()}


def separated(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    """Values between -1 and 1 that are well apart from each other and from 0, so that small steps cross no kink."""
    n = prod(shape)
    return ((rng.permutation(n) + 0.5) * 2 / n - 1 + 0.1 / n).reshape(shape)


def run(layer: Layer, *xs: np.ndarray, **weights: np.ndarray) -> np.ndarray:
    """The output of `layer` on one rank."""
    return Bound(alone(layer, *(x.shape for x in xs)), 0, weights).forward(list(xs))


def case(name: str, rng: np.random.Generator) -> tuple[Layer, list[np.ndarray]]:
    """The layer of a case and float inputs for it, or labels where it takes some."""
    if name == "add":
        return Add(), [separated(rng, (3, 5, 4, 3)) for _ in range(3)]
    shape, layer = LAYERS[name]
    xs = [separated(rng, shape)]
    if isinstance(layer, SoftmaxCrossEntropy):
        xs.append(rng.integers(0, shape[1], shape[0]))
    if isinstance(layer, MSE):
        xs.append(rng.normal(size=shape))
    return layer, xs
