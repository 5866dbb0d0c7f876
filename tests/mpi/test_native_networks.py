"""Networks on the compiled backend, fused and in an arena: gradients of the reference in float64, no allocation."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from executing import forward_backward, load_weights
from networks import Data, draw, random_plan, single

from hpctrain import backends, models, optim
from hpctrain.backends.base import Backend
from hpctrain.backends.reference import Reference
from hpctrain.config import Optim
from hpctrain.executor import Executor
from hpctrain.graph import Graph
from hpctrain.layers import Loss
from hpctrain.models import Sample
from hpctrain.planner.plan import Plan
from hpctrain.planner.schedule import KEEP, Economy
from hpctrain.verify.tolerance import Tolerance, tolerances

pytestmark = pytest.mark.skipif(
    os.environ.get("HPCTRAIN_NATIVE") == "0", reason="HPCTRAIN_NATIVE=0: installed without compiled kernels"
)

LEAN = Economy(fuse=True, reuse=True)

ZOO: dict[str, tuple[int, Sample, dict[str, Any]]] = {
    "alexnet": (2, Sample((67, 71, 3), classes=5), {"hidden": 13, "width": 0.1, "dropout": 0.0}),
    "cosmoflow": (3, Sample((16, 17, 19, 4), values=2), {"filters": 16, "hidden": 7}),
    "inception3": (4, Sample((107, 109, 3), classes=5), {"width": 0.1, "dropout": 0.0}),
    "lenet": (5, Sample((13, 15, 1), classes=5), {}),
    "resnet18": (3, Sample((33, 37, 3), classes=5), {"width": 0.25, "stem": "cifar"}),
    "resnet50": (2, Sample((65, 63, 3), classes=5), {"width": 0.1}),
    "unet3d": (2, Sample((9, 7, 11, 2), classes=3, positions=(9, 7, 11)), {"filters": 8, "levels": 3}),
    "vgg11": (2, Sample((33, 35, 3), classes=5), {"width": 0.25, "hidden": 13, "norm": True, "dropout": 0.0}),
}
"""Batch, sample and options. No dropout, which is tested by itself."""

BF16 = 0.25
"""Of the norm of a gradient, see test_bf16.py: these networks are several times as deep."""


def step(
    net: Graph, plan: Plan, comm: Any, data: Data, backend: Backend, precision: str, economy: Economy
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The losses (rows) and the gradients of a step: {name: (box, array)}."""
    executor = Executor(net, plan, comm, backend, precision, economy=economy)
    load_weights(executor, data)
    rows = forward_backward(executor, data, 0)
    losses = {name: (executor.box(name), block.astype(np.float64)) for name, block in rows.items()}
    parameters = executor.parameters.by_name
    gradients = {name: (p.box, p.gradient.astype(np.float64)) for name, p in parameters.items()}
    executor.free()
    return losses, gradients


def apart(found: np.ndarray, expected: np.ndarray, scale: float) -> float:
    """The norm of the difference, relative to that of what is expected; to `scale` where that cancels to nothing."""
    return float(np.linalg.norm(found - expected) / max(float(np.linalg.norm(expected)), scale))


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", ZOO)
def test_gradients_are_those_of_the_reference(comm: Any, name: str, precision: str, seed: int) -> None:
    from mpi4py import MPI

    batch, sample, options = ZOO[name]
    net = models.build(name, batch, sample, options)
    data, limits = draw(net, seed, 1), tolerances(net, "float32")
    plan = single(net) if comm.size == 1 else random_plan(np.random.default_rng(seed), net, comm.size)
    expected = None
    if comm.rank == 0:
        expected = step(net, single(net), MPI.COMM_SELF, data, Reference(), "float64", KEEP)
    losses, gradients = comm.bcast(expected)
    found_losses, found = step(net, plan, comm, data, backends.get("native"), precision, LEAN)
    allowed: Callable[[Tolerance], float] = (lambda t: t.gradient) if precision == "float32" else (lambda t: BF16)
    scale = 1e-3 * max(float(np.linalg.norm(array)) for _, array in gradients.values())
    for key, (box, block) in found_losses.items():
        limit = 2e-2 if precision == "bf16" else limits[key].output
        if block.size:
            assert apart(block[:, :1], losses[key][1][box][:, :1], 1e-3) <= limit, key
    worst = 0.0
    for key, (box, block) in found.items():
        limit = allowed(limits[key.rpartition(".")[0]])
        if block.size:
            error = apart(block, gradients[key][1][box], scale)
            worst = max(worst, error / limit)
            assert error <= limit, f"{key}: {error:.2e} of {limit:.2e}, plan {plan}"
    print(f"{name}, {precision}: {worst:.2f} of what is allowed")


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", ["resnet18", "unet3d", "cosmoflow", "alexnet"])
def test_nothing_is_allocated_after_the_first_steps(comm: Any, name: str, precision: str, seed: int) -> None:
    """tracemalloc sees NumPy's arrays and Python's objects: a step makes small ones, the larger tensors or not."""
    batch, sample, options = ZOO[name]
    net = models.build(name, 4 * batch, sample, options)
    plan = random_plan(np.random.default_rng(seed), net, comm.size)
    backend, data = backends.get("native"), draw(net, seed, 1)
    executor = Executor(net, plan, comm, backend, precision, economy=LEAN)
    flat, config = executor.parameters, Optim(name="sgd", lr=0.01, momentum=0.9)
    optimizer = optim.TABLE["sgd"](flat.weights, flat.gradients, flat.shards(), backend, config, comm)
    load_weights(executor, data)
    peaks = []
    for number in range(4):
        for key, values in data.inputs.items():
            executor.input(key)[...] = values[0][executor.box(key)]
        gradients = {
            loss.name: np.ones(executor.output(loss.name).reshape(-1, 4).shape, np.float32)
            for loss in net.losses
            if isinstance(loss.layer, Loss)
        }
        if number == 2:
            tracemalloc.start()
        if number >= 2:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
        executor.forward()
        executor.backward(gradients)
        optimizer.step(0.01)
        if number >= 2:
            now, most = tracemalloc.get_traced_memory()
            peaks.append((now - before, most - before))
    tracemalloc.stop()
    arena = executor.arena.nbytes
    executor.free()
    print(f"(kept, peak) bytes of the last steps {peaks}; arena {arena}")
    assert max(peak for _, peak in peaks) < max(0.01 * arena, 2**17)
    assert peaks[-1][0] < 2**13
