"""Runs whose ranks update a share of the weights each, or have them in common: they go on in any other way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import runs

from hpctrain.data.make.digits import make_digits

WAYS = {
    "plain": (),
    "shard": ("optim.shard=true",),
    "share_weights": ("memory.share_weights=true", "plan.overlap=true", "plan.bucket_mib=0.01"),
}

OFF = {"plain": (), "shard": ("optim.shard=false",), "share_weights": ("memory.share_weights=false",)}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    make_digits(folder, size=8)
    return folder


@pytest.mark.parametrize(
    ("first", "then"), [("shard", "share_weights"), ("share_weights", "plain"), ("plain", "shard")]
)
def test_two_ranks_go_on_in_another_way_to_the_same_weights(
    digits: Path, tmp_path: Path, first: str, then: str
) -> None:
    """The same but for rounding: the norm, by which gradients are clipped, is added up from other pieces."""
    same = ["train.accumulate=2", "optim.clip_norm=0.5", "optim.name=adam", "optim.momentum=0.0", "optim.lr=0.01"]
    config = runs.write_config(tmp_path / "run.toml", digits, tmp_path / "parts", "batch = 2", 1, model="mlp")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for more in (
        (config, "train.steps=8", f"run.folder={whole}", *same, *WAYS["plain"]),
        (config, "train.steps=5", *same, *WAYS[first]),
        ("--resume", parts, "train.steps=8", *OFF[first], *WAYS[then]),
    ):
        ended = runs.train(2, *more)
        assert ended.status == 0, ended.stderr
    expected, found = runs.final_tensors(whole), runs.final_tensors(parts)
    assert expected[0] == found[0] == 8
    assert expected[1].keys() == found[1].keys()
    for name, array in expected[1].items():
        np.testing.assert_allclose(found[1][name], array, rtol=1e-9, atol=1e-12, err_msg=name)
