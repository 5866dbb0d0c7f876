"""What a rank takes to compute a unit of the schedule on a block of its work: measured, interpolated or by formula.

Where a unit was measured on just this block, that is its time. Where it was measured on others, the time of the
nearest (least sum over dims of the logarithms of extents) is multiplied by one factor for each dim in which they
differ: the ratio of the times of the largest block when cut along that dim alone, a line between the measured ones in
logarithms of extent and time, in proportion to the extent beyond them and where that dim was never cut. Where a unit
was not measured at all, by formula: max(operations / (flops x efficiency(operations)), bytes / bandwidth) + call;
backward does twice the operations of forward in layers with weights that pass a gradient on, else as many, and moves
twice the bytes. Of several measurements those count whose number of ranks at once is nearest. No unit takes less than
Compute.call, and a rank without work takes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from math import log, prod
from typing import NamedTuple

import numpy as np

from hpctrain.errors import ConfigError
from hpctrain.graph import Graph
from hpctrain.layers.base import Dims
from hpctrain.machine import Compute, Kernel
from hpctrain.partition import Shape, names
from hpctrain.planner.layout import differentiable
from hpctrain.planner.schedule import Unit
from hpctrain.planner.setting import Setting

MEASURED, INTERPOLATED, FORMULA = "measured", "interpolated", "formula"

LEAST = 1e-9
"""Seconds that stand for none where a logarithm is due."""


def work_shape(graph: Graph, unit: Unit) -> Shape:
    """The extents of the uncut work of a unit: that of its first layer."""
    head = graph[unit.head]
    return head.layer.work_shape(*head.input_shapes)


def kernel_key(graph: Graph, unit: Unit, varied: set[str], dtype: str, backend: str) -> str:
    """What tells a unit from others that take other times: its layers, what it reads, which gradients it makes, how.

    The batch is left out: it is part of a block. `varied` are the layers that gradients flow through.
    """
    head = graph[unit.head]
    layers = " + ".join(repr(graph[name].layer) for name in unit.names)
    read = " and ".join("x".join(map(str, shape[1:])) or "1" for shape in head.input_shapes)
    sources = [graph[name].inputs[slot or 0] for name, slot in unit.inputs]
    backward = "".join(str(int(source in varied)) for source in sources) if unit.name in varied else "none"
    return f"{layers} of {read}; gradients {backward}; {dtype}, {backend}"


def block_name(extents: Sequence[int]) -> str:
    """ "8x32x32x64" of (8, 32, 32, 64)."""
    return "x".join(map(str, extents))


class Pricer:
    """Times of the units of one network on one machine, where `at_once` ranks of a host compute at the same time."""

    def __init__(self, setting: Setting, graph: Graph, at_once: int) -> None:
        self.setting, self.graph, self.at_once = setting, graph, at_once
        self.varied = differentiable(graph)
        self._kernels: dict[str, list[Kernel]] = {}
        for kernel in setting.machine.kernels:
            self._kernels.setdefault(kernel.key, []).append(kernel)
        self._curves: dict[str, Curves | None] = {}
        self._floor = setting.machine.compute.call if setting.machine.compute is not None else 0.0

    def seconds(self, unit: Unit, extents: np.ndarray) -> np.ndarray:
        """(configs, 2): seconds of forward and backward on blocks of the first layer's work, of `extents` (configs,
        dims). Raises ConfigError where the machine says nothing that a time could follow from.
        """
        extents = np.asarray(extents, np.float64).reshape(-1, len(work_shape(self.graph, unit)))
        found, some = np.zeros((len(extents), 2)), (extents > 0).all(axis=1)
        if some.any():
            curves = self._measured(unit)
            timed = self._formula(unit, extents[some]) if curves is None else curves.seconds(extents[some])
            found[some] = np.maximum(timed, self._floor)
        if unit.name not in self.varied:
            found[:, 1] = 0.0
        return found

    def source(self, unit: Unit, extents: Sequence[int] | None = None) -> str:
        """ "measured", "interpolated" or "formula"; without `extents`, whether the unit was measured on any block."""
        curves = self._measured(unit)
        if curves is None:
            return FORMULA
        return MEASURED if extents is None or block_name(extents) in curves.blocks else INTERPOLATED

    def _measured(self, unit: Unit) -> Curves | None:
        setting = self.setting
        key = kernel_key(self.graph, unit, self.varied, setting.precision, setting.backend)
        if key not in self._curves:
            found = self._kernels.get(key, [])
            nearest = min(found, key=lambda kernel: abs(log(kernel.at_once / self.at_once)), default=None)
            self._curves[key] = None if nearest is None else Curves(nearest.blocks)
        return self._curves[key]

    def _formula(self, unit: Unit, extents: np.ndarray) -> np.ndarray:
        compute = self.setting.machine.compute
        if compute is None:
            raise ConfigError(
                f"machine {self.setting.machine.name or 'file'}: layer {unit.head} was not measured, and it says "
                "nothing of flops and bandwidth; measure it:\nmpirun -n 2 hpctrain calibrate CONFIG.toml"
            )
        return by_formula(compute, work_of(self.graph, unit, extents, self.setting.dtype.itemsize, self.varied))


# --- measured blocks -------------------------------------------------------------------------------------------------


class Curves:
    """How a unit's time depends on the extents of its block, from blocks that were measured."""

    def __init__(self, blocks: Mapping[str, tuple[float, float]]) -> None:
        """`blocks`: {extents, "8x32x32x64": seconds (forward, backward)}, at least one."""
        self.blocks = blocks
        extents = np.array([[int(n) for n in name.split("x")] for name in blocks], np.float64)
        self._at = np.log(extents)
        self._seconds = np.log(np.maximum(np.array(list(blocks.values())), LEAST))
        self._whole = int(np.argmax(extents.prod(axis=1)))

    def seconds(self, extents: np.ndarray) -> np.ndarray:
        """(configs, 2) for blocks of `extents` (configs, dims), none of them 0."""
        at = np.log(extents)
        nearest = np.abs(at[:, None] - self._at).sum(axis=2).argmin(axis=1)
        found = self._seconds[nearest]
        for d, curve in enumerate(self._along):
            differs = at[:, d] != self._at[nearest, d]
            if differs.any():
                found[differs] += curve(at[differs, d]) - curve(self._at[nearest[differs], d])
        seconds: np.ndarray = np.exp(found)
        return seconds

    @cached_property
    def _along(self) -> list[Curve]:
        """By dim of the work, the times of the largest block, and of those that differ from it along this dim alone."""
        found = []
        whole = self._at[self._whole]
        for d in range(len(whole)):
            alike = np.delete(self._at == whole, d, axis=1).all(axis=1)
            order = np.argsort(self._at[alike, d])
            found.append(Curve(self._at[alike, d][order], self._seconds[alike][order]))
        return found


class Curve(NamedTuple):
    """Logarithms of times (n, 2) at logarithms of extents (n,), rising."""

    at: np.ndarray
    seconds: np.ndarray

    def __call__(self, at: np.ndarray) -> np.ndarray:
        """(m, 2) at (m,): lines between what is known, in proportion beyond."""
        inside = np.stack([np.interp(at, self.at, self.seconds[:, way]) for way in range(2)], axis=1)
        beyond: np.ndarray = at - np.clip(at, self.at[0], self.at[-1])
        return inside + beyond[:, None]


# --- by formula ------------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """What a unit does on blocks: operations and bytes (configs,) of forward and of backward."""

    operations: tuple[np.ndarray, np.ndarray]
    moved: tuple[np.ndarray, np.ndarray]


def work_of(graph: Graph, unit: Unit, extents: np.ndarray, itemsize: int, varied: set[str]) -> Work:
    """What a unit does on blocks of `extents` (configs, dims) of its first layer's work."""
    head = graph[unit.head]
    layer, x = head.layer, head.input_shapes
    axes = layer.work_axes(*x)
    share = np.asarray(extents, np.float64) / np.array(work_shape(graph, unit), np.float64)
    produced = prod(head.shape) * _part(share, layer.produces(*x))
    operations = layer.flops(*x) * share.prod(axis=1) + (len(unit.names) - 1) * produced
    numbers = produced.copy()
    for shape, dims in zip(x, layer.needs(*x), strict=True):
        numbers += prod(shape) * _part(share, dims)
    if unit.tail is not None and unit.tail.adds:
        numbers += produced
    weights = layer.weights(*x)
    for weight in weights.values():
        cut_by = {axis for entry in weight.axes for axis in names(entry)}
        cut = [d for d, entry in enumerate(axes) if cut_by & set(names(entry))]
        numbers += prod(weight.shape) * share[:, cut].prod(axis=1)
    passed_on = any(graph[name].inputs[slot or 0] in varied for name, slot in unit.inputs)
    times = 2 if weights and passed_on else 1
    moved = numbers * itemsize
    return Work((operations, times * operations), (moved, 2 * moved))


def _part(share: np.ndarray, dims: Dims) -> np.ndarray:
    """(configs,): which part of a tensor a block of work touches, borders left aside."""
    cut = sorted({d for along in dims if along is not None for d in along.dims})
    part: np.ndarray = share[:, cut].prod(axis=1)
    return part


def by_formula(compute: Compute, work: Work) -> np.ndarray:
    """(configs, 2): seconds of forward and backward."""
    ways = []
    for operations, moved in zip(work.operations, work.moved, strict=True):
        rate = compute.flops * efficiency(compute, operations)
        ways.append(np.maximum(operations / rate, moved / compute.bandwidth) + compute.call)
    return np.stack(ways, axis=1)


def efficiency(compute: Compute, operations: np.ndarray) -> np.ndarray:
    """The share of `compute.flops` that calls of so many operations reach; that of the nearest known one beyond."""
    at, shares = np.array(compute.efficiency).T
    found: np.ndarray = np.interp(np.log(np.maximum(operations, 1.0)), np.log(at), shares)
    return found
