"""The rules of synchronisation on plain arrays: what they conserve, and how fast replicas come together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hpctrain.checkpoint.agree import Alone
from hpctrain.checkpoint.reader import open_checkpoint
from hpctrain.checkpoint.tensors import rank_blocks, restore_rank
from hpctrain.checkpoint.writer import save
from hpctrain.data.order import Batches
from hpctrain.sync import rules
from hpctrain.sync.backup import Round, arrive


def test_elastic_move_keeps_the_sum_and_uses_values_before_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, centre = rng.integers(-64, 64, (2, 33)).astype(np.float64)
    taken = rules.elastic_pull(x, centre, 0.25)  # quarters of whole numbers: exact
    np.testing.assert_array_equal((x - taken) + (centre + taken), x + centre)
    np.testing.assert_array_equal(x - taken, 0.75 * x + 0.25 * centre)
    np.testing.assert_array_equal(centre + taken, 0.75 * centre + 0.25 * x)
    assert rules.elastic_rate(8) == 0.1


@pytest.mark.parametrize("p", [2, 3, 5, 16])
def test_simultaneous_pulls_shrink_the_variance_by_what_theory_says(p: int, seed: int) -> None:
    """x_i' = (x_i + x_j) / 2 with j uniform, i itself too: E[sum of (x_i' - mean')^2] = (1/2 - 1/(4 p)) of before.

    Given x of mean 0 and sum of squares S: E sum x_i'^2 = (S + 2 E x_i x_j + S) / 4 = S / 2, as E x_j = 0; and the mean
    moves by the mean of p independent draws over 2, so that p E mean'^2 = S / (4 p).
    """
    rounds, size = 4000, 8
    ratios = np.empty(rounds)
    x = np.random.default_rng(seed).standard_normal((p, size))
    before = ((x - x.mean(axis=0)) ** 2).sum()
    for r in range(rounds):
        after = x.copy()
        for i in range(p):
            j = rules.partner(seed, r, i, p)
            if j != i:
                rules.pull(after[i], x[j])
        ratios[r] = ((after - after.mean(axis=0)) ** 2).sum() / before
    expected, sigma = 0.5 - 1 / (4 * p), ratios.std(ddof=1) / np.sqrt(rounds)
    print(f"seed {seed}, {rounds} rounds, p = {p}: {ratios.mean():.4f}, expected {expected:.4f}, sigma {sigma:.4f}")
    assert abs(ratios.mean() - expected) < 4 * sigma  # by chance once in 16000


def test_partners_are_uniform_with_itself_among_them(seed: int) -> None:
    p, rounds = 5, 5000
    drawn = np.array([[rules.partner(seed, step, i, p) for i in range(p)] for step in range(rounds)])
    for i in range(p):
        counts = np.bincount(drawn[:, i], minlength=p)
        chi2 = ((counts - rounds / p) ** 2 / (rounds / p)).sum()
        assert chi2 < 23.5  # 4 degrees of freedom: by chance once in 10000
    assert len({tuple(row) for row in drawn.tolist()}) > 2000  # of 5**5: replicas draw apart; 2494 on average


@pytest.mark.parametrize(("received", "to_itself"), [(0, True), (1, False), (1, True), (3, False), (7, True)])
def test_weights_of_push_gossip_sum_to_one(received: int, to_itself: bool) -> None:
    own, each = rules.push_weights(received, to_itself)
    assert own + received * each == pytest.approx(1, abs=1e-15)
    assert own == pytest.approx((1 + to_itself) * each)
    x = np.full(3, 5.0)
    rules.push(x, np.full(3, 5.0 * received), received, to_itself)
    np.testing.assert_allclose(x, 5.0, rtol=1e-15)


def test_exchanges_are_due_every_period() -> None:
    assert [step for step in range(9) if rules.due(step, 3)] == [2, 5, 8]
    assert all(rules.due(step, 1) for step in range(3))


def test_mean_is_rounded_once() -> None:
    vectors = [np.array([v], np.float32) for v in (1, 2**-24, 2**-24, 2**-24)]
    exact = (1 + 3 * 2.0**-24) / 4
    assert rules.mean(vectors)[0] == np.float32(exact)  # summed in float32 it would be 1 / 4
    assert rules.mean([np.array([0.1], np.float32)] * 7)[0] == np.float32(0.1)


def test_a_round_closes_with_the_wanted_arrivals_and_the_late_change_nothing() -> None:
    found = Round(0, (), -1, ())
    found = arrive(found, 4, 2, wanted=2)
    assert found == Round(4, (2,), -1, ())
    found = arrive(found, 4, 0, wanted=2)
    assert found == Round(5, (), 4, (0, 2))
    assert arrive(found, 4, 1, wanted=2) is found
    assert arrive(found, 5, 1, wanted=1) == Round(6, (), 5, (1,))


def test_stripes_cut_every_batch_and_miss_nothing() -> None:
    whole = Batches(samples=47, batch=12, seed=3, drop_last=False)
    for step in range(whole.steps):
        stripes = [Batches(47, 12, 3, drop_last=False, stripe=i, stripes=3).ids(1, step) for i in range(3)]
        ids, weights = whole.ids(1, step)
        np.testing.assert_array_equal(np.concatenate([found for found, _ in stripes]), ids)
        np.testing.assert_array_equal(np.concatenate([found for _, found in stripes]), weights)


def test_what_a_rank_keeps_for_itself_comes_back_or_not_at_all(tmp_path: Path) -> None:
    arrays = {"residual": np.arange(5.0), "seen": np.arange(3, dtype=np.int64)}
    path = save(tmp_path, 1, rank_blocks(arrays, 2), {}, Alone())
    found, back = open_checkpoint(path), {name: np.zeros_like(a) for name, a in arrays.items()}
    assert restore_rank(found, back, 2)
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)
    assert not restore_rank(found, back, 1)
    assert not restore_rank(found, {"residual": np.zeros(6)}, 2)
