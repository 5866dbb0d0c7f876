"""How far two runs may differ by rounding alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod, sqrt

import numpy as np

from hpctrain.graph import Graph, Node
from hpctrain.layers import MAE, LeakyReLU, Loss, MaxPool, ReLU
from hpctrain.partition import Shape

FLOAT64 = 1e-10
"""Sums of 1e6 terms in another order differ by 1e6 * 2**-53 = 1e-10 of their largest term at worst; a wrong or missing
term is of the order of the largest."""

SAFETY = 8
"""Room for what the estimate leaves out: weights that amplify errors, means subtracted, tails of the distribution."""

KINKS = (ReLU, LeakyReLU, MaxPool, MAE)
"""Layers whose gradient jumps where their input lies on the other side of a kink, or another element wins."""


@dataclass(frozen=True)
class Tolerance:
    """Largest relative differences of one layer's tensors that count as rounding.

    Differences are relative to the largest element of the whole tensor; with `mean_square`, those of gradients are root
    mean squares relative to the root mean square of the whole tensor.
    """

    output: float
    gradient: float
    update: float
    mean_square: bool = False


def tolerances(graph: Graph, precision: str) -> dict[str, Tolerance]:
    """The tolerance of every layer of `graph`.

    float64: FLOAT64 for all. float32: a sum of K terms taken in another order differs by a random walk of K steps of
    at most eps times the partial sum, about sqrt(K) eps of the result; errors of layers one after another add up like
    further steps. So SAFETY * sqrt(L) * eps, where L adds the lengths of the sums on the longest way to the tensor:
    forward to an output, forward to the losses and back to a gradient. An element that lies within rounding of a kink
    may get another gradient altogether. Of the inputs of a kink, about the share `output` lies as near as that, so the
    root mean square of the gradient changes by the root of the share, added up over the kinks that it came through.
    Both runs update the same weights by the same gradients (see `compare`), so `update` has no history.
    """
    if precision == "float64":
        return {node.name: Tolerance(FLOAT64, FLOAT64, FLOAT64) for node in graph}
    eps, forward, back = float(np.finfo(precision).eps), _forward_lengths(graph), _backward_lengths(graph)
    outputs = {name: SAFETY * eps * sqrt(length) for name, length in forward.items()}
    whole_way = max(forward.values())
    found, flips = {}, 0.0
    for node in reversed(list(graph)):
        flips += outputs[node.name] if isinstance(node.layer, KINKS) else 0.0
        gradient = SAFETY * eps * sqrt(whole_way + back[node.name]) + sqrt(flips)
        found[node.name] = Tolerance(outputs[node.name], gradient, SAFETY * SAFETY * eps, flips > 0)
    return found


def _terms(node: Node, shape: Shape) -> float:
    """The sum that one element of `shape`, the layer's output or an input's gradient, takes: 2 operations a term."""
    return max(1.0, node.layer.flops(*node.input_shapes) / (2 * max(1, prod(shape))))


def _forward_lengths(graph: Graph) -> dict[str, float]:
    found: dict[str, float] = {}
    for node in graph:
        found[node.name] = _terms(node, node.shape) + max((found[name] for name in node.inputs), default=0.0)
    return found


def _backward_lengths(graph: Graph) -> dict[str, float]:
    """Of the gradients of a layer's inputs and weights; these are sums over all samples and positions."""
    found: dict[str, float] = {}
    for node in reversed(list(graph)):
        below = max((found[user.name] for user, _ in graph.consumers(node.name)), default=0.0)
        found[node.name] = below + max((_terms(node, shape) for shape in node.input_shapes), default=0.0)
    return {name: length + _positions(graph[name]) for name, length in found.items()}


def _positions(node: Node) -> int:
    return 0 if isinstance(node.layer, Loss) else prod(node.shape[:-1])
