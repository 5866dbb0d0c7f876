"""Adaptive pooling and upsampling against windows and interpolation one by one, on random shapes and partitions."""

from __future__ import annotations

from math import ceil, floor, prod

import numpy as np
import pytest
from networks import node, random_partition
from ops import Bound, alone, assembled, run

from hpctrain.errors import PlanError
from hpctrain.layers import AdaptiveAvgPool, GlobalAvgPool, Layer, Upsample
from hpctrain.layers.resample import ResampleOp
from hpctrain.partition import Partition, Shape
from hpctrain.planner.layout import layout
from hpctrain.planner.plan import extents

ROUNDS = 60
"""Random cases per test."""


def random_shape(rng: np.random.Generator) -> Shape:
    """Of 1 to 3 position dims."""
    return tuple(rng.integers(1, 8, rng.integers(3, 6)).tolist())


def check_blocks(rng: np.random.Generator, layer: Layer, x: np.ndarray, expected: np.ndarray, told: str) -> bool:
    """Blocks on a random partition make up the whole, and are its adjoint backwards; whether anything was cut."""
    found = random_partition(rng, 6).parts()
    place = node(layer, x.shape)
    partition = Partition.of({axis: n for axis, n in found.items() if axis in extents(place)})
    dy = rng.normal(size=expected.shape)
    y, (dx,) = assembled(layout(place, partition), [x], dy)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-13, err_msg=f"{told} on {partition}")
    # <y, dy> = <x, dx> for a linear map and its adjoint: sums of up to 1e4 products of order 1
    np.testing.assert_allclose((x * dx).sum(), (y * dy).sum(), rtol=1e-10, atol=1e-10, err_msg=f"{told} on {partition}")
    return partition.size > 1


# --- adaptive pooling ---------------------------------------------------------------------------------------------


def adaptive(x: np.ndarray, size: Shape) -> np.ndarray:
    """The mean of each window, by the rule as it is written in PyTorch's sources."""
    y = np.empty((x.shape[0], *size, x.shape[-1]))
    for at in np.ndindex(size):
        window = tuple(
            slice(floor(i * n / m), ceil((i + 1) * n / m)) for i, n, m in zip(at, x.shape[1:-1], size, strict=True)
        )
        y[(slice(None), *at)] = x[(slice(None), *window)].mean(axis=tuple(range(1, x.ndim - 1)))
    return y


def test_adaptive_pooling_equals_windows_one_by_one(seed: int) -> None:
    rng, cut = np.random.default_rng(seed), 0
    for number in range(ROUNDS):
        x = rng.normal(size=random_shape(rng))
        size = tuple(rng.integers(1, 9, x.ndim - 2).tolist())
        layer = AdaptiveAvgPool(size)
        cut += check_blocks(rng, layer, x, adaptive(x, size), f"case {number}: {layer} of {x.shape}")
    print(f"seed {seed}, {ROUNDS} cases, {cut} of them cut")
    assert cut > ROUNDS // 3


def test_adaptive_pooling_to_one_and_to_the_same(seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(2, 5, 7, 3))
    np.testing.assert_allclose(run(AdaptiveAvgPool(1), x)[:, 0, 0], run(GlobalAvgPool(), x), rtol=1e-13, atol=1e-15)
    np.testing.assert_array_equal(run(AdaptiveAvgPool((5, 7)), x), x)


def test_nan_stays_within_its_windows() -> None:
    """7 to 3 are windows of 3, 3, 3 that overlap; 7 to 4 of 2, 3, 3, 2: the shorter are padded with weight 0."""
    for size in (3, 4):
        x = np.ones((1, 7, 1))
        for at in range(7):
            x[...] = 1
            x[0, at] = np.nan
            np.testing.assert_array_equal(run(AdaptiveAvgPool(size), x), adaptive(x, (size,)))


# --- upsampling ---------------------------------------------------------------------------------------------------


def upsampled(x: np.ndarray, layer: Upsample, scale: Shape) -> np.ndarray:
    """One dim after another, by np.repeat and np.interp."""
    for dim, s in enumerate(scale, start=1):
        n = x.shape[dim]
        if layer.mode == "nearest":
            x = np.repeat(x, s, axis=dim)
            continue
        at = np.linspace(0, n - 1, n * s) if layer.align_corners else (np.arange(n * s) + 0.5) / s - 0.5
        x = np.apply_along_axis(lambda line, at=at, n=n: np.interp(at, np.arange(n), line), dim, x)
    return x


@pytest.mark.parametrize(("mode", "corners"), [("nearest", False), ("linear", False), ("linear", True)])
def test_upsampling_equals_interpolation_by_numpy(mode: str, corners: bool, seed: int) -> None:
    rng, cut = np.random.default_rng(seed), 0
    for number in range(ROUNDS):
        shape = random_shape(rng)
        x = rng.normal(size=tuple(min(n, 5) for n in shape))
        scale = tuple(rng.integers(1, 5 if x.ndim < 5 else 3, x.ndim - 2).tolist())
        layer = Upsample(scale, mode, corners)
        cut += check_blocks(rng, layer, x, upsampled(x, layer, scale), f"case {number}: {layer} of {x.shape}")
    print(f"seed {seed}, {ROUNDS} cases, {cut} of them cut")
    assert cut > ROUNDS // 3


def test_upsampling_by_default_doubles_and_repeats() -> None:
    x = np.array([[1.0, 2], [3, 4]]).reshape(1, 2, 2, 1)
    expected = [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]
    np.testing.assert_array_equal(run(Upsample(), x)[0, :, :, 0], expected)
    # the example of torch.nn.Upsample's documentation, bilinear with and without aligned corners
    expected = [[1, 1.25, 1.75, 2], [1.5, 1.75, 2.25, 2.5], [2.5, 2.75, 3.25, 3.5], [3, 3.25, 3.75, 4]]
    np.testing.assert_array_equal(run(Upsample(2, "linear"), x)[0, :, :, 0], expected)
    corners = run(Upsample(2, "linear", align_corners=True), x)[0, :, :, 0]
    np.testing.assert_allclose(corners[0], [1, 4 / 3, 5 / 3, 2], rtol=1e-15)
    np.testing.assert_allclose(corners[:, 0], [1, 5 / 3, 7 / 3, 3], rtol=1e-15)


def test_linear_upsampling_reads_one_row_beyond_its_block_at_most() -> None:
    """8 rows of 2 ranks become 16: each needs its own 4, and one of the neighbour's. With 3 for 1 too."""
    for scale in (2, 3):
        place = layout(node(Upsample((scale, 1), "linear"), (1, 8, 5, 2)), Partition(height=2))
        assert [place.inputs[0].box(rank)[1] for rank in range(2)] == [slice(0, 5), slice(3, 8)]
    place = layout(node(Upsample((2, 1)), (1, 8, 5, 2)), Partition(height=2))
    assert [place.inputs[0].box(rank)[1] for rank in range(2)] == [slice(0, 4), slice(4, 8)]


# --- cost and errors ----------------------------------------------------------------------------------------------


def test_arrays_between_dims_are_as_small_as_can_be() -> None:
    """Dims that shrink most come first; one that stays as it is costs nothing."""
    shape = (2, 9, 8, 20, 3)
    op = layout_op(AdaptiveAvgPool((9, 4, 2)), shape)
    assert [step.dim for step in op.steps] == [3, 2]
    assert [a.shape for a in op.between] == [(2, 9, 8, 2, 3)]
    op = layout_op(Upsample((4, 1, 2)), shape)
    assert [step.dim for step in op.steps] == [3, 1]
    assert [a.shape for a in op.between] == [(2, 9, 8, 40, 3)]


def layout_op(layer: Layer, shape: Shape) -> ResampleOp:
    """The op on one rank."""
    op = Bound(alone(layer, shape), 0, {}).op
    assert isinstance(op, ResampleOp)
    return op


def test_flops_count_two_for_every_tap() -> None:
    shape = (2, 8, 6, 3)
    assert AdaptiveAvgPool((2, 3)).flops(shape) == 2 * (2 * 2 * 6 * 3) * 4 + 2 * (2 * 2 * 3 * 3) * 2
    assert AdaptiveAvgPool((8, 6)).flops(shape) == 0
    assert Upsample(2).flops(shape) == 2 * 2 * 3 * (16 * 6 + 16 * 12)
    assert AdaptiveAvgPool(1).flops(shape) >= 2 * prod(shape)


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (AdaptiveAvgPool(0), (2, 5, 5, 1), r"size = 0; give 1 or more"),
        (AdaptiveAvgPool((3, 3)), (2, 5, 5, 5, 1), r"size = \(3, 3\) has 2 numbers, but the input has 3"),
        (AdaptiveAvgPool(2), (2, 5), r"adaptive pooling: the input \(2, 5\) has no positions; give \(N, W, C\)"),
        (Upsample(0), (2, 5, 5, 1), r"scale = 0; give whole numbers, 1 or more"),
        (Upsample((2, 2, 2)), (2, 5, 5, 1), r"scale = \(2, 2, 2\) has 3 numbers, but the input has 2"),
        (Upsample(2, "cubic"), (2, 5, 5, 1), r"mode = 'cubic'; give 'nearest' or 'linear'"),
        (Upsample(2, "nearest", True), (2, 5, 5, 1), r"align_corners has a meaning for mode = 'linear' alone; leave"),
        (Upsample(2), (2, 5), r"upsampling: the input \(2, 5\) has no positions"),
    ],
    ids=lambda value: str(value) if isinstance(value, Layer) else "",
)
def test_what_does_not_fit_names_numbers_and_remedy(layer: Layer, shape: Shape, message: str) -> None:
    with pytest.raises(PlanError, match=rf"layer layer \(input .*\): .*{message}"):
        node(layer, shape)
