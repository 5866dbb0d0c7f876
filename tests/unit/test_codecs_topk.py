"""Deep Gradient Compression against its definition, element by element, and against SGD with momentum."""

from __future__ import annotations

import numpy as np
import pytest
from codec_cases import PARTS, SIZE, Only, Together, gradient, make, together

from hpctrain.comm.codecs.topk import largest, sparsity


def momentum_sgd(seed: int, ranks: int, steps: int, dtype: str) -> list[np.ndarray]:
    """Weights after each step, as whoever knows nothing of compression would compute them."""
    weights, velocity, found = np.zeros(SIZE, dtype), np.zeros(SIZE, dtype), []
    for step in range(steps):
        total = sum(gradient(seed, step, rank, dtype=dtype) for rank in range(1, ranks))
        velocity = 0.9 * velocity + (gradient(seed, step, 0, dtype=dtype) + total)
        weights = weights - 0.1 * velocity
        found.append(weights)
    return found


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_without_sparsity_it_is_sgd_with_momentum(ranks: int, dtype: str, seed: int) -> None:
    """Bit for bit where the additions have the same order, on one rank; to their rounding on several."""
    steps = 6
    expected = momentum_sgd(seed, ranks, steps, dtype)

    def task(wire: Together) -> None:
        codec, weights = make("topk", wire.rank, dtype=dtype, sparsity=0.0), np.zeros(SIZE, dtype)
        for step in range(steps):
            update = gradient(seed, step, wire.rank, dtype=dtype)
            codec.sum_over(Only() if ranks == 1 else wire, update, step, 0.0)
            weights = weights - 0.1 * update
            if ranks == 1:
                np.testing.assert_array_equal(weights, expected[step], strict=True)
            else:
                largest_sum = np.abs(weights).max() + 3 * 6 * 60.0
                np.testing.assert_allclose(weights, expected[step], rtol=0, atol=np.finfo(dtype).eps * largest_sum)

    together(ranks, task)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_rank_alone_does_sgd_with_momentum_whatever_the_sparsity(dtype: str, seed: int) -> None:
    expected = momentum_sgd(seed, 1, 4, dtype)

    def task(wire: Together) -> None:
        codec, weights = make("topk", dtype=dtype, sparsity=0.99), np.zeros(SIZE, dtype)
        for step in range(4):
            update = gradient(seed, step, 0, dtype=dtype)
            codec.sum_over(wire, update, step, 0.0)
            weights = weights - 0.1 * update
            np.testing.assert_array_equal(weights, expected[step], strict=True)

    together(1, task)


@pytest.mark.parametrize("clip", [0.0, 3.0])
@pytest.mark.parametrize(("final", "warmup"), [(0.9, 0.0), (0.999, 2.0)])
def test_is_algorithm_7_of_the_survey(final: float, warmup: float, clip: float, seed: int) -> None:
    """U <- m U + G; V <- V + U; send the largest of V; V and U are 0 where it was sent.

    Biases and scales, which are sent whole, keep their U.
    """
    ranks, steps = 3, 9

    def task(wire: Together) -> list[np.ndarray]:
        codec = make("topk", wire.rank, dtype="float64", sparsity=final, warmup_epochs=warmup, clip=clip)
        found = []
        for step in range(steps):
            mine = gradient(seed, step, wire.rank, dtype="float64")
            codec.sum_over(wire, mine, step, step / 4)
            found.append(mine)
        return found

    found = together(ranks, task)[0]
    u, v = np.zeros((2, ranks, SIZE))
    for step in range(steps):
        share, expected = sparsity(final, warmup, step / 4), np.zeros(SIZE)
        for rank in range(ranks):
            g = gradient(seed, step, rank, dtype="float64")
            if clip:
                g = g * min(1, clip / np.sqrt(ranks) / np.linalg.norm(g))
            u[rank] = 0.9 * u[rank] + g
            v[rank] = v[rank] + u[rank]
            for part in PARTS:
                matrix = len(part.shape) > 1
                kept = int(share * part.size) if matrix else 0
                for i in np.argsort(-np.abs(v[rank, part.where]), kind="stable")[: part.size - kept]:
                    at = part.where.start + i
                    expected[at] += v[rank, at]
                    v[rank, at] = 0
                    u[rank, at] *= not matrix
        np.testing.assert_allclose(found[step], expected, rtol=1e-12, atol=1e-13)


def test_sparsity_over_the_warm_up() -> None:
    """Per cent: 75, 93.75, 98.4, 99.6, then 99.9 (Lin et al. 2018, section 3.3)."""
    epochs = [0, 0.9, 1, 2, 3, 3.9, 4, 50]
    expected = [0.75, 0.75, 0.9375, 0.984375, 0.99609375, 0.99609375, 0.999, 0.999]
    assert [sparsity(0.999, 4.0, epoch) for epoch in epochs] == expected
    assert [sparsity(0.9, 2.0, epoch) for epoch in (0, 0.5, 1, 5)] == [0.75, 0.9, 0.9, 0.9]
    assert sparsity(0.0, 4.0, 0.0) == 0.0
    assert sparsity(0.999, 0.0, 0.0) == 0.999


def test_largest_takes_as_many_as_asked_and_of_equals_the_first() -> None:
    numbers = np.array([1, -2, 2, 0, -2, 2, 3], np.float32)
    assert [largest(numbers, k).tolist() for k in range(1, 8)] == [
        *([6], [1, 6], [1, 2, 6], [1, 2, 4, 6], [1, 2, 4, 5, 6], [0, 1, 2, 4, 5, 6]),
        [0, 1, 2, 3, 4, 5, 6],
    ]
    assert largest(np.zeros(9), 4).tolist() == [0, 1, 2, 3]
    assert largest(np.array([5, np.nan, -np.inf, -7]), 2).tolist() == [1, 2]


def test_largest_of_random_numbers(seed: int) -> None:
    rng, rounds = np.random.default_rng(seed), 300
    for _ in range(rounds):
        n = int(rng.integers(1, 40))
        k, numbers = int(rng.integers(1, n + 1)), rng.integers(-5, 6, n).astype(np.float32)
        expected = sorted(sorted(range(n), key=lambda i: (-abs(numbers[i]), i))[:k])
        assert largest(numbers, k).tolist() == expected
    print(f"{rounds} rounds")


def test_at_least_one_number_is_sent() -> None:
    codec, mine = make("topk", shapes={"w": (3, 3)}, sparsity=0.999), np.arange(9, dtype=np.float32)
    codec.sum_over(Only(), mine, 0, 0.0)
    np.testing.assert_array_equal(mine, [0, 0, 0, 0, 0, 0, 0, 0, 8])


def test_masked_momentum_starts_again() -> None:
    """One of two is sent: after (3, 1) with momentum 1/2 there is left u = v = (0, 1), and of (0, 0) then 1 + 1/2."""
    codec = make("topk", shapes={"w": (2, 1)}, momentum=0.5, sparsity=0.5)
    first, second = np.array([3, 1], np.float32), np.zeros(2, np.float32)
    codec.sum_over(Only(), first, 0, 0.0)
    codec.sum_over(Only(), second, 1, 0.0)
    np.testing.assert_array_equal([first, second], [[3, 0], [0, 1.5]])
    assert codec.takes_momentum
