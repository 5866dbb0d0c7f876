"""`hpctrain bench allreduce`: what sums of gradients take on these ranks."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from hpctrain.comm import allreduce
from hpctrain.comm.allreduce import choose, measure
from hpctrain.comm.allreduce.choose import Surroundings
from hpctrain.comm.allreduce.shared import FLAGS
from hpctrain.comm.link import Link
from hpctrain.comm.shared import Window
from hpctrain.comm.world import World
from hpctrain.console import Console, print_json, wrapped
from hpctrain.errors import ConfigError
from hpctrain.precision import TYPES

SIZES = tuple(1024 * 4**i for i in range(9))
"""1 KiB to 64 MiB."""

QUICK = (1024, 1 << 16)

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}

PEER = "mpi"

COPIED = "shared, copied"
"""Through a window, of buffers that lie elsewhere."""


class Options(NamedTuple):
    """What a command asks for; None leaves it to this module."""

    sizes: tuple[int, ...] = SIZES
    algorithms: tuple[str, ...] | None = None
    rounds: int | None = None
    dtype: str = "float32"
    json: bool = False
    quick: bool = False

    @classmethod
    def of(cls, args: argparse.Namespace) -> Options:
        """Those of a command line. Raises ConfigError or PlanError where a size or name is none."""
        sizes = tuple(size(text) for text in args.sizes.split(",")) if args.sizes else QUICK if args.quick else SIZES
        named = getattr(args, "algorithms", None)
        algorithms = tuple(dict.fromkeys(named.split(","))) if named else None
        for name in algorithms or ():
            allreduce.get(name)
        rounds = args.repeat or (3 if args.quick else None)
        return cls(sizes, algorithms, rounds, getattr(args, "dtype", "float32"), args.json, args.quick)


def size(text: str) -> int:
    """Bytes of "64K", "1M" or "1000". Raises ConfigError on another form."""
    found = re.fullmatch(r"([1-9][0-9]*)([KMG]?)(i?B)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise ConfigError(f"--sizes {text}: give bytes, with K, M or G for 2**10, 2**20, 2**30: 64K,1M,16M")
    return int(found[1]) * UNITS[found[2].upper()]


def run_allreduce(world: World, options: Options) -> int:
    """Time the algorithms beside the MPI library's own, and print a table."""
    console = Console(world.rank)
    with Ranks(world) as ranks:
        around = Surroundings.of(world.comm, ranks.hosts, world.library)
        console.note(wrapped(f"{ranks}, {world.library}, {options.dtype}; {around.said}"))
        records = []
        for nbytes in options.sizes:
            found = ranks.time(nbytes, options)
            choice = choose.choose(nbytes, ranks.hosts, around.table, around.room)
            records += records_of(nbytes, found, world.size, options.dtype, choice.name)
            console.note(f"\n{bytes_text(nbytes)}: {choice.why}")
            console.note("\n".join(table(records[-len(found) :])))
    if options.json and world.rank == 0:
        print_json("bench allreduce", records)
    return 0


# --- measuring -------------------------------------------------------------------------------------------------------


class Ranks:
    """All ranks, and their places on hosts. Entering and leaving are collective."""

    def __init__(self, world: World) -> None:
        self.world, self.link = world, Link(world.comm)
        self.hosts = self.link.topology.hosts

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self.link.free()

    def __str__(self) -> str:
        count = len(set(self.hosts))
        return f"{self.world.size} ranks on {count} host{'s' * (count != 1)}"

    def time(self, nbytes: int, options: Options) -> dict[str, float]:
        """{algorithm: median seconds} for one size. Raises ConfigError where an algorithm cannot run here."""
        dtype = TYPES[options.dtype]
        elements = max(1, nbytes // dtype.itemsize)
        room = choose.least_room(self.world.comm) // 2  # a window for each of two ways
        able = choose.candidates(nbytes, self.hosts, room)
        asked = list(options.algorithms or able)
        sides = [*self._private([PEER, *asked], elements, dtype)]
        window = None
        if "shared" in asked and len(set(self.hosts)) == 1:
            window = Window(self.world.comm, elements * dtype.itemsize, FLAGS, f"bench of {nbytes} bytes")
            sides.append(measure.in_window(window, elements, dtype))
        found = measure.in_turn(self.world.comm, sides, options.rounds or measure.rounds_for(nbytes))
        sides.clear()
        if window is not None:
            window.free()
        return found

    def _private(self, names: Iterable[str], elements: int, dtype: np.dtype) -> Iterator[measure.Side]:
        """Sums of a buffer that only this rank sees."""
        buffer = np.zeros(elements, dtype)
        for side in measure.messages(self.link, dict.fromkeys(names), buffer):
            yield side._replace(name=COPIED) if side.name == "shared" else side


# --- what is shown ---------------------------------------------------------------------------------------------------


def records_of(nbytes: int, seconds: dict[str, float], ranks: int, precision: str, chosen: str) -> list[dict[str, Any]]:
    """One flat record for each algorithm, fastest first."""
    peer = seconds[PEER]
    return [
        {
            "algorithm": name,
            "bytes": nbytes,
            "ranks": ranks,
            "precision": precision,
            "seconds": taken,
            "peer": PEER,
            "peer_seconds": peer,
            "ratio": peer / taken,
            "bus_bandwidth": 2 * (ranks - 1) / ranks * nbytes / taken,
            "chosen": name == chosen,
        }
        for name, taken in sorted(seconds.items(), key=lambda item: item[1])
    ]


def table(records: Sequence[dict[str, Any]]) -> list[str]:
    """Lines for people, of one size."""
    heading = f"  {'algorithm':<22}{'median':>12}{'bus GB/s':>12}{'x mpi':>10}"
    rows = [
        f"{'*' if r['chosen'] else ' '} {r['algorithm']:<22}{time_text(r['seconds']):>12}"
        f"{r['bus_bandwidth'] / 1e9:>12.3f}{r['ratio']:>10.2f}"
        for r in records
    ]
    return [heading, *rows]


def time_text(seconds: float) -> str:
    """For people."""
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def bytes_text(nbytes: int) -> str:
    """For people."""
    for unit in ("G", "M", "K"):
        if nbytes % UNITS[unit] == 0:
            return f"{nbytes // UNITS[unit]} {unit}iB"
    return f"{nbytes} bytes"
