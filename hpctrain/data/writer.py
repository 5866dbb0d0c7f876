"""Writes a data set shard by shard from a stream of samples; index.json comes last: a folder with one is complete."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from uuid import uuid4

import numpy as np
import xxhash

from hpctrain.data.files import as_bytes, create, writing
from hpctrain.data.index import INDEX, Index, Layout, ShardEntry, extents, write_index
from hpctrain.data.shards import structure, tile_edges, tile_of
from hpctrain.durable import sync_folder, write_all
from hpctrain.errors import DataError

Chunk = tuple[np.ndarray, np.ndarray, np.ndarray]  # x (k, *x_shape), y (k, *y_shape), sample_id (k,) int64
Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean, std per channel of x

SHARD_BYTES = 1 << 30
HASH_BYTES = 1 << 20
PIECE_BYTES = 1 << 22  # so that checks and statistics need little memory however large the caller's chunks are


def write_shards(
    folder: Path,
    chunks: Iterable[Chunk],
    layout: Layout,
    samples: int,
    *,
    shard_bytes: int = SHARD_BYTES,
    statistics: Statistics | None = None,
    uuid: str | None = None,
) -> Index:
    """Writes `samples` samples, which arrive as `chunks` (x, y, sample_id) of any length, into `folder`.

    `shard_bytes` is the most bytes of x in one file. `statistics` are those of the training data when this is other
    data; None measures them here. Raises DataError on a sample that does not fit `layout`, is not finite or has a
    label out of range, on a wrong count, a folder that already holds a data set, or a full disk; then nothing of it
    is left in `folder`, nor `folder` where it is new.
    """
    folder, uuid, moments = Path(folder), uuid or str(uuid4()), Moments(layout.channels)
    made = _prepare(folder, layout, samples)
    per_shard = max(1, shard_bytes // layout.x_bytes)
    shards: list[_ShardFile] = []
    entries: list[ShardEntry] = []
    added = 0
    try:
        for x, y, sample_id in _pieces(chunks, per_shard, max(1, PIECE_BYTES // layout.x_bytes)):
            if problem := sample_problem(layout, x, y, sample_id):
                raise DataError(f"{folder}: {problem}")
            if added + len(x) > samples:
                raise DataError(f"{folder}: more samples came than the {samples} announced; give their exact number")
            if added % per_shard == 0:
                path = folder / f"shard-{len(shards):05d}.h5"
                shards.append(_ShardFile(path, layout, added, min(per_shard, samples - added), uuid))
            shards[-1].add(x, y, sample_id)
            moments.add(x)
            added += len(x)
            if shards[-1].full:
                entries.append(shards[-1].publish())
        if added < samples:
            raise DataError(f"{folder}: {added} samples came, {samples} were announced; give their exact number")
        mean, std = statistics or moments.result()
        with writing(folder):
            sync_folder(folder)
        index = Index(
            uuid=uuid,
            samples=samples,
            layout=layout,
            tile=tile_of(layout),
            mean=mean,
            std=std,
            shards=tuple(entries),
        )
        return write_index(folder, index)
    except BaseException:
        (folder / INDEX).unlink(missing_ok=True)
        for shard in shards:
            shard.discard()
        for new in made:
            if not any(new.iterdir()):
                new.rmdir()
        raise


def _prepare(folder: Path, layout: Layout, samples: int) -> list[Path]:
    """Makes `folder`, and those above it that are missing; returns them, the innermost first."""
    if problem := layout.problem() or (None if samples > 0 else f"{samples} samples; give at least one"):
        raise DataError(f"{folder}: {problem}")
    if (folder / INDEX).exists():
        raise DataError(f"{folder}: already holds a data set; remove it or give another folder")
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return missing


def _pieces(chunks: Iterable[Chunk], per_shard: int, at_most: int) -> Iterator[Chunk]:
    """The same samples in pieces of at most `at_most`, none of which crosses from one shard to the next."""
    done = 0
    for x, y, sample_id in chunks:
        if not len(x) == len(y) == len(sample_id):
            raise DataError(f"a chunk has {len(x)} x, {len(y)} y, {len(sample_id)} sample ids; give as many of each")
        at = 0
        while at < len(x):
            stop = min(at + at_most, at + per_shard - done % per_shard, len(x))
            yield x[at:stop], y[at:stop], sample_id[at:stop]
            done, at = done + stop - at, stop


def sample_problem(layout: Layout, x: np.ndarray, y: np.ndarray, sample_id: np.ndarray) -> str | None:
    """What keeps these samples from being written, naming the first that is wrong, or None."""
    for name, array, shape, dtype in (
        ("x", x, layout.x_shape, layout.x_dtype),
        ("y", y, layout.y_shape, layout.y_dtype),
        ("sample_id", sample_id, (), "int64"),
    ):
        if array.shape[1:] != shape or array.dtype != np.dtype(dtype):
            return f"{name} is {extents(array.shape[1:])} {array.dtype} a sample, announced as {extents(shape)} {dtype}"
    for name, array in (("x", x), ("y", y)):
        if array.dtype.kind != "f":
            continue
        bad = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
        if bad.any():
            return f"{name} of sample {sample_id[bad.argmax()]} is not finite (NaN or infinity); repair or leave it out"
    if layout.classes is not None:
        bad = layout.wrong_labels(y).reshape(len(y), -1).any(axis=1)
        if bad.any():
            return f"y of sample {sample_id[bad.argmax()]} is a label outside 0 to {layout.classes - 1}"
    return None


class _ShardFile:
    """One shard under construction, as NAME.tmp until every byte of it is on disk."""

    def __init__(self, path: Path, layout: Layout, first: int, samples: int, uuid: str) -> None:
        self.path, self.partial = path, path.with_name(path.name + ".tmp")
        self.first, self.samples, self.filled = first, samples, 0
        self.size, self.metadata, self.fields = structure(layout, samples, uuid)
        self.hashes = _TileHashes(tile_edges(samples, layout.x_bytes, layout.x_shape[0], tile_of(layout)))
        with writing(path):
            self.fd = create(self.partial, self.size)

    @property
    def full(self) -> bool:
        return self.filled == self.samples

    def add(self, x: np.ndarray, y: np.ndarray, sample_id: np.ndarray) -> None:
        for name, array in (("x", x), ("y", y), ("sample_id", sample_id)):
            field = self.fields[name]
            data = as_bytes(np.ascontiguousarray(array, field.dtype))
            self._write(data, field.offset + self.filled * field.sample_bytes)
            if name == "x":
                self.hashes.add(data)
        self.filled += len(x)

    def publish(self) -> ShardEntry:
        """Gives the complete file its name."""
        hashes = np.array(self.hashes.found, self.fields["tile_xxh3"].dtype)
        self._write(as_bytes(hashes), self.fields["tile_xxh3"].offset)
        for offset, part in self.metadata:
            self._write(part, offset)
        with writing(self.path):
            os.fsync(self.fd)
            self._close()
            whole = file_hash(self.partial)
            self.partial.rename(self.path)
        x, y, sample_id = (self.fields[name].offset for name in ("x", "y", "sample_id"))
        return ShardEntry(self.path.name, self.size, whole, self.samples, self.first, x, y, sample_id)

    def discard(self) -> None:
        self._close()
        self.partial.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def _write(self, data: memoryview | bytes, offset: int) -> None:
        with writing(self.path):
            write_all(self.fd, data, offset)

    def _close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class _TileHashes:
    """xxh3-64 of each tile of x, whose bytes arrive in order in pieces of any length."""

    def __init__(self, edges: np.ndarray) -> None:
        self.stops = edges[1:].tolist()
        self.found: list[int] = []
        self._hash, self._at = xxhash.xxh3_64(), 0

    def add(self, data: memoryview) -> None:
        while data:
            stop = self.stops[len(self.found)]
            part, data = data[: stop - self._at], data[stop - self._at :]
            self._hash.update(part)
            self._at += len(part)
            if self._at == stop:
                self.found.append(self._hash.intdigest())
                self._hash.reset()


class Moments:
    """Mean and standard deviation per channel (last dim) of samples that come in chunks, merged by Chan's formula."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean = np.zeros(channels)
        self.squares = np.zeros(channels)  # summed squared distance from the mean

    def add(self, x: np.ndarray) -> None:
        """Takes in x (k, ..., channels)."""
        rows = x.reshape(-1, x.shape[-1])
        mean = rows.mean(axis=0, dtype=np.float64)
        squares = rows.var(axis=0, dtype=np.float64) * len(rows)
        total = self.count + len(rows)
        shift = mean - self.mean
        self.squares += squares + shift**2 * (self.count * len(rows) / total)
        self.mean += shift * (len(rows) / total)
        self.count = total

    def result(self) -> Statistics:
        """(mean, std) per channel."""
        std = np.sqrt(self.squares / self.count)
        return tuple(self.mean.tolist()), tuple(std.tolist())


def file_hash(path: Path) -> str:
    """xxh3-128 (hex) of a whole file."""
    digest, block = xxhash.xxh3_128(), memoryview(bytearray(HASH_BYTES))
    with open(path, "rb", buffering=0) as file:
        while got := file.readinto(block):
            digest.update(block[:got])
    return digest.hexdigest()
