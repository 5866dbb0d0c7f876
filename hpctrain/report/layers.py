"""A plan as a table: a line per layer or per run of layers, 79 columns wide, and the same as records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from hpctrain.console import LETTERS, WIDTH, blocks, wrapped
from hpctrain.memory import MIB
from hpctrain.partition import AXES, Partition
from hpctrain.planner.seconds import LayerCost, PlanCost

MANY = 40
"""Lines above which neighbours are put into one."""

HOUR = 3600.0

UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}

COLUMNS = ("compute", "halo", "redistribution", "allreduce", "memory")
"""Of a line, after the layer and its blocks; memory is of bytes, the others of seconds."""


@dataclass(frozen=True)
class Line:
    """Layers that are shown together; figures are sums."""

    layers: tuple[LayerCost, ...]
    repeats: int = 1
    """How many equal blocks of the network the layers are of."""

    @property
    def blocks(self) -> str:
        """The partition that most of the layers have, in letters."""
        found = [layer.partition for layer in self.layers]
        most = max(dict.fromkeys(found), key=found.count)
        return blocks(most) + (" .." if set(found) != {most} else "")

    @property
    def name(self) -> str:
        """The first layer, how many follow, and how often."""
        more = len(self.layers) // self.repeats - 1
        return self.layers[0].name + (f" +{more}" if more else "") + (f" x{self.repeats}" if self.repeats > 1 else "")

    def figures(self, parts: int) -> list[float]:
        """One for each of COLUMNS, of a step of so many parts."""
        found = self.layers
        return [
            parts * sum(layer.compute for layer in found),
            parts * sum(layer.halo for layer in found),
            parts * sum(layer.redistribution + layer.statistics for layer in found),
            sum(layer.allreduce for layer in found),
            float(sum(layer.memory for layer in found)),
        ]


def lines(cost: PlanCost, every: bool = False) -> list[Line]:
    """The lines of a plan. Inputs have none.

    A layer that takes no time of its own goes with the one before, if both are cut alike. If that leaves too many
    lines, neighbours in a stage that are cut alike share theirs, or blocks of a stage that follow one another and are
    cut alike, whichever leaves fewer; else all of a stage. Block and stage are what stands before the last and the
    first dot of a name.
    """
    layers = [layer for layer in cost.layers if layer.kind != "Input"]
    if every:
        return [Line((layer,)) for layer in layers]
    found = _fold(layers, _follows)
    if len(found) > MANY:
        found = min(_repeated(found), _fold(layers, _same_partition), key=len)
    if len(found) > MANY:
        found = _fold(layers, _same_stage)
    return found


def _fold(layers: Sequence[LayerCost], joined: Callable[[LayerCost, LayerCost], bool]) -> list[Line]:
    found: list[list[LayerCost]] = []
    for layer in layers:
        if found and joined(found[-1][-1], layer):
            found[-1].append(layer)
        else:
            found.append([layer])
    return [Line(tuple(group)) for group in found]


def _follows(before: LayerCost, layer: LayerCost) -> bool:
    idle = layer.compute == layer.exchange == layer.allreduce == 0
    return idle and before.partition == layer.partition


def _same_partition(before: LayerCost, layer: LayerCost) -> bool:
    return _same_stage(before, layer) and before.partition == layer.partition


def _same_stage(before: LayerCost, layer: LayerCost) -> bool:
    return _follows(before, layer) or _ends(before.name)[0] == _ends(layer.name)[0]


def _repeated(found: Sequence[Line]) -> list[Line]:
    """The same with blocks that follow one another, and have the same layers cut alike, in one."""
    joined: list[list[Line]] = []
    for _, block in groupby(found, lambda line: line.layers[0].name.rpartition(".")[0]):
        more = list(block)
        if joined and _signature(joined[-1]) == _signature(more):
            pairs = zip(joined[-1], more, strict=True)
            joined[-1] = [Line(line.layers + other.layers, line.repeats + 1) for line, other in pairs]
        else:
            joined.append(more)
    return [line for block in joined for line in block]


def _signature(block: Sequence[Line]) -> list[tuple[str, str, Partition, int]]:
    """What blocks that repeat have in common; what has no dot in its name repeats nothing."""
    return [(*_ends(line.layers[0].name), line.layers[0].partition, len(line.layers) // line.repeats) for line in block]


def _ends(name: str) -> tuple[str, str]:
    """The stage of a layer, and its name within its block."""
    return name.partition(".")[0], name.rpartition(".")[2]


# --- text ------------------------------------------------------------------------------------------------------------


def table(cost: PlanCost, every: bool = False) -> Iterator[str]:
    """A heading, a line for each of `lines`, their sums, and what the letters and figures mean."""
    found = lines(cost, every)
    figures = [line.figures(cost.parts) for line in found]
    total = [sum(column) for column in zip(*figures, strict=True)]
    unit = best_unit(max(total[:-1]))
    titles = ["layers", "blocks", "compute", "halo", "redistr.", "allreduce", "MiB"]
    cells = [[line.name, line.blocks, *_cells(row, unit)] for line, row in zip(found, figures, strict=True)]
    cells.append(["all", "", *_cells(total, unit)[:-1], ""])  # memory is used again, so that it does not add up
    widths = [max(len(row[i]) for row in (titles, *cells)) for i in range(len(titles))]
    over = sum(widths) + 2 * (len(widths) - 1) - WIDTH
    widths[0] = max(8, widths[0] - max(0, over))
    yield from (_line(row, widths) for row in (titles, *cells))
    cut = [axis for axis in AXES if any(layer.partition[axis] > 1 for line in found for layer in line.layers)]
    legend = f" Blocks: {', '.join(f'{LETTERS[axis]} {axis}' for axis in cut)}." if cut else ""
    legend += " .. : and others." if any(line.blocks.endswith("..") for line in found) else ""
    legend += " +N: with the N layers after it." if any(len(line.layers) > line.repeats for line in found) else ""
    legend += " xN: in N blocks alike." if any(line.repeats > 1 for line in found) else ""
    yield wrapped(
        f"Times in {unit}, of a step, forward and backward, on the slowest rank; halo: exchanges between layers that "
        "are cut alike, redistr.: between others, partial sums and statistics; MiB: a rank's output and weights."
        f"{legend}"
    )


def best_unit(seconds: float) -> str:
    """The largest unit in which so much is 1 or more."""
    return next((unit for unit, size in UNITS.items() if seconds >= size), "us")


def number(value: float) -> str:
    """Three digits, or all those before the point: 0.0123, 1.23, 12.3, 1,234; 0 where there is nothing."""
    if value == 0:
        return "0"
    if value >= 99.95:
        return f"{value:,.0f}"
    decimals = 1 if value >= 9.995 else 2 if value >= 0.9995 else 3
    return f"{value:.{decimals}f}"


def seconds(value: float) -> str:
    """With the unit that suits it: "1.23 ms", "3.4 h"."""
    if value >= 2 * HOUR:
        return f"{number(value / HOUR)} h"
    unit = best_unit(value)
    return f"{number(value / UNITS[unit])} {unit}"


def _cells(figures: Sequence[float], unit: str) -> list[str]:
    *times, nbytes = figures
    return [*(number(t / UNITS[unit]) for t in times), number(nbytes / MIB)]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    left = [_shortened(cells[0], widths[0]).ljust(widths[0]), cells[1].ljust(widths[1])]
    right = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True)]
    return "  ".join([*left, *right]).rstrip()


def _shortened(name: str, width: int) -> str:
    """Names like layer1.0.conv2 differ at their end."""
    return name if len(name) <= width else f"…{name[len(name) - width + 1 :]}"


# --- records ---------------------------------------------------------------------------------------------------------


def records(cost: PlanCost, times: float, sources: Mapping[str, str]) -> list[dict[str, Any]]:
    """A flat record per layer, of so many steps. `sources` says where the times of layers that compute are from."""
    return [
        {
            "layer": layer.name,
            "kind": layer.kind,
            "partition": layer.partition.parts(),
            "pr": layer.partition.pr,
            "pc": layer.partition.pc,
            "compute_seconds": times * cost.parts * layer.compute,
            "halo_seconds": times * cost.parts * layer.halo,
            "redistribution_seconds": times * cost.parts * (layer.redistribution + layer.statistics),
            "allreduce_seconds": times * layer.allreduce,
            "memory_bytes": layer.memory,
            "sent_bytes": times * cost.parts * layer.sent_bytes,
            "source": sources.get(layer.name),
        }
        for layer in cost.layers
    ]
