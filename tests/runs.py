"""Whole runs of `hpctrain train` from tests: a config, N ranks, and what the run folder holds afterwards."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import launching
import numpy as np

from hpctrain.checkpoint import newest
from hpctrain.partition import whole

CONFIG = """
[model]
name = "{model}"
[data]
train = "{data}/train"
test = "{data}/test"
[plan]
grid = {{ {grid} }}
[optim]
lr = 0.05
momentum = 0.9
weight_decay = 1e-4
schedule = {{ name = "cosine", warmup_epochs = 0.5 }}
[train]
epochs = {epochs}
batch = {batch}
precision = "float64"
backend = "reference"
[run]
folder = "{folder}"
"""


def write_config(
    path: Path,
    data: Path,
    folder: Path,
    grid: str = "batch = 1",
    epochs: int = 3,
    batch: int = 32,
    model: str = "lenet",
) -> Path:
    """A config file for a small run in float64; returns its path."""
    path.write_text(
        CONFIG.format(model=model, data=data, grid=grid, epochs=epochs, batch=batch, folder=folder), encoding="utf-8"
    )
    return path


def command(ranks: int, *words: str | Path) -> list[str]:
    """`hpctrain WORDS` on `ranks` ranks."""
    return [*launching.mpirun(ranks), sys.executable, "-m", "hpctrain", *map(str, words)]


def train(ranks: int, *words: str | Path, timeout: float = 120) -> launching.Finished:
    """`hpctrain train WORDS` on `ranks` ranks, to its end."""
    return launching.run(command(ranks, "train", *words), timeout)


def measuring(ranks: int, *words: str | Path, **environment: str) -> launching.Finished:
    """`hpctrain WORDS` on `ranks` ranks, which know nothing of this machine unless $HPCTRAIN_MACHINE is given."""
    environment.setdefault("HPCTRAIN_MACHINE", "/nonexistent/machine.json")
    return launching.run(command(ranks, *words), 120, launching.environment(**environment))


def results(ended: launching.Finished) -> list[dict[str, Any]]:
    """The records at the end of stdout, of a command that was given --json."""
    assert ended.status == 0, ended.stderr
    found: list[dict[str, Any]] = json.loads(ended.stdout.splitlines()[-1])["results"]
    return found


def records(folder: Path, event: str) -> list[dict[str, Any]]:
    """The records of one kind in a run's metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


def final_tensors(folder: Path) -> tuple[int, dict[str, np.ndarray]]:
    """(step, {name: whole tensor}) of a run's newest checkpoint."""
    checkpoint, refused = newest(folder / "checkpoints")
    assert checkpoint is not None, refused
    found = {}
    for name, (shape, dtype) in checkpoint.tensors.items():
        found[name] = np.empty(shape, dtype)
        checkpoint.read(name, whole(shape), found[name])
    return checkpoint.step, found
