"""What the sums of gradients take: each replica group's by the algorithm that a run would choose or the plan names."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import ceil

from hpctrain.comm.allreduce import choose
from hpctrain.machine import Machine, at
from hpctrain.planner.plan import Group
from hpctrain.planner.setting import Setting


def allreduce_seconds(
    nbytes: int, hosts: Sequence[int], setting: Setting, crowd: int = 1, name: str | None = None
) -> float:
    """Seconds until ranks on these `hosts` have summed `nbytes` of each.

    `crowd` groups of a host do so at once and share its links. By algorithm `name`, else the setting's, else the one
    that is chosen; as measured on ranks like these, else by its formula.
    """
    if len(hosts) == 1 or nbytes == 0:
        return 0.0
    return _seconds(nbytes, tuple(hosts), _Key(setting.machine, crowd), name or setting.allreduce)


class _Key:
    """A machine as a key of the cache: by identity, as its tables are long."""

    def __init__(self, machine: Machine, crowd: int) -> None:
        self.machine, self.crowd = machine, crowd

    def __hash__(self) -> int:
        return hash((id(self.machine), self.crowd))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and (other.machine is self.machine and other.crowd == self.crowd)


@lru_cache(maxsize=65536)
def _seconds(nbytes: int, hosts: tuple[int, ...], key: _Key, name: str | None) -> float:
    machine = key.machine
    if name is not None:
        known = machine.of(hosts)
        if known is not None and name in known.seconds:
            return at(known.seconds[name], nbytes)
        return choose.price(name, nbytes, hosts, machine, key.crowd)
    # only ranks that read each other's memory can add up in it
    room = 2**62 if machine.copies is not None else 0
    return choose.choose(nbytes, hosts, machine, room, key.crowd).seconds


def members(group: Group, hosts: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """(hosts of the ranks of the one set of a group that lies on the most hosts, groups that share a host's links).

    The executor chooses the algorithm for the same set.
    """
    partition, axes = group
    offsets = partition.offsets(axes)
    best: tuple[int, ...] = ()
    most = 0
    for first in (rank for rank in range(partition.size) if partition.index(axes, rank) == 0):
        found = tuple(hosts[first + offset] for offset in offsets)
        if (count := len(set(found))) > most:
            best, most = found, count
        if most == min(len(offsets), hosts[partition.size - 1] + 1):
            break  # no set lies on more
    here = best.count(best[0])
    return best, ceil(sum(host == best[0] for host in hosts[: partition.size]) / here) if most > 1 else 1


def statistics_seconds(nbytes: int, hosts: Sequence[int], setting: Setting) -> float:
    """Seconds of gathering `nbytes` of each rank on all: what a norm does whose samples are cut."""
    machine, ranks = setting.machine, len(hosts)
    level = machine.network if len(set(hosts)) > 1 else machine.node
    alpha, beta, _ = choose.level(level, choose.NETWORK if len(set(hosts)) > 1 else choose.NODE)
    return ceil_log2(ranks) * alpha + (ranks - 1) * nbytes * beta


def ceil_log2(n: int) -> int:
    """The least k with 2**k >= n."""
    return (n - 1).bit_length()
