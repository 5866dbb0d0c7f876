"""`hpctrain verify` as a user runs it: the verdict and exit status for right and wrong networks, plans and flags."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import launching
import numpy as np
import pytest
import runs

from hpctrain.data.importer import import_arrays

NET = """
from dataclasses import dataclass

from hpctrain.layers import BatchNorm, Conv, Dense, GlobalAvgPool, ReLU
from hpctrain.models import finish, start


@dataclass(frozen=True)
class Careless(Conv):
    def bind(self, place):
        return CarelessOp(super().bind(place), place)


class CarelessOp:
    '''Takes the row below for its halo above, wherever that is not padding.'''

    def __init__(self, op, place):
        self.op, self.cut = op, place.inputs[0][1].start > 0

    def forward(self, x, w, y, phase):
        block = x[0].copy()
        if self.cut:
            block[:, 0] = block[:, 1]
        self.op.forward([block], w, y, phase)

    def backward(self, dy, w, dx, dw):
        self.op.backward(dy, w, dx, dw)


def build(batch, sample, careless=False):
    net, x = start(batch, sample)
    x = net.add("conv1", Conv(5, kernel=3, padding=1), x)
    x = net.add("norm", BatchNorm(), x)
    x = net.add("relu", ReLU(), x)
    x = net.add("conv2", (Careless if careless else Conv)(4, kernel=3, padding=1), x)
    x = net.add("pool", GlobalAvgPool(), x)
    return finish(net, net.add("out", Dense(sample.outputs), x), sample)
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config for the network in NET, on images of 13 x 11 with 3 classes."""
    folder, rng = tmp_path_factory.mktemp("verify"), np.random.default_rng(0)
    np.save(folder / "x.npy", rng.random((20, 13, 11, 2), np.float32))
    np.save(folder / "y.npy", np.arange(20) % 3)
    import_arrays(folder / "x.npy", folder / "y.npy", folder / "train")
    (folder / "net.py").write_text(NET)
    path = runs.write_config(folder / "run.toml", folder, folder / "run", batch=5, model=f"{folder}/net.py:build")
    path.write_text(path.read_text().replace(f'test = "{folder}/test"\n', ""))
    return path


def verify(ranks: int, *words: str | Path, timeout: float = 60) -> launching.Finished:
    """`hpctrain verify WORDS` on `ranks` ranks."""
    return launching.run(runs.command(ranks, "verify", *words), timeout)


def results(ended: launching.Finished) -> list[dict[str, object]]:
    """The records of --json."""
    found: list[dict[str, object]] = json.loads(ended.stdout.splitlines()[-1])["results"]
    return found


@pytest.mark.parametrize(
    ("ranks", "grid", "precision"),
    [(2, "batch=2", "float64"), (4, "height=2,channel=2", "float32"), (3, "width=3", "float64")],
)
def test_right_plan_is_equal(config: Path, ranks: int, grid: str, precision: str) -> None:
    ended = verify(ranks, config, "--grid", grid, "--precision", precision, "--json")
    assert ended.status == 0, ended.stdout + ended.stderr
    *text, _ = ended.stdout.splitlines()
    assert text[-1] == "equal: by the plan, ranks compute what one computes, and move what is predicted"
    assert max(map(len, text)) < 80
    *found, summary = results(ended)
    assert summary["equal"] is True
    layers = [record for record in found if "layer" in record]
    assert [record["layer"] for record in layers] == ["conv1", "norm", "relu", "conv2", "pool", "out", "loss"]
    assert all(record["precision"] == precision and record["equal"] for record in layers)
    edges = {record["edge"]: record for record in found if "edge" in record}
    assert edges.keys() >= {"x -> conv1", "relu -> conv2", "out -> loss"}
    for edge in edges.values():
        assert edge["forward_bytes"] == edge["predicted_forward_bytes"]
        assert edge["backward_bytes"] == edge["predicted_backward_bytes"]
    if grid == "width=3":  # two neighbours of 5 x 13 x 5 channels, both ways, 2 steps
        both = 2 * 2 * (2 * 5 * 13 * 5) * 8
        assert edges["relu -> conv2"]["forward_bytes"] == edges["relu -> conv2"]["backward_bytes"] == both


@pytest.mark.parametrize("sampled", [False, True])
def test_wrong_layer_is_named(config: Path, sampled: bool) -> None:
    words = ["--grid", "height=3", "model.options.careless=true", "--json", *(["--sample-layers"] if sampled else [])]
    ended = verify(3, config, *words)
    assert ended.status == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    text = " ".join(ended.stdout.split())
    assert "conv2 (Careless, height=3) is the first layer that differs, in step 1: its output, on rank" in text
    *found, summary = results(ended)
    assert summary["equal"] is False
    different = [record["layer"] for record in found if "layer" in record and not record["equal"]]
    assert "conv2" in different
    assert (different == ["conv2"]) == sampled
    if sampled:
        assert "on 5 x 13 x 11 x 5" in text


def test_mixed_plan_from_a_file(config: Path, tmp_path: Path) -> None:
    cuts: dict[str, dict[str, int]] = {name: {"height": 2} for name in ("x", "conv1", "norm", "conv2")}
    cuts |= {"relu": {"batch": 3}, "pool": {"width": 4}, "out": {"channel": 3}, "y": {}, "loss": {"batch": 2}}
    (tmp_path / "plan.json").write_text(json.dumps({"version": 1, "allreduce": "mpi", "layers": cuts}))
    ended = verify(4, config, "--plan", tmp_path / "plan.json")
    assert ended.status == 0, ended.stdout + ended.stderr
    assert re.search(r"^pool +GlobalAvgPool +w4 ", ended.stdout, re.M)


def test_one_process_without_a_launcher(config: Path) -> None:
    command = [sys.executable, "-m", "hpctrain", "verify", config, "--steps", "1"]
    ended = launching.run(command, timeout=60)
    assert ended.status == 0, ended.stderr
    assert "no bytes move between ranks" in ended.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--grid", "batch=3"], "plan.grid: batch=3 needs 3 ranks, but 2 were started"),
        (["--grid", "bath=2"], "plan.grid.bath = 2: no such key; did you mean plan.grid.batch?"),
        (["--grid", "depth=2"], "no layer can be cut along depth"),
        (["--grid", "depth:2"], "--grid depth:2: give axis=blocks, e.g. depth=2,height=2"),
        (["--plan", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--grid", "height=2", "--plan", "p.json"], "not allowed with argument"),
        (["--precision", "float16"], "invalid choice: 'float16'"),
        (["--steps", "0"], "expected a whole number, at least 1"),
        (["model.name=lnet"], "lenet"),
    ],
)
def test_bad_input_is_refused_by_all_ranks(config: Path, words: list[str], says: str) -> None:
    ended = verify(2, config, *words)
    assert ended.status == 2, ended.stdout
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count("hpctrain: error: ") <= 1  # argparse speaks on every rank


def test_typo_in_the_network_is_bad_input_and_told_once(config: Path, tmp_path: Path) -> None:
    (tmp_path / "typo.py").write_text(NET.replace("kernel=3, padding=1), x)", "kernel=3, pading=1), x)", 1))
    ended = verify(2, config, f"model.name={tmp_path}/typo.py:build")
    assert ended.status == 2, ended.stdout
    assert ended.stderr.count("hpctrain: error: ") == ended.stderr.count("Traceback") == 1
    assert f"hpctrain: error: {tmp_path}/typo.py, line 32: TypeError: " in ended.stderr


def test_no_room_for_the_whole_network_names_the_remedy(config: Path) -> None:
    limited = ["bash", "-c", 'ulimit -d 400000; exec "$@"', "_", sys.executable, "-m", "hpctrain", "verify"]
    command = [*launching.mpirun(2), *limited, config, "--grid", "height=2", "train.batch=20000"]
    ended = launching.run(command, timeout=60)
    assert ended.status == 2, ended.stdout
    assert re.search(r"the whole network, which rank 0 runs, needs [\d,]+ MiB", ended.stderr)
    assert "(ulimit -d 400000)" in ended.stderr
    assert ended.stderr.count("--sample-layers") == 1
    ended = launching.run([*command, "--sample-layers", "--budget", "8", "--steps", "1"], timeout=60)
    assert ended.status == 0, ended.stdout + ended.stderr
    assert "for 20000 x 13 x 11 x 5" in ended.stdout
