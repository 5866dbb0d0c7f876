"""`hpctrain plan` as a person meets it: from a config to a plan that trains, and messages where that cannot be."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import launching
import pytest
import runs
from msgspec.structs import replace

from hpctrain import cli, launch, machine
from hpctrain.data.make.digits import make_digits
from hpctrain.machine import Compute, Copies, Level, Machine
from hpctrain.partition import Partition
from hpctrain.planner.plan import Plan

CONFIG = """\
[model]
name = "lenet"
[data]
train = "data/train"
sample = {shape = [28, 28, 1], classes = 10, count = 1438}
[optim]
lr = 0.05
momentum = 0.9
[train]
epochs = 1
batch = 24
"""

FIGURES = Machine(
    name="toy",
    node=Level(1e-6, 1e-10, 1e-11),
    network=Level(5e-6, 1e-9, 1e-11),
    per_host=4,
    hosts=4,
    copies=Copies(1e-6, 1e-10),
    compute=Compute(1e10, 1e10),
    memory=2.0**30,
    date="2026-01-02",
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: run.toml, of data that are not there, and toy.json, a machine of 4 hosts of 4 ranks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPCTRAIN_MACHINE", str(tmp_path / "toy.json"))
    (tmp_path / "run.toml").write_text(CONFIG)
    (tmp_path / "toy.json").write_bytes(machine.encode(FIGURES))
    return tmp_path


def plan(*words: str) -> int:
    """Exit status of `hpctrain plan WORDS`, in this process: it starts no MPI."""
    return cli.main(["plan", *words])


def results(out: str) -> list[dict[str, Any]]:
    """The records of --json."""
    found: list[dict[str, Any]] = json.loads(out.splitlines()[-1])["results"]
    return found


# --- from a config to a run ------------------------------------------------------------------------------------------


def test_plan_trains(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The line that the command ends with runs, without a change."""
    assert plan("run.toml", "--ranks", "3", "-o", "plan.json", "train.seed=5") == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines()[:-1])) <= 79
    paste = text.splitlines()[-1]
    assert paste.endswith(" train run.toml train.seed=5 plan.grid=plan.json")
    assert " -n 3 " in paste
    for word in (
        "lenet, batches of 24",
        "toy, figures of 2026-01-02",
        "3 ranks: as asked",
        "conv1",
        "memory of a rank",
    ):
        assert word in text
    for name in ("data", "model", "domain", "one weird trick", "best uniform grid"):
        assert re.search(rf"^{name} +(\d|-)", text, re.M), name
    found = Plan.from_json((folder / "plan.json").read_text(), "plan.json")
    assert found.ranks == 3
    make_digits(folder / "data")
    words = shlex.split(paste.split(" train ")[1])
    ended = launching.run(runs.command(3, "train", *words, "train.steps=2"), timeout=60, cwd=folder)
    assert ended.status == 0, ended.stderr
    assert "plan.json" in ended.stdout


def test_commands_of_the_readme(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    lines = re.findall(r"^hpctrain plan (run\.toml.*?) *(?:#.*)?$", readme, re.M)
    assert len(lines) == 2
    for line in lines:
        assert plan(*shlex.split(line)) == 0
    assert "64" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {"run.toml", "toy.json", "plan.json", "scaling.png"}


def test_no_mpi_is_loaded(folder: Path) -> None:
    """Whatever is asked for."""
    code = (
        "import sys\nfrom hpctrain.cli import main\n"
        "for words in sys.argv[1:]:\n    assert main(['plan', 'run.toml', *words.split()]) == 0\n"
        "print('mpi4py.MPI' in sys.modules)"
    )
    asked = ["--sweep 1..4 --trace a.json -o p.json", "--ranks 2 --grids all"]
    ended = launching.run([sys.executable, "-c", code, *asked], timeout=60, cwd=folder, env=here(folder))
    assert (ended.status, ended.stdout.splitlines()[-1]) == (0, "False"), ended.stderr


def here(folder: Path) -> dict[str, str]:
    """An environment in which the toy is this machine."""
    return launching.environment(HPCTRAIN_MACHINE=str(folder / "toy.json"))


def test_records(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("run.toml", "--ranks", "4", "--json", "--per", "epoch", "--batch", "32") == 0
    found = results(capsys.readouterr().out)
    layers = [r for r in found if "layer" in r]
    (summary,) = (r for r in found if r.get("plan") == "searched" and "peer" not in r)
    others = {r["peer"]: r for r in found if "peer" in r}
    assert {r["layer"] for r in layers} >= {"conv1", "fc1", "loss"}
    assert {r["source"] for r in layers} == {None, "formula"}
    assert all(r["pr"] * r["pc"] == Partition.of(r["partition"]).size <= 4 for r in layers)
    steps = 1438 // 32
    compute = sum(r["compute_seconds"] for r in layers)
    assert summary["compute_seconds"] == pytest.approx(compute)
    assert {(r["ranks"], r["batch"], r["per"], r["network"]) for r in found} == {(4, 32, "epoch", "lenet")}
    assert set(others) == {"data", "model", "domain", "one weird trick", "best uniform grid"}
    for record in others.values():
        if record["peer_seconds"] is not None:
            assert record["ratio"] >= 1 - 1e-9, "no baseline is better than what was searched for"
    assert plan("run.toml", "--ranks", "4", "--json", "--batch", "32") == 0
    (step,) = (r for r in results(capsys.readouterr().out) if r.get("plan") == "searched" and "peer" not in r)
    assert summary["seconds"] == pytest.approx(steps * step["seconds"])


def test_network_is_the_same_without_its_data(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for data in (False, True):
        if data:
            make_digits(folder / "data")
        assert plan("run.toml", "--ranks", "2", "--json") == 0
        texts.append([{k: v for k, v in r.items() if k != "search_seconds"} for r in results(capsys.readouterr().out)])
    assert texts[0] == texts[1]


# --- how many ranks --------------------------------------------------------------------------------------------------


def test_best_number_of_ranks_is_that_of_the_sweep(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a network so slow that two hosts are worse than one."""
    slow = json.loads(machine.encode(FIGURES)) | {"network": {"alpha": 1e-2, "beta": 1e-7, "gamma": 1e-11}}
    (folder / "slow.json").write_text(json.dumps(slow))
    assert plan("run.toml", "--machine", "slow.json", "--json") == 0
    text = capsys.readouterr().out
    points = [r for r in results(text) if "efficiency" in r]
    assert [r["ranks"] for r in points] == [1, 2, 4, 8, 16]
    (chosen,) = (r for r in points if r["chosen"])
    assert chosen["ranks"] == 4 == max(points, key=lambda r: r["samples_per_second"])["ranks"]
    assert points[0]["efficiency"] == 1.0
    said = " ".join(text.split())
    assert re.search(r" 4 ranks: [\d.,]+ samples per second; 2: .* less, (8|16): .* less", said)
    assert text.splitlines()[-2].startswith("srun -n 4 hpctrain train run.toml plan.grid=auto plan.machine=slow.json")
    assert plan("run.toml", "--machine", "slow.json", "--sweep", "1..16") == 0
    table = capsys.readouterr().out
    (starred,) = (line for line in table.splitlines() if line.startswith("* "))
    assert starred.split()[1] == "4"


def test_sweep_with_a_plot_and_a_number_of_ranks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("run.toml", "--sweep", "2..6", "--ranks", "3", "--plot", "scaling.svg") == 0
    text = capsys.readouterr().out
    assert [line.split()[0] for line in re.findall(r"^[* ] +(\d+ .*)$", text, re.M)][:3] == ["2", "4", "6"]
    assert "3 ranks: as asked" in text
    drawn = (folder / "scaling.svg").read_text()
    assert "<svg" in drawn


def test_energy_and_price_are_told_where_they_are_known(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = json.loads(machine.encode(FIGURES)) | {"power": {"idle": 40.0, "busy": 160.0}, "price": 36.0}
    (folder / "known.json").write_text(json.dumps(known))
    for objective in ("energy", "cost"):
        assert plan("run.toml", "--machine", "known.json", "--objective", objective, "--sweep", "1..4", "--json") == 0
        text = capsys.readouterr().out
        points = [r for r in results(text) if "efficiency" in r]
        key = {"energy": "joules", "cost": "price"}[objective]
        (chosen,) = (r for r in points if r["chosen"])
        assert chosen[key] <= 1.01 * min(r[key] for r in points)
        for r in points:
            waiting = r["predicted_seconds"] - r["busy_seconds"]
            assert r["joules"] == pytest.approx(r["ranks"] * (160 * r["busy_seconds"] + 40 * waiting))
            assert r["price"] == pytest.approx(r["ranks"] * 36 * r["predicted_seconds"] / 3600)
        assert " J a step, " in text
        assert re.search(r"^price: [\d.e-]+ a step$", text, re.M)


# --- grids, traces ---------------------------------------------------------------------------------------------------


def test_all_grids(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("run.toml", "--grids", "all", "--ranks", "12", "--json") == 0
    found = results(capsys.readouterr().out)
    assert {(r["pr"], r["pc"]) for r in found} == {(n, 12 // n) for n in (1, 2, 3, 4, 6, 12)}
    for r in found:
        parts = r["compute_seconds"] + r["model_seconds"] + r["batch_seconds"]
        assert r["seconds"] == pytest.approx(parts)
        assert (r["model_seconds"] == 0) == (r["pr"] == 1)


def test_published_grids_in_published_accounting(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Figure 7 of Gholami et al. 2018 at P = 512: 32 x 16 is best, 1.49 s of 26.9 s of an epoch for its model part."""
    example = Path(__file__).parents[2] / "examples" / "papers" / "alexnet-cori.toml"
    asked = ["--accounting", "paper", "--grids", "all", "--ranks", "512", "--per", "epoch", "--json"]
    assert plan(str(example), *asked) == 0
    found = results(capsys.readouterr().out)
    best = min(found, key=lambda r: r["seconds"])
    assert (best["pr"], best["pc"]) == (32, 16)
    assert best["seconds"] == pytest.approx(26.8, abs=0.2)
    assert found[0]["batch_seconds"] == pytest.approx(44.39, abs=0.2)
    assert plan(str(example), *asked, "plan.overlap=true") == 0
    best = min(results(capsys.readouterr().out), key=lambda r: r["seconds"])
    assert (best["pr"], best["pc"]) == (4, 128)
    assert best["seconds"] == pytest.approx(22.5, abs=0.1)


def test_trace_of_a_step(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("run.toml", "--ranks", "8", "--trace", "step.json") == 0
    assert "ui.perfetto.dev" in capsys.readouterr().out
    events = json.loads((folder / "step.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {span["tid"] for span in spans} == set(range(8))
    assert {span["pid"] for span in spans} == {0, 1}
    assert "compute" in {span["cat"] for span in spans}


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "which run? give CONFIG.toml"),
        (["nowhere.toml"], "nowhere.toml"),
        (["run.toml", "train.bach=3"], "did you mean train.batch?"),
        (["run.toml", "--machine", "summit"], "not one of cori-knl"),
        (["run.toml", "--machine", "bad.json"], "bad.json: cannot be used"),
        (["run.toml", "--ranks", "17"], "17 ranks, but toy has 4 hosts of 4, 16 in all"),
        (["run.toml", "--sweep", "1..64"], "64 ranks, but toy has 4 hosts of 4, 16 in all"),
        (["run.toml", "--ranks", "2", "--memory", "1e-3"], "that fits into 1.0 MiB"),
        (["run.toml", "--sweep", "1..2", "--memory", "1e-3"], "no plan for 1 to 2 ranks"),
        (["run.toml", "--objective", "energy"], "toy has no figures of power"),
        (["run.toml", "--objective", "cost"], "toy has no price"),
        (["run.toml", "plan.objective=cost"], "toy has no price"),
        (["run.toml", "--grids", "all"], "give --ranks N"),
        (["run.toml", "--grids", "all", "--ranks", "2", "-o", "p.json"], "--out has no effect with --grids"),
        (["run.toml", "--grids", "all", "--ranks", "2", "--sweep", "1..2"], "--sweep has no effect with --grids"),
        (["run.toml", "--accounting", "paper"], "give --grids all"),
        (["run.toml", "--plot", "a.png", "--ranks", "2"], "give --sweep"),
        (["run.toml", "--plot", "a.txt"], "ends in .png, .svg"),
        (["run.toml", "--plot", "nowhere/a.png"], "there is no folder"),
        (["run.toml", "--ranks", "2", "-o", "nowhere/p.json"], "there is no folder"),
        (["run.toml", "--ranks", "2", "data.sample="], "data.sample = {shape = "),
        (["run.toml", "--ranks", "2", "--per", "epoch", "--batch", "1439"], "only 1438 samples"),
        (["run.toml", "--ranks", "2", "sync.strategy=elastic", "sync.replicas=2"], "sync.strategy"),
        (["run.toml", "--ranks", "2", "model.name=lenett"], "model.name = 'lenett': not a network here"),
    ],
)
def test_bad_input_is_one_message_with_a_remedy(
    words: list[str], says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "bad.json").write_text('{"version": 2, "compute": {"flops": 0}}')
    assert plan(*words) == 2
    said = capsys.readouterr()
    assert says in " ".join(said.err.split())
    assert said.err.count("hpctrain: error: ") == 1
    assert "Traceback" not in said.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--ranks", "0"], "expected a whole number, at least 1, or auto, not '0'"),
        (["--ranks", "many"], "or auto, not 'many'"),
        (["--sweep", "8..2"], "expected FEWEST..MOST ranks, 1..64 for instance, not '8..2'"),
        (["--sweep", "0..2"], "not '0..2'"),
        (["--memory", "-1"], "expected GiB, a number above 0"),
        (["--batch", "0"], "at least 1, not '0'"),
        (["--objective", "fame"], "invalid choice: 'fame'"),
        (["--grids", "some"], "invalid choice: 'some'"),
    ],
)
def test_bad_usage(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        plan("run.toml", *words)
    assert left.value.code == 2
    assert says in capsys.readouterr().err


def test_unmeasured_machine_names_what_can_be_done(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPCTRAIN_MACHINE", str(folder / "none.json"))
    assert plan("run.toml", "--ranks", "2") == 2
    text = capsys.readouterr().err
    assert "perlmutter-gpu" in text
    assert text.strip().splitlines()[-1].endswith("calibrate run.toml")


def test_more_ranks_than_cores_here_are_said(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "toy.json").write_bytes(machine.encode(replace(FIGURES, per_host=None, hosts=None)))
    monkeypatch.setattr(launch, "cores", lambda: 2)
    for ranks, said in (("3", 1), ("2", 0)):
        assert plan("run.toml", "--ranks", ranks) == 0
        assert capsys.readouterr().out.count("would share the 2 cores of this machine") == said


def test_one_sample_on_many_ranks_is_planned_by_other_axes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A batch of 1 leaves nothing to cut but the sample and the model."""
    assert plan("run.toml", "--ranks", "4", "--batch", "1", "--json") == 0
    layers = [r for r in results(capsys.readouterr().out) if "layer" in r]
    assert all(r["pc"] == 1 for r in layers)
    assert max(r["pr"] for r in layers) == 4


def test_under_a_launcher_it_is_refused(folder: Path) -> None:
    inside = here(folder) | {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}
    command = [sys.executable, "-m", "hpctrain", "plan", "run.toml", "--ranks", "2"]
    ended = launching.run(command, timeout=60, env=inside, cwd=folder)
    assert ended.status == 2
    assert "a plan is made by one, without MPI" in ended.stderr
    assert ended.stderr.strip().splitlines()[-1].endswith("plan run.toml --ranks 2")


def test_deep_networks_fit_the_terminal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = "data.sample={shape = [32, 32, 3], classes = 10, count = 100}"
    words = ["run.toml", "--ranks", "2", "model.name=resnet18", sample, "plan.only={Conv=['batch', 'height']}"]
    assert plan(*words) == 0
    short = capsys.readouterr().out
    assert plan(*words, "--all") == 0
    every = capsys.readouterr().out
    for text in (short, every):
        assert max(map(len, text.splitlines()[:-1])) <= 79
    assert "layer4.1.conv2" in every
    assert len(short.splitlines()) < 60 < len(every.splitlines())


def test_plans_folder_is_left_clean(folder: Path) -> None:
    """Nothing is written but what was asked for."""
    assert plan("run.toml", "--ranks", "2") == 0
    assert sorted(path.name for path in folder.iterdir()) == ["run.toml", "toy.json"]
