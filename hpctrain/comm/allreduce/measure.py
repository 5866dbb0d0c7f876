"""How long allreduces take on these ranks, in turn, each on data written anew as training does; and single messages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hpctrain.comm import allreduce
from hpctrain.comm.allreduce.shared import InPlace
from hpctrain.comm.link import Link, add
from hpctrain.comm.shared import Window
from hpctrain.errors import HpctrainError
from hpctrain.machine import Level

if TYPE_CHECKING:
    from mpi4py import MPI

MESSAGES = (8, 1024, 65536, 1 << 20, 4 << 20)
"""Bytes of the messages whose times give alpha and beta."""


class Side(NamedTuple):
    """A way to sum: what backward writes, and a function that says where the sum is to be read."""

    name: str
    written: np.ndarray
    sum: Callable[[], np.ndarray]


def messages(link: Link, names: Iterable[str], buffer: np.ndarray) -> list[Side]:
    """Algorithms that sum `buffer` in place."""
    return [Side(name, buffer, _in_place(allreduce.get(name), link, buffer)) for name in names]


def _in_place(algorithm: allreduce.Algorithm, link: Link, buffer: np.ndarray) -> Callable[[], np.ndarray]:
    def summed() -> np.ndarray:
        algorithm.sum(link, buffer)
        return buffer

    return summed


def in_window(window: Window, size: int, dtype: np.dtype) -> Side:
    """The sum of what all ranks of a host write into a window, read where it is made. Takes its first flags."""
    found = InPlace(window, 0, size, dtype, window.meeting(0), window.meeting(1))

    def summed() -> np.ndarray:
        found.sum()
        return found.sums

    return Side("shared", window.array(window.node.rank, 0, size, dtype), summed)


def in_turn(comm: MPI.Intracomm, sides: Sequence[Side], rounds: int) -> dict[str, float]:
    """{side: median over `rounds` of the seconds until its last rank could read the sum}. Collective.

    The sides take turns, so that what disturbs the machine meets all. A first round, not counted, is checked: raises
    HpctrainError where a sum is wrong.
    """
    from mpi4py import MPI

    value, total = comm.rank + 1, comm.size * (comm.size + 1) // 2
    taken = np.empty((1 + rounds, len(sides)))
    for at in range(1 + rounds):
        for i, side in enumerate(sides):
            side.written.fill(value)
            comm.Barrier()
            begin = perf_counter()
            result = side.sum()
            taken[at, i] = perf_counter() - begin
            if at == 0 and not bool(np.all(result == total)):
                raise HpctrainError(f"{side.name}: 1 to {comm.size} do not sum to {total}; please report")
            comm.Barrier()  # nobody writes while another still reads
    comm.Allreduce(MPI.IN_PLACE, taken, MPI.MAX)
    return {side.name: median(taken[1:, i].tolist()) for i, side in enumerate(sides)}


def rounds_for(nbytes: int) -> int:
    """How often to time a size: often enough for a median, and not for minutes."""
    return max(7, min(101, (64 << 20) // max(nbytes, 1)))


def levels(link: Link, rounds: int = 21) -> tuple[Level | None, Level | None]:
    """(messages within a host, messages between hosts), each None where there are no two such ranks. Collective."""
    hosts, gamma = link.topology.hosts, seconds_per_byte_added()
    first: dict[int, int] = {}
    near = next(((first[h], rank) for rank, h in enumerate(hosts) if first.setdefault(h, rank) != rank), None)
    far = next(((0, rank) for rank, host in enumerate(hosts) if host != hosts[0]), None)
    return (
        None if near is None else _level(link, near, gamma, rounds),
        None if far is None else _level(link, far, gamma, rounds),
    )


def _level(link: Link, pair: tuple[int, int], gamma: float, rounds: int) -> Level:
    """alpha and beta that fit the times of messages between two ranks best, relative errors counting alike."""
    times = [_ping_pong(link, pair, nbytes, rounds) for nbytes in MESSAGES]
    rows = np.array([[1 / t, n / t] for n, t in zip(MESSAGES, times, strict=True)])
    alpha, beta = np.linalg.lstsq(rows, np.ones(len(times)), rcond=None)[0]
    found = Level(max(float(alpha), 1e-9), max(float(beta), 1e-13), gamma)
    return link.comm.bcast(found, root=0)


def _ping_pong(link: Link, pair: tuple[int, int], nbytes: int, rounds: int) -> float:
    """Median seconds of a message between two ranks, the same on all. The others wait."""
    buffer, taken, mine = np.zeros(nbytes, np.uint8), [0.0], link.rank in pair
    if mine:
        peer = pair[link.rank == pair[0]]
        turns: list[Callable[[np.ndarray, int], MPI.Request]] = [link.send, link.recv]
        for _ in range(3 + rounds):
            begin = perf_counter()
            for turn in turns if link.rank == pair[0] else reversed(turns):
                turn(buffer, peer).Wait()
            taken.append((perf_counter() - begin) / 2)
    return link.comm.bcast(median(taken[4:]) if mine else 0.0, root=pair[0])


def seconds_per_byte_added(nbytes: int = 1 << 20) -> float:
    """gamma: what adding one array of float32 to another takes."""
    into, other = np.zeros((2, nbytes // 4), np.float32)
    taken = []
    for _ in range(9):
        begin = perf_counter()
        add(into, other)
        taken.append(perf_counter() - begin)
    return median(taken) / nbytes
