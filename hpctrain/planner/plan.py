"""A plan: layer name -> partition, and allreduce algorithms. Readable, editable JSON; all that the executor runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import msgspec

from hpctrain.comm.allreduce import LIBRARIES, TABLE
from hpctrain.errors import PlanError
from hpctrain.graph import Graph, Node
from hpctrain.layers import Input, Layer
from hpctrain.partition import AXES, Partition, Shape, names

VERSION = 1

ALLREDUCES = (*TABLE, *LIBRARIES)
"""What may stand for an allreduce."""

FEW = 6
"""Layers up to which a note names each."""


class _PlanFile(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    layers: dict[str, dict[str, Any]]
    allreduce: str | dict[str, str] | None = None
    empty_blocks: bool = False


Group = tuple[Partition, tuple[str, ...]]
"""Partition and replicated axes: ranks that hold the same blocks of the same parameters."""


def group_name(group: Group) -> str:
    """A group as a plan file names it: "batch=2 x height=2: batch, height"."""
    partition, axes = group
    return f"{partition}: {', '.join(axes)}"


@dataclass(frozen=True)
class Plan:
    """The partition of every layer; `notes` say where a layer got less than was asked for.

    With `empty_blocks` a layer may be cut into more blocks than it has elements: ranks without any idle.
    """

    partitions: dict[str, Partition]
    allreduce: str | Mapping[str, str] | None = None
    """The algorithm for all groups, or by `group_name`; what is not named is chosen by size and ranks at bind."""
    empty_blocks: bool = False
    notes: tuple[str, ...] = field(default=(), compare=False)
    resumed: bool = field(default=False, compare=False)
    """Whether `allreduce` is what an earlier part of the run chose, and nobody asked for."""

    @property
    def ranks(self) -> int:
        """Ranks that the largest layer needs."""
        return max(partition.size for partition in self.partitions.values())

    def algorithm(self, group: Group) -> str | None:
        """The allreduce algorithm that the plan names for a group; None where it is to be chosen."""
        if isinstance(self.allreduce, Mapping):
            return self.allreduce.get(group_name(group))
        return self.allreduce

    def named(self) -> list[str]:
        """The allreduce algorithms that the plan names."""
        if isinstance(self.allreduce, Mapping):
            return list(self.allreduce.values())
        return [] if self.allreduce is None else [self.allreduce]

    def with_choices(self, choices: Mapping[Group, str]) -> Plan:
        """This plan with an algorithm for each group: what a run keeps, so that it goes on with the same."""
        return replace(self, allreduce={group_name(group): name for group, name in choices.items()})

    def to_json(self) -> str:
        """The text of a plan file."""
        layers = {name: partition.parts() for name, partition in self.partitions.items()}
        named = dict(self.allreduce) if isinstance(self.allreduce, Mapping) else self.allreduce
        found: dict[str, Any] = {"version": VERSION, "allreduce": named}
        found |= {"empty_blocks": True} if self.empty_blocks else {}
        return json.dumps(found | {"layers": layers}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str) -> Plan:
        """The plan in `text`; `source` names the file in errors. Raises PlanError."""
        try:
            found = msgspec.json.decode(text, type=_PlanFile)
        except msgspec.DecodeError as error:
            raise PlanError(f"{source}: not a plan ({error}); make it again, or mend it") from None
        if found.version != VERSION:
            raise PlanError(
                f"{source}: plan version {found.version}, this program reads {VERSION}; make the plan again"
            )
        named = found.allreduce if isinstance(found.allreduce, dict) else {"": found.allreduce}
        for group, name in named.items():
            if name is not None and name not in ALLREDUCES:
                of = f" of {group}" if group else ""
                raise PlanError(f"{source}: allreduce{of} = {name!r}; choose one of {', '.join(ALLREDUCES)}")
        partitions = {}
        for name, parts in found.layers.items():
            try:
                partitions[name] = Partition.of(parts)
            except PlanError as error:
                raise PlanError(f"{source}: layer {name}: {error}") from None
        return cls(partitions, found.allreduce, found.empty_blocks)

    def check(self, graph: Graph) -> None:
        """Raises PlanError, naming layer, axis and what would work, where a layer cannot be cut as planned."""
        if unknown := [name for name in self.partitions if name not in graph.nodes]:
            near = get_close_matches(unknown[0], graph.nodes, 1)
            remedy = f"did you mean {near[0]}?" if near else "remove it from the plan"
            raise PlanError(f"no layer {unknown[0]} in this network of {len(graph.nodes)} layers; {remedy}")
        if missing := [node.name for node in graph if node.name not in self.partitions]:
            others = f" nor {len(missing) - 1} others" if len(missing) > 1 else ""
            raise PlanError(f'no partition for layer {missing[0]}{others}; add "{missing[0]}": {{}} (one rank)')
        for node in graph:
            limits = extents(node)
            if isinstance(node.layer, Input) and not graph.consumers(node.name):
                raise PlanError(f"input {node.name}: no layer reads it; remove it from the network")
            for axis, parts in self.partitions[node.name].parts().items():
                if axis not in limits:
                    raise PlanError(
                        f"layer {node.name}: {axis}={parts} cuts nothing of it; it can be cut along {', '.join(limits)}"
                    )
            if not self.empty_blocks:
                require_blocks(node, self.partitions[node.name])


def load(path: Path) -> Plan:
    """The plan in a JSON file. Raises PlanError naming it."""
    try:
        return Plan.from_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: cannot be read: {error}") from None


def require_blocks(node: Node, partition: Partition) -> None:
    """Raises PlanError where a dim of a layer's work has fewer elements than `partition` cuts it into blocks."""
    for n, axes in work_dims(node):
        blocks = prod(partition[axis] for axis in axes)
        if blocks > n:
            asked = ", ".join(f"{axis}={partition[axis]}" for axis in axes if partition[axis] > 1)
            most = f"{axes[0]}={n}" if len(axes) == 1 else f"{n} blocks along {' and '.join(axes)} together"
            kind, shape = type(node.layer).__name__, " x ".join(map(str, node.shape))
            raise PlanError(
                f"layer {node.name} ({kind}, output {shape}): {asked} cuts {n} elements into {blocks} blocks, "
                f"some of them empty; at most {most}, or write "
                '"empty_blocks": true into the plan if idle ranks are meant'
            )


def extents(node: Node) -> dict[str, int]:
    """{axis: the most blocks that a layer can be cut into along it}, each block not empty."""
    found = {axis: n for n, axes in work_dims(node) for axis in axes}
    return {axis: found[axis] for axis in AXES if axis in found}


def uniform(graph: Graph, grid: Partition, allreduce: str | None = None) -> Plan:
    """One grid for all layers, coarsened where a layer is too small for it.

    What a layer has no dim for goes to its channels (a dense layer in a net cut by height: the 1.5D scheme of
    Gholami et al. 2018), or to its batch where it has no channels either. Raises PlanError where no layer has a dim
    that the grid cuts.
    """
    able = sorted({axis for node in graph for axis in extents(node)}, key=AXES.index)
    for axis, parts in grid.parts().items():
        if axis not in able:
            raise PlanError(f"grid: no layer can be cut along {axis} (= {parts}); this network has {', '.join(able)}")
    fitted = {node.name: _fit(grid, node) for node in graph}
    changed: dict[tuple[Partition, str], list[str]] = {}
    for name, (partition, why) in fitted.items():
        if why:
            changed.setdefault((partition, why), []).append(name)
    notes = tuple(f"{grid} -> {to} for {_listed(layers)}: {why}" for (to, why), layers in changed.items())
    return Plan({name: partition for name, (partition, _) in fitted.items()}, allreduce, notes=notes)


def _listed(layers: Sequence[str]) -> str:
    return ", ".join(layers) if len(layers) <= FEW else f"{len(layers)} layers, {layers[0]} to {layers[-1]}"


def _fit(grid: Partition, node: Node) -> tuple[Partition, str]:
    """`grid` on a layer, no block empty, and what was changed for what reason."""
    limits = extents(node)
    parts: dict[str, int] = {axis: n for axis, n in grid.parts().items() if axis in limits}
    why: list[str] = []
    for axis, n in grid.parts().items():
        if axis not in limits:
            heir = "channel" if "channel" in limits else "batch"
            parts[heir] = parts.get(heir, 1) * n
            why.append(f"no {axis}, so {heir} is cut instead")
    for n, axes in work_dims(node):
        room = n
        for axis in axes:  # several axes may share the elements of one dim
            if parts.get(axis, 1) > room:
                parts[axis] = max(1, room)
                why.append(f"{axis} has only {n}" if len(axes) == 1 else f"{' and '.join(axes)} share {n}")
            room //= parts.get(axis, 1)
    return Partition.of(parts), "; ".join(why)


def work_dims(node: Node) -> tuple[tuple[int, tuple[str, ...]], ...]:
    """(extent, axes that cut it) of each dim of a layer's work."""
    return _work_dims(node.layer, node.input_shapes)


@lru_cache(maxsize=4096)
def _work_dims(layer: Layer, shapes: tuple[Shape, ...]) -> tuple[tuple[int, tuple[str, ...]], ...]:
    work = zip(layer.work_shape(*shapes), layer.work_axes(*shapes), strict=True)
    return tuple((n, names(axes)) for n, axes in work)
