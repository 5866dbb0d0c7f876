"""The op of a layer and rank on blocks of global arrays, without MPI: what ranks would compute, one after another."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from networks import LAYERS, MERGES, node, takes_labels

from hpctrain.backends.reference import Reference
from hpctrain.layers import (
    Add,
    Layer,
    Loss,
    Phase,
    Place,
)
from hpctrain.partition import Box, Partition, Shape, extent, volume, whole, within
from hpctrain.planner.layout import Layout, layout
from hpctrain.regions import Region

ONE = Partition()
TRAINING = Phase()
FLOAT = np.dtype(np.float64)
Arrays = dict[str, np.ndarray]


class Bound:
    """The op of one rank of a layer, and its blocks of given global arrays."""

    def __init__(self, place: Layout, rank: int, weights: Arrays) -> None:
        shapes, self.fill = place.node.input_shapes, place.node.layer.fill
        self.wants = [Wish(want, rank) for want in place.inputs]
        self.inputs = [wish.box for wish in self.wants]
        self.output = (place.partial or place.output).box(rank)
        boxes = {name: dist.box(rank) for name, dist in place.weights.items()}
        held = {**place.weights, **place.state}
        self.w = {name: weights[name][dist.box(rank)].copy() for name, dist in held.items()}
        self.op = place.node.layer.bind(
            Place(
                "layer",
                0,
                Reference(),
                FLOAT,
                shapes,
                tuple(self.inputs),
                place.work.box(rank),
                self.output,
                boxes,
                None,
            )
        )

    def forward(self, xs: list[np.ndarray], phase: Phase = TRAINING) -> np.ndarray:
        """This rank's share of the output."""
        return self.compute([cut(x, wish, self.fill) for x, wish in zip(xs, self.wants, strict=True)], phase)

    def compute(self, blocks: list[np.ndarray], phase: Phase = TRAINING) -> np.ndarray:
        """The same from this rank's input boxes."""
        y = np.full(extent(self.output), np.nan)
        self.floats = [block.dtype.kind == "f" for block in blocks]
        self.op.forward(blocks, self.w, y, phase)
        return y

    def backward(self, dy: np.ndarray) -> tuple[list[np.ndarray], Arrays]:
        """Gradients of this rank's input boxes (labels have none: NaN) and weights, after `forward`."""
        dxs = [np.full(extent(box), np.nan) for box in self.inputs]
        dws = {name: np.full_like(w, np.nan) for name, w in self.w.items()}
        self.op.backward(dy, self.w, [dx if real else None for dx, real in zip(dxs, self.floats, strict=True)], dws)
        return dxs, dws


@dataclass(frozen=True)
class Wish:
    """What one rank wants of an input."""

    region: Region
    rank: int

    @property
    def box(self) -> Box:
        return self.region.box(self.rank)


def cut(x: np.ndarray, wish: Wish, fill: float) -> np.ndarray:
    """What is wanted of `x`; beyond it what the region says of its borders, or `fill`."""
    y = np.full(extent(wish.box), fill, x.dtype)
    for share in wish.region.shares(wish.rank, whole(x.shape)):
        y[within(share.target, wish.box)] = np.flip(x[share.source], np.flatnonzero(share.flipped))
    return y


def paste(block: np.ndarray, wish: Wish, into: np.ndarray) -> None:
    """Add the block of what is wanted to the whole array that it came from: the adjoint of `cut`."""
    for share in wish.region.shares(wish.rank, whole(into.shape)):
        into[share.source] += np.flip(block[within(share.target, wish.box)], np.flatnonzero(share.flipped))


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
    if name in MERGES:
        shapes, layer = MERGES[name]
        return layer, [separated(rng, shape) for shape in shapes]
    shape, layer = LAYERS[name]
    xs = [separated(rng, shape)]
    if isinstance(layer, Loss):
        labels = takes_labels(layer)
        xs.append(rng.integers(0, shape[-1], shape[:-1]) if labels else rng.normal(size=shape))
    return layer, xs


def assembled(place: Layout, xs: list[np.ndarray], dy: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """What the ranks of a layer without weights make of their boxes, put together: output and input gradients."""
    y, dxs = np.zeros(place.output.shape), [np.zeros(x.shape) for x in xs]
    for rank in range(place.partition.size):
        bound = Bound(place, rank, {})
        if volume(bound.output) > 0:
            y[bound.output] += bound.forward(xs)
            for dx, block, wish in zip(dxs, bound.backward(dy[bound.output])[0], bound.wants, strict=True):
                paste(block, wish, dx)
    return y, dxs
