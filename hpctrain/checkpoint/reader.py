"""Reading a checkpoint on any grid: by boxes, only the hash blocks that a box touches, each verified before use."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from hpctrain.checkpoint import format as fmt
from hpctrain.checkpoint.agree import Alone, Communicator, on_all, on_first
from hpctrain.checkpoint.format import MANIFEST, Manifest, StoredBlock
from hpctrain.checkpoint.storage import open_file, read_at
from hpctrain.errors import CheckpointError
from hpctrain.partition import Box, Shape, contains, extent, overlap, volume, whole, within

REMEDY = "restore the file, or use another checkpoint"


class Checkpoint:
    """An opened checkpoint: its manifest is verified, its payload is verified as it is read.

    `state` is the trainer's, as saved; `tensors` gives global shape and dtype by name.
    """

    path: Path
    step: int
    state: dict[str, Any]
    tensors: dict[str, tuple[Shape, np.dtype]]

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.step = manifest.step
        self.state = manifest.state
        self.tensors = {name: (t.shape, np.dtype(t.dtype)) for name, t in manifest.tensors.items()}
        self._layout: list[list[tuple[str, StoredBlock]]] = [[] for _ in manifest.files]  # by file, then offset
        for name, tensor in manifest.tensors.items():
            for block in tensor.blocks:
                self._layout[block.file].append((name, block))
        for blocks in self._layout:
            blocks.sort(key=lambda entry: entry[1].offset)

    def read(self, name: str, box: Box, out: np.ndarray) -> None:
        """Fill `out`, of the shape of `box` and the stored dtype, any strides, with the elements of the global `box`.

        CheckpointError names file, tensor and byte range of damaged data; `out` is then only partly filled.
        """
        self._check_request(name, box, out)
        for block in self.manifest.tensors[name].blocks:
            common = overlap(block.box, box)
            if common is not None and volume(common):
                self._read_block(name, block, within(box, block.box), out)

    def verify(self) -> None:
        """Read every byte. CheckpointError names the first file that is missing, of another size, or damaged."""
        for number in range(len(self.manifest.files)):
            self.verify_file(number)

    def verify_file(self, number: int) -> None:
        """As `verify`, for one of manifest.files."""
        stored = self.manifest.files[number]
        self._check_size(number)
        end = 0
        with _File(self.path, stored.name) as file:
            for name, block in self._layout[number]:
                file.expect_zeros(end, block.offset)
                for start, stop, digest in self._hash_blocks(name, block):
                    file.read_hashed(name, start, stop, digest)
                end = block.offset + block.nbytes(self._itemsize(name))
            file.expect_zeros(end, stored.bytes)

    def check_sizes(self) -> None:
        """CheckpointError unless every file is there and has the size that the manifest states."""
        for number in range(len(self.manifest.files)):
            self._check_size(number)

    def _check_request(self, name: str, box: Box, out: np.ndarray) -> None:
        where = f"{self.path}: tensor {name!r}"
        if name not in self.tensors:
            near = get_close_matches(name, self.tensors, n=1) or sorted(self.tensors)[:3]
            raise CheckpointError(f"{where} is not in it; was it written by another network? It has {', '.join(near)}")
        shape, dtype = self.tensors[name]
        if len(box) != len(shape) or not contains(whole(shape), box):
            raise CheckpointError(f"{where}: box {box} is outside the stored shape {shape}")
        if out.dtype != dtype or out.shape != extent(box):
            raise CheckpointError(
                f"{where}: stored as {dtype}, box of {extent(box)}; cannot be read into {out.dtype} {out.shape}"
            )

    def _check_size(self, number: int) -> None:
        stored = self.manifest.files[number]
        with _File(self.path, stored.name) as file:
            if (found := file.size()) != stored.bytes:
                raise CheckpointError(f"{self.path}: {stored.name} has {found} of {stored.bytes} bytes; {REMEDY}")

    def _read_block(self, name: str, block: StoredBlock, want: Box, out: np.ndarray) -> None:
        """Copy what `block` holds of `want`, a box in the block's own coordinates that may stick out of it."""
        dtype = self.tensors[name][1].newbyteorder("<")
        with _File(self.path, self.manifest.files[block.file].name) as file:
            for start, stop, digest in self._hash_blocks(name, block):
                first = (start - block.offset) // dtype.itemsize
                found = list(fmt.pieces(block.extent, first, first + (stop - start) // dtype.itemsize))
                if all(overlap(piece, want) is None for piece in found):
                    continue
                data, at = file.read_hashed(name, start, stop, digest).view(dtype), 0
                for piece in found:
                    if (hit := overlap(piece, want)) is not None:
                        source = data[at : at + volume(piece)].reshape(extent(piece))
                        out[within(hit, want)] = source[within(hit, piece)]
                    at += volume(piece)

    def _hash_blocks(self, name: str, block: StoredBlock) -> list[tuple[int, int, str]]:
        """(first byte, last byte + 1, hash) of each hash block of `block` in its file."""
        size, at = self._itemsize(name), block.offset
        ranges = fmt.hash_ranges(volume(block.box), size, self.manifest.hash_block)
        return [(at + a * size, at + b * size, h) for (a, b), h in zip(ranges, block.xxh3_128, strict=True)]

    def _itemsize(self, name: str) -> int:
        return self.tensors[name][1].itemsize


class _File:
    """One payload file while it is read; every OSError becomes a CheckpointError that names it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        try:
            self.fd = open_file(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder}: {name} cannot be read: {error.strerror}; {REMEDY}") from error

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def size(self) -> int:
        """Bytes in the file."""
        return os.fstat(self.fd).st_size

    def read_hashed(self, tensor: str, start: int, stop: int, digest: str) -> np.ndarray:
        """uint8 array (bytes,) of bytes start..stop, verified."""
        where = f"{self.folder}: {self.name}, tensor {tensor!r}, bytes {start} to {stop - 1}"
        data = self._read(where, start, stop)
        if xxhash.xxh3_128_hexdigest(data.data) != digest:
            raise CheckpointError(f"{where}: hash differs; {REMEDY}")
        return data

    def expect_zeros(self, start: int, stop: int) -> None:
        """Between blocks there are only zeros."""
        where = f"{self.folder}: {self.name}, padding, bytes {start} to {stop - 1}"
        if self._read(where, start, stop).any():
            raise CheckpointError(f"{where}: not zero; {REMEDY}")

    def _read(self, where: str, start: int, stop: int) -> np.ndarray:
        try:
            data = read_at(self.fd, start, stop - start)
        except OSError as error:
            raise CheckpointError(f"{where}: {error.strerror}; {REMEDY}") from error
        if data.size != stop - start:
            raise CheckpointError(f"{where}: the file ends after {start + data.size} bytes; {REMEDY}")
        return data


# --- finding one -----------------------------------------------------------------------------------------------------


def open_checkpoint(path: Path) -> Checkpoint:
    """Open the checkpoint folder `path`: manifest verified and checked, files present with the right sizes.

    Nothing in it is trusted. CheckpointError names what is wrong. The payload is verified as it is read.
    """
    path = Path(path)
    checkpoint = Checkpoint(path, fmt.decode(path, _read_manifest(path)))
    named = fmt.STEP_FOLDER.fullmatch(path.name)
    if named and int(named[1]) != checkpoint.step:
        raise CheckpointError(f"{path}: {MANIFEST} is of step {checkpoint.step}; give the folder its own name back")
    checkpoint.check_sizes()
    return checkpoint


def newest(folder: Path, comm: Communicator | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint with the highest step in `folder` that verifies completely, and a message per one refused.

    Collective over `comm` where given: the ranks share the reading, and all return the same.
    """
    comm = Alone() if comm is None else comm
    paths = on_first(comm, lambda: fmt.step_folders(Path(folder)))
    messages: list[str] = []
    for i, path in enumerate(paths):
        try:
            return open_verified(path, comm), messages
        except CheckpointError as error:
            last = path == paths[-1]
            messages.append(f"{error}; {'there is no older one' if last else f'falling back to {paths[i + 1].name}'}")
    return None, messages


def open_verified(path: Path, comm: Communicator) -> Checkpoint:
    """Open `path` and verify all of it; collective: rank r reads the files r, r + size, ...

    Every rank returns, or raises the same CheckpointError.
    """
    manifest = on_first(comm, lambda: open_checkpoint(path).manifest)
    checkpoint = Checkpoint(path, manifest)

    def verify_share() -> None:
        for number in range(comm.rank, len(manifest.files), comm.size):
            checkpoint.verify_file(number)

    on_all(comm, verify_share)
    return checkpoint


def _read_manifest(path: Path) -> bytes:
    try:
        fd = open_file(path / MANIFEST)
    except OSError as error:
        raise CheckpointError(f"{path}: {MANIFEST} cannot be read: {error.strerror}; {REMEDY}") from error
    try:
        size = os.fstat(fd).st_size
        if size > fmt.MAX_MANIFEST:
            raise CheckpointError(f"{path}: {MANIFEST} has {size} bytes, more than {fmt.MAX_MANIFEST}; {REMEDY}")
        return read_at(fd, 0, size).tobytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {MANIFEST} cannot be read: {error.strerror}; {REMEDY}") from error
    finally:
        os.close(fd)
