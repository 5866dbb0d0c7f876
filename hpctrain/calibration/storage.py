"""How fast samples come in and checkpoints go out, on all ranks at once."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from hpctrain.comm.world import all_ranks
from hpctrain.config import Config
from hpctrain.data.dataset import Dataset
from hpctrain.data.loader import Loader
from hpctrain.data.order import Batches
from hpctrain.durable import write_all
from hpctrain.errors import ConfigError
from hpctrain.machine import Storage
from hpctrain.partition import extent, split, whole
from hpctrain.precision import TYPES, exact

if TYPE_CHECKING:
    from mpi4py import MPI

BATCHES = 5
"""Batches read, and files written."""

NBYTES = 16 << 20
"""Of a file."""


def measure(comm: MPI.Intracomm, config: Config, data: Dataset) -> Storage:
    """Bytes per second of the slowest rank: of inputs, as numbers of the run's type, and of files. Collective."""
    reading = writing = 0.0
    with all_ranks(comm):
        nbytes, reading = _read(config, data, comm.rank, comm.size)
        writing = _write(Path(config.run.folder))
    every = comm.allgather((nbytes / reading if nbytes else float("inf"), NBYTES / writing))
    read, write = (min(rates) for rates in zip(*every, strict=True))
    return Storage(read, write)


def _read(config: Config, data: Dataset, rank: int, ranks: int) -> tuple[int, float]:
    """Bytes of this rank's samples of a batch, and the median of the seconds that they take."""
    dtype = exact(TYPES[config.train.precision])
    batches = Batches(data.samples, config.train.part, config.train.seed)
    mine = slice(*split(batches.size, ranks, rank))
    boxes = [(mine, *whole(shape)) for shape in (data.x_shape, data.y_shape)]
    x = np.empty(extent(boxes[0]), dtype)
    y = np.empty(extent(boxes[1]), dtype if data.classes is None else np.int64)
    loader, taken = Loader(data, batches, *boxes), []
    for step in range(1 + BATCHES):
        begin = perf_counter()
        loader.load(0, step % batches.steps, x, y)
        taken.append(perf_counter() - begin)
    return (x.size + y.size) * dtype.itemsize, median(taken[1:])


def _write(folder: Path) -> float:
    """Median seconds of a file in the run's folder, or what there is of it, until it is on the disk."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    block, taken = memoryview(bytes(NBYTES)), []
    try:
        with tempfile.TemporaryFile(dir=there, buffering=0) as file:
            for _ in range(BATCHES):
                begin = perf_counter()
                write_all(file.fileno(), block, 0)
                os.fsync(file.fileno())
                taken.append(perf_counter() - begin)
    except OSError as error:
        raise ConfigError(f"run.folder: {there} cannot be written ({error}); name a folder of yours") from None
    return median(taken)
