"""How many numbers of weights a rank has, has in common with others of its host, and updates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from hpctrain.partition import split, volume
from hpctrain.planner.layout import Layout
from hpctrain.planner.plan import Group


class Weights(NamedTuple):
    """Numbers of weights on a rank."""

    used: int
    """That layers compute with."""
    kept: int
    """That lie in memory of this rank, not of another one of its host."""
    updated: int
    """That the optimizer updates."""


def weights(
    places: dict[str, Layout], rank: int, hosts: Sequence[int] | None, shard: bool, share_weights: bool
) -> Weights:
    """Those of `rank`, as `planner.memory.predict` is given the rest."""
    sizes: dict[Group, int] = {}
    for dist in (d for place in places.values() for d in place.weights.values()):
        group = dist.partition, dist.replicated_axes
        sizes[group] = sizes.get(group, 0) + volume(dist.box(rank))
    found = [_of_group(group, size, rank, hosts, shard, share_weights) for group, size in sizes.items() if size]
    return Weights(*(sum(numbers) for numbers in zip((0, 0, 0), *found, strict=True)))


def _of_group(
    group: Group, size: int, rank: int, hosts: Sequence[int] | None, shard: bool, share_weights: bool
) -> Weights:
    """As `gradients.ways` does it, where all of a group is summed at once."""
    partition, axes = group
    offsets = partition.offsets(axes)
    first = rank - offsets[partition.index(axes, rank)]
    replicas = [first + offset for offset in offsets]
    if len(replicas) == 1 or not (shard or share_weights):
        return Weights(size, size, size)
    if not share_weights:
        start, stop = split(size, len(replicas), replicas.index(rank))
        return Weights(size, size, stop - start)
    on = replicas if hosts is None else [hosts[r] for r in replicas]
    place, updating = on[: replicas.index(rank)].count(on[replicas.index(rank)]), min(Counter(on).values())
    start, stop = split(size, updating, place) if place < updating else (0, 0)
    return Weights(size, size if place == 0 else 0, stop - start)
