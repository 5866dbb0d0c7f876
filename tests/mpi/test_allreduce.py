"""Allreduce algorithms: exact sums, the same bits every time, and the bytes that are on the wire."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpctrain.comm import allreduce
from hpctrain.comm.allreduce import mpi, ring
from hpctrain.comm.allreduce.cost import Network
from hpctrain.errors import PlanError

SIZES = (0, 1, 2, 3, 4, 5, 17, 1023, 1_000_003)


class Counting:
    """A communicator that counts what is sent on it, and to whom."""

    def __init__(self, comm: Any) -> None:
        self.comm, self.rank, self.size, self.sent, self.messages = comm, comm.rank, comm.size, 0, 0
        self.peers: set[int] = set()

    def Sendrecv(self, sendbuf: np.ndarray, dest: int, **others: Any) -> None:
        self.sent += sendbuf.nbytes
        self.messages += 1
        self.peers.add(dest)
        self.comm.Sendrecv(sendbuf, dest, **others)


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", allreduce.TABLE)
def test_sum_of_whole_numbers_is_exact(comm: Any, name: str, dtype: str, seed: int) -> None:
    """Whole numbers up to 2**20: sums of four stay below 2**24, so that float32 rounds in no order of adding."""
    for size in SIZES:
        every = [np.random.default_rng([seed, size, r]).integers(-(2**20), 2**20, size) for r in range(comm.size)]
        buffer = every[comm.rank].astype(dtype)
        assert allreduce.get(name).allreduce(comm, buffer) is None
        np.testing.assert_array_equal(buffer, np.sum(every, axis=0).astype(dtype), strict=True)


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ring_gives_the_same_bits_on_all_ranks_and_every_time(comm: Any, dtype: str, seed: int) -> None:
    for size in SIZES:
        mine = np.random.default_rng([seed, size, comm.rank]).normal(size=size).astype(dtype)
        first, second = mine.copy(), mine.copy()
        ring.allreduce(comm, first)
        ring.allreduce(comm, second)
        np.testing.assert_array_equal(first, second)
        assert len(set(comm.allgather(first.tobytes()))) == 1
        # p - 1 additions, each off by at most half an eps of a partial sum that is no more than the sum of sizes
        sizes = np.sum(comm.allgather(np.abs(mine).astype(np.float64)), axis=0)
        exact = np.sum(comm.allgather(mine.astype(np.float64)), axis=0)
        assert np.all(np.abs(first - exact) <= comm.size * np.finfo(dtype).eps * sizes)


@pytest.mark.parallel([2, 3, 4])
def test_ring_sums_a_stretch_of_a_larger_buffer_and_leaves_the_rest(comm: Any) -> None:
    buffer = np.arange(101.0) * (comm.rank + 1)
    ring.allreduce(comm, buffer[7:40])
    times = np.full(101, comm.rank + 1.0)
    times[7:40] = comm.size * (comm.size + 1) / 2
    np.testing.assert_array_equal(buffer, np.arange(101.0) * times)


@pytest.mark.parallel([2, 3, 4])
def test_ring_passes_nan_and_infinity_to_all_ranks(comm: Any) -> None:
    buffer = np.ones(11)
    if comm.rank == comm.size - 1:
        buffer[[0, 5, 10]] = np.nan, np.inf, -np.inf
    ring.allreduce(comm, buffer)
    np.testing.assert_array_equal(buffer[[0, 5, 10, 1]], [np.nan, np.inf, -np.inf, comm.size])


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ring_sends_the_bytes_it_states_to_its_neighbour_only(comm: Any, dtype: str) -> None:
    p, itemsize = comm.size, np.dtype(dtype).itemsize
    for size in (*SIZES, 12, 24):
        counting = Counting(comm)
        ring.allreduce(counting, np.ones(size, dtype))  # type: ignore[arg-type]
        assert counting.sent == ring.sent_bytes(p, comm.rank, size, itemsize)
        assert counting.messages == 2 * (p - 1)
        assert counting.peers == ({(comm.rank + 1) % p} if p > 1 else set())
        # the least possible: over all ranks 2 (p - 1) times the buffer (Patarasuk and Yuan 2009)
        assert comm.allreduce(counting.sent) == 2 * (p - 1) * size * itemsize
        if size % p == 0:
            assert counting.sent == 2 * (p - 1) * size * itemsize // p


@pytest.mark.parallel([1])
def test_costs_at_hand_computed_points(comm: Any) -> None:
    """With alpha = 10, beta = 3, gamma = 1, 120 bytes.

    Ring: 2 (p - 1) alpha + 2 (p - 1) / p n beta + (p - 1) / p n gamma. Rabenseifner (Thakur et al. 2005), p = 2**k:
    2 log2(p) alpha + 2 (p - 1) / p n beta + (p - 1) / p n gamma.
    """
    net = Network(10.0, 3.0, 1.0)
    assert [ring.cost(p, 120, net) for p in (1, 2, 3, 4)] == [0, 20 + 360 + 60, 40 + 480 + 80, 60 + 540 + 90]
    assert [mpi.cost(p, 120, net) for p in (1, 2, 4)] == [0, 20 + 360 + 60, 40 + 540 + 90]
    assert ring.cost(8, 0, net) == 140
    assert ring.cost(2, 120, Network(0.0, 1.0)) == 120  # gamma is 0 unless given


@pytest.mark.parallel([1])
def test_cost_of_rabenseifner_where_ranks_are_no_power_of_two(comm: Any) -> None:
    """(2 floor(lg p) + 2) alpha + (2 (p - 1) / p + 2) n beta + (1 + (p - 1) / p) n gamma (Thakur et al. 2005)."""
    net = Network(10.0, 3.0, 1.0)
    assert mpi.cost(3, 120, net) == pytest.approx(40 + (4 / 3 + 2) * 360 + (1 + 2 / 3) * 120, rel=1e-15)
    assert mpi.cost(6, 120, net) == pytest.approx(60 + (10 / 6 + 2) * 360 + (1 + 5 / 6) * 120, rel=1e-15)


@pytest.mark.parallel([1])
def test_unknown_algorithm_names_those_there_are(comm: Any) -> None:
    with pytest.raises(PlanError, match=r"'butterfly' does not exist; choose one of ring, mpi"):
        allreduce.get("butterfly")
