"""A data set on disk: reads boxes of samples, and nothing but the bytes of the box."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from msgspec import UNSET

from hpctrain.data.files import as_bytes, read_runs
from hpctrain.data.index import Index, ShardEntry, extents, read_index
from hpctrain.data.shards import Shard, open_shard, tile_edges
from hpctrain.data.writer import file_hash
from hpctrain.errors import DataError
from hpctrain.partition import Box, Shape, contains, extent, volume, whole

OPEN_FILES = 128  # descriptors held; a job has about 1024, and MPI needs some


class Dataset:
    """A folder of shards; its index and file structures are checked on construction (DataError names file and reason).

    One sample is x (*x_shape), channels last, and y (*y_shape), () for a class label. `classes` is the number of
    classes, None for values; `ignore` the label that counts for nothing, or None. `mean`, `std` (channels,) float64 are
    of the training data in stored units; with `normalize`, read_x gives (x - mean) / std, where a channel that never
    varies is divided by 1. `names[i]`'s value in its own units is y[i] * y_scale[i] + y_offset[i]. `bytes_read` counts
    bytes read from the files so far.
    """

    def __init__(self, folder: Path, normalize: bool = True) -> None:
        self.folder, self.normalize = Path(folder), normalize
        self.index = read_index(self.folder)
        self.shards = [open_entry(self.folder, self.index, entry) for entry in self.index.shards]
        layout = self.index.layout
        self.samples, self.uuid = self.index.samples, self.index.uuid
        self.x_shape, self.x_dtype = layout.x_shape, np.dtype(layout.x_dtype)
        self.y_shape, self.y_dtype = layout.y_shape, np.dtype(layout.y_dtype)
        self.classes = layout.classes
        self.ignore = None if layout.ignore is UNSET else layout.ignore
        self.names = tuple(target.name for target in layout.targets)
        self.y_offset = np.array([target.offset for target in layout.targets])
        self.y_scale = np.array([target.scale for target in layout.targets])
        self.mean, self.std = np.array(self.index.mean), np.array(self.index.std)
        self.bytes_read = 0
        self._firsts = np.array([entry.first for entry in self.index.shards])
        self._scratch = np.empty(0, np.uint8)
        self._files: dict[int, int] = {}  # shard -> descriptor, the longest open first
        weakref.finalize(self, _close_all, self._files)

    # --- reading --------------------------------------------------------------------------------------------------

    def read_x(self, ids: np.ndarray, box: Box, out: np.ndarray) -> None:
        """Fills `out` (len(ids), *extent(box)), float32 or float64, of any strides, with `box` of x of each sample.

        `ids` are global sample indices in any order, repeats allowed. Raises DataError naming shard and sample where
        a file ends early.
        """
        np.copyto(out, self._staged("x", ids, box, out), casting="same_kind")
        if self.normalize:
            np.subtract(out, self.mean[box[-1]].astype(out.dtype), out=out)
            np.divide(out, np.where(self.std > 0, self.std, 1)[box[-1]].astype(out.dtype), out=out)

    def read_y(self, ids: np.ndarray, out: np.ndarray, box: Box | None = None) -> None:
        """Fills `out` (len(ids), *extent(box)) with `box` of y (None: all of it).

        Raises DataError on a label out of range.
        """
        box = whole(self.y_shape) if box is None else box
        y = self._staged("y", ids, box, out)
        if self.classes is not None and y.size and not 0 <= y.min() <= y.max() < self.classes:
            wrong = self.index.layout.wrong_labels(y).reshape(len(y), -1).any(axis=1)
            if wrong.any():
                raise DataError(
                    f"{self.where(ids[wrong.argmax()])}: a label outside 0 to {self.classes - 1}; write the data set "
                    "again"
                )
        np.copyto(out, y, casting="same_kind")

    def sample_ids(self, ids: np.ndarray) -> np.ndarray:
        """The user's ids, int64 (len(ids),), of global sample indices."""
        out = np.empty(len(ids), np.int64)
        np.copyto(out, self._staged("sample_id", ids, (), out))
        return out

    def nonfinite(self, ids: np.ndarray, box: Box) -> list[int]:
        """Those of `ids` whose x within `box`, or whose y where it holds values, holds NaN or infinity."""
        found = []
        parts = [("x", box)] if self.classes is not None else [("x", box), ("y", whole(self.y_shape))]
        for sample in np.asarray(ids).tolist():
            one = np.array([sample])
            for field, part in parts:
                if not np.isfinite(self._staged(field, one, part, np.empty((1, *extent(part))))).all():
                    found.append(sample)
                    break
        return found

    def _staged(self, field: str, ids: np.ndarray, box: Box, out: np.ndarray) -> np.ndarray:
        """`box` of a field of every sample as stored, (len(ids), *extent(box)), valid until the next read."""
        ids = np.asarray(ids, np.int64)
        shape: Shape = {"x": self.x_shape, "y": self.y_shape, "sample_id": ()}[field]
        if len(box) != len(shape) or not contains(whole(shape), box) or out.shape != (len(ids), *extent(box)):
            raise DataError(
                f"{self.folder}: box {box} of {field} ({extents(shape)}) of {len(ids)} samples into {out.shape}"
            )
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.samples:
            raise DataError(f"{self.folder}: samples {ids.min()} to {ids.max()} asked, it has 0 to {self.samples - 1}")
        dtype = getattr(self.shards[0], field).dtype
        nbytes = len(ids) * volume(box) * dtype.itemsize
        if self._scratch.nbytes < nbytes:
            self._scratch = np.empty(nbytes, np.uint8)
        staged = self._scratch[:nbytes]
        if nbytes:
            self._read(field, ids, box, as_bytes(staged), nbytes // len(ids))
        return staged.view(dtype).reshape(out.shape)

    def _read(self, field: str, ids: np.ndarray, box: Box, buffer: memoryview, block_bytes: int) -> None:
        order = np.argsort(ids, kind="stable")  # the disk is read forwards
        shards = np.searchsorted(self._firsts, ids[order], side="right") - 1
        for shard in np.unique(shards).tolist():
            at = order[shards == shard]
            stored = getattr(self.shards[shard], field)
            length, starts = runs(stored.shape[1:], box, stored.dtype.itemsize)
            samples = stored.offset + (ids[at] - self._firsts[shard]) * stored.sample_bytes
            offsets = (samples[:, None] + starts).ravel()
            places = (at[:, None] * block_bytes + np.arange(len(starts)) * length).ravel()
            try:
                self.bytes_read += read_runs(self._open(shard), offsets, length, buffer, places)
            except EOFError as end:
                sample = int(self._firsts[shard]) + (end.args[0] - stored.offset) // stored.sample_bytes
                raise DataError(
                    f"{self.where(sample)}: the file ends at {field} of it; restore it from its source"
                ) from end
            except OSError as error:
                raise DataError(f"{self.where(ids[at[0]])}: cannot read: {error}; check the file system") from error

    def _open(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(self.shards[shard].path, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[shard]

    def where(self, sample: int) -> str:
        """File and number of a sample, for messages."""
        shard = int(np.searchsorted(self._firsts, sample, side="right")) - 1
        return f"{self.shards[shard].path}: sample {sample} ({sample - self._firsts[shard]} of this shard)"

    # --- verification --------------------------------------------------------------------------------------------

    def verify(self, shards: Iterable[int] | None = None) -> None:
        """Reads all bytes of `shards` (None: all) and compares every hash.

        Raises DataError naming file, tile and samples.
        """
        for shard in range(len(self.shards)) if shards is None else shards:
            verify_shard(self.shards[shard], self.index.shards[shard])


def open_entry(folder: Path, index: Index, entry: ShardEntry) -> Shard:
    """A checked shard that is what the index says it is. Raises DataError."""
    shard = open_shard(folder / entry.name)
    layout = index.layout
    for what, found, expected in (
        ("dataset uuid", shard.uuid, index.uuid),
        ("bytes", shard.bytes, entry.bytes),
        ("x", (shard.x.shape, shard.x.dtype), ((entry.samples, *layout.x_shape), np.dtype(layout.x_dtype))),
        ("y", (shard.y.shape, shard.y.dtype), ((entry.samples, *layout.y_shape), np.dtype(layout.y_dtype))),
        ("tile", shard.tile, index.tile),
        ("x offset", shard.x.offset, entry.x_offset),
        ("y offset", shard.y.offset, entry.y_offset),
        ("sample_id offset", shard.sample_id.offset, entry.sample_id_offset),
    ):
        if found != expected:
            raise DataError(f"{shard.path}: {what} is {found}, the index says {expected}; restore both from one source")
    return shard


def verify_shard(shard: Shard, entry: ShardEntry) -> None:
    """Compares every tile hash and the whole-file hash. Raises DataError naming file, tile and samples."""
    stored = np.fromfile(shard.path, "<u8", shard.tile_xxh3.shape[0], offset=shard.tile_xxh3.offset)
    edges = tile_edges(shard.samples, shard.x.sample_bytes, shard.x.shape[1], shard.tile)
    with open(shard.path, "rb", buffering=0) as file:
        for tile, (start, stop) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
            data = os.pread(file.fileno(), stop - start, shard.x.offset + start)
            if tile >= len(stored) or xxhash.xxh3_64_intdigest(data) != stored[tile]:
                first, last = (entry.first + at // shard.x.sample_bytes for at in (start, stop - 1))
                raise DataError(
                    f"{shard.path}: tile {tile} of x (samples {first} to {last}) does not match its hash; "
                    "restore the file from its source"
                )
    if file_hash(shard.path) != entry.xxh3_128:
        raise DataError(
            f"{shard.path}: the file does not match its hash in the index, though all of x does: "
            f"y, sample_id or the structure changed (samples {entry.first} to {entry.first + entry.samples - 1}); "
            "restore the file from its source"
        )


def inspect(folder: Path, verify: bool = False) -> list[dict[str, Any]]:
    """One record per shard, with its `error` or None, then a summary record; with `verify` every byte is read.

    Raises DataError only where there is no usable index.
    """
    folder = Path(folder)
    index = read_index(folder)
    records: list[dict[str, Any]] = []
    for entry in index.shards:
        error = None
        try:
            shard = open_entry(folder, index, entry)
            if verify:
                verify_shard(shard, entry)
        except DataError as problem:
            error = str(problem)
        records.append(
            {"file": entry.name, "samples": entry.samples, "first": entry.first, "bytes": entry.bytes, "error": error}
        )
    layout = index.layout
    summary = {
        "folder": str(folder),
        "uuid": index.uuid,
        "samples": index.samples,
        "shards": len(index.shards),
        "bytes": sum(entry.bytes for entry in index.shards),
        "x": f"{extents(layout.x_shape)} {layout.x_dtype}",
        "y": f"{extents(layout.y_shape)} {layout.y_dtype}",
        "classes": layout.classes,
        "ignore": None if layout.ignore is UNSET else layout.ignore,
        "names": [target.name for target in layout.targets],
        "mean": list(index.mean),
        "std": list(index.std),
        "verified": verify,
        "errors": sum(record["error"] is not None for record in records),
    }
    return [*records, summary]


def runs(shape: Shape, box: Box, itemsize: int) -> tuple[int, np.ndarray]:
    """Bytes of a contiguous run, and first byte of each run, int64 (runs,), of `box` in a C-ordered sample of `shape`.

    Trailing dims that the box takes whole belong to one run with the first dim, from the right, that it cuts.
    """
    lengths = extent(box)
    cut = len(shape)
    while cut > 0 and lengths[cut - 1] == shape[cut - 1]:
        cut -= 1
    starts = np.zeros(1, np.int64)
    for dim, s in enumerate(box[:cut]):
        positions = np.arange(s.start, s.stop if dim < cut - 1 else s.start + 1, dtype=np.int64)
        starts = (starts[:, None] + positions * (prod(shape[dim + 1 :]) * itemsize)).ravel()
    return prod(lengths[max(cut - 1, 0) :]) * itemsize, starts


def _close_all(files: dict[int, int]) -> None:
    for fd in files.values():
        os.close(fd)
    files.clear()
