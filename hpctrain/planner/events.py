"""Discrete events: processes that compute for a time or wait for messages, which share a network's links.

A process is a generator. It yields seconds that it takes, or a Waiting that it goes on after.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from heapq import heappop, heappush
from itertools import count
from math import inf
from typing import TypeAlias

from hpctrain.errors import PlanError
from hpctrain.planner.topology import Flows, Network


class Waiting:
    """What is waited for: so many things that have yet to happen."""

    __slots__ = ("left", "then")

    def __init__(self, left: int) -> None:
        self.left = left
        self.then: list[Process] = []
        """What goes on when nothing is left."""


Process: TypeAlias = "Iterator[float | Waiting]"


class Half:
    """One side of a message, sender's or receiver's."""

    __slots__ = ("done", "nbytes", "ready", "sends", "waited")

    def __init__(self, sends: bool, ready: float, nbytes: float) -> None:
        self.sends, self.ready, self.nbytes = sends, ready, nbytes
        self.done = False
        self.waited: Waiting | None = None


class Events:
    """The clock of a simulation, and what is due when."""

    def __init__(self, network: Network) -> None:
        self.now = 0.0
        self.network, self._flows = network, Flows(network.capacity)
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._unmatched: dict[Hashable, deque[Half]] = {}
        self._under_way: dict[int, tuple[Half, Half]] = {}
        self._running = 0

    def start(self, process: Process) -> None:
        """Let `process` run from now on."""
        self._running += 1
        self.after(0.0, lambda: self._go_on(process))

    def run(self) -> None:
        """Until nothing is left to happen. Raises PlanError where processes wait for what never comes."""
        while (now := min(self._due[0][0] if self._due else inf, self._flows.next())) < inf:
            self.now = now
            for number in self._flows.finished(now):
                self._arrived(*self._under_way.pop(number))
            while self._due and self._due[0][0] <= now:
                heappop(self._due)[2]()
        if self._running:
            raise PlanError(
                f"simulation: {self._running} processes wait for others for ever, {len(self._unmatched)} messages are "
                f"without a partner; this is a mistake of the program, please report it with the plan"
            )

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Do `action` in so many seconds."""
        self._at(self.now + seconds, action)

    def _at(self, when: float, action: Callable[[], None]) -> None:
        heappush(self._due, (when, next(self._order), action))

    def happened(self, waiting: Waiting) -> None:
        """One of the things that are waited for."""
        waiting.left -= 1
        if not waiting.left:
            goers, waiting.then = waiting.then, []
            for process in goers:
                self._go_on(process)

    def post(self, rank: int, peer: int, tag: Hashable, nbytes: float, latency: float, sends: bool) -> Half:
        """`rank` is ready to send to `peer` or to receive from it, `latency` from now.

        The message flows as soon as both are. Those of one pair and tag come in the order in which each side posts.
        """
        half = Half(sends, self.now + latency, nbytes)
        key = (rank, peer, tag) if sends else (peer, rank, tag)
        others = self._unmatched.setdefault(key, deque())
        if not others or others[0].sends == sends:
            others.append(half)
            return half
        other = others.popleft()
        if not others:
            del self._unmatched[key]
        source, target = key[:2]
        self._at(max(half.ready, other.ready), lambda: self._depart(source, target, half, other))
        return half

    def wait_for(self, halves: list[Half]) -> Waiting:
        """For messages."""
        missing = [half for half in halves if not half.done]
        waiting = Waiting(len(missing))
        for half in missing:
            half.waited = waiting
        return waiting

    def _depart(self, source: int, target: int, half: Half, other: Half) -> None:
        nbytes = max(half.nbytes, other.nbytes)
        number = self._flows.start(self.now, self.network.route(source, target), nbytes)
        self._under_way[number] = half, other

    def _arrived(self, *halves: Half) -> None:
        for half in halves:
            half.done = True
            if half.waited is not None:
                self.happened(half.waited)

    def _go_on(self, process: Process) -> None:
        for due in process:
            if isinstance(due, Waiting):
                if due.left:
                    due.then.append(process)
                    return
            elif due > 0:
                self.after(due, lambda: self._go_on(process))
                return
        self._running -= 1
