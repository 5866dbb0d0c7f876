"""Activations, softmax, dropout and layers of several inputs, against NumPy, SciPy and what their masks are made of."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from networks import node, partitions
from ops import FLOAT, Bound, alone, run
from scipy import special

from hpctrain import randomness
from hpctrain.backends.reference import Reference
from hpctrain.errors import PlanError
from hpctrain.layers import (
    GELU,
    Add,
    Concat,
    Dropout,
    Layer,
    LeakyReLU,
    Multiply,
    Op,
    Phase,
    Place,
    ReLU,
    Sigmoid,
    SiLU,
    Softmax,
    Softplus,
    Tanh,
    dropout,
)
from hpctrain.partition import Partition, Shape, extent, volume, whole
from hpctrain.planner.layout import layout
from hpctrain.planner.plan import extents
from hpctrain.regions import Distribution

# --- activations --------------------------------------------------------------------------------------------------

DEFINITIONS: dict[Layer, Callable[[np.ndarray], np.ndarray]] = {
    ReLU(): lambda x: np.where(x > 0, x, 0),
    LeakyReLU(): lambda x: np.where(x > 0, x, 0.01 * x),
    LeakyReLU(-0.5): lambda x: np.where(x > 0, x, -0.5 * x),
    GELU(): lambda x: x * special.ndtr(x),
    SiLU(): lambda x: x * special.expit(x),
    Sigmoid(): special.expit,
    Tanh(): np.tanh,
    Softplus(): lambda x: np.logaddexp(0, x),
    Softmax(): lambda x: special.softmax(x, axis=-1),
}


@pytest.mark.parametrize("layer", DEFINITIONS, ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 1), (2, 3, 1, 5, 3)])
def test_activations_equal_their_definitions(layer: Layer, shape: Shape, seed: int) -> None:
    x = 5 * np.random.default_rng(seed).normal(size=shape)
    np.testing.assert_allclose(run(layer, x), DEFINITIONS[layer](x), rtol=1e-13, atol=1e-15)


def test_softmax_of_one_channel_is_1_and_has_no_gradient(seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(3, 5, 1))
    bound = Bound(alone(Softmax(), x.shape), 0, {})
    np.testing.assert_array_equal(bound.forward([x]), 1)
    np.testing.assert_array_equal(bound.backward(x)[0][0], 0)


def test_softmax_fetches_channels_and_nothing_else() -> None:
    place = layout(node(Softmax(), (3, 5, 7, 8)), Partition(height=2, channel=3))
    for rank in range(6):
        work, need = place.work.box(rank), place.inputs[0].box(rank)
        assert need == (*work[:3], slice(0, 8))


# --- several inputs -----------------------------------------------------------------------------------------------


def test_sums_and_products_of_several_tensors(seed: int) -> None:
    a, b, c, d = np.random.default_rng(seed).normal(size=(4, 3, 5, 2))
    np.testing.assert_allclose(run(Add(), a, b, c, d), a + b + c + d, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(run(Multiply(), a, b), a * b, rtol=1e-15)
    np.testing.assert_allclose(run(Multiply(), a, b, c, d), a * b * c * d, rtol=1e-14)


def test_gradient_of_a_product_with_zeros_is_that_of_the_other_factors(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b, c = rng.integers(-1, 2, (3, 5, 7, 3)).astype(float)
    dy = rng.normal(size=a.shape)
    assert ((a == 0) & (b == 0)).any()
    bound = Bound(alone(Multiply(), *[a.shape] * 3), 0, {})
    bound.forward([a, b, c])
    dxs, _ = bound.backward(dy)
    for dx, expected in zip(dxs, (dy * b * c, dy * a * c, dy * a * b), strict=True):
        np.testing.assert_array_equal(dx, expected)


@pytest.mark.parametrize("dim", [1, 2, 3, -1, -2, -3])
def test_concatenation_along_any_dim_but_the_first(dim: int, seed: int) -> None:
    rng, shape = np.random.default_rng(seed), [3, 5, 4, 2]
    xs = []
    for n in (1, 4, 2):
        shape[dim] = n
        xs.append(rng.normal(size=shape))
    y = np.concatenate(xs, axis=dim)
    bound = Bound(alone(Concat(dim), *(x.shape for x in xs)), 0, {})
    np.testing.assert_array_equal(bound.forward(xs), y)
    dxs, _ = bound.backward(y)
    for dx, x in zip(dxs, xs, strict=True):
        np.testing.assert_array_equal(dx, x)


def test_concatenation_cut_along_its_dim_fetches_what_lies_in_the_block() -> None:
    """3 + 1 + 5 rows in blocks of 3, 3, 3 and of 5, 4."""
    shapes = [(2, 3, 5, 2), (2, 1, 5, 2), (2, 5, 5, 2)]
    rows = {3: [[(0, 3), None, None], [None, (0, 1), (0, 2)], [None, None, (2, 5)]], 2: None}
    rows[2] = [[(0, 3), (0, 1), (0, 1)], [None, None, (1, 5)]]
    for ranks, expected in rows.items():
        place = layout(node(Concat(1), *shapes), Partition(height=ranks))
        found = [[want.box(rank) for want in place.inputs] for rank in range(ranks)]
        assert [[(b[1].start, b[1].stop) if volume(b) else None for b in boxes] for boxes in found] == expected


# --- dropout ------------------------------------------------------------------------------------------------------


def bound_dropout(layer: Dropout, shape: Shape, name: str = "drop", seed: int = 0) -> Op:
    """The op of a layer on one rank, by its name and the run's seed."""
    box = whole(shape)
    return layer.bind(Place(name, seed, Reference(), FLOAT, (shape,), (box,), box, box, {}, None))


def dropped(op: Op, x: np.ndarray, phase: Phase) -> np.ndarray:
    """Its output."""
    y = np.full(x.shape, np.nan)
    op.forward([x], {}, y, phase)
    return y


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.93])
def test_dropout_drops_a_share_and_keeps_the_mean(rate: float, seed: int) -> None:
    """Of n independent elements n * rate are dropped, give or take sqrt(n * rate * (1 - rate))."""
    x = np.full((7, 50, 31, 9), 3.0)
    y = dropped(bound_dropout(Dropout(rate), x.shape, seed=seed), x, Phase())
    assert abs((y == 0).mean() - rate) < 5 * np.sqrt(rate * (1 - rate) / x.size)
    np.testing.assert_allclose(y[y != 0], 3 / (1 - rate), rtol=1e-15)
    for dim in range(4):  # neighbours are dropped independently: both are with rate**2
        a, b = np.moveaxis(y == 0, dim, 0)[:-1], np.moveaxis(y == 0, dim, 0)[1:]
        assert abs((a & b).mean() - rate**2) < 6 * np.sqrt(3 * rate**2 / a.size), "pairs overlap: 3 for 1"


def test_dropout_is_the_stream_of_its_seed_layer_and_step(seed: int) -> None:
    """Kept where a uniform number in [0, 1) of tensor "layer.dropout.step" is at least the rate."""
    x = np.ones((5, 7, 3, 11))
    for step in (0, 1, 12345):
        for whole_channels in (False, True):
            y = dropped(bound_dropout(Dropout(0.3, whole_channels), x.shape, "drop", seed), x, Phase(step=step))
            shape = (5, 1, 1, 11) if whole_channels else x.shape
            drawn = randomness.uniform(seed, f"drop.dropout.{step}", shape, whole(shape))
            np.testing.assert_allclose(y, np.broadcast_to(np.where(drawn < 0.3, 0, 1 / 0.7), x.shape), rtol=1e-15)


def test_masks_of_other_seeds_layers_and_steps_are_independent(seed: int) -> None:
    x = np.ones((3, 41, 41, 5))
    made = [(s, name, step) for s in (seed, seed + 1) for name in ("a", "b") for step in (0, 1)]
    masks = [dropped(bound_dropout(Dropout(), x.shape, name, s), x, Phase(step=t)) != 0 for s, name, t in made]
    for i, first in enumerate(masks):
        for second in masks[:i]:
            assert abs((first == second).mean() - 0.5) < 5 * 0.5 / np.sqrt(x.size)
    again = bound_dropout(Dropout(), x.shape, "a", seed)
    np.testing.assert_array_equal(dropped(again, x, Phase(step=1)) != 0, masks[1], err_msg="a step run again")


@pytest.mark.parametrize("layer", [Dropout(0.4), Dropout(0.5, whole_channels=True)], ids=str)
def test_dropout_is_the_same_on_every_partition(layer: Dropout, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(3, 5, 4, 7))
    single = node(layer, x.shape)
    expected, tried = run(layer, x), 0
    for partition in partitions(extents(single), range(2, 9), most_axes=3):
        place = layout(single, partition)
        for rank in range(partition.size):
            bound = Bound(place, rank, {})
            np.testing.assert_array_equal(bound.forward([x]), expected[bound.output], err_msg=str(partition))
        tried += 1
    print(f"{tried} partitions")
    assert tried > 20


def test_dropout_gradient_passes_where_elements_were_kept(seed: int) -> None:
    x, dy = np.random.default_rng(seed).normal(size=(2, 3, 5, 4, 3))
    for layer in (Dropout(0.25), Dropout(0.25, whole_channels=True)):
        bound = Bound(alone(layer, x.shape), 0, {})
        for step in range(3):
            y = bound.forward([x], Phase(step=step))
            np.testing.assert_allclose(bound.backward(dy)[0][0], dy * (y / x), rtol=1e-14)


def test_dropout_in_evaluation_and_with_rate_0_is_the_identity(seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(3, 5, 4, 3))
    bound = Bound(alone(Dropout(0.9), x.shape), 0, {})
    assert (bound.forward([x]) == 0).any()
    np.testing.assert_array_equal(bound.forward([x], Phase(training=False)), x)
    np.testing.assert_array_equal(bound.backward(x)[0][0], x)
    np.testing.assert_array_equal(run(Dropout(0), x), x)


def test_mask_drawn_in_slabs_is_the_mask(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more words at a time than SLAB; every element is drawn once."""
    x = np.random.default_rng(seed).normal(size=(3, 5, 1, 7, 3))
    expected = run(Dropout(), x)
    for limit in (1, 2, 20, 100, 314):
        monkeypatch.setattr(dropout, "SLAB", limit)
        np.testing.assert_array_equal(run(Dropout(), x), expected)
        boxes = list(dropout.slabs(whole(x.shape)))
        assert max(map(volume, boxes)) <= limit
        count = np.zeros(x.shape, int)
        for box in boxes:
            count[box] += 1
        assert (count == 1).all()


def test_dropout_of_a_block_keeps_a_byte_per_element() -> None:
    shape = (2, 9, 5, 4)
    for rank, box in enumerate(Distribution(shape, ("batch", "height", None, None), Partition(height=3)).boxes):
        bound = Bound(layout(node(Dropout(), shape), Partition(height=3)), rank, {})
        held = [v for v in vars(bound.op).values() if isinstance(v, np.ndarray)]
        assert [(a.shape, a.dtype) for a in held] == [(extent(box), np.dtype(bool))]


# --- what does not fit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shapes", "message"),
    [
        (LeakyReLU(float("nan")), [(2, 3)], r"slope = nan; give a finite number"),
        (Softmax(), [(2,)], r"the input \(2,\) has no channels; give \(N, C\)"),
        (Dropout(1.0), [(2, 3)], r"rate = 1.0; give the share to drop, from 0 up to but without 1"),
        (Dropout(-0.1), [(2, 3)], r"rate = -0.1"),
        (Dropout(float("nan")), [(2, 3)], r"rate = nan"),
        (Dropout(0.5, whole_channels=True), [(2, 3)], r"\(2, 3\) has no positions; leave out whole_channels"),
        (Multiply(), [(2, 3), (2, 4)], r"multiply: inputs \(2, 3\), \(2, 4\); give two or more of the same shape"),
        (Concat(), [(2, 3)], r"1 inputs; give 2 or more"),
        (Concat(0), [(2, 3), (2, 3)], r"concat: dim = 0 is the batch: .*cannot change.*give 1 to 1"),
        (Concat(-4), [(2, 3, 5, 1), (2, 3, 5, 2)], r"concat: dim = -4 is the batch"),
        (Concat(4), [(2, 3, 5, 1), (2, 3, 5, 2)], r"dim = 4, but \(2, 3, 5, 1\) has 4 dims; give 1 to 3, or -1"),
        (Concat(), [(2, 3, 5), (2, 4, 5)], r"inputs \(2, 3, 5\), \(2, 4, 5\) along dim 2; give tensors that differ"),
        (Concat(1), [(2, 3, 5), (2, 3)], r"inputs \(2, 3, 5\), \(2, 3\) along dim 1"),
    ],
    ids=lambda value: str(value) if isinstance(value, Layer) else "",
)
def test_what_does_not_fit_names_numbers_and_remedy(layer: Layer, shapes: list[Shape], message: str) -> None:
    with pytest.raises(PlanError, match=rf"layer layer \(input .*\): .*{message}"):
        node(layer, *shapes)


def test_flops_of_elementwise_layers() -> None:
    shape = (3, 5, 7, 2)
    assert ReLU().flops(shape) == LeakyReLU().flops(shape) == 210
    assert Add().flops(shape, shape, shape) == Multiply().flops(shape, shape, shape) == 2 * 210
    assert GELU().flops(shape) > 5 * 210
