"""Commands that start ranks, or run on several: what a person sees, and how they end."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import launching
import pytest

from hpctrain.data.make.digits import make_digits

HPCTRAIN = [sys.executable, "-m", "hpctrain"]

CONFIG = """\
[model]
name = "lenet"
[data]
train = "nowhere"
[plan]
grid = {batch = 2, height = 2}
[optim]
lr = 0.03
[train]
epochs = 1
batch = 16
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config for 4 ranks, of data that is not there."""
    path = tmp_path / "net.toml"
    path.write_text(CONFIG)
    return path


def test_too_few_ranks(config: Path, tmp_path: Path) -> None:
    make_digits(tmp_path)
    config.write_text(config.read_text().replace("nowhere", str(tmp_path / "train")))
    ended = launching.run([*launching.mpirun(2), *HPCTRAIN, "train", config], timeout=60)
    assert ended.status == 2
    assert ended.stderr.count("plan.grid: batch=2 x height=2 needs 4 ranks, but 2 were started") == 1
    assert re.search(rf"^.*mpirun.* -n 4 .*train {config}$", ended.stderr, re.M)


def test_misspelt_key_on_several_ranks(config: Path) -> None:
    ended = launching.run([*launching.mpirun(2), *HPCTRAIN, "train", config, "train.epoch=3"], timeout=60)
    assert ended.status == 2
    assert ended.stderr.count("command line: train.epoch = 3: no such key; did you mean train.epochs?") == 1
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("grid", ["{batch=2}", "{batch=4}"])
def test_missing_data_on_several_ranks(config: Path, grid: str) -> None:
    """On too few ranks too: more of them would not mend it."""
    ended = launching.run([*launching.mpirun(2), *HPCTRAIN, "train", config, f"plan.grid={grid}"], timeout=60)
    assert ended.status == 2
    assert ended.stderr.count("hpctrain: error: ") == 1
    assert "nowhere" in ended.stderr


@pytest.mark.parametrize("name", ["digits", "volumes"])
def test_demo_trains_and_its_advice_can_be_pasted(name: str, tmp_path: Path) -> None:
    command = [*HPCTRAIN, "demo", name, "--quick", "--ranks", "2", "--folder", tmp_path / "a b"]
    ended = launching.run(command, timeout=120)
    assert ended.status == 0, ended.stderr
    assert not re.search(r"[\x1b\r]", ended.stdout + ended.stderr)
    run = tmp_path / "a b" / "run-1"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records if record["event"] == "epoch"] == [1]
    advice = [line for line in ended.stdout.splitlines() if re.search(r"\bhpctrain (train|data) ", line)]
    assert len(advice) == 3
    for line in advice:
        pasted = launching.run(["bash", "-c", line.replace("train.epochs=20", "train.epochs=2")], timeout=120)
        assert pasted.status == 0, f"{line}\n{pasted.stderr}"
    assert (tmp_path / "a b" / "run-1-batch2" / "plan.json").exists()
    again = launching.run([*HPCTRAIN, "train", "--resume", run, "--dry-run"], timeout=60)
    assert f"folder = {json.dumps(str(run))}" in again.stdout
    assert shlex.join(["train", "--resume", str(run)]) in again.stdout
