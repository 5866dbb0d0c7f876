"""Gradients of a whole step on any plan: their norm, shortened, and the sum of those of a batch's parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from executing import TOLERANCE, forward_backward, load_weights, loss_gradient
from networks import NETWORKS, Data, draw, random_plan, single

from hpctrain.backends.reference import Reference
from hpctrain.executor import Executor
from hpctrain.graph import Graph
from hpctrain.layers import Phase
from hpctrain.planner.plan import Plan

PARTS = 3


def bound(net: Graph, plan: Plan, comm: Any, data: Data) -> Executor:
    executor = Executor(net, plan, comm, Reference(), "float64")
    load_weights(executor, data)
    return executor


def copies(executor: Executor) -> dict[str, np.ndarray]:
    """This rank's blocks of all gradients."""
    return {name: p.gradient.copy() for name, p in executor.parameters.by_name.items()}


def by_part(net: Graph, data: Data) -> list[dict[str, np.ndarray]]:
    """The whole gradients of each of PARTS batches, on this rank alone, of the same weights."""
    from mpi4py import MPI

    executor, found = bound(net, single(net), MPI.COMM_SELF, data), []
    for part in range(PARTS):
        forward_backward(executor, data, part)
        found.append(copies(executor))
    executor.free()
    return found


def accumulate(executor: Executor, data: Data, parts: list[int]) -> None:
    """The sum of the gradients of `parts`."""
    for number, part in enumerate(parts):
        for name, values in data.inputs.items():
            executor.input(name)[...] = values[part][executor.box(name)]
        rows = executor.forward(Phase(training=True, step=part))
        gradients = {name: loss_gradient(executor, data, name) for name in rows}
        executor.backward(gradients, first=number == 0, last=number == len(parts) - 1)


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("network", ["lenet", "cosmoflow"])
def test_parts_add_up_on_random_plans(comm: Any, network: str, seed: int) -> None:
    """Twice, as the second sum must know nothing of the first; then one part alone."""
    net = NETWORKS[network]()
    data, rng = draw(net, seed, steps=PARTS), np.random.default_rng(seed)
    single_parts = by_part(net, data)
    for number in range(2):
        plan = random_plan(rng, net, comm.size)
        print(f"seed {seed}, plan {number} of 2")
        executor = bound(net, plan, comm, data)
        for parts in ([0, 1, 2], [2, 0], [1]):
            accumulate(executor, data, parts)
            for name, p in executor.parameters.by_name.items():
                expected = sum(single_parts[part][name][p.box] for part in parts)
                np.testing.assert_allclose(p.gradient, expected, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)
        executor.free()


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("network", ["lenet", "cosmoflow"])
def test_norm_counts_every_element_once_and_scaling_reaches_all(comm: Any, network: str, seed: int) -> None:
    net = NETWORKS[network]()
    data, rng = draw(net, seed, steps=PARTS), np.random.default_rng(seed)
    whole = np.concatenate([g.ravel() for g in by_part(net, data)[0].values()])
    for number in range(3):
        plan = random_plan(rng, net, comm.size)
        print(f"seed {seed}, plan {number} of 3")
        executor = bound(net, plan, comm, data)
        forward_backward(executor, data, 0)
        found = executor.gradients.square_sum(executor.backend)
        assert found == pytest.approx(float(whole @ whole), rel=1e-10)
        assert comm.allgather(found) == [found] * comm.size, "other bits on other ranks"
        before = copies(executor)
        comm.barrier()  # sums may lie in memory that ranks share
        executor.gradients.scale(0.25)
        for name, p in executor.parameters.by_name.items():
            np.testing.assert_array_equal(p.gradient, 0.25 * before[name], err_msg=name)
        assert executor.gradients.square_sum(executor.backend) == found / 16
        executor.free()
