"""The shard file: HDF5 with contiguous unfiltered datasets at its root, so that training reads at known offsets.

`open_shard` distrusts every file: an HDF5 file can point at other files, or claim far more than it holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import h5py
import numpy as np

from hpctrain.data.files import regular_size
from hpctrain.data.index import DTYPES, VERSION, Layout, extents
from hpctrain.errors import DataError
from hpctrain.partition import Shape

DATASETS = ("x", "y", "sample_id", "tile_xxh3")
MAX_SHARD_BYTES = 1 << 38
SMALL_SAMPLE = 1 << 14  # bytes; smaller samples share a tile
ALIGNMENT = 4096  # datasets start on a page

IMPORT_HINT = "shards are made by `hpctrain data import` or `hpctrain data make`"


@dataclass(frozen=True)
class Field:
    """One dataset of a shard: byte offset in the file, shape with the sample dim first, dtype (little-endian)."""

    offset: int
    shape: Shape
    dtype: np.dtype

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample."""
        return prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Bytes of all samples."""
        return self.shape[0] * self.sample_bytes


@dataclass(frozen=True)
class Shard:
    """A shard that passed every check: x (n, *x_shape), y (n, *y_shape), sample_id (n,), tile_xxh3 (tiles,)."""

    path: Path
    bytes: int
    uuid: str
    tile: tuple[int, int]
    x: Field
    y: Field
    sample_id: Field
    tile_xxh3: Field

    @property
    def samples(self) -> int:
        """Samples in this shard."""
        return self.x.shape[0]


# --- tiles -------------------------------------------------------------------------------------------------------


def tile_of(layout: Layout) -> tuple[int, int]:
    """(samples, planes) under one hash: 256 small samples, or 16 planes of a large one."""
    planes = layout.x_shape[0]
    return (256, planes) if layout.x_bytes <= SMALL_SAMPLE else (1, min(16, planes))


def tile_edges(samples: int, sample_bytes: int, planes: int, tile: tuple[int, int]) -> np.ndarray:
    """Byte borders in x of the tiles of a shard, int64 (tiles + 1,): tile t is bytes edges[t] to edges[t + 1]."""
    starts = np.arange(0, samples, tile[0], dtype=np.int64)[:, None] * sample_bytes
    within = np.arange(0, planes, tile[1], dtype=np.int64)[None, :] * (sample_bytes // planes)
    return np.append((starts + within).ravel(), samples * sample_bytes)


# --- writing: the HDF5 structure without its data --------------------------------------------------------------------


class _Structure:
    """A file object that keeps only what HDF5 writes, its metadata, and lets the arrays between be a hole."""

    def __init__(self) -> None:
        self.parts: list[tuple[int, bytes]] = []
        self.size = self._at = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (self.size if whence == 2 else 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int) -> bytes:
        raise OSError("a structure under construction is never read")

    def write(self, data: memoryview) -> int:
        self.parts.append((self._at, bytes(data)))
        self._at += len(data)
        self.size = max(self.size, self._at)
        return len(data)

    def truncate(self, size: int) -> None:
        self.size = size

    def flush(self) -> None:
        pass


def structure(layout: Layout, samples: int, uuid: str) -> tuple[int, list[tuple[int, bytes]], dict[str, Field]]:
    """The HDF5 structure of a shard: (file bytes, [(offset, metadata)], field of each dataset). Touches no disk."""
    tile = tile_of(layout)
    tiles = len(tile_edges(samples, layout.x_bytes, layout.x_shape[0], tile)) - 1
    arrays = {
        "x": ((samples, *layout.x_shape), layout.x_dtype),
        "y": ((samples, *layout.y_shape), layout.y_dtype),
        "sample_id": ((samples,), "int64"),
        "tile_xxh3": ((tiles,), "uint64"),
    }
    image, fields = _Structure(), {}
    with _new_file(image) as file:
        for name, (shape, dtype) in arrays.items():
            kind = np.dtype(dtype).newbyteorder("<")
            fields[name] = Field(_reserve(file, name, shape, kind), shape, kind)
        file.attrs["version"] = np.int64(VERSION)
        file.attrs["shape"] = np.array(layout.x_shape, np.int64)
        file.attrs["tile"] = np.array(tile, np.int64)
        file.attrs["uuid"] = np.bytes_(uuid)
    return image.size, image.parts, fields


def _new_file(image: _Structure) -> h5py.File:
    """An empty HDF5 file in `image`. Not by h5py.File(image), as older ones put the time of day into it."""
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fileobj_driver(h5py.h5fd.fileobj_driver, image)
    access.set_libver_bounds(h5py.h5f.LIBVER_LATEST, h5py.h5f.LIBVER_LATEST)
    access.set_alignment(ALIGNMENT, ALIGNMENT)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    creation = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    creation.set_obj_track_times(False)
    return h5py.File(h5py.h5f.create(b"shard", h5py.h5f.ACC_TRUNC, creation, access))


def _reserve(file: h5py.File, name: str, shape: Shape, dtype: np.dtype) -> int:
    """Byte offset of a new contiguous dataset whose space is reserved but not written."""
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.CONTIGUOUS)
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    plist.set_obj_track_times(False)
    space = h5py.h5s.create_simple(shape)
    return h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(dtype), space, plist).get_offset()


# --- reading: the checks, in the order in which they become safe to make --------------------------------------------


def open_shard(path: Path) -> Shard:
    """The checked structure of a shard. Raises DataError naming the file and what is wrong with it."""
    size = regular_size(path)
    try:
        with h5py.File(path, "r", locking=False) as file:
            return _checked(file, path, size)
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError) as error:
        raise DataError(f"{path}: not a readable HDF5 file: {error}; restore it from its source") from error


def _checked(file: h5py.File, path: Path, size: int) -> Shard:
    def require(good: bool, problem: str) -> None:
        if not good:
            raise DataError(f"{path}: {problem}; {IMPORT_HINT}")

    require(file.userblock_size == 0, "starts with a user block")
    links = list(file.id)
    for link in links:
        require(b"/" not in link, f"the name {link!r} contains '/'")
    for link in links:
        require(file.id.links.get_info(link).type == h5py.h5l.TYPE_HARD, f"{link!r} is a soft or external link")
    found = ", ".join(repr(link) for link in links) or "nothing"
    require(sorted(links) == sorted(name.encode() for name in DATASETS), f"holds {found}, not {', '.join(DATASETS)}")

    version = _integers(file, "version", 0, require)
    require(version == (VERSION,), f"version {version}, this program reads {VERSION}")
    x_shape = _integers(file, "shape", 1, require)
    tile = _integers(file, "tile", 1, require)
    require(len(tile) == 2 and min(tile) > 0, f"attribute tile = {tile}")
    fields = {name: _field(file, name, size, require) for name in DATASETS}
    x, y, ids, tiles = (fields[name] for name in DATASETS)

    require(2 <= len(x.shape) <= 5 and x.shape[1:] == x_shape, f"x is {x.shape}, attribute shape {x_shape}")
    require(1 <= len(y.shape) <= 5, f"y has {len(y.shape)} dims")
    for name, field, dtype in (("sample_id", ids, "<i8"), ("tile_xxh3", tiles, "<u8")):
        require(len(field.shape) == 1 and field.dtype == dtype, f"{name} is {field.dtype} {field.shape}")
    require(
        y.shape[0] == ids.shape[0] == x.shape[0], f"x, y, sample_id hold {x.shape[0]}, {y.shape[0]}, {ids.shape[0]}"
    )
    count = -(-x.shape[0] // tile[0]) * -(-x.shape[1] // tile[1])
    require(tiles.shape[0] == count, f"tile_xxh3 holds {tiles.shape[0]} hashes for {count} tiles")
    return Shard(path, size, _uuid(file, require), (tile[0], tile[1]), x, y, ids, tiles)


Require = Callable[[bool, str], None]


def _field(file: h5py.File, name: str, size: int, require: Require) -> Field:
    """One dataset, checked before anything in it is believed."""
    item = h5py.h5o.open(file.id, name.encode())
    require(isinstance(item, h5py.h5d.DatasetID), f"{name} is not a dataset")
    plist, space, kind = item.get_create_plist(), item.get_space(), item.get_type()
    require(plist.get_layout() == h5py.h5d.CONTIGUOUS, f"{name} is not contiguous (chunked, compact or virtual)")
    require(plist.get_external_count() == 0, f"{name} is stored in other files (external storage)")
    require(kind.get_class() in (h5py.h5t.INTEGER, h5py.h5t.FLOAT), f"{name} holds neither integers nor floats")
    order = kind.get_order()
    require(order == h5py.h5t.ORDER_LE, f"{name} is big-endian" if order == h5py.h5t.ORDER_BE else f"{name} byte order")
    dtypes = [np.dtype(dtype).newbyteorder("<") for dtype in DTYPES]
    found = next((dtype for dtype in dtypes if kind.equal(h5py.h5t.py_create(dtype))), None)
    require(space.get_simple_extent_type() == h5py.h5s.SIMPLE, f"{name} has no dims")
    require(plist.get_nfilters() == 0, f"{name} is filtered (compressed)")
    if found is None:
        raise DataError(f"{file.filename}: {name} is not one of {', '.join(DTYPES)}; {IMPORT_HINT}")
    shape = tuple(int(n) for n in space.get_simple_extent_dims())
    logical = prod(shape) * found.itemsize
    require(0 < logical <= MAX_SHARD_BYTES, f"{name} claims {extents(shape)} {found}, beyond {MAX_SHARD_BYTES} bytes")
    stored, offset = item.get_storage_size(), item.get_offset()
    require(stored == logical and offset is not None, f"{name} stores {stored} of its {logical} bytes")
    require(offset + logical <= size, f"{name} ends at byte {offset + logical} of {size}: truncated")
    return Field(offset, shape, found)


def _integers(file: h5py.File, name: str, ndim: int, require: Require) -> tuple[int, ...]:
    """A small integer attribute."""
    require(h5py.h5a.exists(file.id, name.encode()), f"has no attribute {name}")
    attribute = h5py.h5a.open(file.id, name.encode())
    small = len(attribute.shape) == ndim and prod(attribute.shape) <= 8
    require(
        attribute.get_type().get_class() == h5py.h5t.INTEGER and small, f"attribute {name} is not {ndim}-d integers"
    )
    values = np.zeros(attribute.shape, np.int64)
    attribute.read(values)
    return tuple(int(n) for n in values.ravel())


def _uuid(file: h5py.File, require: Require) -> str:
    require(h5py.h5a.exists(file.id, b"uuid"), "has no attribute uuid")
    attribute = h5py.h5a.open(file.id, b"uuid")
    kind = attribute.get_type()
    text = kind.get_class() == h5py.h5t.STRING and not kind.is_variable_str() and kind.get_size() == 36
    require(text and attribute.shape == (), "attribute uuid is not a UUID")
    value = np.zeros((), "S36")
    attribute.read(value)
    return value.item().decode(errors="replace")
