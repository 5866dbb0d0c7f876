"""The cheapest choice of one state per node of a graph with a cost per state and per pair of states along its edges.

Node and edge elimination (Jia et al. 2018, arXiv 1802.04924, equations 2 and 3), whichever way edges point, which
leaves nothing of a series-parallel graph; what is left of others goes node by node with tables over all neighbours.
Exact, but for the rounding of float32.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from math import prod
from typing import NamedTuple

import numpy as np

from hpctrain.errors import PlanError
from hpctrain.planner.bounds import min_plus

Nodes = Mapping[str, tuple[Hashable, np.ndarray]]
"""{name: (key, cost of each state)}; equal keys mean equal costs."""

Edges = Mapping[tuple[str, str], Sequence[tuple[Hashable, np.ndarray]]]
"""{(from, to): [(key, cost of each pair of states)]}; equal keys mean equal tables."""

MOST = 4 * 10**9
"""Combinations of states that are looked at for one node of what cannot be reduced: some seconds."""

LARGEST = 10**8
"""Numbers in a table, at most."""


class Costs(NamedTuple):
    """A table and the number that stands for its content."""

    id: int
    values: np.ndarray


class Memo:
    """What was computed before, here or in the call before: repeated blocks of a network, and parts that stay."""

    def __init__(self) -> None:
        self._ids: dict[Hashable, int] = {}
        self._tables: dict[int, np.ndarray] = {}
        self._older: dict[int, np.ndarray] = {}

    def id(self, key: Hashable) -> int:
        """The number of a key."""
        return self._ids.setdefault(key, len(self._ids))

    def turned(self, table: Costs) -> Costs:
        """The table of the same edge seen from the other end."""
        id = self.id(("turned", table.id))
        self._ids[("turned", id)] = table.id
        return Costs(id, table.values.T)

    def known(self, key: Hashable, make: Callable[[], np.ndarray]) -> Costs:
        """What `make` gives, or gave for an equal key."""
        id = self.id(key)
        if id not in self._tables:
            self._tables[id] = self._older[id] if id in self._older else make()
        return Costs(id, self._tables[id])

    def begin(self) -> None:
        """From now on only what the last call used, or this one does, is kept."""
        self._older, self._tables = self._tables, {}


class Step(NamedTuple):
    """A node that was eliminated, and what decides on its state once those of its neighbours are known."""

    name: str
    cost: np.ndarray
    tables: tuple[tuple[tuple[str, ...], np.ndarray], ...]
    """Tables [state of the node, states of these neighbours]."""


def solve(nodes: Nodes, edges: Edges, memo: Memo | None = None) -> tuple[float, dict[str, int]]:
    """(least sum of costs, {name: its state}); of several, one and always the same.

    Raises PlanError where the graph is too far from series-parallel.
    """
    memo = Memo() if memo is None else memo
    memo.begin()
    left = _Left(memo, {name: Costs(memo.id(("node", key)), _float(cost)) for name, (key, cost) in nodes.items()})
    for (u, v), tables in edges.items():
        for key, table in tables:
            left.join(u, v, Costs(memo.id(("edge", key)), _float(table)))
    steps: list[Step] = []
    while (name := left.next()) is not None:
        steps.append(left.eliminate(name))
    steps += _core(left)
    states: dict[str, int] = {}
    for step in reversed(steps):
        total = step.cost.copy()
        for others, table in step.tables:
            total += table[(slice(None), *(states[other] for other in others))]
        states[step.name] = int(total.argmin())
    states = {name: states[name] for name in nodes}
    return cost_of(nodes, edges, states), states


def cost_of(nodes: Nodes, edges: Edges, states: Mapping[str, int]) -> float:
    """The sum of the costs of these states."""
    total = sum(float(cost[states[name]]) for name, (_, cost) in nodes.items())
    return total + sum(float(t[states[u], states[v]]) for (u, v), tables in edges.items() for _, t in tables)


def _float(table: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(table, np.float32)


class _Left:
    """The nodes that are left, and the one table of each pair of neighbours, from either end."""

    def __init__(self, memo: Memo, nodes: dict[str, Costs]) -> None:
        self.memo, self.nodes = memo, nodes
        self.near: dict[str, dict[str, Costs]] = {name: {} for name in nodes}

    def join(self, u: str, v: str, table: Costs) -> None:
        """One more edge; with one between the same nodes it becomes one (equation 3)."""
        if (known := self.near[u].get(v)) is not None:
            table = self.memo.known(("sum", *sorted((known.id, table.id))), lambda: known.values + table.values)
        self.near[u][v], self.near[v][u] = table, self.memo.turned(table)

    def next(self) -> str | None:
        """The cheapest node to eliminate among those with at most two neighbours."""
        sizes = {name: len(cost.values) for name, cost in self.nodes.items()}
        able = [name for name in self.nodes if len(self.near[name]) <= 2]
        return min(able, key=lambda name: sizes[name] * prod(sizes[n] for n in self.near[name]), default=None)

    def eliminate(self, name: str) -> Step:
        """Takes a node with at most two neighbours out; these have its cost from now on (equation 2)."""
        cost, near = self.nodes.pop(name), self.near.pop(name)
        for other in near:
            del self.near[other][name]
        match list(near.items()):
            case [(u, table)]:
                key = ("leaf", self.nodes[u].id, table.id, cost.id)
                before = self.nodes[u].values
                self.nodes[u] = self.memo.known(key, lambda: before + (table.values + cost.values[:, None]).min(0))
            case [(u, to_u), (v, to_v)]:
                from_u = self.memo.turned(to_u)
                key = ("node", from_u.id, cost.id, to_v.id)
                self.join(u, v, self.memo.known(key, lambda: min_plus(from_u.values + cost.values, to_v.values)))
        return Step(name, cost.values, tuple(((other,), table.values) for other, table in near.items()))


# --- what is not series-parallel -------------------------------------------------------------------------------------


Table = tuple[tuple[str, ...], np.ndarray]
"""Nodes, and the cost of each combination of their states."""


def _core(left: _Left) -> list[Step]:
    """Eliminates the rest, each node with a table over all its neighbours."""
    order = list(left.nodes)
    tables: list[Table] = [
        ((u, v), left.near[u][v].values) for i, u in enumerate(order) for v in order[i + 1 :] if v in left.near[u]
    ]
    sizes = {name: len(cost.values) for name, cost in left.nodes.items()}
    steps: list[Step] = []
    while order:
        around = {name: _around(name, tables, order) for name in order}
        name = min(order, key=lambda name: sizes[name] * prod(sizes[n] for n in around[name]))
        others, cost = around[name], left.nodes[name].values
        _require_few(name, others, sizes, order)
        own = [_from(name, table) for table in tables if name in table[0]]
        tables = [table for table in tables if name not in table[0]]
        tables.append((others, _minimum(cost, own, others, [sizes[n] for n in others])))
        steps.append(Step(name, cost, tuple(own)))
        order.remove(name)
    return steps


def _around(name: str, tables: Sequence[Table], order: Sequence[str]) -> tuple[str, ...]:
    """The neighbours of a node, in order."""
    found = {n for names, _ in tables if name in names for n in names}
    return tuple(n for n in order if n in found and n != name)


def _require_few(name: str, others: Sequence[str], sizes: Mapping[str, int], rest: Sequence[str]) -> None:
    """Raises PlanError where the states of a node and its neighbours have too many combinations."""
    table = prod(sizes[n] for n in others)
    if table > LARGEST or table * sizes[name] > MOST:
        states = ", ".join(f"{n} with {sizes[n]}" for n in (name, *others))
        raise PlanError(
            f"{len(rest)} layers are connected too densely to find the best plan: around {states} partitions there "
            f"are {table * sizes[name]:.1e} combinations, more than {MOST:.0e}; plan for fewer ranks, give plan.only "
            'fewer axes for these kinds of layers, or set plan.fewer = "none"'
        )


def _from(name: str, table: Table) -> Table:
    """A table with the states of `name` first; its other nodes only are named."""
    names, values = table
    return tuple(n for n in names if n != name), np.moveaxis(values, names.index(name), 0)


def _minimum(cost: np.ndarray, tables: Sequence[Table], others: Sequence[str], sizes: Sequence[int]) -> np.ndarray:
    """For each combination of states of `others`, the least cost over the states of the node."""
    best = np.full(tuple(sizes), np.inf, np.float32)
    placed = []
    for names, values in tables:
        shape = [len(values)] + [size if other in names else 1 for other, size in zip(others, sizes, strict=True)]
        order = sorted(range(len(names)), key=lambda i: others.index(names[i]))
        placed.append(values.transpose(0, *(i + 1 for i in order)).reshape(shape))
    for state, own in enumerate(cost):
        total = np.full(tuple(sizes), own, np.float32)
        for values in placed:
            total += values[state]
        np.minimum(best, total, out=best)
    return best
