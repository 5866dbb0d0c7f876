"""Raw reads and writes of files: nothing ends with a short count, and every error names the path."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np

from hpctrain.durable import preallocate, sync_folder, write_all
from hpctrain.errors import DataError

IOV_MAX = 1024  # buffers that Linux takes in one preadv


def regular_size(path: Path) -> int:
    """Bytes of `path`.

    Raises DataError where it is missing or not a regular file (opening a FIFO would wait for ever).
    """
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; check the folder, or write the data set again") from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}: not a regular file; only regular files are read")
    return status.st_size


# --- writing -----------------------------------------------------------------------------------------------------


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError of the block into a DataError that names `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{path}: cannot write: {reason}; free space there or give another folder") from error


def create(path: Path, size: int) -> int:
    """Descriptor of a new file of `size` bytes, all reserved: a full disk shows here, not in the middle of the data."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        preallocate(fd, size)
    except BaseException:
        os.close(fd)
        path.unlink(missing_ok=True)
        raise
    return fd


def write_atomic(path: Path, data: bytes) -> None:
    """Puts `data` at `path` so that a reader finds all of it or the old file, whenever the machine stops.

    Raises DataError.
    """
    partial = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            fd = create(partial, len(data))
            try:
                write_all(fd, data, 0)
                os.fsync(fd)
            finally:
                os.close(fd)
            partial.rename(path)
            sync_folder(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


# --- reading -----------------------------------------------------------------------------------------------------


def as_bytes(array: np.ndarray) -> memoryview:
    """The bytes of a C-contiguous array, shared."""
    return array.reshape(-1).view(np.uint8).data


def read_runs(fd: int, offsets: np.ndarray, length: int, buffer: memoryview, places: np.ndarray) -> int:
    """Reads `length` bytes at each of `offsets` (int64, ascending) to each of `places` in `buffer`.

    Runs that touch in the file share one preadv. Returns the bytes read; raises EOFError(offset) at the end of the
    file.
    """
    apart = np.flatnonzero(np.diff(offsets) != length) + 1
    for start, stop in pairwise([0, *apart.tolist(), len(offsets)]):
        for i in range(start, stop, IOV_MAX):
            views = [buffer[at : at + length] for at in places[i : min(i + IOV_MAX, stop)].tolist()]
            offset = int(offsets[i])
            if os.preadv(fd, views, offset) < length * len(views):
                for k, view in enumerate(views):
                    _read_exactly(fd, view, offset + k * length)
    return length * len(offsets)


def _read_exactly(fd: int, view: memoryview, offset: int) -> None:
    while view:
        got = os.preadv(fd, [view], offset)
        if got == 0:
            raise EOFError(offset)
        view, offset = view[got:], offset + got
