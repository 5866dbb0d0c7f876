"""PowerSGD against the singular value decomposition, whose first terms it approaches."""

from __future__ import annotations

import numpy as np
import pytest
from codec_cases import Only, Together, make, together

SHAPES = {"bias": (13,), "conv": (3, 5, 7, 19), "scale": (1,), "dense": (101, 37)}
MATRICES = {"conv": (slice(13, 2008), (105, 19)), "dense": (slice(2009, 5746), (101, 37))}
SIZE = 5746


def of_rank(rank: int, seed: int, step: int, who: int, dtype: str) -> np.ndarray:
    """A gradient whose matrices have rank `rank`."""
    rng = np.random.default_rng([seed, step, who])
    flat = rng.normal(size=SIZE)
    for where, (rows, columns) in MATRICES.values():
        flat[where] = (rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, columns))).reshape(-1)
    return flat.astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("rank", "ranks"), [(2, 1), (1, 2), (1, 4), (3, 3)])
def test_is_exact_where_the_rank_is_enough(rank: int, ranks: int, dtype: str, seed: int) -> None:
    """Matrices of rank r on each of p ranks add up to one of rank r p, and no rank keeps anything of its own.

    P = M Q points wrong by its rounding, eps |M| |Q|, beside its smallest singular value; M is turned by as much.
    """

    def task(wire: Together) -> None:
        codec = make("powersgd", wire.rank, SHAPES, dtype, rank=rank * ranks)
        for step in range(3):
            mine, factor, at = of_rank(rank, seed, step, wire.rank, dtype), codec.state["factor"].copy(), 0
            codec.sum_over(Only() if ranks == 1 else wire, mine, step, 0.0)
            expected = sum(of_rank(rank, seed, step, who, dtype) for who in range(ranks))
            for where, (rows, columns) in MATRICES.values():
                matrix = expected[where].reshape(rows, columns)
                q = factor[at : at + columns * rank * ranks].reshape(columns, -1)
                at += q.size
                norm, smallest = np.linalg.norm(matrix, 2), np.linalg.svd(matrix @ q, compute_uv=False)[-1]
                bound = 5 * np.finfo(dtype).eps * norm * np.linalg.norm(q) / smallest * norm
                np.testing.assert_allclose(mine[where], expected[where], rtol=0, atol=bound)
                assert np.abs(codec.state["residual"][where]).max() <= bound
            codec.state["residual"][...] = 0  # or the next matrix would have more ranks, though small ones

    together(ranks, task)


def test_a_matrix_no_larger_than_its_factors_is_summed_whole(seed: int) -> None:
    """In full rank, that is any matrix."""
    codec, mine = make("powersgd", shapes=SHAPES, rank=37), of_rank(9, seed, 0, 0, "float32")
    codec.sum_over(Only(), mine, 0, 0.0)
    np.testing.assert_array_equal(mine, of_rank(9, seed, 0, 0, "float32"))
    assert codec.state["factor"].size == 0


def test_a_product_of_the_rank_and_the_rest_whole(seed: int) -> None:
    """The sum of each matrix has the rank asked for, and what a rank keeps is orthogonal to it."""
    ranks, rank = 3, 2

    def task(wire: Together) -> None:
        codec = make("powersgd", wire.rank, SHAPES, "float64", rank=rank)
        mine = of_rank(12, seed, 0, wire.rank, "float64")
        codec.sum_over(wire, mine, 0, 0.0)
        expected = sum(of_rank(12, seed, 0, who, "float64") for who in range(ranks))
        for where in (slice(0, 13), slice(2008, 2009)):
            np.testing.assert_allclose(mine[where], expected[where], rtol=1e-14, atol=1e-14)
            assert not codec.state["residual"][where].any()
        for where, extents in MATRICES.values():
            matrix, residual = mine[where].reshape(extents), codec.state["residual"][where].reshape(extents)
            assert np.linalg.matrix_rank(matrix, tol=1e-10) == rank
            assert np.abs(matrix.T @ residual).max() < 1e-10
            assert np.abs(residual).max() > 1

    together(ranks, task)


def test_steps_approach_the_largest_singular_values(seed: int) -> None:
    """As each step starts from the last one's Q. What is left is not added again here, or the matrix would change."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(n, 20)))[0] for n in (101, 37))
    values = 2.0 ** -np.arange(20)
    matrix = left * values @ right.T
    codec, errors = make("powersgd", shapes={"dense": (101, 37)}, dtype="float64", rank=3), []
    for step in range(12):
        codec.state["residual"][...] = 0
        mine = matrix.reshape(-1).copy()
        codec.sum_over(Only(), mine, step, 0.0)
        errors.append(np.linalg.norm(mine.reshape(101, 37) - matrix))
    best = np.linalg.norm(values[3:])
    assert errors[0] > 1.02 * best
    assert errors[-1] == pytest.approx(best, rel=1e-5)
    np.testing.assert_array_less(best * (1 - 1e-12), errors)


def test_repeated_gradient_is_sent_whole_in_the_end(seed: int) -> None:
    """Error feedback: the mean of what is sent approaches a gradient of full rank that comes again and again."""
    codec, steps = make("powersgd", shapes={"dense": (101, 37)}, dtype="float64", rank=3), 400
    same = np.random.default_rng(seed).normal(size=101 * 37)
    sent = np.zeros_like(same)
    for step in range(steps):
        mine = same.copy()
        codec.sum_over(Only(), mine, step, 0.0)
        sent += mine
    assert np.linalg.norm(sent / steps - same) < 0.1 * np.linalg.norm(same)


def test_goes_on_after_zeros(seed: int) -> None:
    """A gradient of zeros makes Q zero, from which no step would find anything: the first Q comes again."""
    codec, first = make("powersgd", shapes={"dense": (101, 37)}), make("powersgd", shapes={"dense": (101, 37)})
    codec.sum_over(Only(), np.zeros(101 * 37, np.float32), 0, 0.0)
    np.testing.assert_array_equal(codec.state["factor"], first.state["factor"])
    assert codec.state["factor"].all()


def test_ranks_start_from_the_same_factor_and_seeds_do_not() -> None:
    ours = make("powersgd", 0).state["factor"]
    np.testing.assert_array_equal(make("powersgd", 3).state["factor"], ours)
    assert not np.any(make("powersgd", seed=6).state["factor"] == ours)
