"""The cheapest plan for a number of ranks: exact for a cost that adds up over layers and edges, judged by the whole.

Each group of layers has a node with a cost per partition, each edge between groups a table of lower bounds. The best
choice by these is priced exactly and written back, until the best choice is one that was: then no plan is cheaper. The
best few of the plans met on the way, and the plans that people make by hand, are then priced with everything that does
not add up: sums of gradients per group, and what of them overlap hides.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf, sqrt
from time import perf_counter

import numpy as np

from hpctrain.graph import Graph
from hpctrain.partition import AXES, Partition
from hpctrain.planner.baselines import by_hand, uniform_plans
from hpctrain.planner.cost import price
from hpctrain.planner.edge_tables import Pairs
from hpctrain.planner.eliminate import Memo, solve
from hpctrain.planner.groups import ALL, Group, as_partition, candidates, chosen, follow, groups
from hpctrain.planner.limits import bytes_of, fits, refusal
from hpctrain.planner.plan import Plan
from hpctrain.planner.seconds import PlanCost
from hpctrain.planner.setting import Setting
from hpctrain.planner.states import States, overlaps

CLOSE = 1e-6
"""The search ends where the best plan is at most so much, relatively, above the bound."""

FINALISTS = 4
"""Plans of the search that are priced with all that does not add up."""

DEADLINE = 60.0
"""Seconds after which the search ends with what it has."""

STEP, STEPS, HALVINGS = 8.0, 10, 6
"""By what factor the price of a byte is raised, how often at most until a plan fits, and how often halved then."""

FEW_ROUNDS = 8
"""Where memory has a price, or sums are hidden: how far on, nobody knows."""

HIDDEN = (0.5, 1.0)
"""Where sums of gradients overlap backward, shares of them that may be hidden: other plans are then the best."""


@dataclass(frozen=True)
class Found:
    """The plan that the search chose, and how sure it is."""

    plan: Plan
    cost: PlanCost
    bound: float
    """Seconds: no plan of these candidates is cheaper, by costs that add up, whatever its memory."""
    gap: float
    """By how much the chosen plan's costs, added up, are above the bound, in proportion."""
    rounds: int
    """How often plans were priced exactly."""
    seconds: float
    """That the search took."""
    candidates: int
    """Partitions of all groups of layers."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Met:
    """A plan that was the best by the bounds of its time."""

    cost: float
    """All that adds up."""
    states: Mapping[str, int]


def search(
    graph: Graph, setting: Setting, ranks: int, memory_limit: float | None = None, deadline: float = DEADLINE
) -> Found:
    """The best plan on `ranks`, of which no rank needs more than `memory_limit` bytes, or else than the machine has.

    Raises PlanError where nothing fits, with what would; and where a layer can be cut in no way that is allowed.
    """
    began = perf_counter()
    limit = memory_limit if memory_limit is not None else setting.machine.memory or inf
    looking = Search(graph, setting, ranks, began + deadline)
    looking.refine()
    if overlaps(setting, looking.states.hosts.tolist()):
        for hidden in HIDDEN:
            looking.refine(hidden=hidden, rounds=FEW_ROUNDS)
    plans = [looking.plan(met) for met in looking.best_that_fit(limit)]
    others = [plan for plan in by_hand(graph, setting, ranks).values() if not isinstance(plan, str)]
    others += [plan for _, plan in uniform_plans(graph, setting, ranks)]
    plans += [plan for plan in others if looking.allows(plan)]
    found = _cheapest_that_fits(looking, plans, limit)
    if found is None:
        raise refusal(graph, setting, ranks, limit)
    return looking.found(*found, perf_counter() - began)


def _cheapest_that_fits(looking: Search, plans: Sequence[Plan], limit: float) -> tuple[Plan, PlanCost] | None:
    """By the whole price, which is asked for only where a plan may still be the cheapest, as is its memory."""
    priced: list[tuple[float, int, PlanCost]] = []
    for least, i in sorted((looking.least(plan), i) for i, plan in enumerate(plans)):
        while priced and priced[0][0] <= least:
            _, best, cost = heappop(priced)
            if looking.fits(plans[best], limit):
                return plans[best], cost
        cost = price(looking.graph, plans[i], looking.setting, looking.ranks, looking.states.pricer)
        heappush(priced, (cost.seconds, i, cost))
    fitting = ((plans[i], cost) for _, i, cost in sorted(priced, key=lambda e: e[:2]) if looking.fits(plans[i], limit))
    return next(fitting, None)


class Search:
    """What is known of the costs of plans, and the plans met so far."""

    def __init__(self, graph: Graph, setting: Setting, ranks: int, until: float) -> None:
        self.graph, self.setting, self.ranks, self.until = graph, setting, ranks, until
        self.groups = groups(graph)
        self._group = {group.head: group for group in self.groups}
        self.partitions = {group.head: candidates(graph, group, ranks, setting) for group in self.groups}
        self.states = States(graph, setting, ranks)
        self.pairs = Pairs(self.states, self.groups, self.partitions)
        self.bound = 0.0
        self.rounds = 0
        self.met: dict[tuple[int, ...], Met] = {}
        self.notes = [f"on more than {ALL} ranks not all partitions are looked at"] if ranks > ALL else []
        self._memo = Memo()
        self._known: dict[tuple[str, Partition], tuple[int, tuple[Partition, ...]]] = {}
        self._memory: dict[str, np.ndarray] = {}
        self._fitting: dict[tuple[Partition, ...], bool] = {}

    def refine(
        self, per_byte: float = 0.0, per_byte_moved: float = 0.0, hidden: float = 0.0, rounds: int = 10**6
    ) -> Met:
        """The best plan, where memory of layers and of exchanges has a price or none, and so much of what sums take is
        hidden; after some rounds perhaps only nearly.
        """
        extra = {group.head: self._extra(group, per_byte, hidden) for group in self.groups}
        best, least = Met(inf, {}), inf
        for _ in range(rounds):
            nodes = {group.head: self._node(group, (per_byte, hidden), extra[group.head]) for group in self.groups}
            bound, states = solve(nodes, self.pairs.tables(per_byte_moved), self._memo)
            met, changed = self._meet(states)
            self.rounds += 1
            paid = met.cost + sum(float(added[states[head]]) for head, added in extra.items())
            paid += per_byte_moved * self._moved(states) if per_byte_moved else 0.0
            if paid < least:
                best, least = met, paid
            if not (per_byte or hidden):
                self.bound = max(self.bound, min(bound, least) + self.setting.machine.step)
            if not changed or least <= bound * (1 + CLOSE):
                break
            if perf_counter() > self.until:
                self.notes.append(f"the search ended at its deadline, after {self.rounds} rounds")
                break
        return best

    def best_that_fit(self, limit: float) -> list[Met]:
        """The best few plans met whose memory is within the limit; memory has a price where the best of all is not."""
        if self.fits(self.plan(self._cheapest()), limit):
            return self._finalists(list(self.met.values()))
        fitting = self._with_price(limit, 1.0) or self._with_price(limit, 0.0)
        if fitting:
            seconds = self._cheapest().cost / min(met.cost for met in fitting)
            self.notes.append(f"without a limit of memory {seconds:.0%} of the time")
        return self._finalists(fitting)

    def _with_price(self, limit: float, moved: float) -> list[Met]:
        """Plans that fit, as the price of a byte first rises, then falls; `moved`: what share of it exchanges pay."""
        best = self._cheapest()
        rate = best.cost / sum(float(self._bytes(g)[best.states[g.head]]) for g in self.groups) / STEP**2
        lowest, fitting = 0.0, list[Met]()
        for _ in range(STEPS):
            met = self.refine(rate, moved * rate, rounds=FEW_ROUNDS)
            if self.fits(self.plan(met), limit):
                fitting.append(met)
                break
            lowest, rate = rate, rate * STEP
        for _ in range(HALVINGS if fitting else 0):
            middle = sqrt(lowest * rate) if lowest else rate / STEP
            met = self.refine(middle, moved * middle, rounds=FEW_ROUNDS)
            if self.fits(self.plan(met), limit):
                fitting.append(met)
                rate = middle
            else:
                lowest = middle
        return fitting

    def allows(self, plan: Plan) -> bool:
        """Whether it cuts layers along such axes only as the setting says."""
        heads = ((type(self.graph[group.head].layer).__name__, group.head) for group in self.groups)
        return all(
            plan.partitions[head].parts().keys() <= set(self.setting.only.get(kind, AXES)) for kind, head in heads
        )

    def least(self, plan: Plan) -> float:
        """Seconds that any plan takes at least: what is known of its groups and of edges between these.

        Where sums of gradients may be hidden, they count for nothing.
        """
        states = self._states(plan)
        hidden = overlaps(self.setting, self.states.hosts.tolist())
        total = self.setting.machine.step
        for head, state in states.items():
            _, costs = self.states.costs(self._group[head], self.partitions[head])
            total += float(costs.seconds[state] - hidden * costs.sums[state])
        for link in self.pairs.links:
            if link.producer in states and link.consumer in states:
                total += float(self.pairs[link][1].seconds[states[link.producer], states[link.consumer]])
        return total

    def _states(self, plan: Plan) -> dict[str, int]:
        """The states of those groups that `plan` cuts in one that is looked at."""
        found = {}
        for group in self.groups:
            first, *others = (plan.partitions[name] for name in group.names)
            if (group.head, first) not in self._known:
                self._known[group.head, first] = self._state(group, first)
            state, followers = self._known[group.head, first]
            if state >= 0 and tuple(others) == followers:
                found[group.head] = state
        return found

    def _state(self, group: Group, partition: Partition) -> tuple[int, tuple[Partition, ...]]:
        """(the state of that partition, -1 if it is not looked at, partitions of the layers that follow)."""
        row = np.array(partition.shape, np.int32)
        same = np.flatnonzero((self.partitions[group.head] == row).all(1))
        others = (follow(self.graph, group, name, row[None])[0] for name in group.names[1:])
        return (int(same[0]) if len(same) else -1), tuple(as_partition(other) for other in others)

    def found(self, plan: Plan, cost: PlanCost, seconds: float) -> Found:
        """What to say of the plan that was chosen."""
        states, step = self._states(plan), self.setting.machine.step
        known = len(states) == len(self.groups)
        if not known:
            self.notes.append(f'one grid, coarser in places than plan.fewer = "{self.setting.fewer}" lets others be')
        added = self._meet(states)[0].cost + step if known else cost.seconds + cost.hidden
        gap = max(0.0, added - self.bound) / self.bound if self.bound else 0.0
        count = sum(map(len, self.partitions.values()))
        return Found(plan, cost, self.bound, gap, self.rounds, seconds, count, tuple(self.notes))

    def _meet(self, states: dict[str, int]) -> tuple[Met, bool]:
        """The plan of these states, and whether pricing it exactly changed any bound."""
        changed = self._price(states)
        met = Met(self._total(states), states)
        return self.met.setdefault(tuple(states.values()), met), changed

    def plan(self, met: Met) -> Plan:
        """It, for the executor."""
        rows = {head: partitions[met.states[head]] for head, partitions in self.partitions.items()}
        return Plan(chosen(self.graph, self.groups, rows), self.setting.allreduce)

    def _finalists(self, plans: Sequence[Met]) -> list[Met]:
        """The best few, whatever share of their sums is hidden."""
        found: dict[tuple[int, ...], Met] = {}
        for hidden in (0.0, *HIDDEN):
            ordered = sorted(plans, key=lambda met: met.cost - hidden * self._sums(met))
            found |= {tuple(met.states.values()): met for met in ordered[:FINALISTS]}
        return list(found.values())

    def _sums(self, met: Met) -> float:
        return sum(
            float(self.states.costs(g, self.partitions[g.head])[1].sums[met.states[g.head]]) for g in self.groups
        )

    def _cheapest(self) -> Met:
        return min(self.met.values(), key=lambda met: met.cost)

    def fits(self, plan: Plan, limit: float) -> bool:
        """Whether its memory is within the limit; looked at once."""
        key = tuple(plan.partitions.values())
        if key not in self._fitting:
            self._fitting[key] = fits(self.graph, plan, self.setting, self.ranks, limit)
        return self._fitting[key]

    def _bytes(self, group: Group) -> np.ndarray:
        if group.head not in self._memory:
            self._memory[group.head] = bytes_of(self.graph, group, self.partitions[group.head], self.setting)
        return self._memory[group.head]

    def _extra(self, group: Group, per_byte: float, hidden: float) -> np.ndarray:
        """What memory costs, less what is hidden of sums, of each state."""
        _, costs = self.states.costs(group, self.partitions[group.head])
        bytes_cost = per_byte * self._bytes(group) if per_byte else 0.0
        return np.asarray(bytes_cost - hidden * costs.sums)

    def _moved(self, states: Mapping[str, int]) -> float:
        """Bytes that exchanges need."""
        return sum(float(self.pairs.memory(x)[states[x.producer], states[x.consumer]]) for x in self.pairs.links)

    def _node(self, group: Group, key: Hashable, extra: np.ndarray) -> tuple[Hashable, np.ndarray]:
        own, costs = self.states.costs(group, self.partitions[group.head])
        return (own, costs.changes, key), costs.seconds + extra

    def _price(self, states: Mapping[str, int]) -> bool:
        """Prices the chosen pairs and partial sums exactly; whether that changed any."""
        changed = [self.pairs.price(link, states[link.producer], states[link.consumer]) for link in self.pairs.links]
        changed += [self.states.price(g, self.partitions[g.head], states[g.head]) for g in self.groups]
        return any(changed)

    def _total(self, states: Mapping[str, int]) -> float:
        """What adds up, of a plan that was priced exactly."""
        nodes = sum(
            float(self.states.costs(g, self.partitions[g.head])[1].seconds[states[g.head]]) for g in self.groups
        )
        links = self.pairs.links
        return nodes + sum(float(self.pairs[x][1].seconds[states[x.producer], states[x.consumer]]) for x in links)
