"""Codecs on real ranks: the sums that simulated ones find, the same bits on all, and the bytes that they state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from codec_cases import SIZE, Together, gradient, make, together

from hpctrain.comm import allreduce
from hpctrain.comm.codecs import TABLE
from hpctrain.comm.codecs.cost import Estimate, require_gain, sent_bytes
from hpctrain.comm.link import Link
from hpctrain.config import Compress
from hpctrain.errors import ConfigError

SUMMED = ("fp16", "bf16", "powersgd")
"""Codecs whose sums are the allreduce algorithm's, in its order."""

SETTINGS = {"sparsity": 0.99, "warmup_epochs": 1.0}


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", TABLE)
def test_sums_are_those_of_simulated_ranks(comm: Any, name: str, dtype: str, seed: int) -> None:
    """The same bits, where ranks add what they decode, and else but for the order of additions."""
    steps, link = 3, Link(comm)

    def simulated(wire: Together) -> list[np.ndarray]:
        codec, found = make(name, wire.rank, dtype=dtype, **SETTINGS), []
        for step in range(steps):
            mine = gradient(seed, step, wire.rank, dtype=dtype)
            codec.sum_over(wire, mine, step, step / 2)
            found.append(mine)
        return found

    expected = together(comm.size, simulated)[0]
    codec, sizes = (
        make(name, comm.rank, dtype=dtype, **SETTINGS),
        np.zeros(SIZE),
    )  # what is sent, which has been kept too
    for step in range(steps):
        mine = gradient(seed, step, comm.rank, dtype=dtype)
        codec.sum(link, allreduce.get("ring"), mine, step, step / 2)
        assert len(set(comm.allgather(mine.tobytes()))) == 1
        if name in SUMMED:
            unit = {"fp16": 2.0**-11, "bf16": 2.0**-8}.get(name, 300 * np.finfo(dtype).eps)
            sizes = unit * sizes + sum(np.abs(gradient(seed, step, rank, dtype=dtype)) for rank in range(comm.size))
            smallest = 2.0**-24 if name == "fp16" else 0.0
            allowed = 4 * unit * (np.abs(sizes).max() if name == "powersgd" else sizes) + 4 * smallest
            assert np.all(np.abs(mine - expected[step]) <= allowed)
        else:
            np.testing.assert_array_equal(mine, expected[step], strict=True)


@pytest.mark.parallel([2, 3, 4])
@pytest.mark.parametrize("algorithm", allreduce.TABLE)
@pytest.mark.parametrize("name", SUMMED)
def test_any_allreduce_carries_it(comm: Any, name: str, algorithm: str, seed: int) -> None:
    """Close to the sum (of matrices of rank 1 as well), and where the algorithm tells what it sends, as many bytes."""
    link, carrier = Link(comm), allreduce.get(algorithm)
    codec = make(name, comm.rank, shapes={"w": (101, 37), "b": (37,)}, rank=comm.size)

    def of(rank: int) -> np.ndarray:
        rng = np.random.default_rng([seed, rank])
        return np.concatenate([np.outer(rng.normal(size=101), rng.normal(size=37)).ravel(), rng.normal(size=37)])

    mine = of(comm.rank).astype(np.float32)
    codec.sum(link, carrier, mine, 0, 0.0)
    every = np.stack([of(rank) for rank in range(comm.size)])
    unit = {"fp16": 2.0**-11, "bf16": 2.0**-8, "powersgd": 1e-4}[name]
    sizes = np.abs(every).sum(axis=0)
    assert np.all(np.abs(mine - every.sum(axis=0)) <= 4 * unit * (sizes.max() if name == "powersgd" else sizes))
    assert len(set(comm.allgather(mine.tobytes()))) == 1
    expected = sent_bytes(codec, carrier, comm.size, comm.rank, 0.0)
    assert expected is None if carrier.sent is None else codec.sent_bytes == expected
    link.free()


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("name", TABLE)
def test_sends_the_bytes_it_states(comm: Any, name: str, seed: int) -> None:
    link, codec, ring = Link(comm), make(name, comm.rank, sparsity=0.99, warmup_epochs=2.0), allreduce.get("ring")
    for step, epoch in enumerate((0.0, 1.0, 2.0)):
        codec.sum(link, ring, gradient(seed, step, comm.rank), step, epoch)
        assert codec.sent_bytes == sent_bytes(codec, ring, comm.size, comm.rank, epoch)
        assert (codec.sent_bytes == 0) == (comm.size == 1)
    plain = ring.sent(comm.size, comm.rank, SIZE, 4) if ring.sent else None
    assert plain is not None
    assert codec.sent_bytes <= 0.51 * plain.nbytes


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("name", TABLE)
def test_nothing_and_one_number(comm: Any, name: str) -> None:
    for shape in ((0, 3), (1,), ()):
        codec = make(name, comm.rank, shapes={"w": shape})
        mine = np.full(codec.size, 0.5 + comm.rank, np.float32)
        codec.sum(Link(comm), allreduce.get("ring"), mine, 0, 0.0)
        np.testing.assert_array_equal(mine, np.full(codec.size, sum(0.5 + rank for rank in range(comm.size))))


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("name", TABLE)
def test_what_is_not_finite_on_one_rank_shows_on_all(comm: Any, name: str, seed: int) -> None:
    codec, link = make(name, comm.rank, sparsity=0.99), Link(comm)
    for step in range(3):
        mine = gradient(seed, step, comm.rank)
        if step == 1 and comm.rank == comm.size - 1:
            mine[1234] = np.inf
        codec.sum(link, allreduce.get("ring"), mine, step, 0.0)
        assert np.isfinite(mine).all() == (step != 1)


# --- refusal ---------------------------------------------------------------------------------------------------------


@pytest.mark.parallel([1, 2, 3])
def test_what_the_slowest_rank_takes_decides_for_all(comm: Any) -> None:
    """Two gradients of 0.1 s each, of which compression takes 0.12 s, but on the last rank 0.21 s."""
    settings, last = Compress(codec="onebit"), comm.rank == comm.size - 1
    require_gain(comm, [Estimate(4, 1000, 0.05, 0.01, 0.1)] * 2, settings)
    slow = [Estimate(4, 1000, 0.05 + 0.09 * last, 0.01, 0.1), Estimate(4, 1000, 0.05, 0.01, 0.1)]
    message = (
        r"compress.codec = 'onebit' is slower .* 2,000 numbers would take 210 ms \(190 ms of computing, 20 ms of "
        r"sending; computing takes longest\) against 200 ms; .* compress.force = true"
    )
    with pytest.raises(ConfigError, match=message):
        require_gain(comm, slow, settings)
    require_gain(comm, slow, Compress(codec="onebit", force=True))


@pytest.mark.parallel([2])
def test_sending_too_much_is_told_apart_from_computing_too_long(comm: Any) -> None:
    message = r"8 ms \(3 ms of computing, 5 ms of sending; sending takes longest\) against 4 ms"
    with pytest.raises(ConfigError, match=message):
        require_gain(comm, [Estimate(2, 10, 0.003, 0.005, 0.004)], Compress(codec="qsgd"))


@pytest.mark.parallel([1, 2])
def test_where_nothing_is_summed_nothing_is_refused(comm: Any) -> None:
    require_gain(comm, [], Compress(codec="topk"))
    require_gain(comm, [Estimate(1, 1000, 0.0, 0.0, 0.0)], Compress(codec="topk"))
