"""Bounds of edges for all pairs of partitions, against exact prices; min-plus products against a loop."""

from __future__ import annotations

import numpy as np
import pytest
from networks import CASES, NETWORKS, network, random_plan

from hpctrain.partition import Partition
from hpctrain.planner import bounds
from hpctrain.planner.ends import Ends, parts
from hpctrain.planner.layout import edges
from hpctrain.planner.plan import Plan
from hpctrain.planner.transfers import transfer
from hpctrain.planner.wire import Wire

FLOAT32 = np.dtype(np.float32)


def reshapes(ends: Ends) -> bool:
    """Whether several dims follow from one of the work."""
    return any(len(part.ends.shape) > 1 for part in parts(ends))


@pytest.mark.parametrize("name", [*CASES, *NETWORKS])
def test_of_few_ranks_every_bound_is_the_exact_price(name: str, seed: int) -> None:
    net = NETWORKS[name]() if name in NETWORKS else network(name)
    rng, tried = np.random.default_rng(seed), 0
    for ranks in (4, 7, 12):
        plans = [random_plan(rng, net, ranks) for _ in range(3)]
        choices = {n.name: np.array([plan.partitions[n.name].shape for plan in plans]) for n in net}
        per_host, copies = int(rng.choice([1, 2, 3, 5, ranks])), bool(rng.random() < 0.6)
        wire = Wire(3e-6, 2e-10, float(rng.choice([0.0, 5e-8])), 7e-6, 3e-9, per_host, copies)
        for edge in edges(net, plans[0]):
            node, itemsize = net[edge.consumer], edge.kind.dtype(FLOAT32).itemsize
            q = choices[node.name]
            p = q if edge.slot is None else choices[node.inputs[edge.slot]]
            ends = (
                Ends.partial(node) if edge.slot is None else Ends.between(net[node.inputs[edge.slot]], node, edge.slot)
            )
            if edge.slot is None:
                got = np.diag(bounds.partial_bounds(node, q, edge.gradient, itemsize, wire, ranks))
            else:
                source = net[node.inputs[edge.slot]]
                got = bounds.pair_bounds(source, p, node, edge.slot, q, edge.gradient, itemsize, wire, ranks)
            for i, j in np.ndindex(len(p), len(q)):
                if edge.slot is None and i != j:
                    continue
                partitions = {n.name: Partition() for n in net}
                if edge.slot is not None:
                    partitions[source.name] = Partition(*map(int, p[i]))
                partitions[node.name] = Partition(*map(int, q[j]))
                found = [e for e in edges(net, Plan(partitions)) if (e.consumer, e.slot) == (edge.consumer, edge.slot)]
                expected = 0.0
                for one in found:
                    price = transfer(one, FLOAT32, wire)
                    expected += price.forward + price.backward
                if wire.run and reshapes(ends):
                    assert got[i, j] <= expected * (1 + 1e-6), "X"
                    continue
                np.testing.assert_allclose(
                    got[i, j], expected, rtol=1e-6, err_msg=f"{name} {edge.consumer} {edge.slot} {p[i]} {q[j]} {wire}"
                )
                tried += 1
    print(f"{tried} pairs, seed {seed}")
    assert tried > 0
