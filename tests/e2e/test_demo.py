"""The demonstrations, whole, as the README offers them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import launching
import pytest
import runs


def demo(name: str, folder: Path) -> dict[str, float]:
    """Run one demonstration on 4 ranks; the record of its last epoch."""
    command = [sys.executable, "-m", "hpctrain", "demo", name, "--folder", folder]
    ended = launching.run(command, timeout=400)
    assert ended.status == 0, ended.stderr
    plan = json.loads((folder / "run-1" / "plan.json").read_text())
    assert plan["layers"]["conv1"] == {"batch": 2, "height" if name == "digits" else "depth": 2}
    record: dict[str, float] = runs.records(folder / "run-1", "epoch")[-1]
    return record


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The folder of the demonstration of digits, and the test accuracy that it ended with."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, demo("digits", folder)["test_accuracy"]


def test_digits_are_read(digits: tuple[Path, float]) -> None:
    print(f"test accuracy {digits[1]:.4f}")
    assert digits[1] >= 0.97


@pytest.mark.parametrize(
    "words", [["train.backend=reference"], ["train.precision=bf16", "memory.recompute=true"], ["train.exact=true"]]
)
def test_digits_are_read_as_well_otherwise(digits: tuple[Path, float], tmp_path: Path, words: list[str]) -> None:
    folder, accuracy = digits
    ended = runs.train(4, folder / "digits.toml", f"run.folder={tmp_path / 'run'}", *words, timeout=300)
    assert ended.status == 0, ended.stderr
    found = runs.records(tmp_path / "run", "epoch")[-1]["test_accuracy"]
    print(f"{' '.join(words)}: test accuracy {found:.4f}, by default {accuracy:.4f}")
    # of a few hundred images, each of which is right by chance or not: two standard deviations at 98 % of 360
    assert abs(found - accuracy) <= 0.015


@pytest.mark.slow
def test_spectra_of_volumes_are_read(tmp_path: Path) -> None:
    record = demo("volumes", tmp_path / "demo")
    print(f"mean squared error {record['test_loss']:.3f} of targets of variance 1")
    assert record["test_loss"] <= 0.2
