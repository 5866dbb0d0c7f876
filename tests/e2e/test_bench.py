"""`bench allreduce` and `calibrate` under mpirun: what they print, write, and make of what was written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import launching
import pytest
import runs

from hpctrain.comm.allreduce import TABLE, measured
from hpctrain.data.make.digits import make_digits

HPCTRAIN = [sys.executable, "-m", "hpctrain"]


def run(ranks: int, *words: str | Path, **environment: str) -> launching.Finished:
    """A command of hpctrain on so many ranks."""
    environment.setdefault("HPCTRAIN_MACHINE", "/nonexistent/machine.json")
    return launching.run([*launching.mpirun(ranks), *HPCTRAIN, *words], 120, launching.environment(**environment))


def results(ended: launching.Finished) -> list[dict[str, Any]]:
    """The records at the end of stdout."""
    assert ended.status == 0, ended.stderr
    found: list[dict[str, Any]] = json.loads(ended.stdout.splitlines()[-1])["results"]
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_bench_times_every_algorithm_beside_that_of_mpi(ranks: int) -> None:
    ended = run(ranks, "bench", "allreduce", "--quick", "--json")
    records = results(ended)
    expected = {*TABLE, "shared, copied"} - {"hierarchical"}
    for nbytes in (1024, 65536):
        of_size = {r["algorithm"]: r for r in records if r["bytes"] == nbytes}
        assert of_size.keys() == expected
        assert [r["algorithm"] for r in of_size.values() if r["chosen"]] == ["shared"]
        for r in of_size.values():
            assert (r["ranks"], r["precision"], r["peer"]) == (ranks, "float32", "mpi")
            assert r["peer_seconds"] == of_size["mpi"]["seconds"] > 0
            assert r["ratio"] == pytest.approx(r["peer_seconds"] / r["seconds"])
            assert r["bus_bandwidth"] == pytest.approx(2 * (ranks - 1) / ranks * nbytes / r["seconds"])
    text = ended.stdout.splitlines()[:-1]
    assert "no measurements in /nonexistent/machine.json; hpctrain calibrate makes them" in " ".join(text[:3])
    assert all(len(line) <= 80 for line in text), max(text, key=len)
    assert sum(line.startswith("* shared ") for line in text) == 2


def test_bench_of_what_is_asked_for() -> None:
    ended = run(
        2, "bench", "allreduce", "--sizes", "4K,7", "--algorithms", "tree", "--dtype", "bf16", "--json", "--repeat=2"
    )
    assert [(r["bytes"], r["precision"]) for r in results(ended)] == [(4096, "bf16")] * 2 + [(7, "bf16")] * 2
    assert {r["algorithm"] for r in results(ended)} == {"mpi", "tree"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sizes", "64k,1X"], "--sizes 1X: give bytes, with K, M or G"),
        (["--algorithms", "ring,rng"], "'rng' does not exist; choose one of ring, "),
        (["--algorithms", "horovod", "--quick"], "export HPCTRAIN_MPI_THREADS=multiple|build_horovod.sh VENV"),
        (["--algorithms", "nccl", "--quick"], "in host memory; choose another"),
    ],
)
def test_bench_refuses_and_names_the_remedy(words: list[str], message: str) -> None:
    ended = run(2, "bench", "allreduce", *words)
    assert ended.status == 2
    assert any(part in ended.stderr for part in message.split("|"))
    assert "Traceback" not in ended.stderr


def test_calibration_is_written_and_used(tmp_path: Path) -> None:
    path = tmp_path / "new" / "machine.json"
    records = results(run(2, "calibrate", "--quick", "--json", "--out", path))
    found = measured.load(path)
    assert found is not None
    assert found.node is not None
    assert found.node.alpha > 0 < found.node.beta
    assert found.network is None
    (table,) = found.tables
    assert table.hosts == (0, 0)
    assert {(r["algorithm"], r["bytes"]): r["seconds"] for r in records} == {
        (name, nbytes): seconds for name, times in table.seconds.items() for nbytes, seconds in times.items()
    }
    results(run(3, "calibrate", "--quick", "--json", "--out", path))
    both = measured.load(path)
    assert both is not None
    assert [other.hosts for other in both.tables] == [(0, 0), (0, 0, 0)]
    said = run(2, "bench", "allreduce", "--quick", HPCTRAIN_MACHINE=str(path)).stdout
    assert f"measurements of {path}" in said.replace("\n", " ")
    assert said.count("measured on 2 ranks on 1 host") == 2


def test_measurements_of_another_library_are_not_used_and_damaged_ones_refused(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_bytes(measured.encode(measured.Measured("MPICH Version: 1.0")))
    said = run(2, "bench", "allreduce", "--quick", HPCTRAIN_MACHINE=str(path))
    assert said.status == 0
    assert "was measured with MPICH Version: 1.0, this is" in said.stdout.replace("\n", " ")
    path.write_text("{}")
    ended = run(2, "bench", "allreduce", "--quick", HPCTRAIN_MACHINE=str(path))
    assert ended.status == 2
    assert ended.stderr.count("machine.json: cannot be used") == 1


def test_run_chooses_by_measurements_and_when_resumed_keeps_its_choice(tmp_path: Path) -> None:
    make_digits(tmp_path)
    config = runs.write_config(tmp_path / "run.toml", tmp_path, tmp_path / "run", "batch = 2")
    path, times = tmp_path / "machine.json", {"mpi": {1000: 1.0}, "shared": {1000: 1.0}, "tree": {1000: 1e-9}}
    results(run(2, "calibrate", "--quick", "--json", "--out", path))
    found = measured.load(path)
    assert found is not None
    doctored = measured.Measured(found.library, tables=(measured.Table((0, 0), times),))
    path.write_bytes(measured.encode(doctored))
    first = run(2, "train", config, "train.steps=2", HPCTRAIN_MACHINE=str(path))
    assert first.status == 0, first.stderr
    assert "gradients: tree allreduce (measured on 2 ranks on 1 host)" in first.stdout.replace("\n", " ")
    plan = (tmp_path / "run/plan.json").read_text()
    assert json.loads(plan)["allreduce"] == {"batch=2: batch": "tree"}
    resumed = run(2, "train", "--resume", tmp_path / "run", "train.steps=3")
    assert resumed.status == 0, resumed.stderr
    assert "gradients: tree allreduce (as the plan says)" in resumed.stdout.replace("\n", " ")
    assert (tmp_path / "run/plan.json").read_text() == plan
    anew = run(2, "train", config, "train.steps=1", f"run.folder={tmp_path}/other")
    assert anew.status == 0, anew.stderr
    said = anew.stdout.replace("\n", " ")
    assert "shared allreduce (by formula; no measurements in /nonexistent/machine.json; hpctrain calibrate" in said
