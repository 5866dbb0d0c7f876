"""Buckets: stretches of a replica group's gradients that are summed together, as soon as backward has made them all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from hpctrain.layers import Weight
from hpctrain.parameters import Group, group_of
from hpctrain.partition import volume
from hpctrain.regions import Distribution


class Bucket(NamedTuple):
    """Neighbouring parameters of one group."""

    where: slice
    """Their stretch of the group's storage."""
    after: int
    """The unit of the schedule whose backward completes them: the first one in forward that uses any."""


def buckets(
    declared: Iterable[tuple[str, Weight, Distribution]],
    units: Sequence[Sequence[str]],
    rank: int,
    elements: int | None,
) -> dict[Group, list[Bucket]]:
    """The buckets of each group, of at least so many elements but for the last; all of a group in one where None.

    `declared` is what `parameters.sorted_by_group` gives, `units` the names of the layers of each unit in order of
    forward. The ranks of a group, which hold the same blocks, find the same buckets.
    """
    order = {name: i for i, names in enumerate(units) for name in names}
    found: dict[Group, list[Bucket]] = {}
    for name, _, dist in declared:
        unit, size = order[name.rpartition(".")[0]], volume(dist.box(rank))
        mine = found.setdefault(group_of(dist), [])
        last = mine[-1] if mine else Bucket(slice(0, 0), unit)
        if mine and (elements is None or last.where.stop - last.where.start < elements):
            mine[-1] = Bucket(slice(last.where.start, last.where.stop + size), min(last.after, unit))
        else:
            mine.append(Bucket(slice(last.where.stop, last.where.stop + size), unit))
    return found


def completed_by(found: Mapping[Group, Sequence[Bucket]]) -> dict[int, list[tuple[Group, int]]]:
    """{unit: (group, number) of the buckets that its backward completes}, in an order that all ranks share."""
    by_unit: dict[int, list[tuple[Group, int]]] = {}
    for group, mine in found.items():
        for i, bucket in enumerate(mine):
            by_unit.setdefault(bucket.after, []).append((group, i))
    return by_unit
