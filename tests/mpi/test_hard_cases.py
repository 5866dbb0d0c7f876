"""The cases on which designs like this one break, each trained on several ranks and compared with one rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from executing import TOLERANCE, check, flat_weights, forward_backward, load_weights
from networks import Data, draw, mixing, sandwich, single, with_loss, with_partitions

from hpctrain.backends.reference import Reference
from hpctrain.executor import Executor
from hpctrain.graph import Graph
from hpctrain.layers import Add, AvgPool, BatchNorm, Conv, Dense, Flatten, GlobalAvgPool, Layer, MaxPool, ReLU
from hpctrain.models import Sample, lenet
from hpctrain.partition import Partition, Shape, volume
from hpctrain.planner.layout import layouts
from hpctrain.planner.plan import Plan, uniform


def check_layer(comm: Any, seed: int, shape: Shape, layer: Layer, partition: Partition) -> None:
    """`layer` on `partition`, between layers on one rank, and between layers that are cut by batch."""
    net = sandwich(shape, layer)
    check(comm, net, with_partitions(net, {"layer": partition}), seed)
    check(comm, net, with_partitions(net, {"layer": partition}, other=Partition(batch=comm.size)), seed)


def run(net: Graph, plan: Plan, comm: Any, data: Data) -> Executor:
    """One step without an update."""
    executor = Executor(net, plan, comm, Reference(), "float64")
    load_weights(executor, data)
    forward_backward(executor, data, 0)
    return executor


def alone(net: Graph, data: Data) -> Executor:
    """One step on this rank."""
    from mpi4py import MPI

    return run(net, single(net), MPI.COMM_SELF, data)


# --- contraction --------------------------------------------------------------------------------------------------


@pytest.mark.parallel([2, 3, 4])
def test_dense_split_over_its_contraction(comm: Any, seed: int) -> None:
    check_layer(comm, seed, (5, 7), Dense(3), Partition(contraction=comm.size))
    check_layer(comm, seed, (5, 11), Dense(9, bias=False), Partition(contraction=comm.size))


@pytest.mark.parallel([2, 3, 4])
def test_convolution_split_over_its_contraction(comm: Any, seed: int) -> None:
    check_layer(comm, seed, (3, 5, 7, 5), Conv(3, kernel=3, padding=1), Partition(contraction=comm.size))
    check_layer(comm, seed, (2, 3, 5, 3, 7), Conv(5, kernel=2), Partition(contraction=comm.size))


@pytest.mark.parallel([4])
def test_contraction_together_with_another_axis(comm: Any, seed: int) -> None:
    for axis in ("channel", "batch"):
        check_layer(comm, seed, (5, 7), Dense(7), Partition.of({axis: 2, "contraction": 2}))
    for axis in ("channel", "batch", "height", "width"):
        check_layer(comm, seed, (3, 5, 7, 5), Conv(7, 3, padding=1), Partition.of({axis: 2, "contraction": 2}))


@pytest.mark.parallel([2, 3, 4])
def test_bias_is_added_once_under_contraction(comm: Any, seed: int) -> None:
    """With inputs of 0 the output is the bias itself, and its gradient is the sum of all output gradients."""
    shapes: list[tuple[Shape, Layer]] = [((3, 9), Dense(7)), ((3, 5, 3, 6), Conv(7, kernel=3))]
    for shape, layer in shapes:
        net = Graph()
        net.add("layer", layer, net.input("x", shape))
        with_loss(net, "layer")
        data = draw(net, seed)
        data.inputs["x"].fill(0)
        for partition in (Partition(contraction=comm.size), Partition(channel=2, contraction=comm.size // 2)):
            executor = run(net, with_partitions(net, {"layer": partition}), comm, data)
            bias = data.weights["layer.bias"]
            box = executor.box("layer")
            if volume(box):
                expected = np.broadcast_to(bias, net["layer"].shape)[box]
                np.testing.assert_allclose(executor.output("layer"), expected, rtol=1e-15)
            mine = executor.parameters.by_name["layer.bias"]
            whole = alone(net, data).output_gradient("layer").reshape(-1, 7).sum(axis=0)
            np.testing.assert_allclose(mine.gradient, whole[mine.box], rtol=TOLERANCE, atol=TOLERANCE)
            executor.free()


@pytest.mark.parallel([3, 4])
def test_more_blocks_of_a_contraction_than_channels(comm: Any, seed: int) -> None:
    """A rank without input channels may still own a share of output and bias."""
    check_layer(comm, seed, (5, 2), Dense(7), Partition(contraction=comm.size))
    check_layer(comm, seed, (3, 5, 3, 1), Conv(5, kernel=3, padding=1), Partition(contraction=comm.size))


# --- pooling ------------------------------------------------------------------------------------------------------


@pytest.mark.parallel([2, 3, 4])
def test_global_pooling_of_a_tensor_cut_in_height(comm: Any, seed: int) -> None:
    check_layer(comm, seed, (3, 7, 5, 3), GlobalAvgPool(), Partition(height=comm.size))
    check_layer(comm, seed, (2, 5, 3, 3, 5), GlobalAvgPool(), Partition(depth=comm.size))
    if comm.size == 4:
        check_layer(comm, seed, (3, 7, 5, 3), GlobalAvgPool(), Partition(height=2, channel=2))
        check_layer(comm, seed, (3, 7, 5, 1), GlobalAvgPool(), Partition(height=2, width=2))


@pytest.mark.parallel([1, 2, 3, 4])
def test_max_pool_tie_across_a_block_edge_goes_to_the_first_global_index(comm: Any, seed: int) -> None:
    """Of a constant image the first element of every window wins, wherever the blocks end."""
    net = Graph()
    x = net.add("pre", mixing((2, 7, 7, 1)), net.input("x", (2, 7, 7, 1)))
    with_loss(net, net.add("layer", MaxPool(3, stride=2), x))
    data = draw(net, seed)
    data.inputs["x"].fill(1)
    for partition in (Partition(height=comm.size), Partition(width=comm.size)):
        executor = run(net, with_partitions(net, {"layer": partition}, other=partition), comm, data)
        dy = alone(net, data).output_gradient("layer")
        expected = np.zeros((2, 7, 7, 1))
        expected[:, 0:5:2, 0:5:2] = dy  # each window's first element
        np.testing.assert_allclose(
            executor.output_gradient("pre"), expected[executor.box("pre")], rtol=TOLERANCE, atol=TOLERANCE
        )
        executor.free()


@pytest.mark.parallel([2, 3, 4])
def test_max_pool_among_few_different_values(comm: Any, seed: int) -> None:
    """Ties in most windows, overlapping windows, padding."""
    net = Graph()
    with_loss(net, net.add("layer", MaxPool(3, stride=1, padding=1), net.add("pre", ReLU(), first(net, (2, 7, 5, 3)))))
    data = draw(net, seed)
    data.weights["first.weight"][...] = np.eye(3)
    data.weights["first.bias"][...] = 0
    data.inputs["x"][...] = np.round(data.inputs["x"])
    expected = alone(net, data)
    for partition in (Partition(height=comm.size), Partition(width=comm.size)):
        executor = run(net, with_partitions(net, {"layer": partition}, other=partition), comm, data)
        whole = expected.output_gradient("pre")[executor.box("pre")]
        np.testing.assert_allclose(executor.output_gradient("pre"), whole, rtol=TOLERANCE, atol=TOLERANCE)
        executor.free()


def first(net: Graph, shape: Shape) -> str:
    """A trained layer "first" on the input "x"."""
    return net.add("first", mixing(shape), net.input("x", shape))


@pytest.mark.parallel([2, 3, 4])
def test_average_pool_whose_padding_does_not_count(comm: Any, seed: int) -> None:
    """A window at the edge of a block is not one at the edge of the image."""
    pool = AvgPool(3, stride=1, padding=1, count_padding=False)
    check_layer(comm, seed, (2, 5, 7, 3), pool, Partition(height=comm.size))
    check_layer(comm, seed, (2, 5, 7, 3), pool, Partition(width=comm.size))
    # of ones, every mean is one
    net = sandwich((2, 5, 7, 3), pool)
    data = draw(net, seed)
    data.weights["pre.weight"].fill(0)
    data.weights["pre.bias"].fill(1)
    executor = run(net, with_partitions(net, {"layer": Partition(height=comm.size)}), comm, data)
    np.testing.assert_allclose(executor.output("layer"), np.ones(executor.output("layer").shape), rtol=1e-15)


# --- ranks and blocks that do not divide --------------------------------------------------------------------------


@pytest.mark.parallel([3])
def test_partition_of_two_on_three_ranks(comm: Any, seed: int) -> None:
    net = lenet.build(5, Sample((13, 15, 1), classes=3))
    for grid in (Partition(batch=2), Partition(height=2), Partition(width=2), Partition(channel=2)):
        plan = uniform(net, grid)
        check(comm, net, plan, seed)
        executor = run(net, plan, comm, draw(net, seed))
        if comm.rank == 2:
            assert flat_weights(executor).size == executor.bytes_sent() == 0
            assert all(volume(executor.box(node.name)) == 0 for node in net)


@pytest.mark.parallel([3])
def test_ranks_that_idle_in_one_layer_work_in_the_next(comm: Any, seed: int) -> None:
    net = lenet.build(5, Sample((13, 15, 1), classes=3))
    grids = [Partition(batch=2), Partition(batch=3), Partition()]
    check(comm, net, Plan({node.name: grids[i % 3] for i, node in enumerate(net)}), seed)


@pytest.mark.parallel([2, 3, 4])
def test_rows_of_the_loss_have_four_columns_on_every_rank(comm: Any, seed: int) -> None:
    """Also where a rank has no rows, so that the trainer's sums need no special case."""
    net = sandwich((comm.size - 1, 5), Dense(3))
    data = draw(net, seed)
    plans = [single(net), with_partitions(net, {}, other=Partition(batch=comm.size))]
    for plan in plans:
        executor = Executor(net, plan, comm, Reference(), "float64")
        load_weights(executor, data)
        rows = forward_backward(executor, data, 0)["loss"]
        n = executor.box("loss")[0]
        assert rows.shape == (n.stop - n.start, 4)
        executor.free()


@pytest.mark.parallel([3])
def test_batch_of_seven_over_three_blocks(comm: Any, seed: int) -> None:
    net = lenet.build(7, Sample((12, 13, 2), classes=5))
    plan = uniform(net, Partition(batch=3))
    for place in layouts(net, plan).values():
        assert [box[0] for box in place.output.boxes] == [slice(0, 3), slice(3, 5), slice(5, 7)]
    check(comm, net, plan, seed)


@pytest.mark.parallel([1, 2, 3, 4])
def test_last_batch_padded_with_weight_0(comm: Any, seed: int) -> None:
    """What the padding holds changes nothing, and the gradient is that of the real samples alone."""
    real, batch = 4, 7
    plan_of = {"batch": Partition(batch=comm.size), "height": Partition(height=comm.size)}
    small = lenet.build(real, Sample((13, 12, 1), classes=5))
    data = draw(small, seed, steps=1)
    expected = alone(small, data)
    net = lenet.build(batch, Sample((13, 12, 1), classes=5))
    for grid in plan_of.values():
        bits = []
        for filling in (0.0, 1e3):
            executor = run(net, uniform(net, grid), comm, padded(data, batch, filling))
            for name, p in executor.parameters.by_name.items():
                whole = expected.parameters.by_name[name].gradient[p.box]
                np.testing.assert_allclose(p.gradient, whole, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)
            rows = executor.output("loss")[: max(0, real - executor.box("loss")[0].start)]
            at = executor.box("loss")[0].start
            if rows.size:
                whole = expected.output("loss")[at : at + len(rows)]
                np.testing.assert_allclose(rows, whole, rtol=TOLERANCE, atol=TOLERANCE)
            bits.append([p.gradient.tobytes() for p in executor.parameters.by_name.values()])
            executor.free()
        assert bits[0] == bits[1]


def padded(data: Data, batch: int, filling: float) -> Data:
    """`data` with samples of weight 0 added up to `batch`, of inputs `filling` and the last class."""
    inputs = {}
    for name, values in data.inputs.items():
        more = np.full((1, batch - values.shape[1], *values.shape[2:]), filling if name == "x" else 4, values.dtype)
        inputs[name] = np.concatenate([values, more], axis=1)
    return Data(inputs, data.weights, np.concatenate([data.counts, np.zeros(batch - len(data.counts))]))


EMPTY_BLOCKS: Mapping[str, tuple[Shape, Layer]] = {
    "conv": ((2, 2, 2, 2), Conv(3, kernel=3, padding=1)),
    "conv3d": ((1, 2, 1, 2, 2), Conv(2, kernel=(3, 1, 3), padding=(1, 0, 1))),
    "max pool": ((2, 5, 5, 2), MaxPool(2)),
    "avg pool": ((2, 5, 5, 2), AvgPool(3, stride=3, padding=1, count_padding=False)),
    "global pool": ((2, 2, 1, 2), GlobalAvgPool()),
    "batch norm": ((2, 2, 2, 2), BatchNorm()),
    "batch norm of vectors": ((3, 2), BatchNorm()),
    "relu": ((2, 2, 2, 1), ReLU()),
    "flatten": ((2, 1, 2, 1), Flatten()),
    "dense": ((2, 3), Dense(2)),
}


@pytest.mark.parallel([3, 4])
@pytest.mark.parametrize("name", EMPTY_BLOCKS)
def test_empty_blocks(comm: Any, name: str, seed: int) -> None:
    """More blocks than samples, rows, columns or output channels."""
    shape, layer = EMPTY_BLOCKS[name]
    axes = {2: ("batch", "channel"), 4: ("batch", "height", "width", "channel")}
    for axis in axes.get(len(shape), ("batch", "depth", "height", "width", "channel")):
        check_layer(comm, seed, shape, layer, Partition.of({axis: comm.size}))


@pytest.mark.parallel([2, 3, 4])
def test_whole_network_with_fewer_samples_than_blocks(comm: Any, seed: int) -> None:
    net = lenet.build(1, Sample((13, 15, 1), classes=3))
    check(comm, net, with_partitions(net, {}, other=Partition(batch=comm.size)), seed)


# --- halos --------------------------------------------------------------------------------------------------------


@pytest.mark.parallel([2, 3, 4])
def test_kernel_that_reaches_past_the_neighbour(comm: Any, seed: int) -> None:
    """Blocks of one or two rows, a halo of three on each side."""
    for shape in ((2, 5, 9, 2), (2, comm.size, 7, 3), (1, 2 * comm.size, 7, 1)):
        check_layer(comm, seed, shape, Conv(3, kernel=7, padding=3), Partition(height=comm.size))
    check_layer(comm, seed, (1, 5, 3, 3, 2), Conv(2, kernel=(7, 1, 3), padding=(3, 0, 1)), Partition(depth=comm.size))
    dilated = Conv(2, kernel=3, padding=3, dilation=3)
    check_layer(comm, seed, (2, 5, 5, 2), dilated, Partition(width=comm.size))


@pytest.mark.parallel([4])
def test_halo_around_corners_past_neighbours(comm: Any, seed: int) -> None:
    check_layer(comm, seed, (2, 3, 3, 2), Conv(3, kernel=5, padding=2), Partition(height=2, width=2))
    check_layer(comm, seed, (1, 3, 3, 3, 2), Conv(2, kernel=5, padding=2), Partition(depth=2, width=2))


@pytest.mark.parallel([2, 3, 4])
def test_whole_blocks_of_padding(comm: Any, seed: int) -> None:
    """Padding beyond the kernel: some ranks' input boxes lie outside the array."""
    check_layer(comm, seed, (2, 1, 3, 2), Conv(3, kernel=2, padding=6), Partition(height=comm.size))
    check_layer(comm, seed, (2, 1, 3, 2), Conv(3, kernel=2, padding=6), Partition(width=comm.size))


# --- joins --------------------------------------------------------------------------------------------------------


@pytest.mark.parallel([2, 3, 4])
def test_flatten_whose_blocks_end_within_rows(comm: Any, seed: int) -> None:
    """5 * 3 * 2 = 30 and 3 * 5 * 2 * 3 = 90 flat elements, cut where no row ends."""
    for axis in ("height", "width", "channel"):
        check_layer(comm, seed, (3, 5, 3, 2), Flatten(), Partition.of({axis: comm.size}))
        check_layer(comm, seed, (2, 3, 5, 2, 3), Flatten(), Partition.of({axis: comm.size}))
    check_layer(comm, seed, (2, 3, 5, 7, 1), Flatten(), Partition(depth=comm.size))
    check_layer(comm, seed, (5, 7), Flatten(), Partition(channel=comm.size))
    if comm.size == 4:
        check_layer(comm, seed, (3, 5, 3, 2), Flatten(), Partition(height=2, channel=2))
        check_layer(comm, seed, (3, 5, 3, 2), Flatten(), Partition(height=2, width=2))


@pytest.mark.parallel([2, 3, 4])
def test_residual_add_of_tensors_on_different_partitions(comm: Any, seed: int) -> None:
    shape, net = (3, 5, 7, 4), Graph()
    x = net.add("stem", mixing(shape), net.input("x", shape))
    left = net.add("left", Conv(4, kernel=3, padding=1), x)
    right = net.add("right", BatchNorm(), net.add("deep", Conv(4, kernel=1, bias=False), x))
    both = net.add("add", Add(), left, right, x)
    with_loss(net, net.add("relu", ReLU(), net.add("again", Add(), both, both)))
    n = comm.size
    ways = [Partition(height=n), Partition(batch=n), Partition(width=n), Partition(channel=2), Partition()]
    for turn in range(5):
        names = ("stem", "left", "right", "add", "relu")
        given = {name: ways[(i + turn) % 5] for i, name in enumerate(names)}
        plan = with_partitions(net, {**given, "deep": Partition(contraction=n), "again": Partition(width=n)})
        check(comm, net, plan, seed)


@pytest.mark.parallel([2, 3, 4])
def test_batch_norm_statistics_are_of_the_whole_batch(comm: Any, seed: int) -> None:
    """By the formula, not only as one rank has it: mean 0 and variance 1 over all samples and positions."""
    net = sandwich((5, 5, 3, 2), BatchNorm(eps=1e-12))
    data = draw(net, seed)
    data.weights["layer.gamma"].fill(1)
    data.weights["layer.beta"].fill(0)
    for axis in ("batch", "height", "width"):
        executor = run(net, with_partitions(net, {"layer": Partition.of({axis: comm.size})}), comm, data)
        y = executor.output("layer").reshape(-1, 2)
        sums = comm.allreduce(np.stack([y.sum(axis=0), np.square(y).sum(axis=0)]))
        np.testing.assert_allclose(sums / 75, [[0, 0], [1, 1]], atol=1e-9)
        executor.free()
