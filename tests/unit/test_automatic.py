"""By which figures a run is priced, what is said of the plan that was found, and which earlier plan is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from hpctrain import automatic, machine, models, runfolder
from hpctrain.automatic import GUESS, GUESSED
from hpctrain.comm.allreduce import choose
from hpctrain.config import AUTO, Config, Data, Model, Optim, Run, Train
from hpctrain.config import Plan as ConfiguredPlan
from hpctrain.errors import ConfigError
from hpctrain.graph import Graph
from hpctrain.machine import Compute, Kernel, Level, Machine, Table
from hpctrain.partition import Partition
from hpctrain.planner.compute import kernel_key
from hpctrain.planner.layout import differentiable, layouts
from hpctrain.planner.plan import uniform
from hpctrain.planner.schedule import LEAN, schedule
from hpctrain.planner.search import Found
from hpctrain.planner.seconds import PlanCost
from hpctrain.planning import Chosen, Task
from hpctrain.prepare import Described

LEVEL = Level(1e-6, 1e-9, 1e-10)

DATA = Described(Path("data"), (28, 28, 1), (), 10, 1000)


def net(name: str) -> Graph:
    """A small network for digits."""
    return models.build(name, 8, models.Sample((28, 28, 1), classes=10), {})


def config(**plan: Any) -> Config:
    """A run that leaves its plan to the planner."""
    train, asked = Train(epochs=1, batch=8), ConfiguredPlan(grid=AUTO, **plan)
    return Config(
        model=Model(name="lenet"), data=Data(train="x"), plan=asked, optim=Optim(lr=1), train=train, run=Run(folder="x")
    )


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this machine's file would be."""
    found = tmp_path / "machine.json"
    monkeypatch.setenv("HPCTRAIN_MACHINE", str(found))
    return found


def test_a_guess_knows_threads_and_what_was_measured(path: Path) -> None:
    """A calibration without layers still says what sums of gradients take."""
    for known in (None, Machine(library="here", node=LEVEL)):
        if known is not None:
            path.write_bytes(machine.encode(known))
        found = automatic._chosen(config(), 3)
        assert found.name == GUESSED
        assert found.machine.compute == Compute(3 * GUESS.flops, 3 * GUESS.bandwidth, call=GUESS.call)
        assert found.machine.node == (None if known is None else LEVEL)
        assert found.machine.copies is not None, "ranks of a host read each other's memory"


def test_a_calibrated_machine_is_no_guess(path: Path) -> None:
    path.write_bytes(machine.encode(Machine(library="here", compute=Compute(1e12, 1e11), date="2026-01-02")))
    found = automatic._chosen(config(), 1)
    assert str(found) == "this machine, measured 2026-01-02, layers by formula"
    other = path.with_name("other.json")
    other.write_bytes(machine.encode(Machine(name="other", compute=Compute(1e11, 1e11))))
    assert automatic._chosen(config(machine=str(other)), 1).name == "other"
    assert automatic._chosen(config(machine="cori-knl"), 1).machine.compute != found.machine.compute
    path.write_text("{}{")
    with pytest.raises(ConfigError, match=r"machine\.json: cannot be used .*; mend it, or remove it"):
        automatic._chosen(config(), 1)


def test_figures_of_another_mpi_library_do_not_count() -> None:
    known = Machine("theirs", LEVEL, LEVEL, (Table((0, 0), {"ring": {8: 1.0}}),), compute=GUESS)
    assert automatic._of_library(known, "theirs") == known
    assert automatic._of_library(known, "ours") == Machine("theirs", compute=GUESS)
    published = structs.replace(known, library="", tables=())
    assert automatic._of_library(published, "ours") == published


def test_ranks_lie_as_they_do_in_the_run() -> None:
    """Whatever the file says of hosts; levels that it leaves out are those that sums are chosen by."""
    found = automatic._placed(Machine(node=LEVEL, per_host=16, hosts=2), [0, 0, 0, 3, 3, 5])
    assert (found.per_host, found.hosts) == (3, None)
    assert found.layout(6) == (0, 0, 0, 1, 1, 1)
    assert (found.node, found.network) == (LEVEL, choose.NETWORK)


def test_it_is_said_how_many_layers_were_measured() -> None:
    """Of this network, by this plan: a file may be full of others."""
    graph = net("lenet")
    halves = uniform(graph, Partition(batch=2))
    units, varied = schedule(graph, layouts(graph, halves), LEAN).units, differentiable(graph)
    keys = {unit.head: kernel_key(graph, unit, varied, "float32", "native") for unit in units}
    blocks = {"conv1": "4x28x28x6x1", "pool1": "4x14x14x6", "fc1": "8x120x400"}
    known = [Kernel(keys[name], 1, {block: (1e-3, 1e-3)}) for name, block in blocks.items()]
    found = Machine("here", date="2026-01-02", compute=GUESS, kernels=(*known, Kernel("another", 1, {"1": (1.0, 1.0)})))
    task = Task(config(), DATA, graph, Chosen(found, "this machine", True), None)
    said = automatic.Basis(task, guess=False).source(halves, 2)
    # nine run, of which a dense layer was measured on the whole batch only
    assert said == "by this machine, measured 2026-01-02; layers: 2 measured, 1 interpolated, 6 by formula"
    assert automatic.Basis(task, guess=True).source(halves, 2) == "by a guess: 50 GFLOP/s a rank"


def test_what_is_said_of_a_plan() -> None:
    cost = PlanCost((), 2, step=0.0123456)
    found = Found(uniform(net("lenet"), Partition()), cost, 0.0123, 0.0037, 3, 0.1, 99)
    assert automatic.describe(found, {"model": 2.5, "data": 0.02}, 2) == (
        "plan: searched for 2 ranks, a step should take 12.3 ms; the best of the usual plans, data: 20 ms; none is "
        "more than 0.37 % better by this model"
    )
    assert "searched for 1 rank, a step should take 12.3 ms; none is" in automatic.describe(found, {}, 1)
    assert automatic.milliseconds(2.3456) == "2.35 s"


def test_an_earlier_plan_is_kept_for_as_many_ranks_and_the_same_network(tmp_path: Path) -> None:
    graph = net("lenet")
    task = Task(config(), DATA, graph, Chosen(Machine(), "toy", True), None)
    basis = automatic.Basis(task, guess=False)
    earlier = uniform(graph, Partition(batch=2), "tree")
    assert automatic._kept(basis, None, 2, 1) is None, "a new run"
    assert automatic._kept(basis, tmp_path, 2, 1) is None, "one that never began"
    (tmp_path / "plan.json").write_text(earlier.to_json())
    assert automatic._kept(basis, tmp_path, 2, 1) is None, "nobody knows for how many ranks"
    (tmp_path / "environment.json").write_text(json.dumps({"ranks": 2}))
    kept = automatic._kept(basis, tmp_path, 2, 1)
    assert kept == earlier
    assert kept.resumed
    assert automatic._kept(basis, tmp_path, 3, 1) is None
    assert automatic._kept(basis, tmp_path, 2, 2) is None, "two copies of it take four"
    other = Task(config(), None, net("mlp"), task.chosen, None)  # type: ignore[arg-type]
    assert automatic._kept(automatic.Basis(other, guess=False), tmp_path, 2, 1) is None
    asked = Task(config(allreduce="ring"), None, graph, task.chosen, None)  # type: ignore[arg-type]
    named = automatic._kept(automatic.Basis(asked, guess=False), tmp_path, 2, 1)
    assert named is not None
    assert named.allreduce == "ring"


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '{"ranks": "two"}'])
def test_ranks_of_a_folder_that_does_not_say(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "environment.json").write_text(text)
    assert runfolder.ranks(tmp_path) is None
