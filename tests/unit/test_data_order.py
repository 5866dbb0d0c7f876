"""The order of samples: the same for ever, on any grid; every sample once an epoch."""

from __future__ import annotations

from itertools import chain, islice

import numpy as np
import pytest

from hpctrain.data.order import Batches, permutation
from hpctrain.errors import HpctrainError
from hpctrain.randomness import random_words

MASK = 2**64 - 1


def philox4x64_10(counter: list[int], key: list[int]) -> list[int]:
    """One block, straight from Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011)."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (b >> 64) ^ c1 ^ k0, b & MASK, (a >> 64) ^ c3 ^ k1, a & MASK
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return [c0, c1, c2, c3]


def test_the_paper_s_own_vectors() -> None:
    zeros = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    ones = [0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0]
    assert philox4x64_10([0] * 4, [0] * 2) == zeros
    assert philox4x64_10([MASK] * 4, [MASK] * 2) == ones


@pytest.mark.parametrize(("seed", "index"), [(0, 0), (1, 7), (2**64 - 1, 2**63)])
def test_words_are_philox_of_seed_index_and_purpose(seed: int, index: int) -> None:
    tag = sum(ord(letter) << 8 * i for i, letter in enumerate("order"))
    blocks = [philox4x64_10([i, 0, 0, tag], [seed, index]) for i in (1, 2, 3)]
    assert random_words("order", seed, index, 11).tolist() == list(islice(chain(*blocks), 11))


def test_purposes_share_nothing() -> None:
    words = [set(random_words(purpose, 3, 5, 1000).tolist()) for purpose in ("order", "split", "volume")]
    assert len(set.union(*words)) == 3000


def test_the_order_is_pinned() -> None:
    """These values may never change: a resumed run would see other samples."""
    assert permutation(0, 0, 10).tolist() == [8, 4, 7, 3, 6, 5, 2, 1, 0, 9]
    assert permutation(2024, 3, 7).tolist() == [4, 6, 5, 0, 2, 1, 3]
    ids, weight = Batches(samples=11, batch=4, seed=5, drop_last=False).ids(epoch=2, step=2)
    assert (ids.tolist(), weight.tolist()) == ([3, 6, 8, 9], [1, 1, 1, 0])
    assert ids.dtype == np.int64
    assert weight.dtype == np.float64


@pytest.mark.parametrize("n", [1, 2, 13, 1000])
def test_a_permutation_sorts_words_stably(n: int) -> None:
    words = random_words("order", 9, 4, n).tolist()
    assert permutation(9, 4, n).tolist() == sorted(range(n), key=lambda i: (words[i], i))


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("samples", "batch"), [(12, 4), (13, 4), (7, 7), (1, 1), (5, 3)])
def test_every_sample_at_most_once_an_epoch(samples: int, batch: int, shuffle: bool, drop_last: bool) -> None:
    batches = Batches(samples, batch, seed=1, shuffle=shuffle, drop_last=drop_last)
    seen: list[int] = []
    for step in range(batches.steps):
        ids, weight = batches.ids(3, step)
        assert ids.shape == weight.shape == (batch,)
        assert set(weight.tolist()) <= {0.0, 1.0}
        assert 0 <= ids.min() <= ids.max() < samples
        seen += ids[weight == 1].tolist()
    assert len(set(seen)) == len(seen) == (samples // batch * batch if drop_last else samples)
    if not shuffle:
        assert seen == list(range(len(seen)))


def test_a_batch_larger_than_the_data_set_is_filled_with_repeats() -> None:
    ids, weight = Batches(samples=3, batch=8, seed=0, shuffle=False, drop_last=False).ids(0, 0)
    assert ids.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert weight.tolist() == [1, 1, 1, 0, 0, 0, 0, 0]


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(permutation(seed, epoch, 50).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_positions_are_uniform() -> None:
    """Where sample 0 of 8 lands over 4000 epochs: chi-squared of 7 degrees of freedom, far below the 1e-6 tail (42)."""
    places = [int(np.flatnonzero(permutation(0, epoch, 8) == 0)[0]) for epoch in range(4000)]
    counts = np.bincount(places, minlength=8)
    assert ((counts - 500) ** 2 / 500).sum() < 42


def test_asking_in_any_order_gives_the_same() -> None:
    batches = Batches(samples=40, batch=8, seed=6)
    forwards = {(e, s): batches.ids(e, s)[0].tolist() for e in range(4) for s in range(5)}
    again = Batches(samples=40, batch=8, seed=6)
    assert {key: again.ids(*key)[0].tolist() for key in reversed(forwards)} == forwards


@pytest.mark.parametrize(
    ("problem", "numbers"),
    [
        (lambda: Batches(samples=10, batch=11, seed=0), "batch = 11 .* 10 samples; give a smaller batch"),
        (lambda: Batches(samples=10, batch=0, seed=0), "batch = 0; give 1 or more"),
        (lambda: Batches(samples=10, batch=3, seed=0).ids(1, 3), "step 3 of epoch 1; an epoch has steps 0 to 2"),
        (lambda: Batches(samples=10, batch=3, seed=-1).ids(0, 0), r"seed = -1; give a whole number from 0"),
        (lambda: permutation(2**64, 0, 3), r"seed = 18446744073709551616"),
    ],
)
def test_what_cannot_be_asked(problem, numbers: str) -> None:
    with pytest.raises(HpctrainError, match=numbers):
        problem()
