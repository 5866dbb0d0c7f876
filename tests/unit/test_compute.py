"""What the planner says that layers take: measured blocks, what lies between and beyond them, and the formula."""

from __future__ import annotations

from math import log, prod

import numpy as np
import pytest
from networks import CASES, network, random_plan

from hpctrain import models
from hpctrain.errors import ConfigError
from hpctrain.graph import Graph
from hpctrain.layers import Conv, Dense, Flatten, ReLU, SoftmaxCrossEntropy
from hpctrain.machine import Compute, Kernel, Machine
from hpctrain.models import Sample
from hpctrain.partition import Partition, extent
from hpctrain.planner.compute import (
    FORMULA,
    INTERPOLATED,
    MEASURED,
    Pricer,
    block_name,
    efficiency,
    kernel_key,
    work_of,
    work_shape,
)
from hpctrain.planner.layout import differentiable, layouts
from hpctrain.planner.plan import Plan, uniform
from hpctrain.planner.schedule import LEAN, Unit, schedule
from hpctrain.planner.setting import Setting

ROUGH = Compute(flops=5e10, bandwidth=1e10, efficiency=((1e4, 0.1), (1e8, 0.9)), call=3e-6)


def net(batch: int = 7) -> Graph:
    """Two convolutions that are the same, one of them on the data, and a classifier."""
    found = Graph()
    x = found.input("x", (batch, 9, 11, 5))
    y = found.input("y", (batch,), integer=True)
    for name in ("first", "second", "third"):
        x = found.add(name, Conv(5, kernel=3, padding=1), x)
        x = found.add(f"{name}.relu", ReLU(), x)
    x = found.add("fc", Dense(3), found.add("flat", Flatten(), x))
    found.add("loss", SoftmaxCrossEntropy(), x, y)
    return found


def units(graph: Graph, plan: Plan | None = None) -> dict[str, Unit]:
    """By first layer."""
    places = layouts(graph, plan or uniform(graph, Partition()))
    return {unit.head: unit for unit in schedule(graph, places, LEAN).units}


def key_of(graph: Graph, unit: Unit, precision: str = "float32") -> str:
    return kernel_key(graph, unit, differentiable(graph), precision, "native")


def measured(graph: Graph, head: str, blocks: dict[tuple[int, ...], float], at_once: int = 1) -> Kernel:
    """A kernel file entry: backward takes 3 times as long as forward."""
    unit = units(graph)[head]
    named = {block_name(extents): (seconds, 3 * seconds) for extents, seconds in blocks.items()}
    return Kernel(key_of(graph, unit), at_once, named)


# --- measured blocks -------------------------------------------------------------------------------------------------


def test_unit_has_one_key_wherever_it_stands_unless_it_takes_another_time() -> None:
    graph, wider = net(), net(batch=9)
    of = units(graph)
    assert key_of(graph, of["second"]) == key_of(graph, of["third"])
    assert key_of(graph, of["second"]) == key_of(wider, units(wider)["second"])
    assert "ReLU" in key_of(graph, of["second"])
    assert key_of(graph, of["second"]) != key_of(graph, of["first"])  # the data have no gradient
    assert key_of(graph, of["second"]) != key_of(graph, of["second"], "float64")
    (alone,) = (u for u in schedule(graph, layouts(graph, uniform(graph, Partition())), LEAN).units if u.head == "flat")
    assert len({key_of(graph, unit) for unit in (*of.values(), alone)}) == len(of) - 1


def test_measured_block_has_its_time_and_others_are_interpolated_between_them() -> None:
    """Times that are a product of powers of the extents are found everywhere, whichever blocks were measured."""
    graph, whole = net(), (7, 9, 11, 5, 5)

    def law(extents: np.ndarray) -> np.ndarray:
        return 1e-6 * extents[..., 0] ** 0.9 * extents[..., 1] ** 0.7 * extents[..., 2] ** 0.8 * extents[..., 3] ** 0.6

    cuts = [whole]
    for d, n in enumerate(whole[:4]):
        cuts += [(*whole[:d], -(-n // parts), *whole[d + 1 :]) for parts in (2, 4)]
    kernel = measured(graph, "second", {at: float(law(np.array(at))) for at in cuts})
    pricer = Pricer(Setting(Machine(kernels=(kernel,))), graph, 1)
    unit = units(graph)["second"]
    rng = np.random.default_rng(6)
    at = rng.integers((2, 3, 3, 2, 5), (8, 10, 12, 6, 6), (200, 5))
    assert pricer.seconds(unit, at)[:, 0] == pytest.approx(law(at), rel=1e-9)
    assert pricer.seconds(unit, at)[:, 1] == pytest.approx(3 * law(at), rel=1e-9)
    for extents in cuts:
        assert pricer.seconds(unit, np.array([extents]))[0, 0] == pytest.approx(float(law(np.array(extents))))
        assert pricer.source(unit, extents) == MEASURED
    assert pricer.source(unit, (7, 9, 11, 4, 5)) == INTERPOLATED
    assert pricer.source(unit) == MEASURED
    assert pricer.source(units(graph)["first"]) == FORMULA


def test_lines_between_measured_extents_and_proportion_beyond() -> None:
    graph = net()
    kernel = measured(graph, "second", {(8, 9, 11, 5, 5): 8e-3, (4, 9, 11, 5, 5): 5e-3, (2, 9, 11, 5, 5): 4e-3})
    pricer, unit = Pricer(Setting(Machine(kernels=(kernel,))), graph, 1), units(graph)["second"]
    between = 5e-3 * (8 / 5) ** (log(6 / 4) / log(2))
    expected = {(6, 9, 11): between, (1, 9, 11): 2e-3, (24, 9, 11): 24e-3, (4, 3, 11): 5e-3 / 3, (2, 9, 22): 8e-3}
    at = np.array([(*extents, 5, 5) for extents in expected])
    assert pricer.seconds(unit, at)[:, 0] == pytest.approx(list(expected.values()))


def test_nearest_number_of_ranks_at_once_counts() -> None:
    graph = net()
    block = (7, 9, 11, 5, 5)
    kernels = tuple(measured(graph, "second", {block: seconds}, n) for n, seconds in ((1, 1e-3), (2, 2e-3), (8, 9e-3)))
    unit, machine = units(graph)["second"], Machine(kernels=kernels)
    for at_once, seconds in ((1, 1e-3), (2, 2e-3), (3, 2e-3), (5, 9e-3), (64, 9e-3)):
        pricer = Pricer(Setting(machine), graph, at_once)
        assert pricer.seconds(unit, np.array([block]))[0, 0] == pytest.approx(seconds), at_once


def test_rank_without_work_takes_nothing_and_a_layer_without_gradient_no_backward() -> None:
    graph = Graph()
    x = graph.add("first pass", ReLU(), graph.input("x", (5, 7)))
    graph.add("loss", SoftmaxCrossEntropy(), graph.add("fc", Dense(3), x), graph.input("y", (5,), integer=True))
    pricer = Pricer(Setting(Machine(compute=ROUGH)), graph, 1)
    of = units(graph)
    assert (pricer.seconds(of["fc"], np.array([[5, 3, 7], [0, 3, 7], [5, 0, 7]])) > 0).tolist() == [
        [True, True],
        [False, False],
        [False, False],
    ]
    forward, backward = pricer.seconds(of["first pass"], np.array([[5, 7]]))[0]
    assert forward > 0 == backward


# --- the formula -----------------------------------------------------------------------------------------------------


def test_formula_of_a_convolution_by_hand() -> None:
    graph = net()
    pricer, of = Pricer(Setting(Machine(compute=ROUGH)), graph, 1), units(graph)
    block = (3, 5, 11, 2, 5)  # of 7 x 9 x 11 x 5 filters x 5 channels
    operations = 2 * prod(block) * 9 + prod(block[:4])  # and a ReLU
    numbers = prod(block[:4]) + 3 * 5 * 11 * 5 + 9 * 5 * 2 + 2
    share = 0.1 + 0.8 * (log(operations) - log(1e4)) / (log(1e8) - log(1e4))
    forward = max(operations / (5e10 * share), 4 * numbers / 1e10) + 3e-6
    share = 0.1 + 0.8 * (log(2 * operations) - log(1e4)) / (log(1e8) - log(1e4))
    backward = max(2 * operations / (5e10 * share), 8 * numbers / 1e10) + 3e-6
    assert pricer.seconds(of["second"], np.array([block]))[0] == pytest.approx([forward, backward])
    assert pricer.seconds(of["first"], np.array([block]))[0] == pytest.approx([forward, forward])


@pytest.mark.parametrize("case", CASES)
def test_work_of_all_ranks_is_the_work_of_the_layer(case: str) -> None:
    """Cut in any way, evenly or not, operations add up to those of the uncut layer; and no block moves more than it."""
    graph, rng = network(case), np.random.default_rng(5)
    plan = random_plan(rng, graph, 4)
    places, varied = layouts(graph, plan), differentiable(graph)
    for head, unit in units(graph, plan).items():
        blocks = np.array([extent(box) for box in places[head].work.boxes])
        of_blocks = work_of(graph, unit, blocks, 4, varied)
        uncut = work_of(graph, unit, np.array([work_shape(graph, unit)]), 4, varied)
        node = graph[head]
        assert uncut.operations[0][0] >= node.layer.flops(*node.input_shapes)
        if len(unit.names) == 1:  # where some is fused, sums over ranks of partial outputs do it more than once
            assert of_blocks.operations[0].sum() == pytest.approx(uncut.operations[0][0])
            assert of_blocks.operations[1].sum() == pytest.approx(uncut.operations[1][0])
        assert (of_blocks.moved[0] <= uncut.moved[0] * (1 + 1e-12)).all()
        assert of_blocks.moved[0].sum() >= 4 * prod(node.shape) * (1 - 1e-12)


def test_efficiency_lies_between_what_is_known_and_stays_beyond() -> None:
    found = efficiency(ROUGH, np.array([0.0, 1e2, 1e4, 1e6, 1e8, 1e11]))
    assert found == pytest.approx([0.1, 0.1, 0.1, 0.5, 0.9, 0.9])


def test_machine_that_says_nothing_is_refused_with_the_remedy() -> None:
    graph = net()
    pricer = Pricer(Setting(Machine(name="abacus")), graph, 1)
    with pytest.raises(ConfigError, match=r"(?s)machine abacus: layer fc was not measured.*calibrate CONFIG.toml"):
        pricer.seconds(units(graph)["fc"], np.array([[7, 3, 495]]))


def test_a_network_with_one_unmeasured_layer_is_priced_whole() -> None:
    graph = models.build("lenet", 5, Sample((28, 28, 1), classes=10), {})
    of = units(graph)
    unit = of["conv1"]
    kernel = Kernel(key_of(graph, unit), 1, {block_name(work_shape(graph, unit)): (1e-3, 2e-3)})
    pricer = Pricer(Setting(Machine(kernels=(kernel,), compute=ROUGH)), graph, 1)
    found = {head: pricer.seconds(u, np.array([work_shape(graph, u)]))[0] for head, u in of.items()}
    assert found["conv1"] == pytest.approx([1e-3, 2e-3])
    assert all((seconds > 0).all() for seconds in found.values())
    assert [pricer.source(of[head]) for head in ("conv1", "conv2")] == [MEASURED, FORMULA]
