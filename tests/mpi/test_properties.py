"""Random layers of every kind with any geometry on random plans against one rank: 400 cases or more over 1 to 6 ranks.

Compared are outputs, their gradients, weight gradients, updated weights and statistics of two steps, the outputs of an
evaluation, and bytes sent with bytes planned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from driving import Case, CaseFails, cases, drive, judge
from geometry import Draw, Drawn
from hypothesis import strategies as st
from networks import mixing, with_loss, with_partitions
from properties import GEOMETRIES

from hpctrain import layers
from hpctrain.graph import Graph
from hpctrain.layers import MAE, MSE, Conv, Input, Layer, Loss, Place
from hpctrain.layers.activation import ReLUOp
from hpctrain.layers.loss import Elementwise
from hpctrain.layers.pool import GlobalAvgPoolOp
from hpctrain.partition import Partition, volume
from hpctrain.planner.layout import layouts

CASES = dict.fromkeys(GEOMETRIES, 6) | {
    "conv": 18,
    "conv, groups": 12,
    "transposed conv": 12,
    "transposed conv, groups": 10,
}
"""Cases of each kind for every number of ranks."""
LEAST = 400
"""Cases over all numbers of ranks."""


@st.composite
def networks(draw: Draw, geometry: st.SearchStrategy[Drawn]) -> Graph:
    """The layer reads trained layers, inputs, or one tensor twice; after it comes a layer, a flatten, or a loss at
    once; there may be a second loss.
    """
    layer, shapes = draw(geometry)
    net, inputs, loss = Graph(), [], isinstance(layer, Loss)
    for i, shape in enumerate(shapes):
        if i and not loss and shape == shapes[0] and draw(st.sampled_from([False, False, True])):
            inputs.append(inputs[0])
            continue
        x = net.input(f"x{i}", shape, integer=len(shape) < len(shapes[0]))
        given = i == 1 and loss and not isinstance(layer, Elementwise)  # labels have no gradient
        trained = not given and draw(st.sampled_from([True, True, True, False]))
        inputs.append(net.add(f"pre{i}", mixing(shape), x) if trained else x)
    x = net.add("layer", layer, *inputs)
    if not isinstance(layer, Loss):
        after = draw(st.sampled_from(["loss", "flatten", "mixing"]))
        if after == "flatten":
            with_loss(net, x)
        else:
            x = net.add("post", mixing(net[x].shape), x) if after == "mixing" else x
            net.add("loss", MSE(), x, net.input("y", net[x].shape))
    if draw(st.sampled_from([False, False, True])):
        net.add("second loss", MAE(), inputs[0], net.input("y2", shapes[0]))
    return net


def features(case: Case, ranks: int) -> list[str]:
    """What is special about a case."""
    found = {
        "all ranks": case.plan.ranks == ranks,
        "fewer ranks": case.plan.partitions["layer"].size < ranks,
        "contraction cut": case.plan.partitions["layer"].contraction > 1,
        "two losses": len(case.net.losses) > 1,
        "empty blocks": any(
            volume(box) == 0 for place in layouts(case.net, case.plan).values() for box in place.work.boxes
        ),
    }
    return [name for name, true in found.items() if true]


@pytest.mark.parallel([1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("kind", GEOMETRIES)
def test_layer_on_any_plan_equals_one_rank(
    comm: Any, kind: str, seed: int, record_property: Callable[[str, object], None]
) -> None:
    of_type, geometry = GEOMETRIES[kind]
    special: Counter[str] = Counter()

    def note(case: Case) -> None:
        assert type(case.net["layer"].layer) is of_type
        special.update(features(case, comm.size))

    count = drive(comm, cases(networks(geometry), comm.size), CASES[kind], seed, note)
    if comm.rank == 0:
        print(f"{kind}, {comm.size} ranks: {count} cases, of them {dict(special)}")
        record_property("cases", ("random layers on random plans equal one rank", kind, count))
        assert count >= CASES[kind]


# --- cases that it found --------------------------------------------------------------------------------------------


@pytest.mark.parallel([2])
def test_loss_that_nothing_trained_feeds_sends_nothing_back(comm: Any, seed: int) -> None:
    """Its gradient would reach no weight; the planner counts no bytes for it."""
    net = Graph()
    x = net.input("x", (1, 1, 2))
    net.add("loss", MSE(), net.add("conv", Conv(1, kernel=1), x), net.input("y", (1, 1, 1)))
    net.add("second loss", MAE(), x, net.input("y2", (1, 1, 2)))
    plan = with_partitions(net, {"second loss": Partition(channel=2)})
    assert judge(comm, Case(net, plan, seed)) is None


# --- the harness itself ---------------------------------------------------------------------------------------------


def found_failure(comm: Any, kind: str, seed: int) -> str:
    """The message with which rank 0 ends; the other ranks end well, and in step."""
    message = ""
    try:
        drive(comm, cases(networks(GEOMETRIES[kind][1]), comm.size), 40, seed)
    except CaseFails as error:
        message = str(error)
    assert (message != "") == (comm.rank == 0)
    return message


@pytest.mark.parallel([3])
def test_wrong_number_is_found(comm: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean over the positions of a block, where it should be over all."""
    right = GlobalAvgPoolOp.__init__

    def wrong(self: GlobalAvgPoolOp, place: Place) -> None:
        right(self, place)
        self.scale = 1.0 / max(1, volume(place.inputs[0][1:-1]))

    monkeypatch.setattr(GlobalAvgPoolOp, "__init__", wrong)
    message = found_failure(comm, "global avg pool", seed)
    if comm.rank == 0:
        assert "step 0: layer: rank 0 has" in message
        assert "  layer: GlobalAvgPool() of " in message


@pytest.mark.parallel([2])
@pytest.mark.parametrize("way", ["__init__", "forward", "backward"])
def test_exception_on_one_rank_is_a_verdict(comm: Any, way: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(ReLUOp, way)

    def wrong(self: ReLUOp, *arguments: Any) -> None:
        right(self, *arguments)
        if comm.rank == 1:
            raise IndexError("planted")

    monkeypatch.setattr(ReLUOp, way, wrong)
    message = found_failure(comm, "relu", seed)
    if comm.rank == 0:
        assert message.startswith("rank 1: ")
        assert "IndexError: planted" in message
        assert "layer: ReLU()" in message


@pytest.mark.parallel([1])
def test_every_layer_is_drawn_and_cases_are_enough() -> None:
    public = {getattr(layers, name) for name in layers.__all__}
    kinds = {found for found in public if isinstance(found, type) and issubclass(found, Layer)} - {Layer, Loss, Input}
    assert kinds == {of_type for of_type, _ in GEOMETRIES.values()}
    assert set(CASES) == set(GEOMETRIES)
    assert 6 * sum(CASES.values()) >= LEAST
