"""`hpctrain doctor`: what a run needs of this machine, whether it is there, and what to do where it is not."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from hpctrain import environment, launch
from hpctrain.comm.launchers import family
from hpctrain.console import print_json
from hpctrain.errors import HpctrainError

SHARED_MEMORY = 1 << 28
"""Bytes of /dev/shm below which the shared windows of a few ranks may not fit."""


@dataclass(frozen=True)
class Finding:
    """What was found; `remedy` where something should be done about it, which `fatal` says must be."""

    what: str
    found: str
    remedy: str = ""
    fatal: bool = False


def run(mpi: bool, as_json: bool) -> int:
    """Print every finding; 2 where one keeps networks from being trained here. `mpi` also starts two ranks."""
    findings = [check() for check in CHECKS]
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        mark = "ERROR" if finding.fatal else "note " if finding.remedy else "ok   "
        print(f"{mark} {finding.what.ljust(width)}  {finding.found}")
        if finding.remedy:
            print(f"{' ' * (width + 8)}{finding.remedy}")
    fatal = sum(finding.fatal for finding in findings)
    if mpi and not fatal:
        sys.stdout.flush()
        fatal += launch.spawn(2, [sys.executable, "-c", _TWO_RANKS]) != 0
    if as_json:
        print_json("doctor", [asdict(finding) for finding in findings])
    return 2 if fatal else 0


_TWO_RANKS = """
from hpctrain.comm import world
w = world.start()
print(f"rank {w.rank} of {w.size} on {w.hostname}, {w.library}; the ranks sum to {w.comm.allreduce(w.rank)}")
"""


def _versions() -> Finding:
    found = ", ".join(f"{name} {version}" for name, version in environment.versions().items())
    return Finding("versions", found)


def _cpus() -> Finding:
    machine = environment.machine()
    usable, there = launch.cores(), os.cpu_count()
    return Finding("cpus", f"{usable} of {there} usable; {machine['processor']}")


def _mpi_library() -> Finding:
    try:
        from hpctrain.comm import world
    except HpctrainError as error:
        return Finding("mpi library", str(error).split("\n")[0], launch.INSTALL, fatal=True)
    version, path = world.library()
    return Finding("mpi library", f"{version}, {path}")


def _mpirun() -> Finding:
    try:
        mpirun, kind = launch.find_mpirun()
    except HpctrainError as error:
        return Finding("mpirun", str(error).split("\n")[0], launch.INSTALL, fatal=True)
    library = _mpi_library()
    found = f"{kind}, {mpirun}"
    if library.fatal or family(library.found) == kind:
        return Finding("mpirun", found)
    remedy = f"is not of the MPI library: use that one's mpirun, or set MPI4PY_LIBMPI to the libmpi.so beside {mpirun}"
    return Finding("mpirun", found, remedy, fatal=True)


def _kernels() -> Finding:
    from hpctrain import backends

    try:
        backends.get("native")
    except HpctrainError as error:
        return Finding("native backend", "absent", f"{error}; until then: train.backend=reference")
    return Finding("native backend", "its kernels are compiled")


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding("shared memory", "no /dev/shm", "mount a tmpfs there; ranks of a node share memory through it")
    free = shutil.disk_usage(folder).free
    remedy = "" if free >= SHARED_MEMORY else "in a container: docker run --shm-size=2g; else free some"
    return Finding("shared memory", f"{free / 2**20:,.0f} MiB free in {folder}", remedy)


def _optional(module: str, what: str, extra: str) -> Callable[[], Finding]:
    def check() -> Finding:
        if importlib.util.find_spec(module) is not None:
            return Finding(what, f"{module} is installed")
        return Finding(what, f"no {module}; if you need it: pip install 'hpctrain[{extra}]'")

    return check


CHECKS: tuple[Callable[[], Finding], ...] = (
    _versions,
    _cpus,
    _mpi_library,
    _mpirun,
    _kernels,
    _shared_memory,
    _optional("cupy", "gpu", "cuda13"),
    _optional("sklearn", "demo digits", "demo"),
)
