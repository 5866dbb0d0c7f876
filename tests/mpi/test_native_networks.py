"""Networks on the compiled backend, fused and in an arena: gradients of the reference in float64, no allocation."""

from __future__ import annotations

import gc
import os
import tracemalloc
from math import sqrt
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
from hpctrain.verify.tolerance import tolerances

pytestmark = pytest.mark.skipif(
    os.environ.get("HPCTRAIN_NATIVE") == "0", reason="HPCTRAIN_NATIVE=0: installed without compiled kernels"
)

LEAN = Economy(fuse=True, reuse=True)

ZOO: dict[str, tuple[int, Sample, dict[str, Any]]] = {
    "alexnet": (2, Sample((67, 71, 3), classes=5), {"hidden": 13, "width": 0.1, "dropout": 0.0}),
    "cosmoflow": (3, Sample((16, 17, 19, 4), values=2), {"filters": 16, "hidden": 7}),
    "inception3": (4, Sample((107, 109, 3), classes=5), {"width": 0.1, "dropout": 0.0}),
    "lenet": (5, Sample((13, 15, 1), classes=5), {}),
    "resnet18": (7, Sample((33, 37, 3), classes=5), {"width": 0.25, "stem": "cifar"}),
    "resnet50": (7, Sample((65, 63, 3), classes=5), {"width": 0.1}),
    "unet3d": (2, Sample((9, 7, 11, 2), classes=3, positions=(9, 7, 11)), {"filters": 8, "levels": 3}),
    "vgg11": (9, Sample((33, 35, 3), classes=5), {"width": 0.25, "hidden": 13, "norm": True, "dropout": 0.0}),
}
"""Batch, sample and options. No dropout, which is tested by itself."""

WINOGRAD = 3.0
"""How much more Winograd's convolution rounds than a plain sum; the share of kinks that flip is the root of that."""

DEEP = ("inception3", "resnet50")
"""At so few samples bf16 leaves little of their gradients, with any backend."""


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


def exact(net: Graph, data: Data, comm: Any) -> Any:
    """The losses and gradients of one rank in float64, on all ranks."""
    from mpi4py import MPI

    found = None
    if comm.rank == 0:
        found = step(net, single(net), MPI.COMM_SELF, data, Reference(), "float64", KEEP)
    return comm.bcast(found)


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("name", ZOO)
def test_gradients_are_those_of_the_reference(comm: Any, name: str, seed: int) -> None:
    batch, sample, options = ZOO[name]
    net = models.build(name, batch, sample, options)
    data, limits = draw(net, seed, 1), tolerances(net, "float32")
    plan = single(net) if comm.size == 1 else random_plan(np.random.default_rng(seed), net, comm.size)
    losses, gradients = exact(net, data, comm)
    found_losses, found = step(net, plan, comm, data, backends.get("native"), "float32", LEAN)
    scale = 1e-3 * max(float(np.linalg.norm(array)) for _, array in gradients.values())
    for key, (box, block) in found_losses.items():
        if block.size:
            assert apart(block[:, :1], losses[key][1][box][:, :1], 1e-3) <= WINOGRAD * limits[key].output, key
    for key, (box, block) in found.items():
        limit = sqrt(WINOGRAD) * limits[key.rpartition(".")[0]].gradient
        if block.size:
            error = apart(block, gradients[key][1][box], scale)
            assert error <= limit, f"{key}: {error:.2e} of {limit:.2e}, plan {plan}"


@pytest.mark.parallel([1])
@pytest.mark.parametrize("name", [name for name in ZOO if name not in DEEP])
def test_gradients_in_bf16_are_as_near_as_those_of_the_reference(comm: Any, name: str, seed: int) -> None:
    """Both round every tensor once, to bf16, so that they are about as far from float64."""
    batch, sample, options = ZOO[name]
    net = models.build(name, batch, sample, options)
    data = draw(net, seed, 1)
    losses, gradients = exact(net, data, comm)
    their_losses, theirs = step(net, single(net), comm, data, Reference(), "bf16", LEAN)
    our_losses, ours = step(net, single(net), comm, data, backends.get("native"), "bf16", LEAN)
    scale = 1e-3 * max(float(np.linalg.norm(array)) for _, array in gradients.values())
    for key, (_, rows) in losses.items():
        error, other = (apart(found[key][1][:, 0], rows[:, 0], 1e-3) for found in (our_losses, their_losses))
        assert error <= 2 * other + 2e-2, f"{key}: {error:.1e}, reference {other:.1e}"
    errors = np.array(
        [[apart(found[key][1], g, scale) for found in (ours, theirs)] for key, (_, g) in gradients.items()]
    )
    print(f"{name}: median and largest error, ours and the reference's: {np.median(errors, 0)} {errors.max(0)}")
    assert (errors[:, 0] <= 2 * errors[:, 1] + 2e-2).all()


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
    optimizer = optim.TABLE["sgd"](flat.blocks(), flat.shards(), backend, config, comm)
    load_weights(executor, data)
    held: list[int] = []
    peaks: list[int] = []
    for number in range(6):
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
            gc.collect()
            tracemalloc.reset_peak()
            held.append(tracemalloc.get_traced_memory()[0])
        executor.forward()
        executor.backward(gradients)
        optimizer.step(0.01)
        if number >= 2:
            peaks.append(tracemalloc.get_traced_memory()[1] - held[-1])
    tracemalloc.stop()
    arena = executor.arena.nbytes
    executor.free()
    print(f"bytes held before the last steps {held}, at most {peaks} more in each; arena {arena}")
    assert max(peaks) < max(0.05 * arena, 2**18)
    assert held[-1] - held[-2] < 2**10, "something is kept at every step"
