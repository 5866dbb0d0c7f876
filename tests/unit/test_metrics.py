"""What a run writes down about itself: sums, lines of JSON, and the folder around them."""

from __future__ import annotations

import json
import os
from math import inf, isnan, nan
from pathlib import Path

import numpy as np
import pytest

from hpctrain import environment, runfolder
from hpctrain.errors import CheckpointError, ConfigError
from hpctrain.metrics import MetricsFile, Totals


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_means_are_those_of_all_samples_together() -> None:
    rng = np.random.default_rng(3)
    loss, weight, score = rng.random((3, 17))
    totals = Totals()
    for part in (slice(0, 5), slice(5, 6), slice(6, 17)):  # blocks of uneven size
        totals.add(Totals(loss[part].sum(), weight[part].sum(), score[part].sum(), float(len(loss[part]))))
    found = totals.means("accuracy", "test_")
    assert found.keys() == {"test_loss", "test_accuracy"}
    assert found["test_loss"] == pytest.approx(loss.sum() / weight.sum(), rel=1e-14)
    assert found["test_accuracy"] == pytest.approx(score.sum() / weight.sum(), rel=1e-14)
    assert totals.samples == 17
    assert all(isnan(mean) for mean in Totals().means("mae").values())


def test_lines_are_json_without_nan(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.write("step", step=1, loss=nan, lr=inf, accuracy=0.5, samples="a")
    file.close()
    assert lines(tmp_path / "metrics.jsonl") == [
        {"event": "step", "step": 1, "loss": None, "lr": None, "accuracy": 0.5, "samples": "a"}
    ]


def test_steps_that_are_done_again_stand_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for step in range(1, 8):
        file.write("step", step=step, run=1)
    file.close()
    with path.open("a") as broken:
        broken.write('{"event": "step", "st')  # cut short by a crash
    again = MetricsFile(path, 4)
    for step in range(5, 7):
        again.write("step", step=step, run=2)
    again.close()
    assert [(line["step"], line["run"]) for line in lines(path)] == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent/metrics.jsonl: cannot be written: .*run.folder"):
        MetricsFile(tmp_path / "absent" / "metrics.jsonl", 0)
    full = MetricsFile(tmp_path / "metrics.jsonl", 0)
    descriptor = full._file.fileno()
    disk = os.open("/dev/full", os.O_WRONLY)
    kept = os.dup(descriptor)
    os.dup2(disk, descriptor)
    full.write("step", step=1)
    with pytest.raises(ConfigError, match=r"metrics.jsonl: cannot be written: .*No space left"):
        full.flush()
    os.dup2(kept, descriptor)  # space again: what was held back is written
    full.close()
    assert lines(tmp_path / "metrics.jsonl") == [{"event": "step", "step": 1}]
    os.close(disk)
    os.close(kept)


def test_folder_with_checkpoints_is_refused(tmp_path: Path) -> None:
    runfolder.refuse_used(tmp_path)
    (tmp_path / "checkpoints" / "step-000000000007").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: holds checkpoints .* --resume {tmp_path}"):
        runfolder.refuse_used(tmp_path)


def test_digest_is_of_the_sequence() -> None:
    ids = np.array([3, 1, 2])
    assert runfolder.digest(ids) == runfolder.digest(ids.astype(np.int32))
    assert len({runfolder.digest(np.array(order)) for order in ([3, 1, 2], [1, 2, 3], [3, 1], [3, 1, 2, 0])}) == 4


def test_environment_names_versions_and_cores() -> None:
    assert environment.versions()["numpy"] == np.__version__
    assert environment.machine()["cores"] >= 1
