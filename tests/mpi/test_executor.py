"""Any plan computes what one rank computes, and one rank computes what the mathematics says."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest
from executing import OPTIM, assert_equal, forward_backward, known, load_weights, loss_gradient, serial, train
from mpi4py import MPI
from networks import CASES, NETWORKS, Data, draw, network, partitions, random_plan, single

from hpctrain.backends.reference import Reference
from hpctrain.executor import Executor
from hpctrain.graph import Graph
from hpctrain.layers import MSE, Phase
from hpctrain.models import Sample, mlp
from hpctrain.planner.plan import Plan, extents, uniform

PLANS = 4
"""Random plans for every network and number of ranks."""


# --- equal to one rank --------------------------------------------------------------------------------------------


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("case", CASES)
def test_layer_cut_along_every_two_axes_equals_one_rank(comm: Any, case: str, seed: int) -> None:
    net = network(case)
    data, rng = draw(net, seed), np.random.default_rng(seed)
    expected = serial(net, data)
    sizes = {3, 2} if comm.size == 3 else {comm.size}
    tried = 0
    for partition in partitions(extents(net["layer"]), sizes):
        around = random_plan(rng, net, comm.size)
        plan = Plan(around.partitions | {"layer": partition}, around.allreduce, empty_blocks=True)
        assert_equal(train(net, plan, comm, data), expected, plan)
        tried += 1
    print(f"{tried} partitions")
    axes = len(extents(net["layer"]))
    assert tried >= {1: 1, 2: axes, 3: axes, 4: axes * (axes - 1) // 2}[comm.size] - 2


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_network_on_random_plans_equals_one_rank(comm: Any, name: str, seed: int) -> None:
    net, data, expected = known(name, seed)
    rng = np.random.default_rng(seed)
    for number in range(PLANS):
        plan = random_plan(rng, net, comm.size)
        print(f"seed {seed}, plan {number} of {PLANS}")
        assert_equal(train(net, plan, comm, data), expected, plan)


@pytest.mark.parallel([2, 3, 4])
@pytest.mark.parametrize("name", ["lenet", "cosmoflow"])
def test_network_on_one_grid_for_all_layers_equals_one_rank(comm: Any, name: str, seed: int) -> None:
    net, data, expected = known(name, seed)
    axes = {axis for node in net for axis in extents(node) if axis != "contraction"}
    for grid in partitions(dict.fromkeys(axes, comm.size), {comm.size}):
        plan = uniform(net, grid)
        assert_equal(train(net, plan, comm, data), expected, plan)


@pytest.mark.parallel([1, 2, 3, 4])
def test_evaluation_uses_the_running_statistics_on_any_plan(comm: Any, seed: int) -> None:
    net = network("batch norm")
    data, rng = draw(net, seed, steps=3), np.random.default_rng(seed)
    expected = evaluate(net, single(net), MPI.COMM_SELF, data)
    assert not np.allclose(expected.output("layer"), expected_in_training(net, data), atol=1e-3)
    for partition in partitions(extents(net["layer"]), range(1, comm.size + 1)):
        plan = Plan(random_plan(rng, net, comm.size).partitions | {"layer": partition}, empty_blocks=True)
        executor = evaluate(net, plan, comm, data)
        whole = expected.output("layer")[executor.box("layer")]
        # as TOLERANCE of executing.py
        np.testing.assert_allclose(executor.output("layer"), whole, rtol=1e-10, atol=1e-10)
        executor.free()


def evaluate(net: Graph, plan: Plan, comm: Any, data: Data) -> Executor:
    """Two training steps, then the last batch in evaluation."""
    executor = Executor(net, plan, comm, Reference(), "float64")
    load_weights(executor, data)
    for step in range(2):
        forward_backward(executor, data, step)
    executor.input("x")[...] = data.inputs["x"][2][executor.box("x")]
    executor.forward(Phase(training=False))
    return executor


def expected_in_training(net: Graph, data: Data) -> np.ndarray:
    """What the layer would give for the same batch in training."""
    executor = Executor(net, single(net), MPI.COMM_SELF, Reference(), "float64")
    load_weights(executor, data)
    forward_backward(executor, data, 2)
    return executor.output("layer")


@pytest.mark.parallel([2, 3, 4])
def test_same_plan_gives_the_same_bits(comm: Any, seed: int) -> None:
    net, data, _ = known("cosmoflow", seed)
    rng = np.random.default_rng(seed)
    for _ in range(3):
        plan = random_plan(rng, net, comm.size)
        first, second = train(net, plan, comm, data), train(net, plan, comm, data)
        for name, (_, block) in first.items():
            np.testing.assert_array_equal(block, second[name][1], err_msg=name, strict=True)


@pytest.mark.parallel([2, 3, 4])
def test_replicas_hold_the_same_bits_and_each_weight_has_one_first_replica(comm: Any, seed: int) -> None:
    net, data, _ = known("lenet", seed)
    rng = np.random.default_rng(seed)
    for _ in range(3):
        plan = random_plan(rng, net, comm.size)
        executor = Executor(net, plan, comm, Reference(), "float64")
        load_weights(executor, data)
        forward_backward(executor, data, 0)
        for name, p in executor.parameters.by_name.items():
            first = p.distribution.is_first_replica(comm.rank)
            blocks = comm.allgather((str(p.box), first, p.gradient.tobytes()))
            by_box: dict[str, set[bytes]] = {}
            for box, _, bits in blocks:
                by_box.setdefault(box, set()).add(bits)
            assert all(len(bits) == 1 for bits in by_box.values()), name
            assert sum(len(bits) for _, one, bits in blocks if one) == 8 * prod(p.shape), name
        executor.free()


@pytest.mark.parallel([1, 2, 3, 4])
def test_initial_weights_are_the_same_on_any_plan(comm: Any, seed: int) -> None:
    net = NETWORKS["cosmoflow"]()
    whole = Executor(net, single(net), MPI.COMM_SELF, Reference(), "float64", seed).parameters
    other = Executor(net, single(net), MPI.COMM_SELF, Reference(), "float64", seed + 1).parameters
    rng = np.random.default_rng(seed)
    for _ in range(PLANS):
        executor = Executor(net, random_plan(rng, net, comm.size), comm, Reference(), "float64", seed)
        for name, p in executor.parameters.by_name.items():
            np.testing.assert_array_equal(p.array, whole.by_name[name].array[p.box], strict=True)
        executor.free()
    assert not np.array_equal(whole.by_name["conv1.weight"].array, other.by_name["conv1.weight"].array)


@pytest.mark.parallel([1, 2, 3, 4])
def test_single_precision_is_close_to_double(comm: Any, seed: int) -> None:
    net, data, expected = known("lenet", seed)
    plan = random_plan(np.random.default_rng(seed), net, comm.size)
    executor = Executor(net, plan, comm, Reference(), "float32")
    load_weights(executor, data)
    rows = forward_backward(executor, data, 0)["loss"]
    assert (
        rows.dtype
        == executor.parameters.by_name["conv1.weight"].gradient.dtype
        == executor.output("conv1").dtype
        == np.float32
    )
    # a sum of n terms errs by at most n * 2**-24 of their size; the longest is conv1's weight gradient, over batch and
    # positions: n = 5 * 13 * 15 = 975; the network is ten layers deep
    for name, p in executor.parameters.by_name.items():
        whole = expected[f"step 0: {name} gradient"][1]
        np.testing.assert_allclose(p.gradient, whole[p.box], atol=10 * 975 * 2.0**-24 * np.abs(whole).max())


# --- equal to the mathematics -------------------------------------------------------------------------------------


@pytest.mark.parallel([1])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_is_the_derivative_of_the_loss(comm: Any, name: str, seed: int) -> None:
    net, data, _ = known(name, seed)
    executor = Executor(net, single(net), comm, Reference(), "float64")
    load_weights(executor, data)
    forward_backward(executor, data, 0)
    flat, rng = executor.parameters, np.random.default_rng(seed)
    (memory,) = flat.groups.values()
    gradients, start = memory.sums.copy(), memory.weights.copy()

    def loss(weights: np.ndarray) -> float:
        memory.weights[...] = weights
        rows = executor.forward()
        return sum(float((mine * loss_gradient(executor, data, name)).sum()) for name, mine in rows.items())

    for p in flat.by_name.values():
        direction = np.zeros_like(start)
        view = direction[p.where]
        view[...] = rng.normal(size=view.size) / np.sqrt(view.size)
        h = 1e-6
        slope = (loss(start + h * direction) - loss(start - h * direction)) / (2 * h)
        # rounding: 2**-53 * loss / h = 1e-9 for losses up to 10; truncation: h**2 * third derivative = 1e-12
        np.testing.assert_allclose(gradients @ direction, slope, rtol=1e-6, atol=1e-8, err_msg=p.name)


@pytest.mark.parallel([1])
def test_update_is_momentum_and_decay_of_matrices_only(comm: Any, seed: int) -> None:
    _, data, found = known("cosmoflow", seed)
    assert (OPTIM.momentum, OPTIM.weight_decay) == (0.9, 0.01)
    for name, weight in data.weights.items():
        decay = 0.01 if name.endswith(".weight") else 0.0
        velocity = np.zeros_like(weight)
        for step in range(2):
            velocity = 0.9 * velocity + found[f"step {step}: {name} gradient"][1] + decay * weight
            weight = weight - OPTIM.lr * velocity
            updated = found[f"step {step}: {name} updated"][1]
            # five roundings of numbers of order 1
            np.testing.assert_allclose(updated, weight, rtol=1e-14, atol=1e-14, err_msg=name)


@pytest.mark.parallel([1])
def test_network_without_weights_runs(comm: Any, seed: int) -> None:
    net = Graph()
    net.add("loss", MSE(), net.input("x", (3, 5)), net.input("y", (3, 5)))
    data = draw(net, seed)
    executor = Executor(net, single(net), comm, Reference(), "float64")
    rows = forward_backward(executor, data, 0)["loss"]
    np.testing.assert_allclose(rows[:, 0], ((data.inputs["x"][0] - data.inputs["y"][0]) ** 2).sum(axis=1), rtol=1e-14)
    np.testing.assert_array_equal(rows[:, 1], 5)


@pytest.mark.parallel([1])
def test_dense_network_equals_matrix_products(comm: Any, seed: int) -> None:
    """Forward of a whole network by hand, as the equalities above share one implementation."""
    net = mlp.build(7, Sample((5, 3), classes=4), hidden=(9, 5))
    data = draw(net, seed)
    executor = Executor(net, single(net), comm, Reference(), "float64")
    load_weights(executor, data)
    rows = forward_backward(executor, data, 0)["loss"]
    w, x = data.weights, data.inputs["x"][0].reshape(7, 15)
    h = np.maximum(x @ w["fc1.weight"] + w["fc1.bias"], 0)
    h = np.maximum(h @ w["fc2.weight"] + w["fc2.bias"], 0)
    logits = h @ w["out.weight"] + w["out.bias"]
    exponentials = np.exp(logits)
    probability = exponentials / exponentials.sum(axis=1, keepdims=True)
    labels = data.inputs["y"][0]
    np.testing.assert_allclose(rows[:, 0], -np.log(probability[np.arange(7), labels]), rtol=1e-12)
    np.testing.assert_array_equal(rows[:, 2], logits.argmax(axis=1) == labels)
    dlogits = data.counts[:, None] * (probability - np.eye(4)[labels])
    out = executor.parameters.by_name["out.weight"]
    np.testing.assert_allclose(out.gradient, h.T @ dlogits, rtol=1e-11, atol=1e-14)
