"""What `hpctrain verify` shows: a line per layer and per edge, 79 columns wide, and the same as records."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from hpctrain import memory
from hpctrain.config import Config
from hpctrain.console import LETTERS, WIDTH, blocks, wrapped
from hpctrain.graph import Graph, Node
from hpctrain.layers import Input
from hpctrain.partition import AXES, Partition, Shape
from hpctrain.planner import memory as need
from hpctrain.planner.plan import Plan
from hpctrain.verify.compare import INPUT_GRADIENT, KINDS, OUTPUT, UPDATE, WEIGHT_GRADIENT, Finding
from hpctrain.verify.sample import Sample
from hpctrain.verify.tolerance import Tolerance
from hpctrain.verify.traffic import Traffic

MANY = 40
"""Layers or edges above which only those that matter are shown."""
SHOWN = 5
"""How many of those that are equal are shown then."""

T = TypeVar("T")

TITLES = {OUTPUT: "output", INPUT_GRADIENT: "dx", WEIGHT_GRADIENT: "dw", UPDATE: "w"}


@dataclass(frozen=True)
class Row:
    """One layer: its largest differences by kind, and the first finding, in order of execution, that is too large."""

    layer: str
    kind: str
    partition: Partition
    differences: Mapping[str, float]
    tolerance: Tolerance
    first: Finding | None
    order: int
    """Place of `first` among all findings."""
    note: str = ""

    @property
    def equal(self) -> bool:
        """Whether rounding explains all differences."""
        return self.first is None

    @property
    def strain(self) -> float:
        """The largest difference as a share of what is allowed."""
        allowed = {OUTPUT: self.tolerance.output, UPDATE: self.tolerance.update}
        return max((d / allowed.get(k, self.tolerance.gradient) for k, d in self.differences.items()), default=0.0)


# --- rows ------------------------------------------------------------------------------------------------------------


def rows(graph: Graph, plan: Plan, findings: Sequence[Finding], limits: Mapping[str, Tolerance]) -> list[Row]:
    """A row for each layer that `findings` are about, in graph order."""
    return [
        _row(node, plan.partitions[node.name], findings, limits[node.name])
        for node in graph
        if any(finding.layer == node.name for finding in findings)
    ]


def sample_rows(sample: Sample, findings: Sequence[Finding], limits: Mapping[str, Tolerance]) -> list[Row]:
    """The row of the layer that `sample` is about; none without findings."""
    shapes = " and ".join(_shape(shape) for shape in dict.fromkeys(sample.shapes))
    full = " and ".join(_shape(shape) for shape in dict.fromkeys(sample.full))
    note = f"on {shapes}" + ("" if shapes == full else f" for {full}")
    if sample.alike:
        note += f"; stands for {', '.join(sample.alike)}"
    # the layers around it only produce its inputs and its gradient
    return [
        replace(row, note=note, order=0)
        for row in rows(sample.graph, sample.plan, findings, limits)
        if row.layer == sample.name
    ]


def _row(node: Node, partition: Partition, findings: Sequence[Finding], limit: Tolerance) -> Row:
    mine = [(i, f) for i, f in enumerate(findings) if f.layer == node.name]
    largest: dict[str, float] = {}
    for _, f in mine:
        largest[f.kind] = max(f.difference, largest.get(f.kind, 0.0))
    order, first = next(((i, f) for i, f in mine if not f.equal), (0, None))
    return Row(node.name, type(node.layer).__name__, partition, largest, limit, first, order)


# --- text ------------------------------------------------------------------------------------------------------------


def heading(config: Config, graph: Graph, plan: Plan, ranks: int, steps: int, chosen: Sequence[Sample]) -> str:
    """What is about to be done."""
    layers = sum(not isinstance(node.layer, Input) for node in graph)
    alone = Plan({node.name: Partition() for node in graph})
    whole = need.of_run(config, graph, alone, [0])[0].total
    how = (
        f"one by one ({len(chosen)} that differ in more than name),"
        if chosen
        else f"and whole on rank 0 ({memory.mib(whole)}),"
    )
    return wrapped(
        f"{config.model.name}: {layers} layers by the plan on {ranks} ranks {how} {steps} steps of training on random "
        f"batches of {config.train.part}; {config.train.precision}, {config.train.backend}"
    )


def report(found: Sequence[Row], edges: Sequence[Traffic], every: bool) -> Iterator[str]:
    """The table of layers, that of edges, and the verdict."""
    yield ""
    yield from _layers(found, every)
    yield ""
    yield from _edges(edges, every)
    yield ""
    yield verdict(found, edges)


def verdict(found: Sequence[Row], edges: Sequence[Traffic]) -> str:
    """The last line: equal, or the first layer that differs, else the first edge."""
    different = [row for row in found if row.first is not None]
    if different:
        row = min(different, key=lambda row: row.order)
        others = ". Others may differ because it does: --sample-layers checks each alone"
        return wrapped(_explained(row) + (others if len(different) > 1 and not row.note else ""))
    if wrong := [edge for edge in edges if not edge.equal]:
        return wrapped(
            f"{wrong[0].edge} is the first of {len(wrong)} edges to move other bytes than the cost model counts: "
            f"{wrong[0].forward:,} forward and {wrong[0].backward:,} backward, not {wrong[0].predicted_forward:,} and "
            f"{wrong[0].predicted_backward:,}"
        )
    return "equal: by the plan, ranks compute what one computes, and move what is predicted"


def _explained(row: Row) -> str:
    f = row.first
    if f is None:
        return ""
    box, at = ", ".join(f"{s.start}:{s.stop}" for s in f.box), ", ".join(map(str, f.at))
    mean_square = row.tolerance.mean_square and f.kind in (INPUT_GRADIENT, WEIGHT_GRADIENT)
    measure = "root mean square" if mean_square else "largest"
    return (
        f"{row.layer} ({row.kind}, {row.partition}) is the first layer that differs, in step {f.step + 1}: its "
        f"{f.what}, on rank {f.rank} with box [{box}], is {f.found:.9g} at [{at}], and {f.expected:.9g} where the "
        f"network runs whole; {measure} difference {_short(f.difference)}, tolerance {_short(f.allowed)}"
    )


def _layers(found: Sequence[Row], every: bool) -> Iterator[str]:
    shown, left = _choose(found, every, lambda row: row.equal, lambda row: row.strain)
    axes = [axis for axis in AXES if any(row.partition[axis] > 1 for row in shown)]
    cells = [_cells(row) for row in shown]
    titles = ["layer", "kind", "blocks", *TITLES.values(), "limit"]
    widths = [max(len(line[i]) for line in (titles, *cells)) for i in range(len(titles))]
    over = sum(widths) + 2 * len(widths) + len("DIFFERS") - WIDTH
    for i, least in ((1, 6), (0, 8)):  # what has no room is cut short: kinds first
        cut = max(0, min(over, widths[i] - least))
        widths[i], over = widths[i] - cut, over - cut
    if left:
        yield f"{left} more layers are equal (--all shows them); these are closest to their limit:"
    yield _line(titles, widths)
    for row, line in zip(shown, cells, strict=True):
        yield _line(line, widths) + ("  ok" if row.equal else "  DIFFERS")
        if row.note:
            yield textwrap.fill(row.note, WIDTH, initial_indent="    ", subsequent_indent="    ")
    legend = ", ".join(f"{LETTERS[axis]} {axis}" for axis in axes)
    fused = any(OUTPUT not in row.differences for row in shown)
    yield wrapped(
        "Largest differences of a layer's output, gradients of its inputs (dx) and weights (dw), and updated weights "
        "and running statistics (w), which start each step equal; relative to the largest element of the whole tensor"
        + (" (gradients with a second limit: root mean squares)" if any(r.tolerance.mean_square for r in shown) else "")
        + (". A layer without output goes on with the next one" if fused else "")
        + (f". Blocks: {legend}" if legend else "")
        + "."
    )


def _cells(row: Row) -> list[str]:
    differences = [_short(row.differences[kind]) if kind in row.differences else "-" for kind in TITLES]
    limit = row.tolerance
    allowed = (
        _short(limit.output) if limit.output == limit.gradient else f"{_short(limit.output)}/{_short(limit.gradient)}"
    )
    return [row.layer, row.kind, blocks(row.partition), *differences, allowed]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    name, kind, blocks = (width for width in widths[:3])
    left = [_end(cells[0], name).ljust(name), _cut(cells[1], kind).ljust(kind), cells[2].ljust(blocks)]
    right = [cell.rjust(width) for cell, width in zip(cells[3:], widths[3:], strict=True)]
    return "  ".join([*left, *right])


def _edges(edges: Sequence[Traffic], every: bool) -> Iterator[str]:
    moving = [edge for edge in edges if not edge.equal or edge.forward or edge.backward]
    shown, left = _choose(moving, every, lambda edge: edge.equal, lambda edge: edge.forward + edge.backward)
    if not moving:
        yield "no bytes move between ranks, as the cost model says"
        return
    if left:
        yield f"{left} more edges move as many bytes as the cost model counts; these move most:"
    total = [sum(edge.forward for edge in edges), sum(edge.backward for edge in edges)]
    steps = f"{edges[0].steps} step{'s' if edges[0].steps > 1 else ''}"
    lines: list[tuple[str, ...]] = [(f"bytes in {steps}", "forward", "backward", "cost model")]
    lines += [(e.edge, f"{e.forward:,}", f"{e.backward:,}", _model(e)) for e in shown]
    lines.append(("total", *(f"{n:,}" for n in total), "equal" if all(e.equal for e in edges) else "DIFFERS"))
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    widths[0] = min(widths[0], max(12, WIDTH - sum(widths[1:]) - 6))
    for name, *numbers in lines:
        right = [cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True)]
        yield "  ".join([_cut(name, widths[0]).ljust(widths[0]), *right])


def _model(edge: Traffic) -> str:
    if edge.equal:
        return "equal"
    return f"DIFFERS: {edge.predicted_forward:,} {edge.predicted_backward:,}"


def _choose(
    found: Sequence[T], every: bool, equal: Callable[[T], bool], weight: Callable[[T], float]
) -> tuple[list[T], int]:
    """What to show, in its order, and how many are left out: of many, those that differ and a few others."""
    if every or len(found) <= MANY:
        return list(found), 0
    fine = sorted((item for item in found if equal(item)), key=weight, reverse=True)
    hidden = {id(item) for item in fine[SHOWN:]}
    return [item for item in found if id(item) not in hidden], len(hidden)


def _short(value: float) -> str:
    """One digit: 2e-16, 0, inf."""
    return "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _end(name: str, width: int) -> str:
    """Names like layer1.0.conv2 differ at their end."""
    return name if len(name) <= width else f"…{name[len(name) - width + 1 :]}"


def _shape(shape: Shape) -> str:
    return " x ".join(map(str, shape))


# --- records ---------------------------------------------------------------------------------------------------------


def records(config: Config, ranks: int, found: Sequence[Row], edges: Sequence[Traffic]) -> list[dict[str, Any]]:
    """Flat records: one per layer, one per edge, and a summary."""
    about = {"network": config.model.name, "ranks": ranks, "precision": config.train.precision}
    layers = [
        about
        | {"layer": row.layer, "kind": row.kind, "partition": str(row.partition), "equal": row.equal}
        | {kind: row.differences.get(kind) for kind in KINDS}
        | {"tolerance": row.tolerance.output, "gradient_tolerance": row.tolerance.gradient, "note": row.note}
        for row in found
    ]
    equal = all(row.equal for row in found) and all(edge.equal for edge in edges)
    return [
        *layers,
        *(about | edge.record() for edge in edges),
        about | {"equal": equal, "verdict": " ".join(verdict(found, edges).split())},
    ]
