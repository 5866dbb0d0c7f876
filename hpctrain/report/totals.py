"""What a plan takes in all, beside what others take on the same machine: text of 79 columns, and records."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from hpctrain.console import WIDTH, wrapped
from hpctrain.partition import Partition
from hpctrain.planner import paper
from hpctrain.planner.plan import Plan
from hpctrain.planner.seconds import PlanCost
from hpctrain.report.layers import UNITS, best_unit, number, seconds

Baselines = Mapping[str, tuple[Plan, PlanCost] | str]
"""{name: its plan and cost, or why there is none}"""


def phases(cost: PlanCost) -> str:
    """What a step consists of."""
    unit = best_unit(cost.seconds)
    found = {phase: number(_in(value, unit)) for phase, value in cost.phases().items() if value > 0}
    if cost.hidden > 0:
        found["allreduce"] = f"{found.get('allreduce', '0')} (and {number(_in(cost.hidden, unit))} behind backward)"
    if statistics := cost.parts * sum(layer.statistics for layer in cost.layers):
        found["redistribution"] += f" ({number(_in(statistics, unit))} of it statistics of norms)"
    said = ", ".join(f"{phase} {value}" for phase, value in found.items())
    return f"a step takes {seconds(cost.seconds)}: {said}"


def rates(cost: PlanCost, batch: int, samples: int) -> str:
    """Samples per second, and what an epoch of `samples` takes."""
    steps = samples // batch
    epoch = f"; an epoch of {steps:,} steps takes {seconds(steps * cost.seconds)}" if steps else ""
    return f"{number(batch / cost.seconds)} samples/s{epoch}"


def _in(value: float, unit: str) -> float:
    return value / UNITS[unit]


def shares(cost: PlanCost, sources: Mapping[str, str]) -> str:
    """From where the times of layers are, by their share of them all."""
    found: dict[str, float] = {}
    for layer in cost.layers:
        if layer.compute > 0:
            source = sources.get(layer.name, "formula")
            found[source] = found.get(source, 0.0) + layer.compute
    whole = sum(found.values()) or 1.0
    words = {"measured": "measured", "interpolated": "interpolated", "formula": "by formula"}
    said = [f"{100 * found[s] / whole:.0f} % {word}" for s, word in words.items() if s in found]
    return f"layer times: {', '.join(said)}" if said else "no layer takes any time"


def beside(cost: PlanCost, others: Baselines) -> Iterator[str]:
    """A table of what other plans take on as many ranks, and how many times as much as this one."""
    unit = best_unit(cost.seconds)
    width = max(len(name) for name in ("this plan", *others))
    yield f"{'on these ranks'.ljust(width)}  {unit + ' a step':>12}  {'x this':>8}"
    yield f"{'this plan'.ljust(width)}  {number(_in(cost.seconds, unit)):>12}  {'1.00':>8}"
    for name, other in others.items():
        if isinstance(other, str):
            start = f"{name.ljust(width)}  -  "
            yield textwrap.fill(other, WIDTH, initial_indent=start, subsequent_indent=" " * len(start))
        else:
            taken = other[1].seconds
            grid = _grid(other[0])
            room = WIDTH - width - 26
            said = f"  {grid}" if len(grid) <= room else ""
            yield f"{name.ljust(width)}  {number(_in(taken, unit)):>12}  {taken / cost.seconds:>8.2f}{said}"


def _grid(plan: Plan) -> str:
    """The partition that most of its layers have."""
    found = list(plan.partitions.values())
    most = max(dict.fromkeys(found), key=found.count)
    return str(most) if set(found) == {most} else f"mostly {most}"


def records(cost: PlanCost, others: Baselines, times: float) -> list[dict[str, Any]]:
    """A flat record for the plan, and one for it beside each other plan, of so many steps."""
    mine = times * cost.seconds
    about = {"plan": "searched", "seconds": mine, "predicted_seconds": mine}
    found = [about | {f"{phase}_seconds": times * value for phase, value in cost.phases().items()}]
    for name, other in others.items():
        taken = None if isinstance(other, str) else times * other[1].seconds
        ratio = None if taken is None else taken / mine
        why = other if isinstance(other, str) else None
        found.append(about | {"peer": name, "peer_seconds": taken, "ratio": ratio, "why": why})
    return found


def grid_record(grid: Partition, cost: PlanCost, times: float) -> dict[str, Any]:
    """One grid for all layers: what ranks do alone, exchanges, and sums of gradients that nothing hides."""
    found = cost.phases()
    model, batch = found["halo"] + found["redistribution"], found["allreduce"]
    return {
        "pr": grid.pr,
        "pc": grid.pc,
        "cut": str(grid),
        "compute_seconds": times * (cost.seconds - model - batch),
        "model_seconds": times * model,
        "batch_seconds": times * batch,
        "seconds": times * cost.seconds,
    }


def paper_record(found: paper.Record) -> dict[str, Any]:
    """The same of a grid by the paper's accounting."""
    return {
        "pr": found.pr,
        "pc": found.pc,
        "compute_seconds": found.compute_seconds,
        "model_seconds": found.model_seconds,
        "batch_seconds": found.batch_seconds,
        "seconds": found.seconds,
    }


def grid_table(found: list[dict[str, Any]], per: str) -> Iterator[str]:
    """A line per record with `pr`, `pc` and seconds; the fastest is marked."""
    unit = best_unit(max(record["seconds"] for record in found))
    least = min(found, key=lambda record: record["seconds"])
    keys = ("compute_seconds", "model_seconds", "batch_seconds", "seconds")
    yield f"  {'Pr x Pc':<12}{'compute':>12}{'model':>12}{'batch':>12}{'all':>12}"
    for record in found:
        grid = f"{record['pr']} x {record['pc']}"
        cells = "".join(f"{number(_in(record[key], unit)):>12}" for key in keys)
        yield f"{'*' if record is least else ' '} {grid:<12}{cells}{'  ' + record['cut'] if record.get('cut') else ''}"
    yield wrapped(
        f"In {unit} per {per}. Pc: blocks of the batch, Pr: of samples and model together; model: exchanges between "
        "layers, batch: sums of gradients. *: the fastest."
    )
