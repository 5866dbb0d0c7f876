"""Figures of a run: weighted sums over batches, and the JSON lines they end up in."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from hpctrain.errors import ConfigError


@dataclass
class Totals:
    """Sums over samples, of which the mean loss and score are quotients. `samples` leaves padding out."""

    loss: float = 0.0
    weight: float = 0.0
    score: float = 0.0
    samples: float = 0.0

    def add(self, other: Totals) -> None:
        """Add another's sums to these."""
        self.loss, self.weight, self.score, self.samples = (
            a + b for a, b in zip(astuple(self), astuple(other), strict=True)
        )

    def means(self, score: str, prefix: str = "") -> dict[str, float]:
        """{prefix + "loss": ..., prefix + score: ...}; NaN where nothing was counted."""
        weight = self.weight or float("nan")
        return {f"{prefix}loss": self.loss / weight, f"{prefix}{score}": self.score / weight}


class MetricsFile:
    """`metrics.jsonl` of a run: one object a line, with "event" and "step". Only rank 0 has one.

    All methods raise ConfigError where the file cannot be written (a full disk, say).
    """

    def __init__(self, path: Path, last_step: int) -> None:
        """Opens `path` for appending; lines of steps after `last_step` (done again after a resume) are dropped."""
        self.path = path
        with self._writing():
            kept = [line for line in _lines(path) if line.get("step", 0) <= last_step]
            partial = path.with_suffix(".tmp")
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            os.replace(partial, path)
            self._file = path.open("a", encoding="utf-8")

    def write(self, event: str, **fields: Any) -> None:
        """Append one record; NaN and infinity are written as null."""
        record = {key: None if isinstance(v, float) and v - v != 0 else v for key, v in fields.items()}
        with self._writing():
            self._file.write(json.dumps({"event": event, **record}) + "\n")

    def flush(self) -> None:
        """Hand what was written to the file system."""
        with self._writing():
            self._file.flush()

    def close(self) -> None:
        """Flush and close."""
        with self._writing():
            self._file.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"{self.path}: cannot be written: {error}; free space, or give another run.folder"
            ) from error


def _lines(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a last line cut short by a crash is left out."""
    found = []
    if path.exists():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                found.append(json.loads(text))
            except ValueError:
                break
    return found
