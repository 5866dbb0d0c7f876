"""Figures of a run: weighted sums over batches, and the JSON lines they end up in."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from typing import Any

from hpctrain.errors import ConfigError
from hpctrain.layers.loss import COLUMNS, WEIGHT, Loss

_NOTHING = [0.0] * COLUMNS


@dataclass
class Totals:
    """Sums over samples, of which mean losses and scores are quotients. `samples` leaves padding out.

    `sums` are, by loss layer, those of its columns LOSS, WEIGHT, SCORE and COUNT.
    """

    sums: dict[str, list[float]] = field(default_factory=dict)
    samples: float = 0.0

    def add(self, other: Totals) -> None:
        """Add another's sums to these."""
        for name, more in other.sums.items():
            self.sums[name] = [a + b for a, b in zip(self.sums.get(name, _NOTHING), more, strict=True)]
        self.samples += other.samples

    def shares(self, losses: Mapping[str, Loss]) -> dict[str, float]:
        """By loss layer, the factor of its summed loss in the total: scale / weight, and 0 where nothing has weight."""
        weights = {name: self.sums.get(name, _NOTHING)[WEIGHT] for name in losses}
        return {name: layer.scale / weights[name] if weights[name] else 0.0 for name, layer in losses.items()}

    def means(self, losses: Mapping[str, Loss], prefix: str = "") -> dict[str, float]:
        """{prefix + "loss": total, prefix + score: ...} of one loss; NaN where nothing was counted.

        Of several also "<layer>.loss", not scaled, and "<layer>.<score>" in place of the score. A loss without weight
        adds nothing to the total.
        """
        total, counted, found = 0.0, False, {f"{prefix}loss": nan}
        for name, layer in losses.items():
            loss, weight, score, count = self.sums.get(name, _NOTHING)
            if weight:
                total, counted = total + layer.scale * loss / weight, True
            if len(losses) > 1:
                found[f"{prefix}{name}.loss"] = loss / weight if weight else nan
            label = layer.score if len(losses) == 1 else f"{name}.{layer.score}"
            found[f"{prefix}{label}"] = score / count if count else nan
        return found | ({f"{prefix}loss": total} if counted else {})


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
