"""The memory that the planner predicts is what an executor's arrays hold, to the byte."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from networks import CASES, NETWORKS, network, random_plan, with_partitions
from summing import HOSTS as KINDS
from summing import hosts_of, pretend_hosts

from hpctrain.backends.reference import Reference
from hpctrain.comm.exchange import Message
from hpctrain.config import Optim
from hpctrain.executor import Executor
from hpctrain.gradients import Summing
from hpctrain.gradients.ways import InWindow
from hpctrain.graph import Graph
from hpctrain.optim import TABLE
from hpctrain.partition import Partition
from hpctrain.planner import memory
from hpctrain.planner.plan import Plan

PLANS = 3
"""Random plans for every network and number of ranks."""


HOSTS = (0, 1, 1, 0)
"""As if the ranks were on two of them: what stays on one goes through shared memory, and takes no messages."""


def base(array: np.ndarray) -> np.ndarray:
    """The array that owns the memory of `array`."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def allocated(arrays: list[np.ndarray], arena: np.ndarray) -> int:
    """Bytes of `arena`, and of the distinct arrays besides that these are views of."""
    apart = [base(array) for array in arrays if not np.may_share_memory(base(array), arena)]
    return arena.nbytes + sum(array.nbytes for array in {id(array): array for array in apart}.values())


def held(executor: Executor) -> list[np.ndarray]:
    """Every array that the executor holds, but for weights, gradients and the arena."""
    found = [t.array for t in executor.state]
    for exchange in executor.exchanges.values():
        for way in exchange.ways:
            messages: list[Message] = [*way._out, *way._in]
            found += [way.src, way.dst, *(message.buffer for message in messages)]
    return found


def check(comm: Any, net: Graph, plan: Plan, precision: str, hosts: Sequence[int]) -> int:
    """The bytes of messages."""
    executor = Executor(net, plan, comm, Reference(), precision, hosts=hosts)
    try:
        found = allocated(held(executor), executor.arena.memory) + sum(
            storage.weights.nbytes + storage.partials.nbytes for storage in executor.parameters.groups.values()
        )
    finally:
        executor.free()
    need = memory.predict(net, plan, [comm.rank], precision, hosts=hosts)[comm.rank]
    exact = need.parameters + need.statistics + need.tensors + need.messages
    assert exact == found, f"rank {comm.rank}, plan {plan.partitions}, hosts {hosts}: {need}"
    return need.messages


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("name", NETWORKS)
def test_of_whole_networks(comm: Any, name: str, precision: str, seed: int) -> None:
    net, rng = NETWORKS[name](), np.random.default_rng(seed)
    for _ in range(PLANS):
        plan = random_plan(rng, net, comm.size)
        apart = check(comm, net, plan, precision, range(comm.size))
        some = check(comm, net, plan, precision, HOSTS[: comm.size])
        assert check(comm, net, plan, precision, [0] * comm.size) == 0 <= some <= apart


@pytest.mark.parallel([3])
@pytest.mark.parametrize("case", CASES)
def test_of_every_layer(comm: Any, case: str, seed: int) -> None:
    net, rng = network(case), np.random.default_rng(seed)
    for _ in range(PLANS):
        check(comm, net, random_plan(rng, net, comm.size), "float64", HOSTS[: comm.size])


SHARES = {
    "shard": Summing(shard=True, overlap=False),
    "share_weights": Summing(share_weights=True, overlap=False),
    "both, in buckets": Summing(shard=True, share_weights=True, overlap=True, bucket_bytes=100),
}


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", SHARES)
def test_of_what_ranks_share_or_update_a_share_of(
    comm: Any, way: str, kind: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights with the first rank of a host; the optimizer's state, and what LAMB computes in."""
    hosts, net, rng = hosts_of(kind, comm.size), NETWORKS["lenet"](), np.random.default_rng(seed)
    pretend_hosts(monkeypatch, hosts)
    plans = with_partitions(net, {}, Partition(batch=comm.size)), *(random_plan(rng, net, comm.size) for _ in range(2))
    for plan in plans:
        executor = Executor(net, plan, comm, Reference(), "float64", summing=SHARES[way])
        flat = executor.parameters
        made = TABLE["lamb"](flat.blocks(), flat.shards(), executor.backend, Optim(name="lamb", lr=1), comm)
        state = sum(array.nbytes for array in made.state.values()) * 3 // 2
        found = sum(storage.partials.nbytes for storage in flat.groups.values())
        buckets = sum(len(each) for each in executor.gradients._buckets.values())
        for group, storage in flat.groups.items():
            way_of = executor.gradients._ways.get(group)
            if not isinstance(way_of, InWindow) or way_of.node.rank == 0:
                found += storage.weights.nbytes
        executor.free()
        shares = SHARES[way].shard, SHARES[way].share_weights
        ranks = [comm.rank]
        need = predict_shared(net, plan, ranks, hosts, *shares)[comm.rank]
        explain = f"seed {seed}, plan {plan.partitions}"
        assert need.parameters == found, explain
        assert abs(need.optimizer - state) <= (3 * 8 * buckets if "buckets" in way else 0), explain
        every = sum(comm.allgather(np.array([need.optimizer, state])))
        assert every[0] == every[1], "all elements are counted"
        unknown = predict_shared(net, plan, ranks, None, *shares)[comm.rank]
        assert unknown.parameters >= need.parameters
        assert unknown.optimizer >= need.optimizer


def predict_shared(
    net: Graph, plan: Plan, ranks: list[int], hosts: list[int] | None, shard: bool, share_weights: bool
) -> dict[int, memory.Memory]:
    """With LAMB."""
    shares = {"shard": shard, "share_weights": share_weights}
    return memory.predict(net, plan, ranks, "float64", TABLE["lamb"].arrays, hosts=hosts, **shares)
