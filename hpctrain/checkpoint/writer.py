"""Writing a checkpoint in three parts: prepare (rank 0), write_blocks (each rank, no communication), commit (rank 0).

`save` runs them in turn. A thread can run `write_blocks` on copies of the arrays while training goes on.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from hpctrain.checkpoint import format as fmt
from hpctrain.checkpoint.agree import Communicator, on_all, on_first
from hpctrain.checkpoint.format import HASH_BLOCK, JSON, MANIFEST, StoredBlock, StoredFile, StoredTensor
from hpctrain.checkpoint.storage import make_folder, new_file, remove
from hpctrain.durable import sync_folder, write_all
from hpctrain.errors import CheckpointError
from hpctrain.partition import Box, Shape, contains, extent, volume, whole


@dataclass(frozen=True, eq=False)
class Block:
    """What one rank writes of a tensor: the box of a tensor of global `shape` that `array` fills.

    `array` may have any strides; it is stored little-endian in C order. An empty box states shape and dtype only.
    """

    name: str
    shape: Shape
    box: Box
    array: np.ndarray


@dataclass(frozen=True)
class Written:
    """One block as it lies in a rank's file."""

    name: str
    shape: Shape
    dtype: str
    box: Box
    offset: int
    hashes: tuple[str, ...]


@dataclass(frozen=True)
class RankFile:
    """What one rank wrote: bytes of its file and the blocks in it. Ranks without elements write no file."""

    rank: int
    bytes: int
    blocks: tuple[Written, ...]


def save(folder: Path, step: int, blocks: Sequence[Block], state: dict[str, JSON], comm: Communicator) -> Path:
    """Write the checkpoint of `step` into `folder`; collective. Returns its path once it is safe on the disk.

    The blocks of all ranks must tile each tensor exactly. `state` (JSON, that of rank 0) is returned as it is by
    Checkpoint.state. A checkpoint of the same step is replaced. Where any rank fails, for a full disk for
    example, all raise the same CheckpointError and the checkpoints written before stay as they are.
    """
    tmp = on_first(comm, lambda: prepare(folder, step, state))
    try:
        files = on_all(comm, lambda: write_blocks(tmp, step, comm.rank, blocks))
        return on_first(comm, lambda: commit(tmp, step, state, files))
    except CheckpointError:
        if comm.rank == 0:
            shutil.rmtree(tmp, ignore_errors=True)  # gives the space back now; else the next save removes it
        raise


# --- the three parts -------------------------------------------------------------------------------------------------


def prepare(folder: Path, step: int, state: Mapping[str, JSON]) -> Path:
    """On rank 0: the empty folder to write into; leftovers of a crash are removed. Raises CheckpointError, OSError."""
    if not 0 <= step <= fmt.MAX_STEP:
        raise CheckpointError(f"{folder}: step {step} cannot be stored; use 0 to {fmt.MAX_STEP}")
    _check_state(folder, state)
    make_folder(folder)
    current = fmt.step_folders(folder)
    for path in sorted(folder.iterdir()):
        superseded = fmt.STEP_FOLDER.fullmatch(path.name) and path not in current
        if superseded or fmt.TMP_FOLDER.fullmatch(path.name):
            remove(path)
    tmp = folder / f"{fmt.step_name(step)}.tmp"
    tmp.mkdir()
    return tmp


def write_blocks(tmp: Path, step: int, rank: int, blocks: Sequence[Block]) -> RankFile:
    """On each rank: write `blocks` into this rank's file of `tmp`, hashed and synced. No communication.

    Raises CheckpointError for blocks that cannot be stored and for a file that cannot be written.
    """
    if tmp.name != f"{fmt.step_name(step)}.tmp":
        raise CheckpointError(f"{tmp}: rank {rank} saves step {step}; all ranks must save the same step")
    for block in blocks:
        _check_block(rank, block)
    offsets, size = _layout(blocks)
    if size == 0:
        return RankFile(rank, 0, tuple(_written(block, 0, ()) for block in blocks))
    written = []
    with new_file(tmp / fmt.rank_file(rank), size) as fd:
        for block, offset in zip(blocks, offsets, strict=True):
            hashes, at = [], offset
            for part in _parts(block.array):
                hashes.append(xxhash.xxh3_128_hexdigest(part))
                write_all(fd, part, at)
                at += part.nbytes
            written.append(_written(block, offset, tuple(hashes)))
    return RankFile(rank, size, tuple(written))


def commit(tmp: Path, step: int, state: Mapping[str, JSON], files: Sequence[RankFile]) -> Path:
    """On rank 0, after every rank has written: the manifest, then the final name. Returns the final path.

    Raises CheckpointError where the blocks do not tile their tensors; OSError.
    """
    manifest = _assemble(step, state, files)
    try:
        fmt.check(manifest)
    except CheckpointError as error:
        raise CheckpointError(f"{tmp}: {error}") from error
    raw = fmt.encode(manifest)
    with new_file(tmp / MANIFEST, len(raw)) as fd:
        write_all(fd, raw, 0)
    sync_folder(tmp)
    final = tmp.with_name(fmt.step_name(step))
    aside = tmp.with_name(f"{final.name}.replaced")
    if final.exists():
        # Never a moment without it: readers take the one set aside while nothing is in its place.
        remove(aside)
        os.rename(final, aside)
    os.rename(tmp, final)
    sync_folder(tmp.parent)
    remove(aside)
    return final


# --- details -----------------------------------------------------------------------------------------------------


def _check_state(folder: Path, state: Mapping[str, JSON]) -> None:
    for key, value in state.items():
        try:
            back = json.loads(json.dumps({key: value}, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{folder}: state {key!r} is not JSON: {error}") from error
        if back != {key: value}:
            raise CheckpointError(f"{folder}: state {key!r} changes in JSON; use lists, not tuples, and text as keys")


def _check_block(rank: int, block: Block) -> None:
    where = f"rank {rank}, tensor {block.name!r}"
    fmt.check_name(block.name)
    fmt.check_dtype(block.name, block.array.dtype.name)
    if len(block.box) != len(block.shape) or not contains(whole(block.shape), block.box):
        raise CheckpointError(f"{where}: box {block.box} is outside shape {block.shape}")
    if block.array.shape != extent(block.box):
        raise CheckpointError(f"{where}: array of shape {block.array.shape} for a box of {extent(block.box)}")


def _layout(blocks: Sequence[Block]) -> tuple[list[int], int]:
    offsets, end = [], 0
    for block in blocks:
        offsets.append(end)
        end += fmt.aligned(block.array.nbytes)
    return offsets, end


def _written(block: Block, offset: int, hashes: tuple[str, ...]) -> Written:
    shape = tuple(int(n) for n in block.shape)
    return Written(block.name, shape, block.array.dtype.name, block.box, offset, hashes)


def _parts(array: np.ndarray) -> Iterator[memoryview]:
    """The elements in C order, little-endian, the bytes of one hash block at a time; copies only where it must."""
    dtype = array.dtype.newbyteorder("<")
    ready = array.flags.c_contiguous and array.dtype == dtype
    for start, stop in fmt.hash_ranges(array.size, dtype.itemsize, HASH_BLOCK):
        if ready:
            part = array.reshape(-1)[start:stop]
        else:
            part, at = np.empty(stop - start, dtype), 0
            for piece in fmt.pieces(array.shape, start, stop):
                part[at : at + volume(piece)].reshape(extent(piece))[...] = array[piece]
                at += volume(piece)
        yield part.view(np.uint8).data


def _assemble(step: int, state: Mapping[str, JSON], files: Sequence[RankFile]) -> fmt.Manifest:
    kinds: dict[str, tuple[Shape, str, int]] = {}
    blocks: dict[str, list[StoredBlock]] = {}
    stored = [file for file in files if file.bytes]
    numbers = {file.rank: number for number, file in enumerate(stored)}
    for file in files:
        for block in file.blocks:
            shape, dtype, first = kinds.setdefault(block.name, (block.shape, block.dtype, file.rank))
            if (shape, dtype) != (block.shape, block.dtype):
                raise CheckpointError(
                    f"tensor {block.name!r} is {dtype} {shape} on rank {first}, "
                    f"but {block.dtype} {block.shape} on rank {file.rank}"
                )
            found = blocks.setdefault(block.name, [])
            if volume(block.box):
                start = tuple(int(s.start) for s in block.box)
                size = tuple(int(n) for n in extent(block.box))
                found.append(StoredBlock(numbers[file.rank], block.offset, start, size, block.hashes))
    return fmt.Manifest(
        format="hpctrain-checkpoint",
        version=1,
        step=step,
        hash_block=HASH_BLOCK,
        files=tuple(StoredFile(fmt.rank_file(file.rank), file.bytes) for file in stored),
        tensors={name: StoredTensor(kinds[name][0], kinds[name][1], tuple(blocks[name])) for name in kinds},
        state=dict(state),
    )
