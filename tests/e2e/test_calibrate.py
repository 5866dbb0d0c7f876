"""`hpctrain calibrate` under mpirun: what it measures and writes, what runs and plans make of it, what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import runs
from runs import measuring, results

from hpctrain import config_file, machine, prepare
from hpctrain.data.make.digits import make_digits
from hpctrain.machine import Machine, Table
from hpctrain.partition import Partition, extent
from hpctrain.planner.compute import MEASURED, Pricer
from hpctrain.planner.cost import price
from hpctrain.planner.layout import layouts
from hpctrain.planner.plan import uniform
from hpctrain.planner.schedule import schedule
from hpctrain.planner.setting import Setting

ELSEWHERE = """
[model]
name = "lenet"
[data]
train = "/nonexistent/digits"
{sample}
[optim]
name = "adam"
lr = 0.01
[train]
epochs = 1
batch = 10
[run]
folder = "{folder}"
"""

SAMPLE = "sample = { shape = [21, 23, 1], classes = 7, count = 1000 }"


def read(path: Path) -> Machine:
    found = machine.load(path)
    assert found is not None
    return found


def elsewhere(tmp_path: Path, sample: str = SAMPLE) -> Path:
    """A config whose data are not here."""
    path = tmp_path / "run.toml"
    path.write_text(ELSEWHERE.format(sample=sample, folder=tmp_path / "run"), encoding="utf-8")
    return path


def test_calibration_is_written_and_used(tmp_path: Path) -> None:
    path = tmp_path / "new" / "machine.json"
    records = results(measuring(2, "calibrate", "--quick", "--json", "--out", path))
    found = read(path)
    assert found.node is not None
    assert found.node.alpha > 0 < found.node.beta
    assert found.network is None
    assert found.copies is not None
    assert found.compute is not None
    assert found.compute.flops > found.compute.bandwidth > 1e6
    assert 0 < found.compute.call < 1e-2
    shares = [share for _, share in found.compute.efficiency]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert 0 < found.update < 1e-6
    assert 0 < found.step < 1
    assert found.kernels == ()  # nobody asked for a network
    assert found.source.keys() == {"node", "tables", "copies", "compute", "update", "step"}
    (table,) = found.tables
    assert table.hosts == (0, 0)
    assert {(r["algorithm"], r["bytes"]): r["seconds"] for r in records} == {
        (name, nbytes): seconds for name, times in table.seconds.items() for nbytes, seconds in times.items()
    }
    results(measuring(3, "calibrate", "--quick", "--json", "--out", path))
    assert [other.hosts for other in read(path).tables] == [(0, 0), (0, 0, 0)]
    said = measuring(2, "bench", "allreduce", "--quick", HPCTRAIN_MACHINE=str(path)).stdout
    assert f"measurements of {path}" in said.replace("\n", " ")
    assert said.count("measured on 2 ranks on 1 host") == 2


def test_layers_of_a_config_are_measured_and_priced(tmp_path: Path) -> None:
    """Without the data. Every unit of uncut and batch-cut plans is then known; another config adds to the same file."""
    config, path = elsewhere(tmp_path), tmp_path / "machine.json"
    ended = measuring(2, "calibrate", config, "train.precision=float32", "--quick", "-o", path)
    assert ended.status == 0, ended.stderr
    found, asked = read(path), config_file.load(config, [])
    assert f"{len(found.kernels)} layers on " in ended.stdout
    assert {kernel.at_once for kernel in found.kernels} == {2}
    assert path.stat().st_size < 100_000
    graph = prepare.build_graph(asked, prepare.known_data(asked))
    setting = Setting.of(asked, found)
    pricer = Pricer(setting, graph, 2)
    for grid in (Partition(), Partition(batch=2)):
        plan = uniform(graph, grid)
        places = layouts(graph, plan)
        for unit in schedule(graph, places, setting.economy).units:
            assert pricer.source(unit, extent(places[unit.head].work.box(0))) == MEASURED
        assert 0 < price(graph, plan, setting, 2).seconds < 1
    assert found.storage is None
    results(measuring(2, "calibrate", config, "train.batch=14", "--quick", "--json", "-o", path))
    more = read(path)
    assert {kernel.key for kernel in more.kernels} == {kernel.key for kernel in found.kernels}
    assert all(
        kernel.blocks.keys() < other.blocks.keys() for kernel, other in zip(found.kernels, more.kernels, strict=True)
    )


def test_where_the_data_are_their_speed_is_measured(tmp_path: Path) -> None:
    make_digits(tmp_path)
    config = runs.write_config(tmp_path / "run.toml", tmp_path, tmp_path / "run", "batch = 2")
    path = tmp_path / "machine.json"
    results(measuring(2, "calibrate", config, "--quick", "--json", "--out", path))
    found = read(path).storage
    assert found is not None
    assert 1e5 < found.read < 1e12
    assert 1e5 < found.write < 1e12
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sample", "words", "message"),
    [
        ("", [], "/nonexistent/digits: no such folder.*data.sample = "),
        (SAMPLE, ["train.batch=abc"], "train.batch"),
        (SAMPLE, ["other.toml"], "one config at a time"),
        ("sample = { shape = [3, 3, 1], classes = 7, count = 10 }", [], "do not fit lenet"),
        (SAMPLE, ["--out", "/proc/nonexistent/machine.json"], "cannot be written.*--out"),
    ],
)
def test_bad_input_is_named_with_the_remedy(sample: str, words: list[str], message: str, tmp_path: Path) -> None:
    ended = measuring(2, "calibrate", elsewhere(tmp_path, sample), "--quick", *words)
    assert ended.status == 2, ended.stderr
    said = ended.stderr.replace("\n", " ")
    assert "Traceback" not in said
    assert re.search(message, said), said


def test_measurements_of_another_library_are_not_used_and_damaged_ones_refused(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_bytes(machine.encode(Machine("MPICH Version: 1.0")))
    said = measuring(2, "bench", "allreduce", "--quick", HPCTRAIN_MACHINE=str(path))
    assert said.status == 0
    assert "was measured with MPICH Version: 1.0, this is" in said.stdout.replace("\n", " ")
    path.write_text("{}x")
    ended = measuring(2, "bench", "allreduce", "--quick", HPCTRAIN_MACHINE=str(path))
    assert ended.status == 2
    assert ended.stderr.count("machine.json: cannot be used") == 1


def test_run_chooses_by_measurements_and_when_resumed_keeps_its_choice(tmp_path: Path) -> None:
    make_digits(tmp_path)
    config = runs.write_config(tmp_path / "run.toml", tmp_path, tmp_path / "run", "batch = 2")
    path, times = tmp_path / "machine.json", {"mpi": {1000: 1.0}, "shared": {1000: 1.0}, "tree": {1000: 1e-9}}
    results(measuring(2, "calibrate", "--quick", "--json", "--out", path))
    doctored = Machine(read(path).library, tables=(Table((0, 0), times),))
    path.write_bytes(machine.encode(doctored))
    first = measuring(2, "train", config, "train.steps=2", HPCTRAIN_MACHINE=str(path))
    assert first.status == 0, first.stderr
    assert "gradients: tree allreduce (measured on 2 ranks on 1 host)" in first.stdout.replace("\n", " ")
    plan = (tmp_path / "run/plan.json").read_text()
    assert json.loads(plan)["allreduce"] == {"batch=2: batch": "tree"}
    resumed = measuring(2, "train", "--resume", tmp_path / "run", "train.steps=3")
    assert resumed.status == 0, resumed.stderr
    assert "gradients: tree allreduce (as the plan says)" in resumed.stdout.replace("\n", " ")
    assert (tmp_path / "run/plan.json").read_text() == plan
    anew = measuring(2, "train", config, "train.steps=1", f"run.folder={tmp_path}/other")
    assert anew.status == 0, anew.stderr
    said = anew.stdout.replace("\n", " ")
    assert "shared allreduce (by formula; no measurements in /nonexistent/machine.json; hpctrain calibrate" in said
