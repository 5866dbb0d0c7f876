"""Runs of elements cut into boxes, and parameters into buckets: every element once, in order."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from networks import NETWORKS, random_plan

from hpctrain.gradients.buckets import buckets, completed_by
from hpctrain.parameters import group_of, sorted_by_group
from hpctrain.partition import Shape, boxes_of_run, extent, volume
from hpctrain.planner.layout import layouts
from hpctrain.planner.schedule import Economy, schedule

SHAPES: list[Shape] = [(), (1,), (7,), (1, 1), (3, 5), (5, 1, 3), (2, 3, 5), (1, 4, 1, 3), (3, 1, 2, 2, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_boxes_of_every_run_hold_its_elements_in_order(shape: Shape) -> None:
    size = int(np.prod(shape))
    numbers = np.arange(size).reshape(shape)
    for start in range(size + 1):
        for stop in range(start, size + 1):
            found = boxes_of_run(shape, start, stop)
            elements = [numbers[box].ravel() for box, _ in found]
            assert np.concatenate([np.zeros(0, int), *elements]).tolist() == list(range(start, stop))
            stretches = [stretch for _, stretch in found]
            assert [stretch.stop - stretch.start for stretch in stretches] == [each.size for each in elements]
            assert [stretch.start for stretch in stretches] == [0, *(s.stop for s in stretches[:-1])][: len(found)]
            assert len(found) <= max(1, 2 * len(shape) - 1)
            assert all(extent(box) == numbers[box].shape for box, _ in found)


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2)], ids=str)
def test_run_of_nothing_has_no_boxes(shape: Shape) -> None:
    assert boxes_of_run(shape, 0, 0) == []


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_buckets_cover_each_group_in_order_and_follow_the_last_backward(name: str, fuse: bool, seed: int) -> None:
    rng, net = np.random.default_rng(seed), NETWORKS[name]()
    for ranks in (1, 2, 3, 4, 6):
        plan = random_plan(rng, net, ranks)
        places = layouts(net, plan)
        units = [unit.names for unit in schedule(net, places, Economy(fuse=fuse)).units]
        declared = sorted_by_group(places.values())
        for elements in (None, 1, 13, 200, 10**9):
            every = [buckets(declared, units, rank, elements) for rank in range(ranks)]
            for rank, found in enumerate(every):
                print(f"seed {seed}, {ranks} ranks, rank {rank}, buckets of {elements}")
                at = dict.fromkeys(found, 0)
                after: dict[tuple[object, int], list[int]] = {}
                for parameter, _, dist in declared:
                    group, size = group_of(dist), volume(dist.box(rank))
                    holds = [
                        i
                        for i, (where, _) in enumerate(found[group])
                        if where.start <= at[group] and at[group] + size <= where.stop
                    ]
                    assert holds, f"{parameter} is cut"
                    (unit,) = (i for i, names in enumerate(units) if parameter.rpartition(".")[0] in names)
                    if size:
                        (number,) = holds
                        after.setdefault((group, number), []).append(unit)
                    at[group] += size
                for group, mine in found.items():
                    assert [0, *(b.where.stop for b in mine)] == [*(b.where.start for b in mine), at[group]]
                    sizes = [where.stop - where.start for where, _ in mine]
                    assert len(mine) == 1 if elements is None else all(n >= elements for n in sizes[:-1])
                    for number, bucket in enumerate(mine):
                        units_of = after.get((group, number), [bucket.after])
                        assert bucket.after <= min(units_of), "summed before backward has made all of it"
                by_unit = completed_by(found)
                listed = [entry for unit in sorted(by_unit) for entry in by_unit[unit]]
                assert sorted(map(str, listed)) == sorted(
                    str((g, i)) for g, mine in found.items() for i in range(len(mine))
                )
                assert all(found[g][i].after == unit for unit, entries in by_unit.items() for g, i in entries)


def test_buckets_are_no_larger_than_they_must(seed: int) -> None:
    """Without its last parameter, no bucket would be large enough."""
    net = NETWORKS["cosmoflow"]()
    places = layouts(net, random_plan(np.random.default_rng(seed), net, 1))
    declared = sorted_by_group(places.values())
    units = [unit.names for unit in schedule(net, places, Economy()).units]
    for elements in (1, 50, 500):
        for group, mine in buckets(declared, units, 0, elements).items():
            sizes = [volume(dist.box(0)) for _, _, dist in declared if group_of(dist) == group]
            ends = np.cumsum(sizes).tolist()
            for bucket in mine[:-1]:
                last = sizes[ends.index(bucket.where.stop)]
                assert bucket.where.stop - bucket.where.start - last < elements
            assert all(a.where.stop == b.where.start for a, b in pairwise(mine))
