"""What all benchmarks share: sides in processes of their own, measured in turn, and one JSON object at the end."""

from __future__ import annotations

import ctypes
import importlib
import json
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any, NamedTuple

from hpctrain import environment, memory

HERE = Path(__file__).parent
LOAD = os.getloadavg()[0]
"""How many processes wanted a core in the minute before."""


def warn_of_load() -> None:
    """Say so where other programs are at work."""
    if LOAD > 0.5:
        print(f"the load was {LOAD:.1f} before: other programs share the cores, so take no wall time for true")


class Seconds(NamedTuple):
    """Of one step: what all threads of the process computed for, and what a clock on the wall shows."""

    cpu: float
    wall: float


def timed(step: Callable[[], None], times: int) -> Seconds:
    """Run `step` so many times; the mean of one."""
    cpu, wall = process_time(), perf_counter()
    for _ in range(times):
        step()
    return Seconds((process_time() - cpu) / times, (perf_counter() - wall) / times)


def medians(taken: Sequence[Seconds]) -> Seconds:
    """The medians of both."""
    return Seconds(median(s.cpu for s in taken), median(s.wall for s in taken))


def set_threads(threads: int) -> None:
    """For the processes started from here on: how many threads the libraries that read the environment use."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)


# --- a side in its own process --------------------------------------------------------------------------------------


class Worker:
    """An object made by `factory`, "module:name", in a new process, which sleeps between calls of its methods.

    So no side shares memory, threads or libraries with another one, and the peak of its memory is its own.
    """

    def __init__(self, factory: str, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, factory, arguments), daemon=True)
        self._process.start()
        other.close()
        self._answer()

    def call(self, method: str, *arguments: Any) -> Any:
        """What the object's method returns. Raises RuntimeError with the traceback where it raised."""
        self._pipe.send((method, arguments))
        return self._answer()

    def stop(self) -> None:
        """End the process, so that its memory is free."""
        self._pipe.close()
        self._process.join()

    def _answer(self) -> Any:
        try:
            value, error = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"a worker ended with status {self._process.exitcode}; killed for memory?") from None
        if error:
            raise RuntimeError(f"in a worker:\n{error}")
        return value


def _serve(pipe: Any, factory: str, arguments: tuple[Any, ...]) -> None:
    module, _, name = factory.partition(":")
    try:
        side = getattr(importlib.import_module(module), name)(*arguments)
        pipe.send((None, None))
        while True:
            method, given = pipe.recv()
            pipe.send((getattr(side, method)(*given), None))
    except EOFError:  # the parent has stopped
        return
    except Exception:
        pipe.send((None, traceback.format_exc()))


def reset_peak() -> None:
    """Forget the largest memory so far of this process: `memory.peak` counts from here (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def interleave(sides: Mapping[str, Callable[[], Seconds]], rounds: int) -> dict[str, Seconds]:
    """Call the sides A B A B ... so that what disturbs the machine meets all of them; medians by name."""
    taken: dict[str, list[Seconds]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, step in sides.items():
            taken[name].append(step())
    return {name: medians(found) for name, found in taken.items()}


# --- the machine ----------------------------------------------------------------------------------------------------


class FmaPeak:
    """Floating-point operations per second of one core in float32, measured now by fused multiply-adds on registers.

    Raises RuntimeError where there is no C compiler.
    """

    def __init__(self) -> None:
        compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
        if compiler is None:
            raise RuntimeError("the FMA peak is measured by a C program: install a C compiler or set CC")
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder, "fma_peak.so")
            flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
            subprocess.run([compiler, *flags, str(HERE / "fma_peak.c"), "-o", str(library)], check=True)
            self._function = ctypes.CDLL(str(library)).fma_peak
        self._function.restype = ctypes.c_double
        self.taken: list[float] = []

    def measure(self) -> float:
        """Measure once more, about 20 ms; the median so far."""
        keep = ctypes.c_float()
        self.taken.append(self._function(ctypes.c_long(5_000_000), ctypes.byref(keep)))
        return median(self.taken)


def print_json(command: str, results: Sequence[Mapping[str, Any]], **more: Any) -> None:
    """The object that --json adds as the last line of stdout; `more` goes to what is said of the machine."""
    versions = environment.versions()
    for package in ("torch", "nanobind"):
        versions[package] = _version(package)
    about = {"command": command, "machine": environment.machine() | {"load": LOAD} | more, "versions": versions}
    print(json.dumps(about | {"results": results}), flush=True)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def mib(nbytes: int) -> str:
    """As hpctrain prints it, without the unit."""
    return memory.mib(nbytes).removesuffix(" MiB")
