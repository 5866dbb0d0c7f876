"""Elimination against enumeration, on random graphs that are series-parallel and on others."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from hpctrain.errors import PlanError
from hpctrain.planner.eliminate import Edges, Memo, Nodes, cost_of, solve

SEED = 7
SERIES_PARALLEL = 200
OTHERS = 60


def brute_force(nodes: Nodes, edges: Edges) -> float:
    """The least sum over all combinations, as one array with a dim per node."""
    names = list(nodes)
    total = np.zeros([len(cost) for _, cost in nodes.values()])
    for i, (_, cost) in enumerate(nodes.values()):
        total += cost.reshape([-1 if d == i else 1 for d in range(len(names))])
    for (u, v), tables in edges.items():
        i, j = names.index(u), names.index(v)
        for _, table in tables:
            oriented = table if i < j else table.T
            total += oriented.reshape([total.shape[d] if d in (i, j) else 1 for d in range(len(names))])
    return float(total.min())


def series_parallel(rng: np.random.Generator, steps: int) -> list[tuple[int, int]]:
    """Edges of a graph that grows from one edge: an edge becomes two in a row, or two beside each other, or a leaf."""
    edges, count = [(0, 1)], 2
    for _ in range(steps):
        i = int(rng.integers(len(edges)))
        u, v = edges[i]
        kind = rng.random()
        if kind < 0.45:
            edges[i : i + 1] = [(u, count), (count, v)]
            count += 1
        elif kind < 0.8:
            edges.append((u, v))
        else:
            edges.append((u, count) if rng.random() < 0.5 else (count, u))
            count += 1
    return edges


def problem(rng: np.random.Generator, edges: list[tuple[int, int]], most: int = 4) -> tuple[Nodes, Edges]:
    """Random costs, whole numbers so that no sum is rounded; ties are frequent."""
    count = 1 + max((n for edge in edges for n in edge), default=0)
    nodes = {f"n{i}": (("node", i), rng.integers(0, 20, rng.integers(1, most + 1)).astype(float)) for i in range(count)}
    found: dict[tuple[str, str], list[tuple[Any, np.ndarray]]] = {}
    for k, (i, j) in enumerate(edges):
        u, v = f"n{i}", f"n{j}"
        table = rng.integers(0, 20, (len(nodes[u][1]), len(nodes[v][1]))).astype(float)
        found.setdefault((u, v), []).append((("edge", k), table))
    return nodes, found


def check(nodes: Nodes, edges: Edges) -> None:
    cost, states = solve(nodes, edges)
    assert cost == brute_force(nodes, edges)
    assert list(states) == list(nodes)
    assert cost == cost_of(nodes, edges, states)


def test_series_parallel_graphs_equal_enumeration() -> None:
    rng, sizes = np.random.default_rng(SEED), []
    for _ in range(SERIES_PARALLEL):
        nodes, edges = problem(rng, series_parallel(rng, int(rng.integers(1, 13))))
        check(nodes, edges)
        sizes.append(len(nodes))
    print(f"{len(sizes)} graphs of {min(sizes)} to {max(sizes)} nodes, seed {SEED}")
    assert max(sizes) >= 8


def test_other_graphs_equal_enumeration() -> None:
    rng, dense = np.random.default_rng(SEED), 0
    for _ in range(OTHERS):
        count = int(rng.integers(4, 8))
        edges = [(i, j) for i in range(count) for j in range(i + 1, count) if rng.random() < 0.75]
        check(*problem(rng, edges, 3))
        dense += len(edges) > 2 * count - 3  # more than any series-parallel graph has
    print(f"{OTHERS} graphs, {dense} certainly not series-parallel, seed {SEED}")
    assert dense >= 10


def test_edges_may_point_either_way_between_the_same_nodes() -> None:
    rng = np.random.default_rng(SEED)
    check(*problem(rng, [(0, 1), (1, 0), (1, 2), (2, 0)]))


def test_without_edges_every_node_has_its_cheapest_state() -> None:
    nodes: Nodes = {"a": ("a", np.array([3.0, 1.0])), "b": ("b", np.array([2.0, 5.0, 0.0]))}
    assert solve(nodes, {}) == (1.0, {"a": 1, "b": 2})


def test_one_state_each_is_what_it_costs() -> None:
    rng = np.random.default_rng(SEED)
    nodes, edges = problem(rng, [(0, 1), (1, 2), (0, 2), (2, 3), (0, 3), (1, 3)], 1)
    every = sum(cost.sum() for _, cost in nodes.values()) + sum(t.sum() for ts in edges.values() for _, t in ts)
    assert solve(nodes, edges) == (every, dict.fromkeys(nodes, 0))


def test_equal_keys_are_computed_once_and_later_calls_see_changes() -> None:
    """A row of equal blocks, each two convolutions beside a shortcut; then one table changes, with its key."""
    rng, memo = np.random.default_rng(SEED), Memo()
    cost, tables = rng.integers(0, 20, 5).astype(float), rng.integers(0, 20, (3, 5, 5)).astype(float)
    nodes: Nodes = {f"n{i}": ("cost", cost) for i in range(7)}
    edges: dict[tuple[str, str], list[tuple[Any, np.ndarray]]] = {}
    for i in range(0, 6, 2):
        edges[f"n{i}", f"n{i + 1}"] = [("first", tables[0])]
        edges[f"n{i + 1}", f"n{i + 2}"] = [("second", tables[1])]
        edges[f"n{i}", f"n{i + 2}"] = [("shortcut", tables[2])]
    for _ in range(2):
        assert solve(nodes, edges, memo)[0] == brute_force(nodes, edges)
        changed = tables[1].copy()
        changed[:2] += 9
        edges["n1", "n2"] = [("second, changed", changed)]


def test_too_dense_a_graph_is_refused_with_the_layers_and_a_remedy() -> None:
    count, states = 6, 100
    nodes: Nodes = {f"layer{i}": ("node", np.zeros(states)) for i in range(count)}
    table = np.zeros((states, states))
    edges = {(f"layer{i}", f"layer{j}"): [("edge", table)] for i in range(count) for j in range(i + 1, count)}
    with pytest.raises(PlanError, match=r"6 layers.*layer0 with 100.*1\.0e\+12 combinations.*plan\.only"):
        solve(nodes, edges)


def brute(nodes: Nodes, edges: Edges) -> float:
    """`brute_force`, one combination after another."""
    every = product(*(range(len(cost)) for _, cost in nodes.values()))
    return min(cost_of(nodes, edges, dict(zip(nodes, states, strict=True))) for states in every)


def test_the_oracle_itself() -> None:
    rng = np.random.default_rng(SEED)
    for _ in range(10):
        nodes, edges = problem(rng, series_parallel(rng, 3), 3)
        assert brute(nodes, edges) == brute_force(nodes, edges)
