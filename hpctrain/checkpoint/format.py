"""The checkpoint format: folder names, the manifest and its checks, and how C-order bytes map to boxes.

`step-%012d/` holds `rank-%05d.bin` (raw little-endian blocks in C order, each on a 4 KiB boundary, zeros between) and
`MANIFEST.json`: canonical JSON with its own xxh3-128, and one xxh3-128 per hash block of each tensor block.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
import numpy as np
import xxhash

from hpctrain.errors import CheckpointError
from hpctrain.partition import Box, Shape, whole

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"

FORMAT = "hpctrain-checkpoint"
VERSION = 1
MANIFEST = "MANIFEST.json"
ALIGN = 4096  # bytes; blocks start on file system pages
HASH_BLOCK = 1 << 22  # bytes under one hash: what a reader of one element must read; stays in the cache meanwhile
MAX_HASH_BLOCK = 1 << 24  # bytes; a reader holds one hash block in memory
MAX_STEP = 10**12 - 1  # twelve digits
MAX_MANIFEST = 1 << 30  # bytes
MAX_COUNT = 1 << 60  # bytes or elements; keeps every sum below 2**63
DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64"),
)

STEP_FOLDER = re.compile(r"step-([0-9]{12})(\.replaced)?")
TMP_FOLDER = re.compile(r"step-[0-9]{12}\.tmp")
RANK_FILE = re.compile(r"rank-([0-9]{5,9})\.bin")

Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_COUNT)]
Dims = Annotated[tuple[Count, ...], msgspec.Meta(max_length=32)]


class StoredBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where one box of a tensor lies: file number, byte offset, global start and extent, a hash per hash block."""

    file: Count
    offset: Count
    start: Dims
    extent: Dims
    xxh3_128: tuple[str, ...]

    @property
    def box(self) -> Box:
        """The global box that the block fills."""
        return tuple(slice(a, a + n) for a, n in zip(self.start, self.extent, strict=True))

    def nbytes(self, itemsize: int) -> int:
        """Bytes of the block in its file."""
        return prod(self.extent) * itemsize


class StoredTensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Global shape and dtype of a tensor, and the blocks that tile it."""

    shape: Dims
    dtype: str
    blocks: tuple[StoredBlock, ...]

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return np.dtype(self.dtype).itemsize


class StoredFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Name and size in bytes of one rank's file. Ranks without a block have no file."""

    name: str
    bytes: Count


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything about a checkpoint but the payload; `state` is the trainer's own."""

    format: Literal["hpctrain-checkpoint"]
    version: Literal[1]
    step: Annotated[int, msgspec.Meta(ge=0, le=MAX_STEP)]
    hash_block: Annotated[int, msgspec.Meta(ge=64, le=MAX_HASH_BLOCK, multiple_of=64)]
    files: tuple[StoredFile, ...]
    tensors: dict[str, StoredTensor]
    state: dict[str, Any]


# --- names -------------------------------------------------------------------------------------------------------


def step_name(step: int) -> str:
    """Folder name of the checkpoint of `step`."""
    return f"step-{step:012d}"


def rank_file(rank: int) -> str:
    """File name of the blocks of `rank`."""
    return f"rank-{rank:05d}.bin"


def step_folders(folder: Path) -> list[Path]:
    """Folders of checkpoints in `folder`, newest step first; [] where there is no such folder."""
    found: dict[str, Path] = {}
    # A step set aside counts only while nothing is in its place; sorted, its name comes after the plain one.
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if match := STEP_FOLDER.fullmatch(path.name):
            found.setdefault(match[1], path)
    return [found[step] for step in sorted(found, reverse=True)]


# --- bytes and boxes -----------------------------------------------------------------------------------------------


def aligned(n: int) -> int:
    """`n` bytes, rounded up to the next boundary of a block."""
    return -(-n // ALIGN) * ALIGN


def hash_ranges(size: int, itemsize: int, hash_block: int) -> list[tuple[int, int]]:
    """The hash blocks of a block of `size` elements, as ranges of elements."""
    step = hash_block // itemsize
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def pieces(shape: Shape, start: int, stop: int) -> Iterator[Box]:
    """The boxes, fewer than twice the dims, that elements start..stop of a C-order array of `shape` fill, in order."""
    if start >= stop:
        return
    if not shape:
        yield ()
        return
    inner = prod(shape[1:])
    (row, skip), (end, rest) = divmod(start, inner), divmod(stop, inner)
    if row == end:
        yield from ((slice(row, row + 1), *piece) for piece in pieces(shape[1:], skip, rest))
        return
    if skip:
        yield from ((slice(row, row + 1), *piece) for piece in pieces(shape[1:], skip, inner))
        row += 1
    if row < end:
        yield (slice(row, end), *whole(shape[1:]))
    yield from ((slice(end, end + 1), *piece) for piece in pieces(shape[1:], 0, rest))


# --- the manifest --------------------------------------------------------------------------------------------------


def encode(manifest: Manifest) -> bytes:
    """The bytes of MANIFEST.json. Raises TypeError or ValueError where the state is not JSON."""
    return _seal(msgspec.structs.asdict(manifest))


def decode(path: Path, raw: bytes) -> Manifest:
    """The manifest in `raw`, all checks passed; CheckpointError names the folder `path` and what is wrong."""
    try:
        fields = json.loads(raw.decode("ascii"), parse_constant=_refuse)
        stored = fields.pop("xxh3_128") if isinstance(fields, dict) else None
        # The whole text is compared, so a change that JSON would not show (a duplicate key, a space) is seen too.
        sealed = stored is not None and _seal(fields) == raw
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: {MANIFEST} is damaged ({error}); restore it, or use another checkpoint"
        ) from error
    if not sealed:
        raise CheckpointError(f"{path}: {MANIFEST} hash differs; restore the file, or use another checkpoint")
    if fields.get("format") == FORMAT and fields.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: {MANIFEST} has format version {fields.get('version')!r:.20}, this program reads {VERSION}; "
            "use the hpctrain that wrote it"
        )
    try:
        manifest = msgspec.convert(fields, type=Manifest)
        check(manifest)
    except (msgspec.ValidationError, CheckpointError) as error:
        raise CheckpointError(f"{path}: {MANIFEST}: {error}") from error
    return manifest


def _seal(fields: dict[str, Any]) -> bytes:
    body = _canonical(fields)
    return _canonical({**fields, "xxh3_128": xxhash.xxh3_128_hexdigest(body)}) + b"\n"


def _canonical(value: object) -> bytes:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=msgspec.structs.asdict)
    return text.encode("ascii")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


# --- checks, the same for writer and reader --------------------------------------------------------------------------


def check(manifest: Manifest) -> None:
    """CheckpointError unless files hold exactly the blocks and the blocks of each tensor tile it exactly."""
    ranks = [_rank_of(file.name) for file in manifest.files]
    if ranks != sorted(set(ranks)):
        raise CheckpointError("files are not in the order of ranks")
    placed: list[list[tuple[int, int]]] = [[] for _ in manifest.files]
    for name, tensor in manifest.tensors.items():
        check_name(name)
        _check_tensor(name, tensor, manifest)
        for block in tensor.blocks:
            placed[block.file].append((block.offset, block.nbytes(tensor.itemsize)))
    for file, spans in zip(manifest.files, placed, strict=True):
        end = 0
        for offset, nbytes in sorted(spans):
            if offset != end:
                raise CheckpointError(f"{file.name}: a block at byte {offset}, where the layout needs one at {end}")
            end = aligned(offset + nbytes)
        if file.bytes != end:
            raise CheckpointError(f"{file.name}: {file.bytes} bytes stated, but its blocks fill {end}")


def check_name(name: str) -> None:
    """CheckpointError unless `name` can name a tensor: 1 to 500 printable characters."""
    if not 0 < len(name) <= 500 or not name.isprintable():
        raise CheckpointError(f"tensor name {name[:40]!r}: use 1 to 500 printable characters")


def check_dtype(name: str, dtype: str) -> None:
    """CheckpointError unless tensors of `dtype` (a NumPy name) can be stored."""
    if dtype not in DTYPES:
        raise CheckpointError(f"tensor {name!r}: dtype {dtype[:40]!r} cannot be stored; use one of {', '.join(DTYPES)}")


def _rank_of(name: str) -> int:
    match = RANK_FILE.fullmatch(name)
    if match is None or name != rank_file(int(match[1])):
        raise CheckpointError(f"file name {name[:80]!r} is not of the form {rank_file(0)}")
    return int(match[1])


def _check_tensor(name: str, tensor: StoredTensor, manifest: Manifest) -> None:
    check_dtype(name, tensor.dtype)
    if prod(tensor.shape) * tensor.itemsize > MAX_COUNT:
        raise CheckpointError(f"tensor {name!r}: shape {tensor.shape} has more than {MAX_COUNT} bytes")
    for block in tensor.blocks:
        where = f"tensor {name!r}, block at {block.start} of {block.extent}"
        if block.file >= len(manifest.files):
            raise CheckpointError(f"{where}: file number {block.file} of {len(manifest.files)}")
        if not len(block.start) == len(block.extent) == len(tensor.shape):
            raise CheckpointError(f"{where}: the tensor has shape {tensor.shape}")
        if 0 in block.extent or any(a + n > m for a, n, m in zip(block.start, block.extent, tensor.shape, strict=True)):
            raise CheckpointError(f"{where}: empty, or outside shape {tensor.shape}")
        hashes = len(hash_ranges(prod(block.extent), tensor.itemsize, manifest.hash_block))
        if len(block.xxh3_128) != hashes:
            raise CheckpointError(f"{where}: {len(block.xxh3_128)} hashes, but {hashes} hash blocks")
    files = [manifest.files[block.file].name for block in tensor.blocks]
    check_tiling(name, tensor.shape, [block.box for block in tensor.blocks], files)


def check_tiling(name: str, shape: Shape, boxes: Sequence[Box], owners: Sequence[str]) -> None:
    """CheckpointError unless the non-empty `boxes` (of `owners`) are disjoint and cover a tensor of `shape`."""
    starts = np.array([[s.start for s in box] for box in boxes], np.int64).reshape(len(boxes), len(shape))
    stops = np.array([[s.stop for s in box] for box in boxes], np.int64).reshape(len(boxes), len(shape))
    if shape and len(boxes) > 1:
        # Sweep along the dim with most cuts: only boxes that start before this one ends can meet it.
        dim = int(np.argmax([len(np.unique(starts[:, d])) for d in range(len(shape))]))
        order = np.argsort(starts[:, dim], kind="stable")
        starts, stops = starts[order], stops[order]
        ends = np.searchsorted(starts[:, dim], stops[:, dim])
        for i, end in enumerate(ends):
            meets = (starts[i + 1 : end] < stops[i]) & (stops[i + 1 : end] > starts[i])
            if (hits := np.flatnonzero(meets.all(axis=1))).size:
                a, b = order[i], order[i + 1 + hits[0]]
                raise CheckpointError(
                    f"tensor {name!r}: boxes of {owners[a]} and {owners[b]} overlap: {_show(boxes[a])} and "
                    f"{_show(boxes[b])}; let one rank only write what is replicated"
                )
    covered = sum(prod(s.stop - s.start for s in box) for box in boxes)
    if covered != prod(shape):
        raise CheckpointError(
            f"tensor {name!r}: blocks hold {covered} of the {prod(shape)} elements of shape {shape}; "
            "every element must be in exactly one"
        )


def _show(box: Box) -> str:
    return "[" + ", ".join(f"{s.start}:{s.stop}" for s in box) + "]"
