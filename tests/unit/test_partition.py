"""Intervals, boxes and process-grid coordinates, against brute force over elements and ranks."""

from __future__ import annotations

from functools import partial
from itertools import pairwise, product
from math import prod

import numpy as np
import pytest
from networks import partitions, random_partition

from hpctrain.errors import PlanError
from hpctrain.partition import (
    AXES,
    Box,
    Interval,
    Partition,
    contains,
    empty,
    extent,
    names,
    near_square,
    overlap,
    split,
    volume,
    whole,
    within,
)
from hpctrain.regions import Along, Cut, Distribution, Region, Wanted, received, sent, wanted

ROUNDS = 300
"""Random cases for each test."""


def elements(box: Box) -> set[tuple[int, ...]]:
    """The index of every element of `box`."""
    return set(product(*(range(s.start, s.stop) for s in box)))


def random_box(rng: np.random.Generator, dims: int, low: int = -3, high: int = 12) -> Box:
    """Any box, a few inverted or empty."""
    ends = rng.integers(low, high, (dims, 2)).tolist()
    return tuple(slice(*(pair if rng.random() < 0.1 else sorted(pair))) for pair in ends)


def random_distribution(rng: np.random.Generator, ranks: int = 12) -> Distribution:
    """A tensor of up to 4 dims cut over up to `ranks` ranks; some cut axes may be left to replicate it."""
    partition = random_partition(rng, ranks)
    dims = int(rng.integers(1, 5))
    axes: list[tuple[str, ...]] = [()] * dims
    for axis in rng.permutation(AXES).tolist():
        if rng.random() < 0.8:
            d = int(rng.integers(dims))
            axes[d] = (*axes[d], axis)
    shape = tuple(rng.integers(0, 11, dims).tolist())
    return Distribution(shape, tuple(a or None if len(a) != 1 else a[0] for a in axes), partition)


# --- intervals and boxes ------------------------------------------------------------------------------------------


def test_split_gives_balanced_consecutive_blocks_as_numpy_does() -> None:
    for n, parts in product(range(30), range(1, 12)):
        blocks = [split(n, parts, i) for i in range(parts)]
        assert [list(range(*block)) for block in blocks] == [
            part.tolist() for part in np.array_split(np.arange(n), parts)
        ]
        assert blocks[0][0] == 0
        assert blocks[-1][1] == n
        assert all(a[1] == b[0] for a, b in pairwise(blocks))
    assert [split(7, 3, i) for i in range(3)] == [(0, 3), (3, 5), (5, 7)]
    assert [split(2, 3, i) for i in range(3)] == [(0, 1), (1, 2), (2, 2)]


def test_near_square_is_the_pair_of_factors_that_lie_closest() -> None:
    for n in range(1, 130):
        pairs = [(rows, columns) for rows in range(1, n + 1) for columns in range(rows, n + 1) if rows * columns == n]
        assert near_square(n) == min(pairs, key=lambda pair: pair[1] - pair[0])


def test_boxes_are_sets_of_elements(seed: int) -> None:
    rng = np.random.default_rng(seed)
    met = 0
    for _ in range(ROUNDS):
        dims = int(rng.integers(1, 4))
        a, b = random_box(rng, dims), random_box(rng, dims)
        common = overlap(a, b)
        assert volume(a) == prod(extent(a)) == len(elements(a))
        assert (set() if common is None else elements(common)) == elements(a) & elements(b)
        assert contains(a, b) == (elements(b) <= elements(a))
        moved = within(a, b)
        assert extent(moved) == extent(a)
        assert elements(moved) == {tuple(i - s.start for i, s in zip(at, b, strict=True)) for at in elements(a)}
        met += common is not None
    print(f"{ROUNDS} cases, {met} meet")
    assert met > ROUNDS // 20


def test_whole_and_empty_boxes() -> None:
    assert volume(whole((3, 5, 7))) == 105
    assert extent(whole((3, 5))) == (3, 5)
    assert extent(empty(3)) == (0, 0, 0)
    assert contains(empty(2), (slice(4, 4), slice(0, 9)))
    assert extent((slice(5, 2),)) == (0,)


# --- partitions ---------------------------------------------------------------------------------------------------


def test_coordinates_are_row_major() -> None:
    for partition in partitions(dict.fromkeys(AXES, 12), range(1, 13), most_axes=3):
        coords = [partition.coords(rank) for rank in range(partition.size)]
        assert coords == list(
            zip(*(i.tolist() for i in np.unravel_index(range(partition.size), partition.shape)), strict=True)
        )
        assert coords == sorted(product(*map(range, partition.shape)))
        strides = partition.strides()
        for rank, c in enumerate(coords):
            assert sum(i * strides[axis] for i, axis in zip(c, AXES, strict=True)) == rank


def test_index_and_offsets_along_several_axes() -> None:
    partition = Partition(batch=2, height=3, channel=2)
    for axes in [(), ("height",), ("channel", "batch"), ("batch", "width", "height"), AXES]:
        shape = tuple(partition[axis] for axis in axes)
        for rank in range(12):
            mine = dict(zip(AXES, partition.coords(rank), strict=True))
            at = tuple(mine[axis] for axis in axes)
            assert partition.index(axes, rank) == (int(np.ravel_multi_index(at, shape)) if axes else 0)
        # rank = its coordinates along these axes + what is left along the others
        others = tuple(axis for axis in AXES if axis not in axes)
        ranks = sorted(a + b for a in partition.offsets(axes) for b in partition.offsets(others))
        assert ranks == list(range(12))


def test_sizes_and_text_of_a_partition() -> None:
    partition = Partition(batch=2, depth=3, contraction=5)
    assert (partition.size, partition.pc, partition.pr) == (30, 2, 15)
    assert partition.parts() == {"batch": 2, "depth": 3, "contraction": 5}
    assert Partition.of(partition.parts()) == partition
    assert str(partition) == "batch=2 x depth=3 x contraction=5"
    assert str(Partition()) == "1 rank"
    assert [partition[axis] for axis in AXES] == [2, 3, 1, 1, 1, 5]


@pytest.mark.parametrize("parts", [0, -1, 2.0, "2", None])
def test_blocks_that_are_no_whole_number_are_refused(parts: object) -> None:
    with pytest.raises(PlanError, match=f"height = {parts!r}; give a whole number of blocks, 1 or more"):
        Partition.of({"height": parts})  # type: ignore[dict-item]


def test_unknown_axis_is_refused() -> None:
    with pytest.raises(
        PlanError, match="no axis 'heigth'; the axes are batch, depth, height, width, channel, contraction"
    ):
        Partition.of({"heigth": 2})


# --- distributions ------------------------------------------------------------------------------------------------


def test_owned_boxes_are_disjoint_and_cover_the_tensor_once_for_each_replica(seed: int) -> None:
    rng = np.random.default_rng(seed)
    replicated = 0
    for _ in range(ROUNDS):
        dist = random_distribution(rng)
        count, firsts = np.zeros(dist.shape, int), np.zeros(dist.shape, int)
        for rank, box in enumerate(dist.boxes):
            count[box] += 1
            firsts[box] += dist.is_first_replica(rank)
        copies = prod(dist.partition[axis] for axis in dist.replicated_axes)
        assert (count == copies).all(), dist
        assert (firsts == 1).all(), dist
        replicated += copies > 1
    print(f"{ROUNDS} cases, {replicated} of them replicated")
    assert 20 < replicated < ROUNDS - 20


def test_replicas_hold_the_same_box_and_differ_only_along_replicated_axes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(ROUNDS):
        dist = random_distribution(rng)
        partition = dist.partition
        for rank in range(partition.size):
            mine = partition.coords(rank)
            others = [i for i, axis in enumerate(AXES) if axis not in dist.replicated_axes]
            for other in range(partition.size):
                if all(partition.coords(other)[i] == mine[i] for i in others):
                    assert dist.box(other) == dist.box(rank)
        named = {axis for entry in dist.axes for axis in names(entry)}
        assert set(dist.replicated_axes) == set(partition.parts()) - named


def test_ranks_beyond_the_partition_own_nothing() -> None:
    dist = Distribution((7, 5), ("batch", "channel"), Partition(batch=2, channel=2))
    assert len(dist.boxes) == 4
    assert dist.box(4) == dist.box(99) == empty(2)
    assert not dist.is_first_replica(4)


def test_a_tuple_of_axes_cuts_coarse_blocks_finer() -> None:
    dist = Distribution((11,), (("channel", "contraction"),), Partition(channel=2, contraction=3))
    assert [(s.start, s.stop) for (s,) in dist.boxes] == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10), (10, 11)]
    coarse = Distribution((11,), ("channel",), Partition(channel=2, contraction=3))
    assert all(contains(coarse.box(rank), dist.box(rank)) for rank in range(6))


def test_a_block_without_samples_keeps_its_other_dims() -> None:
    """A rank with nothing to do still holds its share of parameters, and sums over ranks need arrays of one shape."""
    dist = Distribution((2, 5), ("batch", "channel"), Partition(batch=3, channel=2))
    assert [extent(box) for box in dist.boxes] == [(1, 3), (1, 2), (1, 3), (1, 2), (0, 3), (0, 2)]


def test_distribution_with_axes_for_other_dims_is_refused() -> None:
    with pytest.raises(PlanError, match=r"2 dims \(3, 5\), but axes for 1"):
        Distribution((3, 5), ("batch",), Partition())


# --- regions ------------------------------------------------------------------------------------------------------


def random_wanted(rng: np.random.Generator) -> Wanted:
    """What the blocks of a random work reach for: halos, holes, whole dims, boxes outside the array, masks."""
    work = random_distribution(rng)
    shape = tuple(rng.integers(1, 11, rng.integers(1, 4)).tolist())
    dims: list[Along | None] = []
    for _ in shape:
        before, after, stride = rng.integers(-2, 4, 3).tolist()
        dim = int(rng.integers(len(work.shape)))
        dims.append(None if rng.random() < 0.3 else Along(dim, partial(halo, before, after, abs(stride) + 1)))
    return wanted(work, tuple(dims), shape)


def halo(before: int, after: int, stride: int, start: int, stop: int) -> Interval:
    """An interval of the input for one of the output."""
    return start * stride - before, stop * stride + after


def test_meeting_and_shares_equal_a_scan_of_all_boxes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    met = 0
    for _ in range(ROUNDS):
        region: Region = random_wanted(rng) if rng.random() < 0.7 else random_distribution(rng)
        for _ in range(4):
            box = random_box(rng, len(region.cuts))
            expected = [r for r, other in enumerate(region.boxes) if elements(other) & elements(box)]
            assert region.meeting(box) == expected, f"{region}, {box}"
            for r, other in enumerate(region.boxes):
                shares = region.shares(r, box)
                assert all(share.source == share.target and not share.moved for share in shares)
                common = [elements(other) & elements(box)] if r in expected else []
                assert [elements(share.source) for share in shares] == common
            met += len(expected)
    print(f"{ROUNDS} regions, {met} boxes met")
    assert met > ROUNDS


def test_wanted_boxes_follow_the_work_and_are_empty_without_work() -> None:
    work = Distribution((3, 5, 4), ("batch", "height", "channel"), Partition(batch=4, height=2, channel=2))
    region = wanted(work, (Along(0), Along(1, lambda a, b: (2 * a - 1, 2 * b + 1)), None), (3, 9, 6))
    for rank in range(16):
        n, h, _ = box = work.box(rank)
        if volume(box):
            assert region.box(rank) == (n, slice(2 * h.start - 1, 2 * h.stop + 1), slice(0, 6))
        else:
            assert volume(region.box(rank)) == 0
    assert volume(work.box(15)) == 0


def test_what_is_sent_and_received_counts_all_pairs_of_boxes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    moved = 0
    for _ in range(ROUNDS):
        have, want = random_distribution(rng), random_distribution(rng)
        want = Distribution(have.shape, have.axes, want.partition)
        for rank in range(have.partition.size):
            others = [r for r in range(max(have.partition.size, want.partition.size)) if r != rank]
            out = [elements(have.box(rank)) & elements(want.box(r)) for r in others]
            into = [elements(have.box(r)) & elements(want.box(rank)) for r in others]
            assert sent(have, want, rank) == sum(map(len, out))
            assert received(have, want, rank) == sum(map(len, into))
            moved += sum(map(len, out))
    assert moved > ROUNDS


def test_tensors_cut_alike_share_their_intervals() -> None:
    """A network has hundreds of them, a job thousands of ranks."""
    partition = Partition(batch=4096, channel=2)
    one = Distribution((8192, 7, 6), ("batch", None, "channel"), partition)
    other = Distribution((8192, 9, 6), ("batch", None, "channel"), partition)
    read = wanted(one, (Along(0), Along(1), Along(2)), one.shape)
    assert one.cuts[0] is other.cuts[0] is read.cuts[0]
    assert one.cuts[2] is other.cuts[2] is read.cuts[2]
    assert read.cuts[0].meeting(11, 14) == {5, 6}


def test_cut_knows_where_it_is_occupied() -> None:
    cut = Cut(("batch",), ((0, 2), (2, 2), (-1, 5), (7, 9)))
    assert cut.occupied == {0, 2, 3}
    assert cut.meeting(1, 2) == {0, 2}
    assert cut.meeting(5, 7) == set()
    assert cut.meeting(4, 8) == {2, 3}


def test_names_of_axes() -> None:
    assert [names(None), names("batch"), names(("channel", "batch"))] == [(), ("batch",), ("channel", "batch")]
