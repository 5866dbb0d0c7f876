"""What bad input gets: all ranks leave with status 2, and one message names file or key, the value, and the remedy."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import data_cases
import h5py
import launching
import numpy as np
import pytest
import runs

from hpctrain.data.dataset import Dataset


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ and test/: 23 images of 17 x 15 x 1, four classes."""
    folder = tmp_path_factory.mktemp("data")
    for part, seed in (("train", 0), ("test", 1)):
        data_cases.write(folder / part, np.random.default_rng(seed), x_shape=(17, 15, 1), dtype="float32")
    return folder


def first_shard(data: Path) -> Path:
    return sorted((data / "train").glob("*.h5"))[0]


def truncate(data: Path) -> None:
    os.truncate(first_shard(data), first_shard(data).stat().st_size - 100)


def remove(data: Path) -> None:
    first_shard(data).unlink()


def point_elsewhere(data: Path) -> None:
    """A shard whose x is an external link to another file."""
    with h5py.File(first_shard(data), "r+") as file:
        del file["x"]
        file["x"] = h5py.ExternalLink("/etc/passwd", "/x")


def overwrite(data: Path, field: str, sample: int, value: np.ndarray) -> None:
    """Put `value` at the start of one field of a sample of the first shard, in place."""
    shard = Dataset(data / "train").shards[0]
    stored = getattr(shard, field)
    with open(shard.path, "r+b") as file:
        file.seek(stored.offset + sample * stored.sample_bytes)
        file.write(value.tobytes())


def label_out_of_range(data: Path) -> None:
    overwrite(data, "y", 3, np.array([4]))


def not_a_number(data: Path) -> None:
    overwrite(data, "x", 5, np.array([np.nan], np.float32))


def bit_flip(data: Path) -> None:
    overwrite(data, "x", 4, np.array([1e-3], np.float32))


@dataclass(frozen=True)
class Case:
    """What is wrong, and what the message must hold."""

    says: tuple[str, ...]
    spoil: Callable[[Path], None] = lambda data: None
    words: tuple[str, ...] = ()
    grid: str = "batch = 2"
    model: str = "lenet"


CASES = {
    "misspelt key": Case(
        ("optim.momentun", "did you mean optim.momentum", "command line"), words=("optim.momentun=0.9",)
    ),
    "unknown section": Case(("trian", "train"), words=("trian.epochs=3",)),
    "value of the wrong kind": Case(("train.epochs", '"many"', "whole number"), words=("train.epochs=many",)),
    "grid too large": Case(("needs 6 ranks", "2 were started", "mpirun -n 6"), grid="batch = 3, height = 2"),
    "axis that no layer has": Case(("depth", "= 2", "height"), grid="depth = 2"),
    "unknown network": Case(("model.name", "lenett", "lenet"), model="lenett"),
    "network file missing": Case(("no Python file", "absent.py"), model="absent.py:build"),
    "unknown option of a network": Case(("model.options.depth", "no options"), words=("model.options.depth=3",)),
    "samples that do not fit": Case(
        ("train", "(17, 15, 1)", "layer conv", "window of 19", "input of 17"), model="fit.py:build"
    ),
    "fewer outputs than classes": Case(("label 3", "3 outputs", "sample"), model="few.py:build"),
    "batch larger than the data": Case(("batch = 64", "23 samples"), words=("train.batch=64",)),
    "data folder missing": Case(("nowhere", "index.json"), words=("data.train=nowhere",)),
    "missing shard": Case((".h5",), remove),
    "truncated shard": Case((".h5", "truncated", "restore it"), truncate),
    "hostile shard": Case((".h5", "x", "link"), point_elsewhere),
    "label out of range": Case(("label", "0 to 3", "sample 3"), label_out_of_range),
    "sample that is not finite": Case(("not finite", "step 1", "sample", "NaN"), not_a_number),
    "loss that is not finite": Case(("not finite", "optim.lr"), words=("optim.lr=1e200",)),
    "bit flip in a shard": Case(("shard-00000.h5", "tile 0", "samples"), bit_flip, ("data.verify=true",)),
    "network of other inputs": Case(
        ("inputs x (20, 5)", "x (20, 17, 15, 1)", "fit each other"), model="other.py:build"
    ),
    "labels as numbers": Case(("layer loss", "y holds numbers", "integer=True"), model="floats.py:build"),
    "option of the wrong kind": Case(("model.options", "mlp", "int"), words=("model.options.hidden=5",), model="mlp"),
    "network that is none": Case(("none.py:build", "returned NoneType", "Graph"), model="none.py:build"),
    "plan file missing": Case(("none.json", "read"), words=("plan.grid=none.json",)),
}

NETS = {
    "fit.py": """
from hpctrain.layers import BatchNorm, Conv
from hpctrain.models import finish, start
def build(batch, sample):
    net, x = start(batch, sample)
    x = net.add("norm3", BatchNorm(), x)
    net.add("conv", Conv(4, kernel=19), x)
""",
    "other.py": """
from hpctrain.layers import Dense
from hpctrain.models import Sample, finish, start
def build(batch, sample):
    net, x = start(batch, Sample((5,), sample.classes))
    return finish(net, net.add("out", Dense(4), x), sample)
""",
    "floats.py": """
from hpctrain.layers import Dense, Flatten, SoftmaxCrossEntropy
from hpctrain.models import start
def build(batch, sample, **options):
    net, x = start(batch, sample)
    x = net.add("out", Dense(4), net.add("flatten", Flatten(), x))
    net.add("loss", SoftmaxCrossEntropy(), x, net.input("y", (batch,)))
    return net
""",
    "none.py": """
def build(batch, sample):
    pass
""",
    "few.py": """
from hpctrain.layers import Dense, Flatten
from hpctrain.models import finish, start
def build(batch, sample):
    net, x = start(batch, sample)
    x = net.add("out", Dense(3), net.add("flatten", Flatten(), x))
    return finish(net, x, sample)
""",
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, source: Path, tmp_path: Path) -> None:
    case = CASES[name]
    data = tmp_path / "data"
    shutil.copytree(source, data)
    case.spoil(data)
    for file, text in NETS.items():
        (tmp_path / file).write_text(text)
    config = runs.write_config(
        tmp_path / "run.toml", data, tmp_path / "run", case.grid, epochs=3, batch=20, model=case.model
    )
    command = runs.command(2, "train", config, *case.words)
    ended = launching.run(command, timeout=60, cwd=tmp_path)
    assert ended.status == 2, ended.stderr
    message = ended.stderr
    assert message.count("hpctrain: error:") == 1, message
    assert "Traceback" not in message
    missing = [part for part in case.says if part not in message.replace("\n", " ")]
    assert not missing, f"{missing} not in: {message}"


def test_sample_that_is_not_finite_can_be_skipped(source: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(source, data)
    not_a_number(data)
    config = runs.write_config(tmp_path / "run.toml", data, tmp_path / "run", "height = 2", batch=5, epochs=1)
    ended = runs.train(2, config, "train.nonfinite=skip", "data.normalize=false")
    assert ended.status == 0, ended.stderr
    assert ended.stderr.count("; skipped") == 1
    losses = [record["loss"] for record in runs.records(tmp_path / "run", "step")]
    assert len(losses) == 4
    assert losses.count(None) == 1
    assert all(np.isfinite(tensor).all() for tensor in runs.final_tensors(tmp_path / "run")[1].values())


def test_more_than_one_rank_without_a_launcher(source: Path, tmp_path: Path) -> None:
    config = runs.write_config(tmp_path / "run.toml", source, tmp_path / "run", "batch = 2")
    ended = launching.run([sys.executable, "-m", "hpctrain", "train", config], timeout=60)
    assert ended.status == 2
    assert "needs 2 ranks" in ended.stderr
    assert "mpirun -n 2" in ended.stderr


def test_heading_of_a_run_fits_every_terminal(source: Path, tmp_path: Path) -> None:
    grid = "height = 2, contraction = 2"
    config = runs.write_config(tmp_path / "run.toml", source, tmp_path / "run", grid, epochs=1, batch=20)
    ended = runs.train(4, config, "train.backend=native", "train.precision=float32", "train.steps=1")
    assert ended.status == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert re.match(r"4 ranks of \d+ threads?, grid height=2 x contraction=2; ", lines[0])
    assert any(" -> " in line for line in lines)
    assert max(len(line) for line in lines if str(tmp_path) not in line) < 80


def test_plan_that_does_not_fit_names_its_file(source: Path, tmp_path: Path) -> None:
    config = runs.write_config(tmp_path / "run.toml", source, tmp_path / "run", "batch = 1", batch=20)
    plan = tmp_path / "plan.json"
    command = [sys.executable, "-m", "hpctrain", "train", config, "--dry-run"]
    assert launching.run([*command, "--plan-out", plan], timeout=60).status == 0
    good = json.loads(plan.read_text())
    for layers, says in (
        ({"fc3": None}, 'no partition for layer fc3; add "fc3": {} (one rank)'),
        ({"fc3": None, "fc33": {}}, "no layer fc33 in this network of 15 layers; did you mean fc3?"),
        ({"relu1": {"contraction": 2}}, "layer relu1: contraction=2 cuts nothing of it"),
        ({"conv2": {"height": 20}}, "layer conv2 (Conv"),
    ):
        cuts = {name: cut for name, cut in (good["layers"] | layers).items() if cut is not None}
        plan.write_text(json.dumps(good | {"layers": cuts}))
        ended = launching.run([*command, f"plan.grid={plan}"], timeout=60)
        assert ended.status == 2
        assert f"hpctrain: error: {plan}: {says}" in ended.stderr


def test_idle_ranks_are_mentioned(source: Path, tmp_path: Path) -> None:
    config = runs.write_config(tmp_path / "run.toml", source, tmp_path / "run", "batch = 2", epochs=1, batch=20)
    ended = runs.train(3, config)
    assert ended.status == 0, ended.stderr
    assert "uses 2 of 3 ranks" in ended.stderr


@pytest.fixture
def finished(source: Path, tmp_path: Path) -> Path:
    """The folder of a run that ended, with two checkpoints."""
    config = runs.write_config(tmp_path / "run.toml", source, tmp_path / "run", "batch = 2", batch=10, epochs=2)
    ended = runs.train(2, config)
    assert ended.status == 0, ended.stderr
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 2
    return tmp_path / "run"


def newest_file(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step-*/rank-*.bin"))[-1]


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [flip_a_bit, lambda path: os.truncate(path, 64)], ids=["bit flip", "truncated"])
def test_damaged_checkpoint_falls_back_and_says_so(finished: Path, damage: Callable[[Path], None]) -> None:
    path = newest_file(finished)
    damage(path)
    ended = runs.train(2, "--resume", finished)
    assert ended.status == 0, ended.stderr
    said = ended.stdout + ended.stderr
    assert path.parent.name in said
    assert path.name in said
    assert "step-000000000002 at step 2" in said
    assert runs.final_tensors(finished)[0] == 4


def test_all_checkpoints_damaged(finished: Path) -> None:
    for path in (finished / "checkpoints").glob("step-*/MANIFEST.json"):
        path.write_text("{}")
    ended = runs.train(2, "--resume", finished)
    assert ended.status == 2
    assert "no usable checkpoint" in ended.stderr
    assert "MANIFEST.json" in ended.stderr


def test_finished_run_is_not_overwritten(finished: Path) -> None:
    ended = runs.train(2, finished.with_suffix(".toml"))
    assert ended.status == 2
    assert f"--resume {finished}" in ended.stderr


def test_resuming_with_other_mathematics_is_refused(finished: Path) -> None:
    ended = runs.train(2, "--resume", finished, "train.batch=5")
    assert ended.status == 2
    assert "another config" in ended.stderr


def test_resuming_with_another_rate_says_so(finished: Path) -> None:
    ended = runs.train(2, "--resume", finished, "optim.lr=0.01", "train.epochs=3")
    assert ended.status == 0, ended.stderr
    assert "changed since then: optim.lr = 0.05 -> 0.01" in ended.stdout
    assert "changed since then: train.epochs = 2 -> 3" in ended.stdout
    assert runs.final_tensors(finished)[0] == 6


def test_resuming_a_finished_run_changes_nothing(finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    for _ in range(2):
        assert runs.train(2, "--resume", finished, "checkpoint.every_steps=2").status == 0
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_every_steps_saves_between_and_at_the_ends_of_epochs(source: Path, tmp_path: Path) -> None:
    config = runs.write_config(tmp_path / "run.toml", source, tmp_path / "run", "batch = 2", batch=5, epochs=2)
    words = ["checkpoint.every_steps=2", "checkpoint.every_epochs=0", "checkpoint.keep=9"]
    assert runs.train(2, config, *words).status == 0
    saved = sorted(path.name[-2:] for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == ["02", "04", "06", "08"]
    assert runs.train(2, "--resume", tmp_path / "run", *words).status == 0
    assert [record["step"] for record in runs.records(tmp_path / "run", "epoch")] == [4, 8]


def test_run_of_few_steps_reports_and_evaluates(source: Path, tmp_path: Path) -> None:
    config = runs.write_config(tmp_path / "run.toml", source, tmp_path / "run", "batch = 2", batch=5, epochs=2)
    ended = runs.train(2, config, "train.steps=3", "--json")
    assert ended.status == 0, ended.stderr
    (record,) = json.loads(ended.stdout.splitlines()[-1])["results"]
    assert (record["epoch"], record["step"]) == (0, 3)
    assert record["test_loss"] > 0


def test_test_sample_that_is_not_finite_is_named(source: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(source, data)
    stored = Dataset(data / "test").shards[0]
    with open(stored.path, "r+b") as file:
        file.seek(stored.x.offset + 2 * stored.x.sample_bytes)
        file.write(np.array([-np.inf], np.float32).tobytes())
    bad = Dataset(data / "test").sample_ids(np.array([2]))[0]
    config = runs.write_config(tmp_path / "run.toml", data, tmp_path / "run", "batch = 2", batch=5, epochs=1)
    ended = runs.train(2, config)
    assert ended.status == 2
    assert f"evaluation after step 4: not finite: {data}/test: NaN or infinity in sample {bad};" in ended.stderr
    ended = runs.train(2, config, "train.nonfinite=skip", "--json", "--resume")
    assert ended.status == 0, ended.stderr
    assert f"infinity in sample {bad};" in ended.stderr
    assert "NaN" not in ended.stdout.splitlines()[-1]


def test_run_of_which_every_step_is_skipped_ends(source: Path, tmp_path: Path) -> None:
    config = runs.write_config(tmp_path / "run.toml", source, tmp_path / "run", "batch = 2", batch=5, epochs=3)
    ended = runs.train(2, config, "train.nonfinite=skip", "optim.lr=1e200")
    assert ended.status == 2
    assert "every step was skipped" in ended.stderr


def test_closed_pipe_does_not_end_training(source: Path, tmp_path: Path) -> None:
    config = runs.write_config(tmp_path / "run.toml", source, tmp_path / "run", "batch = 1", batch=5, epochs=30)
    line = f"set -o pipefail; {sys.executable} -m hpctrain train {config} | head -n 1"
    ended = launching.run(["bash", "-c", line], timeout=60)
    assert ended.status == 0, ended.stderr
    assert runs.final_tensors(tmp_path / "run")[0] == 120


def test_resuming_another_network_is_refused(finished: Path) -> None:
    ended = runs.train(2, "--resume", finished, "model.name=mlp")
    assert ended.status == 2
    assert ended.stderr.count("hpctrain: error:") == 1
