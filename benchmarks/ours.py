"""A training step of hpctrain on the ranks of a communicator, as a benchmark needs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import process_time
from typing import Any

import numpy as np
from common import Seconds, reset_peak, timed
from networks import CASES

from hpctrain import backends, memory, optim
from hpctrain.comm import world
from hpctrain.comm.allreduce.choose import Choice, Surroundings
from hpctrain.comm.link import Topology
from hpctrain.config import Optim
from hpctrain.executor import Executor
from hpctrain.gradients import Summing
from hpctrain.graph import Graph, Node
from hpctrain.layers import Input, Phase
from hpctrain.layers.loss import LOSS, WEIGHT
from hpctrain.partition import Partition
from hpctrain.planner.plan import Plan, uniform
from hpctrain.planner.schedule import Economy

OPTIM = Optim(lr=0.01, momentum=0.9)


LEAN = Economy(fuse=True, reuse=True)
"""As a run has it."""


def chooser(comm: Any) -> Callable[[int, Sequence[int]], Choice]:
    """What a run asks for the allreduce of a group. Collective."""
    return Surroundings.of(comm, Topology(comm).hosts, world.library()[0]).choose


class Ours:
    """`graph` by a plan, or on one grid for all layers; a batch of random numbers, the same for all, copied in every
    step.
    """

    def __init__(
        self,
        graph: Graph,
        comm: Any,
        plan: Plan | Partition | None = None,
        precision: str = "float32",
        summing: Summing | None = None,
    ) -> None:
        plan = plan if isinstance(plan, Plan) else uniform(graph, plan or Partition())
        backend = backends.get("native")
        self.comm, self.batch = comm, graph["x"].shape[0]
        how = summing or Summing(choose=chooser(comm))
        self.executor = Executor(graph, plan, comm, backend, precision, economy=LEAN, summing=how)
        flat = self.executor.parameters
        self.optimizer = optim.TABLE[OPTIM.name](flat.blocks(), flat.shards(), backend, OPTIM, comm)
        self.given = {name: values[self.executor.box(name)] for name, values in random_batch(graph).items()}
        self.loss = 0.0

    def forward(self) -> tuple[str, np.ndarray]:
        """The loss layer and this rank's rows of it."""
        for name, values in self.given.items():
            np.copyto(self.executor.input(name), values, casting="same_kind" if values.dtype.kind == "i" else "unsafe")
        ((name, rows),) = self.executor.forward(Phase(training=True)).items()
        return name, rows

    def gradients(self) -> None:
        """Forward and backward, the loss divided by the global batch as the trainer does."""
        name, rows = self.forward()
        sums = np.empty((self.comm.size, 2))
        self.comm.Allgather(rows[:, [LOSS, WEIGHT]].sum(axis=0, dtype=np.float64), sums)
        loss, weight = sums.sum(axis=0)
        self.loss = loss / weight
        gradient = np.zeros_like(rows)
        gradient[:, LOSS] = 1 / weight
        self.executor.backward({name: gradient})

    def step(self) -> None:
        """One step of training."""
        self.gradients()
        self.optimizer.step(OPTIM.lr)


class Side:
    """One rank alone, for `common.Worker`."""

    def __init__(self, name: str, batch: int, precision: str = "float32") -> None:
        comm = world.start().comm
        self.start = memory.peak()
        self.graph = CASES[name].build(batch)
        self.ours = Ours(self.graph, comm, precision=precision)
        self.seconds: dict[tuple[str, str], list[float]] = {}

    def weights(self) -> dict[str, np.ndarray]:
        """Copies of all parameters."""
        return {name: p.array.copy() for name, p in self.ours.executor.parameters.by_name.items()}

    def first_gradients(self) -> dict[str, np.ndarray]:
        """What the first batch gives: the predictions, the loss as an array of one element, and all gradients."""
        self.ours.forward()
        predictions = self.ours.executor.output(self.graph.losses[0].inputs[0]).astype(np.float32)
        self.ours.gradients()
        found = {name: p.gradient.copy() for name, p in self.ours.executor.parameters.by_name.items()}
        return found | {"predictions": predictions, "loss": np.array([self.ours.loss])}

    def reset_memory(self) -> None:
        """Let `memory` count from here."""
        reset_peak()

    def memory(self) -> tuple[int, int]:
        """The most bytes resident since `reset_memory`, and what Python and the libraries had at the start."""
        return memory.peak(), self.start

    def step(self, times: int = 1) -> Seconds:
        """Steps, timed."""
        return timed(self.ours.step, times)

    def time_layers(self) -> None:
        """From here on note what each layer takes."""
        executor = self.ours.executor
        for step, unit in zip(executor.steps, executor.schedule.units, strict=True):
            step.op = Stopwatch(step.op, self.seconds, " ".join(unit.names))

    def layers(self) -> list[dict[str, Any]]:
        """Medians of each layer's CPU seconds and its nominal operations, both ways, since `time_layers`."""
        found = []
        for (name, way), taken in self.seconds.items():
            node = self.graph[name.split()[0]]  # what runs within it has next to no operations
            record = {"layer": name, "way": way, "seconds": float(np.median(taken))}
            found.append(record | {"flops": nominal_flops(self.graph, node, way)})
        return found


class Stopwatch:
    """An op that notes how long it runs."""

    def __init__(self, op: Any, seconds: dict[tuple[str, str], list[float]], name: str) -> None:
        self.op, self.seconds, self.name = op, seconds, name

    def forward(self, *arguments: Any) -> None:
        self._run("forward", arguments)

    def backward(self, *arguments: Any) -> None:
        self._run("backward", arguments)

    def _run(self, way: str, arguments: Sequence[Any]) -> None:
        begin = process_time()
        getattr(self.op, way)(*arguments)
        self.seconds.setdefault((self.name, way), []).append(process_time() - begin)


def nominal_flops(graph: Graph, node: Node, way: str) -> int | None:
    """Multiplications and additions of the textbook's formula; None for layers that are no sums of products."""
    if "weight" not in node.layer.weights(*node.input_shapes):
        return None
    once = node.layer.flops(*node.input_shapes)
    first = isinstance(graph[node.inputs[0]].layer, Input)  # no gradient of the data
    return once if way == "forward" or first else 2 * once


def random_batch(graph: Graph) -> Mapping[str, np.ndarray]:
    """Global arrays for the inputs "x" and "y"."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal(graph["x"].shape, np.float32)
    shape, predictions = graph["y"].shape, graph.losses[0].input_shapes[0]
    integer = graph["y"].layer.integer  # type: ignore[attr-defined]
    y = rng.integers(0, predictions[-1], shape) if integer else rng.standard_normal(shape, np.float32)
    return {"x": x, "y": y}
