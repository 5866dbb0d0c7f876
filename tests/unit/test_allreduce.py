"""Allreduce algorithms on simulated ranks, any number of them: sums, messages, bytes, and the time of the formulas."""

from __future__ import annotations

import re
from functools import partial
from types import ModuleType
from typing import Any, get_args

import numpy as np
import pytest
from simulation import Simulation

from hpctrain.comm import allreduce
from hpctrain.comm.allreduce import (
    binary_blocks,
    halving,
    halving_doubling,
    hierarchical,
    mpi,
    recursive_doubling,
    ring,
    segmented_ring,
    tree,
    two_dimensional,
)
from hpctrain.comm.allreduce.cost import Network
from hpctrain.comm.link import add
from hpctrain.config import Allreduce
from hpctrain.errors import PlanError
from hpctrain.precision import BF16

OURS: dict[str, ModuleType] = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        ring,
        segmented_ring,
        recursive_doubling,
        halving_doubling,
        binary_blocks,
        tree,
        hierarchical,
        two_dimensional,
    )
}
RANKS = (*range(1, 18), 23, 24, 32, 33)
NET = Network(alpha=7.0, beta=0.5, gamma=0.25)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Simulation(...) whose additions are timed."""

    def make(*args: Any, **kwargs: Any) -> Simulation:
        simulation = Simulation(*args, **kwargs)
        for module in (halving, *OURS.values()):
            if hasattr(module, "add"):
                monkeypatch.setattr(module, "add", simulation.add)
        return simulation

    return make


def hosts_of(kind: str, ranks: int) -> list[int]:
    """Layouts of ranks over hosts."""
    return {
        "one": [0] * ranks,
        "each": list(range(ranks)),
        "pairs": [rank // 2 for rank in range(ranks)],  # uneven where the ranks are odd
        "thirds": [rank % 3 for rank in range(ranks)],
        "lopsided": [int(rank == ranks // 2) for rank in range(ranks)],
    }[kind]


# --- sums ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_sum_messages_and_bytes_on_any_number_of_ranks(name: str, simulated: Any, seed: int) -> None:
    """Whole numbers, so that sums are exact. All but recursive doubling add each element p - 1 times in all, and copy
    it p - 1 times: over all ranks 2 (p - 1) buffers are sent, the least possible (Patarasuk and Yuan 2009)."""
    steps, sent = OURS[name].steps, OURS[name].sent
    for ranks in RANKS:
        for size in (0, 1, 5, 3 * ranks + 1):
            buffers = np.random.default_rng([seed, ranks, size]).integers(-(2**20), 2**20, (ranks, size)).astype("f8")
            total, simulation = buffers.sum(axis=0), simulated(ranks)
            simulation.run(steps, buffers)
            np.testing.assert_array_equal(buffers, np.broadcast_to(total, buffers.shape))
            counted = list(zip(simulation.messages, simulation.nbytes, strict=True))
            assert counted == [sent(ranks, rank, size, 8) for rank in range(ranks)], (ranks, size)
            if name != "recursive_doubling":
                assert sum(simulation.nbytes) == 2 * (ranks - 1) * size * 8


@pytest.mark.parametrize("name", OURS)
def test_all_ranks_end_with_the_same_bits(name: str, simulated: Any, seed: int) -> None:
    for ranks in RANKS:
        rng = np.random.default_rng([seed, ranks])
        buffers = rng.normal(size=(ranks, 37)).astype("f4")
        again = buffers.copy()
        for each in (buffers, again):
            simulated(ranks).run(OURS[name].steps, each)
            assert len({row.tobytes() for row in each}) == 1
        np.testing.assert_array_equal(buffers, again)


@pytest.mark.parametrize("most", [8, 24, 1000])
def test_segmented_ring_is_the_ring_to_the_last_bit(most: int, simulated: Any, seed: int) -> None:
    for ranks in (1, 2, 3, 5, 8):
        for size in (0, 1, ranks, 41):
            buffers = np.random.default_rng([seed, ranks, size]).normal(size=(ranks, size))
            expected, simulation = buffers.copy(), simulated(ranks)
            simulated(ranks).run(ring.steps, expected)
            simulation.run(partial(segmented_ring.steps, most=most), buffers)
            np.testing.assert_array_equal(buffers, expected)
            counted = list(zip(simulation.messages, simulation.nbytes, strict=True))
            assert counted == [segmented_ring.sent(ranks, rank, size, 8, most) for rank in range(ranks)]
            if size == 41 and most == 8 and ranks > 1:  # one element each: 41 / p segments, a block each to gather
                assert counted[0][0] >= (ranks - 1) * (size // ranks + 1)


@pytest.mark.parametrize("kind", ["one", "each", "pairs", "thirds", "lopsided"])
def test_hierarchical_on_any_hosts(kind: str, simulated: Any, seed: int) -> None:
    for ranks in (1, 2, 3, 4, 6, 7, 12, 13):
        hosts = hosts_of(kind, ranks)
        for size in (0, 1, 41):
            buffers = np.random.default_rng([seed, ranks, size]).integers(-99, 99, (ranks, size)).astype("f4")
            total, simulation = buffers.sum(axis=0), simulated(ranks, hosts=hosts)
            simulation.run(hierarchical.steps, buffers)
            np.testing.assert_array_equal(buffers, np.broadcast_to(total, buffers.shape))
            counted = list(zip(simulation.messages, simulation.nbytes, strict=True))
            assert counted == [hierarchical.sent(ranks, rank, size, 4, hosts) for rank in range(ranks)]


def test_hierarchical_takes_other_parts(simulated: Any) -> None:
    """Within the hosts tree and tree in place of ring and ring; between them any other algorithm."""
    used = []

    def whole(part: Any) -> Any:
        def steps(link: Any, buffer: np.ndarray) -> Any:
            used.append(link.members)
            return part(link, buffer)

        return steps

    within = hierarchical.Within(*(whole(part) for part in (tree.steps, tree.broadcast, tree.reduce, tree.broadcast)))
    for hosts in ([0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 1, 2]):
        for between in (ring.steps, tree.steps, recursive_doubling.steps, binary_blocks.steps):
            buffers = np.arange(6.0 * 11).reshape(6, 11)
            total = buffers.sum(axis=0)
            # summed to all in the host, a share each between hosts: only shares are right until the leader's are spread
            simulated(6, hosts=hosts).run(partial(hierarchical.steps, between=between, within=within), buffers)
            if len(set(map(hosts.count, hosts))) == 1:
                np.testing.assert_array_equal(buffers[0, :6], total[:6])
            else:
                np.testing.assert_array_equal(buffers, np.broadcast_to(total, buffers.shape))
    assert set(used) == {(0, 1), (2, 3), (4, 5), (2, 3, 4), (5,)}


def test_reduce_scatter_and_allgather_of_the_ring_are_by_rank(simulated: Any) -> None:
    for ranks in (1, 2, 3, 5):
        buffers = np.arange(1.0, ranks * 13 + 1).reshape(ranks, 13) ** 2
        total = buffers.sum(axis=0)
        simulated(ranks).run(ring.reduce_scatter, buffers)
        # np.array_split too makes the first blocks one longer
        own = [np.array_split(buffers[rank], ranks)[rank] for rank in range(ranks)]
        np.testing.assert_array_equal(np.concatenate(own), total)
        gathered = np.full((ranks, 13), -1.0)
        for rank in range(ranks):
            np.array_split(gathered[rank], ranks)[rank][:] = own[rank]
        simulated(ranks).run(ring.allgather, gathered)
        np.testing.assert_array_equal(gathered, np.broadcast_to(total, gathered.shape))


# --- seconds ------------------------------------------------------------------------------------------------------


def simulated_seconds(simulation: Simulation, steps: Any, elements: int) -> float:
    buffers = np.ones((simulation.ranks, elements))
    seconds = simulation.run(steps, buffers)
    assert np.all(buffers == simulation.ranks)
    return seconds


@pytest.mark.parametrize("name", ["ring", "recursive_doubling", "halving_doubling", "two_dimensional"])
def test_formula_is_the_time_of_the_simulated_messages(name: str, simulated: Any) -> None:
    for ranks in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 17):
        elements = ranks * 32
        seconds = simulated_seconds(simulated(ranks, lambda a, b: NET, gamma=NET.gamma), OURS[name].steps, elements)
        assert OURS[name].cost(ranks, elements * 8, NET) == pytest.approx(seconds, rel=1e-12), ranks


def test_formula_of_the_tree(simulated: Any) -> None:
    for ranks in (1, 2, 3, 4, 5, 7, 8, 9, 16):
        seconds = simulated_seconds(simulated(ranks, lambda a, b: NET, gamma=NET.gamma), tree.steps, 32)
        if ranks & (ranks - 1):
            assert seconds <= tree.cost(ranks, 256, NET)
        else:
            assert seconds == pytest.approx(tree.cost(ranks, 256, NET), rel=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.25, 3.0])
def test_formula_of_the_segmented_ring(gamma: float, simulated: Any) -> None:
    """Whether transfer or addition takes longer."""
    net = NET._replace(gamma=gamma)
    for ranks in (1, 2, 3, 5, 8):
        for count in (1, 2, 4):
            elements, most = ranks * 32, 32 * 8 // count
            simulation = simulated(ranks, lambda a, b: net, gamma=gamma)
            seconds = simulated_seconds(simulation, partial(segmented_ring.steps, most=most), elements)
            assert segmented_ring.cost(ranks, elements * 8, net, most) == pytest.approx(seconds, rel=1e-12)


def test_formula_of_binary_blocks(simulated: Any) -> None:
    """Exact for one and two blocks; with more of them ranks wait less than it says, as not all wait for the slowest."""
    for ranks in range(1, 34):
        seconds = simulated_seconds(simulated(ranks, lambda a, b: NET, gamma=NET.gamma), binary_blocks.steps, 64)
        found = binary_blocks.cost(ranks, 64 * 8, NET)
        if ranks.bit_count() <= 2:
            assert found == pytest.approx(seconds, rel=1e-12)
        else:
            assert seconds <= found < 1.3 * seconds


def test_formula_of_hierarchical(simulated: Any) -> None:
    near = Network(2.0, 0.125, NET.gamma)
    for per_host, hosts in ((1, 4), (2, 1), (2, 2), (2, 3), (3, 4), (4, 2)):
        ranks, elements = per_host * hosts, per_host * 32
        shared = Network(NET.alpha, NET.beta * per_host)  # its ranks send at the same time

        def net(a: int, b: int, per_host: int = per_host, shared: Network = shared) -> Network:
            return near if a // per_host == b // per_host else shared

        layout = [rank // per_host for rank in range(ranks)]
        simulation = simulated(ranks, net, layout, gamma=NET.gamma)
        seconds = simulated_seconds(simulation, hierarchical.steps, elements)
        known = NET._replace(near=near, per_host=per_host)
        assert hierarchical.cost(ranks, elements * 8, known) == pytest.approx(seconds, rel=1e-12)


TEN = Network(10.0, 3.0, 1.0)
"""120 bytes then take 360 to send and 120 to add."""


@pytest.mark.parametrize(
    ("algorithm", "ranks", "seconds"),
    [
        # 2 (p - 1) alpha + 2 (p - 1) / p n beta + (p - 1) / p n gamma
        (ring, 1, 0), (ring, 2, 20 + 360 + 60), (ring, 3, 40 + 480 + 80), (ring, 4, 60 + 540 + 90),
        # lg p (alpha + n beta + n gamma); and 2 alpha + 2 n beta + n gamma for the surplus
        (recursive_doubling, 1, 0), (recursive_doubling, 2, 490), (recursive_doubling, 8, 1470),
        (recursive_doubling, 6, 2 * 490 + 20 + 720 + 120),
        # 2 lg p alpha + 2 (p - 1) / p n beta + (p - 1) / p n gamma
        (halving_doubling, 1, 0), (halving_doubling, 2, 20 + 360 + 60), (halving_doubling, 4, 40 + 540 + 90),
        (halving_doubling, 8, 60 + 630 + 105), (mpi, 2, 20 + 360 + 60), (mpi, 4, 40 + 540 + 90),
        # the surplus in halves: 2 alpha + n beta + n gamma / 2 more than with 2 and with 4
        (halving_doubling, 3, 440 + 20 + 360 + 60), (halving_doubling, 5, 670 + 440), (halving_doubling, 7, 670 + 440),
        # (2 floor(lg p) + 2) alpha + (2 (p - 1) / p + 2) n beta + (1 + (p - 1) / p) n gamma
        (mpi, 3, 40 + (4 / 3 + 2) * 360 + (1 + 2 / 3) * 120), (mpi, 6, 60 + (10 / 6 + 2) * 360 + (1 + 5 / 6) * 120),
        # one block: halving-doubling; 2 + 1: 110 + 60 until both have halves, 2 x 190 for halves from the third and 60
        # to add them, but it sends all before it takes: 2 x 190 to get them back, then 190 in the pair
        (binary_blocks, 1, 0), (binary_blocks, 4, 670), (binary_blocks, 3, 250 + 380 + 380 + 190),
        # 2 lg p (alpha + n beta) + lg p n gamma
        (tree, 1, 0), (tree, 2, 740 + 120), (tree, 4, 2 * 860), (tree, 5, 3 * 860), (tree, 8, 3 * 860),
        # rows of 3 and columns of 2, on a third: 600 + 20 + 120 + 20; primes: the ring
        (two_dimensional, 6, 600 + 160), (two_dimensional, 3, 600), (two_dimensional, 1, 0),
        (two_dimensional, 4, 440 + 20 + 180 + 30),
        # one segment: the ring
        (segmented_ring, 1, 0), (segmented_ring, 3, 600), (segmented_ring, 4, 690),
        # one rank a host: halving-doubling
        (hierarchical, 1, 0), (hierarchical, 4, 670),
    ],
)  # fmt: skip
def test_seconds_at_hand_computed_points(algorithm: ModuleType, ranks: int, seconds: float) -> None:
    """The tables of Thakur et al. 2005 and of Patarasuk and Yuan 2009, with alpha = 10, n beta = 360, n gamma = 120."""
    assert algorithm.cost(ranks, 120, TEN) == pytest.approx(seconds, rel=1e-15)


def test_seconds_of_hosts_and_segments_at_hand_computed_points() -> None:
    # two hosts of two: a ring of two in the host, half the buffer between hosts over a link that two ranks share
    hosts = TEN._replace(near=Network(1.0, 0.5, 1.0), per_host=2)
    assert hierarchical.cost(4, 120, hosts) == (2 + 60 + 60) + (20 + 360 + 30)
    # one rank on the second host: the tree of two, then all of it between the first ranks of the hosts
    assert hierarchical.cost(3, 120, hosts) == (2 + 120 + 120) + (20 + 360 + 60)
    # two ranks, 60 bytes in 3 segments: 3 x (10 + 60) + 20 to add the last one; 10 + 180 to gather
    assert segmented_ring.cost(2, 120, TEN, most=20) == 210 + 20 + 190
    # adding takes longer than sending: 10 + 60, then 3 x 100
    assert segmented_ring.cost(2, 120, TEN._replace(gamma=5.0), most=20) == 70 + 300 + 190


def test_nothing_to_add_is_the_default_and_empty_buffers_cost_their_messages() -> None:
    assert ring.cost(2, 120, Network(0.0, 1.0)) == 120
    assert ring.cost(8, 0, TEN) == 140
    assert [halving_doubling.cost(p, 0, TEN) for p in (8, 9)] == [60, 80]


def test_few_messages_win_where_buffers_are_short_and_few_bytes_where_they_are_long() -> None:
    """Recursive doubling and Rabenseifner's cross where n (lg p - 2 (p - 1) / p) beta = lg p alpha, gamma left out."""
    net = Network(10.0, 3.0)
    crossing = 3 * 10 / (3 * (3 - 2 * 7 / 8))
    for nbytes, winner in ((0.99 * crossing, recursive_doubling), (1.01 * crossing, halving_doubling)):
        assert min((recursive_doubling, halving_doubling), key=lambda a: a.cost(8, nbytes, net)) is winner


# --- the table ----------------------------------------------------------------------------------------------------


def test_every_algorithm_of_the_table_may_stand_in_a_config() -> None:
    assert set(allreduce.TABLE) <= set(get_args(Allreduce))
    assert set(OURS) | {"mpi"} <= set(allreduce.TABLE)
    for name, module in OURS.items():
        found = allreduce.get(name)
        assert (found.cost, found.sent) == (module.cost, module.sent)
        assert found.summary


def test_unknown_algorithm_names_those_there_are() -> None:
    with pytest.raises(PlanError, match=r"'butterfly' does not exist; choose one of ring, .*tree, .*mpi"):
        allreduce.get("butterfly")


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", BF16])
def test_mean(dtype: Any) -> None:
    buffer = np.array([3.0, -1.5, 0.0, 96.0], dtype)
    assert allreduce.mean(buffer, 3) is None
    np.testing.assert_array_equal(buffer, np.array([1.0, -0.5, 0.0, 32.0], dtype), strict=True)


def test_mean_of_narrow_types_is_divided_in_float32() -> None:
    buffer = np.array([512.0], BF16)
    allreduce.mean(buffer, 257)  # in bf16, 257 is 256
    assert float(buffer[0]) == 2 - 2**-7  # of 1.9922, what is nearest


@pytest.mark.parametrize("dtype", ["f2", BF16])
def test_narrow_types_are_added_in_float32_and_rounded_once(dtype: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = (rng.normal(size=1001).astype(dtype) for _ in range(2))
    exact = (x.astype("f8") + y.astype("f8")).astype("f4").astype(dtype)
    add(x, y)
    np.testing.assert_array_equal(x, exact, strict=True)


@pytest.mark.parametrize("name", allreduce.TABLE)
@pytest.mark.parametrize(
    "buffer", [np.zeros((3, 4)), np.zeros(8)[::2], np.zeros(()), np.zeros((4, 2))[:, 0]], ids=lambda b: str(b.shape)
)
def test_buffer_that_is_not_flat_is_refused(name: str, buffer: np.ndarray) -> None:
    with pytest.raises(
        ValueError, match=rf"a contiguous 1D array, not one of shape {re.escape(str(buffer.shape))} .*reshape\(-1\)"
    ):
        allreduce.get(name).sum(None, buffer)  # type: ignore[arg-type]  # before anything is asked of the link


@pytest.mark.parametrize("name", allreduce.TABLE)
def test_buffer_that_may_not_be_written_is_refused(name: str) -> None:
    buffer = np.zeros(4)
    buffer.flags.writeable = False
    with pytest.raises(ValueError, match="read-only; give a copy"):
        allreduce.get(name).steps(None, buffer)  # type: ignore[arg-type]
