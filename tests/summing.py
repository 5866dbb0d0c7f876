"""Trains networks with gradients summed in any way, on hosts that are made up; for tests of several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from executing import OPTIM, TOLERANCE, forward_backward, load_weights
from networks import NETWORKS, Data, draw, single

from hpctrain.backends.reference import Reference
from hpctrain.comm.link import Topology
from hpctrain.config import Optim
from hpctrain.executor import PLAIN, Executor
from hpctrain.gradients import Summing
from hpctrain.graph import Graph
from hpctrain.optim import TABLE, Optimizer
from hpctrain.parameters import Tensor
from hpctrain.planner.plan import Plan

STEPS = 3

HOSTS = ("one", "each", "pairs", "uneven")


def hosts_of(kind: str, ranks: int) -> list[int]:
    """The host of each rank of the world; of an odd number, pairs leave one rank alone."""
    return {
        "one": [0] * ranks,
        "each": list(range(ranks)),
        "pairs": [rank // 2 for rank in range(ranks)],
        "uneven": [0] + [1] * (ranks - 1),
    }[kind]


def pretend_hosts(monkeypatch: pytest.MonkeyPatch, hosts: Sequence[int]) -> None:
    """Every communicator finds the ranks of MPI's world on these hosts."""
    from mpi4py import MPI

    def found(topology: Topology) -> tuple[int, ...]:
        mine, world = topology.comm.Get_group(), MPI.COMM_WORLD.Get_group()
        here = [hosts[rank] for rank in mine.Translate_ranks(None, world)]
        mine.Free()
        world.Free()
        return tuple(here.index(host) for host in here)

    monkeypatch.setattr(Topology, "hosts", property(found))


def bound(net: Graph, plan: Plan, comm: Any, data: Data, summing: Summing = PLAIN, dtype: str = "float64") -> Executor:
    """An executor with the weights of `data`."""
    executor = Executor(net, plan, comm, Reference(), dtype, summing=summing)
    load_weights(executor, data)
    return executor


def optimizer(executor: Executor, comm: Any, optim: Optim = OPTIM) -> Optimizer:
    """An optimizer of the executor's parameters."""
    flat = executor.parameters
    return TABLE[optim.name](flat.blocks(), flat.shards(), executor.backend, optim, comm)


def gradients(executor: Executor) -> list[Tensor]:
    """What this rank has of the sums of gradients, as optimizer state of the same parts would be saved."""
    flat = executor.parameters
    sums = [np.zeros(0), *(flat.blocks()[shard.block].gradients[shard.where] for shard in flat.shards())]
    return flat.like(np.concatenate(sums), "gradient")


Found = list[tuple[str, Any, np.ndarray]]
"""(what, box, what this rank has there)"""


def steps(executor: Executor, made: Optimizer, data: Data, optim: Optim = OPTIM, count: int = STEPS) -> Found:
    """So many steps of training; sums of gradients, weights, and at last the state of the optimizer."""
    found: Found = []
    for step in range(count):
        forward_backward(executor, data, step)
        found += [(f"{step}: {t.name}", t.box, t.array.copy()) for t in gradients(executor)]
        made.step(optim.lr)
        executor.updated()
        found += [(f"{step}: {t.name}", t.box, t.array.copy()) for t in executor.tensors()]
    for name, state in made.state.items():
        found += [(t.name, t.box, t.array.copy()) for t in executor.parameters.like(state, name)]
    return found


def train(net: Graph, plan: Plan, comm: Any, data: Data, optim: Optim = OPTIM, summing: Summing = PLAIN) -> Found:
    """STEPS steps of training."""
    executor = bound(net, plan, comm, data, summing)
    found = steps(executor, optimizer(executor, comm, optim), data, optim)
    executor.free()
    return found


@cache
def on_one_rank(name: str, optim: Optim = OPTIM) -> tuple[Graph, Data, dict[str, np.ndarray]]:
    """A network, data for it, and what one rank makes of them: whole tensors."""
    from mpi4py import MPI

    net = NETWORKS[name]()
    data = draw(net, seed=len(name), steps=STEPS)
    found = train(net, single(net), MPI.COMM_SELF, data, optim)
    return net, data, {what: array for what, _, array in found}


def assert_parts_equal(found: Found, whole: dict[str, np.ndarray], explain: str) -> None:
    """Every part is that of the whole tensor, to rounding, and nothing is missing."""
    assert {what for what, _, _ in found} == whole.keys()
    for what, box, array in found:
        np.testing.assert_allclose(
            array, whole[what][box], rtol=TOLERANCE, atol=TOLERANCE, err_msg=f"{explain}: {what} {box}"
        )


def assert_same_bits(found: Found, other: Found) -> None:
    """Two runs have made the same."""
    assert [entry[:2] for entry in found] == [entry[:2] for entry in other]
    for (what, box, array), (_, _, again) in zip(found, other, strict=True):
        np.testing.assert_array_equal(array, again, err_msg=f"{what} {box}")


def weights(found: Found) -> Found:
    """The weights and statistics among what was found."""
    return [entry for entry in found if entry[0][0].isdigit() and "gradient/" not in entry[0]]
