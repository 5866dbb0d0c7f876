"""The demonstrations, whole, as the README offers them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import launching
import pytest
import runs


def demo(name: str, folder: Path, *words: str) -> dict[str, float]:
    """Run one demonstration on 4 ranks; the record of its last epoch."""
    command = [sys.executable, "-m", "hpctrain", "demo", name, "--folder", folder, *words]
    ended = launching.run(command, timeout=400)
    assert ended.status == 0, ended.stderr
    plan = json.loads((folder / "run-1" / "plan.json").read_text())
    assert plan["layers"]["conv1"] == {"batch": 2, "height" if name == "digits" else "depth": 2}
    record: dict[str, float] = runs.records(folder / "run-1", "epoch")[-1]
    return record


def test_digits_are_read(tmp_path: Path) -> None:
    record = demo("digits", tmp_path / "demo")
    print(f"test accuracy {record['test_accuracy']:.4f}")
    assert record["test_accuracy"] >= 0.97


@pytest.mark.slow
def test_spectra_of_volumes_are_read(tmp_path: Path) -> None:
    record = demo("volumes", tmp_path / "demo")
    print(f"mean squared error {record['test_loss']:.3f} of targets of variance 1")
    assert record["test_loss"] <= 0.2
