"""What each rank does in an allreduce: against what the algorithms count themselves, and what the executor sums."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
from networks import NETWORKS, random_plan

from hpctrain.comm import allreduce
from hpctrain.comm.allreduce import hierarchical
from hpctrain.gradients.buckets import buckets
from hpctrain.machine import Level, Machine
from hpctrain.parameters import sorted_by_group
from hpctrain.planner.layout import layouts
from hpctrain.planner.reduction import reductions
from hpctrain.planner.rounds import STEPS, Add, Post, Step, Wait, steps_of
from hpctrain.planner.schedule import schedule
from hpctrain.planner.setting import Setting

FLOAT = np.dtype(np.float32)
ALGORITHMS = [name for name in STEPS if name in allreduce.TABLE]
RANKS = (2, 3, 4, 6, 7, 8, 11)


def every(name: str, hosts: tuple[int, ...], elements: int) -> list[tuple[Step, ...]]:
    """The steps of each rank."""
    return [steps_of(name, hosts, rank, elements, FLOAT) for rank in range(len(hosts))]


def sent(steps: tuple[Step, ...]) -> tuple[int, int]:
    """(messages, bytes) that a rank sends."""
    sizes = [step.nbytes for step in steps if isinstance(step, Post) and step.sends]
    return len(sizes), sum(sizes)


@pytest.mark.parametrize("elements", [0, 1, 5, 1000, 600_001])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_messages_are_those_that_the_algorithm_counts(name: str, elements: int) -> None:
    algorithm = allreduce.get(name)
    assert algorithm.sent is not None
    for ranks in RANKS:
        for rank, steps in enumerate(every(name, (0,) * ranks, elements)):
            assert sent(steps) == algorithm.sent(ranks, rank, elements, FLOAT.itemsize)


@pytest.mark.parametrize("hosts", [(0, 0, 1, 1), (0, 1, 0, 1, 2, 2), (0, 0, 0, 1), (0, 1, 2)])
def test_hierarchy_follows_the_hosts(hosts: tuple[int, ...]) -> None:
    found = every("hierarchical", hosts, 1003)
    for rank, steps in enumerate(found):
        assert sent(steps) == hierarchical.sent(len(hosts), rank, 1003, FLOAT.itemsize, hosts)
    near = {step.near for steps in found for step in steps if isinstance(step, Add)}
    assert near == ({True, False} if len(set(hosts)) < len(hosts) else {False})


@pytest.mark.parametrize("name", STEPS)
def test_what_one_sends_another_awaits(name: str) -> None:
    """For each pair of ranks the same sizes in the same order, all of them waited for, once."""
    for ranks in RANKS:
        out, into = defaultdict(list), defaultdict(list)
        for rank, steps in enumerate(every(name, tuple(r // 2 for r in range(ranks)), 1001)):
            posts = [step for step in steps if isinstance(step, Post)]
            waited = Counter(number for step in steps if isinstance(step, Wait) for number in step.posts)
            assert waited == Counter(range(len(posts)))
            for post in posts:
                if post.sends:
                    out[rank, post.peer].append(post.nbytes)
                else:
                    into[post.peer, rank].append(post.nbytes)
        assert out == into


@pytest.mark.parametrize("name", ["ring", "segmented_ring", "tree", "halving_doubling", "two_dimensional"])
def test_every_element_is_added_once_for_each_rank_but_one(name: str) -> None:
    for ranks in (2, 4, 8):
        added = sum(step.nbytes for steps in every(name, (0,) * ranks, 840) for step in steps if isinstance(step, Add))
        assert added == (ranks - 1) * 840 * FLOAT.itemsize


def test_halves_of_a_sharded_update_are_the_ring() -> None:
    ring = every("ring", (0,) * 5, 1001)
    halves = zip(every("reduce_scatter", (0,) * 5, 1001), every("allgather", (0,) * 5, 1001), strict=True)
    for whole, (scattered, gathered) in zip(ring, halves, strict=True):
        assert sent(whole) == tuple(a + b for a, b in zip(sent(scattered), sent(gathered), strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_buckets_are_those_of_the_executor(name: str, seed: int) -> None:
    """Same sizes, completed by the same units, in the same order, on every rank."""
    rng, net = np.random.default_rng(seed), NETWORKS[name]()
    machine = Machine(node=Level(1e-6, 1e-9, 1e-10), network=Level(1e-6, 1e-9, 1e-10), per_host=1)
    compared = 0
    for ranks in (2, 3, 4, 6):
        for elements in (1, 13, 200, 10**9):
            plan = random_plan(rng, net, ranks)
            places, setting = layouts(net, plan), Setting(machine, bucket_bytes=elements * FLOAT.itemsize)
            units = schedule(net, places, setting.economy).units
            print(f"seed {seed}, {ranks} ranks, buckets of {elements}")
            mine = reductions(net, plan, setting, places, units, range(ranks))
            declared = sorted_by_group(places.values())
            for rank in range(ranks):
                theirs = buckets(declared, [unit.names for unit in units], rank, elements)
                expected = [
                    (bucket.after, bucket.where.stop - bucket.where.start)
                    for group, found in theirs.items()
                    for bucket in found
                    if group[1] and rank < group[0].size
                ]
                found = [(bucket.after, bucket.elements) for bucket in mine if rank in bucket.ranks]
                assert found == [(after, size) for after, size in expected if size]
                compared += len(found)
    assert compared > 10
