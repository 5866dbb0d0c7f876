"""On how many ranks: every number is tried, and the one with the most samples per second, joule or price is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hpctrain.errors import ConfigError, PlanError
from hpctrain.machine import Machine, Power

TOLERANCE = 0.01
"""More ranks are only taken where they gain more than this share."""

HOUR = 3600.0

PER = {"time": "second", "energy": "joule", "cost": "unit of price"}
"""{objective: what samples are counted per}"""


class Step(NamedTuple):
    """A step by the best plan on some ranks."""

    seconds: float
    busy: float
    """Seconds of these that a rank computes; the others it waits."""


@dataclass(frozen=True)
class Point:
    """A step of `samples` samples on `ranks` ranks."""

    ranks: int
    step: Step
    samples: int

    @property
    def throughput(self) -> float:
        """Samples per second."""
        return self.samples / self.step.seconds

    def joules(self, power: Power) -> float:
        """Of all ranks for a step: they compute, or wait."""
        return joules(self.ranks, self.step, power)

    def price(self, per_hour: float) -> float:
        """Of all ranks for a step, where an hour of one costs `per_hour`."""
        return self.ranks * per_hour * self.step.seconds / HOUR

    def gain(self, objective: str, machine: Machine) -> float:
        """Samples per second, joule or unit of price. Raises ConfigError where the machine's file does not say."""
        require(objective, machine)
        if objective == "energy" and machine.power is not None:
            return self.samples / self.joules(machine.power)
        return self.samples / self.price(machine.price) if objective == "cost" else self.throughput


@dataclass(frozen=True)
class Scaling:
    """What was tried, by rising number of ranks, and what is best of it."""

    points: tuple[Point, ...]
    refused: dict[int, str]
    """{ranks: why no plan for them exists}"""
    chosen: Point
    why: str

    def efficiency(self, point: Point) -> float:
        """Its throughput per rank beside that of the fewest ranks."""
        first = self.points[0]
        return point.throughput / point.ranks / (first.throughput / first.ranks)


def joules(ranks: int, step: Step, power: Power) -> float:
    """Of so many ranks for a step."""
    return ranks * (power.busy * step.busy + power.idle * (step.seconds - step.busy))


def require(objective: str, machine: Machine) -> None:
    """Raises ConfigError where the machine's file lacks what `objective` is counted by."""
    name = machine.name or "this machine"
    if objective == "energy" and machine.power is None:
        raise ConfigError(
            f'objective energy: {name} has no figures of power; add "power": {{"idle": WATTS, "busy": WATTS}} of a '
            "rank to its file, or choose --objective time"
        )
    if objective == "cost" and not machine.price:
        raise ConfigError(
            f'objective cost: {name} has no price; add "price": WHAT AN HOUR OF A RANK COSTS to its file, or choose '
            "--objective time"
        )


def counts(first: int, last: int, per_host: int | None = None) -> list[int]:
    """Numbers of ranks to try: both ends, and the powers of two and whole hosts (1, 2, 4, ... of them) between."""
    found = {first, last}
    for unit in {1, per_host or 1}:
        while unit < last:
            found.add(unit)
            unit *= 2
    return sorted(n for n in found if first <= n <= last)


def how_many(
    step: Callable[[int], Step],
    tried: Iterable[int],
    samples: int,
    objective: str,
    machine: Machine,
    tolerance: float = TOLERANCE,
    patience: int | None = None,
) -> Scaling:
    """The best of the numbers of ranks in `tried`, for steps of `samples` samples.

    `step` gives the step on so many ranks, or raises PlanError where no plan exists for them. Ranks that slow a step
    down are refused whatever the objective; of numbers that are within `tolerance` of the best, the smallest is taken.
    After `patience` numbers in a row that are slower than the fastest, larger ones are not tried.
    Raises PlanError where no number will do, ConfigError where the machine lacks the figures.
    """
    require(objective, machine)
    points, refused, fastest = list[Point](), dict[int, str](), 0
    for ranks in sorted(tried):
        if patience is not None and len(points) - fastest > patience:
            break
        try:
            points.append(Point(ranks, step(ranks), samples))
        except PlanError as error:
            refused[ranks] = str(error)
        else:
            fastest = max(range(len(points)), key=lambda i: points[i].throughput)
    if not points:
        if not refused:
            raise PlanError("no number of ranks to try; give --ranks N, or --sweep 1..N")
        most = max(refused)
        numbers = f"{min(refused)} to {most} ranks" if len(refused) > 1 else f"{most} rank{'s' * (most > 1)}"
        raise PlanError(f"no plan for {numbers}. On {most}: {refused[most]}")
    chosen, why = _best(points, objective, machine, tolerance)
    return Scaling(tuple(points), refused, chosen, why)


def _best(points: Sequence[Point], objective: str, machine: Machine, tolerance: float) -> tuple[Point, str]:
    """The smallest number within `tolerance` of the best of those that do not slow down, and why that."""
    able = [points[0]]
    for point in points[1:]:
        if point.throughput > max(p.throughput for p in able):
            able.append(point)
    most = max(point.gain(objective, machine) for point in able)
    chosen = next(point for point in able if point.gain(objective, machine) >= (1 - tolerance) * most)
    return chosen, _why(points, chosen, objective, machine, tolerance)


def _why(points: Sequence[Point], chosen: Point, objective: str, machine: Machine, tolerance: float) -> str:
    per = PER[objective]
    gain = chosen.gain(objective, machine)
    said = f"{gain:,.0f} samples per {per}" if gain >= 1000 else f"{gain:.3g} samples per {per}"
    if len(points) == 1:
        return f"{said}; no other number was tried"
    best = chosen.gain(objective, machine)
    reasons = []
    fewer = [p for p in points if p.ranks < chosen.ranks]
    more = [p for p in points if p.ranks > chosen.ranks]
    if fewer:
        reasons.append(f"{fewer[-1].ranks}: {_less(fewer[-1], best, objective, machine)}")
    if more:
        better = max(more, key=lambda p: p.gain(objective, machine))
        gained = better.gain(objective, machine) / best - 1
        slower = better.throughput <= chosen.throughput
        if 0 < gained <= tolerance:
            reasons.append(f"{better.ranks}: only {100 * gained:.1g} % more, less than {100 * tolerance:g} %")
        elif slower and objective != "time":
            reasons.append(f"{better.ranks} would slow the step down")
        else:
            reasons.append(f"{better.ranks}: {_less(better, best, objective, machine)}")
    else:
        reasons.append(f"more than {chosen.ranks} were not tried")
    return f"{said}; {', '.join(reasons)}"


def _less(point: Point, best: float, objective: str, machine: Machine) -> str:
    gain = point.gain(objective, machine)
    lost = 100 * (1 - gain / best)
    if lost >= 50:
        return f"{best / gain:.2g} times less"
    return f"{lost:.2g} % less"
