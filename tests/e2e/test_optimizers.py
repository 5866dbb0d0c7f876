"""Real runs with every optimizer: stopped and resumed gives the same bits, and another optimizer is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import runs

from hpctrain.data.make.digits import make_digits

OPTIMIZERS = {
    "adam": ["optim.name=adam", "optim.momentum=0", "optim.lr=0.002"],
    "adamw": ["optim.name=adam", "optim.momentum=0", "optim.lr=0.002", "optim.decoupled_decay=true"],
    "lars": ["optim.name=lars", "optim.lr=0.05", "optim.trust_coefficient=0.2"],
    "lamb": ["optim.name=lamb", "optim.momentum=0", "optim.lr=0.02"],
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    make_digits(folder)
    return folder


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stopped_and_resumed_gives_the_same_bits(digits: Path, tmp_path: Path, name: str) -> None:
    found = {}
    for folder, stops in (("whole", [60]), ("cut", [25, 60])):
        config = runs.write_config(tmp_path / f"{folder}.toml", digits, tmp_path / folder, "channel = 2", epochs=2)
        for stop in stops:
            ended = runs.train(2, config, "--resume", f"train.steps={stop}", *OPTIMIZERS[name])
            assert ended.status == 0, ended.stderr
        found[folder] = runs.final_tensors(tmp_path / folder)
    (last, expected), (same, resumed) = found["whole"], found["cut"]
    assert last == same == 60
    assert expected.keys() == resumed.keys()
    assert all(expected[key].tobytes() == resumed[key].tobytes() for key in expected)
    losses = [[r["loss"] for r in runs.records(tmp_path / folder, "step")] for folder in ("whole", "cut")]
    assert losses[0] == losses[1]
    assert sum(losses[0][-5:]) < 0.7 * sum(losses[0][:5]), "it does not learn"


def test_checkpoint_of_another_optimizer_is_refused_with_the_remedy(digits: Path, tmp_path: Path) -> None:
    config = runs.write_config(tmp_path / "run.toml", digits, tmp_path / "run", epochs=1)
    assert runs.train(1, config, "train.steps=2").status == 0
    ended = runs.train(1, config, "--resume", "train.steps=4", *OPTIMIZERS["adam"])
    assert ended.status == 2
    assert "was made with optim.name = 'sgd', now 'adam'; go on with 'sgd'" in ended.stderr
