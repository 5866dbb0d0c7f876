"""index.json: what every sample of a data set looks like, which shard holds which samples, and hashes of it all."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path
from typing import Annotated
from uuid import UUID

import msgspec
import numpy as np
import xxhash
from msgspec import UNSET, Meta, Struct, UnsetType

from hpctrain.data.files import regular_size, write_atomic
from hpctrain.errors import DataError
from hpctrain.partition import Shape

INDEX = "index.json"
FORMAT = "hpctrain-shards"
VERSION = 1
DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64")

Count = Annotated[int, Meta(ge=1)]
Offset = Annotated[int, Meta(ge=0)]
Counts = tuple[Count, ...]
Label = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]


class Target(Struct, frozen=True, forbid_unknown_fields=True):
    """One regression value of y: `name`'s value in its own units is stored value * scale + offset."""

    name: str
    offset: float = 0.0
    scale: float = 1.0


class Layout(Struct, frozen=True, forbid_unknown_fields=True):
    """What one sample looks like: x (*x_shape) with channels last, y (*y_shape), () for one class label."""

    x_shape: Counts
    x_dtype: str
    y_shape: Counts
    y_dtype: str
    classes: Count | None = None  # labels are 0 .. classes - 1; None where y holds values
    targets: tuple[Target, ...] = ()  # one per value of y, or none
    # The label that counts for nothing. Absent where there is none: so it was in the hash of the first data sets.
    ignore: Label | UnsetType = UNSET

    @property
    def channels(self) -> int:
        """Extent of the last dim of x."""
        return self.x_shape[-1]

    @property
    def x_bytes(self) -> int:
        """Bytes of one sample of x."""
        return prod(self.x_shape) * np.dtype(self.x_dtype).itemsize

    def wrong_labels(self, y: np.ndarray) -> np.ndarray:
        """Which elements (bool) of labels `y` are neither a class nor the ignored label; none where y holds values."""
        if self.classes is None:
            return np.zeros(y.shape, bool)
        wrong: np.ndarray = (y < 0) | (y >= self.classes)
        return wrong if self.ignore is UNSET else wrong & (y != self.ignore)

    def problem(self) -> str | None:
        """What is wrong with it, or None."""
        for name, dtype in (("x_dtype", self.x_dtype), ("y_dtype", self.y_dtype)):
            if dtype not in DTYPES:
                return f"{name} = {dtype!r}; give one of {', '.join(DTYPES)}"
        for name, shape, least in (("x_shape", self.x_shape, 1), ("y_shape", self.y_shape, 0)):
            if not least <= len(shape) <= 4 or min(shape, default=1) < 1:
                return f"{name} = {list(shape)}; give {least} to 4 extents of 1 or more"
        if (self.classes is None) != (np.dtype(self.y_dtype).kind == "f"):
            return (
                f"y_dtype = {self.y_dtype} with classes = {self.classes}; labels are whole numbers, values are floats"
            )
        if self.classes is not None and self.classes < 1:
            return f"classes = {self.classes}; labels count from 0, so give the largest label + 1"
        if self.ignore is not UNSET and self.classes is None:
            return f"ignore = {self.ignore}, but y holds values ({self.y_dtype}); only a label can be ignored"
        if self.ignore is not UNSET and not -(2**63) <= self.ignore < 2**63:
            return f"ignore = {self.ignore}; give a label within int64"
        if self.targets and len(self.targets) != prod(self.y_shape):
            return f"{len(self.targets)} targets for the {prod(self.y_shape)} values of y; name all of them or none"
        return None


class ShardEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """One shard file: its place in the data set, its whole-file hash and where its arrays start (bytes)."""

    name: str
    bytes: Count
    xxh3_128: str
    samples: Count
    first: Offset  # global index of its first sample
    x_offset: Offset
    y_offset: Offset
    sample_id_offset: Offset


class Index(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The content of index.json. `mean` and `std` are per channel of x, over the training data, in stored units."""

    format: str = FORMAT
    version: int = VERSION
    uuid: str
    samples: Count
    layout: Layout
    tile: tuple[Count, Count]  # samples, planes (extent along the first dim of x) that share one hash in tile_xxh3
    mean: tuple[float, ...]
    std: tuple[Annotated[float, Meta(ge=0)], ...]
    shards: tuple[ShardEntry, ...]
    hash: str = ""  # xxh3-128 of the compact JSON of the rest


def self_hash(index: Index) -> str:
    """xxh3-128 (hex) of the compact JSON of `index` without its hash."""
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(msgspec.structs.replace(index, hash="")))


def write_index(folder: Path, index: Index) -> Index:
    """Writes index.json atomically; returns it with its hash. Raises DataError where it cannot be written."""
    index = msgspec.structs.replace(index, hash=self_hash(index))
    write_atomic(folder / INDEX, msgspec.json.format(msgspec.json.encode(index), indent=1))
    return index


def read_index(folder: Path) -> Index:
    """The verified index of `folder`. Raises DataError, naming the file and what is wrong, on any doubt."""
    path = folder / INDEX
    regular_size(path)
    try:
        index = msgspec.json.decode(path.read_bytes(), type=Index)
    except (OSError, msgspec.DecodeError, RecursionError) as error:
        raise DataError(f"{path}: not an index of shards: {error}; write the data set again") from error
    if (index.format, index.version) != (FORMAT, VERSION):
        raise DataError(f"{path}: {index.format!r} version {index.version}; this program reads {FORMAT!r} {VERSION}")
    if self_hash(index) != index.hash:
        raise DataError(f"{path}: its content does not match its hash {index.hash!r}; restore it from its source")
    # Whoever changes the file can change the hash too, so nothing below relies on it.
    if problem := index.layout.problem() or _problem(index):
        raise DataError(f"{path}: {problem}")
    return index


def _problem(index: Index) -> str | None:
    try:
        UUID(index.uuid)
    except ValueError:
        return f"uuid = {index.uuid!r} is not a UUID"
    for name, values in (("mean", index.mean), ("std", index.std)):
        if len(values) != index.layout.channels:
            return f"{name} has {len(values)} values for {index.layout.channels} channels"
    first = 0
    for entry in index.shards:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", entry.name):
            return f"shard name {entry.name!r} is not a plain file name; shards lie beside {INDEX}"
        if entry.first != first:
            return f"shard {entry.name} starts at sample {entry.first}, the one before it ends at {first}"
        first += entry.samples
    if first != index.samples:
        return f"samples = {index.samples}, but the shards hold {first}"
    return None


def extents(shape: Shape) -> str:
    """A shape for messages: 28 x 28 x 1."""
    return " x ".join(map(str, shape)) or "scalar"
