"""What `hpctrain calibrate` measured on this machine: a JSON file, and which of it holds for some ranks.

The file is $HPCTRAIN_MACHINE, or hpctrain/machine.json in $XDG_CONFIG_HOME (~/.config).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import msgspec

from hpctrain.errors import ConfigError

VERSION = 1


class Level(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """alpha-beta-gamma of messages on one level: seconds per message, per byte sent, per byte reduced."""

    alpha: float
    beta: float
    gamma: float


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds of allreduces on one layout of ranks."""

    hosts: tuple[int, ...]
    """The host of each rank, numbered as they first appear."""
    seconds: dict[str, dict[int, float]]
    """{algorithm: {bytes: median seconds}}"""


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that is known of one machine with one MPI library."""

    library: str
    """Name and version, as World.library."""
    node: Level | None = None
    """Messages between ranks of a host."""
    network: Level | None = None
    """Messages between hosts."""
    tables: tuple[Table, ...] = ()
    version: int = VERSION

    def of(self, hosts: Sequence[int]) -> Table | None:
        """What was measured on ranks that lie on hosts like these."""
        return next((table for table in self.tables if table.hosts == numbered(hosts)), None)

    def updated(self, newer: Measured) -> Measured:
        """This with all that `newer` knows; of another library nothing is kept."""
        if self.library != newer.library:
            return newer
        layouts = {table.hosts for table in newer.tables}
        kept = tuple(table for table in self.tables if table.hosts not in layouts)
        return Measured(
            self.library, newer.node or self.node, newer.network or self.network, (*kept, *newer.tables), VERSION
        )


def numbered(hosts: Sequence[int]) -> tuple[int, ...]:
    """`hosts` with the numbers 0, 1, ... in the order of their first appearance."""
    first = {host: number for number, host in enumerate(dict.fromkeys(hosts))}
    return tuple(first[host] for host in hosts)


def at(seconds: Mapping[int, float], nbytes: int) -> float:
    """Seconds for a size between those measured: linear in bytes; the least below them, in proportion above.

    Only + - * /, which all processors compute alike: every rank must come to the same choice.
    """
    sizes = sorted(seconds)
    if nbytes <= sizes[0]:
        return seconds[sizes[0]]
    for low, high in pairwise(sizes):
        if nbytes <= high:
            return seconds[low] + (seconds[high] - seconds[low]) * (nbytes - low) / (high - low)
    return seconds[sizes[-1]] * nbytes / sizes[-1]


def default_path() -> Path:
    """Where the file is."""
    if named := os.environ.get("HPCTRAIN_MACHINE"):
        return Path(named)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config", "hpctrain", "machine.json")


def encode(found: Measured) -> bytes:
    """The text of the file."""
    return msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n"


def load(path: Path) -> Measured | None:
    """The measurements in a file; None where there is none. Raises ConfigError where it is not such a file."""
    if not path.is_file():
        return None
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Measured)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path}: cannot be used ({error}); {_remedy(path)}") from None
    if found.version != VERSION:
        raise ConfigError(f"{path}: version {found.version}, this program reads {VERSION}; {_remedy(path)}")
    sizes = [seconds for table in found.tables for seconds in table.seconds.values()]
    if not all(sizes) or any(not 0 < s < float("inf") or n < 0 for found in sizes for n, s in found.items()):
        raise ConfigError(f"{path}: an algorithm without sizes, or a time that is none; {_remedy(path)}")
    return found


def _remedy(path: Path) -> str:
    return f"remove it, or measure again:\nmpirun -n 2 hpctrain calibrate --out {path}"


def usable(found: Measured | None, path: Path, library: str) -> tuple[Measured | None, str]:
    """(`found` where it is of this MPI library, a sentence on what is used)."""
    if found is None:
        return None, f"no measurements in {path}; hpctrain calibrate makes them"
    if found.library != library:
        return None, f"{path} was measured with {found.library}, this is {library}: not used; calibrate again"
    return found, f"measurements of {path}"
