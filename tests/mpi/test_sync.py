"""Replicas on real ranks: what their exchanges conserve, that nobody sees half of one, and who waits for whom."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from hpctrain.comm.onesided import Vectors
from hpctrain.comm.replicas import Replicas, divide
from hpctrain.config import Sync
from hpctrain.sync import Held, Meeting, Strategy, average, averaged, make

SIZE = 1037
OUT_OF_STEP = ("elastic", "gossip-pull", "gossip-push")


def started(replicas: Replicas, weights: np.ndarray, gradients: np.ndarray | None = None, **config: Any) -> Strategy:
    """A strategy on one vector."""
    gradients = np.zeros_like(weights) if gradients is None else gradients
    return make(replicas, Held([weights], [gradients], []), Sync(**config), seed=5)


def nothing() -> None:
    """An optimizer that stays where it is."""


@pytest.mark.parallel([2, 3, 4])
def test_elastic_exchange_keeps_the_sum_of_replica_and_centre(comm: Any, seed: int) -> None:
    replicas = divide(comm, comm.size)
    x = np.zeros(SIZE)
    strategy = started(replicas, x, strategy="elastic", rate=0.25)
    x[:] = 64 * np.random.default_rng([seed, comm.rank]).integers(-99, 99, SIZE)
    for turn in range(comm.size):
        before, centre = x.copy(), strategy.state()["centre"].copy()
        if turn == comm.rank:
            assert strategy.update(turn, nothing) == turn + 1
        after = strategy.state()["centre"]
        if turn == comm.rank:
            np.testing.assert_array_equal(x + after, before + centre)  # exact: multiples of 64 in quarters
            np.testing.assert_array_equal(x, 0.75 * before + 0.25 * centre)
    strategy.free()
    replicas.free()


@pytest.mark.parallel([2, 3, 4])
def test_elastic_exchanges_at_the_same_time_lose_nothing(comm: Any, seed: int) -> None:
    replicas, steps = divide(comm, comm.size), 100
    x = np.zeros(SIZE)
    strategy = started(replicas, x, strategy="elastic")
    x[:] = np.random.default_rng([seed, comm.rank]).standard_normal(SIZE)
    before = sum(comm.allgather(x.copy()))
    for step in range(steps):
        strategy.update(step, nothing)
    after = sum(comm.allgather(x.copy())) + strategy.state()["centre"]
    for step in range(steps):  # before, one may have made all of its exchanges when others began
        comm.Barrier()
        strategy.update(step, nothing)
    spread = np.ptp(comm.allgather(x.copy()), axis=0).max()
    strategy.free()
    replicas.free()
    # each exchange rounds two sums of numbers below 5
    print(f"seed {seed}, {steps} exchanges of {comm.size} replicas, now {spread:.1e} apart")
    np.testing.assert_allclose(after, before, rtol=0, atol=10 * steps * comm.size * np.finfo(float).eps)
    assert spread < 1e-3


@pytest.mark.parallel([2, 3, 4])
@pytest.mark.parametrize("inside", [1, 2])
def test_nobody_reads_one_half_old_and_one_half_new(comm: Any, inside: int, seed: int) -> None:
    if comm.size % inside or comm.size == inside:
        inside = 1
    replicas, writes = divide(comm, comm.size // inside), 100
    vectors = Vectors(replicas, SIZE, np.dtype(np.float32))
    out, rng, read = np.empty(SIZE, np.float32), np.random.default_rng([seed, replicas.index]), set()
    for version in range(1, writes + 1):
        with vectors.locked(replicas.index):
            vectors.put(replicas.index, np.full(SIZE, 1000 * replicas.index + version, np.float32), version)
        other = int(rng.integers(replicas.count))
        with vectors.locked(other, shared=True):
            found = vectors.get(other, out)
        assert found == 0 or (out == 1000 * other + found).all()
        assert len(set(replicas.inside.allgather(found))) == 1  # all ranks of a replica read the same version
        read.add((other, found))
    vectors.free()
    replicas.free()
    assert len(read) > 10  # of its own alone there are about 25


@pytest.mark.parallel([2, 3, 4])
@pytest.mark.parametrize("name", ["gossip-pull", "gossip-push"])
def test_gossip_brings_replicas_together_within_where_they_were(comm: Any, name: str, seed: int) -> None:
    replicas = divide(comm, comm.size)
    x = np.random.default_rng([seed, comm.rank]).standard_normal(SIZE)
    strategy = started(replicas, x, strategy=name)
    every = np.array(comm.allgather(x.copy()))
    for step in range(120):
        strategy.update(step, nothing)
        if step % 10 == 0:
            comm.Barrier()  # on few cores one replica may else be done before the next begins
    now = np.array(comm.allgather(x.copy()))
    strategy.free()
    replicas.free()
    rounding = 120 * np.finfo(float).eps * np.abs(every).max()
    assert (now >= every.min(axis=0) - rounding).all()
    assert (now <= every.max(axis=0) + rounding).all()
    assert np.ptp(now, axis=0).max() < 1e-2 * np.ptp(every, axis=0).max()


@pytest.mark.parallel(4)
@pytest.mark.parametrize("name", OUT_OF_STEP)
def test_ranks_of_a_replica_stay_alike(comm: Any, name: str, seed: int) -> None:
    """Two replicas of two ranks, which hold the same weights, as a network cut by height does."""
    replicas = divide(comm, 2)
    rng = np.random.default_rng([seed, replicas.index])
    x = rng.standard_normal(SIZE)
    strategy = started(replicas, x, strategy=name)
    for step in range(30):
        time.sleep(1e-3 * rng.random())
        strategy.update(step, nothing)
        first, second = replicas.inside.allgather(x.copy())
        np.testing.assert_array_equal(first, second)
        x += rng.standard_normal(SIZE)
    strategy.free()
    replicas.free()


@pytest.mark.parallel([2, 3, 4])
def test_average_is_the_mean_and_is_taken_back(comm: Any, seed: int) -> None:
    replicas = divide(comm, comm.size)
    x = np.random.default_rng([seed, comm.rank]).standard_normal((7, 11)).astype(np.float32)
    every = np.array(comm.allgather(x.copy()), np.float64)
    expected = every.mean(axis=0).astype(np.float32)
    found = average(replicas, x)
    np.testing.assert_allclose(found, expected, rtol=2e-7, atol=0)
    own = x.copy()
    with averaged(replicas, [x]):
        np.testing.assert_array_equal(x, found)
        x += 1  # what is done to the mean is not done to the replica
    np.testing.assert_array_equal(x, own)
    replicas.free()


@pytest.mark.parallel([2, 3, 4])
def test_local_averages_every_period(comm: Any) -> None:
    replicas = divide(comm, comm.size)
    x = np.zeros(5)
    strategy = started(replicas, x, strategy="local", period=3)

    def move() -> None:
        x[:] += comm.rank

    for step in range(7):
        strategy.update(step, move)
        averages, since = divmod(step + 1, 3)
        mean = (comm.size - 1) / 2
        np.testing.assert_allclose(x, 3 * averages * mean + since * comm.rank, rtol=1e-14)
    replicas.free()


def descend(comm: Any, replicas: Replicas, spare: int, steps: int, late: float) -> tuple[np.ndarray, float, int]:
    """Weights after steps down gradients that say who gave them, the last one late; seconds; steps this one made."""
    x, gradient, made, done = np.zeros(SIZE), np.zeros(SIZE), 0, 0
    strategy = started(replicas, x, gradient, strategy="backup", spare=spare)

    def move() -> None:
        x[:] -= gradient

    comm.Barrier()
    begin = time.perf_counter()
    while done < steps:
        if replicas.index == replicas.count - 1:
            time.sleep(late)
        gradient[:] = 100.0 * done + replicas.index
        done, made = strategy.update(done, move), made + 1
    seconds = time.perf_counter() - begin
    comm.Barrier()
    strategy.free()
    return x, seconds, made


@pytest.mark.parallel([2, 3, 4])
@pytest.mark.parametrize("inside", [1, 2])
def test_backup_without_spares_takes_the_mean_of_all(comm: Any, inside: int) -> None:
    if comm.size % inside or comm.size == inside:
        inside = 1
    replicas, steps = divide(comm, comm.size // inside), 20
    x, _, made = descend(comm, replicas, 0, steps, 0.0)
    mean = (replicas.count - 1) / 2
    np.testing.assert_allclose(x, -sum(100.0 * step + mean for step in range(steps)), rtol=1e-14)
    assert made == steps
    replicas.free()


@pytest.mark.parallel([3, 4])
def test_backup_goes_on_without_the_late_one_which_takes_the_result(comm: Any) -> None:
    replicas, steps, late = divide(comm, comm.size), 12, 0.25
    x, seconds, made = descend(comm, replicas, 1, steps, late)
    every, spent = comm.allgather(x), comm.allgather((seconds, made))
    replicas.free()
    print(f"(seconds, steps made) by replica: {spent}")
    for other in every:
        np.testing.assert_array_equal(other, x)
    least = sum(100.0 * step + (comm.size - 2) / 2 for step in range(steps))  # never the last replica's
    assert least - 1e-9 <= -x[0] <= least + 2 + 1e-9  # the late one may count once or twice, and adds up to 1
    assert spent[-1][1] < steps / 2
    assert max(seconds for seconds, _ in spent[:-1]) < steps * late / 2


@pytest.mark.parallel([2, 3, 4])
@pytest.mark.parametrize("lockstep", [True, False])
def test_meeting_brings_all_together_where_one_calls(comm: Any, lockstep: bool, seed: int) -> None:
    """Steps that in lockstep wait for all others to make them too: nobody hangs, and all end after as many steps."""
    replicas = divide(comm, comm.size)
    rng = np.random.default_rng([seed, comm.rank])
    for caller in range(comm.size):
        meeting, done, ends = Meeting(replicas, lockstep), 0, []

        def step(meeting: Meeting = meeting) -> None:
            nonlocal done
            meeting.begin(done)
            time.sleep(2e-3 * rng.random())
            if lockstep and (done + 1) % 3 == 0:
                comm.Barrier()
            done += 1

        while not ends:
            step()
            if comm.rank == caller and done == 5:
                meeting.call()
            if meeting.called() or done == 12:
                while not meeting.complete(done):
                    step()
                ends = comm.allgather(done)
        meeting.free()
        assert not lockstep or len(set(ends)) == 1, ends
        assert ends[caller] >= 5
        assert max(ends) <= 12
    replicas.free()


@pytest.mark.parallel(4)
def test_second_meeting_waits_for_all_again(comm: Any) -> None:
    """Two replicas of two ranks, of which one is always late."""
    replicas = divide(comm, 2)
    meeting = Meeting(replicas, lockstep=False)
    for _ in range(3):
        time.sleep(0.05 * replicas.index)
        came = time.monotonic()
        assert meeting.complete(0)
        left = time.monotonic()
        assert left >= max(comm.allgather(came)[::2])  # of first ranks; one clock, as all are on one host
    meeting.free()
    replicas.free()
