"""Ranks of an allreduce in one process, without MPI: their messages, checked, and the time these take by the model.

Each rank sends one message at a time and receives one, in the order in which it asked for them; a message starts when
both ends have asked for it, and takes alpha + bytes * beta. An addition takes gamma per byte.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hpctrain.comm import link as links
from hpctrain.comm.allreduce.cost import Network
from hpctrain.partition import near_square

FREE = Network(0.0, 0.0, 0.0)


@dataclass(eq=False)
class Request:
    """One end of a message; `end` is when it is complete."""

    array: np.ndarray
    peer: int
    posted: float
    sent: bytes | None
    """What it sends; None at the receiving end."""
    other: Request | None = None
    end: float | None = None


@dataclass
class Port:
    """What a rank sends or receives, in order."""

    queue: list[Request] = field(default_factory=list)
    free: float = 0.0


class Link:
    """What an algorithm sees; `members` are the numbers in the simulation of its ranks."""

    def __init__(self, simulation: Simulation, members: Sequence[int], rank: int) -> None:
        self.simulation, self.members, self.rank, self.size = simulation, tuple(members), rank, len(members)
        self.topology = simulation

    def send(self, array: np.ndarray, peer: int) -> Request | None:
        return self.simulation.post(self.members[self.rank], self.members[peer], array, sends=True)

    def recv(self, array: np.ndarray, peer: int) -> Request | None:
        return self.simulation.post(self.members[self.rank], self.members[peer], array, sends=False)

    def scratch(self, size: int, dtype: np.dtype) -> np.ndarray:
        return np.full(size, np.nan, dtype)

    def nodes(self) -> tuple[Link, Link]:
        hosts, me = self.simulation.hosts, self.members[self.rank]
        here = [rank for rank in self.members if hosts[rank] == hosts[me]]
        place = {rank: hosts[:rank].count(hosts[rank]) for rank in self.members}
        across = [rank for rank in self.members if place[rank] == place[me]]
        return self._part(here), self._part(across)

    def grid(self) -> tuple[Link, Link]:
        _, columns = near_square(self.size)
        me = self.members[self.rank]
        row = [rank for rank in self.members if rank // columns == me // columns]
        return self._part(row), self._part([rank for rank in self.members if rank % columns == me % columns])

    def _part(self, members: list[int]) -> Link:
        return Link(self.simulation, members, members.index(self.members[self.rank]))


class Simulation:
    """`net(a, b)` is the network between two ranks; `hosts` has the host of each."""

    def __init__(
        self,
        ranks: int,
        net: Callable[[int, int], Network] = lambda a, b: FREE,
        hosts: Sequence[int] = (),
        gamma: float = 0.0,
    ) -> None:
        self.ranks, self.net, self.gamma, self.hosts = ranks, net, gamma, list(hosts or [0] * ranks)
        self.even = len({self.hosts.count(host) for host in self.hosts}) == 1
        self.clock = [0.0] * ranks
        self.messages, self.nbytes = [0] * ranks, [0] * ranks
        self._running = 0
        self._ports: dict[tuple[int, bool], Port] = defaultdict(Port)
        self._unmatched: dict[tuple[int, int, bool], list[Request]] = defaultdict(list)
        self._open: list[set[Request]] = [set() for _ in range(ranks)]

    def add(self, into: np.ndarray, other: np.ndarray) -> None:
        """To stand in for comm.link.add."""
        links.add(into, other)
        self.clock[self._running] += self.gamma * into.nbytes

    def post(self, rank: int, peer: int, array: np.ndarray, sends: bool) -> Request | None:
        """A request of `rank`; None where there is nothing to send."""
        assert peer != rank
        assert array.flags.c_contiguous
        if not array.size:
            return None
        request = Request(array, peer, self.clock[rank], array.tobytes() if sends else None)
        if sends:
            self.messages[rank] += 1
            self.nbytes[rank] += array.nbytes
        else:
            array.fill(np.nan)  # to be seen if anyone reads it too early
        others = self._unmatched[(rank, peer, False) if sends else (peer, rank, True)]
        if others:
            request.other = others.pop(0)
            request.other.other = request
            assert request.other.array.nbytes == array.nbytes, "sent and received lengths differ"
        else:
            self._unmatched[(rank, peer, True) if sends else (peer, rank, False)].append(request)
        self._ports[rank, sends].queue.append(request)
        self._open[rank].add(request)
        return request

    def run(self, steps: Callable[[Any, np.ndarray], Iterator[list[Any]]], buffers: Sequence[np.ndarray]) -> float:
        """Let every rank run `steps` on its buffer; returns when the last one was done. AssertionError if they hang."""
        links_ = [Link(self, range(self.ranks), rank) for rank in range(self.ranks)]
        every = {rank: steps(links_[rank], buffers[rank]) for rank in range(self.ranks)}
        waiting: dict[int, list[Request]] = {rank: [] for rank in every}
        while waiting:
            able = [rank for rank, requests in waiting.items() if all(r.end is not None for r in requests)]
            assert able, f"ranks {sorted(waiting)} wait for one another"
            for rank in able:
                self._complete(rank, waiting.pop(rank))
                self._running = rank
                found = next(every[rank], None)
                if found is not None:
                    waiting[rank] = [request for request in found if request is not None]
                else:
                    assert not self._open[rank], f"rank {rank} leaves requests that it never waited for"
            self._transfer()
        assert not any(self._unmatched.values())
        return max(self.clock)

    def _complete(self, rank: int, requests: list[Request]) -> None:
        for request in requests:
            assert request.end is not None
            assert request.other is not None
            self.clock[rank] = max(self.clock[rank], request.end)
            self._open[rank].discard(request)
            if request.sent is not None:
                assert request.array.tobytes() == request.sent, f"rank {rank} changed what it was still sending"
            else:
                assert request.other.sent is not None
                request.array[:] = np.frombuffer(request.other.sent, request.array.dtype)

    def _transfer(self) -> None:
        """Give every message its time that both ends are ready for."""
        progress = True
        while progress:
            progress = False
            for rank in range(self.ranks):
                port = self._ports[rank, True]
                while port.queue and (message := port.queue[0]).other is not None:
                    into = self._ports[message.peer, False]
                    if into.queue[0] is not message.other:
                        break
                    net = self.net(rank, message.peer)
                    start = max(message.posted, message.other.posted, port.free, into.free)
                    message.end = message.other.end = start + net.alpha + message.array.nbytes * net.beta
                    port.free = into.free = message.end
                    port.queue.pop(0)
                    into.queue.pop(0)
                    progress = True
