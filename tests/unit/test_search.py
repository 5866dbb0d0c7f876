"""The search against enumeration with the whole cost of a plan, and what must hold of any plan that it finds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import prod

import pytest
from msgspec.structs import replace as with_fields
from networks import NETWORKS, residual
from planning import HOST, HOSTS, digits, towers

from hpctrain.errors import PlanError
from hpctrain.graph import Graph
from hpctrain.layers import MSE, Conv, Dense, GlobalAvgPool, Tanh
from hpctrain.machine import Level, Machine
from hpctrain.models import Sample, alexnet, resnet
from hpctrain.partition import Partition
from hpctrain.planner.baselines import baselines, grids
from hpctrain.planner.cost import price
from hpctrain.planner.groups import candidates, chosen, groups
from hpctrain.planner.memory import largest, predict
from hpctrain.planner.plan import Plan
from hpctrain.planner.schedule import Economy
from hpctrain.planner.search import search
from hpctrain.planner.setting import Setting


def every_plan(net: Graph, setting: Setting, ranks: int) -> Iterator[Plan]:
    """All combinations of candidates."""
    found = groups(net)
    states = [candidates(net, group, ranks, setting) for group in found]
    assert prod(map(len, states)) < 5000
    for rows in product(*states):
        yield Plan(chosen(net, found, {group.head: row for group, row in zip(found, rows, strict=True)}))


FEW = dict.fromkeys(("Input", "MaxPool", "AdaptiveAvgPool", "Flatten", "SoftmaxCrossEntropy"), ("batch",))
"""All but convolutions and dense layers have one choice."""

CHANNELS = FEW | {"Conv": ("batch", "channel", "contraction"), "Dense": ("batch", "channel", "contraction")}
MIXED = FEW | {"Conv": ("batch", "height", "channel"), "Dense": ("channel", "contraction"), "MaxPool": ("height",)}
TWO = FEW | {"Conv": ("batch", "height"), "Dense": ("channel",)}


@pytest.mark.parametrize(
    ("net", "ranks", "only"),
    [(digits(), 2, CHANNELS), (digits(), 2, MIXED), (digits(6), 3, MIXED), (towers(), 2, TWO)],
    ids=["lenet, channels", "lenet, mixed", "lenet on 3", "alexnet"],
)
def test_no_plan_is_cheaper_by_the_whole_cost(net: Graph, ranks: int, only: dict[str, tuple[str, ...]]) -> None:
    """Without latency of allreduces and overlap all costs add up: enumerate, and price every plan from scratch."""
    setting = Setting(HOST, allreduce="ring", fewer="none", only=only)
    found = search(net, setting, ranks)
    assert found.gap == pytest.approx(0, abs=1e-6)
    assert found.bound == pytest.approx(found.cost.seconds, rel=1e-5)
    costs = [price(net, plan, setting).seconds for plan in every_plan(net, setting, ranks)]
    print(f"{len(costs)} plans, {min(costs):.3g} to {max(costs):.3g} s")
    assert len(costs) >= 32
    assert max(costs) > 1.05 * min(costs)
    assert found.cost.seconds <= min(costs) * (1 + 1e-6)


@pytest.mark.parametrize("name", ["residual", "several losses", "cosmoflow", "mlp"])
@pytest.mark.parametrize("machine", [HOST, HOSTS], ids=["one host", "hosts"])
def test_what_adds_up_is_what_plans_cost(name: str, machine: Machine) -> None:
    """The bound is that of the plan that was found, priced from scratch, whatever connects its layers."""
    net, setting = NETWORKS[name](), Setting(machine, allreduce="ring", fewer="all", overlap=False)
    found = search(net, setting, 4)
    assert found.gap < 1e-3
    again = price(net, found.plan, setting, 4)
    assert again == found.cost
    if machine is HOST:
        assert found.bound == pytest.approx(again.seconds, rel=2e-3)
    assert found.bound <= again.seconds * (1 + 1e-5)


def test_one_choice_each_is_what_that_plan_costs() -> None:
    net = digits()
    setting = Setting(HOST, fewer="none", only=dict.fromkeys((*FEW, "Conv", "Dense"), ("batch",)))
    found = search(net, setting, 4)
    assert set(found.plan.partitions.values()) == {Partition(batch=4)}
    assert found.candidates == len(groups(net))
    assert found.cost.seconds == pytest.approx(
        price(net, Plan({n.name: Partition(batch=4) for n in net}), setting).seconds
    )


def test_one_rank_computes_all_and_exchanges_nothing() -> None:
    found = search(residual(), Setting(HOST), 1)
    assert set(found.plan.partitions.values()) == {Partition()}
    phases = found.cost.phases()
    assert phases["halo"] == phases["redistribution"] == phases["allreduce"] == found.gap == 0
    assert found.bound == pytest.approx(found.cost.seconds)


@pytest.mark.parametrize("machine", [HOST, HOSTS], ids=["one host", "hosts"])
def test_the_choice_is_never_worse_than_what_people_do(machine: Machine) -> None:
    for net, counts in ((digits(), (2, 3, 4, 6)), (residual(), (3, 4)), (towers(), (4,))):
        for ranks in counts:
            setting = Setting(machine)
            found = search(net, setting, ranks)
            plans = [b for b in baselines(net, setting, ranks).values() if not isinstance(b, str)]
            every = [cost.seconds for _, cost in plans] + [grid.cost.seconds for grid in grids(net, setting, ranks)]
            assert found.cost.seconds <= min(every) * (1 + 1e-9)
            assert found.bound <= found.cost.seconds + found.cost.hidden + 1e-12
            found.plan.check(net)
            assert found.plan.ranks <= ranks


def test_a_faster_network_never_makes_the_best_plan_slower() -> None:
    net, before = towers(), float("inf")
    for beta in (1e-7, 1e-8, 1e-9, 1e-10):
        machine = with_fields(HOSTS, network=Level(2e-6, beta, 0.0), node=Level(1e-6, beta / 4, 0.0))
        seconds = search(net, Setting(machine, overlap=False), 4).cost.seconds
        assert seconds <= before * (1 + 1e-6)
        before = seconds


def test_more_freedom_is_never_worse() -> None:
    net = residual()
    bound = {fewer: search(net, Setting(HOST, fewer=fewer), 6).bound for fewer in ("none", "head", "all")}  # type: ignore[arg-type]
    assert bound["all"] <= bound["head"] * (1 + 1e-5)


def test_the_same_input_gives_the_same_plan() -> None:
    net = resnet.build(4, Sample((33, 31, 3), classes=7), width=0.25)
    first, second = (search(net, Setting(HOSTS), 4) for _ in range(2))
    assert first.plan == second.plan
    assert replace(first, seconds=0) == replace(second, seconds=0)


def test_slow_sums_move_dense_layers_from_the_batch_to_channels() -> None:
    net, cut = towers(16), []
    for beta in (1e-14, 1e-7):
        machine = with_fields(HOST, node=Level(0.0, beta, 0.0))
        plan = search(net, Setting(machine, allreduce="ring", fewer="none"), 4).plan
        cut.append(plan.partitions["fc1"])
    assert cut[0] == Partition(batch=4)
    assert cut[1].batch == 1


# --- memory --------------------------------------------------------------------------------------------------------


def most_memory(net: Graph, plan: Plan, setting: Setting) -> int:
    hosts = setting.machine.layout(plan.ranks)
    economy = setting.economy
    return largest(
        predict(
            net, plan, optimizer_arrays=setting.optimizer_arrays, economy=economy, backend=setting.backend, hosts=hosts
        )
    )[1].total


def test_a_limit_of_memory_is_kept_on_every_rank_and_costs_time() -> None:
    """Data parallelism holds all weights on each rank; with less memory than that they have to be cut."""
    net = alexnet.build(128, Sample((67, 67, 3), classes=10), hidden=512, width=0.5)
    setting = Setting(HOST, fewer="none", optimizer_arrays=2)
    free = search(net, setting, 4)
    need, seconds = most_memory(net, free.plan, setting), free.cost.seconds
    kept = []
    for share in (0.9, 0.75, 0.65):
        found = search(net, setting, 4, memory_limit=share * need)
        assert most_memory(net, found.plan, setting) <= share * need
        assert found.cost.seconds >= seconds * (1 - 1e-9)
        assert found.bound == pytest.approx(free.bound, rel=1e-3)
        kept.append(found.cost.seconds)
    assert kept[-1] > seconds


def test_the_memory_of_the_machine_is_the_limit_where_none_is_given() -> None:
    net = towers(16)
    need = most_memory(net, search(net, Setting(HOST), 2).plan, Setting(HOST))
    small = Setting(with_fields(HOST, memory=0.95 * need))
    assert most_memory(net, search(net, small, 2).plan, small) <= 0.95 * need


def test_where_nothing_fits_the_message_says_what_is_needed_and_what_would_do() -> None:
    net = alexnet.build(64, Sample((67, 67, 3), classes=10), hidden=512, width=0.5)
    setting = Setting(HOST)
    with pytest.raises(PlanError) as caught:
        search(net, setting, 2, memory_limit=11.5e6)
    said = str(caught.value)
    print(said)
    assert "no plan for 2 ranks" in said
    assert "fits into 11 MiB" in said
    assert "layer fc1 has most of it" in said
    assert "ranks" in said.split("What would fit:")[1]
    count = int(said.split("What would fit: ")[1].split()[0])
    plan = search(net, setting, count, memory_limit=11.5e6).plan
    assert most_memory(net, plan, setting) <= 11.5e6


def test_no_memory_at_all_is_refused_in_reasonable_time() -> None:
    with pytest.raises(PlanError, match=r"make the network smaller"):
        search(digits(), Setting(HOST), 2, memory_limit=1000.0)


def test_no_more_ranks_are_proposed_than_the_machine_has() -> None:
    small = with_fields(HOSTS, hosts=2)
    with pytest.raises(PlanError, match=r"Nor would up to 4 ranks, .*take a machine with more ranks or memory"):
        search(digits(), Setting(small), 2, memory_limit=1000.0)
    with pytest.raises(PlanError, match=r"Nor would recomputing or accumulating do"):
        search(digits(), Setting(small), 4, memory_limit=1000.0)


def test_recomputing_and_accumulating_are_proposed_where_they_are_enough() -> None:
    """Many tensors of one size, little weights."""
    net = Graph()
    x = net.input("x", (8, 15, 17, 8))
    for i in range(12):
        x = net.add(f"tanh{i}", Tanh(), net.add(f"conv{i}", Conv(8, 3, padding=1), x))
    net.add("loss", MSE(), net.add("fc", Dense(1), net.add("pool", GlobalAvgPool(), x)), net.input("y", (8, 1)))
    setting = Setting(HOST, backend="reference")
    full = most_memory(net, search(net, setting, 1).plan, setting)
    saved = replace(setting, economy=Economy(fuse=True, reuse=True, recompute=4))
    less = most_memory(net, Plan({n.name: Partition() for n in net}), saved)
    assert less < 0.9 * full
    with pytest.raises(PlanError) as caught:
        search(net, setting, 1, memory_limit=(full + less) / 2)
    assert "2 ranks; or memory.recompute = true; or train.accumulate = 2" in str(caught.value)
