"""Exchange on random boxes against brute force over all pairs of boxes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transfers import Posted, Transfer, backward, common, distribution, forward, random_transfer, whole_numbers, wishes

from hpctrain.comm import exchange as exchange_module
from hpctrain.comm.exchange import Exchange
from hpctrain.partition import Partition, extent, volume, whole
from hpctrain.regions import Cut, Distribution, Wanted, received, sent

ROUNDS = 120
"""Random cases for each test and number of ranks."""


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["float64", "float32", "int64"])
def test_random_boxes_equal_brute_force_both_ways(comm: Any, dtype: str, seed: int) -> None:
    moved = 0
    for number in range(ROUNDS):
        rng = np.random.default_rng([seed, number])
        transfer = random_transfer(rng, comm.size)
        fill = float(rng.integers(-5, 5))
        array = whole_numbers(rng, transfer.shape).astype(dtype)
        gradients = [whole_numbers(rng, extent(transfer.want.box(r))).astype(dtype) for r in range(comm.size)]
        exchange = Exchange.alone(comm, transfer.have, transfer.want, np.dtype(dtype), fill)
        assert exchange.bwd is not None
        mine = transfer.have.box(comm.rank)

        exchange.fwd.reserve()[...] = array[mine]
        found = exchange.fwd.run()
        np.testing.assert_array_equal(
            found, forward(transfer, array, comm.rank, fill), f"{number}: {transfer}", strict=True
        )

        exchange.bwd.reserve()[...] = gradients[comm.rank]
        found = exchange.bwd.run()
        expected = backward(transfer, gradients)[mine].astype(dtype)
        np.testing.assert_array_equal(found, expected, f"{number}: {transfer}", strict=True)
        moved += exchange.fwd.bytes_sent
        exchange.free()
    print(f"seed {seed}, {ROUNDS} cases, {moved} bytes from this rank")
    assert (comm.allreduce(moved) > 0) == (comm.size > 1)


@pytest.mark.parallel([2, 3])
def test_messages_of_more_elements_than_MPI_counts(comm: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the limit at 7 elements instead of 2**31 - 1; a real one takes 8 GiB."""
    monkeypatch.setattr(exchange_module, "MOST_ELEMENTS", 7)
    large = 0
    for number in range(ROUNDS):
        rng = np.random.default_rng([seed, number])
        transfer = random_transfer(rng, comm.size)
        array = whole_numbers(rng, transfer.shape)
        gradients = [whole_numbers(rng, extent(transfer.want.box(r))) for r in range(comm.size)]
        exchange = Exchange.alone(comm, transfer.have, transfer.want, np.dtype(np.float64))
        assert exchange.bwd is not None
        mine = transfer.have.box(comm.rank)
        exchange.fwd.reserve()[...] = array[mine]
        np.testing.assert_array_equal(exchange.fwd.run(), forward(transfer, array, comm.rank, 0.0))
        exchange.bwd.reserve()[...] = gradients[comm.rank]
        np.testing.assert_array_equal(exchange.bwd.run(), backward(transfer, gradients)[mine])
        large += exchange.fwd.bytes_per_transfer > 8 * 7
        exchange.free()
    assert comm.allreduce(large) > ROUNDS // 4


@pytest.mark.parallel([1, 2, 3, 4])
def test_backward_is_the_adjoint_of_forward(comm: Any, seed: int) -> None:
    """<F x, y> = <x, F* y>, exactly, as all products and sums are of whole numbers."""
    nonzero = 0
    for number in range(ROUNDS):
        rng, own = np.random.default_rng([seed, number]), np.random.default_rng([seed, number, comm.rank])
        transfer = random_transfer(rng, comm.size)
        exchange = Exchange.alone(comm, transfer.have, transfer.want, np.dtype(np.float64))
        assert exchange.bwd is not None
        x = whole_numbers(own, extent(transfer.have.box(comm.rank)))
        y = whole_numbers(own, extent(transfer.want.box(comm.rank)))
        exchange.fwd.reserve()[...] = x
        fx = float((exchange.fwd.run() * y).sum())
        exchange.bwd.reserve()[...] = y
        fy = float((exchange.bwd.run() * x).sum())
        left, right = comm.allreduce(fx), comm.allreduce(fy)
        assert left == right, f"{number}: {transfer}"
        nonzero += left != 0
        exchange.free()
    print(f"seed {seed}, {ROUNDS} cases, {nonzero} of them not 0")
    assert nonzero > ROUNDS // 2


@pytest.mark.parallel([1, 2, 3, 4])
def test_redistribution_there_and_back_is_the_identity(comm: Any, seed: int) -> None:
    for number in range(ROUNDS):
        rng = np.random.default_rng([seed, number])
        shape = tuple(rng.integers(1, 10, rng.integers(1, 6)).tolist())
        one, other = distribution(rng, shape, comm.size), distribution(rng, shape, comm.size)
        array = rng.normal(size=shape)
        exchange = Exchange.alone(comm, one, other, np.dtype(np.float64))
        back = Exchange.alone(comm, other, one, np.dtype(np.float64), tag=2)
        assert exchange.bwd is not None
        x = exchange.fwd.reserve()
        x[...] = array[one.box(comm.rank)]
        there = exchange.fwd.run()
        np.testing.assert_array_equal(there, array[other.box(comm.rank)], strict=True)
        back.fwd.reserve()[...] = there
        np.testing.assert_array_equal(back.fwd.run(), x, strict=True)
        exchange.bwd.reserve()[...] = there  # owned once and wanted once: the adjoint is the inverse
        np.testing.assert_array_equal(exchange.bwd.run(), x, strict=True)
        exchange.free()
        back.free()


@pytest.mark.parallel([1, 2, 3, 4])
def test_bytes_are_those_of_all_pairs_of_boxes(comm: Any, seed: int) -> None:
    for number in range(ROUNDS):
        rng = np.random.default_rng([seed, number])
        transfer = random_transfer(rng, comm.size)
        others = [r for r in range(comm.size) if r != comm.rank]
        out = {r: 4 * common(transfer, comm.rank, r) for r in others}
        into = {r: 4 * common(transfer, r, comm.rank) for r in others}
        posted = Posted(comm)
        exchange = Exchange.alone(posted, transfer.have, transfer.want, np.dtype(np.float32), tag=6)  # type: ignore[arg-type]
        assert exchange.bwd is not None
        # one message for each pair of ranks that share anything, each way
        sends = [(r, n, 6) for r, n in out.items() if n] + [(r, n, 7) for r, n in into.items() if n]
        recvs = [(r, n, 6) for r, n in into.items() if n] + [(r, n, 7) for r, n in out.items() if n]
        assert sorted(posted.sends) == sorted(sends), f"{number}: {transfer}"
        assert sorted(posted.recvs) == sorted(recvs), f"{number}: {transfer}"
        have, want = transfer.have, transfer.want
        assert exchange.fwd.bytes_per_transfer == sum(out.values()) == 4 * sent(have, want, comm.rank)
        assert exchange.bwd.bytes_per_transfer == sum(into.values()) == 4 * received(have, want, comm.rank)
        assert exchange.fwd.bytes_sent == exchange.bwd.bytes_sent == 0
        for way in exchange.ways:
            way.reserve().fill(1)
            for _ in range(3):
                way.run()
        assert exchange.fwd.bytes_sent == 3 * sum(out.values())
        assert exchange.bwd.bytes_sent == 3 * sum(into.values())
        exchange.free()


@pytest.mark.parallel([1, 2, 3, 4])
def test_ten_transfers_of_one_edge_with_other_data_each(comm: Any, seed: int) -> None:
    for number in range(12):
        rng = np.random.default_rng([seed, number])
        transfer = random_transfer(rng, comm.size)
        mine = transfer.have.box(comm.rank)
        exchange = Exchange.alone(comm, transfer.have, transfer.want, np.dtype(np.float64), fill=-7.0)
        assert exchange.bwd is not None
        src, dst = exchange.fwd.src, exchange.fwd.dst
        for _ in range(10):
            array = whole_numbers(rng, transfer.shape)
            gradients = [whole_numbers(rng, extent(transfer.want.box(r))) for r in range(comm.size)]
            exchange.fwd.reserve()[...] = array[mine]
            assert exchange.fwd.run() is dst
            np.testing.assert_array_equal(dst, forward(transfer, array, comm.rank, -7.0))
            exchange.bwd.reserve()[...] = gradients[comm.rank]
            np.testing.assert_array_equal(exchange.bwd.run(), backward(transfer, gradients)[mine])
        assert exchange.fwd.reserve() is src
        exchange.free()


@pytest.mark.parallel([2, 3, 4])
def test_edges_under_way_together_do_not_mix(comm: Any, seed: int) -> None:
    """Tags keep edges apart, whatever order ranks start and finish them in."""
    for number in range(12):
        rng = np.random.default_rng([seed, number])
        shape = (5, 7)
        owners = [distribution(rng, shape, comm.size) for _ in range(4)]
        users = [wishes(rng, shape, comm.size) for _ in range(4)]
        edges = [
            Exchange.alone(comm, have, want, np.dtype(np.float64), tag=2 * i)
            for i, (have, want) in enumerate(zip(owners, users, strict=True))
        ]
        arrays = [whole_numbers(rng, shape) for _ in edges]
        order = np.random.default_rng([seed, number, comm.rank])
        for i in order.permutation(4):
            edges[i].fwd.reserve()[...] = arrays[i][owners[i].box(comm.rank)]
            edges[i].fwd.start()
        for i in order.permutation(4):
            expected = forward(Transfer(shape, owners[i], users[i]), arrays[i], comm.rank, 0.0)
            np.testing.assert_array_equal(edges[i].fwd.finish(), expected)
        for edge in edges:
            edge.free()


@pytest.mark.parallel([2, 3, 4])
def test_halo_and_gather_copy_no_interior(comm: Any) -> None:
    """Where a rank wants all that it has, the producer writes straight into the consumer's array."""
    partition, n = Partition(height=comm.size), 5 * comm.size
    have = Distribution((2, n, 3), (None, "height", None), partition)
    halo = tuple((5 * r - 1, 5 * r + 6) for r in range(comm.size))
    want = Wanted(partition, (Cut((), ((0, 2),)), Cut(("height",), halo), Cut((), ((0, 3),))))
    for wanted in (want, Distribution((2, n, 3), (None, None, None), Partition(channel=comm.size))):
        exchange = Exchange.alone(comm, have, wanted, np.dtype(np.float32))
        assert exchange.bwd is not None
        assert np.shares_memory(exchange.fwd.src, exchange.fwd.dst)
        assert np.shares_memory(exchange.bwd.src, exchange.bwd.dst)
        exchange.free()


@pytest.mark.parallel([3, 4])
def test_rank_beyond_both_partitions_has_nothing_to_do(comm: Any) -> None:
    have = Distribution((5, 3), ("batch", None), Partition(batch=2))
    want = Distribution((5, 3), (None, "channel"), Partition(channel=2))
    posted = Posted(comm)
    exchange = Exchange.alone(posted, have, want, np.dtype(np.float64))  # type: ignore[arg-type]
    array = np.arange(15.0).reshape(5, 3)
    exchange.fwd.reserve()[...] = array[have.box(comm.rank)]
    np.testing.assert_array_equal(exchange.fwd.run(), array[want.box(comm.rank)], strict=True)
    if comm.rank >= 2:
        assert posted.sends == posted.recvs == []
        assert exchange.fwd.src.size == exchange.fwd.dst.size == exchange.fwd.bytes_sent == 0
    exchange.free()


@pytest.mark.parallel([2, 4])
def test_edge_without_gradient_has_one_way(comm: Any) -> None:
    have = Distribution((5,), ("batch",), Partition(batch=comm.size))
    want = Distribution((5,), (None,), Partition(batch=comm.size))
    posted = Posted(comm)
    exchange = Exchange.alone(posted, have, want, np.dtype(np.int64), tag=4, backward=False)  # type: ignore[arg-type]
    assert exchange.bwd is None
    assert exchange.ways == [exchange.fwd]
    assert {tag for _, _, tag in [*posted.sends, *posted.recvs]} == {4}
    exchange.fwd.reserve()[...] = np.arange(5)[have.box(comm.rank)]
    np.testing.assert_array_equal(exchange.fwd.run(), np.arange(5))
    exchange.free()


@pytest.mark.parallel([2, 4])
def test_whole_array_on_one_rank_reaches_all(comm: Any) -> None:
    """Gathered boxes have volume, so that the tests above cannot pass on empty boxes alone."""
    have = Distribution((3, 5), (None, None), Partition())
    want = Distribution((3, 5), (None, None), Partition(batch=comm.size))
    exchange = Exchange.alone(comm, have, want, np.dtype(np.float64))
    array = np.arange(15.0).reshape(3, 5)
    exchange.fwd.reserve()[...] = array[have.box(comm.rank)]
    np.testing.assert_array_equal(exchange.fwd.run(), array)
    assert exchange.fwd.bytes_per_transfer == (120 * (comm.size - 1) if comm.rank == 0 else 0)
    assert volume(whole((3, 5))) == exchange.fwd.dst.size
    exchange.free()
