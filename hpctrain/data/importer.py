"""Turns NumPy files into a data set."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from operator import le
from pathlib import Path
from typing import Literal

import numpy as np
from msgspec import UNSET

from hpctrain.data.index import DTYPES, Index, Layout, Target, extents, read_index
from hpctrain.data.writer import PIECE_BYTES, SHARD_BYTES, Chunk, write_shards
from hpctrain.errors import DataError
from hpctrain.partition import Shape

Channels = Literal["last", "first", "none"]


def import_arrays(
    x_path: Path,
    y_path: Path | None,
    out_folder: Path,
    *,
    channels: Channels = "last",
    classes: int | None = None,
    ignore: int | None = None,
    names: tuple[str, ...] = (),
    like: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Index:
    """Writes a data set from x and y in .npy files (memory-mapped), or in one .npz with keys x and y (`y_path` None).

    x is (N, H, W, C) or (N, D, H, W, C) with `channels` "last"; "first" has C after N; "none" has no C and gets one
    channel. Integer y are labels, (N,) or one for each point of x, or of its middle, of `classes` classes (None: the
    largest + 1); label `ignore` counts for nothing, and need not be a class. Float y are values, (N,) or (N, K), which
    `names` may name. `like` is the folder of the training data when this is other data: its mean, std, classes and
    ignored label are taken. Sample ids count from 0. Raises DataError naming the file, and the sample where one is not
    finite or its label out of range.
    """
    x_path, y_source = Path(x_path), Path(y_path or x_path)
    x, y = _load_npz(x_path) if y_path is None else (_load_npy(x_path), _load_npy(y_source))
    for name, array, path in (("x", x, x_path), ("y", y, y_source)):
        if array.dtype.name not in DTYPES:
            raise DataError(f"{path}: {name} is {array.dtype}; convert it to one of {', '.join(DTYPES)}")
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y) or len(x) == 0:
        raise DataError(f"{x_path}: x is {x.shape}, and {y_source}: y is {y.shape}; give one y for every x")
    x = _channels_last(x, channels, x_path)
    labels = y.dtype.kind != "f"
    if labels and not _labels_fit(y.shape[1:], x.shape[1:-1]):
        raise DataError(
            f"{y_source}: labels are {y.shape}; give (N,) or one label for each point of x {x.shape[:-1]}, or of its "
            "middle where the network predicts no more"
        )
    if not labels and y.ndim == 1:
        y = y[:, None]
    if not labels and ignore is not None:
        raise DataError(
            f"{y_source}: y is {y.dtype}: values, not labels, so --ignore {ignore} says nothing; leave it out"
        )
    statistics = None
    if like is not None:
        training = read_index(Path(like))
        _require_same_kind(training, x, y, Path(like), x_path)
        statistics, classes = (training.mean, training.std), training.layout.classes
        ignore = _ignored_by(training, ignore, Path(like))
    if labels and classes is None:
        classes = _count_classes(y, ignore, y_source)
    targets = tuple(Target(name) for name in names)
    ignored = UNSET if ignore is None else ignore
    layout = Layout(x.shape[1:], x.dtype.name, y.shape[1:], y.dtype.name, classes, targets, ignored)
    if labels and layout.problem() is None:
        _require_classes(y, layout, y_source, like)
    chunks = _chunks(x, y, layout)
    return write_shards(out_folder, chunks, layout, len(x), shard_bytes=shard_bytes, statistics=statistics)


def _labels_fit(labels: Shape, positions: Shape) -> bool:
    """Whether there is one label, or a label for each position, or for those in the middle."""
    return labels == () or (len(labels) == len(positions) and all(map(le, labels, positions)))


def _channels_last(x: np.ndarray, channels: Channels, path: Path) -> np.ndarray:
    """A view (N, [D,] H, W, C) of x."""
    if x.ndim + (channels == "none") not in (4, 5):
        raise DataError(
            f"{path}: x is {x.shape} with channels = {channels!r}; give (N, H, W, C) or (N, D, H, W, C), or "
            "channels = 'none' for (N, H, W) or (N, D, H, W), or channels = 'first' for (N, C, H, W) or (N, C, D, H, W)"
        )
    return x[..., None] if channels == "none" else np.moveaxis(x, 1, -1) if channels == "first" else x


def _require_same_kind(training: Index, x: np.ndarray, y: np.ndarray, like: Path, path: Path) -> None:
    expected, found = training.layout, (x.shape[1:], y.shape[1:], y.dtype.kind == "f")
    if found != (expected.x_shape, expected.y_shape, expected.classes is None):
        raise DataError(
            f"{path}: samples are x {extents(found[0])}, y {extents(found[1])} {y.dtype}; the training data {like} has "
            f"x {extents(expected.x_shape)}, y {extents(expected.y_shape)} {expected.y_dtype}; give data of one kind"
        )


def _ignored_by(training: Index, ignore: int | None, like: Path) -> int | None:
    """The label that the training data ignore, which `ignore` must not contradict."""
    found = training.layout.ignore
    if ignore is not None and ignore != found:
        has = "no label" if found is UNSET else f"label {found}"
        raise DataError(f"--ignore {ignore}, but the training data {like} ignore {has}; import both with one --ignore")
    return None if found is UNSET else found


# --- labels ------------------------------------------------------------------------------------------------------


def _label_parts(y: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(number of its first sample, some labels), over all of y, which may be larger than memory."""
    step = max(1, PIECE_BYTES // max(1, y[0].nbytes))
    for start in range(0, len(y), step):
        yield start, y[start : start + step]


def _count_classes(y: np.ndarray, ignore: int | None, path: Path) -> int:
    """The largest label that is not ignored, + 1. Raises DataError where there is none."""
    kept = (part if ignore is None else part[part != ignore] for _, part in _label_parts(y))
    largest = max((int(part.max()) for part in kept if part.size), default=None)
    if largest is None:
        raise DataError(f"{path}: no label that counts for something; give the number of classes, --classes")
    return largest + 1


def _require_classes(y: np.ndarray, layout: Layout, path: Path, like: Path | None) -> None:
    """Raises DataError on a label that is neither a class nor ignored, saying what would admit it."""
    for start, part in _label_parts(y):
        wrong = layout.wrong_labels(part)
        if not wrong.any():
            continue
        sample, label = start + int(wrong.reshape(len(part), -1).any(axis=1).argmax()), int(part[wrong][0])
        limit = f"--classes {layout.classes}" if like is None else f"{like} has {layout.classes} classes"
        ways = [f"--classes {label + 1}"] if label >= 0 else []
        if layout.ignore is UNSET:
            ways.append(f"--ignore {label} if it is to count for nothing")
        give = "give" if like is None else "import both with"
        remedy = f"{give} {', or '.join(ways)}" if ways else f"mend it, as --ignore {layout.ignore} is for one label"
        raise DataError(
            f"{path}: label {label} of sample {sample}, but {limit if label >= 0 else 'labels count from 0'}; {remedy}"
        )


def _chunks(x: np.ndarray, y: np.ndarray, layout: Layout) -> Iterator[Chunk]:
    step = max(1, PIECE_BYTES // layout.x_bytes)
    for start in range(0, len(x), step):
        part = slice(start, min(start + step, len(x)))
        ids = np.arange(part.start, part.stop, dtype=np.int64)
        yield np.asarray(x[part], layout.x_dtype), np.asarray(y[part], layout.y_dtype), ids


# --- NumPy files -------------------------------------------------------------------------------------------------


def _load_npy(path: Path) -> np.ndarray:
    with _reading(path):
        return np.lib.format.open_memmap(path, mode="r")  # never unpickles


def _load_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with _reading(path), open(path, "rb") as file:
        archive = np.load(file, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise ValueError("a single array, and no second file for y")
        if missing := {"x", "y"} - set(archive.files):
            raise ValueError(f"no key {min(missing)!r}, only {', '.join(archive.files) or 'none'}")
        return archive["x"], archive["y"]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path}: not usable: {error}; give .npy files of plain numbers, or an .npz with x and y"
        ) from error
