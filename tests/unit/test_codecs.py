"""What every codec has to keep: nothing is lost, nothing that is not finite hides, and a stop leaves no trace."""

from __future__ import annotations

import numpy as np
import pytest
from codec_cases import PARTS, SIZE, Only, Together, gradient, make, state_of, together

from hpctrain.comm.codecs import TABLE, Codec
from hpctrain.comm.codecs.bits import pack, packed_bytes, unpack

FEEDBACK = {"fp16": "residual", "bf16": "residual", "onebit": "residual", "topk": "accumulated", "powersgd": "residual"}
"""Codecs that keep what they do not send, and under which name."""


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_numbers_are_the_digits_of_one_long_number(bits: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for n in (0, 1, 7, 8, 9, 1001):
        codes = rng.integers(0, 2**bits, n).astype(np.uint8)
        packed = pack(codes, bits)
        assert packed.dtype == np.uint8
        assert packed.size == packed_bytes(n, bits) == -(-n // 8) * bits
        digits = sum(int(code) << i * bits for i, code in enumerate(codes))
        assert int.from_bytes(packed.tobytes(), "little") == digits
        np.testing.assert_array_equal(unpack(packed, n, bits), codes, strict=True)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", FEEDBACK)
def test_sent_and_kept_are_what_accumulated(name: str, dtype: str, seed: int) -> None:
    """Exactly, where what is kept is a difference that floats hold, and else to the one rounding of the difference."""
    codec, kept, momentum = make(name, dtype=dtype, sparsity=0.9), FEEDBACK[name], np.zeros(SIZE, dtype)
    eps = np.finfo(dtype).eps
    for step in range(5):
        mine, before = gradient(seed, step, 0, dtype=dtype), state_of(codec)
        momentum = 0.9 * before["momentum"] + mine if name == "topk" else mine
        accumulated = before[kept] + momentum
        sent = mine.copy()
        codec.sum_over(Only(), sent, step, 0.0)
        found = sent.astype(np.longdouble) + codec.state[kept]
        if name in ("fp16", "bf16", "topk"):
            np.testing.assert_array_equal(found, accumulated)
        elif name == "onebit":
            assert np.all(np.abs(found - accumulated) <= eps / 2 * np.abs(codec.state[kept]))
        else:  # the product of P and Q, of rank 2, may round otherwise where it is subtracted
            assert np.all(np.abs(found - accumulated) <= 8 * eps * np.abs(accumulated).max())
        assert name in ("fp16", "bf16") or np.abs(codec.state[kept]).max() > 0.1 * np.abs(accumulated).max()


@pytest.mark.parametrize("name", FEEDBACK)
def test_over_ranks_nothing_is_lost_either(name: str, seed: int) -> None:
    """What all have sent in 7 steps, and what they still keep, is the sum of all gradients."""
    ranks, steps, dtype = 3, 7, "float64"

    def task(wire: Together) -> tuple[np.ndarray, np.ndarray]:
        codec, sent = make(name, wire.rank, dtype=dtype, momentum=0.0, sparsity=0.99), np.zeros(SIZE)
        for step in range(steps):
            mine = gradient(seed, step, wire.rank, dtype=dtype)
            codec.sum_over(wire, mine, step, 0.0)
            sent += mine
        return sent, codec.state[FEEDBACK[name]]

    found = together(ranks, task)
    sent, kept = found[0][0], sum(kept for _, kept in found)
    expected = sum(gradient(seed, step, rank, dtype=dtype) for step in range(steps) for rank in range(ranks))
    # all that can be lost is rounding: of additions of floats of 16 bits on the wire, or of float64
    unit = {"fp16": 2.0**-11, "bf16": 2.0**-8}.get(name, 2.0**-52)
    sizes = sum(np.abs(gradient(seed, step, rank, dtype=dtype)) for step in range(steps) for rank in range(ranks))
    scale = sizes.max() if name in ("powersgd", "onebit") else sizes  # these mix numbers of one parameter
    assert np.all(np.abs(sent + kept - expected) <= 20 * unit * scale)
    assert np.abs(sent - expected).max() > 0 or name in ("fp16", "bf16")


@pytest.mark.parametrize("name", TABLE)
def test_all_ranks_end_with_the_same_bits_and_do_so_again(name: str, seed: int) -> None:
    def task(wire: Together) -> bytes:
        codec, found = make(name, wire.rank, sparsity=0.9), []
        for step in range(3):
            mine = gradient(seed, step, wire.rank)
            codec.sum_over(wire, mine, step, 0.0)
            found.append(mine)
        return np.stack(found).tobytes()

    assert len({*together(3, task), *together(3, task)}) == 1


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_state_and_step_are_all_that_a_checkpoint_needs(name: str, dtype: str, seed: int) -> None:
    def go_on(codec: Codec, wire: Together, first: int) -> np.ndarray:
        found = []
        for step in range(first, first + 3):
            mine = gradient(seed, step, wire.rank, dtype=dtype)
            codec.sum_over(wire, mine, step, step / 4)
            found.append(mine)
        return np.stack(found)

    def task(wire: Together) -> None:
        codec = make(name, wire.rank, dtype=dtype, sparsity=0.99, warmup_epochs=1.0)
        go_on(codec, wire, 0)
        resumed = make(name, wire.rank, dtype=dtype, sparsity=0.99, warmup_epochs=1.0)
        for key, array in state_of(codec).items():
            assert array.ndim == 1
            assert array.dtype == dtype
            resumed.state[key][...] = array
        np.testing.assert_array_equal(go_on(codec, wire, 3), go_on(resumed, wire, 3))

    together(2, task)
    for array in make(name).state.values():
        assert array.size == SIZE or name == "powersgd"


@pytest.mark.parametrize("what", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", TABLE)
def test_what_is_not_finite_shows_on_all_ranks_and_is_not_kept(name: str, what: float, seed: int) -> None:
    for part in PARTS:
        if part.size:
            at = part.where.start + part.size // 2

            def task(wire: Together, at: int = at) -> None:
                codec = make(name, wire.rank, sparsity=0.99)
                for step, bad in enumerate([False, True, False]):
                    mine, before = gradient(seed, step, wire.rank), state_of(codec)
                    if bad and wire.rank == 1:
                        mine[at] = what
                    codec.sum_over(wire, mine, step, 0.0)
                    assert np.isfinite(mine).all() != bad
                    if bad:
                        for key, array in before.items():
                            np.testing.assert_array_equal(codec.state[key], array)

            together(2, task)


def test_fp16_overflow_shows() -> None:
    codec = make("fp16", shapes={"w": (3,)})
    mine = np.array([1.0, 1e5, 2.0], np.float32)
    codec.sum_over(Only(), mine, 0, 0.0)
    np.testing.assert_array_equal(mine, np.array([1, np.inf, 2], np.float32))
    assert not codec.state["residual"].any()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", TABLE)
def test_small_gradients(name: str, dtype: str) -> None:
    """No element: nothing happens. One element: it is its own mean, maximum and largest, so that all of it is sent."""
    for shape in ((0,), (0, 3), ()):
        empty = make(name, shapes={"w": (0,)} if shape == () else {"w": shape}, dtype=dtype)
        empty.sum_over(Only(), np.empty(0, dtype), 0, 0.0)
        assert all(array.size == 0 for array in empty.state.values())
    for shape in ((), (1,), (1, 1)):
        one = make(name, shapes={"w": shape}, dtype=dtype)
        mine = np.array([0.625], dtype)  # which has few digits
        one.sum_over(Only(), mine, 0, 0.0)
        np.testing.assert_array_equal(mine, np.array([0.625], dtype), strict=True)


@pytest.mark.parametrize("name", TABLE)
def test_zero_stays_zero(name: str) -> None:
    mine = np.zeros(SIZE, np.float32)
    make(name).sum_over(Only(), mine, 0, 0.0)
    assert not mine.any()


@pytest.mark.parametrize("name", [name for name in TABLE if name != "topk"])
def test_one_rank_alone_keeps_its_gradient(name: str, seed: int) -> None:
    def task(wire: Together) -> None:
        codec, mine = make(name), gradient(seed, 0, 0)
        codec.sum_over(wire, mine, 0, 0.0)
        np.testing.assert_array_equal(mine, gradient(seed, 0, 0))

    together(1, task)


def test_random_gradients(seed: int) -> None:
    """Any codec, settings, ranks, parameters and float type: the same finite bits on all ranks, in the bytes stated."""
    rng, rounds, sizes = np.random.default_rng(seed), 120, []
    for case in range(rounds):
        shapes = {f"p{i}": tuple(rng.integers(0, 9, rng.integers(0, 5)).tolist()) for i in range(rng.integers(1, 6))}
        settings = {
            "bits": int(rng.integers(2, 9)),
            "sparsity": float(rng.choice([0, 0.5, 0.9, 0.999])),
            "warmup_epochs": float(rng.choice([0, 1.0])),
            "clip": float(rng.choice([0, 0.5])),
            "rank": int(rng.integers(1, 5)),
        }
        name, dtype, ranks = rng.choice(list(TABLE)), rng.choice(["float32", "float64"]), int(rng.integers(2, 5))

        def task(wire: Together, case: tuple = (case, name, dtype, shapes, settings)) -> list[bytes]:
            number, name, dtype, shapes, settings = case
            codec, found = make(name, wire.rank, shapes, dtype, **settings), []
            for step in range(3):
                mine = gradient(seed, 10 * number + step, wire.rank, codec.size, dtype)
                counted = Counting(wire)
                codec.sum_over(counted, mine, step, step / 2)
                assert np.isfinite(mine).all()
                assert counted.nbytes == sum(m.elements * m.itemsize for m in codec.messages(step / 2))
                found.append(mine.tobytes())
            return found

        found = together(ranks, task)
        assert all(bits == found[0] for bits in found), (name, dtype, ranks, shapes, settings)
        sizes.append(len(found[0][0]))
    print(f"{rounds} rounds, {sizes.count(0)} of empty gradients, {max(sizes)} bytes at most")
    assert sizes.count(0) < rounds / 2


class Counting:
    """A wire that counts the bytes it is handed."""

    def __init__(self, wire: Together) -> None:
        self.wire, self.rank, self.size, self.nbytes = wire, wire.rank, wire.size, 0

    def total(self, buffer: np.ndarray) -> None:
        self.nbytes += buffer.nbytes
        self.wire.total(buffer)

    def gather(self, payload: np.ndarray) -> np.ndarray:
        self.nbytes += payload.nbytes
        return self.wire.gather(payload)
