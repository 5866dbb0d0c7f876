"""Every optimizer does on any plan what it does on one rank: norms are of global tensors, each shard counted once."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from executing import assert_equal, flat_weights, forward_backward, load_weights, plan_text, serial, train
from networks import NETWORKS, draw, random_plan, single

from hpctrain.backends.reference import Reference
from hpctrain.config import Optim
from hpctrain.executor import Executor
from hpctrain.gradients import Summing
from hpctrain.optim import TABLE

OPTIMS = {
    # eps bounds what a gradient that is 0 but for rounding can do: Adam divides it by its own size
    "adam": Optim(name="adam", lr=0.05, eps=1e-3, weight_decay=0.01),
    "adamw": Optim(name="adam", lr=0.05, eps=1e-3, weight_decay=0.01, decoupled_decay=True),
    "lars": Optim(name="lars", lr=0.5, momentum=0.9, weight_decay=0.01, trust_coefficient=0.1),
    "lamb": Optim(name="lamb", lr=0.05, eps=1e-3, weight_decay=0.01),
}


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("name", OPTIMS)
@pytest.mark.parametrize("network", ["lenet", "cosmoflow"])
def test_optimizer_on_random_plans_equals_one_rank(comm: Any, network: str, name: str, seed: int) -> None:
    net = NETWORKS[network]()
    data, rng = draw(net, seed, steps=3), np.random.default_rng(seed)
    expected = serial(net, data, OPTIMS[name])
    for number in range(3):
        plan = random_plan(rng, net, comm.size)
        print(f"seed {seed}, plan {number} of 3")
        assert_equal(train(net, plan, comm, data, OPTIMS[name]), expected, plan)


SHARDED = {
    "shard": Summing(shard=True),
    "share_weights": Summing(share_weights=True),
    "overlapped": Summing(shard=True, bucket_bytes=1000, overlap=True),
}


@pytest.mark.parallel([2, 3, 4])
@pytest.mark.parametrize("name", ["adam", "lars", "lamb"])
@pytest.mark.parametrize("how", SHARDED)
def test_updates_of_shares_equal_those_of_one_rank(comm: Any, how: str, name: str, seed: int) -> None:
    """A rank updates pieces of parameters; norms are of whole ones."""
    net = NETWORKS["lenet"]()
    data, rng = draw(net, seed, steps=3), np.random.default_rng(seed)
    expected = serial(net, data, OPTIMS[name])
    plan = random_plan(rng, net, comm.size)
    executor = Executor(net, plan, comm, Reference(), "float64", summing=SHARDED[how])
    load_weights(executor, data)
    flat = executor.parameters
    optimizer = TABLE[name](flat.blocks(), flat.shards(), executor.backend, OPTIMS[name], comm)
    for step in range(3):
        executor.updated()
        forward_backward(executor, data, step)
        whole = [block for key, (_, block) in expected.items() if re.fullmatch(rf"step {step}: .+\..+ gradient", key)]
        square_sum = sum(float((g * g).sum()) for g in whole)
        assert executor.gradients.square_sum(executor.backend) == pytest.approx(square_sum, rel=1e-10)
        executor.gradients.scale(0.5)
        executor.gradients.scale(2.0)
        optimizer.step(OPTIMS[name].lr)
    executor.updated()
    for key, p in flat.by_name.items():
        want = expected[f"step 2: {key} updated"][1][p.box]
        np.testing.assert_allclose(p.array, want, rtol=1e-10, atol=1e-10, err_msg=f"{key}, {plan_text(plan)}")
    executor.free()


class Counting:
    """A communicator that counts the collective calls of an optimizer."""

    def __init__(self, comm: Any) -> None:
        self.comm, self.size, self.calls, self.bytes = comm, comm.size, 0, 0

    def Allgather(self, mine: np.ndarray, every: np.ndarray) -> None:
        self.calls, self.bytes = self.calls + 1, self.bytes + mine.nbytes
        self.comm.Allgather(mine, every)


@pytest.mark.parallel([2, 3, 4])
@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_ratios_take_two_numbers_per_parameter_in_one_message_and_repeat_their_bits(
    comm: Any, name: str, seed: int
) -> None:
    net = NETWORKS["cosmoflow"]()
    data, plan = draw(net, seed, steps=2), random_plan(np.random.default_rng(seed), net, comm.size)
    found = []
    for _ in range(2):
        executor, counting = Executor(net, plan, comm, Reference(), "float64"), Counting(comm)
        load_weights(executor, data)
        flat = executor.parameters
        optimizer = TABLE[name](flat.blocks(), flat.shards(), executor.backend, OPTIMS[name], counting)  # type: ignore[arg-type]
        for step in range(2):
            forward_backward(executor, data, step)
            optimizer.step(0.1)
        assert counting.calls == 2
        assert counting.bytes == 2 * 16 * sum(p.decay for p in flat.by_name.values())
        found.append(flat_weights(executor))
        executor.free()
    np.testing.assert_array_equal(*found, strict=True)


@pytest.mark.parallel([1, 2, 3, 4])
def test_every_element_is_counted_by_one_rank(comm: Any, seed: int) -> None:
    net = NETWORKS["lenet"]()
    rng = np.random.default_rng(seed)
    for plan in [single(net), *(random_plan(rng, net, comm.size) for _ in range(4))]:
        executor = Executor(net, plan, comm, Reference(), "float64")
        flat = executor.parameters
        mine = [shard.size * shard.counted for shard in flat.shards()]
        sizes = [int(np.prod(p.shape)) for p in flat.by_name.values()]
        assert np.sum(comm.allgather(mine), axis=0).tolist() == sizes
        assert sum(shard.size for shard in flat.shards()) == flat_weights(executor).size
        executor.free()
