"""The boxes that layers need, against what outputs are seen to depend on; blocks that add up to the whole."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from networks import CASES, partitions
from ops import Bound, alone, case, cut, paste, random_weights

from hpctrain.layers.loss import SCORE, WEIGHT, Loss
from hpctrain.partition import Partition, extent, volume, within
from hpctrain.planner.layout import Layout, layout
from hpctrain.planner.plan import extents


def grid_of(place: Layout, ranks: int, most_axes: int) -> list[Partition]:
    """Partitions of `ranks` for a layer, without those that communicate within the op."""
    own = place.node.layer.reduce_axes(*place.node.input_shapes)
    limits = {axis: n for axis, n in extents(place.node).items() if axis not in own}
    return list(partitions(limits, {ranks}, most_axes))


@pytest.mark.parametrize("name", CASES)
def test_blocks_computed_from_their_boxes_alone_add_up_to_the_whole(name: str, seed: int) -> None:
    """So no output depends on anything outside the box that its block needs; and the same backward, for gradients."""
    rng = np.random.default_rng(seed)
    layer, xs = case(name, rng)
    single = alone(layer, *(x.shape for x in xs))
    weights = random_weights(single, rng)
    one = Bound(single, 0, weights)
    y, dy = one.forward(xs), rng.normal(size=single.output.shape)
    if isinstance(layer, Loss):
        dy[:, [WEIGHT, SCORE]] = 0
    blocks, dws = one.backward(dy)
    dxs = [np.zeros(x.shape) for x in xs[: 1 if isinstance(layer, Loss) else None]]
    for dx, block, wish in zip(dxs, blocks, one.wants, strict=False):
        paste(block, wish, dx)
    tried = 0
    for partition in [p for ranks in (2, 3, 4, 6) for p in grid_of(single, ranks, 2)]:
        place = layout(single.node, partition)
        total, into = np.zeros(y.shape), [np.zeros(dx.shape) for dx in dxs]
        gradients = {weight: np.zeros(dist.shape) for weight, dist in place.weights.items()}
        for rank in range(partition.size):
            bound = Bound(place, rank, weights)
            if volume(bound.output) == 0:
                continue
            total[bound.output] += bound.forward(xs)
            got, grown = bound.backward(dy[bound.output])
            for dx, block, wish in zip(into, got, bound.wants, strict=False):
                paste(block, wish, dx)
            for weight, dist in place.weights.items():
                gradients[weight][dist.box(rank)] += grown[weight]
        np.testing.assert_allclose(total, y, rtol=1e-12, atol=1e-12, err_msg=str(partition))
        for mine, expected in zip(into, dxs, strict=True):
            np.testing.assert_allclose(mine, expected, rtol=1e-12, atol=1e-12, err_msg=str(partition))
        for weight, gradient in gradients.items():
            np.testing.assert_allclose(gradient, dws[weight], rtol=1e-12, atol=1e-12, err_msg=f"{weight} {partition}")
        tried += 1
    print(f"{tried} partitions")
    assert tried >= 2


def depends(bound: Bound, xs: list[np.ndarray], slot: int) -> np.ndarray:
    """Which outputs change with which elements, padding too, of the box of an input: bool (inputs, outputs), flat."""
    blocks = [cut(x, wish, bound.fill) for x, wish in zip(xs, bound.wants, strict=True)]
    before, x = bound.compute(blocks), blocks[slot]
    found = np.zeros((x.size, before.size), bool)
    for i, at in enumerate(np.ndindex(x.shape)):
        # larger than any other, so that it wins its windows; of labels, another one
        old, x[at] = x[at], (x[at] + 1) % 5 if x.dtype.kind == "i" else 10.0
        found[i] = (bound.compute(blocks) != before).ravel()
        x[at] = old
    return found


SHARES = ("batch norm", "global", "dropout", "reshape across", "transposed 2d dilated")
"""Layers whose outputs depend on more than a block adds to them (the whole batch, all positions), or on less than is
fetched (not on what was dropped; not on what lies between two runs of a reshape, or between the taps of a kernel).
"""


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(SHARES)])
def test_needed_box_is_the_smallest_around_what_outputs_depend_on(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    layer, xs = case(name, rng)
    single = alone(layer, *(x.shape for x in xs))
    one = Bound(single, 0, random_weights(single, rng))
    tried = 0
    for slot in range(len(xs)):
        matrix, origin = depends(one, xs, slot), one.inputs[slot]
        for partition in grid_of(single, 2, 1) + grid_of(single, 3, 1) + grid_of(single, 4, 2):
            place = layout(single.node, partition)
            if place.partial is not None:
                continue  # a share of a sum, too
            for rank in range(partition.size):
                outputs = np.zeros(single.output.shape, bool)
                outputs[place.output.box(rank)] = True
                seen = matrix[:, outputs.ravel()].any(axis=1).reshape(extent(origin))
                box = place.inputs[slot].box(rank)
                if not seen.any():
                    assert volume(box) == 0
                    continue
                hull = tuple(slice(int(at.min()), int(at.max()) + 1) for at in np.nonzero(seen))
                assert within(box, origin) == hull, f"{partition}, rank {rank}, input {slot}"
                tried += 1
    print(f"{tried} boxes")
    assert tried >= 4


@pytest.mark.parametrize("name", CASES)
def test_work_is_dealt_once_and_outputs_owned_once(name: str, seed: int) -> None:
    layer, xs = case(name, np.random.default_rng(seed))
    single = alone(layer, *(x.shape for x in xs))
    for partition in partitions(extents(single.node), range(1, 7)):
        place = layout(single.node, partition)
        for dist in (place.work, place.output):
            count = np.zeros(dist.shape, int)
            for box in dist.boxes:
                count[box] += 1
            copies = prod(partition[axis] for axis in dist.replicated_axes)
            assert (count == copies).all(), f"{partition}: {dist}"
        assert place.work.replicated_axes == (), f"{partition}: ranks that do the same work count gradients twice"
        assert place.output.replicated_axes == (), partition
