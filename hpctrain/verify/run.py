"""A network bound to ranks and trained on made-up batches, the same ones on every plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hpctrain import optim, randomness
from hpctrain.backends.base import Array, Backend
from hpctrain.config import Optim
from hpctrain.executor import Executor
from hpctrain.graph import Graph, Node
from hpctrain.layers import Input, Loss, Phase
from hpctrain.layers.dropout import slabs
from hpctrain.layers.loss import LOSS, WEIGHT
from hpctrain.partition import Box, within
from hpctrain.planner.plan import Plan
from hpctrain.planner.schedule import KEEP, Economy

if TYPE_CHECKING:
    from mpi4py import MPI


@dataclass(frozen=True)
class Settings:
    """What both runs have in common."""

    backend: Backend
    precision: str
    seed: int
    optim: Optim


class Run:
    """Training steps one by one. Collective over `comm`; weights and batches are functions of the global index."""

    def __init__(
        self, graph: Graph, plan: Plan, comm: MPI.Intracomm, settings: Settings, economy: Economy = KEEP
    ) -> None:
        self.settings = settings
        self.executor = Executor(graph, plan, comm, settings.backend, settings.precision, settings.seed, economy)
        flat = self.executor.parameters
        self.optimizer = optim.TABLE[settings.optim.name](
            flat.blocks(), flat.shards(), settings.backend, settings.optim, self.executor.comm
        )

    def forward_backward(self, step: int) -> None:
        """Step number `step` without its update."""
        for node in self.executor.graph:
            if isinstance(node.layer, Input):
                self._fill(node, step)
        rows = self.executor.forward(Phase(training=True, step=step))
        self.executor.backward(self._loss_gradients(rows))

    def update(self) -> None:
        """The optimizer's part of the step, at the rate `optim.lr`."""
        self.optimizer.step(self.settings.optim.lr)

    def free(self) -> None:
        """Release MPI resources. Collective."""
        self.executor.free()

    def _fill(self, node: Node, step: int) -> None:
        mine, into = self.executor.box(node.name), self.executor.input(node.name)
        for slab in slabs(mine):
            into[within(slab, mine)] = draw(self.executor.graph, node, self.settings.seed, step, slab)

    def _loss_gradients(self, rows: Mapping[str, Array]) -> dict[str, Array]:
        """Gradients of the sum over losses of scale * mean loss, by this rank's rows, as in training."""
        found = {}
        for name, mine in rows.items():
            layer = self.executor.graph[name].layer
            weight = self.executor.comm.allreduce(float(mine[:, WEIGHT].sum(dtype=np.float64)))
            found[name] = np.zeros_like(mine)
            if isinstance(layer, Loss) and weight:
                found[name][:, LOSS] = layer.scale / weight
        return found


def draw(graph: Graph, node: Node, seed: int, step: int, box: Box) -> Array:
    """`box` of a batch of input `node`: labels, targets of losses in [0, 1), or standard normal.

    Labels are among the classes; where losses ignore one, 1 in 8 is that one.
    """
    name = f"{node.name}.verify.{step}"
    users = graph.consumers(node.name)
    if isinstance(node.layer, Input) and node.layer.integer:
        classes = min(graph[user.inputs[0]].shape[-1] for user, _ in users)
        labels = (randomness.words(seed, name, node.shape, box) % np.uint64(classes)).astype(np.int64)
        if (ignore := ignored(graph, node)) is not None:
            labels[randomness.words(seed, f"{name}.ignored", node.shape, box) % np.uint64(8) == 0] = ignore
        return labels
    target = all(isinstance(user.layer, Loss) and slot > 0 for user, slot in users)
    return (randomness.uniform if target else randomness.normal)(seed, name, node.shape, box)


def ignored(graph: Graph, node: Node) -> int | None:
    """A label that some loss of labels `node` ignores and none of them refuses; None where there is none."""
    losses = [(user.layer, graph[user.inputs[0]].shape[-1]) for user, _ in graph.consumers(node.name)]
    found = [(layer, classes) for layer, classes in losses if isinstance(layer, Loss)]
    for ignore in (layer.ignore for layer, _ in found):
        if ignore is not None and not any(layer.invalid(np.array([ignore]), n).any() for layer, n in found):
            return ignore
    return None
