"""Who started this process: what mpirun, srun and others say in the environment. No MPI."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hpctrain.errors import HpctrainError, LaunchError

LOST_RANK = 3
"""Exit status when another rank died."""

BUG = 70
"""Exit status after an exception that nobody expected (EX_SOFTWARE)."""

STOPPED = 75
"""Exit status of a run that stopped on purpose and can be resumed (EX_TEMPFAIL)."""

# (name, variable with the number of processes, variable with this one's rank): launchers within launchers come first.
_LAUNCHERS = (
    ("Open MPI's mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("MPICH's mpirun", "PMI_SIZE", "PMI_RANK"),
    ("MVAPICH's mpirun", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    ("jsrun", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK"),
    ("flux run", "FLUX_JOB_SIZE", "FLUX_TASK_RANK"),
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)


@dataclass(frozen=True)
class Launched:
    """What the launcher said: its name, how many processes it started, and which of them this is."""

    name: str
    size: int
    rank: int


def launched(environ: Mapping[str, str]) -> Launched | None:
    """The launcher that started this process, or None."""
    for name, size, rank in _LAUNCHERS:
        of_srun = name == "MPICH's mpirun" and "SLURM_STEP_ID" in environ and "MPI_LOCALNRANKS" not in environ
        if environ.get(size, "").isdigit() and not of_srun:  # srun --mpi=pmi2 sets the variables of MPICH too
            return Launched(name, int(environ[size]), int(environ.get(rank, "0")))
    return None


def family(library: str) -> str:
    """`Open MPI`, `MPICH` (and all that share its ABI) or `other`, from MPI's version string or that of an mpirun."""
    if "Open MPI" in library or "OpenRTE" in library:
        return "Open MPI"
    return "MPICH" if any(name in library for name in ("MPICH", "MVAPICH", "Intel(R) MPI", "HYDRA")) else "other"


def check_family(by: Launched | None, library: str, library_path: str) -> None:
    """Raises LaunchError where the launcher is of one MPI and the library of another; both are asked before MPI starts.

    MPICH ends in its start-up under Open MPI's mpirun, and Open MPI under MPICH's runs N programs of size 1.
    """
    if by and (by.name, family(library)) in {("Open MPI's mpirun", "MPICH"), ("MPICH's mpirun", "Open MPI")}:
        raise LaunchError(_mixed(by, library, library_path, "they cannot find each other"))


def check_size(by: Launched | None, size: int, library: str, library_path: str) -> None:
    """Raises LaunchError where each of several processes started together is an MPI program of its own.

    Other differences are legal: a heterogeneous srun step counts only its own component.
    """
    if by and size == 1 < by.size:
        raise LaunchError(_mixed(by, library, library_path, f"MPI's size is {size} in each"))


def refuse(error: Exception) -> int:
    """Leave before MPI has started: print `error`, once for all processes, and return its exit status.

    One process speaks; the others give it a second, since launchers end all when the first one leaves. A bug that only
    others met is told by these.
    """
    by = launched(os.environ)
    others = by is not None and by.rank > 0
    if others:
        time.sleep(1)
    if not (others and isinstance(error, HpctrainError)):
        sys.stderr.write(describe(error))
        sys.stderr.flush()
    return status_of(error)


def status_of(error: BaseException) -> int:
    """The exit status of a process that ends with `error`."""
    return error.exit_status if isinstance(error, HpctrainError) else BUG


def describe(error: BaseException, who: str = "") -> str:
    """What to print of `error`, met by `who`: our own as a message, any other with its traceback."""
    if isinstance(error, HpctrainError):
        return f"hpctrain: error: {who}{error}\n"
    if isinstance(error, SystemExit):
        return f"hpctrain: {who}left with {error}\n"
    return f"hpctrain: {who}uncaught exception, please report it:\n{''.join(traceback.format_exception(error))}"


def _mixed(by: Launched, library: str, library_path: str, what: str) -> str:
    launcher, fitting = _parent(), Path(library_path).parents[1] / "bin" / "mpirun"
    lines = [
        f"{by.name}{f' ({launcher})' if launcher else ''} started {by.size} processes, but {what}:",
        f"their MPI library is {library} ({library_path})",
    ]
    if by.name == "srun":
        lines.append("srun must offer what the library speaks: --mpi=pmix for Open MPI, --mpi=pmi2 for MPICH")
        lines.append("srun --mpi=list")
    elif fitting.exists() and str(fitting.parent) != os.path.dirname(launcher or ""):
        lines.append("either set MPI4PY_LIBMPI to the libmpi.so of that launcher, or use the library's own mpirun:")
        lines.append(f"{fitting} -n {by.size} hpctrain ...")
    else:
        lines.append(
            "use the mpirun of that library, or set MPI4PY_LIBMPI to the libmpi.so of the launcher; both with:"
        )
        lines.append("hpctrain doctor")
    return "\n".join(lines)


def _parent() -> str | None:
    """The program that started this one, where that can be read and is no shell: the launcher's own daemon."""
    try:
        path = os.readlink(f"/proc/{os.getppid()}/exe")
    except OSError:
        return None
    return path if any(word in os.path.basename(path) for word in ("prte", "orte", "hydra", "mpi", "slurm")) else None
