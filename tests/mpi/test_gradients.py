"""However gradients are summed, training equals that of one rank, and repeats its bits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

import numpy as np
import pytest
from executing import OPTIM, forward_backward
from networks import NETWORKS, random_plan, with_partitions
from summing import (
    HOSTS,
    assert_parts_equal,
    assert_same_bits,
    bound,
    gradients,
    hosts_of,
    on_one_rank,
    optimizer,
    pretend_hosts,
    train,
    weights,
)

from hpctrain.backends.reference import Reference
from hpctrain.comm.allreduce import TABLE
from hpctrain.config import Optim
from hpctrain.errors import PlanError
from hpctrain.executor import Executor
from hpctrain.gradients import Summing
from hpctrain.partition import Partition, volume
from hpctrain.planner.plan import Plan

OPTIMS = {
    "sgd": OPTIM,
    "adam": Optim(name="adam", lr=0.05, eps=1e-3, weight_decay=0.01),
    "lars": Optim(name="lars", lr=0.5, momentum=0.9, weight_decay=0.01, trust_coefficient=0.1),
    "lamb": Optim(name="lamb", lr=0.05, eps=1e-3, weight_decay=0.01),
}

ELEMENT = 8
"""Bytes."""

SUMMINGS = {
    "in turn": Summing(overlap=False),
    "overlapped, a bucket each": Summing(overlap=True, bucket_bytes=1),
    "overlapped, some buckets": Summing(overlap=True, bucket_bytes=61 * ELEMENT),
    "overlapped, one bucket": Summing(overlap=True),
    "sharded": Summing(shard=True, overlap=False),
    "sharded, overlapped": Summing(shard=True, overlap=True, bucket_bytes=37 * ELEMENT),
    "weights shared": Summing(share_weights=True, overlap=False),
    "weights shared, overlapped": Summing(share_weights=True, overlap=True, bucket_bytes=37 * ELEMENT),
}


def replicated(net: Any, ranks: int, allreduce: str | None = None) -> Plan:
    """All ranks hold all weights: the batch is cut, and where it has too few samples, blocks are empty."""
    return replace(with_partitions(net, {}, Partition(batch=ranks)), allreduce=allreduce)


# --- the same as one rank -----------------------------------------------------------------------------------------

MESSAGES = [name for name in TABLE if name != "shared"]

OVERLAPPED = ("overlapped, a bucket each", "overlapped, some buckets")

WINDOWS = ("in turn", "overlapped, some buckets", "sharded, overlapped", "weights shared", "weights shared, overlapped")


def check(comm: Any, names: tuple[str, str, str], kind: str, seed: int) -> None:
    """A network trained with an optimizer and gradients summed in a way, on random plans of all ranks, and again."""
    network, optim, way = names
    rng, (net, data, expected) = np.random.default_rng(seed), on_one_rank(network, OPTIMS[optim])
    allreduce = kind if kind in TABLE else "shared" if kind == "one" else "hierarchical"
    plans = replicated(net, comm.size), random_plan(rng, net, comm.size)
    for plan in (replace(plan, allreduce=allreduce) for plan in plans):
        explain = f"seed {seed}, {network}, {optim}, {way}, {kind}, plan {plan.partitions}"
        print(explain)
        found = train(net, plan, comm, data, OPTIMS[optim], SUMMINGS[way])
        assert_parts_equal(found, expected, explain)
    if allreduce != "mpi":
        assert_same_bits(found, train(net, plan, comm, data, OPTIMS[optim], SUMMINGS[way]))


def in_turn(choices: Iterable[str], number: int) -> str:
    """Choice of that number, beginning again at the end."""
    return next(islice(cycle(choices), number, None))


@pytest.mark.parallel([2, 3, 4])
@pytest.mark.parametrize("way", OVERLAPPED)
@pytest.mark.parametrize("name", MESSAGES)
def test_training_with_many_sums_under_way(
    comm: Any, name: str, way: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By every algorithm, on random hosts; networks and optimizers in turn."""
    number = MESSAGES.index(name) + OVERLAPPED.index(way)
    pretend_hosts(monkeypatch, hosts_of(HOSTS[np.random.default_rng(seed).integers(len(HOSTS))], comm.size))
    check(comm, (in_turn(NETWORKS, number), in_turn(OPTIMS, number), way), name, seed)


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("kind", HOSTS)
@pytest.mark.parametrize("way", WINDOWS)
def test_training_with_windows(comm: Any, way: str, kind: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And with shards sent by messages; hosts of equal and of different numbers of ranks."""
    number = WINDOWS.index(way) + HOSTS.index(kind)
    pretend_hosts(monkeypatch, hosts_of(kind, comm.size))
    check(comm, (in_turn(NETWORKS, number), in_turn(OPTIMS, number), way), kind, seed)


@pytest.mark.slow
@pytest.mark.parallel([2, 3, 4, 6])
@pytest.mark.parametrize("way", SUMMINGS)
@pytest.mark.parametrize("kind", [*MESSAGES, *HOSTS])
def test_training_in_every_way(comm: Any, way: str, kind: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = kind if kind in HOSTS else HOSTS[np.random.default_rng(seed).integers(len(HOSTS))]
    pretend_hosts(monkeypatch, hosts_of(hosts, comm.size))
    for optim in OPTIMS:
        check(comm, ("lenet", optim, way), kind, seed)


@pytest.mark.parallel([6])
@pytest.mark.parametrize("way", WINDOWS)
def test_training_on_six_ranks_of_two_hosts(comm: Any, way: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_hosts(monkeypatch, [0, 0, 1, 1, 1, 1])
    check(comm, ("mlp", "adam", way), "hierarchical", seed)


@pytest.mark.parallel([2, 3, 4])
def test_shared_by_name_is_refused_on_several_hosts(comm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_hosts(monkeypatch, hosts_of("each", comm.size))
    net = NETWORKS["mlp"]()
    with pytest.raises(PlanError, match=rf"'shared' for {comm.size} ranks on {comm.size} hosts.*choose hierarchical"):
        Executor(net, replicated(net, comm.size, "shared"), comm, Reference(), "float64")


# --- shards -------------------------------------------------------------------------------------------------------


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("optim", ["sgd", "adam"])
def test_sharded_update_is_the_ring_to_the_last_bit(comm: Any, optim: str) -> None:
    """One bucket: the ring's reduce-scatter is the first half of its allreduce, and updates work element by element.
    (Norms, of LARS and LAMB, add the squares of pieces, and so round in another order.)"""
    net, data, _ = on_one_rank("lenet")
    plan = replicated(net, comm.size, "ring")
    whole = train(net, plan, comm, data, OPTIMS[optim], Summing(overlap=False))
    sharded = train(net, plan, comm, data, OPTIMS[optim], Summing(overlap=False, shard=True))
    assert_same_bits(weights(sharded), weights(whole))


@pytest.mark.parallel([2])
@pytest.mark.parametrize("way", SUMMINGS)
def test_two_ranks_get_the_same_bits_in_every_way(comm: Any, way: str) -> None:
    """Two numbers add up to the same in either order."""
    net, data, _ = on_one_rank("residual")
    plain = weights(train(net, replicated(net, 2, "ring"), comm, data))
    for name in ("ring", "shared", "tree"):
        assert_same_bits(plain, weights(train(net, replicated(net, 2, name), comm, data, summing=SUMMINGS[way])))


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("way", [way for way in SUMMINGS if "shared" in way or "sharded" in way])
def test_every_element_is_updated_by_one_rank_which_alone_has_its_state(comm: Any, way: str, seed: int) -> None:
    net, data, _ = on_one_rank("lenet")
    rng = np.random.default_rng(seed)
    for plan in (replicated(net, comm.size), *(random_plan(rng, net, comm.size) for _ in range(3))):
        executor = bound(net, plan, comm, data, SUMMINGS[way])
        flat, made = executor.parameters, optimizer(executor, comm)
        updated = {name: np.zeros(p.shape, int) for name, p in flat.by_name.items()}
        for tensor in flat.like(made.state["velocity"], "velocity"):
            updated[tensor.name.removeprefix("velocity/")][tensor.box] += 1
        for name, mine in updated.items():
            assert (np.sum(comm.allgather(mine), axis=0) == 1).all(), f"{name}, seed {seed}, plan {plan.partitions}"
        held = sum(volume(p.box) for p in flat.by_name.values())
        buckets = sum(len(found) for found in executor.gradients._buckets.values())
        if plan.partitions == replicated(net, comm.size).partitions:
            assert abs(made.state["velocity"].size - held / comm.size) <= buckets
        executor.free()


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("way", WINDOWS)
@pytest.mark.parametrize("kind", ["one", "uneven"])
def test_norm_counts_every_element_once_and_scaling_reaches_each_once(
    comm: Any, way: str, kind: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of sums that ranks of a host read in one place."""
    pretend_hosts(monkeypatch, hosts_of(kind, comm.size))
    net, data, expected = on_one_rank("lenet")
    first = {what: array for what, array in expected.items() if what.startswith("0: gradient/")}
    square = sum(float(array.ravel() @ array.ravel()) for array in first.values())
    rng, named = np.random.default_rng(seed), "hierarchical" if kind != "one" else "shared"
    for plan in (replicated(net, comm.size, named), replace(random_plan(rng, net, comm.size), allreduce=named)):
        executor = bound(net, plan, comm, data, SUMMINGS[way])
        forward_backward(executor, data, 0)
        found = executor.gradients.square_sum(executor.backend)
        assert found == pytest.approx(square, rel=1e-10), f"seed {seed}, plan {plan.partitions}"
        assert comm.allgather(found) == [found] * comm.size, "other bits on other ranks"
        before = [tensor.array.copy() for tensor in gradients(executor)]
        comm.Barrier()  # all have copied
        executor.gradients.scale(0.25)
        for tensor, was in zip(gradients(executor), before, strict=True):
            np.testing.assert_array_equal(tensor.array, 0.25 * was, err_msg=tensor.name)
        assert executor.gradients.square_sum(executor.backend) == found / 16
        executor.free()
