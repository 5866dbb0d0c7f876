"""Training on a label for each pixel or voxel, imported from NumPy files, with positions cut over ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import launching
import numpy as np
import pytest
import runs
from scipy.ndimage import gaussian_filter

NET = """
from hpctrain.layers import Conv, Dice, GroupNorm, ReLU, SoftmaxCrossEntropy
from hpctrain.models import finish, start


def build(batch, sample, filters=6):
    net, x = start(batch, sample)
    x = net.add("conv1", Conv(filters, kernel=3, padding=1), x)
    x = net.add("relu", ReLU(), net.add("norm", GroupNorm(2), x))
    return finish(net, net.add("out", Conv(sample.outputs, kernel=3, padding=1), x), sample)


def with_dice(batch, sample):
    net = build(batch, sample)
    net.add("dice", Dice(scale=0.5, ignore=sample.ignore), "out", "y")
    return net


def ignoring(batch, sample):
    net, x = start(batch, sample)
    x = net.add("out", Conv(sample.outputs, kernel=3, padding=1), x)
    y = net.input("y", (batch, *sample.positions), integer=True)
    net.add("loss", SoftmaxCrossEntropy(ignore=0), x, y)
    return net
"""

CLASSES = 3


def segmentation(folder: Path, positions: tuple[int, ...], ignore: int | None = None) -> Path:
    """A data set of blurred noise, of which the labels are three levels, a fifth of them `ignore` where that is given.

    Without it they are bytes; with it nobody says how many classes there are.
    """
    rng, files = np.random.default_rng(7), []
    for part, samples in (("train", 26), ("test", 9)):
        smooth = np.stack([gaussian_filter(rng.normal(size=positions), 1.0) for _ in range(samples)])
        smooth /= smooth.std()
        files = [folder / f"{part}_{name}.npy" for name in "xy"]
        np.save(files[0], (smooth + 0.2 * rng.normal(size=smooth.shape)).astype(np.float32))
        labels = np.digitize(smooth, (-0.5, 0.7)).astype(np.uint8 if ignore is None else np.int16)
        like = ["--like", folder / "train"] if part == "test" else ["--classes", CLASSES]
        if ignore is not None:
            labels[rng.random(labels.shape) < 0.2] = ignore
            like = like if part == "test" else ["--ignore", ignore]
        np.save(files[1], labels)
        words = [sys.executable, "-m", "hpctrain", "data", "import", *files, folder / part, "--channels", "none", *like]
        ended = launching.run([str(word) for word in words], timeout=60)
        assert ended.status == 0, ended.stderr
    (folder / "net.py").write_text(NET, encoding="utf-8")
    return folder


def train(data: Path, name: str, grid: str, ranks: int, model: str) -> Path:
    """A run folder."""
    folder = data / name
    config = runs.write_config(
        data / f"{name}.toml", data, folder, grid, epochs=8, batch=4, model=f"{data}/net.py:{model}"
    )
    ended = runs.train(ranks, config)
    assert ended.status == 0, ended.stderr
    return folder


@pytest.mark.parametrize(
    ("positions", "model", "grid", "ignore"),
    [
        ((13, 11), "build", "height = 2", None),
        ((5, 9, 7), "with_dice", "depth = 2", None),
        ((13, 11), "with_dice", "height = 2", 255),
        ((13, 11), "with_dice", "width = 2", -1),
    ],
    ids=["2d", "3d-two-losses", "2d-255-ignored", "2d-minus-1-ignored"],
)
def test_two_ranks_learn_what_one_does(
    tmp_path: Path, positions: tuple[int, ...], model: str, grid: str, ignore: int | None
) -> None:
    data = segmentation(tmp_path, positions, ignore)
    one, two = train(data, "one", "batch = 1", 1, model), train(data, "two", grid, 2, model)
    steps = [runs.records(folder, "step") for folder in (one, two)]
    epochs = [runs.records(folder, "epoch") for folder in (one, two)]
    assert len(steps[0]) == len(steps[1]) == 8 * 6
    keys = {"loss", "accuracy"}
    if model == "with_dice":
        keys = {"loss", "loss.loss", "loss.accuracy", "dice.loss", "dice.dice"}
        for record in steps[0]:
            assert record["loss"] == pytest.approx(record["loss.loss"] + 0.5 * record["dice.loss"], rel=1e-12)
    for records, names in ((steps, keys), (epochs, keys | {f"test_{key}" for key in keys})):
        for key in names:
            np.testing.assert_allclose(
                [record[key] for record in records[1]], [record[key] for record in records[0]], rtol=0, atol=1e-10
            )
    assert set(epochs[0][0]) == set(epochs[1][0])
    first, last = epochs[0][0], epochs[0][-1]
    print(f"loss {first['loss']:.3f} -> {last['loss']:.3f}, on test data {last['test_loss']:.3f}")
    assert last["loss"] < 0.7 * first["loss"]
    assert last["test_loss"] < first["test_loss"]
    (_, expected), (_, found) = runs.final_tensors(one), runs.final_tensors(two)
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=0, atol=1e-10, err_msg=name)
    for line in (two / "metrics.jsonl").read_text().splitlines():
        assert "NaN" not in line


def test_interrupted_within_an_epoch_of_several_losses(tmp_path: Path) -> None:
    """The sums of the epoch so far are kept for each loss."""
    data = segmentation(tmp_path, (13, 11))
    whole = train(data, "whole", "height = 2", 2, "with_dice")
    config = runs.write_config(
        data / "cut.toml", data, data / "cut", "height = 2", epochs=8, batch=4, model=f"{data}/net.py:with_dice"
    )
    assert runs.train(2, config, "train.steps=8").status == 0  # an epoch has 6 steps
    ended = runs.train(2, "--resume", data / "cut", "train.steps=48")
    assert ended.status == 0, ended.stderr
    assert runs.records(data / "cut", "step") == runs.records(whole, "step")
    for expected, found in zip(runs.records(whole, "epoch"), runs.records(data / "cut", "epoch"), strict=True):
        for key in ("loss", "loss.accuracy", "dice.loss", "dice.dice"):
            assert found[key] == expected[key]


def test_batch_whose_labels_are_all_ignored_changes_nothing(tmp_path: Path) -> None:
    """Its mean loss is null in the metrics, its gradient zero: the run goes on, on any grid."""
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(5, 7, 9)).astype(np.float32), rng.integers(0, 3, (5, 7, 9))
    y[2:4] = 0
    np.savez(tmp_path / "xy.npz", x=x, y=y)
    for part in ("train", "test"):
        words = ["data", "import", tmp_path / "xy.npz", tmp_path / part, "--channels", "none", "--classes", 3]
        ended = launching.run([sys.executable, "-m", "hpctrain", *map(str, words)], timeout=60)
        assert ended.status == 0, ended.stderr
    (tmp_path / "net.py").write_text(NET, encoding="utf-8")
    found = []
    for name, grid, ranks in (("one", "batch = 1", 1), ("two", "height = 2", 2)):
        folder = tmp_path / name
        model = f"{tmp_path}/net.py:ignoring"
        config = runs.write_config(folder.with_suffix(".toml"), tmp_path, folder, grid, epochs=2, batch=1, model=model)
        ended = runs.train(ranks, config)
        assert ended.status == 0, ended.stderr
        losses = [record["loss"] for record in runs.records(folder, "step")]
        accuracies = [record["accuracy"] for record in runs.records(folder, "step")]
        assert losses.count(None) == accuracies.count(None) == 4  # two samples in each of two epochs
        assert all(np.isfinite(record["loss"]) for record in runs.records(folder, "epoch"))
        tensors = runs.final_tensors(folder)[1]
        assert all(np.isfinite(tensor).all() for tensor in tensors.values())
        found.append(tensors["out.weight"])
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-12)


def test_what_is_labelled_as_ignored_is_without_effect(tmp_path: Path) -> None:
    """So that it does not matter whether it is 255 or -1."""
    found = []
    for name, ignore in (("high", 255), ("low", -1)):
        (tmp_path / name).mkdir()
        data = segmentation(tmp_path / name, (13, 11), ignore)
        found.append(runs.final_tensors(train(data, "run", "height = 2", 2, "with_dice"))[1])
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        np.testing.assert_array_equal(found[1][name], tensor, err_msg=name)


def test_verify_draws_ignored_labels(tmp_path: Path) -> None:
    """A network that counted them on one rank only would differ; this one does not."""
    data = segmentation(tmp_path, (13, 11), 255)
    config = runs.write_config(
        data / "run.toml", data, data / "run", "height = 2", batch=4, model=f"{data}/net.py:with_dice"
    )
    ended = launching.run(runs.command(2, "verify", config), timeout=60)
    assert ended.status == 0, ended.stderr
    assert "equal" in ended.stdout


def test_training_and_test_set_ignore_the_same_label(tmp_path: Path) -> None:
    data = segmentation(tmp_path, (13, 11), 255)
    np.save(data / "y.npy", np.zeros((9, 13, 11), np.uint8))
    words = [
        "data",
        "import",
        data / "test_x.npy",
        data / "y.npy",
        data / "other",
        "--channels",
        "none",
        "--classes",
        3,
    ]
    ended = launching.run([sys.executable, "-m", "hpctrain", *map(str, words)], timeout=60)
    assert ended.status == 0, ended.stderr
    config = runs.write_config(data / "run.toml", data, data / "run", model=f"{data}/net.py:build")
    ended = runs.train(1, config, f"data.test={data}/other")
    assert ended.status == 2
    message = f"{data}/other: ignore None, but {data}/train has 255; give a test set of the same kind"
    assert message in ended.stderr


def test_network_that_predicts_no_positions_is_refused(tmp_path: Path) -> None:
    data = segmentation(tmp_path, (13, 13))
    config = runs.write_config(tmp_path / "run.toml", data, tmp_path / "run", model="lenet")
    ended = runs.train(1, config)
    assert ended.status == 2
    assert "lenet" in ended.stderr
    assert "logits (32, 3) and labels (32, 13, 13)" in ended.stderr
