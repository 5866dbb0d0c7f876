"""Optimizer state that ranks have shares of is saved in pieces, and comes back on any ranks, in any way of sharing."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from executing import OPTIM
from networks import NETWORKS, draw, random_plan, single, with_partitions
from summing import HOSTS, bound, hosts_of, optimizer, pretend_hosts, steps

from hpctrain.backends.reference import Reference
from hpctrain.checkpoint import open_checkpoint, save
from hpctrain.checkpoint.tensors import blocks, restore
from hpctrain.executor import Executor
from hpctrain.gradients import Summing
from hpctrain.optim import Optimizer
from hpctrain.parameters import Tensor
from hpctrain.partition import Partition, whole

WAYS = {
    "whole": Summing(overlap=False),
    "shard": Summing(shard=True, overlap=False),
    "shard, in buckets": Summing(shard=True, overlap=True, bucket_bytes=88),
    "share_weights": Summing(share_weights=True, overlap=True, bucket_bytes=88),
}


@pytest.fixture
def folder(comm: Any) -> Iterator[Path]:
    """One new folder for all ranks."""
    base = comm.bcast(tempfile.mkdtemp(prefix="shards-") if comm.rank == 0 else None)
    yield Path(base)
    comm.Barrier()
    if comm.rank == 0:
        shutil.rmtree(base)


def tensors(executor: Executor, made: Optimizer) -> list[Tensor]:
    """What a run saves."""
    flat = executor.parameters
    return [*executor.tensors(), *(t for name, array in made.state.items() for t in flat.like(array, name))]


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["one", "uneven"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_restored_by_every_other_bit_for_bit(
    comm: Any, folder: Path, way: str, kind: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on one rank alone, and on plans of all or some of these ranks, which then go on alike."""
    pretend_hosts(monkeypatch, hosts_of(kind, comm.size))
    net, rng = NETWORKS["lenet"](), np.random.default_rng(seed)
    data = draw(net, seed, steps=2)
    plan = with_partitions(net, {}, Partition(batch=comm.size))
    executor = bound(net, plan, comm, data, WAYS[way])
    made = optimizer(executor, comm)
    steps(executor, made, data, count=2)
    saved = tensors(executor, made)
    path = save(folder / "a", 2, blocks(saved, comm.rank), {}, comm)
    found = open_checkpoint(path)
    expected = {name: np.empty(shape, dtype) for name, (shape, dtype) in found.tensors.items()}
    for name, array in expected.items():
        found.read(name, whole(array.shape), array)
    for tensor in saved:
        if tensor.array.size:
            np.testing.assert_array_equal(tensor.array, expected[tensor.name][tensor.box], err_msg=tensor.name)
    executor.free()
    for number, other in enumerate(WAYS):
        for plan in (single(net), random_plan(rng, net, comm.size)):
            explain = f"seed {seed}, {other}, plan {plan.partitions}"
            print(explain)
            executor = Executor(net, replace(plan, allreduce="ring"), comm, Reference(), "float64", summing=WAYS[other])
            made = optimizer(executor, comm, OPTIM)
            comm.Barrier()
            mine = tensors(executor, made)
            restore(found, mine)
            comm.Barrier()
            for tensor in mine:
                if tensor.array.size:
                    part = expected[tensor.name][tensor.box]
                    np.testing.assert_array_equal(tensor.array, part, err_msg=f"{explain}: {tensor.name}")
            again = open_checkpoint(save(folder / f"{number}", 2, blocks(mine, comm.rank), {}, comm))
            assert again.tensors == found.tensors, explain
            executor.free()


@pytest.mark.parallel([2, 3, 4])
@pytest.mark.parametrize("kind", HOSTS)
@pytest.mark.parametrize("way", [way for way in WAYS if way != "whole"])
def test_every_element_is_saved_once_though_hosts_have_copies(
    comm: Any, way: str, kind: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_hosts(monkeypatch, hosts_of(kind, comm.size))
    net, rng = NETWORKS["cosmoflow"](), np.random.default_rng(seed)
    data = draw(net, seed, steps=1)
    for plan in (with_partitions(net, {}, Partition(batch=comm.size)), random_plan(rng, net, comm.size)):
        executor = bound(net, replace(plan, allreduce="ring"), comm, data, WAYS[way])
        flat = executor.parameters
        saved = {f"velocity/{name}": np.zeros(p.shape, int) for name, p in flat.by_name.items()}
        for block in blocks(flat.like(optimizer(executor, comm).state["velocity"], "velocity"), comm.rank):
            saved[block.name][block.box] += 1
        for name, mine in saved.items():
            times = np.sum(comm.allgather(mine), axis=0)
            assert (times == 1).all(), f"{name}, seed {seed}, plan {plan.partitions}: {np.unique(times)}"
        executor.free()
