"""Runs whose gradients are compressed: they learn as well, go on with the same bits, and are refused where slower."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import runs

from hpctrain.data.make.digits import make_digits

SETTINGS = {
    "none": [],
    "fp16": [],
    "bf16": [],
    # all numbers of a parameter are sent with one size: at a rate as large as the others bear, that shakes the weights
    "onebit": ["optim.lr=0.02"],
    "qsgd": [],
    "terngrad": [],
    # a layer of 64 x 100 weights: at the default of 0.999 six of them would be sent, in epochs that are over in seconds
    "topk": ["compress.sparsity=0.95", "compress.warmup_epochs=1"],
    "powersgd": [],
}
"""By codec, what so small a network and so short a run need instead of the defaults."""

EPOCHS = 8


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    make_digits(folder, size=8)
    return folder


def train(folder: Path, data: Path, codec: str, *words: str, ranks: int = 2, epochs: int = EPOCHS) -> Path:
    """A run on 8 x 8 digits; its folder."""
    grid = f"batch = {ranks}"
    config = runs.write_config(folder / "run.toml", data, folder / "run", grid, epochs, model="mlp")
    forced = [f"compress.codec={codec}", *SETTINGS[codec], *(["compress.force=true"] if codec != "none" else [])]
    ended = runs.train(ranks, config, *forced, *words)
    assert ended.status == 0, ended.stderr
    assert ("compressed by" in ended.stdout) == (codec != "none")
    return folder / "run"


@pytest.fixture(scope="module")
def uncompressed(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    folder = train(tmp_path_factory.mktemp("none"), digits, "none")
    return float(runs.records(folder, "epoch")[-1]["test_accuracy"])


@pytest.mark.parametrize("codec", [codec for codec in SETTINGS if codec != "none"])
def test_learns_within_a_percent(digits: Path, uncompressed: float, tmp_path: Path, codec: str) -> None:
    found = runs.records(train(tmp_path, digits, codec), "epoch")[-1]["test_accuracy"]
    print(f"{codec}: {found:.4f}, uncompressed {uncompressed:.4f}")
    assert uncompressed > 0.9
    assert found > uncompressed - 0.01


@pytest.mark.parametrize("codec", ["onebit", "topk", "powersgd"])
def test_stopped_and_resumed_gives_the_same_bits(digits: Path, tmp_path: Path, codec: str) -> None:
    """Also of what was not sent yet, and where each step comes in parts."""
    more = ["train.accumulate=2"] if codec == "topk" else []
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = train(tmp_path / "whole", digits, codec, "train.steps=8", *more, epochs=1)
    parts = train(tmp_path / "parts", digits, codec, "train.steps=5", *more, epochs=1)
    ended = runs.train(2, "--resume", parts, "train.steps=8")
    assert ended.status == 0, ended.stderr
    assert "lost" not in ended.stdout
    expected, found = runs.final_tensors(whole), runs.final_tensors(parts)
    assert expected[0] == found[0] == 8
    assert expected[1].keys() == found[1].keys()
    private = [name for name in found[1] if name.startswith("rank")]
    assert {name.split("/")[0] for name in private} == {"rank0", "rank1"}
    assert all(found[1][name].any() for name in private)
    for name, array in expected[1].items():
        np.testing.assert_array_equal(found[1][name], array, err_msg=name)


def test_resumed_on_other_ranks_or_by_another_codec_starts_from_zero_and_says_so(digits: Path, tmp_path: Path) -> None:
    folder = train(tmp_path, digits, "onebit", "train.steps=3", epochs=1)
    for ranks, words, says in (
        (3, ("plan.grid.batch=3",), "saved by 'onebit' on 2 ranks, now 'onebit' on 3"),
        (3, ("compress.codec=powersgd",), "saved by 'onebit' on 3 ranks, now 'powersgd' on 3"),
        (3, ("compress.codec=none", "compress.force=false"), "saved by 'powersgd' on 3 ranks, now 'none' on 3"),
    ):
        step = runs.final_tensors(folder)[0] + 2
        ended = runs.train(ranks, "--resume", folder, f"train.steps={step}", *words)
        assert ended.status == 0, ended.stderr
        said = " ".join(ended.stdout.split())
        assert f"what compress.codec had yet to send is lost, and starts from zero: {says}" in said
        assert runs.final_tensors(folder)[0] == step


def test_refused_where_it_is_slower_with_the_figures(digits: Path, tmp_path: Path) -> None:
    config = runs.write_config(tmp_path / "run.toml", digits, tmp_path / "run", "batch = 2", 1, model="mlp")
    ended = runs.train(2, config, "compress.codec=powersgd")
    assert ended.status == 2
    assert ended.stderr.count("compress.force = true") == 1, "said once"
    for words in ("compress.codec", "powersgd", "slower", "compress.force = true", "ms of sending", "against"):
        assert words in ended.stderr, f"{words!r} in {ended.stderr}"
    assert not (tmp_path / "run" / "checkpoints").exists()
