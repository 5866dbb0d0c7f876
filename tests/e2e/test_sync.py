"""Runs of several replicas: what they see and learn, that they go on where they stopped, and end together."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import h5py
import launching
import numpy as np
import pytest
import runs

from hpctrain.data.make.digits import make_digits

LOCKSTEP = ("local", "backup")
OUT_OF_STEP = ("elastic", "gossip-pull", "gossip-push")
STEPS = 29
"""Of an epoch: 1438 samples in batches of 48."""


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    make_digits(folder, size=8)
    return folder


def write_config(folder: Path, data: Path, grid: str = "batch = 1", epochs: int = 2, model: str = "mlp") -> Path:
    """A run of `model` on small digits, in `folder`/run."""
    return runs.write_config(folder / "run.toml", data, folder / "run", grid, epochs, batch=48, model=model)


@pytest.fixture(scope="module")
def allreduce(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one network on four ranks."""
    folder = tmp_path_factory.mktemp("allreduce")
    ended = runs.train(4, write_config(folder, digits, "batch = 4"))
    assert ended.status == 0, ended.stderr
    return folder / "run"


@pytest.mark.parametrize("strategy", [*LOCKSTEP, *OUT_OF_STEP])
def test_replicas_learn_from_the_same_samples(digits: Path, allreduce: Path, tmp_path: Path, strategy: str) -> None:
    ended = runs.train(4, write_config(tmp_path, digits), f"sync.strategy={strategy}")
    assert ended.status == 0, ended.stderr
    assert f"4 replicas ({strategy})" in ended.stdout
    one, many = runs.records(allreduce, "step"), runs.records(tmp_path / "run", "step")
    assert [r["samples"] for r in one] == [r["samples"] for r in many]
    last = runs.records(tmp_path / "run", "epoch")[-1]
    assert last["test_accuracy"] > 0.9
    assert last["step"] == 2 * STEPS
    names = runs.final_tensors(tmp_path / "run")[1]
    step, found = runs.final_tensors(allreduce)
    means = {name: array for name, array in names.items() if not name.startswith(("replica", "sync/"))}
    assert means.keys() == found.keys()
    for name, mean in means.items():
        of_replicas = [names[f"replica{i}/{name}"] for i in range(4)]
        np.testing.assert_allclose(mean, np.mean(of_replicas, axis=0), rtol=1e-13, atol=1e-15)
        if strategy in LOCKSTEP:  # each sums gradients over all samples in some way: the same to rounding
            scale = np.abs(found[name]).max()
            np.testing.assert_allclose(mean, found[name], rtol=0, atol=1e-9 * scale)
    assert step == 2 * STEPS


@pytest.mark.parametrize(
    ("strategy", "ranks", "grid", "copies"),
    [("local", 4, "height = 2", 2), ("elastic", 2, "channel = 2", 1)],  # one replica has nobody to race with
)
def test_stopped_and_resumed_gives_the_same_bits(
    digits: Path, tmp_path: Path, strategy: str, ranks: int, grid: str, copies: int
) -> None:
    model = "lenet" if "height" in grid else "mlp"
    make_digits(tmp_path / "data") if model == "lenet" else shutil.copytree(digits, tmp_path / "data")
    config = write_config(tmp_path, tmp_path / "data", grid, epochs=1, model=model)
    words = [config, f"sync.strategy={strategy}", "sync.period=3", f"sync.replicas={copies}"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for more in (["train.steps=8", f"run.folder={whole}"], ["train.steps=4", f"run.folder={parts}"]):
        ended = runs.train(ranks, *words, *more)
        assert ended.status == 0, ended.stderr
    ended = runs.train(ranks, "--resume", parts, "train.steps=8")  # between two exchanges
    assert ended.status == 0, ended.stderr
    step, expected = runs.final_tensors(whole)
    found = runs.final_tensors(parts)
    assert step == found[0] == 8
    assert expected.keys() == found[1].keys()
    assert ("sync/centre/out.weight" in expected) == (strategy == "elastic")
    for name, array in expected.items():
        np.testing.assert_array_equal(found[1][name], array, err_msg=name)
    assert [r["loss"] for r in runs.records(parts, "step")] == [r["loss"] for r in runs.records(whole, "step")]


def test_stop_reaches_all_replicas_and_another_strategy_goes_on_from_the_mean(digits: Path, tmp_path: Path) -> None:
    config, folder = write_config(tmp_path, digits, epochs=20), tmp_path / "run"
    slow = ["debug.delay_rank=1", "debug.delay_seconds=0.3"]
    command = runs.command(2, "train", config, "sync.strategy=gossip-pull", *slow)
    with subprocess.Popen(command, env=launching.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as job:
        try:
            deadline = time.monotonic() + 60
            while not (folder / "plan.json").exists() and time.monotonic() < deadline:
                time.sleep(0.1)
            time.sleep(1)
            job.send_signal(signal.SIGUSR1)
            said, complaint = job.communicate(timeout=30)
        finally:
            job.kill()
    assert job.returncode == 75, complaint
    assert "stopped on request" in said.decode()
    step, tensors = runs.final_tensors(folder)
    assert step < 20 * STEPS
    assert any(name.startswith("replica1/") for name in tensors)
    again = runs.train(2, "--resume", folder, f"train.steps={step + 2}", "debug.delay_rank=", "debug.delay_seconds=")
    assert again.status == 0, again.stderr
    assert "from the mean" not in again.stdout
    other = runs.train(3, "--resume", folder, f"train.steps={step + 6}", "sync.strategy=elastic", *_undelayed())
    assert other.status == 0, other.stderr
    assert "saved by 2 replicas (gossip-pull), now 3 replicas (elastic): all start from the mean" in other.stdout
    alone = runs.train(1, "--resume", folder, f"train.steps={step + 8}", "sync.strategy=allreduce", *_undelayed())
    assert alone.status == 0, alone.stderr
    assert "saved by 3 replicas (elastic), now 1 replica (allreduce): going on from the mean" in alone.stdout


def _undelayed() -> list[str]:
    return ["debug.delay_rank=", "debug.delay_seconds="]


@pytest.mark.parametrize(("strategy", "grid"), [("gossip-push", "channel = 2"), ("local", "batch = 1")])
def test_error_of_one_replica_ends_all(digits: Path, tmp_path: Path, strategy: str, grid: str) -> None:
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    with h5py.File(next((data / "train").glob("*.h5"))) as shard:
        path, offset = Path(shard.filename), shard["y"].id.get_offset()
    with path.open("r+b") as file:  # the label of one sample
        file.seek(offset + 8 * 77)
        file.write((99).to_bytes(8, "little"))
    begin = time.monotonic()
    ended = runs.train(4, write_config(tmp_path, data, grid), f"sync.strategy={strategy}", "sync.period=2")
    print(f"{time.monotonic() - begin:.1f} s, {ended.stderr}")
    assert ended.status == 2
    assert ended.stderr.count("hpctrain: error:") == 1
    assert re.search(r"rank \d \(\d of 4 ranks\): replica \d: .*sample 77 .*: a label outside 0 to 9", ended.stderr)
    assert "MPI_ABORT" not in ended.stderr


def test_slow_rank_slows_allreduce_but_not_gossip(digits: Path, tmp_path: Path) -> None:
    seconds, delay, steps = {}, 0.25, 10
    slow = ["debug.delay_rank=2", f"debug.delay_seconds={delay}", f"train.steps={steps}"]
    for strategy, grid in (("allreduce", "batch = 3"), ("gossip-pull", "batch = 1")):
        folder = tmp_path / strategy
        folder.mkdir()
        ended = runs.train(3, write_config(folder, digits, grid), f"sync.strategy={strategy}", *slow)
        assert ended.status == 0, ended.stderr
        (record,) = runs.records(folder / "run", "end")
        seconds[strategy] = record["seconds"] - record.get("waited_seconds", 0.0)
    print(f"seconds of {steps} steps on rank 0, rank 2 sleeping {delay} s in each: {seconds}")
    assert seconds["allreduce"] >= steps * delay
    assert seconds["gossip-pull"] < steps * delay / 2


@pytest.mark.parametrize(
    ("ranks", "words", "said"),
    [
        (3, ["sync.replicas=2"], "2 replicas of a plan for 1 ranks take 2, but there are 3; start 2 ranks"),
        (3, ["plan.grid={channel=2}"], "1 replica of a plan for 2 ranks take 2, but there are 3"),
        (2, ["train.batch=33"], "train.batch = 33 does not divide among 2 replicas; give a multiple of 2"),
        (2, ["sync.period=1", "train.nonfinite=skip", "sync.strategy=backup"], "replicas would no longer agree"),
    ],
)
def test_what_does_not_fit_is_refused(digits: Path, tmp_path: Path, ranks: int, words: list[str], said: str) -> None:
    ended = runs.train(ranks, write_config(tmp_path, digits), "sync.strategy=local", *words)
    assert ended.status == 2
    assert said in ended.stderr
