"""Trained parameters and their gradients on this rank: views into flat buffers, one stretch per group of replicas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from hpctrain import randomness
from hpctrain.layers import Weight
from hpctrain.optim import Shard
from hpctrain.partition import Box, Partition, Shape, extent
from hpctrain.planner.layout import Layout
from hpctrain.precision import exact
from hpctrain.regions import Distribution

Group = tuple[Partition, tuple[str, ...]]
"""Partition and replicated axes: ranks that hold the same blocks of the same parameters."""


@dataclass(frozen=True)
class Tensor:
    """This rank's block of a global tensor that outlives a step; checkpoints are lists of these."""

    name: str
    distribution: Distribution
    box: Box
    array: np.ndarray

    @property
    def shape(self) -> Shape:
        """Global shape."""
        return self.distribution.shape


@dataclass(frozen=True)
class Parameter(Tensor):
    """A tensor that is trained, and its gradient; all are views into the flat buffers."""

    gradient: np.ndarray
    used: np.ndarray
    """What layers compute with: `array`, or its copy in bf16."""
    decay: bool
    group: Group


class Parameters:
    """All parameters of a network that this rank holds, in flat `weights` and `gradients` (1D).

    They are of the run's float type; where that is bf16, both are float32, and layers compute with copies in `narrow`,
    except for biases and scales. Parameters of one replica group lie side by side, so that one allreduce of
    `gradients[stretch]` sums them all, and within a group those that decay come first.
    """

    def __init__(self, layouts: Iterable[Layout], rank: int, dtype: np.dtype, seed: int) -> None:
        self.rank = rank
        declared = sorted_by_group(layouts)
        total = sum(prod(extent(d.box(rank))) for _, _, d in declared)
        self.weights, self.gradients = np.zeros((2, total), exact(dtype))
        self.narrow = np.zeros(total, dtype) if self.weights.dtype != dtype else None
        self.groups: dict[Group, slice] = {}
        self.by_name: dict[str, Parameter] = {}
        at = 0
        for name, weight, dist in declared:
            box = dist.box(rank)
            stretch, shape = slice(at, at + prod(extent(box))), extent(box)
            group = (dist.partition, dist.replicated_axes)
            used = self.weights if self.narrow is None or not weight.decay else self.narrow
            self.by_name[name] = Parameter(
                name,
                dist,
                box,
                self.weights[stretch].reshape(shape),
                self.gradients[stretch].reshape(shape),
                used[stretch].reshape(shape),
                weight.decay,
                group,
            )
            self.by_name[name].array[...] = initial(weight, name, box, seed)
            self.groups[group] = slice(self.groups.get(group, stretch).start, stretch.stop)
            at = stretch.stop

    def shards(self) -> list[Shard]:
        """Where each parameter lies in the flat buffers, in order, for an optimizer."""
        found, at = [], 0
        for p in self.by_name.values():
            where = slice(at, at + p.array.size)
            found.append(Shard(where, p.decay, p.distribution.is_first_replica(self.rank)))
            at = where.stop
        return found

    def like(self, flat: np.ndarray, prefix: str) -> list[Tensor]:
        """`flat` (as long as `weights`) cut up like the parameters: optimizer state as tensors `prefix/name`."""
        found, at = [], 0
        for p in self.by_name.values():
            block = flat[at : at + p.array.size].reshape(p.array.shape)
            found.append(Tensor(f"{prefix}/{p.name}", p.distribution, p.box, block))
            at += p.array.size
        return found


def sorted_by_group(layouts: Iterable[Layout]) -> list[tuple[str, Weight, Distribution]]:
    """(name, weight, distribution) of every parameter, groups together in order of first use."""
    declared = []
    groups: dict[Group, int] = {}
    for place in layouts:
        weights: Mapping[str, Weight] = place.node.layer.weights(*place.node.input_shapes)
        for name, dist in place.weights.items():
            order = groups.setdefault((dist.partition, dist.replicated_axes), len(groups))
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
