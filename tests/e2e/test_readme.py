"""What the README and examples/ show works as it stands there."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import launching
import numpy as np
import pytest
import runs

from hpctrain.comm import allreduce
from hpctrain.data.make.digits import make_digits

ROOT = Path(__file__).parents[2]


def block(language: str, holds: str) -> str:
    """The one code block of the README in `language` that holds a text."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    (text,) = (text for text in found if holds in text)
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/train, data/test, and run.toml as the README has it."""
    folder = tmp_path_factory.mktemp("readme")
    make_digits(folder / "data")
    (folder / "run.toml").write_text(block("toml", "run.toml"))
    return folder


def test_commands_of_the_readme(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    ended = launching.run(runs.command(4, "train", "run.toml", "train.steps=3"), timeout=60, cwd=tmp_path)
    assert ended.status == 0, ended.stderr
    (line,) = (line for line in block("sh", "--resume").splitlines() if "--resume" in line)
    words = line.split("#")[0].replace("'", "").split("hpctrain train ")[1].split()
    assert words == ["--resume", "runs/run", "plan.grid={channel=2}"]
    ended = launching.run(runs.command(2, "train", *words, "train.steps=5"), timeout=60, cwd=tmp_path)
    assert ended.status == 0, ended.stderr
    assert [record["step"] for record in runs.records(tmp_path / "runs" / "run", "step")] == [1, 2, 3, 4, 5]


def test_import_of_the_readme(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("images.npy", "more.npy"):
        np.save(tmp_path / name, rng.random((9, 13, 11, 3), np.float32))
    for name in ("labels.npy", "more_labels.npy"):
        np.save(tmp_path / name, np.arange(9) % 4)
    lines = [line.split("#")[0].split() for line in block("sh", "data import").splitlines() if "data import" in line]
    assert len(lines) == 2
    for _, *words in lines:
        ended = launching.run(runs.command(1, *words), timeout=60, cwd=tmp_path)
        assert ended.status == 0, ended.stderr
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["test", "train"]


def test_networks_of_the_readme_and_of_examples(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(block("python", "def build"))
    for net in (tmp_path / "net.py", ROOT / "examples" / "net.py"):
        losses = []
        for ranks, grid in ((1, "{batch=1}"), (4, "{height=2,channel=2}")):
            run = tmp_path / f"{net.parent.name}-{ranks}"
            words = [f"model.name={net}:build", f"plan.grid={grid}", f"run.folder={run}", "model.options.filters=4"]
            words += ["train.steps=3", "train.batch=10", "train.precision=float64", "train.backend=reference"]
            ended = launching.run(runs.command(ranks, "train", "run.toml", *words), timeout=60, cwd=folder)
            assert ended.status == 0, ended.stderr
            losses.append([record["loss"] for record in runs.records(run, "step")])
        assert len(losses[0]) == 3
        np.testing.assert_allclose(*losses, rtol=1e-10)


def test_plan_of_the_readme(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "net.py").write_text(block("python", "def build"))
    (tmp_path / "plan.json").write_text(block("json", "version"))
    net = "model.name=net.py:build"
    ended = launching.run(runs.command(4, "verify", "run.toml", net, "--plan", "plan.json"), timeout=60, cwd=tmp_path)
    assert ended.status == 0, ended.stdout + ended.stderr
    first, second = block("sh", "--plan-out").splitlines()
    words = first.split()[1:]
    ended = launching.run([sys.executable, "-m", "hpctrain", *words, net], timeout=60, cwd=tmp_path)
    assert ended.status == 0, ended.stderr
    words = second.split("hpctrain ")[1].split()
    ended = launching.run(runs.command(4, *words, net, "train.steps=2"), timeout=60, cwd=tmp_path)
    assert ended.status == 0, ended.stderr
    asked, kept = (json.loads((tmp_path / name).read_text()) for name in ("plan.json", "runs/run/plan.json"))
    assert asked.pop("allreduce") is None
    assert set(kept.pop("allreduce").values()) <= set(allreduce.TABLE), "what was chosen"
    assert kept == asked
