"""Allreduce algorithms over MPI: exact sums, the same bits every time, and the messages and bytes that they state."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from networks import ALLREDUCES

from hpctrain.comm import allreduce
from hpctrain.comm import link as link_module
from hpctrain.comm.allreduce import Algorithm, hierarchical, mpi, ring, segmented_ring
from hpctrain.comm.link import Link
from hpctrain.precision import BF16

NAMES = os.environ.get("HPCTRAIN_TEST_ALLREDUCE", "").split() or [*allreduce.TABLE]
"""One that needs a library is tested where that is installed."""

DTYPES = [np.dtype(name) for name in ("float32", "float64", "float16")] + [BF16]
SIZES = (0, 1, 2, 5, 17, 1023)
LARGEST = {"float32": 2**19, "float64": 2**48, "float16": 2**7, "bfloat16": 2**4}
"""Whole numbers up to this add up, over 9 ranks, to what the type has digits for: no order of adding rounds."""


@pytest.fixture
def link(comm: Any) -> Iterator[Link]:
    """A link of all ranks."""
    link = Link(comm)
    yield link
    link.free()


def whole_numbers(size: int, ranks: int, dtype: np.dtype, seed: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(buffer of every rank, their sum)."""
    most = LARGEST[dtype.name]
    every = np.random.default_rng(seed).integers(-most, most, (ranks, size), endpoint=True)
    return every.astype(dtype), every.sum(axis=0).astype(dtype)


def check(link: Link, algorithm: Algorithm, size: int, dtype: np.dtype, seed: list[int]) -> None:
    """The sum is exact, and what was sent is what the algorithm states."""
    every, total = whole_numbers(size, link.size, dtype, seed)
    buffer, before = every[link.rank].copy(), (link.messages, link.nbytes)
    assert algorithm.sum(link, buffer) is None
    np.testing.assert_array_equal(buffer, total, strict=True)
    sent = (link.messages - before[0], link.nbytes - before[1])
    stated = (0, 0) if algorithm.sent is None else algorithm.sent(link.size, link.rank, size, dtype.itemsize)
    assert sent == stated, f"{link.size} ranks, {size} elements"


@pytest.mark.parallel([1, 2, 3, 4, 5, 6, 7, 8, 9])
@pytest.mark.parametrize("name", NAMES)
def test_sums_messages_and_bytes(link: Link, name: str, seed: int) -> None:
    for dtype in DTYPES:
        for size in SIZES:
            check(link, allreduce.get(name), size, dtype, [seed, size])


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("name", NAMES)
def test_sums_of_large_buffers(link: Link, name: str, seed: int) -> None:
    """Several segments for each rank, and messages that MPI sends only when asked for."""
    check(link, allreduce.get(name), 1_500_007, np.dtype(np.float32), [seed])


def rounding(dtype: np.dtype, additions: int) -> tuple[float, float]:
    """(relative, absolute) bound on the error of so many additions, of the sum of sizes.

    Each is off by u, half an eps, and where it is made in float32 first by that of float32 too; n of them by less
    than n u / (1 - n u).
    """
    info = ml_dtypes.finfo(dtype)
    u = float(info.eps) / 2 + 2.0**-23 * (dtype.itemsize == 2)
    return additions * u / (1 - additions * u), additions * float(info.smallest_subnormal) / 2


@pytest.mark.parallel([1, 2, 3, 4, 5, 6, 7, 8, 9])
@pytest.mark.parametrize("name", NAMES)
def test_same_bits_on_all_ranks_every_time_and_near_the_exact_sum(link: Link, name: str, seed: int) -> None:
    for dtype in DTYPES:
        for size in (3, 257):
            every = np.random.default_rng([seed, size]).normal(size=(link.size, size)).astype(dtype)
            first, second = every[link.rank].copy(), every[link.rank].copy()
            allreduce.get(name).sum(link, first)
            allreduce.run(allreduce.get(name).steps(link, second))
            if name != "mpi":
                np.testing.assert_array_equal(first, second)
                assert len(set(link.comm.allgather(first.tobytes()))) == 1
            wide = every.astype(np.longdouble)
            relative, absolute = rounding(dtype, max(1, link.size - 1))
            bound = relative * np.abs(wide).sum(axis=0) + absolute
            assert np.all(np.abs(second.astype(np.longdouble) - wide.sum(axis=0)) <= bound)


@pytest.mark.parallel([2, 3, 6])
@pytest.mark.parametrize("name", NAMES)
def test_stretch_of_a_larger_buffer_leaves_the_rest(link: Link, name: str) -> None:
    for dtype in (np.dtype(np.float64), BF16):
        buffer = (np.arange(101.0) % 8).astype(dtype) * (link.rank + 1)
        times = np.full(101, link.rank + 1.0)
        times[7:40] = link.size * (link.size + 1) / 2
        allreduce.get(name).sum(link, buffer[7:40])
        np.testing.assert_array_equal(buffer, (np.arange(101) % 8 * times).astype(dtype))


@pytest.mark.parallel([1, 2, 3, 6])
@pytest.mark.parametrize("name", NAMES)
def test_nan_and_infinity_pass_to_all_ranks_and_warn_of_nothing(link: Link, name: str) -> None:
    for dtype in DTYPES:
        buffer = np.ones(23, dtype)
        buffer[2] = np.inf if link.rank % 2 else -np.inf
        buffer[9] = ml_dtypes.finfo(dtype).max
        if link.rank == link.size - 1:
            buffer[[0, 5, 22]] = np.nan, np.inf, -np.inf
        allreduce.get(name).sum(link, buffer)
        several = link.size > 1
        expected = [np.nan, np.inf, -np.inf, link.size, np.nan if several else -np.inf]
        np.testing.assert_array_equal(buffer[[0, 5, 22, 1, 2]].astype(np.float64), expected)
        assert np.isinf(buffer[9]) == several


@pytest.mark.parallel([2, 3, 4])
def test_ring_sends_to_its_neighbour_only(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    peers, send = set(), link.send
    monkeypatch.setattr(link, "send", lambda array, peer: peers.add(peer) or send(array, peer))
    allreduce.get("ring").sum(link, np.ones(17))
    assert peers == {(link.rank + 1) % link.size}


@pytest.mark.parallel([2, 3, 4, 5])
def test_small_segments(link: Link, seed: int) -> None:
    """Many messages under way one after the other; the ring's bits."""
    for dtype in DTYPES:
        mine = np.random.default_rng([seed, link.rank]).normal(size=1001).astype(dtype)
        expected = mine.copy()
        allreduce.run(ring.steps(link, expected))
        before = link.messages, link.nbytes
        allreduce.run(segmented_ring.steps(link, mine, most=100))
        np.testing.assert_array_equal(mine, expected)
        stated = segmented_ring.sent(link.size, link.rank, 1001, dtype.itemsize, most=100)
        assert (link.messages - before[0], link.nbytes - before[1]) == stated


@pytest.mark.parallel([2, 4, 5, 6])
@pytest.mark.parametrize("between", [ring.steps, mpi.steps], ids=["ring", "mpi"])
def test_hierarchical_over_hosts_and_what_crosses_between_them(comm: Any, between: Any, seed: int) -> None:
    p = comm.size
    layouts = {"alternating": [rank % 2 for rank in range(p)], "uneven": [int(rank > 0) for rank in range(p)]}
    for hosts in layouts.values():
        link = Link(comm, hosts=hosts)
        node, across = link.nodes()
        here = [rank for rank in range(p) if hosts[rank] == hosts[comm.rank]]
        assert (node.size, node.rank) == (len(here), here.index(comm.rank))
        assert across.size == sum(hosts.count(host) > node.rank for host in set(hosts))
        for size in (0, 1, 41):
            every, total = whole_numbers(size, p, np.dtype(np.float32), [seed, size])
            buffer = every[comm.rank].copy()
            allreduce.run(hierarchical.steps(link, buffer, between=between))
            np.testing.assert_array_equal(buffer, total)
            before = link.messages, link.nbytes, across.nbytes
            allreduce.run(hierarchical.steps(link, buffer))
            stated = hierarchical.sent(p, comm.rank, size, 4, hosts)
            assert (link.messages - before[0], link.nbytes - before[1]) == stated
            # two hosts: all that they send to one another is one buffer each
            assert comm.allreduce(across.nbytes - before[2]) == 2 * size * 4
        link.free()


# --- the link -----------------------------------------------------------------------------------------------------


@pytest.mark.parallel([2, 3])
def test_link_counts_what_it_sends_and_sends_nothing_of_nothing(link: Link) -> None:
    right, left = (link.rank + 1) % link.size, (link.rank - 1) % link.size
    for dtype in DTYPES:
        before, into = (link.messages, link.nbytes), np.zeros(5, dtype)
        requests = [link.recv(into, left), link.send(np.full(5, link.rank, dtype), right)]
        requests += [link.recv(into[:0], left), link.send(into[:0], right)]
        allreduce.run(iter([requests]))
        assert into.tolist() == [left] * 5
        assert (link.messages - before[0], link.nbytes - before[1]) == (1, 5 * dtype.itemsize)


@pytest.mark.parallel([1, 2, 4, 6])
def test_link_finds_this_host_and_a_near_square_grid(comm: Any, link: Link) -> None:
    node, across = link.nodes()
    assert (node.size, node.rank, across.size) == (comm.size, comm.rank, 1)  # mpirun of tests: one host
    assert set(link.topology.hosts) == {0}
    row, column = link.grid()
    assert (column.size, row.size) == {1: (1, 1), 2: (1, 2), 4: (2, 2), 6: (2, 3)}[comm.size]
    assert (column.rank, row.rank) == divmod(comm.rank, row.size)
    assert link.nodes()[0] is node
    assert link.lane(3).nodes()[0].comm is node.comm
    with pytest.raises(ValueError, match=f"hosts names 99 ranks, the communicator has {comm.size}"):
        Link(comm, hosts=[0] * 99)


@pytest.mark.parallel([2, 3])
def test_scratch_is_kept(link: Link) -> None:
    large = link.scratch(1000, np.dtype(np.float64))
    for name in allreduce.TABLE:
        allreduce.get(name).sum(link, np.ones(999, np.float32))
    small = link.scratch(10, BF16)
    assert np.shares_memory(large, small)
    assert (small.size, small.dtype) == (10, BF16)


@pytest.mark.parallel([2, 3, 4])
def test_more_elements_than_mpi_counts(link: Link, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """As if that were 7: those of one message then travel as one element of a larger type."""
    for module in (link_module, mpi):
        monkeypatch.setattr(module, "MOST_ELEMENTS", 7)
    for name in ALLREDUCES:
        for dtype in DTYPES:
            for size in (7, 8, 103):
                check(link, allreduce.get(name), size, dtype, [seed, size])
                every, total = whole_numbers(size, link.size, dtype, [seed, size])
                allreduce.run(allreduce.get(name).steps(link, every[link.rank]))
                np.testing.assert_array_equal(every[link.rank], total)


# --- several at once ----------------------------------------------------------------------------------------------


@pytest.mark.parallel([2, 3, 5])
def test_running_goes_on_when_polled_and_ends(link: Link, seed: int) -> None:
    every, total = whole_numbers(41, link.size, np.dtype(np.float64), [seed])
    for name in allreduce.TABLE:
        for waits in (False, True):
            buffer = every[link.rank].copy()
            running = allreduce.Running(allreduce.get(name).steps(link, buffer))
            if waits:
                assert running.wait() is None
            else:
                polls = 0
                while not running.poll():
                    polls += 1
                    assert polls < 10**7
            assert running.poll()
            assert running.wait() is None
            np.testing.assert_array_equal(buffer, total)


def subgroup(comm: Any, rng: np.random.Generator) -> tuple[Any, list[int]]:
    """A communicator of some of the ranks in some order, and which; `rng` is the same on all ranks."""
    order, colors = rng.permutation(comm.size), rng.integers(2, size=comm.size)
    if rng.random() < 0.4:
        colors[:] = 0
    mine = [int(rank) for rank in order if colors[rank] == colors[comm.rank]]
    return comm.Split(int(colors[comm.rank]), int(np.flatnonzero(order == comm.rank)[0])), mine


def one_program(comm: Any, rng: np.random.Generator, own: np.random.Generator) -> int:
    """Some sums within a random group, all under way at once; how many."""
    group, members = subgroup(comm, rng)
    hosts = rng.integers(2, size=comm.size) if rng.random() < 0.5 else np.zeros(comm.size, int)
    link = Link(group, hosts=[int(hosts[rank]) for rank in members])
    link.nodes()
    link.grid()
    lanes = [link.lane(tag) for tag in range(int(rng.integers(1, 6)))]
    under_way = []
    for lane in lanes:
        name, dtype = str(rng.choice([*ALLREDUCES, "shared"])), DTYPES[rng.integers(len(DTYPES))]
        size, most = int(rng.choice([0, 1, 3, 100, 5001, 70_001])), LARGEST[dtype.name]
        every = rng.integers(-most, most, (comm.size, size))
        if name == "shared" and len(set(link.topology.hosts)) > 1:
            name = "ring"
        steps = partial(segmented_ring.steps, most=64) if name == "segmented_ring" else allreduce.get(name).steps
        buffer, total = every[comm.rank].astype(dtype), every[members].sum(axis=0).astype(dtype)
        under_way.append((allreduce.Running(steps(lane, buffer)), buffer, total, f"{name} of {size} by {members}"))
    for _ in range(int(own.integers(20))):
        under_way[own.integers(len(under_way))][0].poll()
    left = list(own.permutation(len(under_way)))
    while left:
        left = [i for i in left if not under_way[i][0].poll()]
    for _, buffer, total, what in under_way:
        np.testing.assert_array_equal(buffer, total, err_msg=what, strict=True)
    for each in (*lanes, link):
        each.free()
    group.Free()
    return len(under_way)


@pytest.mark.parallel([2, 3, 4, 5, 6, 7, 8, 9])
def test_random_programs(comm: Any, seed: int, record_property: Any) -> None:
    """Random algorithms, sizes, types and groups, several at once, each rank going on with them in its own order."""
    rng, own = np.random.default_rng(seed), np.random.default_rng([seed, comm.rank])
    sums = sum(one_program(comm, rng, own) for _ in range(8))
    if comm.rank == 0:
        record_property("cases", ("sums of random programs", f"{comm.size} ranks", sums))
