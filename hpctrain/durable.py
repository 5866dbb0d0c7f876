"""Bytes that reach the disk whole, or an OSError: what shards and checkpoints are both written with."""

from __future__ import annotations

import errno
import os
from pathlib import Path

NO_PREALLOCATION = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def preallocate(fd: int, size: int) -> None:
    """Make the file `size` bytes long, all reserved: a full disk shows here, not in the middle of the data."""
    try:
        if size:
            os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in NO_PREALLOCATION:
            raise
        os.ftruncate(fd, size)  # this file system cannot reserve space; the writes report when it runs out


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all bytes of `data` at `offset`."""
    view = memoryview(data)
    while view:
        # A disk that fills up gives a short count first, and no error until the next call.
        written = os.pwrite(fd, view, offset)
        if written == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        view, offset = view[written:], offset + written


def sync_folder(path: Path) -> None:
    """Bring names made, changed or removed in `path` to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
