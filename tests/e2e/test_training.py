"""Real training runs: the same on every grid, and the same whether or not they were interrupted."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import launching
import numpy as np
import pytest
import runs

from hpctrain.data.make.digits import make_digits

GRIDS = {
    "batch": (2, "batch = 2"),
    "height": (2, "height = 2"),
    "channel": (2, "channel = 2"),
    "batch-height": (4, "batch = 2, height = 2"),
}
STEPS = 200


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    make_digits(folder)
    return folder


@pytest.fixture(scope="module")
def serial(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of STEPS steps on one rank, without a launcher."""
    folder = tmp_path_factory.mktemp("serial") / "run"
    config = runs.write_config(folder.with_suffix(".toml"), digits, folder, epochs=5)
    words = [sys.executable, "-m", "hpctrain", "train", config, f"train.steps={STEPS}"]
    ended = launching.run(words, timeout=120)
    assert ended.status == 0, ended.stderr
    return folder


@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_has_the_loss_curve_of_one_rank(digits: Path, serial: Path, tmp_path: Path, grid: str) -> None:
    ranks, axes = GRIDS[grid]
    config = runs.write_config(tmp_path / "run.toml", digits, tmp_path / "run", axes, epochs=5)
    ended = runs.train(ranks, config, f"train.steps={STEPS}")
    assert ended.status == 0, ended.stderr
    one, many = runs.records(serial, "step"), runs.records(tmp_path / "run", "step")
    assert len(one) == len(many) == STEPS
    assert [r["samples"] for r in one] == [r["samples"] for r in many]
    assert [r["accuracy"] for r in one] == [r["accuracy"] for r in many]
    # float64 rounding, amplified by at most 200 steps of training
    worst = max(abs(a["loss"] - b["loss"]) for a, b in zip(one, many, strict=True))
    print(f"{grid}: the loss differs by at most {worst:.1e} in {STEPS} steps")
    assert worst <= 1e-9
    evaluated = [[r["test_loss"] for r in runs.records(f, "epoch")] for f in (serial, tmp_path / "run")]
    np.testing.assert_allclose(*evaluated, rtol=0, atol=1e-9)


def interrupt(config: Path, folder: Path, ranks: int, after: float, send: signal.Signals, to_ranks: bool) -> str:
    """Start a run, signal it `after` seconds into its training, and return its output; it must leave with status 75."""
    with subprocess.Popen(
        runs.command(ranks, "train", config),
        env=launching.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as job:
        try:
            until = time.monotonic() + 60
            while not (folder / "metrics.jsonl").exists():  # written when training begins
                assert time.monotonic() < until, "training did not begin"
                time.sleep(0.01)
            time.sleep(after)
            for pid in ranks_of(job.pid) if to_ranks else [job.pid]:
                os.kill(pid, send)
            output, _ = job.communicate(timeout=60)
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode == 75, output
    return output


def ranks_of(launcher: int) -> list[int]:
    """Process ids of the Python processes below `launcher`."""
    found, above = [], {launcher}
    for entry in sorted((p for p in Path("/proc").iterdir() if p.name.isdigit()), key=lambda p: int(p.name)):
        try:
            parent = int(re.findall(r"^PPid:\s+(\d+)", (entry / "status").read_text(), re.M)[0])
            python = "hpctrain" in (entry / "cmdline").read_text()
        except OSError:  # ended meanwhile
            continue
        if parent in above:
            above.add(int(entry.name))
            if python:
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize(
    ("send", "to_ranks"),
    [(signal.SIGUSR1, False), (signal.SIGUSR1, True), (signal.SIGTERM, True)],
    ids=["USR1-to-mpirun", "USR1-to-ranks", "TERM-to-ranks"],
)
def test_interrupted_and_resumed_gives_the_same_bits(
    digits: Path, tmp_path: Path, seed: int, send: signal.Signals, to_ranks: bool
) -> None:
    grid = "batch = 2, height = 2"
    # long enough that the signal comes before the end, on a machine several times faster too
    whole_run = runs.write_config(tmp_path / "whole.toml", digits, tmp_path / "whole", grid, epochs=8)
    assert runs.train(4, whole_run).status == 0
    config = runs.write_config(tmp_path / "cut.toml", digits, tmp_path / "cut", grid, epochs=8)
    after = random.Random(seed).uniform(0.1, 0.8)
    output = interrupt(config, tmp_path / "cut", 4, after, send, to_ranks)
    stopped, _ = runs.final_tensors(tmp_path / "cut")
    print(f"signalled after {after:.2f} s, stopped after step {stopped}")
    assert f"stopped on request after step {stopped}" in output
    assert re.search(rf"mpirun -n 4 .*train --resume {tmp_path / 'cut'}", output)
    ended = runs.train(4, "--resume", tmp_path / "cut")
    assert ended.status == 0, ended.stderr
    assert f"at step {stopped}" in ended.stdout + ended.stderr
    (last, expected), (same, found) = runs.final_tensors(tmp_path / "whole"), runs.final_tensors(tmp_path / "cut")
    assert 0 < stopped < last == same
    assert expected.keys() == found.keys()
    assert all(expected[name].tobytes() == found[name].tobytes() for name in expected)
    whole_steps, steps = (runs.records(tmp_path / name, "step") for name in ("whole", "cut"))
    assert steps == whole_steps
    epochs = [runs.records(tmp_path / name, "epoch") for name in ("whole", "cut")]
    for key in ("loss", "accuracy", "test_loss", "test_accuracy"):
        assert [r[key] for r in epochs[0]] == [r[key] for r in epochs[1]]


@pytest.mark.parametrize(
    ("ranks", "grid"), [(1, "batch = 1"), (2, "channel = 2"), (3, "height = 3")], ids=["1", "channel2", "height3"]
)
def test_resumed_on_another_grid_goes_on_alike(
    digits: Path, serial: Path, tmp_path: Path, ranks: int, grid: str
) -> None:
    config = runs.write_config(tmp_path / "run.toml", digits, tmp_path / "run", "batch = 2, height = 2", epochs=5)
    stop = 60  # in the second epoch: 44 steps each
    assert runs.train(4, config, f"train.steps={stop}").status == 0
    given = f"plan.grid={{ {grid} }}"
    ended = runs.train(ranks, "--resume", tmp_path / "run", f"train.steps={STEPS}", given)
    assert ended.status == 0, ended.stderr
    assert re.search(f"from a plan on 4 ranks to another on {ranks}", ended.stdout + ended.stderr)
    one, many = runs.records(serial, "step"), runs.records(tmp_path / "run", "step")
    assert [r["samples"] for r in one] == [r["samples"] for r in many]
    np.testing.assert_allclose([r["loss"] for r in many], [r["loss"] for r in one], rtol=0, atol=1e-9)
    (_, expected), (step, found) = runs.final_tensors(serial), runs.final_tensors(tmp_path / "run")
    assert step == STEPS
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=0, atol=1e-9, err_msg=name)


def test_the_same_run_twice_gives_the_same_bits(digits: Path, tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        config = runs.write_config(tmp_path / f"{name}.toml", digits, tmp_path / name, "batch = 3", epochs=1)
        assert runs.train(3, config, "train.precision=float32").status == 0
        found.append(runs.final_tensors(tmp_path / name)[1])
    assert all(found[0][name].tobytes() == found[1][name].tobytes() for name in found[0])


def test_resume_before_the_first_checkpoint_starts_anew(digits: Path, tmp_path: Path) -> None:
    config = runs.write_config(tmp_path / "run.toml", digits, tmp_path / "run", "batch = 2", epochs=1)
    ended = runs.train(2, config, "--resume", "train.steps=3")
    assert ended.status == 0, ended.stderr
    assert "no checkpoint yet, starting anew" in ended.stdout + ended.stderr
    assert runs.final_tensors(tmp_path / "run")[0] == 3
    ended = runs.train(2, config, "--resume", "train.steps=5")
    assert ended.status == 0, ended.stderr
    assert "at step 3" in ended.stdout + ended.stderr
    assert [record["step"] for record in runs.records(tmp_path / "run", "step")] == [1, 2, 3, 4, 5]
