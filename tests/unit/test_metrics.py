"""What a run writes down about itself: sums, lines of JSON, and the folder around them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from math import inf, isnan, nan
from pathlib import Path

import numpy as np
import pytest

from hpctrain import environment, runfolder
from hpctrain.errors import CheckpointError, ConfigError
from hpctrain.layers import MAE, MSE, SoftmaxCrossEntropy
from hpctrain.metrics import MetricsFile, Totals


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_means_are_those_of_all_samples_together() -> None:
    rng, losses = np.random.default_rng(3), {"loss": SoftmaxCrossEntropy()}
    rows = rng.random((17, 4))
    totals = Totals()
    for part in (slice(0, 5), slice(5, 6), slice(6, 17)):  # blocks of uneven size
        totals.add(Totals({"loss": rows[part].sum(axis=0).tolist()}, float(len(rows[part]))))
    found, (loss, weight, score, count) = totals.means(losses, "test_"), rows.sum(axis=0)
    assert found.keys() == {"test_loss", "test_accuracy"}
    assert found["test_loss"] == pytest.approx(loss / weight, rel=1e-14)
    assert found["test_accuracy"] == pytest.approx(score / count, rel=1e-14)
    assert totals.samples == 17
    assert all(isnan(mean) for mean in Totals().means({"loss": MSE()}).values())


def test_several_losses_add_up_by_their_scales() -> None:
    losses = {"main": SoftmaxCrossEntropy(), "aux": MSE(scale=0.3), "unseen": MAE()}
    totals = Totals({"main": [6.0, 4.0, 3.0, 5.0], "aux": [9.0, 2.0, 1.0, 2.0], "unseen": [0.0] * 4}, 3.0)
    found = totals.means(losses)
    # a loss without weight has no mean, and adds nothing to the total, nor to the gradient
    assert isnan(found.pop("unseen.loss"))
    assert isnan(found.pop("unseen.mae"))
    expected = {"loss": 1.5 + 0.3 * 4.5, "main.loss": 1.5, "main.accuracy": 0.6, "aux.loss": 4.5, "aux.mae": 0.5}
    assert found == pytest.approx(expected, rel=1e-14)
    assert totals.shares(losses) == pytest.approx({"main": 0.25, "aux": 0.15, "unseen": 0.0}, rel=1e-14)


def test_scale_of_the_one_loss_counts_too() -> None:
    totals = Totals({"loss": [6.0, 4.0, 3.0, 4.0]}, 4.0)
    assert totals.means({"loss": MSE(scale=2.0)}) == {"loss": 3.0, "mae": 0.75}
    assert totals.means({"loss": MSE(scale=0.0)})["loss"] == 0.0
    assert totals.shares({"loss": MSE(scale=0.0)}) == {"loss": 0.0}


def test_nothing_counted_is_not_a_number() -> None:
    """A batch whose labels are all ignored: no mean, and no gradient."""
    losses = {"loss": SoftmaxCrossEntropy(ignore=0)}
    ignored = Totals({"loss": [0.0] * 4}, 5.0)
    assert all(isnan(mean) for mean in ignored.means(losses).values())
    assert ignored.shares(losses) == {"loss": 0.0}


def test_totals_survive_a_checkpoint() -> None:
    totals = Totals({"main": [1.5, 2.0, 0.1, 3.0], "aux": [0.0] * 4}, 7.0)
    assert Totals(**json.loads(json.dumps(asdict(totals)))) == totals


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
