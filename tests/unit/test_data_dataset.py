"""Reading: boxes equal NumPy slices of the source, no other byte is touched, a grid's blocks make the whole batch."""

from __future__ import annotations

import gc
import os
from itertools import product
from pathlib import Path

import data_cases
import numpy as np
import pytest

from hpctrain.data import dataset as dataset_module
from hpctrain.data.dataset import Dataset
from hpctrain.data.loader import Loader
from hpctrain.data.order import Batches
from hpctrain.errors import DataError
from hpctrain.partition import Box, Partition, empty, extent, volume, whole, within
from hpctrain.regions import Distribution

GEOMETRIES = [
    ((7, 5, 3), "uint8", (), 4),
    ((9, 7, 5, 1), "float32", (2,), None),
    ((5, 4, 3, 2), "int16", (5, 4, 3), 3),
    ((13,), "float64", (3,), None),
]


def random_box(rng: np.random.Generator, shape: tuple[int, ...]) -> Box:
    """A box inside `shape`; about a third of its dims are whole."""
    box = []
    for n in shape:
        a, b = sorted(rng.integers(0, n + 1, 2).tolist())
        box.append(slice(0, n) if rng.random() < 0.35 else slice(a, max(b, a + 1)) if a < n else slice(a, a))
    return tuple(box)


def normalized(x: np.ndarray) -> np.ndarray:
    """(x - mean) / std over all but the last dim, in float64."""
    axes = tuple(range(x.ndim - 1))
    x = x.astype(np.float64)
    return (x - x.mean(axis=axes)) / x.std(axis=axes)


@pytest.mark.parametrize(("x_shape", "dtype", "y_shape", "classes"), GEOMETRIES)
def test_boxes_equal_slices(tmp_path, seed, x_shape, dtype, y_shape, classes) -> None:
    """60 boxes of random samples, in any order and repeated, into strided outputs."""
    rng = np.random.default_rng(seed)
    made = data_cases.write(tmp_path, rng, 23, x_shape, dtype, y_shape, classes)
    plain, scaled = Dataset(tmp_path, normalize=False), Dataset(tmp_path)
    expected = normalized(made.x)
    for _ in range(60):
        ids = rng.integers(0, 23, rng.integers(0, 12))
        x_box, y_box = random_box(rng, x_shape), random_box(rng, y_shape)
        strided = np.full((len(ids), *(n + 2 for n in extent(x_box))), -7.0)
        out = strided[(slice(None), *(slice(1, -1) for _ in x_box))]
        plain.read_x(ids, x_box, out)
        np.testing.assert_array_equal(out, made.x[(ids, *x_box)])
        assert (strided == -7).sum() >= strided.size - out.size  # the frame is untouched
        scaled.read_x(ids, x_box, out)
        np.testing.assert_allclose(out, expected[(ids, *x_box)], rtol=1e-12, atol=1e-12)
        single = np.empty(out.shape, np.float32)
        scaled.read_x(ids, x_box, single)
        scale = np.abs(plain.mean / plain.std).max() + np.abs(expected).max()
        np.testing.assert_allclose(single, out, rtol=0, atol=4 * np.finfo(np.float32).eps * scale)
        y = np.empty((len(ids), *extent(y_box)), np.float64)
        plain.read_y(ids, y, y_box)
        np.testing.assert_array_equal(y, made.y[(ids, *y_box)])
        np.testing.assert_array_equal(plain.sample_ids(ids), made.ids[ids])


def test_what_a_data_set_says_of_itself(tmp_path, seed) -> None:
    made = data_cases.write(tmp_path, np.random.default_rng(seed))
    data = Dataset(tmp_path)
    assert (data.samples, data.x_shape, data.x_dtype, data.y_shape, data.y_dtype) == (23, (7, 5, 3), "u1", (), "i8")
    assert (data.classes, data.names, data.uuid) == (4, (), made.index.uuid)
    np.testing.assert_allclose(data.mean, made.x.mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(data.std, made.x.std(axis=(0, 1, 2)))


def test_a_channel_that_never_varies_becomes_zero(tmp_path, seed) -> None:
    made = data_cases.write(tmp_path, np.random.default_rng(seed), statistics=((5.0, 0.0, 0.0), (0.0, 1.0, 2.0)))
    out = np.empty((1, 7, 5, 3))
    Dataset(tmp_path).read_x(np.array([4]), whole((7, 5, 3)), out)
    np.testing.assert_array_equal(out[0], (made.x[4] - np.array([5.0, 0, 0])) / [1, 1, 2])


@pytest.mark.parametrize(("x_shape", "dtype", "y_shape", "classes"), GEOMETRIES)
def test_only_the_bytes_of_the_box_are_read(tmp_path, seed, monkeypatch, x_shape, dtype, y_shape, classes) -> None:
    """30 boxes, watched at the system call: every byte is of the box, and their number is exact."""
    rng = np.random.default_rng(seed)
    made = data_cases.write(tmp_path, rng, 23, x_shape, dtype, y_shape, classes)
    data = Dataset(tmp_path)
    preadv, reads = os.preadv, []

    def watched(fd: int, views: list[memoryview], offset: int) -> int:
        got = preadv(fd, views, offset)
        reads.append((Path(os.readlink(f"/proc/self/fd/{fd}")).name, offset, got))
        return got

    monkeypatch.setattr(os, "preadv", watched)
    for _ in range(30):
        reads.clear()
        ids, box = rng.integers(0, 23, rng.integers(0, 9)), random_box(rng, x_shape)
        before = data.bytes_read
        data.read_x(ids, box, np.empty((len(ids), *extent(box))))
        wanted = np.zeros((23, *x_shape), np.dtype(f"S{data.x_dtype.itemsize}"))
        wanted[(ids, *box)] = b"\1" * data.x_dtype.itemsize
        for entry in made.index.shards:
            mask = wanted[entry.first : entry.first + entry.samples].tobytes()
            for _, offset, got in (read for read in reads if read[0] == entry.name):
                at = offset - entry.x_offset
                assert mask[at : at + got] == b"\1" * got
        share = len(ids) * volume(box) * data.x_dtype.itemsize
        assert sum(got for _, _, got in reads) == data.bytes_read - before == share


def test_slabs_that_touch_are_read_at_once(tmp_path, seed, monkeypatch) -> None:
    """In any order. Whole samples: one call a shard; a slab in height: one a sample; a cut in width: one a row."""
    rng = np.random.default_rng(seed)
    data_cases.write(tmp_path, rng)
    data = Dataset(tmp_path)
    preadv, calls = os.preadv, []
    monkeypatch.setattr(os, "preadv", lambda *args: calls.append(args) or preadv(*args))
    for box, number in [
        (whole((7, 5, 3)), 3),
        ((slice(2, 5), slice(0, 5), slice(0, 3)), 23),
        ((slice(2, 5), slice(1, 5), slice(0, 3)), 23 * 3),
    ]:
        calls.clear()
        data.read_x(rng.permutation(23), box, np.empty((23, *extent(box))))
        assert len(calls) == number


def test_more_runs_than_one_call_takes(tmp_path, seed) -> None:
    made = data_cases.write(tmp_path, np.random.default_rng(seed), 2100, (3, 1, 1), per_shard=2100)
    out = np.empty((2100, 3, 1, 1))
    Dataset(tmp_path, normalize=False).read_x(np.arange(2100), whole((3, 1, 1)), out)
    np.testing.assert_array_equal(out, made.x)


def test_short_reads_go_on(tmp_path, seed, monkeypatch) -> None:
    rng = np.random.default_rng(seed)
    made = data_cases.write(tmp_path, rng)
    data, preadv = Dataset(tmp_path, normalize=False), os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:7]], offset))
    for box in (whole((7, 5, 3)), (slice(1, 4), slice(2, 5), slice(0, 3))):
        out, before = np.empty((23, *extent(box))), data.bytes_read
        data.read_x(np.arange(23), box, out)
        np.testing.assert_array_equal(out, made.x[(slice(None), *box)])
        assert data.bytes_read - before == out.size


def test_few_descriptors_are_held(tmp_path, seed, monkeypatch) -> None:
    rng = np.random.default_rng(seed)
    made = data_cases.write(tmp_path, rng, per_shard=3)

    def held() -> int:
        fds = (Path(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))
        return sum(str(tmp_path) in os.readlink(fd) for fd in fds if fd.is_symlink())

    monkeypatch.setattr(dataset_module, "OPEN_FILES", 3)
    data = Dataset(tmp_path, normalize=False)
    assert held() == 0
    for _ in range(5):
        ids, out = rng.permutation(23), np.empty((23, 7, 5, 3))
        data.read_x(ids, whole((7, 5, 3)), out)
        np.testing.assert_array_equal(out, made.x[ids])
        assert held() == 3
    del data
    gc.collect()
    assert held() == 0


def test_a_file_cut_short_while_training(tmp_path, seed) -> None:
    """At 30 lengths: the first sample that is missing is named."""
    rng = np.random.default_rng(seed)
    made = data_cases.write(tmp_path, rng)
    path, out = tmp_path / "shard-00001.h5", np.empty((23, 7, 5, 3))
    held, data = made.index.shards[1], Dataset(tmp_path)
    for length in sorted(rng.integers(held.x_offset, held.x_offset + 9 * 105, 30).tolist(), reverse=True):
        os.truncate(path, length)
        local = (length - held.x_offset) // 105
        message = rf"{path}: sample {9 + local} \({local} of this shard\): the file ends at x of it; restore"
        with pytest.raises(DataError, match=message):
            data.read_x(np.arange(23), whole((7, 5, 3)), out)
        data.read_x(np.arange(9 + local), whole((7, 5, 3)), out[: 9 + local])
        with pytest.raises(DataError, match=rf"{path}: .*truncated"):
            Dataset(tmp_path)


def test_a_file_that_vanishes(tmp_path, seed) -> None:
    data_cases.write(tmp_path, np.random.default_rng(seed))
    data = Dataset(tmp_path)
    (tmp_path / "shard-00002.h5").unlink()
    with pytest.raises(DataError, match=r"shard-00002.h5: sample 20 .* cannot read: .*No such file.*; check"):
        data.read_y(np.array([3, 20]), np.empty(2, np.int64))


def test_labels_out_of_range_are_not_believed(tmp_path, seed) -> None:
    made = data_cases.write(tmp_path, np.random.default_rng(seed))
    for label in (4, -1):
        with open(tmp_path / "shard-00001.h5", "r+b") as file:
            file.seek(made.index.shards[1].y_offset + 8 * 5)
            file.write(np.int64(label).tobytes())
        data = Dataset(tmp_path)
        with pytest.raises(DataError, match=r"shard-00001.h5: sample 14 \(5 of this shard\): a label outside 0 to 3;"):
            data.read_y(np.array([0, 14, 2]), np.empty(3, np.int64))
        data.read_y(np.array([13, 15]), np.empty(2, np.int64))


@pytest.mark.parametrize("ignore", [255, -1])
def test_ignored_label_is_no_label_out_of_range(tmp_path, seed, ignore: int) -> None:
    made = data_cases.write(tmp_path, np.random.default_rng(seed), ignore=ignore)
    data, ids, y = Dataset(tmp_path), np.arange(23), np.empty(23, np.int64)
    data.read_y(ids, y)
    np.testing.assert_array_equal(y, made.y)
    assert ignore in y
    with open(tmp_path / "shard-00001.h5", "r+b") as file:
        file.seek(made.index.shards[1].y_offset + 8 * 5)
        file.write(np.int64(254).tobytes())
    with pytest.raises(DataError, match=r"sample 14 .*a label outside 0 to 3; write"):
        data.read_y(ids, y)


def test_samples_that_are_not_finite_are_found(tmp_path, seed) -> None:
    """In the box only, in x or y."""
    made = data_cases.write(tmp_path, np.random.default_rng(seed), 23, (9, 7, 5, 1), "float32", (2,), None)

    def put(sample: int, field: str, at: int, value: float) -> None:
        held = made.index.shards[sample // 9]
        offset = {"x": held.x_offset + sample % 9 * 315 * 4, "y": held.y_offset + sample % 9 * 8}[field]
        with open(tmp_path / held.name, "r+b") as file:
            file.seek(offset + 4 * at)
            file.write(np.float32(value).tobytes())

    put(3, "x", 4 * 35 + 2 * 5 + 1, np.nan)  # plane 4, row 2, column 1
    put(10, "y", 1, np.inf)
    put(22, "x", 0, -np.inf)
    data, ids = Dataset(tmp_path), np.array([22, 5, 3, 10, 0])
    assert data.nonfinite(ids, whole((9, 7, 5, 1))) == [22, 3, 10]
    assert data.nonfinite(ids, (slice(4, 5), slice(2, 3), slice(1, 2), slice(0, 1))) == [3, 10]
    assert data.nonfinite(ids, (slice(0, 4), *whole((7, 5, 1)))) == [22, 10]
    assert data.nonfinite(ids[[1, 4]], whole((9, 7, 5, 1))) == []
    assert data.nonfinite(ids, empty(4)) == [10]


def test_what_cannot_be_read(tmp_path, seed) -> None:
    data_cases.write(tmp_path, np.random.default_rng(seed))
    data, box, out = Dataset(tmp_path), whole((7, 5, 3)), np.empty((1, 7, 5, 3))
    for ids in ([23], [-1]):
        with pytest.raises(DataError, match=f"{tmp_path}: samples {ids[0]} to {ids[0]} asked, it has 0 to 22"):
            data.read_x(np.array(ids), box, out)
    for wrong in ((slice(0, 8), *box[1:]), (slice(-1, 7), *box[1:]), box[:2]):
        with pytest.raises(DataError, match=rf"{tmp_path}: box .* of x \(7 x 5 x 3\)"):
            data.read_x(np.array([0]), wrong, np.empty((1, *extent(wrong))))
    with pytest.raises(DataError, match=r"of 1 samples into \(1, 7, 5, 2\)"):
        data.read_x(np.array([0]), box, out[..., :2])


# --- the loader ----------------------------------------------------------------------------------------------------

GRIDS = [
    {},
    {"batch": 2},
    {"height": 2},
    {"batch": 2, "height": 2},
    {"height": 3, "width": 2},
    {"batch": 5, "width": 5},
    {"batch": 3, "channel": 2},
    {"batch": 2, "height": 2, "width": 2, "channel": 2},
]


@pytest.mark.parametrize("parts", GRIDS, ids=str)
@pytest.mark.parametrize(("drop_last", "batch"), [(True, 5), (False, 7)])
def test_the_blocks_of_a_grid_make_the_batch(tmp_path, seed, parts, drop_last: bool, batch: int) -> None:
    """Two epochs; x and y cut differently; one rank more than the grid has; every byte counted."""
    made = data_cases.write(tmp_path, np.random.default_rng(seed))
    expected, batches = normalized(made.x), Batches(23, batch, seed=seed, drop_last=drop_last)
    partition = Partition.of(parts)
    x_cut = Distribution((batch, 7, 5, 3), ("batch", "height", "width", "channel"), partition)
    y_cut = Distribution((batch,), (("height", "batch"),), partition)
    ranks = range(partition.size + 1)
    data = Dataset(tmp_path)
    loaders = [Loader(data, batches, x_cut.box(rank), y_cut.box(rank)) for rank in ranks]
    for steps, (epoch, step) in enumerate(product(range(2), range(batches.steps)), start=1):
        x, y = np.full((batch, 7, 5, 3), np.nan), np.full(batch, -1)
        for rank, loader in enumerate(loaders):
            loader.load(epoch, step, x[x_cut.box(rank)], y[y_cut.box(rank)])
            assert loader.bytes_read == steps * (volume(x_cut.box(rank)) * 1 + volume(y_cut.box(rank)) * 8)
        ids, _ = batches.ids(epoch, step)
        np.testing.assert_allclose(x, expected[ids], rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(y, made.y[ids])
        np.testing.assert_array_equal(data.sample_ids(ids), made.ids[ids])


@pytest.mark.parametrize("out_dtype", [np.float32, np.float64])
def test_blocks_are_the_same_bits_whatever_the_grid(tmp_path, seed, out_dtype) -> None:
    """Volumes with values, cut along two spatial dims."""
    data_cases.write(tmp_path, np.random.default_rng(seed), 11, (9, 7, 5, 1), "float32", (2,), None, per_shard=4)
    data, batches = Dataset(tmp_path), Batches(11, 4, seed=1)
    whole_x, whole_y = np.empty((4, 9, 7, 5, 1), out_dtype), np.empty((4, 2), out_dtype)
    Loader(data, batches, whole(whole_x.shape), whole(whole_y.shape)).load(1, 1, whole_x, whole_y)
    cut = Distribution(whole_x.shape, ("batch", "depth", "height", None, None), Partition(batch=2, depth=3, height=2))
    for rank in range(12):
        box = cut.box(rank)
        x, y = np.empty(extent(box), out_dtype), np.empty((0, 0), out_dtype)
        Loader(data, batches, box, empty(2)).load(1, 1, x, y)
        np.testing.assert_array_equal(x, whole_x[box])
        assert within(box, box)[0].start == 0


def test_boxes_that_do_not_fit_the_data(tmp_path, seed) -> None:
    data_cases.write(tmp_path, np.random.default_rng(seed))
    data, batches, y_box = Dataset(tmp_path), Batches(23, 4, seed=0), (slice(0, 4),)
    for x_box, wanted in [
        ((slice(0, 4), slice(0, 8), slice(0, 5), slice(0, 3)), "4 x 8 x 5 x 3"),
        ((slice(0, 5), slice(0, 7), slice(0, 5), slice(0, 3)), "5 x 7 x 5 x 3"),
        ((slice(0, 4), slice(0, 7), slice(0, 5)), "4 x 7 x 5"),
    ]:
        message = f"{tmp_path}: a batch of x is 4 x 7 x 5 x 3, the network takes {wanted}; give"
        with pytest.raises(DataError, match=message):
            Loader(data, batches, x_box, y_box)
    with pytest.raises(DataError, match=f"{tmp_path}: a batch of y is 4, the network takes 4 x 1"):
        Loader(data, batches, whole((4, 7, 5, 3)), (slice(0, 4), slice(0, 1)))
    with pytest.raises(DataError, match=f"{tmp_path}: has 23 samples, the batches are of 22"):
        Loader(data, Batches(22, 4, seed=0), whole((4, 7, 5, 3)), y_box)
