"""How a step scales with ranks: a table of 79 columns, records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hpctrain.console import wrapped
from hpctrain.machine import Machine
from hpctrain.planner.scaling import Point, Scaling
from hpctrain.report.layers import UNITS, best_unit, number

Others = Mapping[str, Mapping[int, float]]
"""{name of a baseline: {ranks: seconds of a step}}"""


def table(found: Scaling, others: Others, machine: Machine) -> Iterator[str]:
    """A line for each number of ranks; the chosen one is marked."""
    unit = best_unit(max(point.step.seconds for point in found.points))
    titles = ["ranks", unit, "samples/s", "efficiency"]
    titles += [f"x {name}" for name in others]
    titles += ["J/sample"] * (machine.power is not None) + ["price/epoch"] * 0
    rows = [[*_cells(found, point, unit, others), *_joules(point, machine)] for point in found.points]
    widths = [max(len(row[i]) for row in (titles, *rows)) for i in range(len(titles))]
    for row, point in zip((titles, *rows), (None, *found.points), strict=True):
        mark = "*" if point is found.chosen else " "
        yield f"{mark} " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
    compared = f" x {' and x '.join(others)}: how many times as long that takes." if others else ""
    yield wrapped(
        f"{unit}: of a step. Efficiency: samples/s of a rank, beside those on {found.points[0].ranks}."
        f"{compared} *: taken."
    )
    for said, ranks in _refusals(found.refused).items():
        numbers = ", ".join(map(str, ranks))
        yield wrapped(f"no plan on {numbers} rank{'s' * (ranks != [1])}: {said}")


def _cells(found: Scaling, point: Point, unit: str, others: Others) -> list[str]:
    cells = [str(point.ranks), number(point.step.seconds / UNITS[unit]), number(point.throughput)]
    cells.append(f"{100 * found.efficiency(point):.1f} %")
    for taken in others.values():
        cells.append(f"{taken[point.ranks] / point.step.seconds:.2f}" if point.ranks in taken else "-")
    return cells


def _joules(point: Point, machine: Machine) -> list[str]:
    return [] if machine.power is None else [number(point.joules(machine.power) / point.samples)]


def _refusals(refused: Mapping[int, str]) -> dict[str, list[int]]:
    """{why, its first sentence: ranks}"""
    found: dict[str, list[int]] = {}
    for ranks, why in refused.items():
        found.setdefault(why, []).append(ranks)
    return found


def records(found: Scaling, others: Others, machine: Machine, times: float) -> list[dict[str, Any]]:
    """A flat record for each number of ranks, of so many steps."""
    return [
        {
            "ranks": point.ranks,
            "predicted_seconds": times * point.step.seconds,
            "busy_seconds": times * point.step.busy,
            "samples_per_second": point.throughput,
            "efficiency": found.efficiency(point),
            "joules": None if machine.power is None else times * point.joules(machine.power),
            "price": times * point.price(machine.price) if machine.price else None,
            "chosen": point is found.chosen,
        }
        | {f"{name}_seconds": times * taken[point.ranks] for name, taken in others.items() if point.ranks in taken}
        for point in found.points
    ]
