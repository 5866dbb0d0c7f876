"""Gradients and weights in memory that ranks of a host share: no races, one copy, nothing left behind."""

from __future__ import annotations

import os
import tracemalloc
from dataclasses import replace
from pathlib import Path
from random import Random
from time import sleep
from typing import Any

import numpy as np
import pytest
from executing import OPTIM, forward_backward, loss_gradient
from networks import NETWORKS, Data, draw, with_partitions
from summing import (
    assert_same_bits,
    bound,
    gradients,
    hosts_of,
    on_one_rank,
    optimizer,
    pretend_hosts,
    steps,
    train,
    weights,
)

from hpctrain import memory
from hpctrain.backends.reference import Reference
from hpctrain.comm import shared
from hpctrain.comm.shared import Window
from hpctrain.config import Optim
from hpctrain.errors import SharedMemoryError
from hpctrain.executor import Executor
from hpctrain.gradients import Gradients, Summing
from hpctrain.graph import Graph
from hpctrain.layers import MSE, Dense, Phase
from hpctrain.partition import Partition
from hpctrain.planner.plan import Plan

WAYS = {
    "shared": ("shared", Summing(overlap=False)),
    "shared, overlapped": ("shared", Summing(overlap=True, bucket_bytes=100)),
    "weights shared": ("shared", Summing(share_weights=True, overlap=False)),
    "weights shared, overlapped": ("shared", Summing(share_weights=True, overlap=True, bucket_bytes=100)),
    "sharded": ("ring", Summing(shard=True, overlap=True, bucket_bytes=100)),
}

STEPS = 300


def tiny() -> Graph:
    """Two dense layers."""
    net = Graph()
    x = net.add("second", Dense(3), net.add("first", Dense(5), net.input("x", (4, 7))))
    net.add("loss", MSE(), x, net.input("y", (4, 3)))
    return net


def replicated(net: Graph, ranks: int, allreduce: str) -> Plan:
    """All ranks hold all weights."""
    return replace(with_partitions(net, {}, Partition(batch=ranks)), allreduce=allreduce)


# --- races --------------------------------------------------------------------------------------------------------


def sleepy(monkeypatch: pytest.MonkeyPatch, rng: Random) -> None:
    """Now and then this rank is late, wherever it is in a step."""
    for owner, name in (
        *((Gradients, name) for name in ("begin", "completed", "_start", "finish", "scale", "publish")),
        *((Executor, name) for name in ("_forward_step", "_backward_step")),
    ):
        monkeypatch.setattr(owner, name, late(getattr(owner, name), rng))


def late(real: Any, rng: Random) -> Any:
    """`real`, at times begun or left late."""

    def found(*args: Any, **kwargs: Any) -> Any:
        if rng.random() < 0.05:
            sleep(rng.random() * 1e-3)
        result = real(*args, **kwargs)
        if rng.random() < 0.05:
            sleep(rng.random() * 1e-3)
        return result

    return found


def long_run(comm: Any, way: str, data: Data, scale: float) -> Any:
    """Weights after STEPS steps, in which sums are scaled as clipping does it."""
    allreduce, summing = WAYS[way] if way in WAYS else (way, Summing(overlap=False))
    net, optim = tiny(), Optim(lr=0.02, momentum=0.9, weight_decay=0.01)
    executor = bound(net, replicated(net, comm.size, allreduce), comm, data, summing)
    made = optimizer(executor, comm, optim)
    for step in range(STEPS):
        forward_backward(executor, data, step % 3)
        executor.gradients.scale(scale)
        made.step(optim.lr)
        if step % 7:  # else forward does it
            executor.updated()
    executor.updated()
    found = [(name, p.box, p.array.copy()) for name, p in executor.parameters.by_name.items()]
    executor.free()
    return found


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize(
    ("way", "compiled"), [*((way, True) for way in WAYS), ("shared", False), ("weights shared, overlapped", False)]
)
def test_late_ranks_change_no_bit(
    comm: Any, way: str, compiled: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks: bits of the ring, as a + b = b + a; of more, all ranks have the same, which are the ring's but for
    rounding. Each step makes an error larger than that, where a rank reads what is not complete or still needed."""
    if not compiled:
        monkeypatch.setattr(shared, "_native", None)
    data = draw(tiny(), seed, steps=3)
    expected = long_run(comm, "ring", data, 0.5)
    sleepy(monkeypatch, Random(seed + comm.rank))
    found = long_run(comm, way, data, 0.5)
    if comm.size == 2:
        assert_same_bits(found, expected)
    for (name, _, array), (_, _, other) in zip(found, expected, strict=True):
        np.testing.assert_allclose(array, other, rtol=1e-11, atol=1e-12, err_msg=name)
        assert comm.allgather(array.tobytes()) == [array.tobytes()] * comm.size, f"{name}: other bits on other ranks"


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("way", ["shared", "weights shared, overlapped"])
def test_without_compiled_kernels(comm: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, data, _ = on_one_rank("lenet")
    allreduce, summing = WAYS[way]
    with_kernels = train(net, replicated(net, comm.size, allreduce), comm, data, OPTIM, summing)
    monkeypatch.setattr(shared, "_native", None)
    without = train(net, replicated(net, comm.size, allreduce), comm, data, OPTIM, summing)
    assert_same_bits(with_kernels, without)


# --- parts of a batch ---------------------------------------------------------------------------------------------


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("way", WAYS)
def test_parts_add_up(comm: Any, way: str, seed: int) -> None:
    """Three parts, then one alone, then two that are not ended before another begins anew."""
    net, (allreduce, summing) = NETWORKS["mlp"](), WAYS[way]
    data, plan = draw(net, seed, steps=3), replicated(net, comm.size, allreduce)
    alone = bound(net, plan, comm, data)
    parts = []
    for step in range(3):
        forward_backward(alone, data, step)
        parts.append({name: p.gradient.copy() for name, p in alone.parameters.by_name.items()})
    alone.free()
    executor = bound(net, plan, comm, data, summing)
    for numbers in ([0, 1, 2], [1], [2, 0]):
        if numbers == [2, 0]:  # as where a part is not finite
            part(executor, data, 1, first=True, last=False)
        for number in numbers:
            part(executor, data, number, number == numbers[0], number == numbers[-1])
        for tensor in gradients(executor):
            name = tensor.name.removeprefix("gradient/")
            origin = executor.parameters.by_name[name].box
            inner = tuple(slice(b.start - o.start, b.stop - o.start) for b, o in zip(tensor.box, origin, strict=True))
            expected = sum(parts[number][name] for number in numbers)
            if tensor.array.size:
                np.testing.assert_allclose(tensor.array, expected[inner], rtol=1e-10, atol=1e-10, err_msg=name)
    executor.free()


def part(executor: Executor, data: Data, number: int, first: bool, last: bool) -> None:
    """One part of a batch, forward and backward."""
    for name, values in data.inputs.items():
        executor.input(name)[...] = values[number][executor.box(name)]
    rows = executor.forward(Phase(training=True, step=number))
    executor.backward({name: loss_gradient(executor, data, name) for name in rows}, first, last)


# --- one copy -----------------------------------------------------------------------------------------------------


@pytest.mark.parallel([2, 3, 4])
@pytest.mark.parametrize("kind", ["one", "pairs", "uneven"])
def test_weights_are_one_memory_on_each_host(comm: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = hosts_of(kind, comm.size)
    pretend_hosts(monkeypatch, hosts)
    net, data, _ = on_one_rank("mlp")
    executor = bound(net, replicated(net, comm.size, "hierarchical"), comm, data, Summing(share_weights=True))
    for writer in range(comm.size):
        for p in executor.parameters.by_name.values():
            comm.Barrier()
            p.array[...] = -1
            comm.Barrier()
            if comm.rank == writer:
                p.array[...] = writer
            comm.Barrier()
            assert (p.array == (writer if hosts[comm.rank] == hosts[writer] else -1)).all()
    executor.free()


@pytest.mark.parallel([2])
@pytest.mark.parametrize("way", WAYS)
def test_bf16_computes_with_new_copies_of_the_weights(comm: Any, way: str) -> None:
    net, data, _ = on_one_rank("lenet")
    found = []
    for allreduce, summing in (("ring", Summing(overlap=False)), WAYS[way]):
        executor = bound(net, replicated(net, 2, allreduce), comm, data, summing, "bf16")
        found.append(weights(steps(executor, optimizer(executor, comm), data)))
        executor.free()
    assert_same_bits(*found)


# --- memory -------------------------------------------------------------------------------------------------------


def large() -> Graph:
    """Whose weights take about 2 MiB."""
    net = Graph()
    x = net.add("second", Dense(3), net.add("first", Dense(501), net.input("x", (4, 503))))
    net.add("loss", MSE(), x, net.input("y", (4, 3)))
    return net


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_nothing_large_is_allocated_after_the_first_step(comm: Any, way: str) -> None:
    net, (allreduce, summing) = large(), WAYS[way]
    data = draw(net, 0)
    executor = bound(net, replicated(net, comm.size, allreduce), comm, data, summing)
    forward_backward(executor, data, 0)
    executor.updated()
    found, units = executor.gradients, range(len(executor.schedule.units))
    tracemalloc.start()
    for step in (1, 2):
        found.begin()
        for unit in reversed(units):
            found.completed(unit, step)
        found.finish()
        found.scale(0.5)
        found.publish()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000
    executor.free()


def windows() -> int:
    """How many stretches of memory this process shares with other ranks."""
    return sum("/memfd:hpctrain" in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.parallel([2])
@pytest.mark.parametrize("way", ["shared, overlapped", "weights shared", "sharded"])
def test_fifty_executors_leave_nothing_behind(comm: Any, way: str) -> None:
    net, (allreduce, summing) = tiny(), WAYS[way]
    data, before, during = draw(net, 0), None, 0
    files = len(os.listdir("/proc/self/fd"))
    for number in range(50):
        executor = bound(net, replicated(net, comm.size, allreduce), comm, data, summing)
        forward_backward(executor, data, 0)
        during = windows()
        executor.free()
        del executor
        probe = comm.Dup()
        found = windows(), probe.py2f()
        probe.Free()
        if number == 2:  # MPI keeps some things for good
            before = found
    assert found == before, "windows, and the number of a new communicator"
    assert during > found[0] or way == "sharded", "the test sees windows"
    assert len(os.listdir("/proc/self/fd")) == files


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("share_weights", [False, True])
def test_too_little_memory_is_refused_on_all_ranks(
    comm: Any, share_weights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where only one rank of the host notices."""
    monkeypatch.setattr(shared, "room", lambda: 10_000 if comm.rank == 1 else 2**40)
    net, summing = large(), Summing(share_weights=share_weights)
    need = "1.9 MiB of gradients.* to be shared by the . ranks.*has 0.0 MiB left; use more hosts or less memory"
    with pytest.raises(SharedMemoryError, match=need):
        Executor(net, replicated(net, comm.size, "shared"), comm, Reference(), "float64", summing=summing)


@pytest.mark.parallel([2])
def test_windows_start_at_pages_with_flags_at_zero(comm: Any) -> None:
    for flags in (0, 1, 64, 65):
        window = Window(comm, 5 + comm.rank, flags, "a test")
        assert [segment.size for segment in window.segments] == [4096, 4096]
        assert all(segment.ctypes.data % 4096 == 0 for segment in window.segments)
        assert [window.flag(rank, i)[0] for rank in range(2) for i in range(flags)] == [0] * 2 * flags
        comm.Barrier()
        window.free()


@pytest.mark.parallel([2, 3])
def test_memory_of_a_process_counts_its_part_of_shared_pages(comm: Any) -> None:
    nbytes, before = 2**24, memory.of_others()
    window = Window(comm, nbytes, 0, "test")
    for segment in window.segments:
        segment.fill(1)
    comm.Barrier()
    others = memory.of_others() - before
    comm.Barrier()
    window.free()
    assert abs(others - (comm.size - 1) * nbytes) < 2**20
