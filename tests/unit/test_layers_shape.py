"""Flatten, reshape and slice against NumPy's, on random shapes and partitions."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from networks import node, random_partition
from ops import Bound, alone, assembled, run

from hpctrain.errors import PlanError
from hpctrain.layers import Flatten, Layer, Reshape, Slice
from hpctrain.layers.shape import groups
from hpctrain.partition import Partition, Shape, extent, volume
from hpctrain.planner.layout import layout
from hpctrain.planner.plan import extents

ROUNDS = 400
"""Random cases per test."""


def fitting(partition: Partition, layer: Layer, shape: Shape) -> Partition:
    """`partition` without the axes that cut nothing of the layer."""
    able = extents(node(layer, shape))
    return Partition.of({axis: n for axis, n in partition.parts().items() if axis in able})


def factors(rng: np.random.Generator, n: int, dims: int) -> Shape:
    """`dims` extents whose product is `n`, 1 among them at times."""
    found = [1] * dims
    for prime in (2, 3, 5, 7):
        while n % prime == 0:
            n //= prime
            found[rng.integers(dims)] *= prime
    assert n == 1
    return tuple(found)


# --- reshape ------------------------------------------------------------------------------------------------------


def test_dims_are_grouped_as_finely_as_products_allow() -> None:
    def both(x: Shape, y: Shape) -> list[tuple[Shape, Shape]]:
        return [(tuple(x[d] for d in ins), tuple(y[d] for d in outs)) for ins, outs in groups(x, y)]

    assert both((9, 5, 7, 3), (9, 35, 3)) == [((5, 7), (35,)), ((3,), (3,))]
    assert both((9, 35, 3), (9, 5, 7, 3)) == [((35,), (5, 7)), ((3,), (3,))]
    assert both((9, 5, 6, 7), (9, 5, 14, 3)) == [((5,), (5,)), ((6, 7), (14, 3))]
    assert both((9, 6, 4, 5), (9, 120)) == [((6, 4, 5), (120,))]
    assert both((9, 1, 5), (9, 5, 1)) == [((1, 5), (5,)), ((), (1,))]
    assert both((9, 5, 1), (9, 5)) == [((5,), (5,)), ((1,), ())]
    assert both((9, 1), (9,)) == [((1,), ())]


def test_reshape_on_random_partitions_equals_numpy(seed: int) -> None:
    """Of any shapes, cut anyhow: from its boxes alone, no rank reads or writes a number that is not in them."""
    rng, cut = np.random.default_rng(seed), 0
    for number in range(ROUNDS):
        n = int(rng.choice([1, 6, 24, 30, 36, 60, 72, 120]))
        shape = (int(rng.integers(1, 4)), *factors(rng, n, int(rng.integers(1, 5))))
        to = (shape[0], *factors(rng, n, int(rng.integers(1, 5))))
        layer: Layer = Flatten() if rng.random() < 0.2 else Reshape(to[1:])
        if isinstance(layer, Flatten):
            to = (shape[0], n)
        partition = fitting(random_partition(rng, 6), layer, shape)
        x, dy = rng.normal(size=shape), rng.normal(size=to)
        y, (dx,) = assembled(layout(node(layer, shape), partition), [x], dy)
        told = f"case {number}: {shape} to {to} on {partition}"
        np.testing.assert_array_equal(y, x.reshape(to), err_msg=told)
        np.testing.assert_array_equal(dx, dy.reshape(shape), err_msg=told)
        cut += partition.size > 1
    print(f"seed {seed}, {ROUNDS} cases, {cut} of them cut")
    assert cut > ROUNDS // 2


def test_dims_that_stay_are_fetched_as_they_are_cut() -> None:
    """Positions joined into one: a rank that holds all positions and some channels needs these channels alone."""
    place = layout(node(Reshape((35, 6)), (3, 5, 7, 6)), Partition(channel=3))
    for rank in range(3):
        assert place.inputs[0].box(rank) == (slice(0, 3), slice(0, 5), slice(0, 7), slice(2 * rank, 2 * rank + 2))
    # 35 positions in blocks of 18 and 17: rows 0 to 2, of which 4 in the third, and rows 2 to 4
    place = layout(node(Reshape((35, 6)), (3, 5, 7, 6)), Partition(width=2))
    assert [place.inputs[0].box(rank)[1:3] for rank in range(2)] == [
        (slice(0, 3), slice(0, 7)),
        (slice(2, 5), slice(0, 7)),
    ]
    # and the same backwards: 2 rows of 7 are 14 positions
    place = layout(node(Reshape((5, 7, 6)), (3, 35, 6)), Partition(height=3))
    assert [place.inputs[0].box(rank)[1] for rank in range(3)] == [slice(0, 14), slice(14, 28), slice(28, 35)]


def test_reshape_reads_and_writes_blocks_with_gaps(seed: int) -> None:
    """An input's block may be the interior of a larger array."""
    rng, shape = np.random.default_rng(seed), (3, 5, 4, 3)
    around, into = rng.normal(size=(2, 5, 9, 6, 8))
    inside = np.s_[1:4, 2:7, 1:5, 2:5]
    x, dx, dy = around[inside], into[inside], rng.normal(size=(3, 20, 3))
    assert not x.flags.c_contiguous
    before, bound = into.copy(), Bound(alone(Reshape((20, 3)), shape), 0, {})
    np.testing.assert_array_equal(bound.compute([x]), x.reshape(3, 20, 3))
    bound.op.backward(dy, {}, [dx], {})
    before[inside] = dy.reshape(shape)
    np.testing.assert_array_equal(into, before)


def test_reshape_holds_no_table_of_elements() -> None:
    bound = Bound(layout(node(Reshape((6, 4, 30)), (2, 24, 5, 6)), Partition(width=2)), 1, {})
    assert not [v for v in vars(bound.op).values() if isinstance(v, np.ndarray)]


def test_unstated_extent_is_what_is_left() -> None:
    assert Reshape((-1, 6)).output_shape((3, 5, 7, 6)) == (3, 35, 6)
    assert Reshape((5, -1)).output_shape((3, 30)) == (3, 5, 6)
    assert Reshape((30, -1)).output_shape((3, 30)) == (3, 30, 1)
    assert Reshape((-1,)).output_shape((3, 5, 7)) == Flatten().output_shape((3, 5, 7)) == (3, 35)
    assert Reshape(()).output_shape((3, 1)) == (3,)


# --- slice --------------------------------------------------------------------------------------------------------


def test_slice_on_random_partitions_equals_numpy(seed: int) -> None:
    rng, tried, cut = np.random.default_rng(seed), 0, 0
    while tried < ROUNDS:
        shape = tuple(rng.integers(1, 9, rng.integers(2, 6)).tolist())
        dim = int(rng.integers(1, len(shape)))
        n = shape[dim]
        start, stop = (None if rng.random() < 0.2 else int(rng.integers(-n, n + 1)) for _ in range(2))
        step = int(rng.choice([1, 2, 3, 5, -1, -2, -3]))
        if not range(n)[start:stop:step]:
            continue
        layer = Slice(dim - len(shape) if rng.random() < 0.3 else dim, start, stop, step)
        partition = fitting(random_partition(rng, 6), layer, shape)
        x, kept = rng.normal(size=shape), (slice(None),) * dim + (slice(start, stop, step),)
        dy, expected = rng.normal(size=x[kept].shape), np.zeros(shape)
        expected[kept] = dy
        y, (dx,) = assembled(layout(node(layer, shape), partition), [x], dy)
        told = f"case {tried}: {layer} of {shape} on {partition}"
        np.testing.assert_array_equal(y, x[kept], err_msg=told)
        np.testing.assert_array_equal(dx, expected, err_msg=told)
        tried, cut = tried + 1, cut + (partition.size > 1)
    print(f"seed {seed}, {tried} cases, {cut} of them cut")
    assert cut > ROUNDS // 2


def test_slices_and_concatenation_are_each_other_undone(seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(3, 5, 4, 7))
    parts = [run(Slice(-1, start, stop), x) for start, stop in ((None, 2), (2, -1), (-1, None))]
    np.testing.assert_array_equal(np.concatenate(parts, axis=-1), x)


def test_slice_fetches_from_the_first_to_the_last_it_picks() -> None:
    """Rows 1, 4, 7, 10 of 12, two to a rank."""
    place = layout(node(Slice(1, 1, None, 3), (2, 12, 3)), Partition(width=2))
    assert [place.inputs[0].box(rank)[1] for rank in range(2)] == [slice(1, 5), slice(7, 11)]
    # more ranks than rows: the last wants nothing
    place = layout(node(Slice(1, 1, None, 3), (2, 12, 3)), Partition(width=5))
    assert [volume(place.inputs[0].box(rank)) for rank in range(5)] == [6, 6, 6, 6, 0]


# --- what does not fit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (Reshape((3, 5)), (2, 4, 4), r"shape = \(3, 5\) holds 15 numbers, a sample of \(2, 4, 4\) has 16; .* is 16"),
        (Reshape((3, -1)), (2, 4, 4), r"\(3, -1\) holds 3 numbers or a multiple, a sample of \(2, 4, 4\) has 16"),
        (Reshape((-1, -1)), (2, 4, 4), r"shape = \(-1, -1\); give extents of 1 or more, at most one of them -1"),
        (Reshape((0, 16)), (2, 4, 4), r"shape = \(0, 16\); give extents of 1 or more"),
        (Reshape((-2, 16)), (2, 4, 4), r"shape = \(-2, 16\)"),
        (Reshape((2, 2, 2, 2, 1)), (2, 4, 4), r"6 dims has no axes; at most \(N, D, H, W, C\)"),
        (Slice(1, 3, 3), (2, 5, 3), r"3:3:1 takes nothing of dim 1 of 5; give a stop beyond the start"),
        (Slice(1, 1, 3, -1), (2, 5, 3), r"1:3:-1 takes nothing of dim 1 of 5"),
        (Slice(1, 0, 6), (2, 5, 3), r"stop = 6 lies outside dim 1 of 5; give -5 to 5"),
        (Slice(2, -4, None), (2, 5, 3), r"start = -4 lies outside dim 2 of 3; give -3 to 3"),
        (Slice(1, 0, 3, 0), (2, 5, 3), r"step = 0; give 1 or more"),
        (Slice(0, 0, 1), (2, 5, 3), r"slice: dim = 0 is the batch"),
        (Slice(-3, 0, 1), (2, 5, 3), r"slice: dim = -3 is the batch"),
        (Slice(3, 0, 1), (2, 5, 3), r"dim = 3, but \(2, 5, 3\) has 3 dims; give 1 to 2, or -1 for channels"),
    ],
    ids=str,
)
def test_what_does_not_fit_names_numbers_and_remedy(layer: Layer, shape: Shape, message: str) -> None:
    with pytest.raises(PlanError, match=rf"layer layer \(input .*\): .*{message}"):
        node(layer, shape)


def test_ranks_without_work_want_nothing() -> None:
    """More blocks than numbers, and ranks beyond the partition."""
    for layer, shape in ((Flatten(), (2, 1, 2, 1)), (Reshape((2, 1)), (2, 1, 2, 1)), (Slice(2, 1, None), (2, 3, 2, 1))):
        axis = "height" if isinstance(layer, Flatten | Slice) else "width"
        place = layout(node(layer, shape), Partition.of({axis: 5}))
        wanted = [prod(extent(place.inputs[0].box(rank))) for rank in range(7)]
        work = [prod(extent(place.work.box(rank))) for rank in range(7)]
        assert [bool(n) for n in wanted] == [bool(n) for n in work]
        assert wanted[5:] == [0, 0]
