"""Hostile, damaged and truncated shards: none is believed, and each message says what is wrong with which file."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import data_cases
import h5py
import msgspec
import numpy as np
import pytest

from hpctrain.data.dataset import Dataset
from hpctrain.data.index import Layout, read_index, write_index
from hpctrain.data.shards import open_shard
from hpctrain.data.writer import write_shards
from hpctrain.errors import DataError

SHARD = "shard-00000.h5"

# Each hostile file starts from a good shard made by hand, and stands where the index expects one.
Spoil = Callable[[h5py.File, Path], None]


def by_hand(path: Path, uuid: str, spoil: Spoil, libver: str = "latest") -> None:
    """A shard of 7 samples of 5 x 3 x 1 float32, written by h5py alone, then spoilt."""
    with h5py.File(path, "w", libver=libver) as file:
        file["x"] = np.arange(105, dtype="<f4").reshape(7, 5, 3, 1)
        file["y"] = np.arange(7) % 3
        file["sample_id"] = np.arange(7)
        file["tile_xxh3"] = np.zeros(1, np.uint64)
        file.attrs.update({"version": 1, "shape": [5, 3, 1], "tile": [256, 5], "uuid": np.bytes_(uuid)})
        spoil(file, path.parent)


def replaced(name: str, *args, **options) -> Spoil:
    """Puts another dataset in the place of `name`."""

    def spoil(file: h5py.File, folder: Path) -> None:
        del file[name]
        file.create_dataset(name, *args, **options)

    return spoil


def external_link(file: h5py.File, folder: Path) -> None:
    with h5py.File(folder / "other.h5", "w") as other:
        other["x"] = file["x"][()]
    del file["x"]
    file["x"] = h5py.ExternalLink(str(folder / "other.h5"), "/x")


def soft_link(file: h5py.File, folder: Path) -> None:
    del file["sample_id"]
    file["sample_id"] = h5py.SoftLink("/y")


def external_storage(file: h5py.File, folder: Path) -> None:
    (folder / "secret").write_bytes(bytes(420))
    replaced("x", (7, 5, 3, 1), "<f4", external=[(str(folder / "secret"), 0, 420)])(file, folder)


def virtual(file: h5py.File, folder: Path) -> None:
    with h5py.File(folder / "other.h5", "w") as other:
        other["x"] = file["x"][()]
    layout = h5py.VirtualLayout((7, 5, 3, 1), "<f4")
    layout[:] = h5py.VirtualSource(str(folder / "other.h5"), "x", (7, 5, 3, 1))
    del file["x"]
    file.create_virtual_dataset("x", layout)


def group(file: h5py.File, folder: Path) -> None:
    del file["x"]
    file.create_group("x")


def named_type(file: h5py.File, folder: Path) -> None:
    del file["y"]
    file["y"] = np.dtype("<i8")


def compact(file: h5py.File, folder: Path) -> None:
    del file["y"]
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.COMPACT)
    h5py.h5d.create(file.id, b"y", h5py.h5t.STD_I64LE, h5py.h5s.create_simple((7,)), plist)


def odd_integer(file: h5py.File, folder: Path) -> None:
    del file["y"]
    kind = h5py.h5t.STD_I64LE.copy()
    kind.set_precision(40)
    h5py.h5d.create(file.id, b"y", kind, h5py.h5s.create_simple((7,)))


def attribute(name: str, value: object) -> Spoil:
    """Puts another value in the place of an attribute (None: removes it)."""

    def spoil(file: h5py.File, folder: Path) -> None:
        del file.attrs[name]
        if value is not None:
            file.attrs[name] = value

    return spoil


def extra(file: h5py.File, folder: Path) -> None:
    file["extra"] = 1


def missing(file: h5py.File, folder: Path) -> None:
    del file["tile_xxh3"]


X = np.zeros((7, 5, 3, 1), "<f4")
HOSTILE: dict[str, tuple[Spoil, str]] = {
    "external link": (external_link, "b'x' is a soft or external link"),
    "soft link": (soft_link, "b'sample_id' is a soft or external link"),
    "external storage": (external_storage, "x is stored in other files"),
    "virtual": (virtual, "x is not contiguous"),
    "chunked": (replaced("x", data=X, chunks=(1, 5, 3, 1)), "x is not contiguous"),
    "gzip": (replaced("x", data=X, compression="gzip"), "x is not contiguous"),
    "fletcher": (replaced("y", data=np.zeros(7, int), fletcher32=True), "y is not contiguous"),
    "resizable": (replaced("y", data=np.zeros(7, int), maxshape=(None,)), "y is not contiguous"),
    "compact": (compact, "y is not contiguous"),
    "compound": (replaced("x", (7, 5, 3, 1), np.dtype([("a", "<f4")])), "x holds neither integers nor floats"),
    "string": (replaced("y", data=np.full(7, b"ab")), "y holds neither integers nor floats"),
    "vlen string": (replaced("y", (7,), h5py.string_dtype()), "y holds neither integers nor floats"),
    "vlen": (replaced("y", (7,), h5py.vlen_dtype(np.int64)), "y holds neither integers nor floats"),
    "reference": (replaced("y", (7,), h5py.ref_dtype), "y holds neither integers nor floats"),
    "boolean": (replaced("y", data=np.zeros(7, bool)), "y holds neither integers nor floats"),
    "array type": (replaced("y", (7,), np.dtype(("<i8", (2,)))), "y holds neither integers nor floats"),
    "complex": (replaced("x", data=X.astype("c8")), "x (holds neither integers nor floats|is not one of)"),
    "big-endian": (replaced("x", data=X.astype(">f4")), "x is big-endian"),
    "odd integer": (odd_integer, "y is not one of uint8, int8"),
    "float32 ids": (replaced("sample_id", data=np.zeros(7, "f4")), "sample_id is float32"),
    "int64 hashes": (replaced("tile_xxh3", data=np.zeros(1, "i8")), "tile_xxh3 is int64"),
    "ndim": (replaced("x", data=X[..., 0]), r"x is \(7, 5, 3\), attribute shape \(5, 3, 1\)"),
    "ndim of y": (replaced("y", data=np.zeros((7, 1, 1, 1, 1, 1), int)), "y has 6 dims"),
    "ndim of ids": (replaced("sample_id", data=np.zeros((7, 1), int)), "sample_id is int64"),
    "scalar": (replaced("x", data=np.float32(3)), "x has no dims"),
    "null": (replaced("y", data=h5py.Empty("<i8")), "y (has no dims|is not contiguous)"),
    "group": (group, "x is not a dataset"),
    "named type": (named_type, "y is not a dataset"),
    "extra": (extra, "holds b'extra', .* not x, y, sample_id, tile_xxh3"),
    "missing": (missing, "holds b'sample_id', b'x', b'y', not"),
    "TiB": (replaced("x", (2**20, 5, 3, 2**20), "<f4"), "x claims 1048576 x 5 x 3 x 1048576 float32, beyond"),
    "overflow": (replaced("x", (2**31, 2**31, 4, 1), "u1"), "(x claims|not a readable HDF5 file)"),
    "GiB": (replaced("x", (2**14, 5, 3, 2**10), "<f4"), "x stores 0 of its 1006632960 bytes"),
    "lengths": (replaced("y", data=np.zeros(8, int)), "x, y, sample_id hold 7, 8, 7"),
    "tiles": (attribute("tile", [3, 5]), "tile_xxh3 holds 1 hashes for 3 tiles"),
    "no tile": (attribute("tile", [0, 5]), r"attribute tile = \(0, 5\)"),
    "version": (attribute("version", 2), r"version \(2,\), this program reads 1"),
    "no version": (attribute("version", None), "has no attribute version"),
    "string version": (attribute("version", "1"), "attribute version is not 0-d integers"),
    "long shape": (attribute("shape", np.ones(5000, int)), "attribute shape is not 1-d integers"),
    "vlen uuid": (attribute("uuid", "0" * 36), "attribute uuid is not a UUID"),
    "no uuid": (attribute("uuid", None), "has no attribute uuid"),
    "other uuid": (attribute("uuid", np.bytes_("f" * 36)), "dataset uuid is f+, the index says"),
}


def good_folder(folder: Path) -> str:
    """A data set whose only shard `by_hand` imitates; its uuid."""
    layout = Layout((5, 3, 1), "float32", (), "int64", classes=3)
    return write_shards(folder, [(X, np.zeros(7, np.int64), np.arange(7))], layout, 7).uuid


def stand_in(folder: Path) -> None:
    """Makes the index agree with the file that now stands for the shard."""
    index = read_index(folder)
    path = folder / SHARD
    with h5py.File(path) as file:
        offsets = {f"{name}_offset": file[name].id.get_offset() for name in ("x", "y", "sample_id")}
    entry = msgspec.structs.replace(index.shards[0], bytes=path.stat().st_size, **offsets)
    write_index(folder, msgspec.structs.replace(index, shards=(entry,)))


def test_a_shard_made_by_hand_is_good(tmp_path) -> None:
    """So that what refuses the ones below is what was spoilt."""
    for libver in ("earliest", "latest"):
        folder = tmp_path / libver
        by_hand(folder / SHARD, good_folder(folder), lambda file, folder: None, libver)
        stand_in(folder)
        out = np.empty((7, 5, 3, 1))
        Dataset(folder, normalize=False).read_x(np.arange(7), (slice(0, 5), slice(0, 3), slice(0, 1)), out)
        np.testing.assert_array_equal(out.ravel(), np.arange(105))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_shards(tmp_path, name: str) -> None:
    spoil, message = HOSTILE[name]
    by_hand(tmp_path / SHARD, good_folder(tmp_path), spoil)
    with pytest.raises(DataError, match=f"{tmp_path}/{SHARD}: {message}.*; "):
        Dataset(tmp_path)


def test_a_claim_of_terabytes_is_small(tmp_path) -> None:
    by_hand(tmp_path / "x.h5", "0" * 36, HOSTILE["TiB"][0])
    assert (tmp_path / "x.h5").stat().st_size < 5000
    tracemalloc.start()
    with pytest.raises(DataError, match="claims"):
        open_shard(tmp_path / "x.h5")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_name_with_a_slash(tmp_path) -> None:
    """No library writes one, so it is patched in (the old format has no checksums)."""

    def add(file: h5py.File, folder: Path) -> None:
        file["other_name"] = 1

    path = tmp_path / "x.h5"
    by_hand(path, "0" * 36, add, libver="earliest")
    data = path.read_bytes()
    assert data.count(b"other_name") == 1
    path.write_bytes(data.replace(b"other_name", b"other/name"))
    with pytest.raises(DataError, match=rf"{path}: the name b'other/name' contains '/'"):
        open_shard(path)


def test_an_array_that_reaches_beyond_the_file(tmp_path) -> None:
    """The address of x is moved to the end, in the old format."""
    path = tmp_path / "x.h5"
    by_hand(path, "0" * 36, lambda file, folder: None, libver="earliest")
    offset, size = open_shard(path).x.offset, path.stat().st_size
    data = path.read_bytes()
    address = offset.to_bytes(8, "little") + (420).to_bytes(8, "little")
    assert data.count(address) == 1
    for moved in (size - 419, size - 1, size, 2**40, 2**63 - 1):
        path.write_bytes(data.replace(address, moved.to_bytes(8, "little") + (420).to_bytes(8, "little")))
        with pytest.raises(
            DataError, match=rf"{path}: (x ends at byte {moved + 420} of {size}: truncated|not a readable)"
        ):
            open_shard(path)
    path.write_bytes(data.replace(address, (size - 420).to_bytes(8, "little") + (420).to_bytes(8, "little")))
    assert open_shard(path).x.offset == size - 420


def test_a_user_block(tmp_path) -> None:
    by_hand(tmp_path / "x.h5", "0" * 36, lambda file, folder: None)
    data = (tmp_path / "x.h5").read_bytes()
    with (
        h5py.File(tmp_path / "y.h5", "w", libver="latest", userblock_size=512) as file,
        h5py.File(tmp_path / "x.h5") as x,
    ):
        for name in x:
            x.copy(name, file)
        file.attrs.update(x.attrs)
    with pytest.raises(DataError, match="starts with a user block"):
        open_shard(tmp_path / "y.h5")
    (tmp_path / "z.h5").write_bytes(bytes(512) + data)
    with pytest.raises(DataError, match=rf"{tmp_path}/z.h5: "):
        open_shard(tmp_path / "z.h5")


def test_files_that_are_no_shard(tmp_path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("not HDF5\n" * 100)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, message in {
        "empty": "not a readable HDF5 file",
        "text": "not a readable HDF5 file",
        "folder": "not a regular file",
        "fifo": "not a regular file",
        "loop": "Too many levels of symbolic links",
        "gone": "No such file or directory; check the folder",
    }.items():
        with pytest.raises(DataError, match=f"{tmp_path}/{name}: {message}"):
            open_shard(tmp_path / name)


def test_a_truncated_shard(tmp_path, seed) -> None:
    """At 200 lengths."""
    rng = np.random.default_rng(seed)
    data_cases.write(tmp_path, rng)
    data = (tmp_path / SHARD).read_bytes()
    for length in rng.integers(0, len(data), 200).tolist():
        (tmp_path / SHARD).write_bytes(data[:length])
        with pytest.raises(DataError, match=f"{tmp_path}/{SHARD}: (not a readable HDF5 file|.*truncated)"):
            Dataset(tmp_path)


@pytest.mark.parametrize("libver", ["earliest", "latest"])
def test_damaged_structures_are_refused_or_harmless(tmp_path, seed, libver: str) -> None:
    """400 files with 1 to 4 random bytes each: whatever passes lies inside its file."""
    rng = np.random.default_rng(seed)
    path = tmp_path / "x.h5"
    by_hand(path, "0" * 36, lambda file, folder: None, libver)
    good = path.read_bytes()
    for i in range(400):
        data = bytearray(good)
        for at in rng.integers(len(data), size=1 + i % 4):
            data[at] = rng.integers(256)
        path.write_bytes(data)
        try:
            shard = open_shard(path)
        except DataError:
            continue
        for field in (shard.x, shard.y, shard.sample_id, shard.tile_xxh3):
            assert 0 <= field.offset <= field.offset + field.bytes <= len(data)
