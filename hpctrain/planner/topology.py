"""Bytes on their way through a network whose links they share: routes by topology, rates by max-min fairness.

Flows are fluid: at every moment each has its fair rate, which changes only when a flow begins or ends
(Bertsekas & Gallager, Data Networks, section 6.5.2).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from heapq import heappop, heappush
from itertools import count
from math import inf, isinf, prod
from typing import NamedTuple

from hpctrain.comm.allreduce.choose import NETWORK, NODE
from hpctrain.errors import ConfigError
from hpctrain.machine import Machine

LEAF = 16
"""Hosts at a leaf switch of a fat tree that does not say."""

ROUNDING = 1e-12
"""Of a link's share, within which it is another's."""

SAME = 1e-12
"""Seconds within which flows end together, so that rounding does not make many events of one."""

Route = tuple[int, ...]
"""Numbers of the links that a flow takes."""


class Core(NamedTuple):
    """What lies between the links of hosts."""

    capacity: tuple[float, ...]
    """Of its links, in links of a host."""
    route: Callable[[int, int], Route]
    """Which of them a flow from a host to another takes."""


def core(topology: str, hosts: int) -> Core:
    """The core between so many hosts; "full", "fattree R", "fattree R H" (H hosts at a leaf) or "torus AxBxC".

    Raises ConfigError where the text is none of these, or the torus is too small.
    """
    if topology == "full":
        return Core((), lambda source, target: ())
    if found := re.fullmatch(r"fattree (\d+(?:\.\d+)?)(?: (\d+))?", topology):
        ratio, leaf = float(found[1]), int(found[2] or LEAF)
        if ratio > 0 and leaf > 0:
            return _fat_tree(ratio, leaf, hosts)
    if found := re.fullmatch(r"torus (\d+(?:x\d+)*)", topology):
        extents = tuple(int(n) for n in found[1].split("x"))
        if prod(extents) >= hosts:
            return _torus(extents)
        raise ConfigError(
            f"topology {topology!r} has {prod(extents)} hosts, but there are {hosts}; write a larger one into the "
            f"machine's file, or ask for fewer ranks"
        )
    raise ConfigError(
        f'topology {topology!r}: write "full", "fattree R" for R to 1 oversubscribed above leaf switches of {LEAF} '
        f'hosts, "fattree R H" for leaves of H hosts, or "torus AxBxC" into the machine\'s file'
    )


def _fat_tree(ratio: float, leaf: int, hosts: int) -> Core:
    """Each leaf has one way up and one down, of as many links as it has hosts, divided by `ratio`; no limit above."""
    leaves = -(-hosts // leaf)

    def route(source: int, target: int) -> Route:
        up, down = source // leaf, target // leaf
        return () if up == down else (2 * up, 2 * down + 1)

    return Core((leaf / ratio,) * (2 * leaves), route)


def _torus(extents: Sequence[int]) -> Core:
    """Hosts in row-major order; one link each way between neighbours; one dim after the other, the shorter way round.

    Half way round goes up.
    """
    strides = [prod(extents[dim + 1 :]) for dim in range(len(extents))]

    def route(source: int, target: int) -> Route:
        at, taken = source, []
        for dim, (n, stride) in enumerate(zip(extents, strides, strict=True)):
            ahead = (target // stride - at // stride) % n
            up = 2 * ahead <= n
            for _ in range(ahead if up else n - ahead):
                taken.append((at * len(extents) + dim) * 2 + up)
                place = at // stride % n
                at += ((place + (1 if up else -1)) % n - place) * stride
        return tuple(taken)

    return Core((1.0,) * (2 * len(extents) * prod(extents)), route)


class Network:
    """The links of a machine with the ranks on it, and which of them a message takes.

    A rank has one port out and one in on each level; of the links of a host it uses one, its ranks in turn.
    """

    def __init__(self, machine: Machine, ranks: int) -> None:
        """Raises ConfigError where the machine has too few hosts, or no such topology."""
        self.hosts = machine.layout(ranks)
        first = {host: rank for rank, host in reversed(list(enumerate(self.hosts)))}
        self._place = [rank - first[host] for rank, host in enumerate(self.hosts)]
        self._per_socket = machine.per_socket if machine.socket is not None else None
        self._links = machine.links
        self._core = core(machine.topology, len(first))
        near, far = machine.node or NODE, machine.network or NETWORK
        socket = machine.socket or near
        self.near_gamma, self.far_gamma = near.gamma, far.gamma
        """Seconds per byte that is added."""
        self._alpha = socket.alpha, near.alpha, far.alpha
        counts = 2 * ranks, 2 * ranks, 2 * len(first) * machine.links
        self._begin = (0, counts[0], counts[0] + counts[1], sum(counts))
        self.capacity = [
            _rate(level.beta) for level, many in zip((socket, near, far), counts, strict=True) for _ in range(many)
        ]
        """Bytes per second of each link."""
        self.capacity += [share * machine.links * _rate(far.beta) for share in self._core.capacity]

    def near(self, source: int, target: int) -> bool:
        """Whether two ranks are on one host."""
        return self.hosts[source] == self.hosts[target]

    def alpha(self, source: int, target: int) -> float:
        """Seconds before a message flows."""
        return self._alpha[self._level(source, target)]

    def route(self, source: int, target: int) -> Route:
        """The links from a rank to another one."""
        level = self._level(source, target)
        begin = self._begin[level]
        if level < FAR:
            return begin + 2 * source, begin + 2 * target + 1
        hosts = self.hosts[source], self.hosts[target]
        out, into = (
            host * self._links + self._place[rank] % self._links
            for host, rank in zip(hosts, (source, target), strict=True)
        )
        between = (self._begin[CORE] + link for link in self._core.route(*hosts))
        return begin + 2 * out, *between, begin + 2 * into + 1

    def _level(self, source: int, target: int) -> int:
        if not self.near(source, target):
            return FAR
        each = self._per_socket
        return NEAR if each is None or self._place[source] // each != self._place[target] // each else SOCKET


SOCKET, NEAR, FAR, CORE = range(4)


def _rate(beta: float) -> float:
    """Bytes per second."""
    return 1 / beta if beta > 0 else inf


def fair(routes: Sequence[Route], capacity: Sequence[float]) -> list[float]:
    """The max-min fair rate of each flow: none could have more without taking from one that has no more itself.

    The scarcest links give their flows an equal share each, then the next scarcest what is left of them.
    """
    rate = [inf] * len(routes)
    users: dict[int, set[int]] = {}
    for flow, route in enumerate(routes):
        for link in route:
            users.setdefault(link, set()).add(flow)
    left = {link: capacity[link] for link in users}
    while users:
        shares = {link: left[link] / len(flows) for link, flows in users.items()}
        share = min(shares.values())
        scarcest = [link for link, found in shares.items() if found <= share * (1 + ROUNDING)]
        for flow in {flow for link in scarcest for flow in users[link]}:
            rate[flow] = share
            for link in routes[flow]:
                left[link] -= share
                users[link].discard(flow)
        users = {link: flows for link, flows in users.items() if flows}
    return rate


class Flow:
    """One message on its way."""

    __slots__ = ("end", "key", "left", "rate", "route", "since")

    def __init__(self, key: int, route: Route, nbytes: float, now: float) -> None:
        self.key, self.route, self.left, self.since = key, route, float(nbytes), now
        """`left` bytes at the time `since`."""
        self.rate, self.end = 0.0, inf


class Flows:
    """All messages on their way, over links of `capacity` bytes per second. Time only goes forward."""

    def __init__(self, capacity: Sequence[float]) -> None:
        self.capacity = capacity
        self._flows: dict[int, Flow] = {}
        self._on: list[set[int]] = [set() for _ in capacity]
        """By link, the flows that take it."""
        self._ends: list[tuple[float, int]] = []
        self._changed: set[int] = set()
        """Links where flows began or ended since rates were last computed."""
        self._now, self._keys = 0.0, count()

    def start(self, now: float, route: Route, nbytes: float) -> int:
        """Begin to send so many bytes; the number of the flow. Links of infinite capacity take no time."""
        self._now = now
        flow = Flow(next(self._keys), tuple(link for link in route if not isinf(self.capacity[link])), nbytes, now)
        self._flows[flow.key] = flow
        for link in flow.route:
            self._on[link].add(flow.key)
        self._changed.update(flow.route)
        if not flow.route or nbytes <= 0:
            self._ends_at(flow, now)
        return flow.key

    def next(self) -> float:
        """When the next flow ends; infinity where none is under way."""
        self._settle()
        return self._first()

    def finished(self, now: float) -> list[int]:
        """The flows that have ended by now, in order of their numbers; `next` has said when that is."""
        found = []
        while self._first() <= now + SAME:
            _, key = heappop(self._ends)
            flow = self._flows.pop(key)
            for link in flow.route:
                self._on[link].discard(key)
            self._changed.update(flow.route)
            found.append(key)
        self._now = now
        return sorted(found)

    def rates(self) -> dict[int, float]:
        """Bytes per second of each flow now."""
        self._settle()
        return {key: flow.rate for key, flow in self._flows.items()}

    def _settle(self) -> None:
        """New rates for the flows that share a link, directly or by way of others, with what began or ended."""
        if not self._changed:
            return
        flows = [self._flows[key] for key in sorted(self._together(self._changed))]
        self._changed = set()
        for flow, rate in zip(flows, fair([flow.route for flow in flows], self.capacity), strict=True):
            if rate != flow.rate:
                flow.left = max(0.0, flow.left - flow.rate * (self._now - flow.since))
                flow.since, flow.rate = self._now, rate
                self._ends_at(flow, self._now + flow.left / rate)

    def _first(self) -> float:
        while self._ends:
            end, key = self._ends[0]
            if key in self._flows and self._flows[key].end == end:
                return end
            heappop(self._ends)  # gone, or its rate has changed since
        return inf

    def _together(self, links: Iterable[int]) -> set[int]:
        found: set[int] = set()
        open_, seen = list(links), set(links)
        while open_:
            for key in self._on[open_.pop()] - found:
                found.add(key)
                more = set(self._flows[key].route) - seen
                seen |= more
                open_ += more
        return found

    def _ends_at(self, flow: Flow, end: float) -> None:
        flow.end = end
        heappush(self._ends, (end, flow.key))
