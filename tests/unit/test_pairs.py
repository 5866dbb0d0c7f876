"""Who sends how much to whom: against the boxes that exchanges are made of."""

from __future__ import annotations

import numpy as np
import pytest
from networks import CASES, NETWORKS, network, random_plan

from hpctrain.partition import extent
from hpctrain.planner.layout import Edge, edges, layouts
from hpctrain.planner.pairs import extents, volumes, ways
from hpctrain.planner.wire import Wire
from hpctrain.regions import received, sent

FLOAT = np.dtype(np.float32)


def check(edge: Edge, ranks: int) -> int:
    """Rows and columns add up to what a rank sends and receives; elements moved."""
    table = volumes(edge.have, edge.want, ranks)
    np.fill_diagonal(table, 0)
    active = [rank for rank in range(ranks) if rank < edge.have.partition.size]
    assert table.sum(axis=1)[active].tolist() == [sent(edge.have, edge.want, rank) for rank in active]
    wishing = [rank for rank in range(ranks) if rank < edge.want.partition.size]
    assert table.sum(axis=0)[wishing].tolist() == [received(edge.have, edge.want, rank) for rank in wishing]
    return int(table.sum())


@pytest.mark.parametrize("case", [*NETWORKS, *CASES])
def test_pairs_add_up_to_what_ranks_send_and_receive(case: str, seed: int) -> None:
    rng, net = np.random.default_rng(seed), (NETWORKS[case]() if case in NETWORKS else network(case))
    moved = 0
    for ranks in (2, 3, 4, 6, 8):
        plan = random_plan(rng, net, ranks)
        print(f"seed {seed}, {ranks} ranks: {plan.partitions}")
        moved += sum(check(edge, ranks + 1) for edge in edges(net, plan))
    assert moved > 0


def test_extents_are_those_of_the_boxes(seed: int) -> None:
    rng, net = np.random.default_rng(seed), NETWORKS["residual"]()
    for ranks in (2, 3, 6):
        for place in layouts(net, random_plan(rng, net, ranks)).values():
            boxes = [extent(place.work.box(rank)) for rank in range(place.partition.size)]
            beyond = [(0,) * len(place.work.shape)] * (ranks - len(boxes))
            assert extents(place.work, ranks).tolist() == [list(n) for n in [*boxes, *beyond]]
            assert extents(place.work, 1).tolist() == [list(boxes[0])]


@pytest.mark.parametrize("copies", [False, True])
def test_back_is_the_reverse_and_hosts_decide_how(copies: bool, seed: int) -> None:
    """Between hosts by messages; on a host by reading, where it can, or else by messages too."""
    rng, net = np.random.default_rng(seed), NETWORKS["lenet"]()
    hosts = (0, 0, 0, 1, 1, 1)
    wire = Wire(1e-6, 1e-9, 0.0, 1e-5, 1e-8, per_host=3, copies=copies)
    for edge in edges(net, random_plan(rng, net, 6)):
        itemsize = edge.kind.dtype(FLOAT).itemsize
        table = volumes(edge.have, edge.want, 6)
        there, back = ways(edge, FLOAT, wire, hosts)
        for rank in range(6):
            others = [peer for peer in range(6) if peer != rank and table[rank, peer]]
            far = [peer for peer in others if not copies or hosts[peer] != hosts[rank]]
            assert there.sends[rank] == [(peer, table[rank, peer] * itemsize) for peer in far]
            assert there.readers[rank] == [peer for peer in others if peer not in far]
            assert (back.receives[rank], back.writers[rank]) == (there.sends[rank], there.readers[rank])
            assert (back.sends[rank], back.readers[rank]) == (there.receives[rank], there.writers[rank])
