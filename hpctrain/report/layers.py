"""A plan as a table: a line per layer or per run of layers, 79 columns wide, and the same as records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpctrain.console import LETTERS, WIDTH, blocks, wrapped
from hpctrain.memory import MIB
from hpctrain.partition import AXES, Partition
from hpctrain.planner.seconds import LayerCost, PlanCost

MANY = 40
"""Lines above which neighbours that are cut alike are put into one."""

UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}

COLUMNS = ("compute", "halo", "redistribution", "allreduce", "memory")
"""Of a line, after the layer and its blocks; memory is of bytes, the others of seconds."""


@dataclass(frozen=True)
class Line:
    """Neighbouring layers with one partition; figures are sums."""

    layers: tuple[LayerCost, ...]

    @property
    def partition(self) -> Partition:
        """That of all of them."""
        return self.layers[0].partition

    @property
    def name(self) -> str:
        """The first layer, and how many follow."""
        more = len(self.layers) - 1
        return self.layers[0].name + (f" +{more}" if more else "")

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

    Neighbours with one partition share a line: those that take no time of their own go with the one before, and if that
    leaves too many, whole blocks of the network (what stands before the first dot of a name), or all. Or not at all.
    """
    layers = [layer for layer in cost.layers if layer.kind != "Input"]
    if every:
        return [Line((layer,)) for layer in layers]
    found: list[Line] = []
    for joined in (_follows, _same_block, _same_partition):
        found = _fold(layers, joined)
        if len(found) <= MANY:
            break
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
    return idle and _same_partition(before, layer)


def _same_block(before: LayerCost, layer: LayerCost) -> bool:
    return before.name.split(".")[0] == layer.name.split(".")[0] and _same_partition(before, layer)


def _same_partition(before: LayerCost, layer: LayerCost) -> bool:
    return before.partition == layer.partition


# --- text ------------------------------------------------------------------------------------------------------------


def table(cost: PlanCost, every: bool = False) -> Iterator[str]:
    """A heading, a line for each of `lines`, their sums, and what the letters and figures mean."""
    found = lines(cost, every)
    figures = [line.figures(cost.parts) for line in found]
    total = [sum(column) for column in zip(*figures, strict=True)]
    unit = best_unit(max(total[:-1]))
    titles = ["layers", "blocks", "compute", "halo", "redistr.", "allreduce", "MiB"]
    cells = [[line.name, blocks(line.partition), *_cells(row, unit)] for line, row in zip(found, figures, strict=True)]
    cells.append(["all", "", *_cells(total, unit)[:-1], ""])  # memory is used again, so that it does not add up
    widths = [max(len(row[i]) for row in (titles, *cells)) for i in range(len(titles))]
    over = sum(widths) + 2 * (len(widths) - 1) - WIDTH
    widths[0] = max(8, widths[0] - max(0, over))
    yield from (_line(row, widths) for row in (titles, *cells))
    cut = [axis for axis in AXES if any(line.partition[axis] > 1 for line in found)]
    legend = f" Blocks: {', '.join(f'{LETTERS[axis]} {axis}' for axis in cut)}." if cut else ""
    folded = " +N: with the N layers after it." if any(len(line.layers) > 1 for line in found) else ""
    yield wrapped(
        f"Times in {unit}, of a step, forward and backward, on the slowest rank; halo: exchanges between layers that "
        "are cut alike, redistr.: between others, partial sums and statistics; MiB: a rank's output and weights."
        f"{legend}{folded}"
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
    """With the unit that suits it: "1.23 ms"."""
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
