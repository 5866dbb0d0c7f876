"""Compares what ranks hold of a step with what one rank computed alone, one block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import inf, sqrt

import numpy as np

from hpctrain.backends.base import Array
from hpctrain.executor import Executor
from hpctrain.layers import Input, Loss
from hpctrain.parameters import Tensor
from hpctrain.partition import Box, Shape, extent, volume
from hpctrain.regions import Region
from hpctrain.verify.run import Run
from hpctrain.verify.tolerance import Tolerance

OUTPUT, INPUT_GRADIENT, WEIGHT_GRADIENT, UPDATE = "output", "input_gradient", "weight_gradient", "weights"
KINDS = (OUTPUT, INPUT_GRADIENT, WEIGHT_GRADIENT, UPDATE)
"""What is compared of a layer; statistics that it keeps running count as its weights."""


@dataclass(frozen=True)
class Item:
    """One tensor: what this rank has of it, and on rank 0 all of it."""

    layer: str
    kind: str
    what: str
    """What it is, for a message."""
    region: Region
    block: Array
    whole: Array | None = None
    besides: tuple[Array, ...] = ()
    """On rank 0, what its elements are sums of or stand beside, where these may cancel: see `compare`."""
    adopted: bool = False
    """Whether the whole run goes on with what the ranks have."""


@dataclass(frozen=True)
class Finding:
    """The largest difference of one tensor: where it is, and what stands there with the plan and whole."""

    layer: str
    kind: str
    what: str
    step: int
    difference: float
    """Relative, as `Tolerance` says."""
    allowed: float
    rank: int = 0
    box: Box = ()
    at: Shape = ()
    found: float = 0.0
    expected: float = 0.0

    @property
    def equal(self) -> bool:
        """Whether rounding explains it."""
        return self.difference <= self.allowed


def before_update(planned: Run, whole: Run | None) -> Iterator[Item]:
    """Outputs and running statistics in the order they were computed, then gradients in theirs."""
    mine, one = planned.executor, None if whole is None else whole.executor
    for node in mine.graph:
        if isinstance(node.layer, Input):
            continue
        if mine.makes(node.name):
            region = mine.layouts[node.name].output
            theirs = None if one is None else one.output(node.name)
            yield Item(node.name, OUTPUT, "output", region, mine.output(node.name), theirs)
        for i, tensor in enumerate(mine.state):
            if tensor.name.rpartition(".")[0] == node.name:
                yield _statistic(node.name, tensor, one, i)
    for node in reversed(list(mine.graph)):
        for slot, source in enumerate(node.inputs):
            exchange = mine.exchanges.get((node.name, slot))  # none within a unit of fused layers
            if exchange is not None and (way := exchange.bwd) is not None:
                theirs = None if one is None else _gradient_sent(one, node.name, slot)
                region = mine.layouts[source].output
                yield Item(node.name, INPUT_GRADIENT, f"gradient of its input {source}", region, way.dst, theirs)
        for name, parameter in mine.parameters.by_name.items():
            layer, _, weight = name.rpartition(".")
            if layer != node.name:
                continue
            what, region = f"gradient of its {weight}", parameter.distribution
            item = Item(layer, WEIGHT_GRADIENT, what, region, parameter.gradient, adopted=True)
            if one is not None:
                # a bias before a normalization has gradient 0, a sum that cancels but for rounding
                dy = () if isinstance(node.layer, Loss) else (one.output_gradient(layer),)
                item = replace(item, whole=one.parameters.by_name[name].gradient, besides=dy)
            yield item


def after_update(planned: Run, whole: Run | None) -> Iterator[Item]:
    """Updated weights."""
    for name, parameter in planned.executor.parameters.by_name.items():
        layer, _, weight = name.rpartition(".")
        theirs = None if whole is None else whole.executor.parameters.by_name[name].array
        what, region = f"updated {weight}", parameter.distribution
        yield Item(layer, UPDATE, what, region, parameter.array, theirs, adopted=True)


def _gradient_sent(one: Executor, name: str, slot: int) -> Array | None:
    way = one.exchanges[name, slot].bwd
    return None if way is None else way.dst


def _statistic(layer: str, tensor: Tensor, one: Executor | None, index: int) -> Item:
    """The mean over a batch of what was normalized before is 0 but for rounding: it stands beside its input."""
    theirs: Array | None = None
    besides: tuple[Array, ...] = ()
    if one is not None:
        theirs, source = one.state[index].array, one.graph[layer].inputs[0]
        besides = (one.input(source) if isinstance(one.graph[source].layer, Input) else one.output(source),)
    what = f"running {tensor.name.rpartition('.')[2]}"
    return Item(layer, UPDATE, what, tensor.distribution, tensor.array, theirs, besides, adopted=True)


def compare(run: Run, item: Item, tolerance: Tolerance, step: int) -> Finding | None:
    """On rank 0, how much the blocks of all ranks differ from the whole; None elsewhere. Collective.

    Rank 0 holds one block of another rank at a time. Relative to the largest element of the whole tensor and of what
    stands `besides` it. What is `adopted` then takes the ranks' values: the whole run's update starts from the same
    gradients, and its next step from the same weights, so that rounding is not amplified from one to the next (Adam
    turns the sign of a gradient of 1e-17 into a step of full length), and every step is judged alone.
    """
    comm = run.executor.comm
    if comm.rank > 0:
        if volume(item.region.box(comm.rank)):
            comm.Send(np.ascontiguousarray(item.block), 0)
        return None
    if item.whole is None:
        raise ValueError(f"{item.layer}: {item.what}: rank 0 compares, and needs the whole tensor")
    gradient = item.kind in (INPUT_GRADIENT, WEIGHT_GRADIENT)
    allowed = tolerance.gradient if gradient else tolerance.output if item.kind == OUTPUT else tolerance.update
    worst = _Worst(item.whole, tolerance.mean_square and gradient, item.besides)
    taken = item.whole.copy() if item.adopted else None
    for rank in range(comm.size):
        box = item.region.box(rank)
        if volume(box) == 0:
            continue
        block = item.block
        if rank > 0:
            block = np.empty(extent(box), item.whole.dtype)
            comm.Recv(block, rank)
        worst.look(rank, box, block)
        if taken is not None:
            taken[box] = block
    if taken is not None:
        item.whole[...] = taken
    return Finding(item.layer, item.kind, item.what, step, worst.relative(), allowed, *worst.place)


@dataclass
class _Worst:
    """The largest difference so far."""

    whole: Array
    mean_square: bool
    besides: tuple[Array, ...]
    largest: float = 0.0
    squares: float = 0.0
    place: tuple[int, Box, Shape, float, float] = field(default=(0, (), (), 0.0, 0.0))

    def look(self, rank: int, box: Box, block: Array) -> None:
        """Take a block into account."""
        expected = self.whole[box]
        if block.shape != expected.shape:
            raise ValueError(f"rank {rank} holds {block.shape} of box {box}")
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.abs(block - expected)
        difference[(block == expected) | (np.isnan(block) & np.isnan(expected))] = 0  # infinity where both have it
        difference[np.isnan(difference)] = inf
        self.squares += float(np.square(difference, dtype=np.float64).sum())
        at = np.unravel_index(int(difference.argmax()), difference.shape)
        if not self.place[1] or difference[at] > self.largest:
            self.largest = float(difference[at])
            where = tuple(s.start + int(i) for s, i in zip(box, at, strict=True))
            self.place = (rank, box, where, float(block[at]), float(expected[at]))

    def relative(self) -> float:
        """The difference as `Tolerance` states it; infinite where something differs from nothing but zeros."""
        if self.largest == 0:
            return 0.0
        if self.mean_square:
            squares = float(np.square(self.whole, dtype=np.float64).sum())
            size = max(sqrt(squares), *(_size(array) * sqrt(self.whole.size) for array in self.besides), 0.0)
            return sqrt(self.squares) / size if size else inf
        size = max(map(_size, (self.whole, *self.besides)))
        return self.largest / size if size else inf


def _size(array: Array) -> float:
    """The largest magnitude of a finite element."""
    magnitudes = np.abs(array)
    return float(magnitudes.max(initial=0.0, where=np.isfinite(magnitudes)))
