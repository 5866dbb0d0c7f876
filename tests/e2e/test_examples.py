"""What examples/ shows runs as it stands there, and learns."""

from __future__ import annotations

import shutil
from pathlib import Path

import launching
import numpy as np
import pytest
import runs

EXAMPLES = Path(__file__).parents[2] / "examples"


def commands(config: Path) -> list[list[str]]:
    """The words after "hpctrain" of the commands in the comments at the head of a config."""
    lines = [line for line in config.read_text(encoding="utf-8").splitlines() if line.startswith("#   ")]
    return [line.split("hpctrain ")[1].split() for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of examples/ with the data that net.toml says how to make."""
    folder = tmp_path_factory.mktemp("copy") / "examples"
    shutil.copytree(EXAMPLES, folder, ignore=shutil.ignore_patterns("data", "runs", "__pycache__"))
    make, _ = commands(folder / "net.toml")
    assert make == ["data", "make", "digits", "data"]
    ended = launching.run(runs.command(1, *make), timeout=60, cwd=folder)
    assert ended.status == 0, ended.stderr
    return folder


def test_network_of_ones_own_learns_the_digits(folder: Path) -> None:
    _, train = commands(folder / "net.toml")
    assert train == ["train", "net.toml"]
    ended = launching.run(runs.command(2, *train), timeout=120, cwd=folder)
    assert ended.status == 0, ended.stderr
    accuracy = [record["test_accuracy"] for record in runs.records(folder / "runs" / "net", "epoch")]
    print(f"accuracy by epoch: {accuracy}")
    assert len(accuracy) == 3
    assert accuracy[-1] > 0.8  # chance is 0.1


def test_network_of_ones_own_is_the_same_on_every_grid(folder: Path) -> None:
    """Its dropout too."""
    _, train = commands(folder / "net.toml")
    losses: list[list[float]] = []
    for ranks, grid in ((1, "{batch=1}"), (3, "{width=3}"), (4, "{channel=2,contraction=2}")):
        name = f"run-{len(losses)}"
        words = [f"plan.grid={grid}", f"run.folder={name}", "train.steps=3", "train.batch=11"]
        words += ["train.precision=float64", "train.backend=reference"]
        ended = launching.run(runs.command(ranks, *train, *words), timeout=60, cwd=folder)
        assert ended.status == 0, ended.stderr
        losses.append([record["loss"] for record in runs.records(folder / name, "step")])
    assert len(losses[0]) == 3
    for other in losses[1:]:
        np.testing.assert_allclose(other, losses[0], rtol=1e-10)
