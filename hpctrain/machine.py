"""What is known of a machine: a JSON file, measured by `hpctrain calibrate` or published, by which plans are priced.

That of this machine is $HPCTRAIN_MACHINE, or hpctrain/machine.json in $XDG_CONFIG_HOME (~/.config). Those of others
lie beside this file, in machines/, each figure with its source.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from hpctrain.errors import ConfigError

VERSION = 2

SHIPPED = Path(__file__).parent / "machines"

Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Count = Annotated[int, Meta(ge=1)]


class Level(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """alpha-beta-gamma of messages on one level: seconds per message, per byte sent, per byte reduced."""

    alpha: NotNegative
    beta: NotNegative
    gamma: NotNegative


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds of allreduces on one layout of ranks."""

    hosts: tuple[int, ...]
    """The host of each rank, numbered as they first appear."""
    seconds: dict[str, dict[int, Positive]]
    """{algorithm: {bytes: median seconds}}"""


class Copies(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a rank takes to read from others' memory on its host: seconds per transfer, byte and contiguous run."""

    alpha: NotNegative
    beta: Positive
    run: NotNegative = 0.0


class Compute(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How fast one rank computes, where a layer was not measured."""

    flops: Positive
    """Floating-point operations per second at most."""
    bandwidth: Positive
    """Bytes of memory read or written per second."""
    efficiency: tuple[tuple[Positive, Positive], ...] = ((1.0, 1.0),)
    """(operations of a call, the share of `flops` that it reaches), rising; between them a line over the logarithm."""
    call: NotNegative = 0.0
    """Seconds that a layer takes at least, forward or backward."""


class Kernel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A layer, alone or with what runs within it, as measured on blocks of its work."""

    key: str
    """The layer, its input's extents but for the batch, type and backend: `planner.compute` makes it."""
    at_once: Count
    """Ranks of the host that computed at the same time: they share its memory."""
    blocks: dict[str, tuple[NotNegative, NotNegative]]
    """{extents of the block, "8x32x32x64": seconds (forward, backward)}"""


class Power(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Watts of one rank's device, its share of the host included, while it waits and while it computes."""

    idle: NotNegative
    busy: Positive


class Storage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes per second of one rank, from the file system to its input and from its memory to a checkpoint."""

    read: Positive
    write: Positive


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that is known of one machine, with one MPI library where it was measured.

    A rank is what holds a block: a core or several, or a device.
    """

    library: str = ""
    """Name and version, as World.library; "" where nothing was measured here."""
    node: Level | None = None
    """Messages between ranks of a host."""
    network: Level | None = None
    """Messages between hosts, of one rank that has the link to itself."""
    tables: tuple[Table, ...] = ()
    name: str = ""
    source: dict[str, str] = {}
    """Where the figures are from: {field: citation or what measured it}."""
    date: str = ""
    socket: Level | None = None
    """Messages between ranks of one socket, or of devices with a faster link, where that is not `node`."""
    per_socket: Count | None = None
    per_host: Count | None = None
    """Ranks on a host; None: any number, as on the host of the calibration."""
    links: Count = 1
    """Links of a host to the network: ranks beyond that share them."""
    hosts: Count | None = None
    """How many there are."""
    topology: str = "full"
    """"full"; "fattree R", R to 1 oversubscribed above the hosts; "torus AxBxC" of hosts."""
    copies: Copies | None = None
    """Reading each other's memory; None: ranks of a host exchange messages."""
    compute: Compute | None = None
    kernels: tuple[Kernel, ...] = ()
    update: NotNegative = 0.0
    """Seconds per byte of weights that the optimizer takes."""
    step: NotNegative = 0.0
    """Seconds of a step besides everything else: agreeing, and the loop itself."""
    storage: Storage | None = None
    memory: Positive | None = None
    """Bytes that a rank has."""
    power: Power | None = None
    price: NotNegative = 0.0
    """What an hour of a rank costs, in whatever currency."""
    version: int = VERSION

    def of(self, hosts: Sequence[int]) -> Table | None:
        """What was measured on ranks that lie on hosts like these."""
        return next((table for table in self.tables if table.hosts == numbered(hosts)), None)

    def updated(self, newer: Machine) -> Machine:
        """This with all that `newer` knows; of another library nothing is kept."""
        if self.library != newer.library:
            return newer
        layouts = {table.hosts for table in newer.tables}
        kept = tuple(table for table in self.tables if table.hosts not in layouts)
        known = {(kernel.key, kernel.at_once) for kernel in newer.kernels}
        others = tuple(kernel for kernel in self.kernels if (kernel.key, kernel.at_once) not in known)
        said = {
            field: value
            for field in self.__struct_fields__
            if (value := getattr(newer, field)) != _DEFAULTS[field] and field not in ("source", "tables", "kernels")
        }
        merged = {"tables": (*kept, *newer.tables), "kernels": (*others, *newer.kernels)}
        return msgspec.structs.replace(self, **said, **merged, source=self.source | newer.source)

    def layout(self, ranks: int) -> tuple[int, ...]:
        """The host of each of so many ranks, filled one after the other. Raises ConfigError where there are too few."""
        each = self.per_host or ranks
        if self.hosts is not None and ranks > each * self.hosts:
            raise ConfigError(
                f"{ranks} ranks, but {self.name or 'this machine'} has {self.hosts} hosts of {each}, "
                f"{each * self.hosts} in all; ask for fewer ranks, or mend hosts or per_host in its file"
            )
        return tuple(rank // each for rank in range(ranks))


_DEFAULTS: dict[str, Any] = {field: getattr(Machine(), field) for field in Machine.__struct_fields__}


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


# --- files -----------------------------------------------------------------------------------------------------------


def default_path() -> Path:
    """Where the file of this machine is."""
    if named := os.environ.get("HPCTRAIN_MACHINE"):
        return Path(named)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config", "hpctrain", "machine.json")


def shipped() -> list[str]:
    """Names of the machines that come with the program."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def named(name: str) -> Machine:
    """The machine of that name, or in the file of that path. Raises ConfigError naming those there are."""
    path = SHIPPED / f"{name}.json" if name in shipped() else Path(name)
    found = load(path)
    if found is None:
        raise ConfigError(
            f"machine {name!r}: no such file, and not one of {', '.join(shipped())}; give one of these, or measure "
            f"this machine:\nmpirun -n 2 hpctrain calibrate --out {name if '.' in name else name + '.json'}"
        )
    return found


def encode(found: Machine) -> bytes:
    """The text of the file, without what is not known."""
    said = {field: value for field in found.__struct_fields__ if (value := getattr(found, field)) != _DEFAULTS[field]}
    return msgspec.json.format(msgspec.json.encode(said | {"version": found.version}), indent=1) + b"\n"


def load(path: Path) -> Machine | None:
    """What a file says; None where there is none. Raises ConfigError where it is not such a file."""
    if not path.is_file():
        return None
    try:
        raw = path.read_bytes()
        version = msgspec.json.decode(raw, type=_Versioned).version
        if version != VERSION:
            raise ConfigError(f"{path}: version {version}, this program reads {VERSION}; {_remedy(path)}")
        found = msgspec.json.decode(raw, type=Machine)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path}: cannot be used ({error}); {_remedy(path)}") from None
    sizes = [seconds for table in found.tables for seconds in table.seconds.values()]
    if not all(sizes) or any(not isfinite(s) or n < 0 for found in sizes for n, s in found.items()):
        raise ConfigError(f"{path}: an algorithm without sizes, or a time that is none; {_remedy(path)}")
    return found


class _Versioned(msgspec.Struct):
    version: int = VERSION


def _remedy(path: Path) -> str:
    return f"mend it, or remove it and measure again:\nmpirun -n 2 hpctrain calibrate --out {path}"


def usable(found: Machine | None, path: Path, library: str) -> tuple[Machine | None, str]:
    """(`found` where it is of this MPI library, a sentence on what is used)."""
    if found is None:
        return None, f"no measurements in {path}; hpctrain calibrate makes them"
    if found.library != library:
        return None, f"{path} was measured with {found.library or 'none'}, this is {library}: not used; calibrate again"
    return found, f"measurements of {path}"
