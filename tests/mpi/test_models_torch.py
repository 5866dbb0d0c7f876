"""Our networks compute what the same networks written in PyTorch compute from the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from executing import forward_backward, load_weights
from networks import Data, draw, single

from hpctrain import models
from hpctrain.backends.reference import Reference
from hpctrain.executor import Executor
from hpctrain.graph import Graph
from hpctrain.layers import Phase
from hpctrain.models import Sample

torch = pytest.importorskip("torch", reason="PyTorch is what the networks are compared with: pip install '.[oracle]'")
import torch_networks  # noqa: E402

TOLERANCE = 1e-9
"""Of the largest element. Both sides round in float64 through at most about 100 layers, with batch norms of a few
positions between them; a layer in the wrong place or with the wrong padding changes everything by order 1."""


def net(
    name: str, batch: int, shape: tuple[int, ...], labels: tuple[int, ...] = (), **options: Any
) -> Callable[[], Graph]:
    """Five classes, for every sample or each of its positions."""
    return lambda: models.build(name, batch, Sample(shape, classes=5, positions=labels), options)


NETWORKS: dict[str, tuple[str, Callable[[], Graph]]] = {
    "resnet18": ("resnet18", net("resnet18", 2, (33, 35, 3))),
    "resnet50": ("resnet50", net("resnet50", 3, (37, 33, 3), width=0.25)),
    "inception3": ("inception3", net("inception3", 3, (91, 107, 3), dropout=0.0, width=0.25)),
    "unet3d": ("unet3d", net("unet3d", 2, (9, 11, 14, 3), (9, 11, 14), filters=6)),
    "unet3d, a slab": ("unet3d", net("unet3d", 3, (1, 6, 9, 1), (1, 6, 9), filters=6, levels=3)),
    "unet3d valid": (
        "unet3d_valid",
        net("unet3d", 2, (44, 46, 47, 2), (4, 4, 4), filters=5, levels=3, padding="valid"),
    ),
}
"""With batch norm: our function of torch_networks, and ours."""

WITHOUT_NORM: dict[str, tuple[str, Callable[[], Graph]]] = {
    "alexnet": ("alexnet", net("alexnet", 2, (67, 73, 3), hidden=33, dropout=0.0)),
    "alexnet, two groups": ("alexnet_two_groups", net("alexnet", 2, (67, 79, 3), two_groups=True, hidden=33)),
    "vgg11": ("vgg11", net("vgg11", 2, (35, 47, 3), hidden=33)),
    "cosmoflow, mlperf": ("cosmoflow_mlperf", net("cosmoflow", 2, (33, 35, 37, 4), variant="mlperf", filters=4)),
}


def theirs(name: str, data: Data, state: dict[str, np.ndarray], training: bool) -> tuple[torch_networks.Weights, Any]:
    """The weights, with gradients of the loss, and the logits."""
    trained = {name: torch.tensor(array, requires_grad=True) for name, array in data.weights.items()}
    statistics = {name: torch.tensor(array) for name, array in state.items()}
    weights = torch_networks.Weights(trained, statistics, training)
    logits = getattr(torch_networks, name)(weights, torch.tensor(data.inputs["x"][0]))
    labels = torch.tensor(data.inputs["y"][0])
    loss = torch.nn.functional.cross_entropy(torch.movedim(logits, -1, 1), labels, reduction="none")
    (loss.reshape(len(loss), -1).sum(dim=1) @ torch.tensor(data.counts)).backward()
    assert weights.used == weights.trained.keys()
    found = logits.detach().numpy()
    assert np.abs(found[0] - found[1]).max() > 0.01 * np.abs(found).max(), "what a sample holds does not get through"
    return weights, found


def bound(graph: Graph, comm: Any, data: Data, rng: np.random.Generator) -> tuple[Executor, dict[str, np.ndarray]]:
    """Our network with the weights of `data`, and its running statistics, random."""
    executor = Executor(graph, single(graph), comm, Reference(), "float64")
    load_weights(executor, data)
    for tensor in executor.state:
        variance = tensor.name.endswith("running_var")
        tensor.array[...] = rng.uniform(0.5, 1.5, tensor.shape) if variance else 0.3 * rng.normal(size=tensor.shape)
    return executor, {tensor.name: tensor.array.copy() for tensor in executor.state}


def assert_close(ours: np.ndarray, expected: np.ndarray, what: str) -> float:
    """Equal within TOLERANCE; returns the difference."""
    assert ours.shape == expected.shape, what
    difference = np.abs(ours - expected).max() / np.abs(expected).max()
    assert difference <= TOLERANCE, f"{what}: {difference:.1e} of its largest element"
    return float(difference)


@pytest.mark.parallel(1)
@pytest.mark.parametrize("name", [*NETWORKS, *WITHOUT_NORM])
def test_evaluation_equals_pytorch(comm: Any, name: str, seed: int) -> None:
    function, build = (NETWORKS | WITHOUT_NORM)[name]
    graph = build()
    data = draw(graph, seed, steps=1)
    executor, state = bound(graph, comm, data, np.random.default_rng(seed))
    _, expected = theirs(function, data, state, training=False)
    executor.input("x")[...], executor.input("y")[...] = data.inputs["x"][0], data.inputs["y"][0]
    executor.forward(Phase(training=False))
    logits = graph.losses[0].inputs[0]
    print(f"{name}: {assert_close(executor.output(logits), expected, logits):.1e}")
    executor.free()


@pytest.mark.parallel(1)
@pytest.mark.parametrize("name", NETWORKS)
def test_training_step_equals_pytorch(comm: Any, name: str, seed: int) -> None:
    function, build = NETWORKS[name]
    graph = build()
    data = draw(graph, seed, steps=1)
    executor, state = bound(graph, comm, data, np.random.default_rng(seed))
    weights, expected = theirs(function, data, state, training=True)
    forward_backward(executor, data, 0)
    logits = graph.losses[0].inputs[0]
    worst = [assert_close(executor.output(logits), expected, logits)]
    for parameter in executor.parameters.by_name.values():
        gradient = weights.trained[parameter.name].grad.numpy()
        worst.append(assert_close(parameter.gradient, gradient, f"gradient of {parameter.name}"))
    for tensor in executor.state:
        worst.append(assert_close(tensor.array, weights.state[tensor.name].numpy(), tensor.name))
    print(f"{name}: logits {worst[0]:.1e}, gradients and statistics {max(worst[1:]):.1e}")
    executor.free()
