"""Rehearsals: what one rank of a plan computes without the others, and the copies that it would make."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from networks import CASES, NETWORKS, network, random_plan

from hpctrain import backends
from hpctrain.calibration import copies, layers
from hpctrain.calibration.rehearsal import Rehearsal
from hpctrain.config import Optim
from hpctrain.executor import Executor
from hpctrain.machine import Machine
from hpctrain.partition import Partition, extent
from hpctrain.planner.compute import MEASURED, Pricer
from hpctrain.planner.layout import differentiable
from hpctrain.planner.plan import uniform
from hpctrain.planner.schedule import LEAN
from hpctrain.planner.setting import Setting

RULES = Optim(lr=0.1, momentum=0.9)


@pytest.mark.parallel(1)
@pytest.mark.parametrize("name", NETWORKS)
def test_rehearsal_of_an_uncut_plan_computes_what_an_executor_does(comm: Any, name: str) -> None:
    """The same inputs and weights give the same rows of the losses and the same gradients, bit for bit."""
    graph, backend = NETWORKS[name](), backends.get("reference")
    plan = uniform(graph, Partition())
    rehearsal = Rehearsal(graph, plan, comm, backend, "float64", RULES)
    executor = Executor(graph, plan, comm, backend, "float64", economy=LEAN)
    for parameter, p in executor.parameters.by_name.items():
        p.array[...] = rehearsal.parameters.by_name[parameter].array
    for what, values in rehearsal.given.items():
        np.copyto(executor.input(what), values)
    rows = {loss: mine.copy() for loss, mine in executor.forward().items()}
    executor.backward(rehearsal.dloss)
    taken = rehearsal.run()
    for loss, mine in rows.items():
        assert np.array_equal(rehearsal.output(loss).reshape(mine.shape), mine)
        assert np.isfinite(mine).all()
    for parameter, p in executor.parameters.by_name.items():
        assert np.array_equal(rehearsal.parameters.by_name[parameter].partial, p.gradient), parameter
    assert taken.shape == (len(executor.steps), 2)
    assert (taken[:, 0] > 0).all()
    executor.free()


@pytest.mark.parallel(2)
@pytest.mark.parametrize("case", [*CASES, *NETWORKS])
def test_any_plan_can_be_rehearsed_on_fewer_ranks(comm: Any, case: str) -> None:
    """Random plans for 4 and 6 ranks on each of 2, alone: all layers run, and none waits for another rank."""
    graph = network(case) if case in CASES else NETWORKS[case]()
    rng = np.random.default_rng(11)
    alone = comm.Split(comm.rank, 0)
    for ranks in (4, 6):
        plan = random_plan(rng, graph, ranks)
        if comm.rank == 1:  # who could not answer
            continue
        rehearsal = Rehearsal(graph, plan, alone, backends.get("native"), "float32", RULES)
        taken = rehearsal.run()
        assert (taken > 0).all()
    alone.Free()


@pytest.mark.parallel(2)
def test_all_layers_of_a_network_are_measured_on_the_blocks_of_grids(comm: Any) -> None:
    graph, backend = NETWORKS["cosmoflow, two levels"](), backends.get("native")
    asked = layers.plans(graph, 2)
    found = layers.rehearse(comm, graph, asked, backend, "float32", RULES, seconds=60, rounds=1)
    assert found.left_out == 0
    assert 0 < found.update < 1e-6
    machine = Machine(kernels=found.times.kernels(2), compute=layers.compute(found.times.measured()))
    pricer = Pricer(Setting(machine), graph, 2)
    alone = comm.Split(comm.rank, 0)
    for plan in asked:
        rehearsal = Rehearsal(graph, plan, alone, backend, "float32", RULES)
        for unit in rehearsal.schedule.units:
            block = extent(rehearsal.layouts[unit.head].work.box(0))
            assert pricer.source(unit, block) == MEASURED
            forward, backward = pricer.seconds(unit, np.array([block]))[0]
            assert forward > 0
            assert (backward > 0) == (unit.name in differentiable(graph))
    alone.Free()


@pytest.mark.parallel([2, 3])
def test_copies_between_ranks_take_time_by_transfer_and_byte(comm: Any) -> None:
    found = copies.measure(comm, rounds=2)
    assert found is not None
    assert 1e-12 < found.beta < 1e-7
    assert 0 <= found.run < 1e-3
    assert 0 <= found.alpha < 0.1
    every = comm.allgather(found)
    assert all(other == every[0] for other in every)


@pytest.mark.parallel(1)
def test_fit_of_copies_finds_what_made_the_times(comm: Any) -> None:
    rng = np.random.default_rng(1)
    rows = np.stack([np.ones(60), 10 ** rng.uniform(1, 8, 60), 10 ** rng.uniform(0, 4, 60)], axis=1)
    for alpha, beta, run in ((5e-6, 1e-10, 2e-8), (3e-6, 7e-11, 0.0)):
        seconds = rows @ np.array([alpha, beta, run])
        found = copies.fit(rows, seconds)
        assert (found.alpha, found.beta) == pytest.approx((alpha, beta), rel=1e-6)
        assert found.run == pytest.approx(run, rel=1e-6, abs=1e-15)
        noisy = copies.fit(rows, seconds * np.exp(rng.normal(0, 0.1, 60)))
        assert (noisy.alpha, noisy.beta) == pytest.approx((alpha, beta), rel=0.2)
        assert noisy.run >= 0
