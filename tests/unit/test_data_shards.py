"""Writing shards: plain HDF5 that any library reads; what cannot be written is named, and leaves nothing behind."""

from __future__ import annotations

import errno
import os
import resource
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

import data_cases
import h5py
import numpy as np
import pytest
import xxhash

from hpctrain.data.dataset import Dataset
from hpctrain.data.index import INDEX, Layout, Target, read_index
from hpctrain.data.writer import write_shards
from hpctrain.errors import DataError

SHARD = "shard-00000.h5"


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x_shape", "dtype", "y_shape", "classes", "tile"),
    [
        ((7, 5, 3), "uint8", (), 4, (256, 7)),
        ((11,), "float64", (3,), None, (256, 11)),
        ((35, 13, 11, 1), "float32", (2,), None, (1, 16)),
        ((37, 41, 3), "uint32", (37, 41), 300, (1, 16)),
        ((5, 4, 3, 2), "float16", (), 2, (256, 5)),
    ],
)
def test_a_shard_is_plain_hdf5(tmp_path, seed, x_shape, dtype, y_shape, classes, tile) -> None:
    rng = np.random.default_rng(seed)
    made = data_cases.write(tmp_path, rng, 300, x_shape, dtype, y_shape, classes, per_shard=290)
    assert [(entry.first, entry.samples) for entry in made.index.shards] == [(0, 290), (290, 10)]
    for entry in made.index.shards:
        part = slice(entry.first, entry.first + entry.samples)
        with h5py.File(tmp_path / entry.name) as file:
            assert sorted(file) == ["sample_id", "tile_xxh3", "x", "y"]
            assert sorted(file.attrs) == ["shape", "tile", "uuid", "version"]
            np.testing.assert_array_equal(file["x"], made.x[part])
            np.testing.assert_array_equal(file["y"], made.y[part])
            np.testing.assert_array_equal(file["sample_id"], made.ids[part])
            assert (file["x"].dtype, file["y"].dtype) == (made.x.dtype, made.y.dtype)
            assert tuple(file.attrs["tile"]) == tile
            assert file.attrs["uuid"].decode() == made.index.uuid
            blocks = [
                made.x[part][i : i + tile[0], j : j + tile[1]].tobytes()
                for i in range(0, entry.samples, tile[0])
                for j in range(0, x_shape[0], tile[1])
            ]
            assert list(file["tile_xxh3"]) == [xxhash.xxh3_64(block).intdigest() for block in blocks]
        data = (tmp_path / entry.name).read_bytes()
        assert (entry.bytes, entry.xxh3_128) == (len(data), xxhash.xxh3_128_hexdigest(data))
        assert data[entry.x_offset :].startswith(made.x[part].tobytes())
        assert data[entry.y_offset :].startswith(made.y[part].tobytes())
        assert data[entry.sample_id_offset :].startswith(made.ids[part].tobytes())


def test_mean_and_std_are_per_channel_however_it_is_chunked(tmp_path, seed) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal([1000, -3, 0], [0.5, 2, 0], (50, 9, 7, 3))
    layout = Layout((9, 7, 3), "float64", (), "int64", classes=1)
    for i, borders in enumerate([(), (1, 2, 30), (49,), range(50)]):
        parts = np.split(x, list(borders))
        chunks = [(part, np.zeros(len(part), np.int64), np.zeros(len(part), np.int64)) for part in parts]
        index = write_shards(tmp_path / str(i), chunks, layout, 50, shard_bytes=20 * layout.x_bytes)
        np.testing.assert_allclose(index.mean, x.mean(axis=(0, 1, 2)), rtol=1e-13)
        np.testing.assert_allclose(index.std, x.std(axis=(0, 1, 2)), rtol=1e-11, atol=1e-13)


def test_statistics_of_the_training_data_are_taken(tmp_path, seed) -> None:
    made = data_cases.write(tmp_path, np.random.default_rng(seed), statistics=((1.0, 2.0, 3.0), (4.0, 5.0, 6.0)))
    assert (made.index.mean, made.index.std) == ((1, 2, 3), (4, 5, 6))
    assert read_index(tmp_path) == made.index


def test_writing_streams(tmp_path) -> None:
    """40 MB pass through a few."""
    layout = Layout((64, 64, 64, 1), "float32", (), "int64", classes=1)

    def chunks() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for i in range(40):
            yield np.full((1, 64, 64, 64, 1), i, np.float32), np.zeros(1, np.int64), np.array([i])

    tracemalloc.start()
    write_shards(tmp_path, chunks(), layout, 40, shard_bytes=20 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) > 40 << 20
    assert peak < 8 << 20


def test_chunks_of_any_length_and_layout_in_memory(tmp_path, seed) -> None:
    rng = np.random.default_rng(seed)
    made = data_cases.write(tmp_path / "whole", rng, 40, uuid="00000000-0000-0000-0000-000000000000")
    borders = sorted(rng.choice(40, 9).tolist())
    pieces = zip(*(np.split(array, borders) for array in (made.x, made.y, made.ids)), strict=True)
    chunks = [(np.asfortranarray(x), y.astype(">i8").astype("<i8"), ids) for x, y, ids in pieces]
    layout = made.index.layout
    again = write_shards(tmp_path / "pieces", chunks, layout, 40, shard_bytes=9 * layout.x_bytes, uuid=made.index.uuid)
    for entry, other in zip(made.index.shards, again.shards, strict=True):
        assert entry == other


def test_short_writes_go_on(tmp_path, seed, monkeypatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[: max(1, len(data) // 3)], offset))
    made = data_cases.write(tmp_path, np.random.default_rng(seed))
    monkeypatch.undo()
    Dataset(tmp_path).verify()
    with h5py.File(tmp_path / SHARD) as file:
        np.testing.assert_array_equal(file["x"], made.x[:9])


# --- what cannot be written --------------------------------------------------------------------------------------


def chunk(samples: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Good samples of LAYOUT, with ids 100, 101, ..."""
    x = np.arange(samples * 15, dtype=np.float32).reshape(samples, 5, 3, 1)
    return x, np.arange(samples, dtype=np.int64) % 3, np.arange(100, 100 + samples)


LAYOUT = Layout((5, 3, 1), "float32", (), "int64", classes=3)


def nan_in_x(x: np.ndarray, y: np.ndarray, ids: np.ndarray) -> None:
    x[2, 4, 1, 0] = np.nan


def inf_in_x(x: np.ndarray, y: np.ndarray, ids: np.ndarray) -> None:
    x[3, 0, 0, 0] = -np.inf


def label_too_high(x: np.ndarray, y: np.ndarray, ids: np.ndarray) -> None:
    y[1] = 3


def label_negative(x: np.ndarray, y: np.ndarray, ids: np.ndarray) -> None:
    y[3] = -1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (nan_in_x, "x of sample 102 is not finite .*; repair or leave it out"),
        (inf_in_x, "x of sample 103 is not finite"),
        (label_too_high, "y of sample 101 is a label outside 0 to 2"),
        (label_negative, "y of sample 103 is a label outside 0 to 2"),
    ],
)
def test_bad_samples_are_named_and_nothing_is_left(tmp_path, spoil, message: str) -> None:
    x, y, ids = chunk()
    spoil(x, y, ids)
    with pytest.raises(DataError, match=f"{tmp_path}.*{message}"):
        write_shards(tmp_path, [(x, y, ids)], LAYOUT, 4, shard_bytes=120)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([chunk(4)], "4 samples came, 5 were announced"),
        ([chunk(4), chunk(4)], "more samples came than the 5 announced"),
        ([(chunk(5)[0][:, :4], *chunk(5)[1:])], "x is 4 x 3 x 1 float32 a sample, announced as 5 x 3 x 1 float32"),
        ([(chunk(5)[0].astype("f8"), *chunk(5)[1:])], "x is 5 x 3 x 1 float64 a sample"),
        ([(chunk(5)[0], chunk(4)[1], chunk(5)[2])], "5 x, 4 y, 5 sample ids"),
    ],
)
def test_samples_that_are_not_as_announced(tmp_path, chunks, message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_shards(tmp_path, chunks, LAYOUT, 5, shard_bytes=120)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout((5, 3, 1), "complex64", (), "int64", 3), "x_dtype = 'complex64'; give one of uint8"),
        (Layout((5, 0, 1), "uint8", (), "int64", 3), r"x_shape = \[5, 0, 1\]; give 1 to 4 extents"),
        (Layout((1, 1, 1, 1, 1), "uint8", (), "int64", 3), "x_shape"),
        (Layout((5, 3, 1), "uint8", (), "float32", 3), "labels are whole numbers"),
        (Layout((5, 3, 1), "uint8", (), "int64"), "values are floats"),
        (Layout((5, 3, 1), "uint8", (), "int64", 0), "classes = 0; labels count from 0"),
        (Layout((5, 3, 1), "uint8", (), "float32", ignore=255), r"ignore = 255, but y holds values \(float32\)"),
        (Layout((5, 3, 1), "uint8", (2,), "float32", None, (Target("a"),)), "1 targets for the 2 values"),
    ],
)
def test_layouts_that_cannot_be(tmp_path, layout: Layout, message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_shards(tmp_path / "new", [], layout, 4)
    assert not (tmp_path / "new").exists()


def test_a_folder_with_data_is_left_alone(tmp_path, seed) -> None:
    made = data_cases.write(tmp_path, np.random.default_rng(seed))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DataError, match=f"{tmp_path}: already holds a data set; remove it or give another folder"):
        data_cases.write(tmp_path, np.random.default_rng(seed))
    assert {path.name: path.read_bytes() for path in made.folder.iterdir()} == before


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """The system refuses files larger than `size` bytes, as a quota would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_no_room_for_a_shard(tmp_path, seed) -> None:
    """The first two shards fit, the third, which is larger for its metadata's sake, does not."""
    rng = np.random.default_rng(seed)
    with files_up_to(40_000), pytest.raises(DataError, match=f"{tmp_path}/{SHARD}: cannot write: File too large; free"):
        data_cases.write(tmp_path, rng, samples=30, x_shape=(67, 43, 1), per_shard=20)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fails_at", range(1, 30, 4))
def test_a_disk_that_fills_up_at_any_write(tmp_path, seed, monkeypatch, fails_at: int) -> None:
    pwrite, count = os.pwrite, 0

    def full(fd: int, data: memoryview, offset: int) -> int:
        nonlocal count
        count += 1
        if count >= fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, data[: len(data) // 2 + 1], offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DataError, match=rf"{tmp_path}/\S+: cannot write: No space left on device; free space"):
        data_cases.write(tmp_path, np.random.default_rng(seed))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["fsync", "posix_fallocate"])
def test_an_index_that_cannot_be_made_durable_is_not_left(tmp_path, seed, monkeypatch, call: str) -> None:
    real = getattr(os, call)

    def fails_on_index(fd: int, *args: int) -> None:
        if INDEX in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd, *args)

    monkeypatch.setattr(os, call, fails_on_index)
    with pytest.raises(DataError, match=f"{tmp_path}/{INDEX}: cannot write: No space left"):
        data_cases.write(tmp_path, np.random.default_rng(seed))
    assert list(tmp_path.iterdir()) == []
