"""Codecs that send few bits of every number, against their definitions: 1-bit SGD, QSGD and TernGrad."""

from __future__ import annotations

import numpy as np
import pytest
from codec_cases import PARTS, SIZE, Only, Together, gradient, make, together

from hpctrain.comm.codecs import Message
from hpctrain.comm.codecs.qsgd import uniform

DRAWS = 3000


def test_onebit_by_hand() -> None:
    """Means -2 and 3 of (-1, 2, -3, 4, 3); what is left is (1, -1, -1, 1, 0)."""
    codec = make("onebit", shapes={"w": (5,), "b": (2,)})
    mine = np.array([-1, 2, -3, 4, 3, 0, 8], np.float32)
    codec.sum_over(Only(), mine, 0, 0.0)
    np.testing.assert_array_equal(mine, [-2, 3, -2, 3, 3, 4, 4])
    np.testing.assert_array_equal(codec.state["residual"], [1, -1, -1, 1, 0, -4, 4])
    again = np.array([-3, 0, 1, 1, 1, 4, -4], np.float32)  # with what is left: (-2, -1, 0, 2, 1), (0, 0)
    codec.sum_over(Only(), again, 1, 0.0)
    np.testing.assert_array_equal(again, [-1.5, -1.5, 1, 1, 1, 0, 0])


def test_onebit_over_ranks_is_the_sum_of_means(seed: int) -> None:
    ranks, steps = 3, 4

    def task(wire: Together) -> list[np.ndarray]:
        codec, found = make("onebit", wire.rank, dtype="float64"), []
        for step in range(steps):
            mine = gradient(seed, step, wire.rank, dtype="float64")
            codec.sum_over(wire, mine, step, 0.0)
            found.append(mine)
        return found

    found = together(ranks, task)[0]
    left = np.zeros((ranks, SIZE))
    for step in range(steps):
        expected = np.zeros(SIZE)
        for rank in range(ranks):
            left[rank] += gradient(seed, step, rank, dtype="float64")
            sent = np.empty(SIZE)
            for part in PARTS:
                numbers = left[rank][part.where]
                for chosen in (numbers >= 0, numbers < 0):
                    sent[part.where][chosen] = numbers[chosen].mean() if chosen.any() else 0
            left[rank] -= sent
            expected += sent
        np.testing.assert_allclose(found[step], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "bits", "bucket", "shape"),
    [
        ("qsgd", 4, 512, (7, 101)),
        ("qsgd", 2, 512, (600,)),
        ("qsgd", 3, 512, (513,)),
        ("qsgd", 8, 512, (99,)),
        ("terngrad", 2, 10**9, (7, 101)),
    ],
)
def test_unbiased(name: str, bits: int, bucket: int, shape: tuple[int, ...], seed: int) -> None:
    """Within 4 sigma over all numbers together, within 5.5 for each, with the variance of the definition.

    A number between two levels that are `step` apart, at the fraction f of the way, has the variance f (1 - f) step^2.
    """
    n, steps = int(np.prod(shape)), 2 ** (bits - 1) - 1
    mine, weights = np.random.default_rng(seed).normal(size=(2, n))
    codec, total, squares, projections = make(name, shapes={"w": shape}, seed=seed, bits=bits), 0.0, 0.0, []
    for draw in range(DRAWS):
        sent = mine.astype(np.float32)
        codec.sum_over(Only(), sent, draw, 0.0)
        error = sent - mine.astype(np.float32).astype(float)
        total, squares = total + error, squares + error**2
        projections.append(error @ weights)
    scales = np.array([np.abs(mine[i // bucket * bucket :][:bucket]).max() for i in range(n)])
    fraction = np.abs(mine) / scales * steps % 1
    variance = fraction * (1 - fraction) * (scales / steps) ** 2
    off = abs(np.mean(projections)) / np.sqrt(variance @ weights**2 / DRAWS)
    # what is hardly ever rounded the other way has no normal mean yet
    often = fraction * (1 - fraction) * DRAWS > 100
    worst = (np.abs(total / DRAWS)[often] / np.sqrt(variance[often] / DRAWS)).max()
    print(f"seed {seed}, {DRAWS} draws of {n} numbers: {off:.2f} sigma together, {worst:.2f} at worst")
    assert off < 4
    assert worst < 5.5
    assert np.count_nonzero(often) > n / 2
    assert squares.sum() / DRAWS == pytest.approx(variance.sum(), rel=0.05)


@pytest.mark.parametrize(("name", "steps"), [("qsgd", 7), ("terngrad", 1)])
def test_levels(name: str, steps: int, seed: int) -> None:
    """Of 2**20 numbers: those next to zero, half-way, and the largest, which is sent as it is."""
    mine = np.array([0, 1, -1, 0.5, -0.5, 1 / 7, 2 / 7, 1e-30, -1e-30], np.float32) * np.float32(2.0**20)
    codec, seen = make(name, shapes={"w": (9,)}, seed=seed), set()
    for step in range(50):
        sent = mine.copy()
        codec.sum_over(Only(), sent, step, 0.0)
        assert sent[0] == 0
        np.testing.assert_allclose(sent[1:3], [2.0**20, -(2.0**20)], rtol=1e-6)
        seen |= set(np.round(sent / 2**20 * steps).astype(int).tolist())
        np.testing.assert_allclose(sent / 2**20 * steps, np.round(sent / 2**20 * steps), atol=1e-5)
    assert seen == ({-7, -4, -3, 0, 1, 2, 3, 4, 7} if name == "qsgd" else {-1, 0, 1})


def test_numbers_of_all_sizes_have_a_scale(seed: int) -> None:
    """Buckets of the smallest and largest floats, and of zeros: finite, and off by a level at most."""
    sizes = np.repeat(np.array([1e-45, 1e-38, 0, 1e-20, 1, 1e20, 3e38], np.float32), 512)
    mine = sizes * np.random.default_rng(seed).uniform(-1, 1, sizes.size).astype(np.float32)
    sent = mine.copy()
    make("qsgd", shapes={"w": (sizes.size,)}).sum_over(Only(), sent, 0, 0.0)
    assert np.isfinite(sent).all()
    assert np.all(np.abs(sent - mine) <= sizes / 6.99 + 1e-44)


def test_random_numbers_belong_to_seed_step_rank_and_parameter() -> None:
    asked = (3, 1, 2, "conv.weight")
    whole = uniform(*asked, 0, 1000)
    np.testing.assert_array_equal(uniform(*asked, 512, 301), whole[512:813])
    assert 0 <= whole.min() < 0.01 < 0.99 < whole.max() <= 1
    others = [(4, 1, 2, "conv.weight"), (3, 2, 2, "conv.weight"), (3, 1, 0, "conv.weight"), (3, 1, 2, "conv.bias")]
    drawn = [whole, *(uniform(*other, 0, 1000) for other in others)]
    assert len(np.unique(np.stack(drawn))) > 4990
    assert np.abs(np.corrcoef(np.stack(drawn)) - np.eye(5)).max() < 5 / np.sqrt(1000)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("fp16", {}, [Message(False, 70495, 2)]),
        ("bf16", {}, [Message(False, 70495, 2)]),
        # two means for each of five parameters; 40 + 1 + 1 + 8731 + 42 bytes of signs
        ("onebit", {}, [Message(True, 5 * 2 * 4 + 8815, 1)]),
        # 1 + 1 + 1 + 137 + 1 scales; 3 bits
        ("qsgd", {"bits": 3}, [Message(True, 141 * 4 + 8815 * 3, 1)]),
        ("terngrad", {}, [Message(True, 5 * 4 + 8815 * 2, 1)]),
        # of 315: 32 and 40 bytes of bits; of 69841: 6985 and bits; biases and scales, 339, are sent whole
        ("topk", {"sparsity": 0.9}, [Message(True, (32 + 6985 + 339) * 4 + 40 + 8731, 1)]),
        # 1 of 315 with an index of 2 bytes, 70 of 69841 with 4
        ("topk", {"sparsity": 0.999}, [Message(True, (1 + 70 + 339) * 4 + 2 + 280, 1)]),
        # 45 x 7 and 211 x 331 in rank 2, the rest whole
        ("powersgd", {}, [Message(False, 2 * (45 + 211) + 7 + 1 + 331, 4), Message(False, 2 * (7 + 331), 4)]),
    ],
)
def test_bytes_on_the_wire(name: str, settings: dict[str, float], expected: list[Message], seed: int) -> None:
    """As many as the parameters' sizes give by hand, and as many as go there."""
    codec, seen = make(name, **settings), []

    class Seeing(Only):
        def total(self, buffer: np.ndarray) -> None:
            seen.append(Message(False, buffer.size, buffer.itemsize))

        def gather(self, payload: np.ndarray) -> np.ndarray:
            seen.append(Message(True, payload.size, payload.itemsize))
            return super().gather(payload)

    codec.sum_over(Seeing(), gradient(seed, 0, 0), 0, 0.0)
    assert seen == codec.messages(0.0) == expected
