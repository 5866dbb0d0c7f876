"""Random numbers: the same on any partition, distributed as stated, and different for every seed and purpose."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import numpy as np
import pytest
import xxhash
from scipy import stats

from hpctrain import randomness
from hpctrain.errors import ConfigError
from hpctrain.partition import Box, Partition, Shape, extent, whole
from hpctrain.randomness import normal, random_words, uniform, words
from hpctrain.regions import Distribution

SAMPLES = (211, 100, 10)
"""A shape of 211,000 numbers."""


def random_box(rng: np.random.Generator, shape: Shape) -> Box:
    """Any box inside `shape`; whole dims and empty ones are common."""
    ends = [sorted(rng.integers(0, n + 1, 2).tolist()) for n in shape]
    return tuple(slice(0, n) if rng.random() < 0.3 else slice(*pair) for n, pair in zip(shape, ends, strict=True))


@pytest.mark.parametrize("draw", [words, uniform, normal])
def test_block_drawn_alone_is_the_block_of_the_whole(draw: object, seed: int) -> None:
    assert callable(draw)
    rng, rounds, full = np.random.default_rng(seed), 200, 0
    for _ in range(rounds):
        shape = tuple(rng.integers(1, 9, rng.integers(0, 6)).tolist())
        everything = draw(seed, "conv1.weight", shape, whole(shape))
        box = random_box(rng, shape)
        np.testing.assert_array_equal(draw(seed, "conv1.weight", shape, box), everything[box], strict=True)
        full += prod(extent(box)) > 0
    print(f"{rounds} boxes, {full} not empty")
    assert full > rounds // 4


def test_streams_for_rows_or_for_more_give_the_same_words(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a stream begins depends on what is faster: for each run of a box, or with gaps for several."""
    rng, streams, rounds = np.random.default_rng(seed), set(), 200
    whole_stream = randomness.random_words
    for _ in range(rounds):
        shape = tuple(rng.integers(1, 9, rng.integers(1, 6)).tolist())
        box, begun = random_box(rng, shape), []
        expected = words(seed, "conv1.weight", shape, whole(shape))[box]
        monkeypatch.setattr(randomness, "random_words", lambda *of, n=begun: n.append(of[3]) or whole_stream(*of))
        monkeypatch.setattr(randomness, "NEW_STREAM", int(rng.choice([0, 3, 50, 10**6])))
        longest = int(rng.choice([1, 30, 10**6]))
        monkeypatch.setattr(randomness, "LONGEST_STREAM", longest)
        np.testing.assert_array_equal(words(seed, "conv1.weight", shape, box), expected, strict=True)
        assert max(begun, default=0) <= max(longest, shape[-1]), "one row at least"
        monkeypatch.undo()
        streams.add(len(begun))
    print(f"{rounds} boxes, {sorted(streams)} streams")
    assert len(streams) > 20


def test_blocks_of_a_distribution_make_up_the_tensor() -> None:
    dist = Distribution((3, 3, 7, 5), (None, None, "contraction", "channel"), Partition(channel=2, contraction=3))
    found = np.full(dist.shape, np.nan)
    for box in dist.boxes:
        found[box] = normal(7, "conv.weight", dist.shape, box)
    np.testing.assert_array_equal(found, normal(7, "conv.weight", dist.shape, whole(dist.shape)))


def test_words_are_those_of_philox() -> None:
    """Philox4x64-10 with key (seed, xxh3 of the name), on counters whose last word says what the numbers are for."""
    key = np.array([2**63 + 5, xxhash.xxh3_64_intdigest(b"fc.bias")], np.uint64)
    counter = np.frombuffer(bytes(24) + b"tensor\0\0", "<u8")
    expected = np.random.Philox(key=key, counter=counter).random_raw(105).reshape(3, 5, 7)
    np.testing.assert_array_equal(words(2**63 + 5, "fc.bias", (3, 5, 7), whole((3, 5, 7))), expected, strict=True)


def test_words_from_the_middle_of_a_stream() -> None:
    everything = random_words("test", 7, 3, 50)
    for start in range(12):
        np.testing.assert_array_equal(random_words("test", 7, 3, 20, start), everything[start : start + 20])


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_beyond_64_bits_is_refused(seed: int) -> None:
    with pytest.raises(ConfigError, match=rf"seed = {seed}; give a whole number from 0 to 2\*\*64 - 1"):
        words(seed, "fc.bias", (3,), whole((3,)))


def test_uniform_has_53_bits_below_1() -> None:
    shape = (1001,)
    drawn, raw = uniform(1, "a", shape, whole(shape)), words(1, "a", shape, whole(shape))
    assert drawn.dtype == np.float64
    np.testing.assert_array_equal((drawn * 2**53).astype(np.uint64), raw >> np.uint64(11))


@pytest.mark.parametrize("word", [0, 2**64 - 1, 2**32 - 1, 2**32, 2**64 - 2**32, 2**31, 2**63])
def test_no_word_gives_what_is_not_finite(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(randomness, "words", lambda *of: np.array([word], np.uint64))
    assert 0 <= uniform(0, "", (1,), whole((1,)))[0] < 1
    drawn = normal(0, "", (1,), whole((1,)))[0]
    assert abs(drawn) <= np.sqrt(64 * np.log(2))  # radius sqrt(-2 log 2**-32)


# For the two tests below: with n = 211,000 numbers a mean, variance or count has the standard deviation given; five of
# them are exceeded once in 1.7 million. The seed is fixed unless --seed says otherwise.


def test_uniform_moments_and_distribution(seed: int) -> None:
    u = uniform(seed, "weight", SAMPLES, whole(SAMPLES)).ravel()
    n = u.size
    assert 0 <= u.min() < u.max() < 1
    assert abs(u.mean() - 1 / 2) < 5 * np.sqrt(1 / 12 / n)
    assert abs(u.var() - 1 / 12) < 5 * np.sqrt(1 / 180 / n)  # variance of (u - 1/2)**2 is 1/80 - 1/144 = 1/180
    assert stats.kstest(u, "uniform").pvalue > 1e-6
    counts = np.histogram(u, bins=64, range=(0, 1))[0]
    assert stats.chisquare(counts).pvalue > 1e-6


def test_normal_moments_and_distribution(seed: int) -> None:
    z = normal(seed, "weight", SAMPLES, whole(SAMPLES)).ravel()
    n = z.size
    # E z**2k = 1, 3, 15, 105: the variance of z**k is E z**2k - (E z**k)**2
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - moment) < 5 * np.sqrt(variance / n), power
    assert stats.kstest(z, "norm").pvalue > 1e-6
    assert np.abs(z).max() > 4  # two in 32,000 are beyond


def test_neighbours_are_independent(seed: int) -> None:
    """The correlation of n independent pairs has the standard deviation 1 / sqrt(n)."""
    z = normal(seed, "weight", SAMPLES, whole(SAMPLES))
    for axis in range(3):
        a, b = np.moveaxis(z, axis, 0)[:-1].ravel(), np.moveaxis(z, axis, 0)[1:].ravel()
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(a.size)
    for lag in (1, 2, 3, 4, 8):  # four words come from one counter
        flat = z.ravel()
        assert abs(np.corrcoef(flat[:-lag], flat[lag:])[0, 1]) < 5 / np.sqrt(flat.size - lag)


def test_seeds_and_purposes_do_not_share_numbers(seed: int) -> None:
    shape = (1009,)
    drawn = [
        words(seed + i, purpose, shape, whole(shape))
        for i in range(3)
        for purpose in ("conv1.weight", "conv1.bias", "conv2.weight", "")
    ]
    assert len(np.unique(np.concatenate(drawn))) == 12 * 1009
    for a, b in pairwise(drawn):
        correlation = np.corrcoef(a.astype(float), b.astype(float))[0, 1]
        assert abs(correlation) < 5 / np.sqrt(1009)
