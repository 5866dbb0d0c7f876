"""Bounds of edges for all pairs of partitions, against exact prices; min-plus products against NumPy's own."""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import pytest
from networks import CASES, NETWORKS, network, random_partition, random_plan

from hpctrain.graph import Graph, Node
from hpctrain.layers import Conv, Flatten, MaxPool
from hpctrain.partition import AXES, Partition
from hpctrain.planner import bounds
from hpctrain.planner.ends import Ends, parts
from hpctrain.planner.layout import Edge, Kind, edges, layout
from hpctrain.planner.plan import extents
from hpctrain.planner.sampling import ALL, Sample
from hpctrain.planner.transfers import transfer
from hpctrain.planner.wire import Wire

FLOAT32 = np.dtype(np.float32)


def random_wire(rng: np.random.Generator, per_host: list[int]) -> Wire:
    """Copies, with or without a price of runs, or messages; on hosts of one of these sizes."""
    copies = bool(rng.random() < 0.6)
    run = float(rng.choice([0.0, 5e-8])) if copies else 0.0
    return Wire(3e-6, 2e-10, run, 7e-6, 3e-9, int(rng.choice(per_host)), copies)


def exact(producer: Node, p: np.ndarray, node: Node, slot: int | None, q: np.ndarray, kind: Kind, wire: Wire) -> float:
    """The seconds of one pair of partitions, both ways, by `transfer`."""
    place = layout(node, Partition(*q.tolist()))
    have, want = place.output, place.partial
    if slot is not None:
        have, want = layout(producer, Partition(*p.tolist())).output, place.inputs[slot]
    if want is None:
        return 0.0
    price = transfer(Edge(node.name, slot, have, want, kind, True), FLOAT32, wire)
    return price.forward + price.backward


def both(monkeypatch: pytest.MonkeyPatch, compute: object, *arguments: object) -> np.ndarray:
    """What `compute` of bounds gives by compiled code, where there is any, bit for bit what it gives by NumPy."""
    found = compute(*arguments)  # type: ignore[operator]
    with monkeypatch.context() as patched:
        patched.setattr(bounds, "_native", None)
        np.testing.assert_array_equal(compute(*arguments), found)  # type: ignore[operator]
    return np.asarray(found)


def reshapes(ends: Ends) -> bool:
    """Whether several dims follow from one of the work: runs within these are not counted."""
    return any(len(part.ends.shape) > 1 for part in parts(ends))


def test_compiled_code_is_tested_where_it_is_installed() -> None:
    assert (bounds._native is None) == (os.environ.get("HPCTRAIN_NATIVE") == "0")


@pytest.mark.parametrize("name", [*CASES, *NETWORKS])
def test_of_few_ranks_every_bound_is_the_exact_price(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net = NETWORKS[name]() if name in NETWORKS else network(name)
    rng, tried = np.random.default_rng(seed), 0
    for ranks in (6, 8):
        plans = [random_plan(rng, net, ranks) for _ in range(2)]
        choices = {n.name: np.array([plan.partitions[n.name].shape for plan in plans], np.int32) for n in net}
        for edge in edges(net, plans[0]):
            wire = random_wire(rng, [1, 2, 3, 4, ranks])
            node, itemsize, kind = net[edge.consumer], edge.kind.dtype(FLOAT32).itemsize, edge.kind
            q, common = choices[node.name], (True, itemsize, wire, ranks)
            if edge.slot is None:
                ends, source, p = Ends.partial(node), node, q
                got = np.diag(both(monkeypatch, bounds.partial_bounds, node, q, *common))
            else:
                source = net[node.inputs[edge.slot]]
                ends, p = Ends.between(source, node, edge.slot), choices[source.name]
                got = both(monkeypatch, bounds.pair_bounds, source, p, node, edge.slot, q, *common)
            assert got.dtype == np.float32
            for i, j in np.ndindex(2, 2):
                if edge.slot is None and i != j:
                    continue
                expected = exact(source, p[i], node, edge.slot, q[j], kind, wire)
                said = f"{name}: {edge.consumer} {edge.slot}, {p[i]} to {q[j]}, {wire}"
                if wire.run and reshapes(ends):
                    assert got[i, j] <= expected * (1 + 1e-6), said
                else:
                    np.testing.assert_allclose(got[i, j], expected, rtol=1e-6, err_msg=said)
                tried += 1
    print(f"{tried} pairs, seed {seed}")
    assert tried > 0


def test_a_gradient_that_does_not_flow_costs_nothing() -> None:
    net = network("conv2d")
    node, q = net["layer"], np.array([[1, 1, 4, 1, 1, 1]])
    wire, pre = Wire(3e-6, 2e-10, 0.0, 0.0, 0.0, 4), net["pre"]
    forward, all_of_it = (float(bounds.pair_bounds(pre, q, node, 0, q, g, 4, wire, 4)[0, 0]) for g in (False, True))
    place = layout(node, Partition(height=4))
    edge = Edge("layer", 0, layout(pre, Partition(height=4)).output, place.inputs[0], Kind.NUMBERS, True)
    price = transfer(edge, FLOAT32, wire)
    assert price.forward > 0 < price.backward
    assert forward == pytest.approx(price.forward)
    assert all_of_it == pytest.approx(price.forward + price.backward)


def large() -> Graph:
    """x -> conv -> strided conv -> pool -> flat, with extents that many ranks can cut."""
    net = Graph()
    x = net.add("wide", Conv(72, kernel=3, padding=1), net.input("x", (36, 61, 47, 24)))
    x = net.add("pool", MaxPool(2), net.add("strided", Conv(96, kernel=3, stride=2, padding=1, groups=8), x))
    net.add("flat", Flatten(), x)
    return net


@pytest.mark.parametrize("ranks", [72, 96, 128])
def test_of_many_ranks_no_bound_is_above_the_exact_price(
    ranks: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, rng, ratios = large(), np.random.default_rng(seed), []
    for source, node in ((net[node.inputs[0]], node) for node in net if node.inputs):
        wire = random_wire(rng, [4, 6, 8, ranks])
        p, q = (np.array([cut(rng, n, ranks) for _ in range(12)]) for n in (source, node))
        q[:3] = p[:3] if source is not net["x"] else q[:3]
        q[:3, AXES.index("contraction")] = 1
        got = both(monkeypatch, bounds.pair_bounds, source, p, node, 0, q, True, 4, wire, ranks)
        for i, j in np.ndindex(got.shape):
            if (i + j) % 5 and i != j:
                continue
            expected = exact(source, p[i], node, 0, q[j], Kind.NUMBERS, wire)
            assert got[i, j] <= expected * (1 + 1e-6), (node.name, p[i], q[j], wire)
            if node.name != "flat" and expected:  # runs within a reshape are not counted
                ratios.append(got[i, j] / expected)
    print(f"{len(ratios)} pairs, {np.mean(ratios):.3f} of the exact price, seed {seed}")
    assert np.mean(ratios) > 0.9


def cut(rng: np.random.Generator, node: Node, ranks: int) -> list[int]:
    """A partition of all ranks, or most, that leaves no block empty."""
    limits = extents(node)
    while True:
        found = random_partition(rng, ranks)
        fits = all(parts <= limits.get(axis, 1) for axis, parts in found.parts().items())
        if fits and found.channel * found.contraction <= limits.get("channel", 1) and 2 * found.size > ranks:
            return list(found.shape)


def test_the_ranks_that_are_looked_at() -> None:
    alone = Wire(1e-6, 1e-9, 0.0, 0.0, 0.0, 1)
    for ranks in (1, 2, 63, 64, 65, 100, 4096, 5000):
        looked_at = Sample.of(ranks, alone._replace(per_host=ranks)).looked_at
        assert len(looked_at) == min(ranks, ALL)
        assert sorted(set(looked_at.tolist())) == looked_at.tolist()
        assert 0 <= looked_at[0] <= looked_at[-1] == ranks - 1


def test_hosts_are_summed_only_where_they_are_blocks_of_every_partition() -> None:
    """Six consecutive ranks of 4 x 2 x 3 are whole rows and columns of these; of 4 x 6 as 8 x 3 they are not."""
    wire = Wire(1e-6, 1e-9, 0.0, 1e-6, 1e-9, 6)
    fits, other = np.array([[4, 1, 2, 3, 1, 1]]), np.array([[8, 1, 1, 3, 1, 1], [3, 1, 1, 8, 1, 1]])
    assert Sample.of(24, wire, fits).summed
    assert Sample.of(24, wire, fits, other[:1]).summed
    assert not Sample.of(24, wire, fits, other).summed
    assert not Sample.of(24, wire._replace(per_host=24), fits).summed


# --- min-plus --------------------------------------------------------------------------------------------------------


def test_min_plus(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, tried = np.random.default_rng(seed), 0
    for n, m, k in ((1, 1, 1), (3, 5, 7), (67, 129, 33), (2, 131, 515), (5, 3, 1), (0, 4, 3)):
        a, b = rng.normal(size=(n, m)).astype(np.float32), rng.normal(size=(m, k)).astype(np.float32)
        a[rng.random(a.shape) < 0.1] = np.inf  # what is not allowed
        got = both(monkeypatch, bounds.min_plus, a, b)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, (a[:, :, None] + b).min(axis=1, initial=np.inf))
        tried += 1
    print(f"{tried} products, seed {seed}")


def test_min_plus_of_nothing_is_infinite(monkeypatch: pytest.MonkeyPatch) -> None:
    got = both(monkeypatch, bounds.min_plus, np.zeros((2, 0)), np.zeros((0, 3)))
    assert got.tolist() == [[np.inf] * 3] * 2


@pytest.mark.skipif(bounds._native is None, reason="installed without compiled kernels")
def test_compiled_code_refuses_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, out = (np.zeros(shape, np.float32) for shape in ((2, 3), (4, 5), (2, 5)))
    with pytest.raises(ValueError, match=r"min_plus: arrays \(n, m\), \(m, k\)"):
        bounds._native.min_plus(a, b, out)
    said: list[list[object]] = []
    with monkeypatch.context() as patched:
        patched.setattr(bounds, "_native", SimpleNamespace(edge_bounds=lambda *given: said.append(list(given))))
        net, q = network("conv2d"), np.array([[1, 1, 2, 2, 1, 1]])
        wire = Wire(1e-6, 1e-9, 1e-8, 1e-6, 1e-9, 2)
        bounds.pair_bounds(net["pre"], q, net["layer"], 0, q, True, 4, wire, 4)
    (given,) = said
    bounds._native.edge_bounds(*given)  # as it is
    for place, wrong, message in (
        (0, [given[0][0] + 7, *given[0][1:]], "have: a class 7 of"),  # type: ignore[index, operator]
        (2, [rows[:-1] for rows in given[2]], "a group of dims has 14 tables"),  # type: ignore[attr-defined]
        (2, [[rows[0][:, :1], *rows[1:]] for rows in given[2]], "wanted has shape"),  # type: ignore[attr-defined]
        (4, np.zeros((3, 4)), "wants_beside has shape"),
        (8, [1.0], "five prices"),
        (12, np.zeros((3, 3), np.float32), "out has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            bounds._native.edge_bounds(*given[:place], wrong, *given[place + 1 :])
