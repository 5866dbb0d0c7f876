"""What the steps of a run took, phase by phase, beside what the planner says that they take."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from hpctrain.errors import ConfigError
from hpctrain.executor import Executor
from hpctrain.feed import Feed
from hpctrain.machine import Machine
from hpctrain.together import Together

if TYPE_CHECKING:
    from hpctrain.planner.seconds import PlanCost

PHASES = ("compute", "exchange", "allreduce", "input", "other")
"""What the seconds of a step add up from. other: the update, the agreement of all ranks, and the loop itself."""

WARMING = 3
"""First steps of a run, which touch memory for the first time: they do not count where there are others."""

SMALL = 0.01
"""The share of a step below which nobody cares how far off a phase is."""


# --- measured --------------------------------------------------------------------------------------------------------


class Clock:
    """What this rank spends: in the epoch so far, and in its steps. Local."""

    def __init__(self, executor: Executor, feed: Feed, together: Together, batch: int) -> None:
        """`batch`: samples of a step, over all ranks."""
        self._executor, self._feed, self._together, self._batch = executor, feed, together, batch
        self.seconds = 0.0
        """Of the epoch, up to the last step."""
        self.rate: float | None = None
        """Samples per second of the epoch; None before its first step."""
        self._early: list[list[float]] = []
        self._late, self._steps = [0.0] * len(PHASES), 0

    def begin_epoch(self, step: int) -> None:
        """An epoch, or the rest of one, begins after `step` steps of the run."""
        self._begin, self._first, self._before = perf_counter(), step, self._phases()
        self.seconds, self.rate = 0.0, None

    def count(self, step: int) -> None:
        """The run has come to `step`."""
        if step > self._first:
            self.seconds = perf_counter() - self._begin
            self.rate = (step - self._first) * self._batch / self.seconds

    def epoch(self) -> dict[str, Any]:
        """Fields of the epoch's record: seconds, in all and by phase, the rate, and bytes sent in exchanges."""
        spent = {phase: value - self._before[phase] for phase, value in self._phases().items()}
        return {"seconds": self.seconds, "samples_per_second": self.rate, **spent}

    def _phases(self) -> dict[str, float]:
        spent = {f"{phase}_seconds": seconds for phase, seconds in self._executor.seconds.items()}
        if self._together.apart:
            spent |= {"sync_seconds": self._together.seconds, "waited_seconds": self._together.waited}
        return spent | {"input_seconds": self._feed.seconds, "bytes_sent": self._executor.bytes_sent()}

    def begin_step(self) -> None:
        """A step begins."""
        self._at = self._now()

    def end_step(self) -> None:
        """It is done."""
        *named, whole = (now - before for before, now in zip(self._at, self._now(), strict=True))
        taken = [*named, whole - sum(named)]
        if len(self._early) < WARMING:
            self._early.append(taken)
        else:
            self._late = [a + b for a, b in zip(self._late, taken, strict=True)]
            self._steps += 1

    def _now(self) -> tuple[float, ...]:
        spent = self._executor.seconds
        return spent["compute"], spent["exchange"], spent["allreduce"], self._feed.seconds, perf_counter()

    def steps(self, rank: int) -> Steps:
        """The mean of the steps so far, as `rank` had them."""
        if self._steps:
            return Steps(rank, self._steps, tuple(spent / self._steps for spent in self._late))
        counted = self._early[1:] or self._early
        return Steps(rank, len(counted), tuple(sum(column) / len(counted) for column in zip(*counted, strict=True)))


@dataclass(frozen=True)
class Steps:
    """The mean of `count` steps of one rank."""

    rank: int
    count: int
    seconds: tuple[float, ...]
    """By PHASES."""

    @property
    def step(self) -> float:
        """Of a whole step."""
        return sum(self.seconds)


def slowest(every: Sequence[Steps]) -> Steps | None:
    """That of the rank that computes longest: the others wait for it, which is no phase of a plan. None if no steps."""
    compute = PHASES.index("compute")
    return max((s for s in every if s.count), key=lambda s: (s.seconds[compute], -s.rank), default=None)


# --- predicted -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forecast:
    """What a step takes by the cost of a plan."""

    seconds: tuple[float | None, ...]
    """By PHASES; None of what the machine's file says nothing of."""
    source: str
    """Where the machine's figures are from, as the end of a sentence."""
    guess: bool = False
    """Whether how fast a rank computes is a guess."""

    @property
    def step(self) -> float:
        """Of a whole step, less what is not known."""
        return sum(filter(None, self.seconds))

    @classmethod
    def of(cls, cost: PlanCost, machine: Machine, source: str, guess: bool = False) -> Forecast:
        """The phases of a plan as the executor times them: norms gather their statistics while they compute."""
        said = cost.phases()
        statistics = cost.parts * sum(layer.statistics for layer in cost.layers)
        exchange = said["halo"] + said["redistribution"] - statistics
        other = said["update"] + said["step"]
        reading = None if machine.storage is None else said["input"]
        found = said["compute"] + statistics, exchange, said["allreduce"], reading, other
        return cls(found, source, guess)


# --- both ------------------------------------------------------------------------------------------------------------


def error(predicted: float, measured: float) -> float:
    """How far the prediction is off, as a share of what was measured."""
    return predicted / measured - 1 if measured > 0 else 0.0


def record(steps: Steps, forecast: Forecast | None) -> dict[str, Any]:
    """Flat fields for metrics.jsonl; what is not predicted is None."""
    found: dict[str, Any] = {"rank": steps.rank, "steps": steps.count, **summary(steps, forecast)}
    found |= {f"{phase}_seconds": spent for phase, spent in zip(PHASES, steps.seconds, strict=True)}
    said: Sequence[float | None] = (None,) * len(PHASES) if forecast is None else forecast.seconds
    found |= {f"predicted_{phase}_seconds": spent for phase, spent in zip(PHASES, said, strict=True)}
    return found | {"source": None if forecast is None else forecast.source}


def summary(steps: Steps, forecast: Forecast | None) -> dict[str, float | None]:
    """Of a whole step: seconds measured and predicted, and the error of the latter."""
    said = None if forecast is None else forecast.step
    return {
        "step_seconds": steps.step,
        "predicted_seconds": said,
        "error": None if said is None else error(said, steps.step),
    }


def table(steps: Steps, ranks: int, forecast: Forecast | None) -> list[str]:
    """Lines for people."""
    counted = f"mean of {steps.count}" if steps.count > 1 else "the only one"
    of = f", of rank {steps.rank}, which computes longest" if ranks > 1 else ""
    lines = [f"a step in milliseconds, {counted}{of}:"]
    if forecast is None:
        rows = [*zip(PHASES, steps.seconds, strict=True), ("step", steps.step)]
        return lines + [f"  {name:<10}{_ms(seconds):>10}" for name, seconds in rows]
    lines.append(f"  {'':<10}{'measured':>10}{'predicted':>11}{'error':>9}")
    both = zip((*PHASES, "step"), (*steps.seconds, steps.step), (*forecast.seconds, forecast.step), strict=True)
    for name, measured, predicted in both:
        if predicted is None:
            lines.append(f"  {name:<10}{_ms(measured):>10}{'-':>11}{'-':>9}")
            continue
        small = max(measured, predicted) < SMALL * max(steps.step, forecast.step) or measured == 0
        far = "-" if small else f"{100 * error(predicted, measured):+.0f} %"
        lines.append(f"  {name:<10}{_ms(measured):>10}{_ms(predicted):>11}{far:>9}")
    return [*lines, f"predicted {forecast.source}"]


def _ms(seconds: float) -> str:
    """Milliseconds with at most three digits that mean something."""
    ms = 1e3 * seconds
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def write(folder: Path, steps: Steps, forecast: Forecast | None) -> None:
    """`prediction.json` of a run folder. Raises ConfigError where it cannot be written."""
    found: dict[str, Any] = {
        "rank": steps.rank,
        "steps": steps.count,
        "source": None if forecast is None else forecast.source,
        "measured": _by_phase(steps),
        "predicted": None if forecast is None else _by_phase(forecast),
        "error": summary(steps, forecast)["error"],
    }
    path = folder / "prediction.json"
    try:
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    except OSError as failed:
        raise ConfigError(f"{path}: cannot be written: {failed}; free space, or give another run.folder") from failed


def _by_phase(found: Steps | Forecast) -> Mapping[str, float | None]:
    return {**dict(zip(PHASES, found.seconds, strict=True)), "step": found.step}
