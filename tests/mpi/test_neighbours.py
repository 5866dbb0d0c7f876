"""Exchange through shared memory gives what messages give, bit for bit, however ranks are delayed and hosts mixed."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from executing import forward_backward, load_weights
from networks import NETWORKS, draw, random_plan
from transfers import Transfer, backward, forward, random_transfer, whole_numbers

from hpctrain.backends.reference import Reference
from hpctrain.comm import shared
from hpctrain.comm.exchange import Arrays, Exchange, own_arrays
from hpctrain.comm.neighbours import MESSAGES, SHARED, Neighbours, neighbours
from hpctrain.executor import Executor
from hpctrain.partition import extent, volume

CASES = 40
"""Random transfers for each test, number of ranks and set of hosts."""

ROUNDS = 3
"""Times that each runs, both ways."""

HOSTS = {"one host": lambda rank: 0, "two hosts": lambda rank: rank % 2, "two hosts, in turn": lambda rank: rank // 2}


def in_window(near: Neighbours, transfer: Transfer, rank: int, dtype: np.dtype) -> Arrays:
    """The arrays of an edge alone, laid out in shared memory."""
    at = 0

    def zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        nonlocal at
        size = int(np.prod(shape)) * dtype.itemsize
        found = near.memory[at : at + size].view(dtype).reshape(shape)
        at += -(-size // 64) * 64
        return found

    return own_arrays(transfer.have, transfer.want, rank, dtype, True, zeros)


def opened(comm: Any, hosts: Sequence[int], transfer: Transfer, dtype: np.dtype) -> Neighbours | None:
    wanted = transfer.want.meeting(transfer.have.box(comm.rank))
    nbytes = sum(2 * (volume(box.box(comm.rank)) * dtype.itemsize + 64) for box in (transfer.have, transfer.want))
    near, by = neighbours(comm, hosts, wanted, nbytes, 2)
    assert by == (MESSAGES if near is None else SHARED)
    return near


def check(comm: Any, hosts: Sequence[int], rng: np.random.Generator, delays: np.random.Generator, what: str) -> bool:
    """One random transfer; whether this rank has neighbours in it."""
    transfer = random_transfer(rng, comm.size)
    fill, mine = float(rng.integers(-5, 5)), transfer.have.box(comm.rank)
    near = opened(comm, hosts, transfer, np.dtype(np.float64))
    if near is None:
        arrays = own_arrays(transfer.have, transfer.want, comm.rank, np.dtype(np.float64), True)
    else:
        arrays = in_window(near, transfer, comm.rank, np.dtype(np.float64))
    exchange = Exchange(comm, transfer.have, transfer.want, arrays, fill, 0, near)
    assert exchange.bwd is not None
    for _ in range(ROUNDS):
        array = whole_numbers(rng, transfer.shape)
        gradients = [whole_numbers(rng, extent(transfer.want.box(r))) for r in range(comm.size)]
        for way, given, expected in (
            (exchange.fwd, array[mine], forward(transfer, array, comm.rank, fill)),
            (exchange.bwd, gradients[comm.rank], backward(transfer, gradients)[mine]),
        ):
            way.reserve()[...] = given
            pause(delays)
            way.start()
            pause(delays)
            np.testing.assert_array_equal(way.finish(), expected, f"{what}: {transfer}")
            arrays.dst.fill(np.nan)  # both may be other arrays' memory from here on
            arrays.gradient.fill(np.nan)  # type: ignore[union-attr]
    used = any(way._handover is not None for way in exchange.ways)
    exchange.free()
    if near is not None:
        near.free()
    return used


def pause(delays: np.random.Generator) -> None:
    """As if this rank were busy, now and then."""
    if delays.random() < 0.2:
        time.sleep(delays.random() * 2e-3)


@pytest.mark.parallel([2, 3, 4, 5, 6])
@pytest.mark.parametrize("hosts", HOSTS)
def test_random_transfers_with_random_delays_equal_brute_force(comm: Any, hosts: str, seed: int) -> None:
    """Each rank overwrites its arrays as soon as its own part is done: nobody may still be reading them."""
    placed, used = [HOSTS[hosts](rank) for rank in range(comm.size)], 0
    delays = np.random.default_rng([seed, comm.rank])
    for number in range(CASES):
        used += check(comm, placed, np.random.default_rng([seed, number]), delays, f"{hosts}, {number}")
    print(f"seed {seed}, {CASES} cases, {used} of them with neighbours of this rank")
    assert comm.allreduce(used) > 0 or (hosts == "two hosts" and comm.size == 2)


@pytest.mark.parallel([2, 3])
def test_interpreted_flags_do_what_compiled_ones_do(comm: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "_native", None)
    delays = np.random.default_rng([seed, comm.rank])
    used = sum(check(comm, [0] * comm.size, np.random.default_rng([seed, n]), delays, str(n)) for n in range(CASES))
    assert comm.allreduce(used) > 0


def run(comm: Any, name: str, seed: int, hosts: Sequence[int] | None, precision: str) -> tuple[dict[str, Any], str]:
    """What a step gives on a random plan, and what its exchanges went by."""
    net = NETWORKS[name]()
    plan = random_plan(np.random.default_rng(seed), net, comm.size)
    executor = Executor(net, plan, comm, Reference(), precision, 3, hosts=hosts)
    load_weights(executor, data := draw(net, seed, 1))
    found = {loss: rows.copy() for loss, rows in forward_backward(executor, data, 0).items()}
    found |= {p.name: p.gradient.copy() for p in executor.parameters.by_name.values()}
    found["bytes"] = executor.bytes_sent()
    executor.free()
    return found, executor.exchange_by


@pytest.mark.parallel([2, 3, 4])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_get_the_same_bits_whatever_way_bytes_go(comm: Any, name: str, precision: str, seed: int) -> None:
    expected, by = run(comm, name, seed, range(comm.size), precision)
    assert by == MESSAGES
    for hosts in ([0] * comm.size, [rank // 2 for rank in range(comm.size)]):
        found, by = run(comm, name, seed, hosts, precision)
        assert found.keys() == expected.keys()
        for what, value in expected.items():
            np.testing.assert_array_equal(found[what], value, what)
        assert by == SHARED or hosts.count(hosts[comm.rank]) == 1 or comm.size == 4


@pytest.mark.parallel([2, 3])
def test_without_room_for_it_messages_are_used_and_the_reason_is_said(
    comm: Any, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = run(comm, "residual", seed, None, "float64")
    for limit in ("none left", "cannot be opened"):
        with monkeypatch.context() as patched:
            if limit == "none left" and comm.rank == comm.size - 1:  # one rank's word is enough
                patched.setattr(shared, "room", lambda: 1000)
            if limit == "cannot be opened" and comm.rank == 1:
                patched.setattr(os, "open", refuse)
            found, by = run(comm, "residual", seed, None, "float64")
        words = (
            ("MiB to be shared by the", "0.0 MiB left") if limit == "none left" else ("another one here", "container")
        )
        assert by.startswith(f"{MESSAGES}: arrays between layers")
        assert all(word in by for word in words), by
        for what, value in expected.items():
            np.testing.assert_array_equal(found[what], value, what)


def refuse(path: str, flags: int) -> int:
    raise PermissionError(13, "process 1 is another one here", path)


@pytest.mark.parallel([2, 4])
def test_executors_leave_nothing_behind(comm: Any, seed: int) -> None:
    """Neither mapped memory, nor open files, nor names in /dev/shm."""
    run(comm, "residual", seed, None, "float64")
    before = held()
    for _ in range(5):
        _, by = run(comm, "residual", seed, None, "float64")
        assert by == SHARED
    assert held() == before


def held() -> tuple[int, int, list[str]]:
    """Mappings of windows, open files, and what stands in /dev/shm of ours."""
    gc.collect()  # an executor is part of cycles
    mapped = Path("/proc/self/maps").read_text().count("memfd:hpctrain")
    return mapped, len(os.listdir("/proc/self/fd")), [name for name in os.listdir("/dev/shm") if "hpctrain" in name]
