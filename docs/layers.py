"""Writes layers.md: what each layer takes and how it can be cut, asked of the layers themselves.

python docs/layers.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields
from inspect import getdoc
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from hpctrain import layers
from hpctrain.errors import PlanError
from hpctrain.graph import Graph, Node
from hpctrain.layers import Input, Layer, Loss, Weight
from hpctrain.partition import AXES, names
from hpctrain.planner.plan import extents

SHAPES = {"vectors": (4, 6), "images": (4, 7, 7, 6), "volumes": (4, 7, 7, 7, 6)}
"""An input of each kind that some layer takes."""

REQUIRED: dict[str, Any] = {
    "filters": 4,
    "units": 4,
    "kernel": 2,
    "groups": 2,
    "size": 2,
    "shape": (-1,),
    "dim": -1,
    "start": 0,
    "stop": 2,
}
"""Values for fields without a default."""

HEAD = """# Layers

Written by `python docs/layers.py` from the code; a test fails when it is stale. Tensors are channels last: N samples,
then positions (none, W, H x W or D x H x W), then C channels.

*Cut along*: the axes of the process grid that may divide the layer's work, down to blocks of one element. Those marked
(sum) give partial sums, which are added over ranks; over *statistics* the layer itself adds a few numbers. Blocks may
be uneven, halos wider than the neighbour's block, ranks more than blocks. A plan with `"empty_blocks": true` may even
have more blocks than there are elements.

A number for `kernel`, `stride` and the like holds for all positions, a tuple has one entry for each; `padding` takes
(before, after) as such an entry.
"""


def kinds() -> list[type[Layer]]:
    """Every layer that can be put into a network, by file."""
    found = [getattr(layers, name) for name in layers.__all__]
    concrete = [
        kind
        for kind in found
        if isinstance(kind, type) and issubclass(kind, Layer) and kind not in (Layer, Loss, Input)
    ]
    return sorted(concrete, key=lambda kind: (kind.__module__, list(layers.__all__).index(kind.__name__)))


def example(kind: type[Layer], shape: tuple[int, ...]) -> Node | None:
    """A node of this kind that reads inputs like `shape`; None where it takes none such."""
    given = {field.name: REQUIRED[field.name] for field in fields(kind) if field.default is MISSING}  # type: ignore[arg-type]
    for more in ([], [shape], [shape[:-1]]):
        net = Graph()
        inputs = [net.input("x", shape), *(net.input("y", other, integer=other != shape) for other in more)]
        try:
            return net[net.add("layer", kind(**given), *inputs)]
        except PlanError:
            continue
    return None


def signature(kind: type[Layer]) -> str:
    """The class as it is called, with defaults."""
    words = []
    for field in fields(kind):  # type: ignore[arg-type]
        words.append(field.name if field.default is MISSING else f"{field.name}={field.default!r}")
    return f"{kind.__name__}({', '.join(words)})"


def cuts(node: Node) -> list[str]:
    """The axes that may cut a layer; marked where ranks along them add up."""
    layer, shapes = node.layer, node.input_shapes
    axes = layer.work_axes(*shapes)
    produced = {d for along in layer.produces(*shapes) if along is not None for d in along.dims}
    summed = set(chain.from_iterable(names(entry) for d, entry in enumerate(axes) if d not in produced))
    return [f"{axis} (sum)" if axis in summed else axis for axis in AXES if axis in extents(node)]


def described(weights: dict[str, Weight]) -> str:
    """Parameters and the axes that cut each."""
    found = []
    for name, weight in weights.items():
        axes = sorted(set(chain.from_iterable(map(names, weight.axes))), key=AXES.index)
        found.append(f"{name} ({', '.join(axes) or 'whole'})")
    return ", ".join(found)


def entry(kind: type[Layer]) -> Iterator[str]:
    """The lines about one layer."""
    text = (getdoc(kind) or "").replace("\n\n", "\n").splitlines()
    yield from [f"### {kind.__name__}", "", f"`{signature(kind)}`", "", *text, ""]
    nodes = {what: node for what, shape in SHAPES.items() if (node := example(kind, shape)) is not None}
    largest = list(nodes.values())[-1]
    statistics = [axis for axis in AXES if axis in largest.layer.reduce_axes(*largest.input_shapes)]
    yield f"- takes: {', '.join(nodes)}"
    yield f"- cut along: {', '.join(cuts(largest))}" + (f"; statistics: {', '.join(statistics)}" if statistics else "")
    for what, weights in (("parameters", largest.layer.weights), ("running", largest.layer.state)):
        if found := described(weights(*largest.input_shapes)):
            yield f"- {what}: {found}"
    yield ""


def row(kind: type[Layer]) -> str:
    """The line of the table about one layer."""
    nodes = {what: node for what, shape in SHAPES.items() if (node := example(kind, shape)) is not None}
    marks = ["yes" if what in nodes else "" for what in SHAPES]
    link = f"[{kind.__name__}](#{kind.__name__.lower()})"
    return f"| {link} | {' | '.join(marks)} | {', '.join(cuts(list(nodes.values())[-1]))} |"


def text() -> str:
    """The whole file."""
    lines = [HEAD, f"| layer | {' | '.join(SHAPES)} | cut along |", "|---|---|---|---|---|"]
    lines += [*map(row, kinds()), ""]
    for module, group in groupby(kinds(), key=lambda kind: kind.__module__):
        heading = (sys.modules[module].__doc__ or "").strip().splitlines()[0]
        lines += [f"## {module.rpartition('.')[2]}.py", "", heading, ""]
        lines += [line for kind in group for line in entry(kind)]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("layers.md").write_text(text(), encoding="utf-8")
