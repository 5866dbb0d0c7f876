"""Files that are complete or reported: preallocated writes, exact reads, folders that survive a crash."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from hpctrain.durable import preallocate, sync_folder
from hpctrain.errors import CheckpointError


@contextmanager
def new_file(path: Path, size: int) -> Iterator[int]:
    """Descriptor of a new file of `size` bytes, on the disk when the context ends.

    Any OSError, a full disk above all, becomes a CheckpointError with path, bytes needed and bytes free.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            preallocate(fd, size)
            yield fd
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        usage = os.statvfs(path.parent)
        raise CheckpointError(
            f"{path}: cannot write {size} bytes, {usage.f_bavail * usage.f_frsize} are free: {error.strerror}; "
            "free space (quotas and limits count too), keep fewer checkpoints, or use another run folder"
        ) from error


def open_file(path: Path) -> int:
    """Descriptor to read a regular file: never a link that leads elsewhere, nor a pipe that blocks. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return fd


def read_at(fd: int, offset: int, nbytes: int) -> np.ndarray:
    """uint8 array (bytes,) of what the file holds at `offset`; shorter than `nbytes` where it ends. Raises OSError."""
    data = np.empty(nbytes, np.uint8)
    at = 0
    while at < nbytes:
        count = os.preadv(fd, [data[at:].data], offset + at)
        if count == 0:
            break
        at += count
    return data[:at]


def make_folder(path: Path) -> None:
    """Make `path` and its parents where they are missing, on the disk. Raises OSError."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a folder with its contents, or a file; a link itself, never what it leads to. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
