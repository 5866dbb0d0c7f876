"""The memory that the planner predicts is what an executor's arrays hold, to the byte."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from networks import CASES, NETWORKS, network, random_plan

from hpctrain.backends.reference import Reference
from hpctrain.comm.exchange import Message
from hpctrain.executor import Executor
from hpctrain.graph import Graph
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
