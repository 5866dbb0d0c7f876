"""What the planner says that edges move, against all pairs of boxes, one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from msgspec import structs
from networks import CASES, NETWORKS, network, random_plan

from hpctrain.errors import ConfigError
from hpctrain.graph import Graph
from hpctrain.layers import Conv, MaxPool
from hpctrain.machine import Copies, Level, Machine
from hpctrain.partition import Box, Partition, contains, extent, volume
from hpctrain.planner.layout import Edge, edges, sent_bytes
from hpctrain.planner.plan import Plan
from hpctrain.planner.setting import Setting
from hpctrain.planner.transfers import Moved, Traffic, is_halo, seconds, traffic, transfer
from hpctrain.planner.wire import Wire
from hpctrain.regions import Share

FLOAT32 = np.dtype(np.float32)
COPIES = Wire(3e-6, 2e-10, 5e-8, 7e-6, 3e-9, 1)
MESSAGES = COPIES._replace(copies=False, run=0.0)
MACHINE = Machine(name="here", node=Level(2e-6, 1e-10, 1e-10), network=Level(5e-6, 2e-10, 1e-10), per_host=4, links=2)


def runs(shares: list[Share], mine: Box, wish: Box) -> int:
    """Contiguous pieces of copies between C-ordered arrays of the boxes `mine` and `wish`."""
    found = 0
    for share in shares:
        piece, length = extent(share.source), 1
        for n, *whole in reversed(list(zip(piece, extent(mine), extent(wish), strict=True))):
            length *= n
            if whole != [n, n]:
                break
        found += volume(share.source) // length
    return found


def brute(edge: Edge, per_host: int) -> Traffic:
    """The same as `traffic`, pair by pair."""
    have, want = edge.have, edge.want
    ranks = range(max(have.partition.size, want.partition.size))
    found = np.zeros((4, 3, len(ranks)), np.int64)  # received near, far, sent near, far
    own = np.zeros((2, len(ranks)), np.int64)
    for s in ranks:
        for r in ranks:
            mine, wish = have.box(s), want.box(r)
            shares = want.shares(r, mine)
            n = sum(volume(share.source) for share in shares)
            counted = (n, n > 0, runs(shares, mine, wish))
            if s != r:
                far = int(s // per_host != r // per_host)
                found[far, :, r] += counted
                found[2 + far, :, s] += counted
                continue
            inplace = volume(mine) > 0 and contains(wish, mine)
            copied = [share for share in shares if share.moved or not inplace]
            own[0, r] = sum(volume(share.source) for share in copied)
            own[1, r] = runs(copied, mine, wish)
    return Traffic(*(Moved(*one) for one in found), *own)


def folded(edge: Edge) -> bool:
    return any(cut.folded for cut in edge.want.cuts)


def joined(edge: Edge) -> bool:
    """Whether dims share an axis, as a reshape wants them."""
    axes = [axis for cut in edge.want.cuts for axis in cut.axes]
    return len(axes) > len(set(axes))


def random_edges(net: Graph, rng: np.random.Generator, ranks: int) -> list[Edge]:
    return edges(net, random_plan(rng, net, ranks))


@pytest.mark.parametrize("name", [*CASES, *NETWORKS])
def test_traffic_is_what_all_pairs_of_boxes_have_in_common(name: str, seed: int) -> None:
    net = NETWORKS[name]() if name in NETWORKS else network(name)
    rng, tried = np.random.default_rng(seed), 0
    for ranks in (1, 4, 7, 12):
        for edge in random_edges(net, rng, ranks):
            per_host = int(rng.choice([1, 2, 3, 5, ranks]))
            got, expected = traffic(edge, per_host), brute(edge, per_host)
            said = f"{name}: {edge.consumer} {edge.slot}, {edge.have.partition} to {edge.want.partition}, {per_host}"
            for field, mine, theirs in zip(Traffic._fields, got, expected, strict=True):
                if isinstance(mine, Moved):
                    np.testing.assert_array_equal(mine.elements, theirs.elements, f"{field} {said}")
                    np.testing.assert_array_equal(mine.peers, theirs.peers, f"{field} {said}")
                    if not folded(edge) and not joined(edge):
                        np.testing.assert_array_equal(mine.runs, theirs.runs, f"{field} {said}")
                elif field == "own" or not folded(edge):
                    np.testing.assert_array_equal(mine, theirs, f"{field} {said}")
            tried += 1
    print(f"{tried} edges, seed {seed}")
    assert tried > 0


@pytest.mark.parametrize("name", [*CASES, *NETWORKS])
def test_bytes_are_those_that_the_executor_sends(name: str, seed: int) -> None:
    net = NETWORKS[name]() if name in NETWORKS else network(name)
    rng, tried = np.random.default_rng(seed), 0
    for ranks in (5, 8):
        for edge in random_edges(net, rng, ranks):
            moved, itemsize = traffic(edge, 2), edge.kind.dtype(FLOAT32).itemsize
            sent = [moved.sent_near.elements + moved.sent_far.elements]
            sent.append(moved.received_near.elements + moved.received_far.elements)
            forward, backward = sent if edge.slot is not None else reversed(sent)
            for rank in range(len(moved.own)):
                said = int(forward[rank]) * itemsize, int(backward[rank]) * itemsize * edge.gradient
                assert said == sent_bytes(edge, rank, FLOAT32), (name, edge.consumer, edge.slot, rank)
            price = transfer(edge, FLOAT32, COPIES)
            every = [sent_bytes(edge, rank, FLOAT32) for rank in range(len(moved.own))]
            assert (price.sent_forward, price.sent_backward) == tuple(map(sum, zip(*every, strict=True)))
            tried += 1
    print(f"{tried} edges, seed {seed}")
    assert tried > 0


# --- prices ----------------------------------------------------------------------------------------------------------


def halo() -> Edge:
    """Of a 3 x 3 convolution of (2, 12, 7, 5), whose rows are cut in four: a row of 7 x 5 from each neighbour."""
    net = Graph()
    net.add("conv", Conv(3, kernel=3, padding=1), net.input("x", (2, 12, 7, 5)))
    return edges(net, Plan({"x": Partition(height=4), "conv": Partition(height=4)}))[0]


def test_a_halo_on_one_host_by_hand() -> None:
    """The second rank copies two rows of two samples, 4 runs of 7 x 5 numbers; its own block is in place."""
    wire = COPIES._replace(per_host=4)
    one_way = wire.near_alpha + wire.near_beta * 4 * (2 * 2 * 7 * 5) + wire.run * 4
    edge = halo()
    price = transfer(edge, FLOAT32, wire)
    assert not edge.gradient  # of an input
    assert price.forward == pytest.approx(one_way)
    assert (price.backward, price.sent_backward) == (0.0, 0)
    assert price.sent_forward == 4 * 3 * 2 * (2 * 7 * 5)
    both = transfer(replace(edge, gradient=True), FLOAT32, wire)
    assert both == (price.forward, price.forward, price.sent_forward, price.sent_forward)


def test_a_halo_by_messages_by_hand() -> None:
    row = 4 * (2 * 7 * 5)
    on_host = transfer(halo(), FLOAT32, MESSAGES._replace(per_host=4))
    assert on_host.forward == pytest.approx(2 * MESSAGES.near_alpha + MESSAGES.near_beta * 2 * row)
    between = transfer(halo(), FLOAT32, MESSAGES._replace(per_host=1))
    assert between.forward == pytest.approx(2 * MESSAGES.far_alpha + MESSAGES.far_beta * 2 * row)
    both = transfer(halo(), FLOAT32, MESSAGES._replace(per_host=2))
    assert both.forward == pytest.approx(
        MESSAGES.near_alpha + MESSAGES.far_alpha + (MESSAGES.near_beta + MESSAGES.far_beta) * row
    )


def test_a_rank_copies_its_own_part_of_what_is_cut_anew() -> None:
    """(8, 6) by samples, then by rows: each of two ranks copies 4 x 3 from the other, and 4 x 3 of its own."""
    net = Graph()
    net.add("pool", MaxPool(1), net.input("x", (8, 6, 1, 1)))
    (edge,) = edges(net, Plan({"x": Partition(batch=2), "pool": Partition(height=2)}))
    moved = traffic(edge, 2)
    assert moved.own.tolist() == [12, 12]
    assert moved.own_runs.tolist() == [4, 4]
    price = transfer(edge, FLOAT32, COPIES._replace(per_host=2))
    assert price.forward == pytest.approx(COPIES.near_alpha + COPIES.near_beta * 4 * 24 + COPIES.run * 8)
    assert not is_halo(edge)


def test_ranks_that_own_nothing() -> None:
    """Four ranks want two samples each of what two have; the first copies its own."""
    net = Graph()
    net.add("pool", MaxPool(1), net.input("x", (8, 6, 1, 1)))
    (edge,) = edges(net, Plan({"x": Partition(batch=2), "pool": Partition(batch=4)}))
    moved = traffic(edge, 4)
    assert moved.received_near.elements.tolist() == [0, 12, 12, 12]
    assert moved.sent_near.elements.tolist() == [12, 24, 0, 0]
    assert moved.own.tolist() == [12, 0, 0, 0]
    one_copy = COPIES.near_alpha + COPIES.near_beta * 48 + COPIES.run
    assert seconds(moved, 4, COPIES).tolist() == pytest.approx([one_copy] * 4)
    added = [one_copy + COPIES.near_beta * 48 + COPIES.run] * 2 + [COPIES.near_alpha] * 2
    assert seconds(moved, 4, COPIES, back=True).tolist() == pytest.approx(
        [added[0], COPIES.near_alpha + COPIES.near_beta * 96 + 2 * COPIES.run, *added[2:]]
    )


def test_what_is_a_halo() -> None:
    assert is_halo(halo())
    net = Graph()
    x = net.add("a", Conv(4, kernel=1), net.input("x", (4, 3, 3, 4)))
    net.add("b", Conv(4, kernel=1), x)
    plan = Plan({"x": Partition(), "a": Partition(channel=2, contraction=2), "b": Partition(channel=4)})
    found = {(edge.consumer, edge.slot): is_halo(edge) for edge in edges(net, plan)}
    assert found == {("a", 0): False, ("a", None): True, ("b", 0): False}
    gathered = edges(net, replace(plan, partitions=plan.partitions | {"a": Partition(channel=4)}))
    assert [is_halo(edge) for edge in gathered] == [False, True]


def test_thousands_of_ranks() -> None:
    """Halos of 4096 ranks in 16 x 16 x 16, one host or many: those in the middle have 26 neighbours."""
    net = Graph()
    net.add("conv", Conv(3, kernel=3, padding=1), net.input("x", (1, 48, 32, 64, 2)))
    grid = Partition(depth=16, height=16, width=16)
    (edge,) = edges(net, Plan({"x": grid, "conv": grid}))
    for per_host in (4096, 16, 1):
        moved = traffic(edge, per_host)
        assert max(moved.received_near.peers + moved.received_far.peers) == 26
        elements = moved.received_near.elements + moved.received_far.elements
        assert max(elements) == 2 * (5 * 4 * 6 - 3 * 2 * 4)
        assert sum(elements) == 2 * ((48 + 2 * 15) * (32 + 2 * 15) * (64 + 2 * 15) - 48 * 32 * 64)
    # a host is a line along the width, of which two are beside a rank
    assert max(traffic(edge, 16).received_near.peers) == 2


# --- wires -----------------------------------------------------------------------------------------------------------


def test_wires_of_machines() -> None:
    assert Wire.of(Setting(MACHINE), 8) == (2e-6, 1e-10, 0.0, 5e-6, 2 * 2e-10, 4, False)
    assert Wire.of(Setting(MACHINE), 3) == (2e-6, 1e-10, 0.0, 0.0, 0.0, 3, False)
    copying = structs.replace(MACHINE, copies=Copies(1e-6, 3e-11, 4e-9), per_host=None, network=None)
    assert Wire.of(Setting(copying), 12) == (1e-6, 3e-11, 4e-9, 0.0, 0.0, 12, True)
    assert Wire.of(Setting(Machine()), 1).per_host == 1


def test_what_a_machine_lacks_is_named() -> None:
    with pytest.raises(ConfigError, match=r"here: 8 ranks on hosts of 4, .*'network'.*add it \(alpha, beta, gamma\)"):
        Wire.of(Setting(structs.replace(MACHINE, network=None)), 8)
    with pytest.raises(ConfigError, match=r"here: 4 ranks on a host, .*'copies' nor 'node'.*hpctrain calibrate"):
        Wire.of(Setting(structs.replace(MACHINE, node=None)), 8)
