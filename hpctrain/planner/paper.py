"""The accounting of Gholami et al. 2018 (arXiv 1712.04432): grids of Pr x Pc by its equations 3, 4 and 6 to 9.

Only convolutions and dense layers count, by their weight matrices; every collective takes log2(P) latencies, whatever
its algorithm; the network is full, and compute speeds up perfectly. Words are 4 bytes. What the program itself takes is
priced by `planner.cost` instead.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Literal, NamedTuple

import numpy as np

from hpctrain.errors import ConfigError, PlanError
from hpctrain.graph import Graph
from hpctrain.layers import Conv, Dense
from hpctrain.machine import Level, Machine
from hpctrain.planner.compute import efficiency

WORD = 4
"""Bytes."""

ConvBy = Literal["same", "batch"]


@dataclass(frozen=True)
class Record:
    """What a step takes on a grid, in seconds; `model_seconds` are those of model and domain parallelism."""

    pr: int
    pc: int
    compute_seconds: float
    model_seconds: float
    batch_seconds: float
    overlap: bool = False
    """Whether gradients are summed while others compute, as in figure 8."""

    @property
    def seconds(self) -> float:
        """Of all: figure 8 hides sums of gradients behind the whole computation, backward or not."""
        shown = max(0.0, self.batch_seconds - self.compute_seconds) if self.overlap else self.batch_seconds
        return self.compute_seconds + self.model_seconds + shown

    def times(self, steps: float) -> Record:
        """That of so many steps; an epoch has samples / batch, and no fraction of a step is left out."""
        compute, model, batch = (steps * n for n in (self.compute_seconds, self.model_seconds, self.batch_seconds))
        return replace(self, compute_seconds=compute, model_seconds=model, batch_seconds=batch)


class Matrix(NamedTuple):
    """A layer as the paper sees it. Numbers are of words, and for one sample."""

    weights: int
    """|W|."""
    outputs: int
    """d."""
    halo_forward: int
    """Rows of the input that a neighbour in height needs; 0 where there are none."""
    halo_backward: int
    dense: bool


class Cut(NamedTuple):
    """How a layer is cut: over `pc` in batch, and over `pr` by its outputs ("model") or its height ("domain")."""

    pr: int
    pc: int
    way: Literal["model", "domain"]


def matrices(graph: Graph) -> list[Matrix]:
    """The convolutions and dense layers of a network. Raises PlanError where there are none."""
    found = []
    for node in graph:
        layer, shapes = node.layer, node.input_shapes
        if not isinstance(layer, Conv | Dense):
            continue
        halos = (0, 0)
        if isinstance(layer, Conv):
            windows = layer.windows(*shapes)
            # equation 7: rows of the input by the window's height, rows of the output by its width
            rows = prod(shapes[0][2:]), prod(node.shape[2:])
            halos = rows[0] * (windows[0].kernel // 2), rows[1] * (windows[-1].kernel // 2)
        weights = prod(layer.weights(*shapes)["weight"].shape)
        found.append(Matrix(weights, prod(node.shape[1:]), *halos, isinstance(layer, Dense)))
    if not found:
        raise PlanError("the paper's accounting counts Conv and Dense layers, and this network has none of them")
    return found


# --- equations -------------------------------------------------------------------------------------------------------


def collective(ranks: int, words: float, wire: Level) -> float:
    """Seconds of an all-gather of so many words, and half of those of an allreduce: section 2.1 of the paper."""
    return wire.alpha * (ranks - 1).bit_length() + wire.beta * WORD * words * (ranks - 1) / ranks


def gather(matrix: Matrix, batch: int, cut: Cut, wire: Level) -> float:
    """Equation 6: a layer's outputs, all-gathered over `cut.pr` ranks."""
    return collective(cut.pr, batch / cut.pc * matrix.outputs, wire)


def model_seconds(matrix: Matrix, batch: int, cut: Cut, wire: Level) -> float:
    """What cutting over `cut.pr` costs: equation 8's first sum (3 where pc is 1), or the halos of equations 7 and 9."""
    if cut.way == "model":
        return 3 * gather(matrix, batch, cut, wire)  # outputs forward; input gradients back, which are summed
    if cut.pr == 1:
        return 0.0
    halos = (words for words in (matrix.halo_forward, matrix.halo_backward) if words)
    return sum(wire.alpha + wire.beta * WORD * batch / cut.pc * words for words in halos)


def batch_seconds(matrix: Matrix, cut: Cut, wire: Level) -> float:
    """The sum of weight gradients: equation 8's second sum (4 where pr is 1), over all ranks where height is cut."""
    if cut.way == "model":
        return 2 * collective(cut.pc, matrix.weights / cut.pr, wire)
    return 2 * collective(cut.pr * cut.pc, matrix.weights, wire)


def communication(found: list[Matrix], cuts: list[Cut], batch: int, wire: Level) -> tuple[float, float]:
    """(model and domain, batch) seconds of a step of layers that are cut so: equation 9, and equation 6 in between.

    The paper calls redistribution cheap and does not say where it counts it: its figures come out with one all-gather
    where a layer that is cut by its outputs follows one that is not, of that layer's outputs.
    """
    model = sum(model_seconds(matrix, batch, cut, wire) for matrix, cut in zip(found, cuts, strict=True))
    after = zip(cuts, cuts[1:], found[1:], strict=False)
    model += sum(
        gather(matrix, batch, to, wire) for before, to, matrix in after if to.way == "model" and before.way != "model"
    )
    return model, sum(batch_seconds(matrix, cut, wire) for matrix, cut in zip(found, cuts, strict=True))


# --- grids -----------------------------------------------------------------------------------------------------------


def conv_by(only: Mapping[str, Collection[str]]) -> ConvBy:
    """How convolutions are cut where `plan.only` says so: "batch" if never along channels, "same" as dense layers."""
    return "batch" if "Conv" in only and "channel" not in only["Conv"] else "same"


def grids(graph: Graph, machine: Machine, ranks: int, by: ConvBy = "same", overlap: bool = False) -> list[Record]:
    """Every Pr x Pc of so many ranks, Pr rising, as far as there are samples for Pc.

    By "same" all layers are cut over the grid, as in figure 6. By "batch" convolutions are cut by their samples, and
    by height where there are too few of these: figures 7 to 10. Raises ConfigError on a machine of which too little is
    known.
    """
    if ranks < 1:
        raise ConfigError(f"ranks = {ranks}; give 1 or more")
    found, batch = matrices(graph), next(iter(graph)).shape[0]
    wire, compute = _wire(machine, ranks), compute_seconds(graph, machine, ranks)
    return [
        Record(pr, pc, compute, *communication(found, list(_cuts(found, pr, pc, batch, by)), batch, wire), overlap)
        for pr, pc in _factors(ranks)
        if pc <= batch
    ]


def compute_seconds(graph: Graph, machine: Machine, ranks: int) -> float:
    """Seconds that a rank computes in a step: its share of all operations, at the efficiency of a mean call.

    A call is one pass through one layer, forward or backward, which takes twice as many operations.
    """
    if machine.compute is None:
        raise ConfigError(f"machine {machine.name or 'without a name'}: compute is unknown; add it to its file")
    flops = [node.layer.flops(*node.input_shapes) for node in graph if isinstance(node.layer, Conv | Dense)]
    share = 3 * sum(flops) / ranks
    return share / (machine.compute.flops * float(efficiency(machine.compute, np.array(share / (2 * len(flops))))))


def _wire(machine: Machine, ranks: int) -> Level:
    """The slowest level that so many ranks use: the paper's network has only one."""
    one_host = max(machine.layout(ranks)) == 0
    wire = (machine.node or machine.network) if one_host else machine.network
    if wire is None:
        level = "node" if one_host else "network"
        raise ConfigError(f"machine {machine.name or 'without a name'}: {level} is unknown; add it to its file")
    return wire


def _factors(ranks: int) -> Iterator[tuple[int, int]]:
    return ((pr, ranks // pr) for pr in range(1, ranks + 1) if ranks % pr == 0)


def _cuts(found: list[Matrix], pr: int, pc: int, batch: int, by: ConvBy) -> Iterator[Cut]:
    samples = max(n for _, n in _factors(pr * pc) if n <= batch)
    for matrix in found:
        if by == "batch" and not matrix.dense:
            yield Cut(pr * pc // samples, samples, "domain")
        else:
            yield Cut(pr, pc, "model")
