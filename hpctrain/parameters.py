"""Trained parameters and their gradients on this rank: views into 1D storage, one for each group of replicas."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from hpctrain import randomness
from hpctrain.layers import Weight
from hpctrain.optim import Block, Shard
from hpctrain.partition import Box, Shape, boxes_of_run, empty, extent, volume
from hpctrain.planner.layout import Layout
from hpctrain.planner.plan import Group as Group
from hpctrain.precision import exact
from hpctrain.regions import Distribution


@dataclass(frozen=True)
class Tensor:
    """This rank's block of a global tensor that outlives a step; checkpoints are lists of these."""

    name: str
    distribution: Distribution
    box: Box
    array: np.ndarray
    alone: bool = False
    """Whether no other rank has this part of it, although `distribution` may say so."""

    @property
    def shape(self) -> Shape:
        """Global shape."""
        return self.distribution.shape

    def saved_by(self, rank: int) -> bool:
        """Whether `rank`, which has it, is the one that writes it into a checkpoint."""
        return self.alone or self.distribution.is_first_replica(rank)


@dataclass(frozen=True)
class Storage:
    """Memory for the parameters of one replica group on one rank, 1D arrays of one length; ranks may share some of it.

    Of the sums of gradients every rank reduces some, which no other rank of its host writes, and may read all.
    """

    weights: np.ndarray
    partials: np.ndarray
    """Where backward writes this rank's part of the gradients."""
    sums: np.ndarray
    """Where their sums are to be read, once complete."""
    reduced: tuple[slice, ...]
    """The parts of `sums` that this rank makes, in order."""
    counted: bool
    """Whether its parts count in sums over ranks; where several ranks make the same, those of the first one do."""
    sharded: bool = False
    """Whether a rank updates the weights of what it reduces alone, and another rank the others."""


Allocate = Callable[[Group, int, np.dtype], Storage]
"""Storage of a group of so many elements of a type. Collective where it is shared: groups come in an order that all
ranks share."""

Start = Callable[[Weight, str, Box, int], np.ndarray | float]
"""(weight, name, box, seed) -> starting values of a block, as `initial` gives them."""


@dataclass(frozen=True)
class Parameter(Tensor):
    """A tensor that is trained, and its gradient: views into the storage of its group."""

    partial: np.ndarray = field(kw_only=True)
    """Where backward writes this rank's part of the gradient."""
    gradient: np.ndarray = field(kw_only=True)
    """Where the sum over all replicas is to be read."""
    used: np.ndarray = field(kw_only=True)
    """What layers compute with: `array`, or its copy in bf16."""
    decay: bool = field(kw_only=True)
    group: Group = field(kw_only=True)
    where: slice = field(kw_only=True)
    """Its stretch of the storage of its group."""


class Parameters:
    """All parameters of a network that this rank holds, by replica group in 1D storage.

    They are of the run's float type; where that is bf16, they are float32, and layers compute with copies in bf16,
    except for biases and scales. Within a group those that decay come first.
    """

    def __init__(
        self,
        layouts: Iterable[Layout],
        rank: int,
        dtype: np.dtype,
        seed: int,
        allocate: Allocate | None = None,
        start: Start | None = None,
    ) -> None:
        self.rank, full = rank, exact(dtype)
        declared = sorted_by_group(layouts)
        sizes: dict[Group, int] = {}
        for _, _, dist in declared:
            sizes[group_of(dist)] = sizes.get(group_of(dist), 0) + volume(dist.box(rank))
        self.groups = {group: (allocate or own_memory(rank))(group, size, full) for group, size in sizes.items()}
        self.narrow = {group: np.zeros(size, dtype) for group, size in sizes.items() if dtype != full}
        """By group, the copies of weights in bf16."""
        self.by_name: dict[str, Parameter] = {}
        at = dict.fromkeys(sizes, 0)
        for name, weight, dist in declared:
            box, group = dist.box(rank), group_of(dist)
            where, memory = slice(at[group], at[group] + volume(box)), self.groups[group]
            used = self.narrow[group] if group in self.narrow and weight.decay else memory.weights
            self.by_name[name] = Parameter(
                name,
                dist,
                box,
                memory.weights[where].reshape(extent(box)),
                partial=memory.partials[where].reshape(extent(box)),
                gradient=memory.sums[where].reshape(extent(box)),
                used=used[where].reshape(extent(box)),
                decay=weight.decay,
                group=group,
                where=where,
            )
            self.by_name[name].array[...] = (start or initial)(weight, name, box, seed)
            at[group] = where.stop

    # --- what an optimizer updates ---------------------------------------------------------------------------------

    def blocks(self) -> list[Block]:
        """The storage of all groups, for an optimizer."""
        return [Block(memory.weights, memory.sums) for memory in self.groups.values()]

    def shards(self) -> list[Shard]:
        """What this rank updates of each parameter."""
        return [shard for _, shard in self._updated()]

    def like(self, flat: np.ndarray, prefix: str) -> list[Tensor]:
        """`flat` (as long as all shards) cut up like these: optimizer state as tensors `prefix/name`.

        At least one of each parameter, so that all ranks know of all: an empty one where a rank updates nothing of it.
        """
        found, at = [], 0
        for p, shard in self._updated():
            piece, name = flat[at : at + shard.size], f"{prefix}/{p.name}"
            at += shard.size
            if shard.size == p.array.size:
                alone = self.groups[p.group].sharded and shard.counted
                found.append(Tensor(name, p.distribution, p.box, piece.reshape(p.array.shape), alone))
                continue
            if shard.size == 0:
                found.append(Tensor(name, p.distribution, empty(p.array.ndim), piece.reshape((0,) * p.array.ndim)))
                continue
            start = shard.where.start - p.where.start
            for inner, stretch in boxes_of_run(extent(p.box), start, start + shard.size):
                box = tuple(slice(o.start + i.start, o.start + i.stop) for o, i in zip(p.box, inner, strict=True))
                block = piece[stretch].reshape(extent(box))
                found.append(Tensor(name, p.distribution, box, block, shard.counted))
        return found

    def _updated(self) -> Iterator[tuple[Parameter, Shard]]:
        """What this rank updates of each parameter: at least one shard of each, which may be of nothing."""
        order = list(self.groups)
        for i, p in enumerate(self.by_name.values()):
            memory = self.groups[p.group]
            if not memory.sharded:
                counted = p.distribution.is_first_replica(self.rank)
                yield p, Shard(i, order.index(p.group), p.where, p.decay, counted)
                continue
            parts = [overlap(part, p.where) for part in memory.reduced]
            for part in [part for part in parts if part.start < part.stop] or [slice(p.where.start, p.where.start)]:
                yield p, Shard(i, order.index(p.group), part, p.decay, memory.counted)


def own_memory(rank: int) -> Allocate:
    """Storage that no other rank sees, of `rank`, which has all sums and updates all weights."""

    def allocate(group: Group, size: int, dtype: np.dtype) -> Storage:
        partition, axes = group
        first = rank < partition.size and partition.index(axes, rank) == 0
        weights, gradients = np.zeros((2, size), dtype)
        return Storage(weights, gradients, gradients, (slice(0, size),), first)

    return allocate


def group_of(distribution: Distribution) -> Group:
    """The replica group of a parameter."""
    return distribution.partition, distribution.replicated_axes


def overlap(a: slice, b: slice) -> slice:
    """What two stretches share; one that stops before it starts where that is nothing."""
    return slice(max(a.start, b.start), min(a.stop, b.stop))


def sorted_by_group(layouts: Iterable[Layout]) -> list[tuple[str, Weight, Distribution]]:
    """(name, weight, distribution) of every parameter, groups together in order of first use."""
    declared = []
    groups: dict[Group, int] = {}
    for place in layouts:
        weights: Mapping[str, Weight] = place.node.layer.weights(*place.node.input_shapes)
        for name, dist in place.weights.items():
            order = groups.setdefault(group_of(dist), len(groups))
            declared.append((order, not weights[name].decay, f"{place.node.name}.{name}", weights[name], dist))
    declared.sort(key=lambda entry: entry[:2])
    return [(name, weight, dist) for _, _, name, weight, dist in declared]


def initial(weight: Weight, name: str, box: Box, seed: int) -> np.ndarray | float:
    """Starting values of a block: a function of (seed, name, global index), the same on any partition."""
    kind, scale = weight.init
    if kind == "constant":
        return scale
    if kind == "uniform":
        return scale * (2.0 * randomness.uniform(seed, name, weight.shape, box) - 1.0)
    return scale * randomness.normal(seed, name, weight.shape, box)
