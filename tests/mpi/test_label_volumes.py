"""Reading and checking a label for each position, on ranks that hold parts of the positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_cases import write

from hpctrain.backends.reference import Reference
from hpctrain.data.dataset import Dataset
from hpctrain.data.order import Batches
from hpctrain.errors import DataError
from hpctrain.executor import Executor
from hpctrain.feed import Feed
from hpctrain.graph import Graph
from hpctrain.layers import Conv, Dice, Loss, SoftmaxCrossEntropy
from hpctrain.layers.loss import COUNT, WEIGHT
from hpctrain.partition import Partition, volume
from hpctrain.planner.plan import uniform

SHAPE, CLASSES, BATCH = (5, 7, 3), 4, 3


def network(*losses: Loss, classes: int = CLASSES) -> Graph:
    """A class for each voxel, and losses on it."""
    net = Graph()
    x = net.add("conv", Conv(classes, kernel=3, padding=1), net.input("x", (BATCH, *SHAPE, 2)))
    y = net.input("y", (BATCH, *SHAPE), integer=True)
    for i, loss in enumerate(losses):
        net.add(f"loss{i}", loss, x, y)
    return net


@pytest.fixture
def data(comm: Any, tmp_path: Path, seed: int) -> Dataset:
    """Seven samples; written by rank 0."""
    folder = comm.bcast(tmp_path)
    if comm.rank == 0:
        rng = np.random.default_rng(seed)
        write(folder, rng, 7, (*SHAPE, 2), "float32", SHAPE, CLASSES, per_shard=4)
    comm.Barrier()
    return Dataset(folder)


def feed(data: Dataset, net: Graph, comm: Any, grid: Partition) -> Feed:
    executor = Executor(net, uniform(net, grid), comm, Reference(), "float64")
    return Feed(data, Batches(data.samples, BATCH, 0, shuffle=False, drop_last=False), executor)


@pytest.mark.parallel([1, 2, 3, 4])
def test_each_rank_reads_its_box_of_the_labels_only(comm: Any, data: Dataset) -> None:
    for grid in (Partition(depth=comm.size), Partition(height=comm.size), Partition(batch=comm.size)):
        found = feed(data, network(SoftmaxCrossEntropy()), comm, grid)
        assert found.fill(0, 0) is None
        x, y = found.executor.box("x"), found.executor.box("y")
        assert found.loader.bytes_read == 4 * volume(x) + 8 * volume(y)
        assert comm.allreduce(volume(y)) == BATCH * 5 * 7 * 3, f"{grid}: each label is read once"
        assert x[:-1] == y, f"{grid}: what is predicted where"
        found.executor.free()


@pytest.mark.parallel([1, 2, 3, 4])
def test_rows_of_every_loss_count_real_samples_once(comm: Any, data: Dataset) -> None:
    """The last batch holds one sample and two of padding."""
    found = feed(data, network(SoftmaxCrossEntropy(), Dice()), comm, Partition(height=comm.size))
    for step, samples in ((0, 3), (2, 1)):
        assert found.fill(0, step) is None
        sums = found.sums(found.executor.forward(), found.weights(0, step))
        every = comm.allgather((sums.sums, sums.samples))
        assert sum(mine for _, mine in every) == samples
        for name, count in (("loss0", 5 * 7 * 3), ("loss1", 1)):
            for column in (WEIGHT, COUNT):
                assert sum(mine[name][column] for mine, _ in every) == samples * count
    found.executor.free()


@pytest.mark.parallel([1, 2, 3])
def test_label_beyond_the_outputs_is_named_by_the_rank_that_reads_it(comm: Any, data: Dataset) -> None:
    net = network(SoftmaxCrossEntropy(), Dice(), classes=CLASSES - 1)
    found = feed(data, net, comm, Partition(depth=comm.size))
    error = found.fill(0, 1)
    wrong = np.argwhere(found.executor.input("y") == CLASSES - 1)
    assert len(wrong)
    assert isinstance(error, DataError)
    ids = data.sample_ids(found.batches.ids(0, 1)[0])[wrong[0][0]]
    assert f"label 3 of sample {ids}, but the network has 3 outputs (labels 0 to 2)" in str(error)
    found.executor.free()
    allowed = feed(data, network(SoftmaxCrossEntropy(ignore=3), classes=3), comm, Partition(depth=comm.size))
    assert allowed.fill(0, 1) is None
    allowed.executor.free()


@pytest.mark.parallel([1, 2, 3])
def test_label_that_the_data_ignore_and_a_loss_does_not(comm: Any, tmp_path: Path, seed: int) -> None:
    """The message names the layer and how to give it that label; losses that have it take the batch."""
    folder = comm.bcast(tmp_path)
    if comm.rank == 0:
        write(folder, np.random.default_rng(seed), 7, (*SHAPE, 2), "float32", SHAPE, CLASSES, 4, ignore=255)
    comm.Barrier()
    data, grid = Dataset(folder), Partition(depth=comm.size)
    found = feed(data, network(SoftmaxCrossEntropy(ignore=255), Dice()), comm, grid)
    error = found.fill(0, 1)
    assert isinstance(error, DataError)
    assert "label 255 of sample" in str(error)
    assert "the data set ignores this label: give layer loss1 ignore=sample.ignore" in str(error)
    found.executor.free()
    both = feed(data, network(SoftmaxCrossEntropy(ignore=255), Dice(ignore=255)), comm, grid)
    assert both.fill(0, 1) is None
    ignored = comm.allreduce(int((both.executor.input("y") == 255).sum()))
    sums = both.sums(both.executor.forward(), both.weights(0, 1))
    counted = comm.allreduce(sums.sums["loss0"][COUNT])
    assert ignored > 0
    assert counted == BATCH * 5 * 7 * 3 - ignored
    both.executor.free()
