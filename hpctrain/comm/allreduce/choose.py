"""Which algorithm a group of ranks should use: by what was measured on this machine, else by the cost formulas.

A pure function of its arguments: ranks that pass the same come to the same choice. Ranks of several hosts may find
different files or room, so `Surroundings.of` lets the first rank read and all take the smallest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from hpctrain import machine
from hpctrain.comm.allreduce import TABLE, get
from hpctrain.comm.allreduce.cost import Network
from hpctrain.comm.shared import room
from hpctrain.machine import Level, Machine

if TYPE_CHECKING:
    from mpi4py import MPI

NODE = Level(alpha=5e-6, beta=2e-10, gamma=1e-10)
"""Where nothing was measured: messages through memory, with what Python takes for one."""

NETWORK = Level(alpha=6.2e-6, beta=3.9e-11, gamma=1e-10)
"""Likewise between hosts: InfiniBand of 200 Gbit/s and 1.2 us as published, and Python."""

SLACK = 1.1
"""How much longer than the MPI library's own, as measured, an algorithm of ours may take."""

UNREPEATED = "MPICH"
"""The library whose allreduce may add in another order at every call: a run would not repeat its bits."""


class Choice(NamedTuple):
    """An algorithm, what it should take, and why it is."""

    name: str
    seconds: float
    why: str


def choose(nbytes: int, hosts: Sequence[int], table: Machine | None, shared_room: int, crowd: int = 1) -> Choice:
    """The algorithm for `nbytes` on ranks that lie on these `hosts`, one number each.

    `shared_room`: bytes that a shared window of all these ranks may take on each of their hosts. `crowd` as in `price`.
    """
    if len(hosts) == 1:
        return Choice("ring", 0.0, "one rank, nothing to sum")
    where = f"{len(hosts)} ranks on {_hosts(hosts)}"
    able = candidates(nbytes, hosts, shared_room)
    known = table.of(hosts) if table is not None else None
    seconds = {} if known is None else {name: machine.at(found, nbytes) for name, found in known.seconds.items()}
    if ours := {name: seconds[name] for name in able if name in seconds}:
        best = min(ours, key=lambda name: (ours[name], name))
        native = seconds.get("mpi")
        if native is None or ours[best] <= SLACK * native:
            return Choice(best, ours[best], f"measured on {where}")
        if table is not None and not table.library.startswith(UNREPEATED):
            return Choice("mpi", native, f"measured on {where}: {ours[best] / native:.1f} times faster than {best}")
        return Choice(best, ours[best], f"measured on {where}; mpi is faster, but need not repeat its bits")
    priced = {name: price(name, nbytes, hosts, table, crowd) for name in able}
    best = min(priced, key=lambda name: (priced[name], name))
    return Choice(best, priced[best], f"by formula, nothing measured on {where}")


def candidates(nbytes: int, hosts: Sequence[int], shared_room: int) -> list[str]:
    """Our algorithms that these ranks can use; all of them but the MPI library's."""
    several = len(set(hosts)) > 1
    unfit = {
        "mpi": True,
        "shared": several or len(hosts) * nbytes > shared_room,
        "hierarchical": not several or len(set(hosts)) == len(hosts),
    }
    return [name for name in TABLE if not unfit.get(name, False)]


def price(name: str, nbytes: int, hosts: Sequence[int], table: Machine | None, crowd: int = 1) -> float:
    """Seconds by the cost formula, with alpha, beta and gamma as measured, else as published.

    On each host so many groups as `crowd` sum at the same time, and share its links.
    """
    near = Network(*level(table.node if table else None, NODE))
    if len(set(hosts)) == 1:
        return get(name).cost(len(hosts), nbytes, near)
    far = level(table.network if table else None, NETWORK)
    counts, links = Counter(hosts).values(), table.links if table else 1

    def of_link(at_once: int) -> float:
        """beta of one of so many ranks of a host that send at once."""
        return far[1] * max(1.0, at_once * crowd / links)

    if name == "hierarchical":  # its formula counts all ranks of a host on one link
        per_host = -(-len(hosts) // len(counts))
        beta = of_link(per_host) / per_host
        return get(name).cost(len(hosts), nbytes, Network(far[0], beta, far[2], near, per_host))
    # what leaves a host at once shares its link; a ring crosses it only where its neighbours are elsewhere
    crossing = Counter(host for host, after in zip(hosts, [*hosts[1:], hosts[0]], strict=True) if host != after)
    at_once = max(crossing.values()) if name in ("ring", "segmented_ring") else max(counts)
    return get(name).cost(len(hosts), nbytes, Network(far[0], of_link(at_once), far[2]))


def level(found: Level | None, default: Level) -> tuple[float, float, float]:
    """alpha, beta and gamma of a level, where it is known."""
    known = found or default
    return known.alpha, known.beta, known.gamma


def _hosts(hosts: Sequence[int]) -> str:
    count = len(set(hosts))
    return "1 host" if count == 1 else f"{count} hosts"


class Surroundings(NamedTuple):
    """What `choose` needs to know besides the size; the same on all ranks."""

    hosts: tuple[int, ...]
    """The host of each rank of the communicator asked for."""
    table: Machine | None
    said: str
    """Which measurements are used, or why none."""
    room: int
    """The least memory for windows that is free on any of the hosts, in bytes."""

    @classmethod
    def of(cls, comm: MPI.Intracomm, hosts: Sequence[int], library: str) -> Surroundings:
        """Those of `comm`. Collective: rank 0 reads the file for all. Raises ConfigError on all where it is damaged."""
        from hpctrain.comm.world import all_ranks

        path, found = machine.default_path(), None
        with all_ranks(comm):
            if comm.rank == 0:
                found = machine.load(path)
        found, said = comm.bcast(machine.usable(found, path, library))
        return cls(tuple(hosts), found, said, least_room(comm))

    def choose(self, nbytes: int, ranks: Sequence[int]) -> Choice:
        """The algorithm for these ranks of the communicator."""
        found = choose(nbytes, [self.hosts[rank] for rank in ranks], self.table, self.room)
        return found if self.table is not None else found._replace(why=f"by formula; {self.said}")

    def network(self, hosts: Sequence[int]) -> Network:
        """alpha, beta and gamma between ranks on these hosts, as measured, else as published."""
        if len(set(hosts)) > 1:
            return Network(*level(self.table.network if self.table else None, NETWORK))
        return Network(*level(self.table.node if self.table else None, NODE))


def least_room(comm: MPI.Intracomm) -> int:
    """Bytes that windows may still take on the host that has fewest. Collective."""
    from mpi4py import MPI

    found: int = comm.allreduce(room(), MPI.MIN)
    return found
