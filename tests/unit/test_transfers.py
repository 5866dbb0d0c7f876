"""What the planner says that edges move, against all pairs of boxes, one by one."""

from __future__ import annotations

import numpy as np
import pytest
from networks import CASES, NETWORKS, network, random_plan

from hpctrain.graph import Graph
from hpctrain.partition import Box, contains, extent, volume
from hpctrain.planner.layout import Edge, edges, sent_bytes
from hpctrain.planner.transfers import Moved, Traffic, traffic, transfer
from hpctrain.planner.wire import Wire
from hpctrain.regions import Share

FLOAT32 = np.dtype(np.float32)
COPIES = Wire(3e-6, 2e-10, 5e-8, 7e-6, 3e-9, 1)
MESSAGES = COPIES._replace(copies=False, run=0.0)


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
    for ranks in (1, 4, 6, 7, 12):
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
    for ranks in (2, 5, 8):
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
