"""Networks in bf16: near what float64 computes, and on any plan near what one rank computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from executing import forward_backward, load_weights
from networks import CASES, NETWORKS, Data, draw, network, random_plan, single

from hpctrain.backends.reference import Reference
from hpctrain.executor import Executor
from hpctrain.graph import Graph
from hpctrain.planner import memory
from hpctrain.planner.layout import edges, sent_bytes
from hpctrain.planner.plan import Plan
from hpctrain.planner.schedule import KEEP, Economy

TOLERANCE = 0.15
"""Of the norm of a whole gradient. Each tensor between layers is rounded once, to 2**-9 of itself; about ten layers
forward and back amplify that by the condition of each, a few units, and a rectified or pooled value near a tie moves a
gradient elsewhere: about 2**-9 * 2 * 10 * 3. A wrong term is of the order of the norm."""


def gradients(net: Graph, plan: Plan, comm: Any, data: Data, precision: str, economy: Economy = KEEP) -> dict[str, Any]:
    """What a step gives: {parameter: (box, gradient)}, and the rows of each loss."""
    executor = Executor(net, plan, comm, Reference(), precision, 3, economy)
    load_weights(executor, data)
    rows = forward_backward(executor, data, 0)
    found: dict[str, Any] = {name: (executor.box(name), block.copy()) for name, block in rows.items()}
    for name, parameter in executor.parameters.by_name.items():
        assert parameter.gradient.dtype == (np.float32 if precision == "bf16" else precision)
        found[name] = parameter.box, parameter.gradient.copy()
    sent = sum(sum(sent_bytes(edge, comm.rank, executor.dtype)) for edge in edges(net, plan))
    assert executor.bytes_sent() == sent or (executor.bytes_sent() > sent and economy.recompute > 1)
    assert (
        executor.arena.memory.nbytes
        == memory.predict(net, plan, [comm.rank], precision, economy=economy)[comm.rank].tensors
    )
    executor.free()
    return found


def check(comm: Any, net: Graph, seed: int, economy: Economy = KEEP) -> None:
    from mpi4py import MPI

    plan = random_plan(np.random.default_rng(seed), net, comm.size)
    data = draw(net, seed, 1)
    exact = gradients(net, single(net), MPI.COMM_SELF, data, "float64")
    found = gradients(net, plan, comm, data, "bf16", economy)
    for name, (box, block) in found.items():
        if block.size == 0:
            continue
        whole = exact[name][1]
        size = np.linalg.norm(whole)
        # a gradient that is nothing but cancellation, of a bias before a normalization, has no size of its own
        scale = max(size, 1e-3 * max(np.linalg.norm(block) for _, block in exact.values()))
        apart = np.linalg.norm(block.astype(float) - whole[box])
        assert apart <= TOLERANCE * scale, f"{name}: {apart} of {scale}, plan {plan}"


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("case", CASES)
def test_every_layer(comm: Any, case: str, seed: int) -> None:
    check(comm, network(case), seed)


@pytest.mark.parallel([1, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(comm: Any, name: str, seed: int) -> None:
    check(comm, NETWORKS[name](), seed)
    check(comm, NETWORKS[name](), seed, Economy(fuse=True, reuse=True, recompute=2))
