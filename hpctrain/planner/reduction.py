"""The sums of gradients of a step, by rank: which ranks add up how much together, when, and by what algorithm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hpctrain.comm.allreduce import choose
from hpctrain.graph import Graph
from hpctrain.machine import numbered
from hpctrain.planner.layout import Layout
from hpctrain.planner.pairs import extents
from hpctrain.planner.plan import Group, Plan
from hpctrain.planner.rounds import STEPS
from hpctrain.planner.schedule import Unit
from hpctrain.planner.setting import Setting
from hpctrain.planner.sums import allreduce_seconds, members
from hpctrain.precision import exact


class Bucket(NamedTuple):
    """What the ranks of one set of a replica group sum together."""

    tag: tuple[int, int, int]
    """Of its messages: group, first rank of the set, number of the bucket."""
    ranks: tuple[int, ...]
    hosts: tuple[int, ...]
    """Of each of these ranks, numbered as they first appear."""
    after: int
    """The unit whose backward completes it."""
    elements: int
    steps: str | None
    """The algorithm whose steps the ranks go through; None where they wait for each other, then for `seconds`."""
    seconds: float

    @property
    def name(self) -> str:
        """For people."""
        return f"sum {self.tag[2]} of group {self.tag[0]}"


class _Part(NamedTuple):
    """The weights of a layer that decay, or the others: which unit's backward makes their gradients."""

    unit: int
    sizes: np.ndarray
    """(ranks,) elements."""


def overlaps(setting: Setting, hosts: Sequence[int]) -> bool:
    """Whether backward goes on while gradients are summed."""
    return len(set(hosts)) > 1 if setting.overlap is None else setting.overlap


def reductions(
    graph: Graph,
    plan: Plan,
    setting: Setting,
    places: Mapping[str, Layout],
    units: Sequence[Unit],
    hosts: Sequence[int],
) -> list[Bucket]:
    """All buckets, those of a group together, in the order in which ranks begin those that one unit completes."""
    dtype = exact(setting.dtype)
    most = max(1, setting.bucket_bytes // dtype.itemsize) if overlaps(setting, hosts) else None
    found = []
    for number, (group, parts) in enumerate(_groups(graph, places, units, len(hosts)).items()):
        steps = _steps(group, sum(int(part.sizes[0]) for part in parts) * dtype.itemsize, plan, setting, hosts)
        _, crowd = members(group, hosts)
        for ranks in sets(group):
            at = numbered([hosts[rank] for rank in ranks])
            several = len(set(at)) > 1
            for i, (after, elements) in enumerate(_cut(parts, ranks[0], most)):
                seconds = allreduce_seconds(
                    elements * dtype.itemsize, at, setting, crowd if several else 1, plan.algorithm(group)
                )
                by_steps = steps in STEPS and (several or setting.shard)
                tag = number, ranks[0], i
                found.append(Bucket(tag, ranks, at, after, elements, steps if by_steps else None, seconds))
    return [bucket for bucket in found if bucket.elements]


def _groups(graph: Graph, places: Mapping[str, Layout], units: Sequence[Unit], ranks: int) -> dict[Group, list[_Part]]:
    """As `parameters.sorted_by_group`: groups in order of first use, what decays first, then in order of the graph."""
    unit_of = {name: i for i, unit in enumerate(units) for name in unit.names}
    found: dict[Group, tuple[list[_Part], list[_Part]]] = {}
    for name, place in places.items():
        declared = graph[name].layer.weights(*graph[name].input_shapes)
        for weight, dist in place.weights.items():
            decaying, others = found.setdefault((dist.partition, dist.replicated_axes), ([], []))
            part = _Part(unit_of[name], extents(dist, ranks).prod(axis=1))
            (decaying if declared[weight].decay else others).append(part)
    return {group: decaying + others for group, (decaying, others) in found.items() if group[1]}


def sets(group: Group) -> list[tuple[int, ...]]:
    """The ranks that sum together, those of each set in order."""
    partition, axes = group
    offsets = partition.offsets(axes)
    firsts = (rank for rank in range(partition.size) if partition.index(axes, rank) == 0)
    return [tuple(first + offset for offset in offsets) for first in firsts]


def _cut(parts: Sequence[_Part], rank: int, most: int | None) -> list[tuple[int, int]]:
    """(unit, elements) of the buckets of a rank, as `gradients.buckets` cuts them; all in one where `most` is None."""
    found: list[tuple[int, int]] = []
    for unit, sizes in parts:
        size = int(sizes[rank])
        if found and (most is None or found[-1][1] < most):
            found[-1] = min(found[-1][0], unit), found[-1][1] + size
        else:
            found.append((unit, size))
    return found


def _steps(group: Group, nbytes: int, plan: Plan, setting: Setting, hosts: Sequence[int]) -> str:
    """The algorithm of a group, as `gradients.Gradients` chooses it: that of the set that lies on the most hosts."""
    if setting.share_weights:
        return "hierarchical"
    if setting.shard:
        return "reduce_scatter"
    if (named := plan.algorithm(group) or setting.allreduce) is not None:
        return named
    room = 2**62 if setting.machine.copies is not None else 0
    return choose.choose(nbytes, members(group, hosts)[0], setting.machine, room).name
