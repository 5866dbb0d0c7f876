"""The memory of this process: what it has used, what it may use, and what to say when that was not enough."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from hpctrain.errors import PlanError

MIB = 2**20

WINDOW = "hpctrain"
"""The name of memory that processes share, as the system tells it."""


class Room(NamedTuple):
    """Bytes that can still be taken, and what keeps it from being more."""

    nbytes: int
    limit: str


def mib(nbytes: int) -> str:
    """`nbytes` as in "1,234 MiB", rounded up, or "1.2 MiB"."""
    return f"{-(-nbytes // MIB):,} MiB" if nbytes >= 10 * MIB else f"{nbytes / MIB:.1f} MiB"


def peak() -> int:
    """The most bytes of memory that this process has had resident so far; of what it shares with others its part."""
    # ru_maxrss would count what the process that started this one had
    most = _status().get("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return most - of_others()


def of_others() -> int:
    """Of the resident windows that this process shares, what counts for the others: a page is one nth of n processes'.

    0 where the system does not tell.
    """
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return 0
    found, ours = 0, False
    for line in lines:
        words = line.split()
        if not words[0].endswith(":"):  # a mapping begins
            ours = f"/memfd:{WINDOW}" in line
        elif ours and words[0] in ("Rss:", "Pss:"):
            found += int(words[1]) * 1024 * (1 if words[0] == "Rss:" else -1)
    return found


def process_room() -> Room | None:
    """What this process may take by its own limits (`ulimit`); None where it has none."""
    used, found = _status(), []
    for number, what, name in (
        (resource.RLIMIT_DATA, "VmData", "ulimit -d"),
        (resource.RLIMIT_AS, "VmSize", "ulimit -v"),
    ):
        soft, _ = resource.getrlimit(number)
        if soft != resource.RLIM_INFINITY:
            found.append(Room(max(0, soft - used.get(what, 0)), f"{name} {soft // 1024}"))
    return min(found, default=None)


def host_room() -> Room | None:
    """What is free for all processes of this host, or of the container that they run in; None where nothing says so."""
    found = []
    if free := _fields(Path("/proc/meminfo")).get("MemAvailable"):
        found.append(Room(free, "the memory of the host"))
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        most, now = (_number(Path("/sys/fs/cgroup", name)) for name in (limit, used))
        if most is not None and now is not None:
            found.append(Room(max(0, most - now), f"/sys/fs/cgroup/{limit}"))
    return min(found, default=None)


@contextmanager
def explained(need: Callable[[], str]) -> Iterator[None]:
    """Turns a MemoryError inside into a PlanError that says what was needed, what limits it, and what would help.

    The text is the same on all ranks, so that it is printed once where many fail, with the ranks that did.
    """
    try:
        yield
    except MemoryError as error:
        limit = process_room() or host_room()
        raise PlanError(
            f"out of memory{f', within {limit.limit}' if limit else ''}: by the plan {need()}, besides Python, MPI and "
            "the batch that is read; cut more (a larger plan.grid on more ranks: axes of positions cut activations, "
            "channel cuts weights), make train.accumulate larger or train.batch smaller, or raise the limit"
        ) from error


def _status() -> dict[str, int]:
    return _fields(Path("/proc/self/status"))


def _fields(path: Path) -> dict[str, int]:
    """{name: bytes} of the lines "Name:   123 kB" of a file; none where there is no such file."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) == 3 and words[2] == "kB"}


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such cgroup, or "max"
        return None
