"""The simulation of a step: against the formula where nothing is shared, against cases worked out by hand elsewhere."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from time import process_time

import msgspec
import numpy as np
import pytest
from networks import NETWORKS, random_plan

from hpctrain import models
from hpctrain.errors import PlanError
from hpctrain.graph import Graph
from hpctrain.layers import MSE, Conv, Dense
from hpctrain.machine import Compute, Copies, Level, Machine, Storage, named
from hpctrain.models import Sample
from hpctrain.partition import Partition
from hpctrain.planner.compute import Pricer
from hpctrain.planner.cost import price
from hpctrain.planner.events import Events, Waiting
from hpctrain.planner.plan import Plan, uniform
from hpctrain.planner.schedule import LEAN, Unit
from hpctrain.planner.setting import Setting
from hpctrain.planner.simulate import simulate
from hpctrain.planner.topology import Network
from hpctrain.planner.trace import Timeline, to_json

ALPHA, BETA = 1e-5, 1e-8

MACHINE = Machine(
    node=Level(alpha=2e-6, beta=3e-10, gamma=1e-10),
    network=Level(alpha=7e-6, beta=1e-9, gamma=1e-10),
    compute=Compute(flops=2e11, bandwidth=2e10, call=2e-6),
    storage=Storage(read=1e9, write=1e9),
    update=3e-10,
    step=5e-5,
)

WHERE = {
    "hosts of one rank": msgspec.structs.replace(MACHINE, per_host=1),
    "hosts of two, copying": msgspec.structs.replace(MACHINE, per_host=2, copies=Copies(1e-6, 2e-10, 3e-9)),
    "one host, copying": msgspec.structs.replace(MACHINE, copies=Copies(1e-6, 2e-10, 3e-9)),
    "one host, messages": MACHINE,
}

EVEN = {
    "lenet": (lambda: models.build("lenet", 8, Sample((16, 16, 1), 10), {}), [{"batch": 4}, {"batch": 2, "height": 2}]),
    "resnet18": (
        lambda: models.build("resnet18", 8, Sample((64, 64, 3), 16), {}),
        [{"batch": 4}, {"batch": 2, "height": 2}, {"height": 2, "width": 2}, {"batch": 2, "channel": 2}],
    ),
    "cosmoflow": (
        lambda: models.build("cosmoflow", 4, Sample((32, 32, 32, 1), values=4), {}),
        [{"batch": 4}, {"batch": 2, "depth": 2}, {"depth": 2, "height": 2}],
    ),
}
"""Networks, and grids that cut all that matters of them into equal blocks of which none has more neighbours."""


def even_cases() -> list[tuple[str, dict[str, int], str]]:
    """(network, grid, where); ranks of a host that have halos of different widths do not share its link evenly."""
    found = [(name, grid, where) for name, (_, grids) in EVEN.items() for grid in grids for where in WHERE]
    return [case for case in found if "width" not in case[1] or "two" not in case[2]]


class Fixed(Pricer):
    """A pricer of given seconds: {unit: (forward, backward)}."""

    def __init__(self, seconds: dict[str, tuple[float, float]]) -> None:
        self.given = seconds

    def seconds(self, unit: Unit, extents: np.ndarray) -> np.ndarray:
        return np.array([self.given[unit.name] for _ in extents])


def check_spans(timeline: Timeline) -> None:
    """A rank's spans follow one another without a gap, and the last one of all ends the step."""
    for rank in range(len(timeline.hosts)):
        spans = timeline.of(rank)
        assert spans[0].begin == 0
        assert all(before.end == after.begin for before, after in pairwise(spans))
        assert sum(timeline.phases(rank).values()) == pytest.approx(spans[-1].end)
    assert timeline.seconds == max(span.end for span in timeline.spans)


# --- the formula -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "grid", "where"), even_cases())
def test_even_blocks_take_what_the_formula_says(name: str, grid: dict[str, int], where: str) -> None:
    net = EVEN[name][0]()
    plan, machine = uniform(net, Partition.of(grid)), WHERE[where]
    algorithms = ("hierarchical",) if machine.per_host == 2 else ("ring", "halving_doubling", "recursive_doubling")
    for algorithm in algorithms if len(set(machine.layout(4))) > 1 else (None,):
        setting = Setting(machine, overlap=False, allreduce=algorithm)
        cost, timeline = price(net, plan, setting), simulate(net, plan, setting)
        # where ranks do not divide a group's weights, each of up to 6 messages has up to one element more, of two ranks
        uneven = 6 * 4 * (2 * MACHINE.network.beta + MACHINE.network.gamma)
        assert timeline.seconds == pytest.approx(cost.seconds, rel=1e-6, abs=uneven)
        assert timeline.hidden == pytest.approx(0, abs=1e-9)
        phases = timeline.phases(0)
        phases["redistribution"] = phases.get("redistribution", 0.0) + phases.pop("statistics", 0.0)
        found = {phase: phases.get(phase, 0.0) for phase in cost.phases()}
        assert found == pytest.approx(cost.phases(), rel=1e-6, abs=uneven)
        check_spans(timeline)


@pytest.mark.parametrize("economy", [replace(LEAN, fuse=False), replace(LEAN, recompute=3)])
@pytest.mark.parametrize("parts", [1, 3])
def test_parts_and_recomputing_take_what_the_formula_says(parts: int, economy: object) -> None:
    net = EVEN["resnet18"][0]()
    plan = uniform(net, Partition(batch=2, height=2))
    setting = Setting(WHERE["hosts of one rank"], overlap=False, allreduce="ring", parts=parts, economy=economy)
    assert simulate(net, plan, setting).seconds == pytest.approx(price(net, plan, setting).seconds, rel=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_uneven_blocks_take_no_longer_than_the_formula(name: str, seed: int) -> None:
    """Where ranks of a host copy, the formula adds up the longest of all ranks, and no rank waits for anything else.

    Nor can a step be shorter than what any rank does itself.
    """
    rng, net = np.random.default_rng(seed), NETWORKS[name]()
    setting = Setting(WHERE["one host, copying"], allreduce="shared")
    for ranks in (2, 3, 4, 6):
        plan = replace(random_plan(rng, net, ranks), allreduce=None)
        print(f"seed {seed}, {ranks} ranks: {plan.partitions}")
        timeline = simulate(net, plan, setting, ranks=ranks)
        assert timeline.seconds <= price(net, plan, setting, ranks).seconds * (1 + 1e-9)
        assert timeline.seconds >= max(timeline.phases(rank).get("compute", 0.0) for rank in range(ranks))
        check_spans(timeline)


@pytest.mark.parametrize("name", NETWORKS)
def test_any_plan_ends_between_hosts(name: str, seed: int) -> None:
    """Whatever the plan, allreduce, topology and slow rank: no rank waits for ever."""
    rng, net = np.random.default_rng(seed), NETWORKS[name]()
    for ranks, topology in ((2, "full"), (4, "torus 2x2"), (6, "fattree 2 2"), (6, "torus 3x2")):
        per_host = int(rng.integers(1, 3))
        machine = msgspec.structs.replace(MACHINE, per_host=per_host, topology=topology, copies=Copies(1e-6, 2e-10))
        setting = Setting(machine, bucket_bytes=200, shard=bool(rng.integers(2)), overlap=bool(rng.integers(2)))
        plan = random_plan(rng, net, ranks)
        print(f"seed {seed}, {ranks} ranks, {per_host} a host, {plan}")
        timeline = simulate(net, plan, setting, ranks=ranks)
        check_spans(timeline)
        assert 0 <= timeline.hidden <= 1
        check_spans(simulate(net, plan, setting, {0: 3.0}, ranks))


# --- stragglers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", WHERE)
def test_slow_rank_slows_a_data_parallel_step_by_what_it_computes(where: str) -> None:
    net = EVEN["lenet"][0]()
    plan, setting = uniform(net, Partition(batch=4)), Setting(WHERE[where], overlap=False)
    base = simulate(net, plan, setting)
    mine = base.phases(2)["compute"] + base.phases(2)["update"]
    for factor in (1.5, 2.0, 4.0):
        slowed = simulate(net, plan, setting, {2: factor})
        assert slowed.seconds - base.seconds == pytest.approx((factor - 1) * mine, rel=1e-9)
        # the others wait for it in the sum of gradients, for all but its update
        waited = slowed.phases(0)["allreduce"] - base.phases(0)["allreduce"]
        assert waited == pytest.approx((factor - 1) * base.phases(2)["compute"], rel=1e-9)


def chain(rows: int, columns: int) -> Graph:
    """Convolutions that need one row and one column around their blocks."""
    net = Graph()
    x = net.input("x", (2, rows, columns, 3))
    for i in range(1, 5):
        x = net.add(f"conv{i}", Conv(3, kernel=3, padding=1), x)
    net.add("loss", MSE(), x, net.input("y", (2, rows, columns, 3)))
    return net


def test_slow_rank_delays_neighbours_from_one_exchange_to_the_next() -> None:
    """In a chain of halos a rank waits for its neighbour only, and that one for the next: far ends feel it later."""
    net, setting = chain(16, 8), Setting(WHERE["hosts of one rank"], overlap=False)
    plan = uniform(net, Partition(height=4))
    base, slowed = simulate(net, plan, setting), simulate(net, plan, setting, {0: 50.0})
    late = [
        next(b.name for a, b in zip(base.of(rank), slowed.of(rank), strict=True) if b.end > a.end) for rank in range(4)
    ]
    assert late == ["conv1 forward", *(f"conv{i} input 0 forward" for i in (2, 3, 4))]
    more = 49 * (base.phases(0)["compute"] + base.phases(0)["update"])
    assert base.seconds < slowed.seconds <= base.seconds + more * (1 + 1e-9)


# --- overlap ---------------------------------------------------------------------------------------------------------


def two_layers() -> tuple[Graph, Fixed, int, int]:
    """Two dense layers, their given times, and bytes of their weights."""
    net = Graph()
    x = net.add("first", Dense(48, bias=False), net.input("x", (4, 32)))
    x = net.add("second", Dense(16, bias=False), x)
    net.add("loss", MSE(), x, net.input("y", (4, 16)))
    return net, Fixed({"first": (1.0, 2.0), "second": (1.5, 3.0), "loss": (0.5, 0.25)}), 32 * 48 * 4, 48 * 16 * 4


@pytest.mark.parametrize("beta", [1e-7, 1e-4, 1e-3, 3e-3])
def test_sums_hide_behind_backward(beta: float) -> None:
    """Two hosts, one round of recursive doubling: both sums share the link where the later one catches the earlier."""
    net, pricer, first, second = two_layers()
    machine = Machine(network=Level(ALPHA, beta, 0.0), per_host=1)
    setting = Setting(machine, allreduce="recursive_doubling", bucket_bytes=1)
    timeline = simulate(net, uniform(net, Partition(batch=2)), setting, pricer=pricer)
    forward, second_done, first_done = 3.0, 3.0 + 0.25 + 3.0, 3.0 + 0.25 + 3.0 + 2.0
    expected = max(first_done + ALPHA + first * beta, second_done + ALPHA + (first + second) * beta)
    assert timeline.seconds == pytest.approx(expected, rel=1e-12)
    shown = expected - first_done
    assert timeline.phases(1)["allreduce"] == pytest.approx(shown, rel=1e-9)
    assert timeline.phases(1)["compute"] == pytest.approx(forward + 5.25)
    # one or both are under way from the end of the second layer's backward on: its sum is looked at after the first's
    assert timeline.hidden == pytest.approx(1 - shown / (expected - second_done), rel=1e-9)


@pytest.mark.parametrize("overlap", [None, False])
def test_sums_follow_backward_where_they_do_not_overlap(overlap: bool | None) -> None:
    net, pricer, first, second = two_layers()
    machine = Machine(network=Level(ALPHA, BETA, 0.0), node=Level(ALPHA, BETA, 0.0))
    if overlap is False:
        machine = msgspec.structs.replace(machine, per_host=1)
    setting = Setting(machine, allreduce="recursive_doubling", bucket_bytes=1, overlap=overlap)
    timeline = simulate(net, uniform(net, Partition(batch=2)), setting, pricer=pricer)
    assert timeline.seconds == pytest.approx(3.0 + 5.25 + ALPHA + (first + second) * BETA, rel=1e-12)
    assert timeline.hidden == pytest.approx(0.0, abs=1e-9)


def test_rounds_go_on_between_layers_only() -> None:
    """Four ranks, two rounds: the second begins when the rank next looks, after the first layer's backward."""
    net, pricer, first, second = two_layers()
    setting = Setting(Machine(network=Level(ALPHA, BETA, 0.0), per_host=1), allreduce="recursive_doubling")
    setting = replace(setting, bucket_bytes=1)
    timeline = simulate(net, uniform(net, Partition(batch=4)), setting, pricer=pricer)
    looked = 3.0 + 5.25
    # second's second round and first's first share the link from then on; first's second round follows
    both = looked + ALPHA + (first + second) * BETA
    assert second < first
    assert timeline.seconds == pytest.approx(both + ALPHA + first * BETA, rel=1e-9)


@pytest.mark.parametrize("where", ["hosts of one rank", "one host, messages"])
def test_sharded_updates_split_the_ring(where: str) -> None:
    """Half of it before the update, of a quarter of the weights, and half of it, for the weights, after it."""
    net = EVEN["resnet18"][0]()
    machine = msgspec.structs.replace(WHERE[where], update=MACHINE.update * 100)
    whole = Setting(machine, allreduce="ring", overlap=False)
    plan = uniform(net, Partition(batch=4))
    full, split = simulate(net, plan, whole), simulate(net, plan, replace(whole, shard=True))
    saved = 3 / 4 * full.phases(0)["update"]
    assert split.seconds == pytest.approx(full.seconds - saved, rel=1e-6)
    names = [span.phase for span in split.of(0)]
    assert names.index("update") < len(names) - 1 - names[::-1].index("allreduce")


# --- shared links ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topology", "ranks", "rounds"),
    [
        # recursive doubling of n bytes: a round takes n beta times the flows that share its scarcest link
        ("full", 4, (1, 1)),
        ("fattree 2 2", 4, (1, 2)),
        ("fattree 4 2", 4, (1, 4)),
        ("fattree 1 2", 4, (1, 1)),
        ("torus 4", 4, (1, 2)),
        ("torus 2x2", 4, (1, 1)),
        ("torus 8", 8, (1, 2, 4)),
        ("torus 2x2x2", 8, (1, 1, 1)),
    ],
)
def test_rounds_of_an_allreduce_share_links(topology: str, ranks: int, rounds: tuple[int, ...]) -> None:
    net, pricer, first, second = two_layers()
    machine = Machine(network=Level(ALPHA, BETA, 0.0), per_host=1, topology=topology)
    setting = Setting(machine, allreduce="recursive_doubling", overlap=False)
    plan = Plan({node.name: Partition(batch=ranks) for node in net}, empty_blocks=True)
    timeline = simulate(net, plan, setting, pricer=pricer)
    expected = sum(ALPHA + (first + second) * BETA * shared for shared in rounds)
    assert timeline.seconds == pytest.approx(3.0 + 5.25 + expected, rel=1e-12)


@pytest.mark.parametrize(("links", "columns"), [(1, 14), (2, 7), (4, 4)])
def test_ranks_of_a_host_share_its_links(links: int, columns: int) -> None:
    """Two hosts of four ranks, one above the other; blocks are two columns wide, those inside want four of a row.

    One link carries all 3 + 4 + 4 + 3 columns. Of two links, each has those of two ranks, 3 + 4. Of four, each has at
    most 4: three flows get a third each until two columns are left to one of them, halved by then.
    """
    net = chain(8, 8)
    plan = Plan({node.name: Partition(height=2, width=4) for node in net})
    machine = Machine(
        node=Level(0.0, 0.0, 0.0), network=Level(0.0, BETA, 0.0), per_host=4, links=links, compute=MACHINE.compute
    )
    timeline = simulate(net, plan, Setting(machine, overlap=False))
    halos = [next(span for span in timeline.of(rank) if span.phase == "halo") for rank in range(8)]
    column = 2 * 3 * 4
    assert max(halo.seconds for halo in halos) == pytest.approx(columns * column * BETA, rel=1e-9)


# --- what is kept of it ----------------------------------------------------------------------------------------------


def test_trace_of_a_step_nests() -> None:
    net = EVEN["resnet18"][0]()
    setting = Setting(WHERE["hosts of two, copying"])
    timeline = simulate(net, uniform(net, Partition(batch=2, height=2)), setting, {1: 1.5})
    events = [event for event in json.loads(to_json(timeline))["traceEvents"] if event["ph"] == "X"]
    for rank in range(4):
        mine = [event for event in events if event["tid"] == rank]
        assert {event["pid"] for event in mine} == {rank // 2}
        assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-6 for a, b in pairwise(mine))
        assert sum(event["dur"] for event in mine) == pytest.approx(timeline.of(rank)[-1].end * 1e6)
        assert {event["cat"] for event in mine} >= {"compute", "halo", "allreduce", "update", "step"}
    assert max(event["ts"] + event["dur"] for event in events) == pytest.approx(timeline.seconds * 1e6)


@pytest.mark.parametrize(("slow", "said"), [({4: 2.0}, "rank 4, factor 2"), ({0: 0.0}, "rank 0, factor 0")])
def test_bad_slow_rank_is_refused(slow: dict[int, float], said: str) -> None:
    net = EVEN["lenet"][0]()
    with pytest.raises(PlanError, match=f"{said}.*rank of 0 to 3 and a factor above 0"):
        simulate(net, uniform(net, Partition(batch=4)), Setting(MACHINE), slow)


def test_what_waits_for_ever_is_reported() -> None:
    events = Events(Network(MACHINE, 2))

    def waits() -> object:
        yield 1.0
        yield Waiting(1)

    events.start(waits())
    with pytest.raises(PlanError, match="1 processes wait"):
        events.run()


def test_resnet50_on_64_ranks_takes_seconds() -> None:
    net = models.build("resnet50", 256, Sample((224, 224, 3), 1000), {})
    plan = uniform(net, Partition(batch=16, height=4))
    begin = process_time()
    timeline = simulate(net, plan, Setting(named("cori-knl")), {5: 1.3})
    assert process_time() - begin < 20
    assert timeline.seconds > 0.1
