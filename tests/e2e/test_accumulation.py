"""Real runs whose batches are computed in parts and whose gradients are clipped: on any grid, stopped, and broken."""

from __future__ import annotations

import math
from pathlib import Path

import data_cases
import numpy as np
import pytest
import runs

from hpctrain.data.dataset import Dataset
from hpctrain.data.make.digits import make_digits

STEPS = 20
PARTS = "train.accumulate=4"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    make_digits(folder)
    return folder


def trained(digits: Path, folder: Path, ranks: int, grid: str, *words: str, stops: tuple[int, ...] = (STEPS,)) -> Path:
    """The run folder of STEPS steps in float64, stopped and resumed at `stops`."""
    config = runs.write_config(folder.with_suffix(".toml"), digits, folder, grid, epochs=1)
    for stop in stops:
        ended = runs.train(ranks, config, "--resume", f"train.steps={stop}", *words)
        assert ended.status == 0, ended.stderr
    return folder


def test_parts_of_a_batch_are_the_batch(digits: Path, tmp_path: Path) -> None:
    """Lenet has neither batch norm nor dropout. The same samples, losses, gradients and weights, but for rounding."""
    whole = trained(digits, tmp_path / "whole", 1, "batch = 1", "optim.clip_norm=8")
    step, expected = runs.final_tensors(whole)
    assert step == STEPS
    losses = [r["loss"] for r in runs.records(whole, "step")]
    norms = [r["gradient_norm"] for r in runs.records(whole, "step")]
    assert min(norms) < 8 < max(norms), "nothing was clipped, or everything"
    for ranks, grid in ((1, "batch = 1"), (2, "batch = 2"), (2, "channel = 2")):
        folder = trained(digits, tmp_path / grid.replace(" ", ""), ranks, grid, "optim.clip_norm=8", PARTS)
        records = runs.records(folder, "step")
        assert [r["samples"] for r in records] == [r["samples"] for r in runs.records(whole, "step")]
        np.testing.assert_allclose([r["loss"] for r in records], losses, rtol=1e-10)
        np.testing.assert_allclose([r["gradient_norm"] for r in records], norms, rtol=1e-9)
        _, found = runs.final_tensors(folder)
        for name, tensor in expected.items():
            np.testing.assert_allclose(found[name], tensor, rtol=0, atol=1e-10, err_msg=f"{name}, {grid}")
        (evaluated,), (same,) = runs.records(folder, "end"), runs.records(whole, "end")
        assert evaluated["test_loss"] == pytest.approx(same["test_loss"], rel=1e-10)
        assert evaluated["test_accuracy"] == same["test_accuracy"]


def test_stopped_and_resumed_gives_the_same_bits(digits: Path, tmp_path: Path) -> None:
    """In the middle of an epoch, with an optimizer that adds up norms over ranks."""
    words = (PARTS, "optim.name=lamb", "optim.momentum=0", "optim.lr=0.02", "optim.clip_norm=0.5")
    whole = trained(digits, tmp_path / "whole", 2, "height = 2", *words)
    cut = trained(digits, tmp_path / "cut", 2, "height = 2", *words, stops=(7, STEPS))
    (last, expected), (same, resumed) = runs.final_tensors(whole), runs.final_tensors(cut)
    assert last == same == STEPS
    assert all(expected[key].tobytes() == resumed[key].tobytes() for key in expected | resumed)
    for key in ("loss", "gradient_norm", "samples"):
        found = [[r[key] for r in runs.records(folder, "step")] for folder in (whole, cut)]
        assert found[0] == found[1]
    assert all(math.isfinite(r["gradient_norm"]) for r in runs.records(whole, "step"))


NET = """
from hpctrain.layers import BatchNorm, Dense, Flatten
from hpctrain.models import finish, start

def build(batch, sample):
    net, x = start(batch, sample)
    x = net.add("flatten", Flatten(), net.add("norm", BatchNorm(), x))
    return finish(net, net.add("out", Dense(4), x), sample)
"""


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    """A folder with train/ and test/: 23 images of 17 x 15 x 1, four classes."""
    for part in ("train", "test"):
        data_cases.write(tmp_path / part, np.random.default_rng(0), x_shape=(17, 15, 1), dtype="float32")
    return tmp_path


def test_step_with_a_broken_part_is_skipped_whole(volumes: Path) -> None:
    """Statistics of its parts before are forgotten, and no weight learns of it."""
    (volumes / "net.py").write_text(NET, encoding="utf-8")
    shard = Dataset(volumes / "train").shards[0]
    with open(shard.path, "r+b") as file:
        file.seek(shard.x.offset + 5 * shard.x.sample_bytes)
        file.write(np.array([np.nan], np.float32).tobytes())
    config = runs.write_config(
        volumes / "run.toml", volumes, volumes / "run", "height = 2", 1, 6, f"{volumes}/net.py:build"
    )
    words = ("data.normalize=false", "train.nonfinite=skip", "train.accumulate=3", "optim.momentum=0")
    ended = runs.train(2, config, *words)
    assert ended.status == 0, ended.stderr
    losses = [record["loss"] for record in runs.records(volumes / "run", "step")]
    assert len(losses) == 3
    assert losses.count(None) == 1
    assert all(np.isfinite(tensor).all() for tensor in runs.final_tensors(volumes / "run")[1].values())


def test_gradient_that_is_not_finite_is_noticed_where_its_norm_is_asked_for(volumes: Path) -> None:
    config = runs.write_config(volumes / "run.toml", volumes, volumes / "run", "batch = 2", 1, 6)
    words = ("train.backend=native", "train.precision=float32", "train.loss_scale=3e38", "optim.clip_norm=1")
    ended = runs.train(2, config, *words)
    assert ended.status == 2
    message = ended.stderr.replace("\n", " ")
    assert "step 1 (epoch 1): not finite: the loss is, but not its gradient; lower train.loss_scale" in message
    ended = runs.train(2, config, *words, "train.nonfinite=skip", "train.steps=1")
    assert ended.status == 0, ended.stderr
    assert ended.stderr.count("skipped") == 1
    assert [record["gradient_norm"] for record in runs.records(volumes / "run", "step")] == [None]
