"""What the op of a layer allocates while it runs, as tracemalloc sees it: NumPy reports its arrays there."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from math import prod
from typing import NamedTuple

import numpy as np
from networks import node

from hpctrain.backends.base import Backend
from hpctrain.layers import Layer, Op, Phase, Place
from hpctrain.partition import Partition, Shape, extent
from hpctrain.planner.layout import layout


class Bound(NamedTuple):
    """An op, and what runs it forward and backward with arrays made before."""

    op: Op
    forward: Callable[[], None]
    backward: Callable[[], None]


def bound(layer: Layer, shapes: tuple[Shape, ...], backend: Backend, dtype: np.dtype) -> Bound:
    """A layer bound to whole tensors of these shapes, with random inputs."""
    rng, place, labels = np.random.default_rng(0), layout(node(layer, *shapes), Partition()), layer.labels(*shapes)
    boxes, output = tuple(want.box(0) for want in place.inputs), place.output.box(0)
    held = {name: dist.box(0) for name, dist in place.weights.items()}
    op = layer.bind(Place("layer", 0, backend, dtype, shapes, boxes, place.work.box(0), output, held, None))
    inputs = list(zip(map(extent, boxes), labels, strict=True))
    x = [rng.integers(0, shapes[0][-1], n) if label else rng.random(n).astype(dtype) for n, label in inputs]
    dx = [None if label else np.empty(n, dtype) for n, label in inputs]
    w = {name: np.ones(dist.shape, dtype) for name, dist in {**place.weights, **place.state}.items()}
    dw = {name: np.empty(dist.shape, dtype) for name, dist in place.weights.items()}
    y, dy = np.zeros(extent(output), dtype), np.ones(extent(output), dtype)
    return Bound(op, lambda: op.forward(x, w, y, Phase()), lambda: op.backward(dy, w, dx, dw))


def peak(step: Callable[[], None]) -> int:
    """The most bytes that a call has allocated at a time."""
    tracemalloc.start()
    try:
        step()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def largest_bytes(layer: Layer, shapes: tuple[Shape, ...], itemsize: int) -> int:
    """Bytes of the largest tensor that goes into or out of a layer."""
    return itemsize * max(prod(shape) for shape in (*shapes, layer.output_shape(*shapes)))
