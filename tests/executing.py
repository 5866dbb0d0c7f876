"""Runs networks through the executor and keeps this rank's blocks of all that it computed, to compare with one rank."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from networks import NETWORKS, Data, draw, single

from hpctrain.backends.reference import Reference
from hpctrain.config import Optim
from hpctrain.executor import Executor
from hpctrain.graph import Graph
from hpctrain.layers import Input, Loss, Phase
from hpctrain.layers.loss import LOSS
from hpctrain.optim import TABLE
from hpctrain.partition import Box, volume
from hpctrain.planner.layout import differentiable
from hpctrain.planner.plan import Plan
from hpctrain.precision import exact

OPTIM = Optim(lr=0.05, momentum=0.9, weight_decay=0.01)

TOLERANCE = 1e-10
"""Absolute and relative. Ranks add in another order than one rank does: for values of order 1, as here, and at most
about 1e4 terms a sum, that is at worst 1e4 * 2**-53 = 1e-12, amplified by two steps of training. A wrong term is of
order 1e-2."""

Blocks = dict[str, tuple[Box, np.ndarray]]
"""What was computed -> this rank's box of the global array, and what it has there."""


def train(net: Graph, plan: Plan, comm: Any, data: Data, optim: Optim = OPTIM) -> Blocks:
    """A training step for each entry of `data`; outputs, gradients and weights of each."""
    executor = Executor(net, plan, comm, Reference(), "float64")
    load_weights(executor, data)
    flat = executor.parameters
    optimizer = TABLE[optim.name](flat.blocks(), flat.shards(), executor.backend, optim, comm)
    found: Blocks = {}
    for step in range(len(next(iter(data.inputs.values())))):
        forward_backward(executor, data, step)
        found |= {f"step {step}: {name}": block for name, block in blocks(executor).items()}
        optimizer.step(optim.lr)
        for tensor in executor.tensors():
            found[f"step {step}: {tensor.name} updated"] = (tensor.box, tensor.array.copy())
    executor.free()
    return found


def flat_weights(executor: Executor) -> np.ndarray:
    """A copy of this rank's weights, one after the other."""
    return np.concatenate([np.zeros(0), *(memory.weights for memory in executor.parameters.groups.values())])


def load_weights(executor: Executor, data: Data) -> None:
    """Give the executor the initial weights of `data`."""
    for name, parameter in executor.parameters.by_name.items():
        parameter.array[...] = data.weights[name][parameter.box]


def forward_backward(executor: Executor, data: Data, step: int) -> dict[str, np.ndarray]:
    """One step without the update; this rank's rows of each loss."""
    for name, values in data.inputs.items():
        executor.input(name)[...] = values[step][executor.box(name)]
    rows = executor.forward(Phase(training=True, step=step))
    executor.backward({name: loss_gradient(executor, data, name) for name in rows})
    return rows


def loss_gradient(executor: Executor, data: Data, name: str) -> np.ndarray:
    """What this rank's rows of a loss count in the total: each sample, and each loss, something else."""
    mine = data.counts[executor.box(name)[0]] if executor.box(name) else data.counts[:0]
    gradient = np.zeros((len(mine), 4), exact(executor.dtype))
    gradient[:, LOSS] = mine * (1 + 0.5 * [loss.name for loss in executor.graph.losses].index(name))
    return gradient


def blocks(executor: Executor) -> Blocks:
    """Outputs and their gradients of every layer, and the gradient of every weight."""
    net, found = executor.graph, {}
    trained = differentiable(net)
    for n in net:
        if not isinstance(n.layer, Input) and executor.makes(n.name):
            found[n.name] = (executor.box(n.name), executor.output(n.name).copy())
            if n.name in trained and not isinstance(n.layer, Loss):
                found[f"{n.name} gradient"] = (executor.box(n.name), executor.output_gradient(n.name).copy())
    for name, parameter in executor.parameters.by_name.items():
        found[f"{name} gradient"] = (parameter.box, parameter.gradient.copy())
    return found


def serial(net: Graph, data: Data, optim: Optim = OPTIM) -> Blocks:
    """`train` on this rank alone: whole arrays."""
    from mpi4py import MPI

    return train(net, single(net), MPI.COMM_SELF, data, optim)


def assert_equal(found: Blocks, expected: Blocks, plan: Plan) -> None:
    """Every block equals its part of the whole array that one rank computed."""
    assert found.keys() == expected.keys()
    for name, (box, block) in found.items():
        whole = expected[name][1][box]
        if volume(box) == 0:
            assert block.size == 0, f"{name}: this rank owns nothing of it, but holds {block.shape}"
            continue
        if not np.allclose(block, whole, rtol=TOLERANCE, atol=TOLERANCE):  # the text takes longer than the comparison
            explain = f"{name}, box {box}, plan {plan_text(plan)}"
            np.testing.assert_allclose(block, whole, rtol=TOLERANCE, atol=TOLERANCE, err_msg=explain)


def plan_text(plan: Plan) -> str:
    """The plan in one line."""
    return ", ".join(f"{name}: {partition}" for name, partition in plan.partitions.items())


def check(comm: Any, net: Graph, plan: Plan, seed: int) -> None:
    """Training `net` by `plan` equals training it on one rank."""
    data = draw(net, seed)
    assert_equal(train(net, plan, comm, data), serial(net, data), plan)


@cache
def known(name: str, seed: int) -> tuple[Graph, Data, Any]:
    """A network, data for it, and what one rank makes of them."""
    net = NETWORKS[name]()
    data = draw(net, seed)
    return net, data, serial(net, data)
