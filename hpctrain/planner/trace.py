"""What every rank does when, and as a trace that https://ui.perfetto.dev or chrome://tracing opens.

The format: "Trace Event Format", docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

MICRO = 1e6
"""Microseconds, which traces count in, of a second."""


class Span(NamedTuple):
    """What one rank does from `begin` to `end`, in seconds from the beginning of the step."""

    rank: int
    name: str
    phase: str
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it takes."""
        return self.end - self.begin


@dataclass(frozen=True)
class Timeline:
    """One step of every rank. The spans of a rank follow one another; between them it has nothing to do."""

    seconds: float
    """Until the last rank is done."""
    hosts: tuple[int, ...]
    """The host of each rank."""
    spans: tuple[Span, ...]
    """By rank, then by time. Phases: input, compute, halo, redistribution, statistics, allreduce (waiting for sums, or
    adding), update and step."""
    sums: tuple[Span, ...] = ()
    """Every sum of gradients from when a rank starts it until it has it, whatever else the rank does meanwhile."""

    def of(self, rank: int) -> list[Span]:
        """The spans of one rank."""
        return [span for span in self.spans if span.rank == rank]

    def phases(self, rank: int) -> dict[str, float]:
        """Seconds of one rank by phase."""
        found: dict[str, float] = {}
        for span in self.of(rank):
            found[span.phase] = found.get(span.phase, 0.0) + span.seconds
        return found

    @property
    def hidden(self) -> float:
        """The share of the time with a gradient sum under way in which ranks did something else; 0 without sums."""
        under_way = sum(_covered([span for span in self.sums if span.rank == rank]) for rank in range(len(self.hosts)))
        shown = sum(span.seconds for span in self.spans if span.phase == "allreduce")
        return max(0.0, 1 - shown / under_way) if under_way > 0 else 0.0


def _covered(spans: Sequence[Span]) -> float:
    """Seconds in which at least one of `spans` is."""
    total, until = 0.0, 0.0
    for span in sorted(spans, key=lambda span: span.begin):
        total += max(0.0, span.end - max(span.begin, until))
        until = max(until, span.end)
    return total


def to_json(timeline: Timeline) -> bytes:
    """The trace: a process for each host, a thread for each rank, and beside it the sums of gradients under way."""
    return msgspec.json.encode({"traceEvents": list(_events(timeline)), "displayTimeUnit": "ms"})


def write(timeline: Timeline, path: Path) -> None:
    """`to_json` into a file."""
    path.write_bytes(to_json(timeline))


def _events(timeline: Timeline) -> Iterator[dict[str, Any]]:
    for host in sorted(set(timeline.hosts)):
        yield {"ph": "M", "name": "process_name", "pid": host, "args": {"name": f"host {host}"}}
    for rank, host in enumerate(timeline.hosts):
        yield {"ph": "M", "name": "thread_name", "pid": host, "tid": rank, "args": {"name": f"rank {rank}"}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": host, "tid": rank, "args": {"sort_index": rank}}
    for span in timeline.spans:
        where = {"pid": timeline.hosts[span.rank], "tid": span.rank}
        times = {"ts": span.begin * MICRO, "dur": span.seconds * MICRO}
        yield {"ph": "X", "name": span.name, "cat": span.phase, **where, **times}
    for number, span in enumerate(timeline.sums):  # several at once: events that need not nest
        same = {"cat": "sum", "id": number, "pid": timeline.hosts[span.rank], "tid": span.rank}
        name = f"rank {span.rank}: {span.name}"
        yield {"ph": "b", "name": name, "ts": span.begin * MICRO, **same}
        yield {"ph": "e", "name": name, "ts": span.end * MICRO, **same}
