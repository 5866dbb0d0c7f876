"""`plan.grid = "auto"`: a run finds its plan, says why, keeps it when resumed, and at its end how far off it was."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import launching
import msgspec
import pytest
import runs

from hpctrain import machine
from hpctrain.data.make.digits import make_digits
from hpctrain.machine import Compute, Copies, Level, Machine

TOY = Machine(
    name="toy",
    node=Level(1e-6, 1e-10, 1e-11),
    copies=Copies(1e-4, 1e-10),
    compute=Compute(1e9, 1e10, call=1e-6),
    update=1e-10,
    step=1e-5,
)

AUTO = 'plan.grid="auto"'


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits."""
    folder = tmp_path_factory.mktemp("digits")
    make_digits(folder)
    return folder


@pytest.fixture
def config(tmp_path: Path, data: Path) -> Path:
    """A run of LeNet in float64 into the folder `run`; machine.json beside it is a machine without a network."""
    (tmp_path / "machine.json").write_bytes(machine.encode(TOY))
    return runs.write_config(tmp_path / "net.toml", data, tmp_path / "run", epochs=2)


def parts(folder: Path) -> Mapping[str, Any]:
    """{layer: partition} of the plan in a run folder."""
    found: Mapping[str, Any] = json.loads((folder / "plan.json").read_text())["layers"]
    return found


def losses(folder: Path) -> list[float]:
    """Of all steps."""
    return [record["loss"] for record in runs.records(folder, "step")]


def by(folder: Path) -> str:
    """The override that names the machine of a folder."""
    return f"plan.machine={folder / 'machine.json'}"


def test_run_finds_its_plan_and_says_how_far_off_it_was(config: Path, tmp_path: Path) -> None:
    ended = runs.train(2, config, AUTO, by(tmp_path), "train.steps=8", "--json")
    assert ended.status == 0, ended.stderr
    said = " ".join(ended.stdout.split())
    assert "plan auto" in said
    assert re.search(r"searched for 2 ranks, a step should take [\d.]+ m?s; the best of the usual plans, .*: ", said)
    assert "predicted by toy" in said
    assert max(len(line) for line in ended.stdout.splitlines()[:-1] if "{" not in line) < 80
    last = json.loads(ended.stdout.splitlines()[-1])["results"][-1]
    wrong = last["predicted_seconds"] / last["step_seconds"] - 1
    assert last["error"] == pytest.approx(wrong)
    found = json.loads((tmp_path / "run" / "prediction.json").read_text())
    assert found["predicted"]["step"] == last["predicted_seconds"]
    assert sum(found["measured"][phase] for phase in ("compute", "exchange", "allreduce", "input", "other")) == (
        pytest.approx(found["measured"]["step"])
    )
    assert found["predicted"]["input"] is None, "the file says nothing of storage"
    (record,) = runs.records(tmp_path / "run", "prediction")
    assert record["predicted_compute_seconds"] == found["predicted"]["compute"]
    assert record["steps"] == 5
    # it is a plan like any other
    again = runs.train(
        2, config, f"plan.grid={tmp_path / 'run' / 'plan.json'}", f"run.folder={tmp_path / 'again'}", "train.steps=8"
    )
    assert again.status == 0, again.stderr


def test_plan_follows_the_machine(config: Path, tmp_path: Path) -> None:
    """Where sums take long, dense layers, which have most weights, are cut by channels; losses differ by rounding."""
    slow = msgspec.structs.replace(TOY, node=Level(1e-6, 1e-6, 1e-7))
    for name, found in (("fast", TOY), ("slow", slow)):
        (tmp_path / f"{name}.json").write_bytes(machine.encode(found))
        words = AUTO, f"plan.machine={tmp_path / name}.json", f"run.folder={tmp_path / name}", "train.steps=4"
        ended = runs.train(2, config, *words)
        assert ended.status == 0, ended.stderr
    assert all(cut == {"batch": 2} for cut in parts(tmp_path / "fast").values() if cut)
    assert parts(tmp_path / "slow")["fc1"] != {"batch": 2}
    assert losses(tmp_path / "slow") == pytest.approx(losses(tmp_path / "fast"), rel=1e-9)


def test_resumed_run_keeps_its_plan_on_as_many_ranks(config: Path, tmp_path: Path) -> None:
    """Even if another would be found by now: its bits are those of a run that was never interrupted."""
    run = tmp_path / "run"
    whole = runs.train(2, config, AUTO, by(tmp_path), f"run.folder={tmp_path / 'whole'}", "train.steps=9")
    first = runs.train(2, config, AUTO, by(tmp_path), "train.steps=4")
    assert (whole.status, first.status) == (0, 0), whole.stderr + first.stderr
    before = parts(run)
    only = 'plan.only={Conv=["height"], Dense=["channel"]}'
    resumed = runs.train(2, "--resume", run, only, "train.steps=9")
    assert resumed.status == 0, resumed.stderr
    assert "plan.json, made for 2 ranks; without the file" in " ".join(resumed.stdout.split())
    assert parts(run) == before == parts(tmp_path / "whole")
    assert losses(run) == losses(tmp_path / "whole")
    wider = runs.train(3, "--resume", run, only, "train.steps=10")
    assert wider.status == 0, wider.stderr
    assert "searched for 3 ranks" in wider.stdout
    assert parts(run)["conv1"] == {"height": 3}
    assert len(losses(run)) == 10


def test_without_measurements_it_is_a_guess_and_says_so(config: Path, tmp_path: Path) -> None:
    ended = runs.train(2, config, AUTO, "train.steps=3")
    assert ended.status == 0, ended.stderr
    said = " ".join(ended.stdout.split())
    assert "predicted by a guess: " in said
    assert "(hpctrain calibrate CONFIG.toml, on as many ranks, measures it)" in said
    assert re.search(rf"^mpirun .*hpctrain calibrate {tmp_path / 'run' / 'config.toml'}$", ended.stdout, re.M)


def test_a_grid_without_measurements_has_no_prediction(config: Path, tmp_path: Path) -> None:
    ended = runs.train(1, config, "train.steps=3")
    assert ended.status == 0, ended.stderr
    assert re.search(r"^a step in milliseconds, mean of 2:$", ended.stdout, re.M)
    assert "predicted" not in ended.stdout
    assert re.search(rf"^hpctrain calibrate {tmp_path / 'run' / 'config.toml'}$", ended.stdout, re.M)
    assert json.loads((tmp_path / "run" / "prediction.json").read_text())["predicted"] is None


def test_replicas_have_a_rank_each_unless_their_number_is_said(config: Path, tmp_path: Path) -> None:
    local = ("sync.strategy=local", "train.steps=3", by(tmp_path), AUTO)
    each = runs.train(2, config, *local, f"run.folder={tmp_path / 'each'}")
    assert each.status == 0, each.stderr
    assert "2 replicas (local)" in each.stdout
    assert "searched for 1 rank, " in each.stdout
    assert "without what replicas exchange" in each.stdout
    assert not any(parts(tmp_path / "each").values())
    uneven = runs.train(3, config, *local, "sync.replicas=2")
    assert uneven.status == 2
    assert "2 replicas cannot have equally many of 3 ranks; start a multiple of 2, or set sync" in uneven.stderr


def test_verify_checks_the_plan_that_would_be_found(config: Path, tmp_path: Path) -> None:
    words = ("verify", config, AUTO, by(tmp_path), "--steps", "1")
    ended = launching.run(runs.command(2, *words), timeout=120)
    assert ended.status == 0, ended.stdout + ended.stderr
    assert "searched for 2 ranks" in ended.stdout
    assert "equal: by the plan, ranks compute what one computes" in ended.stdout


@pytest.mark.parametrize(
    ("found", "words", "message"),
    [
        (b"{", (), r"machine\.json: cannot be used \(.*\); mend it, or remove it and measure again"),
        (machine.encode(TOY), ("plan.machine=nowhere",), r"machine '.*nowhere': no such file, and not one of .*cori"),
        (
            machine.encode(msgspec.structs.replace(TOY, memory=2.0**16)),
            (),
            r"no plan for 2 ranks .* 0\.1 MiB: .* layer",
        ),
    ],
    ids=["damaged", "absent", "too small"],
)
def test_bad_input_is_refused_once(
    config: Path, tmp_path: Path, found: bytes, words: tuple[str, ...], message: str
) -> None:
    (tmp_path / "machine.json").write_bytes(found)
    ended = runs.train(2, config, AUTO, by(tmp_path), "train.steps=2", *words)
    assert ended.status == 2
    assert ended.stderr.count("hpctrain: error: ") == 1
    assert re.search(message, ended.stderr.replace("\n", " "))
    assert "Traceback" not in ended.stderr


def test_dry_run_names_the_command_that_needs_no_ranks(config: Path) -> None:
    ended = runs.train(1, config, AUTO, "--dry-run")
    assert ended.status == 2
    assert re.search(rf"^hpctrain plan {config} --ranks 2 -o plan\.json$", ended.stderr, re.M)
