"""Routes through topologies, and flows that share links: against cases worked out by hand and what fairness means."""

from __future__ import annotations

import random
from collections import deque
from itertools import product
from math import inf, prod

import pytest

from hpctrain.errors import ConfigError
from hpctrain.machine import Level, Machine
from hpctrain.planner.topology import LEAF, Flows, Network, core, fair


def ends(flows: Flows) -> list[float]:
    """When each flow ends, by number."""
    found: dict[int, float] = {}
    while (now := flows.next()) < inf:
        found.update(dict.fromkeys(flows.finished(now), now))
    return [found[key] for key in sorted(found)]


# --- flows -----------------------------------------------------------------------------------------------------------


def test_two_flows_share_a_link() -> None:
    flows = Flows([10.0])
    flows.start(0.0, (0,), 10)
    flows.start(0.0, (0,), 20)
    assert flows.rates() == {0: 5.0, 1: 5.0}
    # 10 bytes at 5 a second take until 2; the other has 10 left then, and 10 a second
    assert ends(flows) == pytest.approx([2.0, 3.0])


def test_late_flow_slows_the_first_from_then_on() -> None:
    flows = Flows([10.0])
    flows.start(0.0, (0,), 30)
    assert flows.next() == 3.0
    assert flows.finished(1.0) == []
    flows.start(1.0, (0,), 5)
    assert flows.next() == pytest.approx(2.0)  # 5 bytes at 5 a second
    assert flows.finished(2.0) == [1]
    assert flows.next() == pytest.approx(3.5)  # 30 - 10 - 5 left at 10 a second


def test_max_min_gives_the_rest_to_who_can_use_it() -> None:
    """Bertsekas & Gallager's example of three links in a row: the long flow gets a third of the scarce one."""
    routes = [(0, 1), (0,), (1, 2), (1,), (2,)]
    assert fair(routes, [3.0, 3.0, 4.0]) == pytest.approx([1.0, 2.0, 1.0, 1.0, 3.0])


def test_nothing_to_send_and_no_link_take_no_time() -> None:
    flows = Flows([1.0, inf])
    flows.start(0.5, (0,), 0)
    flows.start(0.5, (1,), 100)
    flows.start(0.5, (), 100)
    assert ends(flows) == [0.5, 0.5, 0.5]


def test_flows_that_share_nothing_do_not_touch() -> None:
    flows = Flows([1.0, 1.0])
    flows.start(0.0, (0,), 3)
    flows.start(0.0, (1,), 1)
    flows.finished(flows.next())
    flows.start(1.0, (1,), 1)
    assert ends(flows) == [3.0, 2.0]


@pytest.mark.parametrize("seed", range(20))
def test_rates_are_fair_by_definition(seed: int) -> None:
    """No link over its capacity, and every flow has a full link on its way of which none takes more than it."""
    rng = random.Random(seed)
    links = rng.randint(1, 7)
    capacity = [rng.choice([1.0, 2.0, 0.7, rng.uniform(0.1, 5)]) for _ in range(links)]
    routes = [tuple(rng.sample(range(links), rng.randint(1, links))) for _ in range(rng.randint(1, 30))]
    rate = fair(routes, capacity)
    load = [sum(r for r, route in zip(rate, routes, strict=True) if link in route) for link in range(links)]
    print(f"seed {seed}: {len(routes)} flows over {links} links")
    assert all(used <= has * (1 + 1e-9) for used, has in zip(load, capacity, strict=True))
    for mine, route in zip(rate, routes, strict=True):
        full = [link for link in route if load[link] >= capacity[link] * (1 - 1e-9)]
        most = [max(r for r, other in zip(rate, routes, strict=True) if link in other) for link in full]
        assert any(mine >= r * (1 - 1e-9) for r in most)


@pytest.mark.parametrize("seed", range(10))
def test_what_is_sent_arrives(seed: int) -> None:
    """Rates times the time between events add up to the bytes of each flow, whenever flows begin."""
    rng = random.Random(100 + seed)
    flows, links = Flows([rng.uniform(1, 3) for _ in range(5)]), range(5)
    begins = deque(sorted(rng.uniform(0, 20) for _ in range(40)))
    sent: dict[int, float] = {}
    asked: dict[int, int] = {}
    now = 0.0
    print(f"seed {100 + seed}: {len(begins)} flows over {len(links)} links")
    while begins or flows.next() < inf:
        until = min(flows.next(), begins[0] if begins else inf)
        for key, rate in flows.rates().items():
            sent[key] = sent.get(key, 0.0) + rate * (until - now)
        now = until
        flows.finished(now)
        if begins and begins[0] <= now:
            begins.popleft()
            nbytes = rng.randint(1, 9)
            asked[flows.start(now, tuple(rng.sample(links, rng.randint(1, 3))), nbytes)] = nbytes
    assert sent == pytest.approx(asked, rel=1e-9)


# --- topologies ------------------------------------------------------------------------------------------------------


def test_full_has_no_links_of_its_own() -> None:
    assert core("full", 100).route(3, 97) == ()


def test_fat_tree_limits_what_leaves_a_leaf() -> None:
    tree = core("fattree 2 4", 8)
    assert tree.capacity == (2.0,) * 4
    assert tree.route(0, 3) == ()
    assert tree.route(0, 4) == tree.route(3, 7)
    assert set(tree.route(0, 4)).isdisjoint(tree.route(4, 0))
    # all four hosts of a leaf send to the other: each gets half of what its own link would carry
    routes = [tree.route(host, host + 4) for host in range(4)]
    assert fair(routes, tree.capacity) == [0.5] * 4
    assert core("fattree 1", 2 * LEAF).capacity == (LEAF,) * 4


@pytest.mark.parametrize("extents", [(5,), (4, 3), (2, 3, 5), (2, 1, 4)])
def test_torus_takes_the_fewest_hops(extents: tuple[int, ...]) -> None:
    """As many links as a breadth-first search over neighbours finds, and each begins where the one before it ends."""
    hosts = prod(extents)
    torus = core("torus " + "x".join(map(str, extents)), hosts)
    place = list(product(*map(range, extents)))
    beside = {
        host: {
            place.index(tuple((c + step * (d == dim)) % n for d, (c, n) in enumerate(zip(at, extents, strict=True))))
            for dim in range(len(extents))
            for step in (1, -1)
        }
        for host, at in enumerate(place)
    }
    leaves: dict[int, int] = {}
    for source in range(hosts):
        distance, queue = {source: 0}, deque([source])
        while queue:
            at = queue.popleft()
            for other in beside[at] - distance.keys():
                distance[other] = distance[at] + 1
                queue.append(other)
        for target in range(hosts):
            route = torus.route(source, target)
            assert len(route) == distance[target]
            assert len(set(route)) == len(route)
            if len(route) == 1:
                assert leaves.setdefault(route[0], source) == source  # a link of one host, that way
    for source, target in product(range(hosts), repeat=2):
        route = torus.route(source, target)
        if route:
            assert leaves[route[0]] == source


def test_torus_goes_one_dim_after_the_other() -> None:
    torus = core("torus 4x4", 16)
    assert torus.route(0, 5) == torus.route(0, 4) + torus.route(4, 5)
    assert torus.route(0, 3) == torus.route(0, 3)
    # 0 -> 2 and 1 -> 2 share the last link of the row
    assert torus.route(0, 2)[-1] == torus.route(1, 2)[0]


@pytest.mark.parametrize("text", ["ring", "fattree", "fattree 0", "torus", "torus 4x", "torus 4x-4", "fattree 2 0"])
def test_unknown_topology_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"topology '{text}'.*fattree R H.*torus AxBxC"):
        core(text, 4)


def test_torus_too_small_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'torus 2x3' has 6 hosts, but there are 7"):
        core("torus 2x3", 7)


# --- ranks on a machine ----------------------------------------------------------------------------------------------

LEVELS = Machine(
    socket=Level(1e-6, 1e-10, 0.0),
    node=Level(2e-6, 2e-10, 1e-11),
    network=Level(3e-6, 5e-10, 2e-11),
    per_socket=2,
    per_host=4,
    links=2,
    topology="torus 3",
)


def test_message_takes_the_level_of_its_ranks() -> None:
    network = Network(LEVELS, 12)
    assert [network.alpha(0, peer) for peer in (1, 2, 4)] == [1e-6, 2e-6, 3e-6]
    for peer, beta in ((1, 1e-10), (2, 2e-10), (4, 5e-10)):
        rates = fair([network.route(0, peer)], network.capacity)
        assert rates == [pytest.approx(1 / beta)]


def test_both_ways_at_once_and_one_after_the_other() -> None:
    """A port carries messages both ways in full, and those of two peers by half."""
    network = Network(LEVELS, 4)
    routes = [network.route(0, 2), network.route(2, 0)]
    assert fair(routes, network.capacity) == pytest.approx([5e9, 5e9])
    routes.append(network.route(0, 3))
    assert fair(routes, network.capacity) == pytest.approx([2.5e9, 5e9, 2.5e9])


def test_ranks_take_the_links_of_their_host_in_turn() -> None:
    network = Network(LEVELS, 12)
    out = [network.route(rank, 8)[0] for rank in range(4)]
    assert (out[0], out[1]) == (out[2], out[3])
    assert out[0] != out[1]
    # a hop of the torus has as many links as a host: all four ranks together get two of them
    rates = fair([network.route(rank, 4 + rank) for rank in range(4)], network.capacity)
    assert rates == pytest.approx([1e9] * 4)
    # two hosts at distance one each send through a third: none of the hops is shared
    assert not set(network.route(0, 4)) & set(network.route(4, 8))


def test_rates_without_beta_have_no_limit() -> None:
    network = Network(Machine(network=Level(1e-6, 0.0, 0.0), per_host=1), 2)
    flows = Flows(network.capacity)
    flows.start(1.0, network.route(0, 1), 10**12)
    assert ends(flows) == [1.0]


def test_too_few_hosts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"9 ranks, but this machine has 2 hosts of 4"):
        Network(Machine(hosts=2, per_host=4), 9)
